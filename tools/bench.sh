#!/usr/bin/env bash
# Runs the benchmarks one after the other; one that fails, or misses what it promises, takes none of the others with it.
#   BENCH="decode_speed serve_speed"   only these; default: all
#   BANKING77=DIR                      the folder with banking77's train.csv: finetune_speed needs it
#   LLAMA=DIR                          the folder with llama-server and llama-quantize: without it serve_speed leaves llama.cpp out
set -euo pipefail
cd "$(dirname "$0")/.."

all=$(cd benchmarks && ls ./*.py | sed -e 's|^\./||' -e 's|\.py$||')
bad=()
for name in ${BENCH:-$all}; do
    args=()
    case $name in
        finetune_speed)
            if [ ! -f "${BANKING77:-}/train.csv" ]; then
                echo "bench: finetune_speed needs BANKING77=the folder with train.csv" >&2
                bad+=("$name")
                continue
            fi
            args=(--data "$BANKING77")
            ;;
        serve_speed) [ -z "${LLAMA:-}" ] || args=(--llama-server "$LLAMA/llama-server") ;;
    esac
    echo "bench: $name"
    start=$SECONDS
    python "benchmarks/$name.py" ${args[@]+"${args[@]}"} || [ "$name:$?" = gpu:2 ] || bad+=("$name") # gpu ends with 2 where there is none
    echo "bench: $name took $((SECONDS - start)) s"
done
[ ${#bad[@]} = 0 ] || { echo "bench: not as promised: ${bad[*]}" >&2; exit 1; }
