#!/usr/bin/env bash
# Run a command with the project's environment first on the path: for git hooks, which do not know of it.
set -euo pipefail
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH" exec "$@"
