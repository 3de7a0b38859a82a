"""Intervals for every number that is printed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence


def bootstrap(
    clusters: Sequence[Sequence[float]], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high): the mean over all values with its percentile-bootstrap interval; the same seed gives the same interval.

    Values of one cluster (readings that share a draw) depend on each other, so whole clusters are drawn again.
    """
    sums = [(sum(values), len(values)) for values in clusters if values]
    if not sums:
        raise ValueError("no values to average")

    def mean(chosen) -> float:
        return sum(total for total, _ in chosen) / sum(n for _, n in chosen)

    return bootstrap_of(mean, sums, resamples=resamples, level=level, seed=seed)


def bootstrap_of(
    statistic: Callable[[Sequence], float], clusters: Sequence, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """(value, low, high) of what `statistic` makes of a list of clusters, with its percentile-bootstrap interval."""
    rng = random.Random(seed)
    values = sorted(statistic(rng.choices(clusters, k=len(clusters))) for _ in range(resamples))
    tail = (1 - level) / 2
    return statistic(clusters), values[int(tail * resamples)], values[min(resamples - 1, int((1 - tail) * resamples))]
