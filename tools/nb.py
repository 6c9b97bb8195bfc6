#!/usr/bin/env python
"""Edit a notebook as text, and put it back whole: cell ids, tags and outputs stay.

    python tools/nb.py text NB.ipynb          write NB.nb.py (percent format) beside it
    python tools/nb.py save NB.nb.py ...      write the notebook back, export its module, run it with outputs kept, clean it
    python tools/nb.py save --no-run ...      the same without running (stage notebooks, guides)

A new notebook starts as a new NB.nb.py. The text files are git-ignored: the notebook is the source.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def sh(*cmd: str) -> None:
    "Run a command and stop with its exit code when it fails."
    rc = subprocess.run([str(c) for c in cmd]).returncode
    if rc:
        sys.exit(rc)


def text(nb: Path) -> None:
    "Write the percent-format twin of `nb`."
    sh("jupytext", "-q", "--to", "py:percent", "-o", nb.with_suffix(".nb.py"), nb)


def tidy(nb: Path) -> None:
    "Name the kernel, so that JupyterLab need not ask, and drop stderr: warnings and progress bars document nothing."
    body = json.loads(nb.read_text(encoding="utf-8"))
    body["metadata"]["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    for cell in body["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    nb.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save(src: Path, run: bool = True) -> None:
    "Write `src` back to its notebook, export, run and clean it."
    nb = src.parent / src.name.replace(".nb.py", ".ipynb")
    update = ["--update"] if nb.exists() else []
    sh("jupytext", "-q", *update, "--to", "ipynb", "-o", nb, src)
    tidy(nb)
    sh("ruff", "format", "-q", nb)
    sh("nbdev-export", "--path", nb)
    sh("nbdev-clean", "--fname", nb)
    if run:
        sh("nbdev-test", nb, "--save", "--n-workers", "0")
        tidy(nb)
        sh("nbdev-clean", "--fname", nb)


def main() -> None:
    "Parse the command line."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=["text", "save"])
    p.add_argument("files", nargs="+", type=Path)
    p.add_argument("--no-run", action="store_true")
    a = p.parse_args()
    for f in a.files:
        text(f) if a.command == "text" else save(f, run=not a.no_run)


if __name__ == "__main__":
    main()
