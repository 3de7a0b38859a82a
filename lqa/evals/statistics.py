"""Intervals for every number that is printed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean


def bootstrap(values: Sequence[float], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the mean of `values` with its percentile-bootstrap interval; the same seed gives the same interval."""
    if not values:
        raise ValueError("no values to average")
    rng = random.Random(seed)
    n = len(values)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(resamples))
    tail = (1 - level) / 2
    return fmean(values), means[int(tail * resamples)], means[min(resamples - 1, int((1 - tail) * resamples))]
