"""How often a 95 % interval holds the true value, by simulation, beside the plain bootstrap's.

    python -m benchmarks.intervals

Every round draws K folds of slides whose scores are normal with a known AUC and a known sensitivity
at a fixed cut, and asks for the intervals of the mean over folds. `plain` is the percentile
bootstrap of all slides of a fold together, where a resample without a positive is dropped, which
many tables use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mil.tasks.classification import Predictions, evaluate
from wsi_common.cli import launch
from wsi_common.config import key
from wsi_common.metrics.bootstrap import interval
from wsi_common.metrics.run_bootstrap import bootstrap

METRICS = ("auc", "sensitivity", "specificity")


@dataclass
class Config:
    """Keys of the simulation."""

    folds: int = key(5, "number of test folds")
    slides: int = key(30, "slides of a fold")
    positives: list[int] = key([1, 2, 3, 5, 10], "positive slides of a fold; a row each")
    aucs: list[float] = key([0.8, 0.95], "true areas under the curve")
    rounds: int = key(400, "simulated cohorts of a row")
    resamples: int = key(500, "bootstrap resamples")
    seed: int = key(0, "seed of every random draw")


def draw_runs(
    random: np.random.Generator, config: Config, positives: int, shift: float
) -> list[Predictions]:
    """One cohort: folds with that many positives, whose scores are `shift` higher."""
    runs = []
    targets = np.arange(config.slides) < positives
    for fold in range(config.folds):
        scores = random.normal(size=config.slides) + shift * targets
        chances = 1 / (1 + np.exp(shift / 2 - scores))  # the cut of 0.5 lies between the classes
        both = np.stack([1 - chances, chances], 1)
        cases = np.array([f"{fold}_{number}" for number in range(config.slides)])
        runs.append(Predictions(fold, cases, targets.astype(np.int64), both, 0.5))
    return runs


def plain_interval(runs: list[Predictions], metric: str, config: Config, seed: int) -> Any:
    """Percentiles of resamples of all slides of a fold; those without a class are dropped."""
    random = np.random.default_rng([seed, 1])
    count = config.slides
    drawn = [
        evaluate(run, random.multinomial(count, np.full(count, 1 / count), config.resamples))
        for run in runs
    ]
    whole = ~np.any([np.isnan(values["auc"]) for values in drawn], axis=0)
    samples = np.mean([values[metric] for values in drawn], axis=0)[whole]
    return np.percentile(samples, [2.5, 97.5]) if len(samples) else None


def measure(config: Config, positives: int, auc: float) -> dict[str, Any]:
    """Shares of intervals that hold the truth (of those given), and of cohorts with an interval."""
    from scipy.special import ndtr, ndtri  # a while to load

    shift = float(np.sqrt(2) * ndtri(auc))
    rate = float(ndtr(shift / 2))  # sensitivity and specificity at the cut
    truth = dict(zip(METRICS, (auc, rate, rate), strict=True))
    found: dict[str, list[Any]] = {f"{kind} {m}": [] for kind in ("ours", "plain") for m in METRICS}
    random = np.random.default_rng(config.seed)
    for number in range(config.rounds):
        runs = draw_runs(random, config, positives, shift)
        samples = bootstrap(runs, config.resamples, config.seed + number, evaluate)
        for name, true in truth.items():
            ours = interval(samples[name], (0, 1))[0]
            plain = plain_interval(runs, name, config, config.seed + number)
            for kind, ends in (("ours", ours), ("plain", plain)):
                if ends is not None:
                    found[f"{kind} {name}"].append(ends[0] - 1e-9 <= true <= ends[1] + 1e-9)
    row: dict[str, Any] = {"positives": positives, "auc": auc}
    for name, held in found.items():
        share = f"{np.mean(held):.3f}" if held else "-"
        row[name] = f"{share} ({len(held) / config.rounds:.2f})"
    return row


def main(config: Config) -> int:
    """Print a Markdown table: coverage, and in brackets the share of cohorts with an interval."""
    rows = [measure(config, n, auc) for auc in config.aucs for n in config.positives]
    print(f"| {' | '.join(rows[0])} |")
    print(f"|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |", flush=True)
    return 0


if __name__ == "__main__":
    launch(main, Config)
