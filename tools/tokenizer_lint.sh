#!/usr/bin/env bash
# The tokenizers that the pipeline has made on this machine: the base's, and the shipped engine's, which must agree with
# it. A fresh clone has none yet, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."
found=0
for folder in artifacts/quantize/engine artifacts/base/base; do
    [ -f "$folder/tokenizer.json" ] || continue
    found=1
    llmkit tokenizer lint "$folder" --base artifacts/base/base
done
[ $found = 1 ] || echo "tokenizer lint: nothing is made yet; \`make repro\` makes it"
