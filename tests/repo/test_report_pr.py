"The verdict reaches the pull request that brought a commit: the script against a stand-in for GitHub's `gh`."

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/report_pr.sh"
GH = """#!/usr/bin/env bash
if [ "$1" = api ]; then echo "$2" >> "$LOG"; echo "$PR"
else echo "$@" >> "$LOG"; cat "${@: -1}" >> "$LOG"; fi
"""


@pytest.fixture
def report(tmp_path):
    "Run the script with a pull request, or none, and a verdict, or none; what `gh` was asked, and the summary."
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)

    def run(pr, text):
        (tmp_path / "verdict.md").write_text(text)
        log, summary = tmp_path / "log", tmp_path / "summary"
        path = f"{tmp_path}:{os.environ['PATH']}"
        env = {"PATH": path, "LOG": str(log), "PR": pr, "GITHUB_STEP_SUMMARY": str(summary)}
        env |= {"GITHUB_REPOSITORY": "us/kit", "GITHUB_SHA": "abc"}
        subprocess.run(["bash", SCRIPT, tmp_path / "verdict.md"], env=env, check=True, capture_output=True)
        return log.read_text(), summary.read_text()

    return run


def test_the_verdict_is_a_comment_and_a_summary_with_a_stand_in_for_gh(report):
    asked, summary = report("7", "**pass**\n")
    assert asked.startswith("repos/us/kit/commits/abc/pulls\npr comment 7 --repo us/kit --body-file ")
    assert asked.endswith("**pass**\n") and summary == "**pass**\n"


def test_a_commit_without_a_pull_request_is_only_summarized_with_a_stand_in_for_gh(report):
    asked, summary = report("", "**pass**\n")
    assert "comment" not in asked and summary == "**pass**\n"


def test_a_pipeline_that_ended_early_says_so_with_a_stand_in_for_gh(report):
    asked, summary = report("7", "")
    assert "the pipeline ended before its gate" in asked and "No verdict" in summary
