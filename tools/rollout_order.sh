#!/usr/bin/env bash
# Give an order to the rollout of a running service, and put where it led into the summary of the workflow run.
#
#   ORDER=start MODEL=bank-support BECAUSE="more intents" tools/rollout_order.sh
#
# ORDER is approve (the challenger), start, status, pause, resume, promote, abort, retry or undo. The registry, the rollouts and the ledger are those
# of the service, so their addresses have to be given: without them the order would go to new and empty ones.
set -euo pipefail
: "${ORDER:?which order}"
for key in LLMKIT_TRACKING_URI LLMKIT_ROLLOUTS LLMKIT_LEDGER LLMKIT_ACTOR; do
  [ -n "${!key:-}" ] || { echo "rollout: $key is not set: where does the service keep it, or who orders?" >&2; exit 2; }
done
words=(rollout "$ORDER") why=--because
[ "$ORDER" != approve ] || words=(approve challenger) why=--why
case $ORDER in approve | start) words+=("--model=${MODEL:?$ORDER needs the registered name of the model}") ;; esac
if [ "$ORDER" != status ]; then
  [[ ${BECAUSE:-} =~ [^[:space:]] ]] || { echo "rollout: an order needs a reason: BECAUSE" >&2; exit 2; }
  words+=("$why=$BECAUSE")
fi
out=$(mktemp) code=0
llmkit "${words[@]}" > "$out" 2>&1 || code=$?
cat "$out"
{ printf '### rollout %s, by %s\n\n' "$ORDER" "$LLMKIT_ACTOR"; sed 's/^/    /' "$out"; printf '\nexit code %s\n' "$code"; } >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
exit "$code"
