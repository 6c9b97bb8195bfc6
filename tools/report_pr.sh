#!/usr/bin/env bash
# Put a Markdown report where people look: the summary of the workflow run, and the pull request that brought the commit.
#
#   tools/report_pr.sh REPORT.md
set -euo pipefail
report=$1
[ -s "$report" ] || { report=$(mktemp); echo "**No verdict**: the pipeline ended before its gate." > "$report"; }
cat "$report" >> "${GITHUB_STEP_SUMMARY:-/dev/stdout}"

: "${GITHUB_REPOSITORY:?runs inside a GitHub workflow}" "${GITHUB_SHA:?}"
number=$(gh api "repos/$GITHUB_REPOSITORY/commits/$GITHUB_SHA/pulls" --jq '.[0].number // empty')
[ -n "$number" ] || { echo "report: this commit came by no pull request"; exit 0; }
gh pr comment "$number" --repo "$GITHUB_REPOSITORY" --body-file "$report"
