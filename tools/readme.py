#!/usr/bin/env python
"""Write README.md from nbs/index.ipynb: its markdown as it stands, its code cells as fences, their text output below.

python tools/readme.py
"""

import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def fence(cell: dict) -> str:
    "A code cell and what it printed."
    text = "".join("".join(o.get("text") or o.get("data", {}).get("text/plain", [])) for o in cell["outputs"])
    return f"```python\n{''.join(cell['source'])}\n```" + (f"\n\n```text\n{text.rstrip()}\n```" if text else "")


def from_root(text: str) -> str:
    "Markdown with its relative links as seen from the root, not from nbs/."
    return re.sub(r"\]\((?!\w+:|#)([^)]+)", lambda m: f"]({os.path.normpath('nbs/' + m[1])}", text)


def readme(nb: dict) -> str:
    "The notebook as Markdown."
    made = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->"
    body = [from_root("".join(c["source"])) if c["cell_type"] == "markdown" else fence(c) for c in nb["cells"]]
    return "\n\n".join([made, *(b.strip() for b in body if b.strip())]) + "\n"


if __name__ == "__main__":
    index = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    (ROOT / "README.md").write_text(readme(index), encoding="utf-8")
