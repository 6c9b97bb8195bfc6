"""Build the site from the notebooks, without running them.

    python tools/website [OUT]        default: site

The pages are written to build/docs, laid out as nbs/ is, and Sphinx (docs/conf.py) makes them HTML. An exported cell
becomes the signatures of what it defines, with the comments on their parameters, and its source folded below; a name in
backticks links to what it names. Neither the build nor a page asks another host for anything, and no page needs a script
for what it shows: formulas become MathML, and diagrams become SVG (diagrams.py says how, and why not by Mermaid itself).
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pages import NBS, ROOT, SRC, listing, page, prose, read, toctree, write
from ruamel.yaml import YAML
from signatures import symbols


def graph() -> str:
    "The stages and what flows between them, from dvc.yaml, as a Mermaid diagram without the arrows that a path implies."
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]

    def paths(entries: list) -> list[str]:
        return [p if isinstance(p, str) else next(iter(p)) for p in entries or []]

    makes = {o: s for s, v in stages.items() for o in paths(v.get("outs"))}
    needs: dict[str, dict[str, str]] = {s: {} for s in stages}
    for s, v in stages.items():
        for d in paths(v.get("deps")):
            if d in makes:  # what an arrow carries is the artifact, which is listed before the record of its making
                needs[s].setdefault(makes[d], d)

    def reaches(a: str, b: str) -> bool:
        return any(n == a or reaches(a, n) for n in needs[b])

    edges = [
        (a, Path(d).name, b) for b in needs for a, d in needs[b].items() if not any(reaches(a, n) for n in needs[b])
    ]
    return "\n".join(["```mermaid", "flowchart TB", *(f"  {a} -->|{d}| {b}" for a, d, b in edges), "```", ""])


def pipeline(names: dict[str, str]) -> None:
    "The section on the pipeline: its graph, its stages, the latest records, and what the last run left."
    stages = sorted((NBS / "pipeline").glob("[0-9]*.ipynb"))
    records = sorted((ROOT / "records").glob("*.ipynb"))
    text = ["# The pipeline\n", "From records to a registered version, by `llmkit repro`.\n"]
    text += [prose(graph(), names, Path("pipeline/index.md"))] if (ROOT / "dvc.yaml").exists() else []
    text += ["## Stages\n", listing(stages, NBS / "pipeline"), "## Latest records\n"]
    if records:
        text += ["The executed notebooks of the last successful run, as they are tracked by git.\n"]
        text += [f"- [{r.stem}](../records/{r.name})\n" for r in records]
    else:
        text += ["None yet: `make repro` runs the pipeline and leaves them in `records/`.\n"]
    text += ["## What the last run left\n"]
    for what, folder, first in [
        ("Data docs", "artifacts/prepare/dataset/data_docs", "index.html"),
        ("Model card", "artifacts/card/card", "model_card.html"),
    ]:
        if (ROOT / folder / first).is_file():
            shutil.copytree(ROOT / folder, SRC / "_extra" / what.lower().replace(" ", "_"))
            text.append(f'- <a href="../{what.lower().replace(" ", "_")}/{first}">{what}</a>\n')
        else:
            text.append(f"- {what}: none on this machine; `make repro` makes it in `{folder}`\n")
    text += [
        toctree([s.stem for s in stages], "Stages"),
        toctree([f"{r.stem} (record) <../records/{r.stem}>" for r in records], "Records"),
    ]
    write("pipeline/index.md", "\n".join(text))
    for r in records:
        page(r, Path("records") / r.name, names, record=True)


def package(folder: Path, promises: dict[str, str]) -> None:
    "The page of one package: its promise and its modules."
    books, name = sorted(folder.glob("[0-9]*.ipynb")), folder.name.partition("_")[2]
    if name not in promises:
        raise SystemExit(f"docs: nbs/index.ipynb has no row for the package `{name}` in its table of packages")
    head = f"# {name}\n\n{{.promise}}\n> {promises[name]}\n\n"
    write(f"{folder.name}/index.md", head + listing(books, folder) + toctree([b.stem for b in books]))


def landing(packages: list[Path], guides: list[Path]) -> None:
    "Add the tables of contents to the landing page."
    nb = json.loads((SRC / "index.ipynb").read_text())
    more = [f.stem for f in (ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md") if f.exists()]
    for f in more:  # written for the checkout, where the notebooks lie in nbs/
        write(f"{f}.md", (ROOT / f"{f}.md").read_text(encoding="utf-8").replace("](nbs/", "]("))
    tocs = [
        toctree([f"guides/{g.stem}" for g in guides], "Guides"),
        toctree(["pipeline/index"], "Pipeline"),
        toctree([f"{p.name}/index" for p in packages], "Library"),
        toctree(more, "Project"),
    ]
    nb["cells"].append({"cell_type": "markdown", "id": "toc", "metadata": {}, "source": "\n".join(tocs)})
    write("index.ipynb", json.dumps(nb))


def build(out: Path) -> None:
    "Write the pages and run Sphinx; a warning is an error."
    sys.path.insert(0, str(ROOT))
    shutil.rmtree(SRC, ignore_errors=True)
    names = symbols()
    (SRC / "_extra").mkdir(parents=True)
    for book in [NBS / "index.ipynb", *sorted(NBS.glob("*/[0-9]*.ipynb"))]:
        page(book, book.relative_to(NBS), names)
    packages = [p for p in sorted(NBS.glob("[0-9]*_*")) if any(p.glob("[0-9]*.ipynb"))]
    promises = dict(
        re.findall(r"^\| `(\w+)` \| (.+?) \|$", "\n".join(c["source"] for c in read(NBS / "index.ipynb")), re.M)
    )
    for p in packages:
        package(p, promises)
    pipeline(names)
    landing(packages, sorted((NBS / "guides").glob("[0-9]*.ipynb")))
    html, trees = SRC.parent / "html", SRC.parent / "doctrees"
    shutil.rmtree(html, ignore_errors=True)
    cmd = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "docs", "-d", trees, SRC, html]
    if rc := subprocess.run([str(c) for c in cmd]).returncode:
        sys.exit(rc)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(html, out)
    print(f"docs: {sum(1 for _ in out.rglob('*.html'))} pages in {out}/index.html")


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
