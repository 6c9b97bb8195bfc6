"""Task and calibration metrics against scikit-learn, and language metrics against their definitions."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, log_loss

from llmkit.core.errors import KitError
from llmkit.evals import calibration
from llmkit.evals.language import language_measurements, text_likelihood
from llmkit.evals.suite import make_suite
from llmkit.evals.task import answer_table, ask, f1_by_label, macro_f1, mean_score
from llmkit.runtime.dummy import DummyEngine

NAMES = [f"label_{i}" for i in range(12)]


@pytest.fixture(params=[0, 1, 2])
def answers(request):
    rng = np.random.default_rng(request.param)
    true = rng.choice(NAMES, 300, p=rng.dirichlet(np.ones(12)))
    said = np.where(rng.random(300) < 0.7, true, rng.choice([*NAMES, "nonsense"], 300))
    return {"label": true.tolist(), "predicted": said.tolist(), "correct": (true == said).astype(int).tolist()}


def test_clusters_of_records_reach_the_table():
    "A record without one among others stands alone; where no record has one there is no column."
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a: b"}]
    rows = [{"id": f"q{i}", "messages": turns} for i in range(3)]
    engine = DummyEngine(replies={"hello": "a: b"})

    def table(records):
        suite = make_suite("demo", 1, records)
        return suite.digest, answer_table(suite, ask(engine, suite), engine.tokenizer)

    (plain, bare), (same, full) = table(rows), table([r | ({"cluster": "c"} if r["id"] != "q2" else {}) for r in rows])
    assert plain == same and "cluster" not in bare
    assert full["cluster"] == ["c", "c", "q2"] and {k: v for k, v in full.items() if k != "cluster"} == bare


def test_f1_against_sklearn(answers):
    names = sorted(set(answers["label"]))
    each = f1_score(answers["label"], answers["predicted"], labels=names, average=None, zero_division=0)
    assert list(f1_by_label(answers["label"], answers["predicted"]).values()) == pytest.approx(each)
    m = macro_f1(answers, times=200)
    assert m.value == pytest.approx(each.mean())
    assert m.low < m.value < m.high
    assert accuracy_score(answers["label"], answers["predicted"]) == pytest.approx(np.mean(answers["correct"]))


@pytest.mark.parametrize("kind,strategy", [("width", "uniform"), ("mass", "quantile")])
def test_calibration_against_sklearn(kind, strategy):
    rng = np.random.default_rng(0)
    c = rng.beta(5, 2, 1000)
    y = (rng.random(1000) < c**2).astype(int)
    parts = calibration.reliability(c, y, 10, kind)
    share, mean = calibration_curve(y, c, n_bins=10, strategy=strategy)
    assert [a for _, a, _ in parts] == pytest.approx(share, abs=0.02)
    assert [m for m, _, _ in parts] == pytest.approx(mean, abs=0.01)
    assert calibration.brier(c, y).mean() == pytest.approx(brier_score_loss(y, c))
    assert calibration.log_loss(c, y).mean() == pytest.approx(log_loss(y, c))


@pytest.mark.parametrize("n,expected", [(100, 0.087), (500, 0.039), (1000, 0.028), (5000, 0.012)])
def test_null_ece_figures(n, expected):
    "A perfectly calibrated model with confidences from Beta(5, 2), ten bins of equal width."
    rng = np.random.default_rng(4)
    got = np.mean([calibration.null_ece(rng.beta(5, 2, n), times=40, seed=s)[0] for s in range(25)])
    assert got == pytest.approx(expected, abs=0.003)


def test_no_placement_of_the_errors_that_could_be_there_costs_more_than_the_bound_says():
    rng, labels = np.random.default_rng(0), np.repeat(["a", "b", "c", "d"], [6, 14, 60, 120])
    low = macro_f1({"label": list(labels), "predicted": list(labels), "correct": [1] * 200}).low
    assert 0.7 < low < 0.95
    most = math.ceil(200 * stats.binomtest(200, 200).proportion_ci(0.95, method="exact").low)
    for _ in range(300):
        said, hit = labels.copy(), rng.choice(200, 200 - most, replace=False)
        said[hit] = rng.permutation(np.roll(labels, 50))[hit]
        assert f1_score(labels, said, average="macro") >= low


def test_language_metrics_follow_their_definitions():
    engine = DummyEngine(context_length=12)
    texts = ["I paid twice.", "Übung macht den Meister, sagt man.", "x"]
    table = text_likelihood(engine, texts)
    total, size = sum(table["nll"]), sum(len(t.encode()) for t in texts)
    got = {m.metric: m.value for m in language_measurements(table)}
    assert got["bits_per_byte"] == pytest.approx(total / size / math.log(2))
    assert got["byte_perplexity"] == pytest.approx(math.exp(total / size))
    assert got["word_perplexity"] == pytest.approx(math.exp(total / sum(len(t.split()) for t in texts)))
    assert got["perplexity"] == pytest.approx(math.exp(total / sum(table["tokens"])))


def test_the_upper_end_of_a_loss_is_as_seldom_too_low_as_it_says():
    "A calibrated model's log-loss: a hundred answers hold few of the dear ones, and BCa alone missed them in 8 of 100."
    rng, low = np.random.default_rng(0), 0
    c = rng.beta(8, 0.7, 1_000_000)
    truth = float(-(c * np.log(c) + (1 - c) * np.log1p(-c))[c < 1].mean())
    for _ in range(400):
        c = np.clip(rng.beta(8, 0.7, 100), 1e-12, 1 - 1e-12)
        x = -np.log(np.where(rng.random(100) < c, c, 1 - c))
        low += mean_score("log_loss", x, "t/x", direction="lower").high < truth
    assert low / 400 <= 0.025 + 3 * (0.025 * 0.975 / 400) ** 0.5


def test_macro_f1_of_150_labels_does_not_lie_beyond_its_interval():
    "Four or five items of each label: the percentile interval ended below the truth in half of the evaluations."
    rng, missed, k = np.random.default_rng(0), 0, 150

    def drawn(n):
        label = rng.integers(0, k, n)
        said = np.where(rng.random(n) < 0.9, label, rng.integers(0, k, n))
        return {"label": [f"{i:03}" for i in label], "predicted": [f"{i:03}" for i in said], "correct": [int(x) for x in label == said]}  # fmt: skip

    many = drawn(200_000)
    truth = np.mean(list(f1_by_label(many["label"], many["predicted"]).values()))
    for _ in range(60):
        m = macro_f1(drawn(700), times=300)
        missed += not m.low <= truth <= m.high
    assert missed <= 6


def test_a_question_that_does_not_fit_is_named_by_its_id():
    "The error named prompt 0, whichever it was."
    rows = [{"id": f"q{i}", "messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "card: ok"}]} for i, t in enumerate(("hi", "x" * 400, "ho"))]  # fmt: skip
    with pytest.raises(KitError, match="bank@1: item q1: a question does not fit the context"):
        ask(DummyEngine(context_length=256), make_suite("bank", 1, rows, max_tokens=16))
