"From the registry to an answer: a registered bundle with a real ONNX engine is found, verified, tested and served."

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from release_road import LINES, TINY, random_delta, run_card, run_gate, run_package, small_dataset, write_reports
from serve_server import PATIENCE, serving, until

import llmkit.serve.target as server
from llmkit.core.artifact import build, open_artifact
from llmkit.core.digests import short
from llmkit.core.errors import KitError
from llmkit.core.files import read_json, write_json, write_text
from llmkit.core.params import ParamsError
from llmkit.core.settings import load_settings
from llmkit.release.registry import registry_client
from llmkit.rollout.commands import rollout_start
from llmkit.runtime.dummy import DummyEngine
from llmkit.runtime.sampling import Sampling
from llmkit.serve.adapters import Adapters
from llmkit.serve.call import parse
from llmkit.serve.gateway import Gateway
from llmkit.serve.keys import Keys
from llmkit.serve.target import Target, from_registry, open_backend, resolve

BUNDLE = "artifacts/package/bundle"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    "A project in miniature with a registered release."
    from llmkit.model.base import make_base
    from llmkit.model.merge import merge
    from llmkit.model.quantize import quantize
    from llmkit.stages.register import run

    root = tmp_path_factory.mktemp("released")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(root)
        m.delenv("MLFLOW_RUN_ID", raising=False)
        write_text("corpus.txt", "\n".join(LINES))
        art = Path("artifacts")
        parts = {"base": make_base(art / "base/base", source="tiny", corpus="corpus.txt", tiny=TINY)}
        parts["dataset"] = small_dataset(art / "prepare/dataset", parts["base"])
        parts["delta"] = random_delta(art / "finetune/delta", parts["base"], parts["dataset"])
        merge(art / "merge/model", art / "base/base", art / "finetune/delta", limits={"kl_max": 1.0})
        parts["model"] = open_artifact(art / "merge/model")
        with quantize(art / "merge/model", art / "quantize/engine", precision="int8", block_size=32):
            pass
        parts["engine"] = open_artifact(art / "quantize/engine")
        write_reports(parts, art / "evaluate/report", art / "quantize/report")
        for stage in ("base", "prepare", "finetune", "merge", "quantize", "evaluate", "gate", "package", "card"):
            write_json(art / stage / "record.ipynb", {"stage": stage})
        write_text("LICENSE", "Apache-2.0\n")
        write_text("params.yaml", "seed: 0\n")
        write_text("settings.ini", "[DEFAULT]\ntracking_uri = sqlite:///mlflow.db\nhost = 127.0.0.1\nport = 0\n")
        run_gate()
        run_package()
        run_card()
        run(model_name="bank-support", alias="challenger")
    return root


@pytest.fixture
def project(released, monkeypatch):
    monkeypatch.chdir(released)
    return released


def test_the_registry_names_what_is_served(project):
    t = from_registry(load_settings())
    receipt = read_json("artifacts/register/receipt.json")
    assert (t.model, t.release, t.note) == ("bank-support", receipt["release"], "version 1, challenger")
    assert t.bundle == open_artifact(BUNDLE).digest and Path(t.where) == (project / BUNDLE).resolve()
    with pytest.raises(KitError, match="Aliases here: challenger"):
        from_registry(load_settings(), alias="champion")
    by_folder = resolve(BUNDLE, load_settings())
    assert by_folder.bundle == t.bundle and "not from the registry" in by_folder.note


def test_a_changed_byte_is_not_served(project, tmp_path):
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    victim = tmp_path / "bundle/engine/weights.bin"
    data = bytearray(victim.read_bytes())
    data[100] ^= 1
    victim.unlink()
    victim.write_bytes(data)
    with pytest.raises(KitError, match="not whole"):
        open_backend(resolve(str(tmp_path / "bundle"), load_settings()))


def test_another_bundle_than_the_registered_one_is_not_served(project):
    t = from_registry(load_settings())
    with pytest.raises(KitError, match="it is bundle"):
        open_backend(replace(t, bundle="sha256:" + "0" * 64))


