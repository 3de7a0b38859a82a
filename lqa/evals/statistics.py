"""Intervals for every number that is printed."""

from __future__ import annotations

import random
from collections.abc import Sequence


def bootstrap(
    clusters: Sequence[Sequence[float]], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high): the mean over all values with its percentile-bootstrap interval; the same seed gives the same interval.

    Values of one cluster (readings that share a draw) depend on each other, so whole clusters are drawn again.
    """
    sums = [(sum(values), len(values)) for values in clusters if values]
    if not sums:
        raise ValueError("no values to average")
    rng = random.Random(seed)

    def mean(chosen) -> float:
        return sum(total for total, _ in chosen) / sum(n for _, n in chosen)

    means = sorted(mean(rng.choices(sums, k=len(sums))) for _ in range(resamples))
    tail = (1 - level) / 2
    return mean(sums), means[int(tail * resamples)], means[min(resamples - 1, int((1 - tail) * resamples))]
