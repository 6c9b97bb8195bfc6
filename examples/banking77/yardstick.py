"""The yardstick for this example: words and pairs of words, weighted by TF-IDF, and logistic regression.

`python examples/banking77/yardstick.py` fits it to `data/train.csv`, asks it the questions of `data/test.csv`, and prints
it beside the engine that the pipeline made, item by item on the same questions. Needs scikit-learn.
"""

import argparse
import csv
import json
from pathlib import Path

from llmkit.core.report import read_report
from llmkit.gate.intervals import wilson
from llmkit.gate.paired import discordant, mcnemar

HERE = Path(__file__).parent


def read(path: Path) -> tuple[list[str], list[str]]:
    "The questions and their intents, spelt as words."
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    return [r["text"].strip() for r in rows], [" ".join(r["category"].split("_")).strip() for r in rows]


def yardstick(data: Path) -> dict[str, bool]:
    "Question → whether TF-IDF with logistic regression answers it right."
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=20, max_iter=2000))
    model.fit(*read(data / "train.csv"))
    asked, intents = read(data / "test.csv")
    return dict(zip(asked, model.predict(asked) == intents, strict=True))


def engine(project: Path) -> dict[str, bool]:
    "Question → whether the engine of the last run answers it right."
    report = read_report(project / "artifacts/evaluate/report/engine")
    right = dict(zip(report.column("task/id"), report.column("task/correct"), strict=True))
    with open(project / "artifacts/prepare/dataset/test.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return {r["messages"][0]["content"].strip(): bool(right[r["id"]]) for r in rows if r["id"] in right}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, default=HERE / "data", help="the folder of train.csv and test.csv")
    p.add_argument("--project", type=Path, default=HERE, help="the folder in which the pipeline ran")
    a = p.parse_args()
    known, ours = yardstick(a.data), engine(a.project)
    both = sorted(known.keys() & ours.keys())
    columns = {"TF-IDF, logistic regression": [known[q] for q in both], "the engine": [ours[q] for q in both]}
    for name, right in columns.items():
        low, high = wilson(sum(right), len(right)).low, wilson(sum(right), len(right)).high
        print(f"{name:28} {sum(right) / len(right):.4f}  ({low:.4f} to {high:.4f}, n = {len(right):,})")
    b, c = discordant(*columns.values())
    print(f"only the engine right: {b}, only the yardstick: {c}; exact McNemar p = {mcnemar(b, c):.3g}")


if __name__ == "__main__":
    main()
