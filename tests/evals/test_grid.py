"""The grid of batch sizes and prompt lengths: times of requests that fill a batch together, and numbers that follow from them."""

import numpy as np
import pytest

import llmkit.evals.speed as speed
from llmkit.core.report import read_report, write_report
from llmkit.evals.grid import SHOWN, grid_lines, grid_report, marks_table
from llmkit.evals.speed import time_together
from llmkit.gate.judge import judge
from llmkit.runtime.engine import Token

BATCHES, LENGTHS, TOKENS = (1, 4), (8, 64), 6


@pytest.fixture(scope="module")
def report():
    return grid_report(".", [72, 105], BATCHES, LENGTHS, TOKENS, kind="dummy", requests=42)


def rows(report, table, column, shape):
    "The values of a cell."
    t = report.samples[table]
    return [v for v, s in zip(t[column], t["shape"], strict=True) if s == shape]


def test_each_number_follows_from_the_samples_of_its_cell(report):
    for b in BATCHES:
        for n in LENGTHS:
            shape = f"batch {b} × prompt {n}"
            first, last = (np.array(rows(report, "requests", c, shape)) for c in ("ttft", "latency"))
            gaps = np.array(rows(report, "gaps", "inter_token", shape))
            assert len(first) == -(-42 // b) * b and len(gaps) == len(first) * (TOKENS - 1)
            assert (first > 0).all() and (gaps >= 0).all()
            assert gaps.reshape(len(first), -1).sum(1) == pytest.approx(last - first)
            for metric, values in (("ttft", first), ("latency", last), ("inter_token", gaps)):
                for q in (50, 95):
                    m = report.get(f"{metric}_p{q}", f"shape={shape}")
                    assert m.value == pytest.approx(np.percentile(values, q)) and m.n == len(values)
                    assert m.low <= m.value and (m.high is None or m.value <= m.high)


def test_the_table_shows_each_cell_once_and_lines_up(report):
    lines = grid_lines(report).splitlines()
    assert len(lines) == 2 + len(BATCHES) * len(LENGTHS) and len({len(line) for line in lines}) == 1
    for line, (b, n) in zip(lines[2:], [(b, n) for b in BATCHES for n in LENGTHS], strict=True):
        cells = [c.strip() for c in line.strip("|").split("|")]
        assert cells[:2] == [str(b), str(n)]
        for said, (metric, unit) in zip(cells[2:], SHOWN.values(), strict=True):
            value = report.get(metric, f"shape=batch {b} × prompt {n}").value / unit
            assert float(said.replace(",", "")) == pytest.approx(value, abs=0.5 if value >= 100 else 0.005)


def test_a_rule_reads_one_cell(report, tmp_path):
    write_report(report, tmp_path)
    rule = {"metric": "ttft_p50", "on": "grid_engine", "slice": "shape=batch 4 × prompt 64", "bound": "interval"}
    held = {"grid_engine": read_report(tmp_path)}
    assert judge({"rules": [{**rule, "max": 5.0}]}, held).outcome == "pass"
    assert judge({"rules": [{**rule, "max": 1e-9}]}, held).outcome == "fail"
    assert "no ttft_p50 on shape=batch 9" in str(judge({"rules": [{**rule, "slice": "shape=batch 9", "max": 5.0}]}, held))  # fmt: skip


class Slow:
    "An engine on a clock of its own: a prompt takes a second, and a step two for each row."

    def __init__(self):
        self.time, self.rows, self.new = 0.0, {}, []

    def batch(self, slots, length):
        self.rows, self.new = {}, []
        return self

    def join(self, prompt, sampling):
        self.rows[slot := len(self.rows)] = sampling.max_tokens
        self.new.append(slot)
        return slot

    def step(self):
        self.time += len(self.new) if self.new else 2.0 * len(self.rows)
        self.new, out = [], {}
        for slot in list(self.rows):
            self.rows[slot] -= 1
            out[slot] = Token(1, 0.0, "", "length" if not self.rows[slot] else None)
            if not self.rows[slot]:
                del self.rows[slot]
        return out


def test_marks_are_those_of_a_known_clock(monkeypatch):
    engine = Slow()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: engine.time)
    found = marks_table(time_together(engine, [[1, 2]] * 3, 4), "batch 3 × prompt 2")
    assert found["requests"]["ttft"] == [3.0] * 3  # the first token waits for all three prompts
    assert found["gaps"]["inter_token"] == [6.0] * 9 and found["requests"]["latency"] == [21.0] * 3
    assert found["requests"]["tokens"] == [4] * 3
