"""Secrets: what detect-secrets finds is found, wherever it stands, in time with the length of the text."""

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.privacy import LATER, RUNS, SPACES, find_secrets, mask, secret_patterns

SIZE = 400_000
HOSTILE = (
    "://", "eyJ", "//", "sk-", "://a:", "eyJa.", "//a/:_authToken=", "//a/:_authToken=npm", "sk-T3BlbkFJ", "aws key '", "xoxb-1-",
    "glagent-", '":"', "key  =", "-1", "a", "A", "1", "[", " ", "\n", "hooks", "https://a:", "github_pat_", "pypi-AgEIcHlwaS5vcmc",
)  # fmt: skip


def denied():
    "The patterns of detect-secrets as they come, by name: the oracle."
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class as classes
    from detect_secrets.plugins.base import RegexBasedDetector

    chosen = [c for n, c in sorted(classes().items()) if issubclass(c, RegexBasedDetector) and "IP" not in n]
    return [(c.secret_type, p) for c in chosen for p in c().denylist]


PAIRS = list(zip(denied(), secret_patterns(), strict=False))


def mended():
    "Pairs of a pattern and its linear form, where the two differ."
    return [(p, q, check) for (_, p), (_, q, check) in PAIRS if p.pattern != q.pattern]


def test_what_is_mended_is_in_the_installed_patterns():
    assert [n for (n, _), (m, _, _) in PAIRS if n != m] == [] and len(secret_patterns()) == len(PAIRS) + len(LATER)
    texts = [p.pattern for _, p in denied()]
    assert all(sum(t.startswith(start) for t in texts) == 1 for start in RUNS)
    assert sum(SPACES[0] in t for t in texts) == 5 and len(mended()) == 8


WORDS = [
    "eyJ", "a", "b-", "=", ".", "..", " ", "  ", "\n", "!", "//", "/", ":", "://", "/:_authToken=", "npm_", "npm_x", "0a" * 18, "sk-", "T3BlbkFJ",
    "aB3" * 7, "c" * 20, "cl", "cloudant", "_key", "key", "token", ":=", "=>", "::", '"', "]", "0f" * 32, "z" * 24, "z9" * 32, "sl", "softlayer",
    "ibm", "iam", "secret_access_key", "a1" * 24, "A_" * 22,
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=14).map("".join))
def test_the_linear_forms_find_what_the_patterns_find(text):
    for p, q, check in mended():
        found = [m.span() for m in q.finditer(text) if check is None or check(m[0])]
        assert found == [m.span() for m in p.finditer(text)], p.pattern


@pytest.mark.parametrize("unit", HOSTILE)
def test_a_hostile_row_takes_seconds(unit):
    text = "https://example.org/a-long-word key" + unit * (SIZE // len(unit)) + "{ password ="
    began = time.process_time()
    find_secrets(text)
    assert time.process_time() - began < 6


def jwt(size):
    "A JSON Web Token of some characters."
    letters = random.Random(size).choices("abcdefghijklmnopqrstuvwxyzABCDEF0123456789-_", k=size)
    return "eyJ" + "".join(letters[3 : size // 2]) + "." + "".join(letters[size // 2 + 1 :])


SECRETS = {
    "JSON Web Token": jwt(4000),
    "NPM tokens": "//registry.example.org/:_authToken=" + "npm_" + "x" * 36,
    "OpenAI Token": "sk-" + "a" * 20 + "T3BlbkFJ" + "b" * 20,
    "AWS Access Key": "AKIA" + "IOSFODNN7EXAMPLE",
    "Private Key": "BEGIN RSA " + "PRIVATE KEY",
    "Basic Auth Credentials": "://me:" + "hunter2@",
    "Hugging Face token": "hf_" + "a" * 34,
    "Cloudant Credentials": "cloudant_key" + " " * 3000 + "0f" * 32,
}


@pytest.mark.parametrize("entity", SECRETS)
@pytest.mark.parametrize("before", ["", "eyJ" * 30_000 + " ", "word " * 2000, "sk- " * 3000])
def test_a_secret_is_found_once_wherever_it_stands(entity, before):
    said = SECRETS[entity]
    for at in (0, 1, 4095, 8191):
        text = f"{before}{'.' * at} {said} and more"
        (found,) = [f for f in find_secrets(text) if f.entity == entity]
        assert said.startswith(text[found.start : found.end].strip()[:40]) and found.start >= len(before) + at
        assert re.search(re.escape(said), mask(text, [found])) is None
