"What a command's three standard streams may be: closed, full, or of another encoding."

import subprocess
import sys

import pytest

MAIN = "import sys; from llmkit.cli import main; sys.exit(main())"


def llmkit(project, words, redirect, **env):
    "A command in a shell, with a redirection."
    line = f'exec "$0" -P -c "$1" {words} {redirect}'
    done = subprocess.run(["env", *(f"{k}={v}" for k, v in env.items()), "bash", "-c", line, sys.executable, MAIN], cwd=project.path, capture_output=True, text=True)  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stage_completes_whichever_streams_are_closed(project, redirect):
    "As under a supervisor; the kernel and DVC write to them, and a database must not have their numbers."
    project.stage("x", "make('artifacts/x/out.json', 1)\nprint('said')")
    assert llmkit(project, "stage x", redirect).returncode == 0
    assert "completed" in llmkit(project, "runs", "").stdout


def test_what_is_not_asked_for_is_not_printed_elsewhere(project):
    done = llmkit(project, "nosuch", "2>&-")
    assert done.returncode == 2 and done.stdout == ""


def test_a_full_disk_behind_the_output_is_told_in_one_line(project):
    done = llmkit(project, "runs", ">/dev/full")
    assert (done.returncode, done.stderr) == (2, "llmkit: cannot write to the standard output: no space left on device\n")  # fmt: skip


def test_what_the_terminal_cannot_show_is_escaped(project):
    (project.path / "params.yaml").write_text("größe: 1\n")
    project.stage("x", "1")
    done = llmkit(project, "params check", "", PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and r"gr\xf6\xdfe" in done.stdout