def test_a_chat_without_a_system_message_gets_the_one_that_the_release_was_trained_behind(project):
    found, asked = resolve(BUNDLE, load_settings()), {"role": "user", "content": LINES[0]}
    whole, brief = ([{"role": "system", "content": s}, asked] for s in ("You sort questions.", "Be brief."))
    usual, none, other = (open_backend(found, system=s) for s in ("", "-", "Be brief."))
    read = lambda backend, chat: backend.prepare(parse("chat", {"model": "m", "messages": chat})).ids
    ids = {name: [usual.tokenizer.chat(c)] for name, c in (("bare", [asked]), ("whole", whole), ("brief", brief))}
    assert len({str(x) for x in ids.values()}) == 3
    assert [read(b, [asked]) for b in (usual, none, other)] == [ids["whole"], ids["bare"], ids["brief"]]
    assert [read(b, whole) for b in (usual, none, other)] == [ids["whole"]] * 3
    delta = open_backend(resolve("artifacts/finetune/delta", load_settings()))
    assert (read(delta, [asked]), read(delta, brief)) == (ids["whole"], ids["brief"])
    with pytest.raises(KitError, match="--system"):
        open_backend(Target("m", "http://127.0.0.1:1/v1"), system="Be brief.")


def test_options_of_the_engine_are_passed_on_and_checked(project):
    found = resolve(BUNDLE, load_settings())
    usual, fast = open_backend(found), open_backend(found, said={"threads": 1, "exact": False})
    assert usual.engine._decode.get_session_options().intra_op_num_threads == 0
    assert fast.engine._decode.get_session_options().intra_op_num_threads == 1 and fast.engine.idle == "never"
    with pytest.raises(ParamsError, match="engine.treads: unknown parameter .* Did you mean 'threads'"):
        open_backend(found, said={"treads": 1})
    with pytest.raises(ParamsError, match="exact: must be a bool"):
        open_backend(found, said={"exact": "no"})
    with pytest.raises(KitError, match="device: was built for cpu"):
        open_backend(found, said={"device": "cuda"})
    model = resolve("artifacts/merge/model", load_settings())
    assert open_backend(model, said={"precision": "bf16"}).engine.info.precision == "bf16"
    with pytest.raises(ParamsError, match="engine.exact: unknown parameter"):
        open_backend(model, said={"exact": False})


def test_the_onnx_engine_answers_over_http_as_it_does_alone(project):
    backend = open_backend(resolve(BUNDLE, load_settings()), slots=4)
    assert backend.expected, "the bundle's own self-test goes along"
    engine, tok = backend.engine, backend.tokenizer
    with serving(Gateway("bank-support", {"baseline": backend}), check=True) as url:
        until(lambda: httpx.get(f"{url}/ready").status_code == 200, "the self-test")
        prompts = [tok.encode(line, special=True) for line in LINES[:9]]
        with httpx.Client(timeout=PATIENCE) as c:
            got = c.post(
                f"{url}/v1/completions",
                json={
                    "model": "bank-support",
                    "prompt": prompts,
                    "max_tokens": 12,
                    "temperature": 0.8,
                    "seed": 5,
                    "logprobs": 1,
                },
            ).json()
            want = [engine.generate([p], Sampling(12, 0.8, seed=5))[0] for p in prompts]
            assert [x["text"] for x in got["choices"]] == [w.text for w in want]
            assert [x["logprobs"]["token_logprobs"] for x in got["choices"]] == [
                pytest.approx(w.logprobs) for w in want
            ]
            ids = tok.encode("my card and the money", special=False)
            scored = c.post(
                f"{url}/v1/completions",
                json={"model": "bank-support", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1},
            ).json()["choices"][0]["logprobs"]["token_logprobs"]
            assert scored[1:] == pytest.approx([float(x) for x in engine.score([ids[:1]], [ids[1:]])[0]], abs=1e-4)
            info = c.get(f"{url}/tokenizer_info").json()
            assert info["eos_token"] == tok.special["eos_token"] and info["chat_template"] == tok.template
            text = c.post(f"{url}/tokenize", json={"prompt": LINES[0]}).json()["tokens"]
            assert text == prompts[0] and c.post(f"{url}/detokenize", json={"tokens": text}).json()["prompt"]


