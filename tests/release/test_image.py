"""A bundle becomes an image that starts from nothing, and the container answers as the bundle did."""

import os
import shutil
import subprocess

import pytest

from llmkit.core.files import read_json, write_text
from llmkit.deploy.image import containerfile, image_build

BUNDLE = "artifacts/package/bundle"
HAS = all(shutil.which(p) for p in ("podman", "runc"))
pytestmark = [pytest.mark.container, pytest.mark.skipif(not HAS, reason="neither podman nor runc is installed")]


@pytest.fixture
def containers(tmp_path, monkeypatch):
    "Settings with which containers run inside of a container, and a store that is thrown away."
    limits = 'default_ulimits = ["nofile=1024:1024","nproc=4096:4096"]'
    engine = 'runtime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"'
    store = f'driver = "vfs"\ngraphroot = "{tmp_path}/store"\nrunroot = "{tmp_path}/run"'
    monkeypatch.setenv(
        "CONTAINERS_CONF", str(write_text(tmp_path / "c.conf", f"[containers]\n{limits}\n[engine]\n{engine}\n"))
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(write_text(tmp_path / "s.conf", f"[storage]\n{store}\n")))
    monkeypatch.setenv("BUILDAH_LAYERS", "false")  # one layer: this store copies the whole tree for each


def test_the_container_answers_as_the_bundle(packaged, containers, capsys):
    assert image_build(BUNDLE, tag="localhost/bank-support:test", out="image") == 0
    digest = read_json(f"{BUNDLE}/manifest.json")["digest"]
    assert (packaged / "image/Containerfile").read_text() == containerfile("bank-support", digest)
    prompt = read_json(f"{BUNDLE}/bundle.json")["self_test"]["prompts"][0]
    question = prompt["messages"][-1]["content"]
    run = ["podman", "run", "--rm", "--network", "none", "--read-only", "localhost/bank-support:test", question]
    done = subprocess.run(run, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(prompt["text"].strip()) and prompt["text"].strip()


def test_an_image_made_under_a_narrow_umask_can_be_read_by_its_user(packaged, containers):
    os.chmod(f"{BUNDLE}/bundle.json", 0o600)
    before = os.umask(0o077)
    try:
        assert image_build(BUNDLE, tag="localhost/bank-support:narrow") == 0
    finally:
        os.umask(before)
    run = ["podman", "run", "--rm", "--network", "none", "--read-only", "localhost/bank-support:narrow", "Hello"]
    done = subprocess.run(run, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
