"""What Muon saves where it takes AdamW's place for the matrices: the tiny base and its delta, each trained both ways.

    python benchmarks/muon.py [--records 6000] [--rounds 1] [--out benchmarks/results/muon.json]

The base is trained on the kit's corpus, the delta on generated records and watched on others, by the recipes of
`params.yaml`, which use Muon, and by the ones that stood there before, which use AdamW: 500 steps instead of 250 and six
passes instead of three. All four trainings are run in turn. Only ratios within one run mean anything; the losses and the
share of right answers are the same every time.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from llmkit.core.files import write_json, write_jsonl
from llmkit.core.params import load_params
from llmkit.data.bank import records
from llmkit.model.base import make_base
from llmkit.model.finetune import prepare
from llmkit.model.tiny import steady
from llmkit.model.train import Recipe

ADAMW_BASE = {"optimizer": "adamw", "steps": 500, "lr": 4e-3, "other_lr": 0.0}
ADAMW_DELTA = {"optimizer": "adamw", "epochs": 6, "lr": 3e-3, "other_lr": 0.0}


def train_base(folder: Path, params: dict, changes: dict) -> dict:
    "A base, what it loses on text that was held out, in nats per token, and the seconds of its making."
    began = time.perf_counter()
    base = make_base(folder, **{**params["base"], "tiny": {**params["base"]["tiny"], **changes}}, seed=params["seed"])
    return {"seconds": time.perf_counter() - began, "loss": base.meta["held_out_loss"]}


def train_delta(base: Path, data: Path, recipe: Recipe) -> dict:
    "A delta: seconds in steps, loss on validation in nats per token, share of answers right."
    with steady(recipe.seed, recipe.threads):
        trainer, _ = prepare(base, data, recipe, torch.device("cpu"))
        state = trainer.fit()
    return {"seconds": trainer.seconds, "steps": state.step, "loss": state.best, "answers": state.best_answers}


def main() -> None:
    "Measure, and print a table."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--records", type=int, default=6000)
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--out", type=Path, help="a JSON file for the results")
    a = p.parse_args()
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    recipe = Recipe(**{**params["finetune"], "seed": params["seed"], "precision": "fp32"})
    found: dict[str, list[dict]] = {f"{what}, {kind}": [] for what in ("base", "delta") for kind in ("AdamW", "Muon")}
    with tempfile.TemporaryDirectory() as tmp:
        data, rows = Path(tmp), list(records(params["seed"], a.records))
        cut = max(1, len(rows) * 6 // 100)  # they come in no order
        write_jsonl(data / "validation.jsonl", rows[:cut])
        write_jsonl(data / "train.jsonl", rows[cut:])
        for r in range(a.rounds):
            found["base, AdamW"].append(train_base(data / f"adamw{r}", params, ADAMW_BASE))
            found["base, Muon"].append(train_base(data / f"muon{r}", params, {}))
            found["delta, AdamW"].append(train_delta(data / f"muon{r}", data, replace(recipe, **ADAMW_DELTA)))
            found["delta, Muon"].append(train_delta(data / f"muon{r}", data, recipe))
    report(found, a.out)


def report(found: dict[str, list[dict]], out: Path | None) -> None:
    "A table."
    print(f"{'':14} seconds    loss  answers")
    for name, runs in found.items():
        took = statistics.median(r["seconds"] for r in runs)
        right = f"{runs[0]['answers']:8.3f}" if "answers" in runs[0] else ""
        print(f"{name:14} {took:7.1f} {runs[0]['loss']:7.4f} {right}")
    for what in ("base", "delta"):
        pairs = zip(found[f"{what}, AdamW"], found[f"{what}, Muon"], strict=True)
        ratio = statistics.median(a["seconds"] / m["seconds"] for a, m in pairs)
        print(f"{what}: AdamW takes {ratio:.2f} times as long")
    if out:
        write_json(out, {"torch": torch.__version__, "threads": torch.get_num_threads(), "runs": found})


if __name__ == "__main__":
    main()
