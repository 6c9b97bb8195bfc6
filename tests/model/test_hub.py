"A model fetched by `huggingface_hub` itself, from a hub on this machine: whole, at its commit, once, or not at all."

import os
import subprocess
import sys

import pytest
from hub_server import hub
from test_families import random_model

from llmkit.core.artifact import open_artifact
from llmkit.model.base import make_base

FETCH = """
import sys
from llmkit.core.errors import KitError
from llmkit.model.base import make_base
try:
    print(make_base(sys.argv[1], source="hub", model=sys.argv[2], revision=sys.argv[3]).digest)
except KitError as e:
    raise SystemExit(f"KitError {e}")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small Llama, beside it what nobody may fetch."
    path = tmp_path_factory.mktemp("hub") / "from"
    random_model(path, "Llama")
    for name in ("pytorch_model.bin", "modeling_own.py", "training_args.pt", "picture.png"):
        (path / name).write_bytes(b"not for us")
    return path


def run(home, server, out="base", *, model="", commit="", **env):
    "Make a base from the hub in a process of its own, as a user's; the exit code and what it said."
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    clean |= {"HF_ENDPOINT": server.url, "HF_HOME": str(home / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", **env}
    args = [str(home / out), model or server.name, commit or server.commit]
    done = subprocess.run([sys.executable, "-c", FETCH, *args], env=clean, capture_output=True, text=True, timeout=300)
    return done.returncode, (done.stdout + done.stderr).strip()


def test_what_is_fetched_is_what_the_hub_has_and_nothing_that_could_run(folder, tmp_path):
    with hub(folder) as server:
        code, said = run(tmp_path, server)
        assert code == 0, said
        sent = server.files()
    assert sent == sorted(p.name for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".safetensors"))
    base, same = open_artifact(tmp_path / "base"), make_base(tmp_path / "same", source="folder", model=str(folder))
    assert base.recipe["revision"] == server.commit and base.recipe["model"] == server.name
    assert base.files == same.files, "byte for byte what the same folder on disk gives"
    # the second time nobody is asked, so a machine without a network has it too
    code, said = run(tmp_path, server, "again")
    assert code == 0 and open_artifact(tmp_path / "again").digest == base.digest, said


def test_a_connection_that_breaks_is_tried_again(folder, tmp_path):
    with hub(folder) as server:
        server.cut["model.safetensors"] = 1
        code, said = run(tmp_path, server)
        assert code == 0, said
        tries = [m for m, path, _ in server.asked if m == "GET" and path.endswith("model.safetensors")]
    assert len(tries) == 2 and "model.safetensors" in open_artifact(tmp_path / "base").files


def test_what_was_fetched_in_part_is_not_taken_for_the_whole(folder, tmp_path):
    with hub(folder) as server:
        server.cut["model.safetensors"] = 1000
        code, said = run(tmp_path, server)
        assert code and "KitError" in said and "base.model: cannot fetch" in said, said
    code, said = run(tmp_path, server)  # the hub is away; a part is in the cache
    assert code and "KitError" in said, said
    assert not (tmp_path / "base").exists()
    with hub(folder) as server:
        code, said = run(tmp_path, server)
        assert code == 0, said


@pytest.mark.parametrize(
    "refuse, words",
    [((401, "RepoNotFound"), "RepositoryNotFoundError"), ((403, "GatedRepo"), "GatedRepoError"), ((503, "Away"), "LocalEntryNotFoundError: Got: HfHubHTTPError: Server error '503 ")],
)  # fmt: skip
def test_a_hub_that_refuses(folder, tmp_path, refuse, words):
    with hub(folder) as server:
        server.refuse = refuse
        code, said = run(tmp_path, server)
    assert code and f"base.model: cannot fetch the model: {words}" in said and "base.source: folder" in said, said
    assert not (tmp_path / "base").exists()


def test_a_commit_that_the_hub_does_not_have(folder, tmp_path):
    with hub(folder) as server:
        code, said = run(tmp_path, server, commit="0" * 40)
    assert code and "RevisionNotFoundError" in said and server.name in said, said
