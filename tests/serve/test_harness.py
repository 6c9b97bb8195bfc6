"EleutherAI's harness against our server, held against the engine's own numbers."

import json

import pytest

pytest.importorskip("lm_eval")
from serve_server import serving  # noqa: E402

from llmkit.runtime.dummy import DummyEngine  # noqa: E402
from llmkit.runtime.sampling import Sampling  # noqa: E402

ROWS = [
    {"q": "my card is lost", "choices": [" block it", " eat it", " sell it"], "gold": 0},
    {"q": "I was charged a fee", "choices": [" why", " explain the fee please", " no"], "gold": 1},
    {"q": "transfer is late", "choices": [" wait", " cry", " call us"], "gold": 2},
]


@pytest.fixture
def tasks(tmp_path):
    "Two tiny local tasks: choose by likelihood, and generate."
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in ROWS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "target_delimiter": "",
    }
    choose = {**common, "task": "serve_choose", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
              "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    write = {**common, "task": "serve_write", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
             "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "temperature": 0},
             "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    return [choose, write]


def test_local_completions(make_gateway, tasks, monkeypatch):
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    gateway = make_gateway(DummyEngine(seed=2))
    engine = gateway.baseline.engine
    with serving(gateway) as url:
        lm = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="bank", max_length=1024, batch_size=2)
        assert lm.tokenizer_backend == "remote", "found through /tokenizer_info and /tokenize"
        got = lm_eval.simple_evaluate(lm, tasks=tasks, log_samples=True, bootstrap_iters=0)
    samples = got["samples"]["serve_choose"]
    assert len(samples) == 3
    for s in samples:
        prompts = [list(s["doc"]["q"].encode())] * 3
        conts = [list(c.encode()) for c in s["doc"]["choices"]]
        want = [float(x.sum()) for x in engine.score(prompts, conts)]
        assert [float(r[0][0]) for r in s["resps"]] == pytest.approx(want, abs=1e-3)
        greedy = [
            engine.generate([p], Sampling(max_tokens=len(c), stop_ids=()))[0].tokens == c
            for p, c in zip(prompts, conts, strict=True)
        ]
        assert [str(r[0][1]) == "True" for r in s["resps"]] == greedy
    for s in got["samples"]["serve_write"]:
        want = engine.generate([list(s["doc"]["q"].encode())], Sampling(max_tokens=12, stop=("\n",)))[0].text
        assert s["resps"][0][0] == want
