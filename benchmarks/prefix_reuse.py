#!/usr/bin/env python
"""Time to the first token of prompts that begin alike, with and without taking the beginning over from another prompt.

    python benchmarks/prefix_reuse.py [--out benchmarks/results/prefix_reuse.json]
    python benchmarks/prefix_reuse.py --layers 4 --repeats 3        # a quick look

A model in the shape of SmolLM2-135M with random weights; every prompt has the same system message and its own question of 32
tokens. Both ways take turns; read the ratios. That the logits are the same, bit for bit, is checked on the way.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from decode_speed import make_model

from llmkit.core.files import write_json
from llmkit.model.export import export
from llmkit.runtime.onnx_engine import OnnxEngine
from llmkit.runtime.slots import Slots

QUESTION = 32  # tokens


def main() -> None:
    "Measure, and print a table."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=30)
    p.add_argument("--systems", type=int, nargs="*", default=[32, 128, 512], help="tokens of the system message")
    p.add_argument("--repeats", type=int, default=9, help="prompts, of which the median counts")
    p.add_argument("--out", type=Path, help="a JSON file for the results")
    a = p.parse_args()
    rng, found = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as tmp:
        model, folder = Path(tmp) / "model", Path(tmp) / "engine"
        model.mkdir(), folder.mkdir()
        make_model(model, a.layers)
        write_json(folder / "engine.json", export(model, folder, "int4", block_size=128))
        e = OnnxEngine(folder)
        if not e.reuse:
            raise SystemExit("this machine's kernels give other bits: nothing is taken over here")
        print("system message | whole prompt | beginning taken over | ratio")
        for length in a.systems:
            system = rng.integers(2, 49152, length).tolist()
            rows = {r: Slots(e._decode, e.shape, 2, length + QUESTION + 8, idle=e.idle, reuse=r) for r in (False, True)}
            took: dict[bool, list[float]] = {False: [], True: []}
            for k in range(a.repeats + 1):
                prompt, said = system + rng.integers(2, 49152, QUESTION).tolist(), {}
                for reuse, s in rows.items():
                    start = time.perf_counter()
                    said[reuse] = s.join(prompt)
                    took[reuse] += [time.perf_counter() - start] if k else []  # the first one has nothing to take over
                    s.leave(0)
                np.testing.assert_array_equal(said[True], said[False])
            whole, part = (float(np.median(took[r])) for r in (False, True))
            found[length] = {"whole_seconds": whole, "reused_seconds": part, "ratio": whole / part}
            print(f"{length:>7} tokens | {whole * 1e3:>9.1f} ms | {part * 1e3:>17.1f} ms | {whole / part:>5.2f}")
    if a.out:
        write_json(a.out, {"question_tokens": QUESTION, "layers": a.layers, "systems": found})


if __name__ == "__main__":
    main()
