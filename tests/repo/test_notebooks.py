"What every notebook of the library keeps to."

import json
import re

ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|usr|opt|var|work|mnt|srv|etc|data)/[\w.-]+|[A-Z]:\\\\Users")
PROGRESS = re.compile(r"\d+%\|[ █▏▎▍▌▋▊▉#]|\d(?:it|s|B|MB|kB)/(?:s|it)\b|█{3}|\r(?!\n)")


def cells(path, kind=None):
    "The cells of a notebook, with their source as one string."
    nb = json.loads(path.read_text(encoding="utf-8"))
    return [{**c, "source": "".join(c["source"])} for c in nb["cells"] if kind in (None, c["cell_type"])]


def printed(cell):
    "All text of a cell's outputs."
    for out in cell.get("outputs", []):
        yield "".join(out.get("text", "")) or ""
        yield from (
            v if isinstance(v, str) else "".join(v) for k, v in out.get("data", {}).items() if "image/png" not in k
        )


def directive(source, name):
    "The value of an nbdev directive such as `#| default_exp core.files`, or None."
    found = re.search(rf"^#\s*\|\s*{name}:?[ \t]*(\S*)\s*$", source, re.M)
    return found and found[1]


def test_title_and_promise(root, notebook):
    first = cells(root / notebook)[0]
    assert first["cell_type"] == "markdown", "the first cell is the title"
    lines = [line for line in first["source"].splitlines() if line.strip() and not line.startswith("#|")]
    assert re.match(r"# \S", lines[0]), "opens with `# name`"
    assert len(lines) > 1 and re.match(r"> \S", lines[1]), "then one promise, as a `>` line"


def test_outputs_are_small_and_free_of_this_machine(root, notebook):
    for c in cells(root / notebook, "code"):
        for text in printed(c):
            assert not (m := ABSOLUTE.search(text)), f"an absolute path: {m[0]} in the output of {c['source'][:80]!r}"
            assert not PROGRESS.search(text), f"a progress bar in the output of {c['source'][:80]!r}"
            assert len(text) < 100_000, f"a large output of {c['source'][:80]!r}"
        for out in c["outputs"]:
            assert out["output_type"] != "error", f"a traceback of {c['source'][:80]!r}"
            assert len("".join(out.get("data", {}).get("image/png", ""))) < 140_000, "a picture of over 100 kB"


def test_the_output_rules_bite():
    # paths of nobody's machine: their form is what the rule looks at
    assert ABSOLUTE.search("read /home/someone/x.jsonl") and not ABSOLUTE.search("see https://host/home/x a/tmp/b")
    assert PROGRESS.search(" 45%|████▌     | 9/20 [00:01<00:01, 9.1it/s]") and not PROGRESS.search("accuracy 45%")


def test_only_the_notebooks_of_the_library_export(root, notebook):
    exports = [c for c in cells(root / notebook) if directive(c["source"], "exports?i?") is not None]
    name = [d for c in cells(root / notebook, "code") if (d := directive(c["source"], "default_exp"))]
    if notebook.parts[1] in ("guides", "index.ipynb"):
        assert not name and not [c for c in exports if c["cell_type"] == "code"]
    else:
        assert len(name) == 1, "exactly one `#| default_exp`"
        folder = "stages" if notebook.parts[1] == "pipeline" else notebook.parts[1].partition("_")[2]
        stem = notebook.stem.partition("_")[2]
        assert name[0] in (f"{folder}.{stem}", folder if folder == stem else ""), (
            "the module is named like the notebook"
        )


def test_every_module_has_one_notebook(root, files):
    books = files("nbs/*.ipynb")
    made = [
        f"llmkit.{d}" for b in books for c in cells(root / b, "code") if (d := directive(c["source"], "default_exp"))
    ]
    assert sorted(made) == sorted(set(made)), "two notebooks export one module"
    modules = [".".join(f.with_suffix("").parts) for f in files("llmkit/*.py") if not f.name.startswith("_")]
    assert sorted(modules) == sorted(made), "a module without a notebook, or the other way round"


def test_a_stage_has_one_cell_of_parameters(root, stage):
    tagged = [c for c in cells(root / stage) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "exactly one cell is tagged `parameters`"
    assert directive(tagged[0]["source"], "exports?i?") is None, "and it is not exported"
