"""Rows that the tests of `data` share."""

from llmkit.data.records import Shape

SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}
TABLE = Shape(columns={"label": "category"}, templates={"prompt": "{text}", "completion": "{category}"})
VERBS = ("block", "order", "change", "find")
THINGS = ("card", "PIN", "limit", "statement", "password", "address", "account", "mandate", "rate", "e-mail")


def good_rows() -> list[dict]:
    "Forty rows without a fault, in four classes."
    return [
        {"prompt": f"How do I {v} my {t} when I am abroad?", "completion": v, "label": v} for v in VERBS for t in THINGS
    ]


def words(messages: list[dict], opened: bool) -> list[int]:
    "One token for each word."
    return [0] * sum(len(m["content"].split()) for m in messages)
