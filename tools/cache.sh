#!/usr/bin/env bash
# Fetch or share the results of stages, run cache included, through a DVC remote.
#
#   DVC_REMOTE=s3://bucket/path tools/cache.sh pull|push        without DVC_REMOTE: the remote that .dvc/config names
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${DVC_REMOTE:-}" ]; then
    dvc remote add -q --local --default --force shared "$DVC_REMOTE"
elif [ -z "$(dvc remote list)" ]; then
    echo "cache: no remote is configured and DVC_REMOTE is not set, so nothing is shared"
    exit 0
fi
case ${1:-} in
    # a stage that nobody has run yet has nothing to fetch
    pull) dvc pull -q --run-cache --allow-missing ;;
    push) dvc push -q --run-cache ;;
    *) echo "usage: tools/cache.sh pull|push" >&2; exit 2 ;;
esac
