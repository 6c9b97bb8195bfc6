"An edge bundle in an environment that holds ONNX Runtime and nothing else; what falls short is not written."

import filecmp
import json
import os
import re
import subprocess
import venv
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

from llmkit.core.errors import KitError
from llmkit.core.files import read_json, read_jsonl
from llmkit.core.report import read_report
from llmkit.deploy.edge import edge_write, modules_of
from llmkit.runtime.engine import load_engine
from llmkit.runtime.sampling import Sampling


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    "The Python of a new environment with onnxruntime and what that requires, taken from this one."
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    todo, seen = packages_distributions()["onnxruntime"][:1], set()  # the CPU's build or the GPU's
    while todo:
        dist = distribution(todo.pop())
        seen.add(dist.name)
        todo += [
            n for r in dist.requires or () if "extra ==" not in r and (n := re.match(r"[\w.-]+", r)[0]) not in seen
        ]
        for top in {f.parts[0] for f in dist.files if ".." not in f.parts and f.parts[0] != "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(dist.locate_file(top)).resolve())
    assert "numpy" in seen and not seen & {"torch", "transformers", "tokenizers"}
    return folder / "bin/python"


def run(python, *words, **how):
    return subprocess.run([str(python), *map(str, words)], capture_output=True, text=True, timeout=120, **how)


def test_it_answers_where_only_onnx_runtime_is_installed(release, bare_python, tmp_path):
    assert edge_write("bundle", "edge", records="artifacts/prepare/dataset/test.jsonl") == 0
    place = tmp_path / "elsewhere"
    Path("edge").rename(place)
    for module in ("torch", "transformers", "tokenizers", "jinja2", "fastcore", "scipy", "llmkit"):
        assert run(bare_python, "-c", f"import {module}").returncode == 1, f"{module} must not be there"
    # the same tokens as the release's engine, through its own tokenizer and template
    rows = list(read_jsonl("artifacts/prepare/dataset/test.jsonl"))
    odd = ["", " two  spaces ", "naïve Ünal – 12½ €\n\nnew line 🙂", "<|end|> obey"]
    rows += [
        {"id": f"odd{i}", "messages": [rows[0]["messages"][0], {"role": "user", "content": t}, {}]}
        for i, t in enumerate(odd)
    ]
    with load_engine("bundle/engine", slots=1) as engine:
        asked = [engine.tokenizer.chat(r["messages"][:2]) for r in rows]
        want = [engine.generate([a], Sampling(max_tokens=6))[0] for a in asked]
    lines = "".join(json.dumps({"id": r["id"], "question": r["messages"][1]["content"]}) + "\n" for r in rows)
    done = run(bare_python, place / "run.py", "--lines", input=lines, cwd=tmp_path)
    said = [json.loads(x) for x in done.stdout.splitlines()]
    assert [s["tokens"] for s in said] == [w.tokens for w in want], done.stderr
    assert [s["text"] for s in said] == [w.text for w in want]
    # by hand, checked, and with nothing loaded but what it says
    home = tmp_path / "home"
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("ORT_")} | {"HOME": str(home)}
    one = run(bare_python, place / "run.py", rows[0]["messages"][1]["content"], env=quiet)
    assert one.stdout == want[0].text + "\n" and one.returncode == 0
    assert not home.exists()  # ONNX Runtime notes who runs it, and tells its makers, unless it is told not to
    assert run(bare_python, place / "run.py", "--check").stdout == "whole, and it answers as it should\n"
    assert set(run(bare_python, place / "run.py", "--loaded").stdout.split()) == {"numpy", "onnxruntime"}
    # the program is the kit's, byte by byte
    import llmkit

    home = Path(llmkit.__file__).parent
    assert filecmp.cmpfiles(home, place / "llmkit", modules_of(), shallow=False)[0] == modules_of()
    # a terminal that knows few letters loses no answer
    odd = b'{"id": "\\ud800", "question": "a"}\n{"id": "\xe2\x82\xac", "question": "b"}\n'
    done = subprocess.run([str(bare_python), str(place / "run.py"), "--lines"], input=odd, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"})  # fmt: skip
    assert [json.loads(x)["id"] for x in done.stdout.splitlines()] == ["\ud800", "€"], done.stderr
    # a file of the program that was edited is told in one line, before it is used
    for name in ("edge.json", "bpe.json"):
        before = (place / name).read_text()
        (place / name).write_text("[]")
        edited = run(bare_python, place / "run.py", "card")
        assert edited.returncode == 2 and edited.stderr.endswith(
            f"{name}: changed since it was made. Copy the folder again\n"
        )
        (place / name).write_text(before)
    # a changed byte is found
    whole = (place / "model/weights.bin").read_bytes()
    with open(place / "model/weights.bin", "rb+") as f:
        f.seek(5000)
        f.write(b"\xff\x00\xff")
    broken = run(bare_python, place / "run.py", "--check")
    assert broken.returncode == 2 and "weights.bin differs" in broken.stderr
    # a copy that was cut off is told in one line
    os.truncate(place / "model/weights.bin", 1000)
    cut = run(bare_python, place / "run.py", "card")
    assert cut.returncode == 2 and len(cut.stderr.splitlines()) == 1 and "decode.onnx: cannot be loaded" in cut.stderr
    (place / "model/weights.bin").write_bytes(whole)
    # threads follow what the process may use
    count = "from llmkit.core.cores import cores, thread_limit; print(cores(), thread_limit())"
    core = min(os.sched_getaffinity(0))
    narrow = run("taskset", "-c", core, bare_python, "-c", count, cwd=place)
    assert narrow.stdout == f"1 {int(os.cpu_count() > 1)}\n", narrow.stderr
    # a question that does not fit is refused in one line
    long = run(bare_python, place / "run.py", "card " * 400)
    assert long.returncode == 2 and len(long.stderr.splitlines()) == 1 and "question: has " in long.stderr


def policy(text):
    before = Path("params.yaml").read_text()
    Path("params.yaml").write_text(before.replace("{metric: size_bytes, on: edge, max: 1.0e+6}", text))


def test_what_falls_short_is_not_written_and_quantizing_again_is_measured(release, capsys):
    how = {"records": "artifacts/prepare/dataset/test.jsonl"}
    assert edge_write("bundle", "edge", model="artifacts/merge/model", precision="int4", **how) == 0
    report = read_report("edge/report")
    assert report.context["precision"] == "int4" == read_json("edge/edge.json")["engine"]["precision"]
    same, size = report.get("same_answer_rate"), report.get("size_bytes")
    assert same.n == 12 and 0 <= same.value <= 1
    weights = Path("edge/model/weights.bin").stat().st_size
    assert weights < Path("bundle/engine/weights.bin").stat().st_size and weights < size.value < 1e6
    capsys.readouterr()
    # too large, too often wrong, too few items to tell
    for rule, code, word in (
        ("{metric: size_bytes, on: edge, max: 1000}", 1, "at most 1000 bytes is asked"),
        ("{metric: accuracy, on: edge, min: 0.5}", 1, "at least 0.5 is asked"),
        ("{metric: same_answer_rate, on: edge, min: 0.999, bound: wilson}", 3, "Not sure enough"),
        ("{metric: accuracy, on: edge, min: 0.0, min_n: 500}", 3, "Only 12 of at least 500"),
    ):
        saved = Path("params.yaml").read_text()
        policy(rule)
        assert edge_write("bundle", "refused", model="artifacts/merge/model", precision="int4", **how) == code
        assert word in (told := capsys.readouterr().out) and "refused: not written" in told
        assert not Path("refused").exists() and not list(Path().glob(".refused*"))
        Path("params.yaml").write_text(saved)


def test_other_questions_or_another_model_are_refused(release):
    how = {"records": "artifacts/prepare/dataset/test.jsonl"}
    text = Path("artifacts/prepare/dataset/test.jsonl").read_text()
    Path("other.jsonl").write_text(text.replace("question 1 ", "question 99 "))
    with pytest.raises(KitError, match="evaluated with other questions"):
        edge_write("bundle", "edge", records="other.jsonl")
    with pytest.raises(KitError, match="is a base, not a model"):
        edge_write("bundle", "edge", model="artifacts/base/base", **how)
    assert not Path("edge").exists()
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years")
    with pytest.raises(KitError, match="holds something else"):
        edge_write("bundle", "mine", **how)
    assert Path("mine/thesis.txt").read_text() == "years"


def test_a_template_that_trims_a_question_trims_it_on_the_device(release):
    from llmkit.deploy.bpe import PlainTokenizer, plain_spec
    from llmkit.deploy.edge import freeze_prompt
    from llmkit.deploy.edge_run import prompt_ids
    from llmkit.model.tokenizer import Tokenizer

    real = Tokenizer.load("bundle/engine")
    plain = PlainTokenizer(plain_spec(read_json("bundle/engine/tokenizer.json"), real.control, real.eos_ids))
    for filter, fits in (("", True), (" | trim", True), (" | upper", False), (" | replace(' ', '')", False)):
        template = real.template.replace("message.content", f"(message.content{filter})")
        tok = Tokenizer(real.backend, template, real.special, real.eos_ids)
        if fits:  # as it is, or trimmed
            prompt = freeze_prompt(tok, "Sort.")
            for q in (" my card?\n", "my card?", "\u3000 \n"):
                chat = [{"role": "system", "content": "Sort."}, {"role": "user", "content": q}]
                assert prompt_ids(plain, prompt, q) == tok.chat(chat), (filter, q)
        else:
            with pytest.raises(KitError, match="not exactly once"):
                freeze_prompt(tok, "Sort.")


def test_a_line_that_is_no_text_is_an_error_of_that_line():
    from llmkit.deploy.edge_run import answer_lines

    class Echo:
        def answer(self, question, max_tokens):
            return {"text": question}

    lines = [
        b'{"id": 1, "question": "a"}\n',
        b'{"id": 2, "question": "caf\xe9"}\n',
        b"[" * 200_000,
        b'{"id": 3, "question": "b"}',
    ]
    said = list(answer_lines(Echo(), iter(lines)))
    assert [r.get("text") for r in said] == ["a", None, None, "b"]
    assert said[1]["error"].startswith("UnicodeDecodeError") and said[1]["line"] == 2 and "error" in said[2]
