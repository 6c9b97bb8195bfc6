#!/usr/bin/env bash
# Make the environment: the versions of requirements.lock and no others, then the kit itself, editable.
#
#   tools/install.sh [VENV]        uv does it where there is one or one can be had, else pip; both read the same file
#   INSTALLER=pip tools/install.sh        choose pip
#
# A local folder of wheels (PIP_FIND_LINKS or UV_FIND_LINKS) is honoured by both. The lock names torch without a local
# version, so such a folder gives its CPU build, and the public index gives a machine with a GPU its CUDA build.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
python=$venv/bin/python
pinned() { grep -oE "^$1==[^ ]+" requirements.lock; }

"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "install: needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1; }
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"

uv=
if [ "${INSTALLER:-uv}" = uv ]; then
    if uv --version >/dev/null 2>&1; then uv=uv
    elif "$python" -m pip install -q "$(pinned uv)"; then uv=$venv/bin/uv
    else echo "install: no uv here, going on with pip" >&2; fi
fi
if [ -n "$uv" ]; then
    # pip separates folders by spaces, uv by commas
    export UV_FIND_LINKS=${UV_FIND_LINKS:-$(echo "${PIP_FIND_LINKS:-}" | xargs | tr ' ' ',')}
    [ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS
    add() { "$uv" pip install -q -p "$python" "$@"; }
else
    add() { "$python" -m pip install -q "$@"; }
fi

echo "install: $venv by ${uv:-pip}, $(grep -c '==' requirements.lock) packages from requirements.lock"
add "$(pinned torch)" # first and alone: the one package whose build depends on the machine
add -r requirements.lock
add --no-deps --no-build-isolation -e .