def test_a_delta_is_loaded_asked_and_unloaded_while_the_server_runs(project, tmp_path):
    from llmkit.runtime.engine import load_engine

    keys = Keys(tmp_path / "serve.db")
    admin, user = (
        {"authorization": f"Bearer {keys.create('a', scopes)[0]}"}
        for scopes in (("inference", "admin"), ("inference",))
    )
    gateway = Gateway("bank-support", {"baseline": open_backend(resolve(BUNDLE, load_settings()))}, keys=keys)
    adapters = Adapters(gateway, "artifacts/base/base", slots=4)
    delta = "artifacts/finetune/delta"
    with load_engine("artifacts/base/base", "torch", delta=delta) as e:
        prompt = e.tokenizer.encode(LINES[3])
        want = e.generate([prompt], Sampling(10, stop_ids=()))[0]
    with serving(gateway, adapters=adapters) as url, httpx.Client(timeout=PATIENCE, base_url=url, headers=admin) as c:
        load = lambda **more: c.post("/v1/load_lora_adapter", json={"lora_name": "tone", "lora_path": delta, **more})
        assert (
            c.post("/v1/load_lora_adapter", json={"lora_name": "tone", "lora_path": delta}, headers=user).status_code
            == 403
        )
        for missing in ("artifacts/nothing", "artifacts/base/base", BUNDLE):
            assert load(lora_path=missing).status_code == 404
        shutil.copytree(delta, tmp_path / "delta")
        (tmp_path / "delta/adapter_model.safetensors").write_bytes(b"x")
        assert (load(lora_path=str(tmp_path / "delta")).status_code, gateway.adapters) == (400, set())
        name = load().json()["id"]
        assert (
            name == f"tone@{short(open_artifact(delta).digest)}" and load().json()["error"]["code"] == "already_loaded"
        )
        assert [m["id"] for m in c.get("/v1/models").json()["data"]] == ["bank-support", name]
        ask = {"model": name, "prompt": prompt, "max_tokens": 10, "temperature": 0, "ignore_eos": True, "logprobs": 0}
        got = c.post("/v1/completions", json=ask).json()
        assert got["choices"][0]["text"] == want.text and got["model"] == name
        assert got["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(want.logprobs, abs=1e-4)
        chat = [{"role": "user", "content": LINES[3]}]
        behind = [{"role": "system", "content": "You sort questions."}, *chat]
        bare, whole = (c.post("/tokenize", json={"model": name, "messages": m}).json()["count"] for m in (chat, behind))
        assert bare == whole > len(prompt), "a delta answers behind what it was trained behind"
        codes, stop = [], threading.Event()

        def flood(model):
            with httpx.Client(timeout=PATIENCE, headers=admin) as mine:
                while not stop.is_set():
                    codes.append((model, mine.post(f"{url}/v1/completions", json={**ask, "model": model}).status_code))

        threads = [threading.Thread(target=flood, args=(m,)) for m in (name, name, "bank-support")]
        for t in threads:
            t.start()
        until(lambda: len(codes) > 10, "some traffic")
        assert c.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
        until(lambda: codes.count((name, 404)) > 2, "the end of the name")
        stop.set()
        for t in threads:
            t.join(PATIENCE)
        assert {code for m, code in codes if m == "bank-support"} == {200}
        assert {code for m, code in codes if m == name} == {200, 404}, (
            "answered, or told that it is gone: none was dropped"
        )
        assert c.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 404


def test_deltas_come_and_go_under_load_and_none_answers_for_another(project, tmp_path):
    from llmkit.runtime.engine import load_engine

    base, paths = "artifacts/base/base", ["artifacts/finetune/delta", str(tmp_path / "other")]
    random_delta(paths[1], open_artifact(base), open_artifact("artifacts/prepare/dataset"), seed=1)
    want = []
    for path in paths:
        with load_engine(base, "torch", delta=path) as e:
            prompt = e.tokenizer.encode(LINES[3])
            want.append(e.generate([prompt], Sampling(6, stop_ids=()))[0].text)
    assert want[0] != want[1]
    ask = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    gateway = Gateway("bank-support", {"baseline": open_backend(resolve(BUNDLE, load_settings()))})
    said, stop = [], threading.Event()
    with serving(gateway, adapters=Adapters(gateway, base, slots=4)) as url, httpx.Client(timeout=PATIENCE, base_url=url) as c:  # fmt: skip
        load = lambda i: c.post("/v1/load_lora_adapter", json={"lora_name": "ab"[i], "lora_path": paths[i]}).json()["id"]  # fmt: skip
        names = [load(0), load(1)]

        def flood(i, stream):
            with httpx.Client(timeout=PATIENCE) as mine:
                while not stop.is_set():
                    r = mine.post(f"{url}/v1/completions", json={**ask, "model": names[i], "stream": stream})
                    if stream and r.status_code == 200:
                        *events, end = [x[6:] for x in r.text.split("\n\n") if x]
                        assert end == "[DONE]"
                        text = "".join(p["text"] for e in events for p in json.loads(e)["choices"])
                    else:
                        text = r.json()["choices"][0]["text"] if r.status_code == 200 else ""
                    said.append((i, r.status_code, text))

        threads = [threading.Thread(target=flood, args=(i, s)) for i in (0, 1) for s in (False, True)]
        for t in threads:
            t.start()
        for _ in range(3):  # the second one goes and comes back; the first one never notices
            n = len(said)
            until(lambda n=n: sum(x == (1, 200, want[1]) for x in said[n:]) > 2, "answers of the second")
            assert c.post("/v1/unload_lora_adapter", json={"lora_name": names[1]}).status_code == 200
            until(lambda n=n: (1, 404, "") in said[n:], "the end of its name")
            assert load(1) == names[1]
        stop.set()
        for t in threads:
            t.join(PATIENCE)
            assert not t.is_alive()
    assert {x[1:] for x in said if x[0] == 0} == {(200, want[0])}
    assert {x[1:] for x in said if x[0] == 1} == {(200, want[1]), (404, "")}


def test_the_official_client_and_the_harness_ask_the_onnx_engine(project, monkeypatch):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    backend = open_backend(resolve(BUNDLE, load_settings()), slots=4)
    engine, tok = backend.engine, backend.tokenizer
    prompt = tok.encode(LINES[0], special=True)
    greedy = engine.generate([prompt], Sampling(8, stop_ids=()))[0]
    ask = {"model": "bank-support", "prompt": prompt, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    with serving(Gateway("bank-support", {"baseline": backend})) as url:
        create = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE).completions.create
        whole = create(**ask, temperature=0)
        assert (whole.choices[0].text, whole.usage.completion_tokens) == (greedy.text, 8)
        parts = list(create(**ask, temperature=0, stream=True, stream_options={"include_usage": True}))
        assert "".join(p.choices[0].text for p in parts[:-1]) == greedy.text
        assert (parts[-1].usage, parts[-1].choices) == (whole.usage, [])
        cut = greedy.text[len(greedy.text) // 2 :][:2]
        stopped = create(**ask, temperature=0, stop=cut).choices[0]
        assert (stopped.text, stopped.finish_reason) == (greedy.text.split(cut)[0], "stop")
        warm = Sampling(8, 0.9, seed=7, stop_ids=())
        three = create(**ask, temperature=0.9, seed=7, n=3, logprobs=0).choices
        again = create(**ask, temperature=0.9, seed=7, n=3, logprobs=0).choices
        assert [c.logprobs for c in three] == [c.logprobs for c in again] and len({c.text for c in three}) > 1
        alone = engine.generate([prompt], warm)[0]
        assert three[0].logprobs.token_logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        echoed = create(**ask, temperature=0, echo=True, logprobs=1).choices[0].logprobs.token_logprobs
        scored = engine.score([prompt[:1]], [prompt[1:]])[0]
        assert echoed[0] is None and echoed[1:] == pytest.approx([*map(float, scored), *greedy.logprobs], abs=1e-4)

        lm = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="bank-support", max_length=128, batch_size=2)
        assert lm.tokenizer_backend == "remote"
        pairs = [(line, " my card") for line in LINES[:3]]
        told = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
        encoded = [lm._encode_pair(*pair) for pair in pairs]
        want = [float(engine.score([a], [b])[0].sum()) for a, b in encoded]
        assert [value for value, _ in told] == pytest.approx(want, abs=1e-3)


def test_serve_starts_with_nothing_said_and_stops_on_sigterm(project):
    code = "import sys; from llmkit.rollout.serve import serve; sys.exit(serve())"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = p.stdout.readline()
        assert "version 1, challenger" in line and "keys off" in line, line + p.stderr.read()
        url = line.split(" on ")[1].split("/v1")[0]
        until(lambda: httpx.get(f"{url}/ready").status_code == 200, "the self-test")
        ask = {"model": "bank-support", "messages": [{"role": "user", "content": LINES[0]}], "max_tokens": 8}
        got = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=PATIENCE)
        assert got.status_code == 200 and got.json()["usage"]["completion_tokens"] <= 8
        p.send_signal(signal.SIGTERM)
        assert p.wait(PATIENCE) == 0 and not p.stderr.read()
    finally:
        if p.poll() is None:
            p.kill()
            p.wait(PATIENCE)


