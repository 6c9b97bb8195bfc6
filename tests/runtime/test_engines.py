"""Engines against each other and against transformers; rows that join and leave; faults."""

import numpy as np
import pytest

from llmkit.core.errors import KitError
from llmkit.runtime.dummy import DummyEngine
from llmkit.runtime.engine import load_engine
from llmkit.runtime.sampling import Sampling
from llmkit.runtime.torch_engine import TorchEngine

GREEDY = Sampling(max_tokens=12, stop_ids=())
HOT = Sampling(max_tokens=12, temperature=0.9, top_p=0.95, top_k=50, seed=11, stop_ids=())


def test_fp32_agrees_with_torch(llama, open_onnx, prompts):
    with TorchEngine(llama) as t, open_onnx("fp32") as o:
        want, got = t.generate(prompts, GREEDY), o.generate(prompts, GREEDY)
        assert [c.tokens for c in got] == [c.tokens for c in want]
        for a, b in zip(want, got, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)
        long = [p for p in prompts if len(p) > 1]
        for a, b in zip(t.score(long, long), o.score(long, long), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
        assert [c.tokens for c in o.generate(prompts, HOT)] == [c.tokens for c in t.generate(prompts, HOT)]


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_a_model_that_overflows_gives_an_error_and_no_answer(sampling, monkeypatch):
    "The largest of NaNs is the first: token 0, over and over."
    engine = DummyEngine()
    said = engine.next_logits
    monkeypatch.setattr(engine, "next_logits", lambda p, a=(): said(p, a) * (np.nan if len(a) > 3 else 1))
    with pytest.raises(KitError, match="the model's logits are not finite .got nan."):
        engine.generate([list(b"Hello")], sampling)
    assert len(engine.generate([list(b"Hello")], Sampling(max_tokens=4, stop_ids=()))[0].tokens) == 4


def test_torch_agrees_with_transformers(llama, prompts):
    import torch

    with TorchEngine(llama) as t:
        for p, c in zip(prompts, t.generate(prompts, GREEDY), strict=True):
            ids = torch.tensor([p])
            args = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            out = t.model.generate(ids, attention_mask=torch.ones_like(ids), **args)
            assert c.tokens == out[0, len(p) :].tolist()


@pytest.mark.parametrize(("precision", "block"), [("fp32", 32), ("int8", 32), ("int4", 32), ("int4", 128)])
@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_rows_do_not_feel_each_other(open_onnx, prompts, precision, block, sampling):
    "Random joins and leaves: every row gives the tokens and log-probabilities of its solo run, bit for bit."
    with open_onnx(precision, block) as e:
        solo = [e.generate([p], sampling)[0] for p in prompts]
        rng, batch = np.random.default_rng(5), e.batch(3, length=96)
        waiting, running, seen = [0, 1, 2, 3, 4, 0, 3, 1, 4, 2], {}, []
        while waiting or running:
            while waiting and batch.free() and rng.random() < 0.6:
                i = waiting.pop(0)
                running[batch.join(prompts[i], sampling)] = (i, [])
            for slot, token in batch.step().items():
                running[slot][1].append((token.id, token.logprob))
                if token.finish:
                    seen.append(running.pop(slot))
            if running and rng.random() < 0.15:
                slot = sorted(running)[int(rng.integers(len(running)))]
                batch.leave(slot)
                seen.append(running.pop(slot))
        assert len(seen) == 10 and batch.free() == 3
        for i, got in seen:
            want = list(zip(solo[i].tokens, solo[i].logprobs, strict=True))
            assert got == want[: len(got)]


@pytest.mark.parametrize("precision", ["int4", "int8", "fp32"])
def test_served_logits_are_bit_identical_to_solo(open_onnx, prompts, precision):
    from llmkit.runtime.slots import Slots

    with open_onnx(precision) as e:

        def path(rows):
            m = Slots(e._decode, e.shape, len(rows), 64, idle=e.idle)
            out = [[m.join(r[:1]).copy()] for r in rows]
            for t in range(1, 3):
                for o, x in zip(out, m.step([r[t] for r in rows]), strict=True):
                    o.append(x.copy())
            return out

        rows = [p for p in prompts if len(p) > 2]
        rows += [p[::-1] for p in rows]
        solo = [np.stack(path([row])[0]) for row in rows]
        for n in range(2, len(rows) + 1):
            for want, got in zip(solo, path(rows[:n]), strict=False):
                np.testing.assert_array_equal(np.stack(got), want)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_beginnings_that_are_taken_over_change_no_bit(open_onnx, precision):
    "Chats that share a system message, go on, come and go in any order, beside each of them computed whole."
    from llmkit.runtime.slots import Slots

    rng = np.random.default_rng(4)
    systems = [rng.integers(2, 300, n).tolist() for n in (40, 32, 70, 3)]
    with open_onnx(precision) as e:
        assert e.reuse, "this machine's kernels allow it, or the test says nothing"
        m, running, waiting = Slots(e._decode, e.shape, 4, 96, idle=e.idle, reuse=True), [], []
        checked = 0
        for _ in range(60):
            if len(running) < 4:
                old = waiting.pop(int(rng.integers(len(waiting)))) if waiting and rng.random() < 0.5 else None
                prompt = (old or systems[int(rng.integers(4))]) + rng.integers(2, 300, rng.integers(1, 6)).tolist()
                whole = Slots(e._decode, e.shape, 1, 96, idle=e.idle)
                running.append((prompt, whole))
                np.testing.assert_array_equal(m.join(prompt), whole.join(prompt))
            tokens = rng.integers(2, 300, len(running)).tolist()
            for (seen, whole), t, got in zip(running, tokens, m.step(tokens), strict=True):
                seen.append(t)
                np.testing.assert_array_equal(got, whole.step([t])[0])
                checked += 1
            gone = [i for i, (seen, _) in enumerate(running) if len(seen) > 85 or rng.random() < 0.2]
            for i in reversed(gone):
                waiting.append(running[i][0][:80])
                running[i] = running[m.leave(i)]
                running.pop()
    assert m.taken > 300 and checked > 100
    with open_onnx("fp32") as e, open_onnx("fp32", exact=False) as other:
        assert (e.reuse, other.reuse) == (False, True)


@pytest.mark.parametrize("kind", ["torch", "onnx", "dummy"])
def test_stop_strings_and_streaming(llama, open_onnx, kind):
    e = {"torch": lambda: TorchEngine(llama), "onnx": lambda: open_onnx("fp32"), "dummy": DummyEngine}[kind]()
    tok = e.tokenizer
    prompt = tok.encode("the card")
    whole = e.generate([prompt], Sampling(max_tokens=24, stop_ids=()))[0]
    assert "".join(t.text for t in e.stream(prompt, Sampling(max_tokens=24, stop_ids=()))) == whole.text
    assert whole.text == tok.decode(whole.tokens)
    stop = whole.text[5:8]
    cut = e.generate([prompt], Sampling(max_tokens=24, stop_ids=(), stop=(stop,)))[0]
    assert cut.finish == "stop" and cut.text == whole.text.split(stop)[0]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    pieces = list(e.stream(prompt, Sampling(max_tokens=24, stop_ids=(), stop=(stop,))))
    assert "".join(t.text for t in pieces) == cut.text and pieces[-1].finish == "stop"
    ended = e.generate([prompt], Sampling(max_tokens=24, stop_ids=(whole.tokens[3],)))[0]
    assert ended.finish == "stop" and ended.tokens[-1] == whole.tokens[3] and len(ended.tokens) <= 4


@pytest.mark.parametrize("kind", ["strip", "metaspace", "wordpiece"])
def test_a_stream_says_what_the_whole_says_though_some_tokens_show_nothing(kind):
    "Of a text that begins behind a special token, or an id beyond the vocabulary, a tokenizer drops the first space."
    import random

    from tokenizers import Tokenizer, decoders, models

    from llmkit.runtime.text import Detokenizer

    words = ["[UNK]", "<s>", "▁the", "▁card", "card", "▁", "##s", "is", "."]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tok.decoder = {
        "strip": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        "metaspace": decoders.Metaspace(),
        "wordpiece": decoders.WordPiece(),
    }[kind]
    tok.add_special_tokens(["<s>"])
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(len(words) + 2) for _ in range(rng.randrange(1, 8))]
        stream = Detokenizer(tok.decode)
        assert "".join(map(stream.add, ids)) + stream.flush() == tok.decode(ids), ids


