"""The interval of the recovery covers the truth as often as it says."""

import numpy as np
import pytest

from llmkit.model.parity import delta_recovery


@pytest.mark.parametrize(
    "n, loss, won", [(64, 0.02, 0.02), (64, 0.05, 0.05), (48, 0.01, 0.05), (200, 0.02, 0.02), (200, 0.1, 0.05)]
)
def test_answers_that_are_seldom_lost(n, loss, won):
    "Without a lost answer in the sample, resampling it finds no spread: at n = 64 and a loss of 2 % it covered 67 of 100."
    rng, hits = np.random.default_rng(1), 0
    gained = 0.05 * 0.97 + 0.95 * 0.85
    truth = (gained * (1 - loss) + (1 - gained) * won - 0.05) / (gained - 0.05)
    for _ in range(200):
        base = rng.random(n) < 0.05
        adapter = np.where(base, rng.random(n) < 0.97, rng.random(n) < 0.85)
        candidate = np.where(adapter, rng.random(n) >= loss, rng.random(n) < won)
        m = delta_recovery(candidate, base, adapter, times=500)
        hits += m.low <= truth <= m.high
    assert hits >= 0.92 * 200  # two standard errors below 95 of 100
