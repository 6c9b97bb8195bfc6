#!/usr/bin/env bash
# What some tests need beside the environment, each set in a folder of its own, so that nothing else imports it:
# VENV/extras/NAME holds the packages of tests/extras/NAME.txt, without what the lock brings already.
#
#   tools/extras.sh [VENV]
#
# In the environment itself they would cost every process: PEFT imports bitsandbytes wherever it finds it.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
for list in tests/extras/*.txt; do
    folder=$venv/extras/$(basename "$list" .txt)
    cmp -s "$list" "$folder/.installed" && continue
    echo "extras: $folder from $list"
    rm -rf "$folder"
    "$venv/bin/python" -m pip install -q --no-deps --target "$folder" -r "$list"
    cp "$list" "$folder/.installed"
done
