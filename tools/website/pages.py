"Notebooks as the pages that Sphinx reads."

import ast
import json
import os
import re
from pathlib import Path

from diagrams import drawn
from signatures import api, parsed

ROOT = Path(__file__).parents[2]
NBS, SRC = ROOT / "nbs", ROOT / "build/docs"
DIRECTIVE = re.compile(r"^#[ \t]*\|[ \t]*([\w-]+):?[ \t]*(.*)$\n?", re.M)
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.M | re.S)
FENCED = re.compile(r"(^```.*?^```|^#+ .*?$)", re.M | re.S)


def read(path: Path) -> list[dict]:
    "The cells of a notebook, with their source as one string and their nbdev directives as a dict."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for c in cells:
        c["source"] = "".join(c["source"])
        c["marks"] = dict(DIRECTIVE.findall(c["source"])) if c["cell_type"] != "raw" else {}
        c["source"] = DIRECTIVE.sub("", c["source"]).strip()
    return cells


def title(path: Path) -> tuple[str, str]:
    "A notebook's heading and its promise."
    lines = [s for s in read(path)[0]["source"].splitlines() if s.strip()]
    return lines[0].lstrip("# "), " ".join(s[1:].strip() for s in lines[1:] if s.startswith(">"))


def visible(cells: list[dict]) -> list[dict]:
    "Without hidden cells, empty ones, and the sections whose heading ends in ` -`."
    kept, skip = [], 0
    for c in cells:
        heading = re.match(r"(#+) .*", c["source"]) if c["cell_type"] == "markdown" else None
        if heading and (not skip or len(heading[1]) <= skip):
            skip = len(heading[1]) if heading[0].endswith(" -") else 0
        if not skip and c["source"] and not {"hide", "default_exp"} & {*c["marks"]}:
            kept.append(c)
    return kept


def write(name: str, text: str) -> None:
    "Write one file of the sources of the site."
    (SRC / name).parent.mkdir(parents=True, exist_ok=True)
    (SRC / name).write_text(text, encoding="utf-8")


def named(text: str, names: dict[str, str], module: str | None) -> str:
    "Markdown with the names in backticks linked; a plain word only where its own module defines it."

    def link(m: re.Match) -> str:
        path = names.get(m[1], "")
        known = path and (re.search("[A-Z_.]", m[1]) or path == f"llmkit.{module}.{m[1]}")
        return f"{{py:obj}}`{m[1]} <{path}>`" if known else m[0]

    return re.sub(r"(?<![`}])(?<!^\| )`([A-Za-z_][\w.]*)`(?!`)", link, text, flags=re.M)


def diagrams(text: str, at: Path) -> str:
    "Markdown with every diagram drawn; one that cannot be drawn stops the build."
    try:
        return MERMAID.sub(lambda m: drawn(m[1]), text)
    except ValueError as e:
        raise SystemExit(f"docs: a diagram in {at}: {e}") from e


def shown(output: dict, at: Path) -> dict:
    "The output of a cell, with the diagrams in its Markdown drawn."
    data = output.get("data", {})
    if "text/markdown" not in data:
        return output
    return output | {"data": data | {"text/markdown": diagrams("".join(data["text/markdown"]), at)}}


def prose(text: str, names: dict[str, str], at: Path, module: str | None = None) -> str:
    "Markdown with names linked, links that leave nbs/ turned to the site's root, and diagrams drawn."

    def outside(m: re.Match) -> str:
        target = os.path.normpath(at.parent / m[1])
        return f"]({os.path.relpath(target[3:], at.parent)}" if target.startswith("../") else m[0]

    parts = FENCED.split(text)
    for i, p in enumerate(parts):
        if p.startswith("```mermaid"):
            parts[i] = diagrams(p, at)
        elif not FENCED.fullmatch(p):
            parts[i] = named(re.sub(r"\]\((\.\.[^)#]*)", outside, p), names, module)
    return "".join(parts)


def page(path: Path, to: Path, names: dict[str, str], record: bool = False) -> None:
    "Write a notebook in the form that Sphinx reads; a record is shown as it ran, without signatures."
    cells = read(path)
    module, out = next((c["marks"]["default_exp"] for c in cells if "default_exp" in c["marks"]), None), []
    about = title(path)[0]
    for i, c in enumerate(visible(cells)):
        if c["cell_type"] == "markdown":
            text = prose(c["source"], names, to, module)
            text = re.sub(r"^>", "{.promise}\n>", text, count=1, flags=re.M) if i == 0 else text
            out.append({"cell_type": "markdown", "source": text, "metadata": {}})
            about = ([*re.findall(r"^#+ (.+)$", c["source"], re.M)] or [about])[-1]
        elif c["cell_type"] == "code":
            nodes, exported = parsed(c["source"]), any(m.startswith("export") for m in c["marks"])
            text = api(nodes, f"llmkit.{module}") if exported and not record else ""
            if text:
                out.append({"cell_type": "markdown", "source": named(text, names, module), "metadata": {}})
            elif nodes and not c["outputs"] and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes):
                continue
            defines = any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in nodes)
            tags = ["hide-input"] if exported and (defines or record) else []
            meta = {"tags": tags, "mystnb": {"image": {"alt": f"Picture: {about}"}}}  # for whoever does not see it
            shows = [shown(o, to) for o in c["outputs"]]
            out.append({k: c[k] for k in ("cell_type", "source")} | {"outputs": shows, "execution_count": None, "metadata": meta})  # fmt: skip
    for n, c in enumerate(out):
        c["id"] = f"c{n}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    write(str(to), json.dumps({"cells": out, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def toctree(items: list[str], caption: str = "", hidden: bool = True, depth: int = 1) -> str:
    "A table of contents."
    opts = [":hidden:"] if hidden else []
    opts += [f":caption: {caption}"] if caption else []
    return "\n".join(["```{toctree}", *opts, f":maxdepth: {depth}", "", *items, "```", ""])


def listing(books: list[Path], folder: Path) -> str:
    "A table of notebooks: name, linked, and promise."
    rows = [f"| [{t}]({b.relative_to(folder)}) | {p} |" for b in books for t, p in [title(b)]]
    return "\n".join(["| | |", "|:--|:--|", *rows, ""])
