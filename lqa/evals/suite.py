"""What a suite is given, and what it gives back.

A suite is a function `run(job) -> Result`.  All that it computes goes through `job.once`, so that a killed run goes on where it was;
all that it reports is a table with n and interval, so that one report shows every suite.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lqa.corpus.journal import Journal
from lqa.decoder import LatentDecoder, Reading
from lqa.evals.statistics import bootstrap


@dataclass(frozen=True)
class Cell:
    """A mean over n values with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


def cell(clusters: Sequence[Sequence[float]]) -> Cell:
    """The cell of values that hang together by clusters: `[[v] for v in values]` where each stands alone."""
    return Cell(*bootstrap(clusters), n=sum(map(len, clusters)))


@dataclass(frozen=True)
class Table:
    """Rows of named cells.  `columns`: name -> unit, "%" for shares in [0, 1], "" for plain numbers; None is a cell that does not apply."""

    title: str
    columns: dict[str, str]
    rows: dict[str, list[Cell | None]]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture, as numbers.  `kind`: "lines" (series: label -> {"x", "y", optional "low", "high"}) or "matrix" (series: "" -> {"x": column
    names, "y": row names, "values": rows})."""

    name: str  # of its file
    title: str
    kind: str
    series: dict[str, dict[str, list]]
    x: str = ""
    y: str = ""


@dataclass(frozen=True)
class Result:
    """What a suite found.  `items`: one entry per item with its id, our answer and scores; texts of outside data only as ids."""

    data: dict[str, str]  # name and sha256 of what it was measured on
    tables: dict[str, Table]
    items: list[dict]
    plots: list[Plot] = field(default_factory=list)
    settings: dict = field(default_factory=dict)


class Job:
    """One suite's work on one decoder.

    data     folder of outside data, or None for the package's own
    limit    at most so many items, drawn with `seed`
    sweep    also by read form, span and layer
    """

    def __init__(
        self,
        suite: str,
        decoder: LatentDecoder,
        journal: Journal,
        *,
        data: Path | None,
        limit: int | None,
        seed: int = 0,
        sweep: bool = False,
    ):
        self.suite, self.decoder, self.journal = suite, decoder, journal
        self.data, self.limit, self.seed, self.sweep = data, limit, seed, sweep
        self._start, self._made = time.monotonic(), 0

    def once(self, key: str, make: Callable[[], dict]) -> dict:
        """The result filed under `key`: that of an earlier run, else what `make` returns (JSON values only), on disk before it is used."""
        key = f"{self.suite}/{key}"
        if key not in self.journal.records:
            self.journal.add({"key": key, "value": make()})
            self._made += 1
        return self.journal.records[key]["value"]

    def read(self, chat, span, layer: int | None = None) -> Reading:
        """`decoder.read`."""
        return self.decoder.read(chat, span, layer)

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Prints how far the suite is and about how long it will take."""
        spent = time.monotonic() - self._start
        left = spent / self._made * (total - done) if self._made else 0.0
        print(f"{self.suite}{what and ' ' + what}: {done} of {total}, {left / 60:.1f} min left", file=sys.stderr, flush=True)
