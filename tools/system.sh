#!/usr/bin/env bash
# Packages of Debian and Ubuntu that only tests need: real systems on loopback instead of mocks. Nothing in llmkit needs them to run.
#
#   tools/system.sh         install what is missing, as root (in CI, by sudo too); say what stays missing, and go on
#
# A test that wants one of them skips where it is not there, and says so.
set -euo pipefail

missing=()
declare -A tests=()
want() { # tests that skip without them, then packages; NAME=PROGRAM where somebody else may have brought the program
    local skip=$1 p
    for p in "${@:2}"; do
        dpkg-query -W -f='${db:Status-Status}' "${p%=*}" 2>/dev/null | grep -qx installed && continue
        [[ $p != *=* ]] || ! command -v "${p#*=}" >/dev/null || continue
        missing+=("${p%=*}")
        tests[${p%=*}]=$skip
    done
}
# Docker's containerd.io brings a runc of its own, and the package runc would drive it out, with Docker
want tests/release/test_image.py podman runc=runc conmon catatonit netavark aardvark-dns iptables
want tests/serve/test_stream.py redis-server
want "tests/rollout/test_signed.py, tests/release/test_bundle.py" openssh-client
want "tests of metrics, rules and alerts" prometheus prometheus-alertmanager
# Ubuntu has both only as snaps, which see neither /tmp nor hidden folders; GitHub's machines have Google's
want tests/monitor/test_dash_browser.py chromium=google-chrome chromium-driver=chromedriver
[ "${#missing[@]}" -gt 0 ] || exit 0

left() { # say what is missing, why, and which tests skip
    local why=$1 p
    shift
    for p in "$@"; do
        echo "system: $p is missing, ${tests[$p]} will skip: $why" >&2
    done
}
if ! command -v apt-get >/dev/null; then
    left "no apt-get here, install it by hand" "${missing[@]}"
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    [ -z "${CI:-}" ] || ! sudo -n true 2>/dev/null || exec sudo -n "$0"
    left "run tools/system.sh as root" "${missing[@]}"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
here=()
for p in "${missing[@]}"; do
    if apt-cache policy "$p" | grep -q '^  Candidate: [^(]'; then here+=("$p"); else left "this distribution has no such package" "$p"; fi
done
[ "${#here[@]}" -gt 0 ] || exit 0
echo "system: installing ${here[*]}"
# a package must not start a service of its own: tests start what they need, where they need it
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get install -y -qq --no-install-recommends "${here[@]}" >/dev/null
