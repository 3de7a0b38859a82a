"""What a suite is given, and what it gives back.

A suite is a function `run(job) -> Result`.  All that it computes goes through `job.once`, so that a killed run goes on where it was;
all that it reports is a table with n and interval, so that one report shows every suite.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lqa.activations import Layer, Passes
from lqa.corpus.readings import FORMS
from lqa.decoder import LatentDecoder, Reading
from lqa.evals.statistics import bootstrap
from lqa.journal import Journal


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
    """A picture, as numbers.  `kind`: "lines" or "points" (series: label -> {"x", "y", optional "low", "high"}), or "matrix" (series: "" ->
    {"x": column names, "y": row names, "values": rows})."""

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


def made_name(control: str) -> str:
    """The name of the folder of what methods make of `control`."""
    return hashlib.sha256(control.encode()).hexdigest()[:12]


class Job:
    """One suite's work on one decoder.

    data      folder of outside data, or None for the package's own
    limit     at most so many items, drawn with `seed`
    sweep     also by read form, span and layer
    passes    target passes that all suites share
    text_only_trained  the decoder of that reference, or None
    rows      further decoders that get a row of their own: name -> decoder
    methods   ways to make the target behave that suites of steering compare (lqa.evals.methods); the first is "unsteered"
    examples  the budget of those that are trained (None: the steering's own)
    kept      folder where what they train is kept, or None
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
        passes: Passes | None = None,
        text_only_trained: LatentDecoder | None = None,
        rows: dict[str, LatentDecoder] | None = None,
        methods: Sequence[str] = (),
        examples: int | None = None,
        kept: Path | None = None,
    ):
        self.suite, self.decoder, self.journal = suite, decoder, journal
        self.data, self.limit, self.seed, self.sweep = data, limit, seed, sweep
        self.passes = passes if passes is not None else Passes()
        self.text_only_trained, self.rows = text_only_trained, rows or {}
        self.methods, self.examples, self.kept = methods, examples, kept
        self._seconds: dict[str, float] = {}
        self._start, self._made = time.monotonic(), 0

    def limited(self, items: Sequence) -> list:
        """At most `limit` of `items`, drawn with the seed."""
        return list(items) if self.limit is None else random.Random(self.seed).sample(items, min(self.limit, len(items)))

    def made(self, control: str) -> Path | None:
        """The folder of what methods make of `control`; all suites share it, so that it is made once."""
        return None if self.kept is None else self.kept / made_name(control)

    def once(self, key: str, make: Callable[[], dict]) -> dict:
        """The result filed under `key`: that of an earlier run, else what `make` returns (JSON values only), on disk before it is used."""
        key = f"{self.suite}/{key}"
        if key not in self.journal.records:
            start = time.monotonic()
            value = json.loads(json.dumps(make()))  # as it will be read again
            self.journal.add({"key": key, "value": value, "seconds": round(time.monotonic() - start, 2)})
            self._made += 1
        record = self.journal.records[key]
        self._seconds[key] = record["seconds"]
        return record["value"]

    def filed(self, suite: str, key: str) -> dict | None:
        """What another suite of this run has filed under `key`, or None."""
        record = self.journal.records.get(f"{suite}/{key}")
        return record and record["value"]

    @property
    def seconds(self) -> float:
        """What the results took, those of earlier runs included."""
        return sum(self._seconds.values())

    def read(self, chat, span, layer: Layer | None = None, decoder: LatentDecoder | None = None) -> Reading:
        """`decoder.read` of the suite's decoder (or another one); a chat is passed through the target once, for all spans and layers."""
        return (decoder or self.decoder).read(chat, span, layer, passes=self.passes)

    def read_under(self, system: str, message: str, decoder: LatentDecoder | None = None) -> Reading:
        """The reading of a message under a hidden system prompt, at the decoder's default layer."""
        chat = [{"role": "system", "content": system}, {"role": "user", "content": message}]
        return self.read(chat, FORMS["system"], decoder=decoder)

    @property
    def further(self) -> dict[str, LatentDecoder]:
        """The decoders besides the suite's own that get a row: text_only_trained if there is one, and those asked for by name."""
        return ({"text_only_trained": self.text_only_trained} if self.text_only_trained else {}) | self.rows

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Prints how far the suite is and about how long it will take."""
        spent = time.monotonic() - self._start
        left = f"{spent / self._made * (total - done) / 60:.1f} min left" if self._made else "from an earlier run"
        print(f"{self.suite}{what and ' ' + what}: {done} of {total}, {left}", file=sys.stderr, flush=True)