def test_a_champion_that_lost_its_alias_makes_no_room_for_a_challenger(project, tmp_path, monkeypatch, capsys):
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    client, first = registry_client("sqlite:///mlflow.db"), from_registry(load_settings())
    assert rollout_start(first=True) == 0
    tags = client.get_model_version("bank-support", "1").tags | {"llmkit.release": "sha256:" + "2" * 64}
    client.create_model_version("bank-support", "file:///untested", tags=tags)
    client.set_registered_model_alias("bank-support", "challenger", "2")
    assert from_registry(load_settings()).note == "version 1, champion"
    client.delete_registered_model_alias("bank-support", "champion")
    with pytest.raises(KitError, match="its alias is gone") as e:
        from_registry(load_settings())
    order = f"llmkit rollout start --first --canary {short(first.release)}"
    assert f"`{order}`" in e.value.remedy and "version 1" in e.value.remedy
    assert rollout_start(first=True, canary=order.split()[-1]) == 0, "what it says is what helps"
    assert from_registry(load_settings()).note == "version 1, champion"


def test_a_bundle_that_is_replaced_while_it_is_loaded_is_not_served_with_a_mock_of_the_loader(tmp_path, monkeypatch):
    def bundle(name):
        with build(tmp_path / "bundle", "bundle", {}, {}) as d:
            write_json(d / "bundle.json", {"name": name, "system": "", "self_test": {"prompts": [], "max_tokens": 8}})
        return open_artifact(tmp_path / "bundle").digest

    class Closed(DummyEngine):
        def close(self):
            closed.append(self)

    monkeypatch.setattr(server, "verify_bundle", lambda where, digest: Path(where))
    target, closed = server.Target("bank", str(tmp_path / "bundle"), "sha256:1", bundle("old")), []
    monkeypatch.setattr(server, "open_any", lambda where, said=None: Closed())
    asyncio.run(server.open_backend(target).close(1))
    monkeypatch.setattr(server, "open_any", lambda where, said=None: bundle("new") and Closed())
    with pytest.raises(KitError, match="was replaced while it was loaded"):
        server.open_backend(target)
    assert len(closed) == 2
