#!/usr/bin/env bash
# Runs pytest: a process for each core (WORKERS=1: one), then the tests marked `alone`, one by one. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

# one thread a process unless a test asks for more; threads that wait sleep, since others want the core
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive
workers=${WORKERS:-$(env -u OMP_NUM_THREADS nproc)} worst=0 empty=0 ends=()
said=$(mktemp)
trap 'rm -f "$said"' EXIT
color=$([ -t 1 ] && echo yes || echo no)

part() { # a part of the tests; none found is an error only where neither part found one
    local code=0
    pytest --color="$color" "$@" | tee "$said" || code=$?
    ends+=("$(tail -n 1 "$said")")
    if [ $code = 5 ]; then empty=$((empty + 1)); elif [ $code != 0 ] && [ $worst = 0 ]; then worst=$code; fi
}
part --alone without -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
part --alone only "$@"
[ $empty != 2 ] || { echo "no test matches: $*" >&2; exit 5; }
echo "$workers processes: ${ends[0]}; then one by one: ${ends[1]}"
exit $worst
