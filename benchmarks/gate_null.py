"""How often the gate is wrong: simulated evaluations of models at, beyond and within the margin.

    python benchmarks/gate_null.py [--times 10000]

Non-inferiority at alpha .05 must pass a model that lies exactly at the margin at most 5 % of the time, and equal
models with the planned power. Counts of discordant pairs are drawn from the multinomial that the model implies;
every distinct pair of counts is judged once.
"""

import argparse

import numpy as np

from llmkit.gate.paired import paired_scores, score_lower
from llmkit.gate.plan import pairs_needed


def passing(
    n: int, margin: float, discordance: float, difference: float, times: int, seed: int, correct: bool
) -> float:
    "Share of simulated evaluations that pass."
    gain = (discordance + difference) / 2
    draws = np.random.default_rng(seed).multinomial(n, [gain, discordance - gain, 1 - discordance], times)
    pairs, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
    good = [score_lower(int(b), int(c), n, correct=correct) > -margin for b, c in pairs]
    return counts[good].sum() / times


def main() -> None:
    "Print the tables."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--times", type=int, default=10_000)
    times = p.parse_args().times
    error = 3 * np.sqrt(0.05 * 0.95 / times)
    print(f"At the margin, {times:,} evaluations each (Monte-Carlo error {error:.4f}); alpha .05")
    print("| n | margin | discordance | passes | without continuity correction |\n|--:|--:|--:|--:|--:|")
    worst = 0.0
    for n in (50, 100, 200, 500, 1000, 3000):
        for margin, discordance in ((0.02, 0.05), (0.02, 0.20), (0.05, 0.06), (0.05, 0.20)):
            got = [passing(n, margin, discordance, -margin, times, n, c) for c in (True, False)]
            worst = max(worst, got[0])
            print(f"| {n} | {margin} | {discordance} | {got[0]:.4f} | {got[1]:.4f} |")
    print("\nEqual models at the planned n, power .8\n| margin | discordance | n | passes |\n|--:|--:|--:|--:|")
    for margin, discordance in ((0.01, 0.05), (0.02, 0.10), (0.05, 0.20)):
        n = pairs_needed(margin, discordance)
        print(f"| {margin} | {discordance} | {n} | {passing(n, margin, discordance, 0.0, times, n, True):.4f} |")
    some = max(200, times // 10)
    rng = np.random.default_rng(0)
    skewed = (rng.exponential(0.1, 200) - 0.12 for _ in range(some))
    hits = sum(paired_scores(np.zeros(200), d, times=1000).against(0.02) == "pass" for d in skewed)
    print(f"\nPaired bootstrap (BCa), skewed differences at the margin, n = 200, {some} evaluations: {hits / some:.4f}")
    raise SystemExit(int(worst > 0.05 + error))


if __name__ == "__main__":
    main()
