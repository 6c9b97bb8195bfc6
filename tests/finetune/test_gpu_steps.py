"What training does on a GPU before its first step, tried on the CPU, which also has an operation without a steady kernel."

import os

import pytest
import torch

from llmkit.model.finetune import deterministic, prepare
from llmkit.model.lora import load_frozen
from llmkit.model.tiny import steady


def trainer_of(base, dataset, recipe):
    "A trainer at its start."
    return prepare(base.path, dataset.path, recipe, torch.device("cpu"))[0]


def test_a_step_of_steady_kernels_is_one(base, dataset, recipe):
    with steady(1, 1):
        trainer = trainer_of(base, dataset, recipe)
        assert deterministic(trainer) and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert all(p.grad is None for p in trainer.params)


def test_where_torch_refuses_it_may_warn_and_that_is_told(base, dataset, recipe, capsys):
    def unsteady(module, args, out):
        out.detach().put_(torch.tensor([0]), torch.tensor([0.0]))  # "does not have a deterministic implementation"

    with steady(1, 1):
        trainer = trainer_of(base, dataset, recipe)
        trainer.model.get_input_embeddings().register_forward_hook(unsteady)
        assert not deterministic(trainer) and torch.is_deterministic_algorithms_warn_only_enabled()
        assert deterministic(trainer), "and now it goes on"
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "outside nothing has changed"
    assert "finetune: another run will give other bytes: put_" in capsys.readouterr().err


def test_another_error_is_not_taken_for_that(base, dataset, recipe):
    def full(module, args, out):
        raise RuntimeError("CUDA out of memory")

    trainer = trainer_of(base, dataset, recipe)
    trainer.model.get_input_embeddings().register_forward_hook(full)
    with pytest.raises(RuntimeError, match="out of memory"):
        deterministic(trainer)


def test_cublas_is_told_before_the_first_product(base, monkeypatch):
    "torch reads it once, at the first product on a GPU, which may be another model's."
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    load_frozen(base.path)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
