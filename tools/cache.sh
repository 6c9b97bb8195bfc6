#!/usr/bin/env bash
# Fetch or share the results of stages through a DVC remote, run cache included where the remote can hold one.
#
#   DVC_REMOTE=/path/to/folder tools/cache.sh pull|push         a folder that machines share
#   DVC_REMOTE=https://host/path tools/cache.sh pull|push       a server that takes PUT; DVC_REMOTE_USER and
#                                                               DVC_REMOTE_PASSWORD for basic authentication
#
# Without DVC_REMOTE: the remote that .dvc/config names. Other kinds (s3, gs, azure) need DVC's plugin for them beside the
# lock.
set -euo pipefail
cd "$(dirname "$0")/.."

set_up() { dvc remote modify -q --local shared "$@"; }
if [ -n "${DVC_REMOTE:-}" ]; then
    dvc remote add -q --local --default --force shared "$DVC_REMOTE"
    [[ $DVC_REMOTE != http* ]] || set_up method PUT
    if [ -n "${DVC_REMOTE_USER:-}" ]; then
        set_up auth basic && set_up user "$DVC_REMOTE_USER" && set_up password "${DVC_REMOTE_PASSWORD:-}"
    fi
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