def test_seed_and_batch_do_not_matter(open_onnx, prompts):
    with open_onnx("int4") as e:
        once = e.generate(prompts, HOT)
        assert e.generate(prompts[::-1], HOT)[::-1] == once
        assert e.generate(prompts, Sampling(**{**HOT.__dict__, "seed": 12})) != once


def test_missing_cuda_is_an_error(llama, tmp_path):
    import onnxruntime as ort

    from llmkit.runtime.onnx_engine import open_session

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("there is a CUDA provider")
    with pytest.raises(KitError, match="make gpu in a clone"):
        open_session(tmp_path / "x.onnx", "cuda")
    with pytest.raises(KitError, match="CUDA"):
        TorchEngine(llama, device="cuda")


def test_damage_is_found(open_onnx, tmp_path):
    import shutil

    with open_onnx("int4") as e:
        shutil.copytree(e.folder, tmp_path / "e")
    weights = tmp_path / "e/weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(KitError, match="cannot open the graph"):
        load_engine(tmp_path / "e")
    (tmp_path / "e/engine.json").write_text("{")
    with pytest.raises(KitError, match="not valid JSON"):
        load_engine(tmp_path / "e")
    with pytest.raises(KitError, match="no such folder"):
        load_engine(tmp_path / "nowhere")
