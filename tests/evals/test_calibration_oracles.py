"""Calibration errors against torchmetrics, the temperature against scikit-learn, and how often the interval holds."""

import numpy as np
import pytest

from llmkit.evals.calibration import bin_of, calibration_measurements, debiased_ece, ece, mce
from llmkit.evals.temperature import fit_temperature, log_odds, rescale, temperature_measurements


def answers(n, seed, harm=lambda c: c):
    "Confidences from Beta(5, 2) and whether each answer was right."
    rng = np.random.default_rng(seed)
    c = rng.beta(5, 2, n)
    return c, (rng.random(n) < harm(c)).astype(int)


@pytest.mark.parametrize("n,bins", [(60, 10), (500, 10), (500, 15), (3000, 20)])
@pytest.mark.parametrize("seed", [0, 1])
def test_ece_and_mce_against_torchmetrics(n, bins, seed):
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.classification import binary_calibration_error

    c, y = answers(n, seed, lambda c: c**2)
    c = c.astype(np.float32).astype(float)
    p, t = torch.tensor(c, dtype=torch.float32), torch.tensor(y)
    assert ece(c, y, bins) == pytest.approx(float(binary_calibration_error(p, t, bins, "l1")), abs=1e-5)
    assert mce(c, y, bins) == pytest.approx(float(binary_calibration_error(p, t, bins, "max")), abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_temperature_against_sklearn(seed):
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    class Given(ClassifierMixin, BaseEstimator):
        "Hands its input through as logits."

        def fit(self, X, y):
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, X):
            return X

        def predict(self, X):
            return self.classes_[X.argmax(1)]

    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (800, 5))
    y = np.array([rng.choice(5, p=np.exp(r) / np.exp(r).sum()) for r in z])
    given = FrozenEstimator(Given().fit(3 * z, y))
    oracle = CalibratedClassifierCV(given, method="temperature").fit(3 * z, y)
    t = fit_temperature(3 * z, y)
    soft = np.exp(3 * z / t) / np.exp(3 * z / t).sum(1, keepdims=True)
    assert soft == pytest.approx(oracle.predict_proba(3 * z), abs=2e-3)
    assert t == pytest.approx(3, rel=0.1)


def test_log_odds_fit_is_the_two_class_fit():
    c, y = answers(2000, 3)
    sure = rescale(c, 0.5)
    assert fit_temperature(log_odds(sure), y) == pytest.approx(2, rel=0.1)
    z = np.log(sure / (1 - sure))
    assert fit_temperature(np.column_stack([-z / 2, z / 2]), y) == pytest.approx(fit_temperature(log_odds(sure), y))


def test_scaling_keeps_the_ranking_and_helps_only_where_it_can():
    c, y = answers(3000, 5)
    table = {"id": list(range(3000)), "confidence": rescale(c, 0.4).tolist(), "correct": y.tolist()}
    measured, rows = temperature_measurements(table, "x")
    got = {m.metric: m for m in measured}
    assert got["log_loss_gain"].low > 0 and got["ece_scaled"].value < 0.5 * got["ece_unscaled"].value
    assert np.argsort(rows["confidence"]).tolist() == np.argsort(rows["scaled"]).tolist()
    calm = {**table, "confidence": c.tolist()}
    assert {m.metric: m for m in temperature_measurements(calm, "x")[0]}["log_loss_gain"].low < 0


@pytest.mark.parametrize("shift,truth", [(0.0, 0.0), (0.08, 0.08)])
def test_how_often_the_debiased_interval_holds_the_truth(shift, truth):
    held, middle = 0, []
    for seed in range(80):
        c, y = answers(500, seed, lambda c: np.clip(c - shift, 0, 1))
        mid, low, high = debiased_ece(c, y, times=300, seed=seed)
        held, middle = held + (low <= truth <= high), [*middle, mid]
    assert held / 80 > 0.95 - 3 * np.sqrt(0.05 * 0.95 / 80) - 0.03
    assert np.mean(middle) == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("n", [20, 50, 200])
@pytest.mark.parametrize("sure", ["certain", "nearly", "spread"])
def test_the_upper_end_is_rarely_below_the_true_error(n, sure):
    "Answers that are all given with certainty, or nearly, included: that all were right so far proves little."
    rng, below = np.random.default_rng(n), 0
    draw = {"certain": np.ones, "nearly": lambda n: 1 - rng.beta(0.3, 30, n), "spread": lambda n: rng.uniform(0.3, 1, n)}[sure]  # fmt: skip
    harm = {"certain": 0.1, "nearly": 0.03, "spread": 0.1}[sure]
    for seed in range(400):
        c = draw(n)
        y = (rng.random(n) < c - harm).astype(int)
        mid, low, high = debiased_ece(c, y, times=50, seed=seed)
        below += high < harm - 0.001
        assert low <= mid <= high
    assert below / 400 <= 0.025 + 2 * np.sqrt(0.025 * 0.975 / 400)


@pytest.mark.parametrize("n,a,gain", [(100, 8, 0.05), (100, 20, 0.05), (50, 20, 0.0), (300, 8, 0.05)])
def test_the_lower_end_is_rarely_above_the_true_error(n, a, gain):
    "Under-confident models included, whose answers are nearly all right: their own spread is next to none."
    draw = lambda rng, n: rng.beta(a, 1, n)
    c = draw(np.random.default_rng(99), 200_000)
    harm = np.abs(np.bincount(bin_of(c), np.minimum(c + gain, 1) - c)).sum() / len(c)
    rng, above, times = np.random.default_rng(n), 0, 300
    for seed in range(times):
        c = draw(rng, n)
        y = (rng.random(n) < c + gain).astype(int)
        above += debiased_ece(c, y, times=300, seed=seed)[1] > harm + 1e-9
    assert above / times <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / times)


def test_measurements_of_a_calibrated_and_a_miscalibrated_model():
    for shift, clear in ((0.0, False), (0.15, True)):
        c, y = answers(800, 1, lambda c, s=shift: np.clip(c - s, 0, 1))
        got = {m.metric: m for m in calibration_measurements({"confidence": c.tolist(), "correct": y.tolist()}, "x")}
        assert (got["ece_debiased"].low > 0) is clear
        assert got["ece_excess"].value == pytest.approx(got["ece"].value - got["ece_null"].value)
        assert "10 bins of equal width; confidence: x" in got["ece"].method
        assert "equal mass" in got["ece_adaptive"].method and got["mce"].value >= got["ece"].value
