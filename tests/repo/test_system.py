"`tools/system.sh` on machines that it does not know: what it installs, and what it says of the rest. The package manager is a stub."

import subprocess

import pytest

KNOWS = "podman runc conmon catatonit netavark aardvark-dns iptables redis-server openssh-client prometheus prometheus-alertmanager"


@pytest.fixture
def machine(root, tmp_path):
    "A machine of these packages and programs: what was installed there, and what was said."

    def run(knows=KNOWS, user=0, sudo=False, programs=(), ci=""):
        log = tmp_path / "log"
        log.write_text("")
        stubs = {
            "dpkg-query": "exit 1",
            "apt-cache": f'for p in {knows}; do [ "$p" != "$2" ] || printf "$2:\\n  Candidate: 1.0\\n"; done',
            "apt-get": f'[ "$1" != install ] || echo "$@" >> {log}',
            "id": f"echo {user}",
            "sudo": f'[ "$2" = true ] && exit {int(not sudo)}; echo sudo >> {log}',
            **dict.fromkeys(programs, "true"),
        }
        for name, body in stubs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        for name in ("bash", "env", "grep", "touch", "rm", "chmod"):
            (tmp_path / name).exists() or (tmp_path / name).symlink_to(f"/bin/{name}")
        script = (root / "tools/system.sh").read_text().replace("/usr/sbin/policy-rc.d", str(tmp_path / "policy"))
        done = subprocess.run(
            ["bash", "-c", script], env={"PATH": str(tmp_path), "CI": ci}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return log.read_text().split(), done.stderr

    return run


def test_a_package_that_the_distribution_has_not_is_named_and_the_others_come(machine):
    asked, said = machine()
    assert set(KNOWS.split()) <= set(asked) and not {"chromium", "chromium-driver"} & set(asked)
    assert "chromium is missing, tests/monitor/test_dash_browser.py will skip: this distribution has no such" in said


def test_what_somebody_else_brought_is_left_alone(machine):
    asked, said = machine(programs=("runc", "google-chrome", "chromedriver"))
    assert "runc" not in asked and "podman" in asked and "chromium" not in said


def test_only_ci_uses_a_sudo_and_without_one_all_is_named(machine):
    assert machine(user=1000, sudo=True, ci="true") == (["sudo"], "")
    for sudo, ci in ((True, ""), (False, "true")):
        asked, said = machine(user=1000, sudo=sudo, ci=ci)
        assert not asked and said.count("will skip: run tools/system.sh as root") == len(KNOWS.split()) + 2
