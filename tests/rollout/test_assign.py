"""Raising a weight moves users from the baseline to that candidate, and nobody else."""

from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from llmkit.rollout.assign import assign, reweigh, slot, weights_of

EVERYBODY = ((0, "baseline"),)
NAMES = ("canary", "other", "third")
percents = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 1500).map(lambda x: x / 100), max_size=3)
UNITS = [f"user{i}" for i in range(400)]


@settings(max_examples=60, deadline=None)
@given(st.lists(percents, min_size=1, max_size=4), percents)
def test_whatever_came_before_nobody_moves_between_two_candidates(before, weights):
    slots = EVERYBODY
    for w in before:
        slots = reweigh(slots, w)
    after = reweigh(slots, weights)
    for u in UNITS:
        a, b = assign(slots, "salt", u), assign(after, "salt", u)
        assert a == b or "baseline" in (a, b)
    want = {v: p for v, p in weights.items() if p}
    got = weights_of(after)
    assert {v: round(p, 6) for v, p in got.items() if v != "baseline"} == {v: round(p, 6) for v, p in want.items()}


@settings(max_examples=60, deadline=None)
@given(percents, st.sampled_from(NAMES), st.integers(1, 1000))
def test_raising_one_moves_only_from_the_baseline_to_it(weights, name, more):
    slots = reweigh(EVERYBODY, weights)
    after = reweigh(slots, weights | {name: weights.get(name, 0) + more / 100})
    moved = {(assign(slots, "s", u), assign(after, "s", u)) for u in UNITS}
    assert {m for m in moved if m[0] != m[1]} <= {("baseline", name)}


@given(st.text(min_size=1), st.text(min_size=1), percents)
@settings(deadline=None)
def test_assignment_depends_on_salt_and_unit_alone(salt, unit, weights):
    slots = reweigh(EVERYBODY, weights)
    assert assign(slots, salt, unit) == assign(slots, salt, unit)
    assert 0 <= slot(salt, unit) < 10_000


def test_slots_are_uniform_and_salts_are_independent():
    tenths = [0] * 10
    both = 0
    for i in range(20_000):
        a, b = slot("r1", f"u{i}"), slot("r2", f"u{i}")
        tenths[a // 1000] += 1
        both += a < 1000 and b < 1000
    assert chisquare(tenths).pvalue > 1e-4
    assert 130 < both < 270  # a tenth of a tenth
