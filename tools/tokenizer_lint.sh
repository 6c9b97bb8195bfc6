#!/usr/bin/env bash
# The tokenizers that the pipeline has made on this machine: base and shipped engine. A fresh clone has none yet, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."
found=0
for folder in artifacts/base/base artifacts/quantize/engine; do
    [ -f "$folder/tokenizer.json" ] || continue
    found=1
    llmkit tokenizer lint "$folder"
done
[ $found = 1 ] || echo "tokenizer lint: nothing is made yet; \`make repro\` makes it"
