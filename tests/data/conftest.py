"""What the tests of `data` share."""

import json
from pathlib import Path

import pytest
from data_rows import SHARES, words

from llmkit.data.prepare import Reader, Rules, prepare
from llmkit.data.records import Shape
from llmkit.data.sources import Source


@pytest.fixture
def make(tmp_path: Path):
    "Prepare a file of the given bytes (or a folder, or rows); keyword arguments go to the rules."

    def run(content, kind="jsonl", shape=Shape(), splits=None, context=None, encoding="utf-8", encode=words, **rules):  # noqa: B008
        path = tmp_path / f"rows.{kind}"
        if isinstance(content, list):
            content = "\n".join(json.dumps(r) for r in content).encode()
        if isinstance(content, Path):
            path = content
        else:
            path.write_bytes(content)
        source = Source(kind, str(path), shape, encoding, splits or {})
        rules = Rules(**{"shares": SHARES, "seed": 3, "near_duplicates": None, "max_quarantine_share": 0.2, **rules})
        return prepare(source, tmp_path / "out/dataset", rules, Reader(encode, context_length=context))

    return run
