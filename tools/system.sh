#!/usr/bin/env bash
# Debian packages that only tests need: real systems on loopback instead of mocks. Nothing in llmkit needs them to run.
#
#   tools/system.sh         install what is missing, where this is Debian and we may; otherwise say what is missing, and go on
#
# A test that wants one of them skips where it is not there, and says so.
set -euo pipefail

packages=(
    podman runc conmon catatonit netavark aardvark-dns iptables # images of a release, built and started
    redis-server                                                # streams of requests
    openssh-client                                              # signatures of approvals and bundles
    prometheus prometheus-alertmanager                          # metrics, rules and alerts
    chromium chromium-driver                                    # pages, as their readers see them
)
missing=()
for p in "${packages[@]}"; do
    dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "system: not installed, tests that need them will skip: ${missing[*]}" >&2
    exit 0
fi
echo "system: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# a package must not start a service of its own: tests start what they need, where they need it
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
