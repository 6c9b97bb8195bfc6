"""What the kit costs beside what it wraps, as ratios within one run.

    python benchmarks/stage_overhead.py [--repeat 5]

1. A stage that does nothing, through the runner with its record and its MLflow run, against plain papermill.
2. `llmkit repro` with nothing to do against `dvc repro` with nothing to do.

The two of a pair alternate, so that a change of the machine's load meets both; medians are compared. An idle machine is
needed: the watcher that owns the MLflow run works on a second core.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGE = "import sys; from llmkit.flow.runner import stage; sys.exit(stage('nothing'))"
REPRO = "import sys; from llmkit.flow.repro import repro; sys.exit(repro())"


def cell(source: str, *tags: str) -> dict:
    "A code cell."
    id = f"c{abs(hash(source)) % 10**6}"
    return dict(cell_type="code", source=source, metadata={"tags": list(tags)}, id=id, outputs=[], execution_count=None)


def make_project(folder: Path) -> None:
    "A git and DVC project with one stage that writes one number."
    for sub in ("nbs/pipeline", "llmkit/stages", "bin"):
        (folder / sub).mkdir(parents=True)
    work = "import pathlib; p = pathlib.Path('artifacts/nothing'); p.mkdir(parents=True, exist_ok=True); (p / 'n').write_text(str(n))"
    nb = {"cells": [cell("n: int = 1", "parameters"), cell(work)], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    nb["metadata"] = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (folder / "nbs/pipeline/01_nothing.ipynb").write_text(json.dumps(nb))
    (folder / "llmkit/stages/nothing.py").write_text('NEEDS = {}\nMAKES = {"n": "artifacts/nothing/n"}\n')
    (folder / "params.yaml").write_text("nothing: {n: 3}\n")
    (folder / "settings.ini").write_text("[DEFAULT]\ntracking_uri = sqlite:///mlflow.db\nexperiment = bench\n")
    for words in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(words, cwd=folder, check=True)


def timed(folder: Path, *words: str) -> float:
    "Seconds that a command takes; stops when it fails."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
    start = time.perf_counter()
    subprocess.run(words, cwd=folder, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def settle(folder: Path) -> None:
    "Wait for watchers that are still at work, so that they do not disturb the next measurement."
    code = "from llmkit.flow.tracking import settle; settle('.', wait=120)"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, check=True)


def compare(folder: Path, name: str, plain: list[str], kit: list[str], repeat: int) -> dict:
    "Alternate the two commands and compare their medians."
    times: dict[str, list[float]] = {"plain": [], "kit": []}
    for _ in range(repeat):
        times["plain"].append(timed(folder, *plain))
        times["kit"].append(timed(folder, *kit))
        settle(folder)
    medians = {k: round(statistics.median(v), 3) for k, v in times.items()}
    return {"what": name, **medians, "ratio": round(medians["kit"] / medians["plain"], 3), "limit": 1.3}


def main() -> int:
    "Print one JSON line for each pair, and return 1 when a limit is passed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    python, rows = [sys.executable, "-P", "-c"], []
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "project"
        make_project(folder)
        timed(folder, *python, REPRO)  # makes the database, the lock file, the caches of bytecode
        settle(folder)
        nb = "nbs/pipeline/01_nothing.ipynb"
        papermill = [sys.executable, "-m", "papermill", nb, "out.ipynb", "-p", "n", "3", "--no-progress-bar"]
        rows.append(compare(folder, "trivial stage: runner / papermill", papermill, [*python, STAGE], args.repeat))
        dvc = [sys.executable, "-m", "dvc", "repro"]
        timed(folder, *python, REPRO)
        rows.append(compare(folder, "nothing to do: llmkit repro / dvc repro", dvc, [*python, REPRO], args.repeat))
    for row in rows:
        print(json.dumps(row))
    missed = [r for r in rows if r["ratio"] > r["limit"]]
    for row in missed:
        print(f"MISSED: {row['what']}: {row['ratio']}, limit {row['limit']}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
