"The minimal install, with none of the extras, imports every module."

import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent(
    """
    import importlib, importlib.metadata as md, pkgutil, re, sys

    def closure(names):
        "The import names of these distributions and of what they require."
        seen, todo = set(), list(names)
        while todo:
            name = re.split(r"[^\\w.-]", todo.pop())[0].lower().replace("_", "-")
            if name in seen: continue
            seen.add(name)
            todo += [r for r in md.requires(name) or [] if "extra ==" not in r]
        return {m for m, ds in md.packages_distributions().items() if {d.lower().replace("_", "-") for d in ds} & seen}

    minimal = [r for r in md.requires("llmkit") if "extra ==" not in r]
    allowed = closure(minimal) | set(sys.stdlib_module_names) | {"llmkit"}

    class Blocked:
        "Finds no module of an extra, as if it were not installed."
        def find_spec(self, name, path=None, target=None):
            if path is None and name not in allowed and not name.startswith("_"):
                raise ModuleNotFoundError(f"{name} belongs to an extra", name=name)

    for name in [m for m in sys.modules if m.split(".")[0] not in allowed and not m.startswith("_")]: del sys.modules[name]
    sys.meta_path.insert(0, Blocked())
    import llmkit
    found = [m.name for m in pkgutil.walk_packages(llmkit.__path__, "llmkit.") if m.name != "llmkit._modidx"]
    bad = []
    for name in EXTRA + found:
        try: importlib.import_module(name)
        except Exception as e: bad.append(f"{name}: {type(e).__name__}: {e}")
    print(len(found), *bad, sep="\\n")
    """
)


@pytest.fixture(scope="module")
def imported():
    "How many modules there are, and what failed when all of them and some of the extras were imported in one interpreter."
    script = SCRIPT.replace("EXTRA", repr(["torch", "pandas", "yaml", "nbdev"]))
    p = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    n, *bad = p.stdout.splitlines()
    return int(n), bad


def test_every_module_imports_without_the_extras(imported):
    n, bad = imported
    assert n > 5 and [b for b in bad if b.startswith("llmkit")] == []


def test_the_extras_are_out_of_reach_there(imported):
    assert [b.partition(":")[0] for b in imported[1]] == ["torch", "pandas", "yaml", "nbdev"]
