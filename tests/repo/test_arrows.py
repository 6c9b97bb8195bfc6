"A package imports only the packages above it: the numbers of the folders in nbs/ are the order."

import ast
import re

import pytest


def packages(root):
    "The packages in the order in which they may import each other; `stages` comes from nbs/pipeline, before `cli`."
    names = [p.name.partition("_")[2] for p in sorted((root / "nbs").glob("[0-9]*_*")) if p.is_dir()]
    return [*(n for n in names if n != "cli"), "stages", "cli"]


def arrows(code, module):
    "Every llmkit module that a module's code names: by an import at any depth, or as a lazy target `llmkit.x.y:z`."
    here = module.split(".")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names if a.name.startswith("llmkit."))
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*here[: -node.level], *filter(None, [node.module])] if node.level else (node.module or "").split(".")
            )
            if base == ["llmkit"]:
                yield from ((f"llmkit.{a.name}", node.lineno) for a in node.names if a.name[0] != "_")
            elif base[0] == "llmkit":
                yield ".".join(base), node.lineno
        elif isinstance(node, ast.Constant) and re.fullmatch(r"llmkit\.[\w.]+:\w+", str(node.value)):
            yield node.value.partition(":")[0], node.lineno


def downward(code, module, order):
    "The arrows of a module that point at a package below its own."
    mine = module.split(".")[1]
    for target, line in arrows(code, module):
        theirs = target.split(".")[1]
        if theirs not in order:
            yield f"{module}, line {line}: {target} is in no numbered package"
        elif order.index(theirs) > order.index(mine):
            yield f"{module}, line {line}: {mine} may not know {target}"


def modules(root):
    "Module name → code of everything generated."
    for f in sorted((root / "llmkit").rglob("*.py")):
        if not f.name.startswith("_") and f.parent != root / "llmkit" or f.name == "cli.py":
            yield ".".join(f.relative_to(root).with_suffix("").parts), f.read_text()


def test_no_arrow_points_down(root):
    order = packages(root)
    assert order[:2] == ["core", "gate"]
    assert [bad for name, code in modules(root) for bad in downward(code, name, order)] == []


@pytest.mark.parametrize(
    "line",
    [
        "from llmkit.flow.runner import run",
        "from ..flow.runner import run",
        "import llmkit.flow.runner",
        "from llmkit import flow",
        "def f():\n    from llmkit.flow import runner",
        'PARTS = {"x": "llmkit.flow.runner:run"}',
    ],
)
def test_every_form_of_a_downward_import_is_seen(root, line):
    assert len(list(downward(line, "llmkit.core.files", packages(root)))) == 1
    assert list(downward(line, "llmkit.cli.main", packages(root))) == []


def test_every_module_has_a_numbered_package(root):
    known = {*packages(root), "_modidx", "__init__", "__pycache__"}
    assert {p.stem for p in (root / "llmkit").iterdir()} - known == set()
