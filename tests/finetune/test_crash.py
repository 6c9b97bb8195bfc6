"""A killed run goes on where it was, a changed input starts anew, and equal input gives equal bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llmkit.core.artifact import open_artifact, seal
from llmkit.core.errors import KitError
from llmkit.core.files import read_json, write_json
from llmkit.model.finetune import finetune, workspace

CHILD = """
import json, sys
from llmkit.core.artifact import open_artifact
from llmkit.model.finetune import finetune
from llmkit.model.train import Recipe, Trainer
import time
job = json.load(open(sys.argv[1]))
own = Trainer.step
def slow(self, *a):
    own(self, *a)
    time.sleep(job["sleep"])
Trainer.step = slow
finetune(open_artifact(job["base"]), open_artifact(job["dataset"]), job["out"], Recipe(**job["recipe"]))
"""


class Stop(Exception):
    "A run that is cut off."


def tensors_of(delta):
    "The bytes of the weights."
    return (delta / "adapter_model.safetensors").read_bytes()


def kill_in_the_middle(base, dataset, recipe, out, tmp_path):
    "Start a run in another process and kill it, without a word, after its first checkpoint; return the checkpoint's name."
    job = {
        "base": str(base.path),
        "dataset": str(dataset.path),
        "out": str(out),
        "recipe": asdict(recipe),
        "sleep": 0.2,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "job.json")], start_new_session=True)
    folder = workspace({"base": base, "dataset": dataset}, recipe) / "checkpoints"
    deadline = time.time() + 600
    while not list(folder.glob("step-*")):
        assert child.poll() is None and time.time() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    return sorted(p.name for p in folder.glob("step-*"))[-1]


def test_kill_9_then_resume_gives_the_same_bytes(base, dataset, recipe, tmp_path, monkeypatch):
    straight = finetune(base, dataset, tmp_path / "straight", recipe)
    name = kill_in_the_middle(base, dataset, recipe, tmp_path / "delta", tmp_path)
    assert not (tmp_path / "delta").exists()  # nothing half-written under the final name
    steps = count_steps(monkeypatch)
    resumed = finetune(base, dataset, tmp_path / "delta", recipe)
    assert len(steps) == straight.meta["steps"] - int(name[5:])  # it went on, it did not begin again
    assert tensors_of(resumed) == tensors_of(straight)
    assert resumed.digest == straight.digest
    assert (resumed / "manifest.json").read_bytes() == (straight / "manifest.json").read_bytes()
    assert not (workspace(resumed.parents, recipe) / "checkpoints").exists()


def count_steps(monkeypatch):
    "A list that grows with every step."
    from llmkit.model.train import Trainer

    seen, own = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, *a: seen.append(1) or own(self, *a))
    return seen


@pytest.mark.parametrize("change", ["dataset", "recipe", "runner"])
def test_a_changed_input_begins_anew(base, dataset, other_dataset, recipe, tmp_path, monkeypatch, change):
    stop_after(monkeypatch, 6)
    with pytest.raises(Stop):
        finetune(base, dataset, tmp_path / "delta", recipe)
    assert list(workspace({"base": base, "dataset": dataset}, recipe).glob("checkpoints/step-*"))
    monkeypatch.undo()
    monkeypatch.setenv("LLMKIT_CHECKPOINTS", str(tmp_path / "checkpoints"))
    if change == "dataset":
        dataset = other_dataset
    elif change == "recipe":
        recipe = replace(recipe, lr=recipe.lr * 0.9)
    else:
        monkeypatch.setenv("LLMKIT_INPUT_DIGEST", "sha256:other")
    steps = count_steps(monkeypatch)
    delta = finetune(base, dataset, tmp_path / "delta", recipe)
    assert len(steps) == delta.meta["steps"]


def stop_after(monkeypatch, n):
    "Raise an error at the n-th step."
    from llmkit.model.train import Trainer

    own, seen = Trainer.step, []

    def step(self, *a):
        seen.append(1)
        if len(seen) > n:
            raise Stop
        own(self, *a)

    monkeypatch.setattr(Trainer, "step", step)


def test_a_damaged_checkpoint_is_not_used(base, dataset, recipe, tmp_path, monkeypatch):
    straight = finetune(base, dataset, tmp_path / "straight", recipe)
    with monkeypatch.context() as m:
        stop_after(m, 6)
        with pytest.raises(Stop):
            finetune(base, dataset, tmp_path / "delta", recipe)
    (saved,) = workspace(straight.parents, recipe).glob("checkpoints/step-*/state.safetensors")
    saved.write_bytes(saved.read_bytes()[:-1] + b"\x00\x00")
    assert finetune(base, dataset, tmp_path / "delta", recipe).digest == straight.digest


def state(**values):
    "A change of `state.json`."
    return lambda folder: write_json(folder / "state.json", read_json(folder / "state.json") | values)


def tensors(change):
    "A change of the tensors, by name."

    def do(folder):
        held = load_file(folder / "state.safetensors")
        change(held, next(n for n in sorted(held) if n.startswith("weights/")))
        save_file(held, folder / "state.safetensors")

    return do


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda f: (f / "state.json").write_text("[]"), "state.json: must be an object"),
        (state(step="6"), r"state.json: state.step: .*'6'"),
        (state(step=5), "state.json: curve: must be lists of 5 numbers"),
        (state(curve={"step": []}), "state.json: curve: must be lists"),
        (state(epoch=1), "state.json: state.epoch: "),
        (tensors(lambda held, n: held.pop(n)), "checkpoints: weights/.*: the checkpoint must hold this, of shape .*got None"),
        (tensors(lambda held, n: held.update({n: held[n][:1].clone()})), r"checkpoints: weights/.*: the checkpoint must hold this"),
        (tensors(lambda held, n: held[n].fill_(float("nan"))), "checkpoints: weights/.* values are not finite"),
    ],
)  # fmt: skip
def test_a_whole_checkpoint_that_says_something_else_ends_the_run(
    base, dataset, recipe, tmp_path, monkeypatch, change, says
):
    "Its seal is right; a shorter tensor would be spread over the longer one, and the run go on with other weights."
    with monkeypatch.context() as m:
        stop_after(m, 6)
        with pytest.raises(Stop):
            finetune(base, dataset, tmp_path / "delta", recipe)
    (folder,) = workspace({"base": base, "dataset": dataset}, recipe).glob("checkpoints/step-*")
    change(folder)
    seal(folder, "checkpoint")
    with pytest.raises(KitError, match=f"{says}.*[Rr]emove"):
        finetune(base, dataset, tmp_path / "delta", recipe)
    assert not (tmp_path / "delta").exists()


def test_a_full_disk_leaves_the_old_delta(base, dataset, recipe, tmp_path, monkeypatch):
    first = finetune(base, dataset, tmp_path / "delta", recipe)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmkit.model.finetune.save_delta", full)
    with pytest.raises(KitError, match="Free some space"):
        finetune(base, dataset, tmp_path / "delta", replace(recipe, seed=8))
    assert open_artifact(tmp_path / "delta").digest == first.digest
    assert [p.name for p in Path(tmp_path).glob(".delta*")] == []
