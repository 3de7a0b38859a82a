"""The maps of the conditionings "centred" and "projected" as training starts: fitted in closed form, or the identity.

"centred": minus the mean over what training reads.  "projected": for readings of training controls in the system turn, whose messages know
nothing of them, ridge regression predicts from the difference h - h0 at one token what the write layer holds, on average over tokens, where
the decoder's prompt has the control's text instead of slots.  With `texts`, the opening (lqa.conditioning) has maps of its own, for which
the controls' descriptions and answers are hidden too: what changes there depends on the hidden text alone, so only more texts help.

A regression fits the controls that it was made from better than new ones, and a decoder trained on that would trust it too much.  With
`folds`, training reads each control through maps that were made without it (cross-fitting, as in stacking: Wolpert 1992).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lqa.activations import Layer, by_length, capture_rows, layer_list
from lqa.chat import render, resolve_span
from lqa.conditioning import PROJECTION, Projection, reference, write_layer_means
from lqa.config import DecoderConfig
from lqa.corpus import Control, cluster_of, load_messages
from lqa.errors import LqaError
from lqa.models import Base
from train.data import control_chat

STARTS = ("fitted", "identity")
FOLDS = "folds"  # folder of a run


@dataclass
class ProjectionConfig:
    """How the maps come about."""

    start: str = "fitted"  # or "identity", with no bias; for "projected"
    train: bool = False  # together with the adapter; else they stay as they start
    readings: int = 256  # training readings that "centred" averages over
    messages: int = 2  # readings of each control, each with another message
    ridge: float = 0.1  # in units of the standardised differences' variance
    scale: float = 6.0  # by how much a prediction is stretched from the mean: ridge regression shrinks it
    folds: int = 0  # in training a control is read through maps made without it and others of its fold; 0: through those of all
    texts: int = 0  # hidden texts of each control besides it, for maps of the opening alone; 0: the opening has none of its own

    def check(self, conditioning: str, messages: int) -> ProjectionConfig:
        """Raises ValueError for what cannot be done; `messages` are in the pool."""
        if self.start not in STARTS:
            raise ValueError(f"projection.start is {self.start!r}; use {' or '.join(STARTS)}")
        if not isinstance(self.train, bool):
            raise ValueError(f"projection.train is {self.train!r}; use true or false")
        if not 1 <= self.messages <= messages:
            raise ValueError(f"projection.messages must be between 1 and {messages}, not {self.messages}")
        if self.readings < 1:
            raise ValueError(f"projection.readings must be at least 1, not {self.readings}")
        if self.folds != 0 and (isinstance(self.folds, bool) or not isinstance(self.folds, int) or self.folds < 2):
            raise ValueError(f"projection.folds must be 0 or a whole number from 2, not {self.folds!r}")
        if self.folds and (self.train or self.start != "fitted"):
            raise ValueError("projection.folds are for maps that are fitted and stay so; leave out projection.train and projection.start")
        if self.folds and conditioning != "projected":
            raise ValueError(f"projection.folds go with the conditioning 'projected', not {conditioning!r}")
        if isinstance(self.texts, bool) or not isinstance(self.texts, int) or self.texts < 0:
            raise ValueError(f"projection.texts must be a whole number from 0, not {self.texts!r}")
        if self.texts and (conditioning != "projected" or self.start != "fitted"):
            raise ValueError("projection.texts are for maps that are fitted, of the conditioning 'projected'")
        if conditioning != "projected" and (self.train or self.start != "fitted"):
            raise ValueError(f"projection.start and projection.train go with the conditioning 'projected', not {conditioning!r}")
        return self


class CrossFitted(Projection):
    """The maps of all controls, which the decoder keeps, with those that training reads its controls through.

    folds    maps made without the controls of one fold each
    fold_of  {control id: its fold}; anything else is read through the maps of all
    """

    def __init__(self, projection: Projection, folds: Sequence[Projection], fold_of: dict[str, int]):
        super().__init__(projection.maps, projection.opening)
        self.folds, self.fold_of = list(folds), fold_of

    def without(self, name: str) -> Projection:
        """The maps for an example of the control `name`."""
        return self.folds[self.fold_of[name]] if name in self.fold_of else self

    def save_folds(self, folder: str | Path) -> None:
        """For a run that goes on later; they are no part of a decoder."""
        for n, fold in enumerate(self.folds):
            Path(folder, FOLDS, str(n)).mkdir(parents=True, exist_ok=True)
            fold.save(Path(folder, FOLDS, str(n)))

    @staticmethod
    def load_folds(folder: str | Path, config: DecoderConfig, width: int, n: int) -> list[Projection] | None:
        """What `save_folds` wrote; None unless all n are there."""
        places = [Path(folder, FOLDS, str(i)) for i in range(n)]
        if not all((place / PROJECTION).is_file() for place in places):
            return None
        return [Projection.load(place, config.maps, width) for place in places]


def assign_folds(controls: Sequence[Control], n: int) -> dict[str, int]:
    """{control id: its fold, 0 to n - 1}; controls that resemble each other share one, as they share a split."""
    clusters = cluster_of(controls)
    order = sorted(set(clusters.values()))
    random.Random("folds").shuffle(order)
    fold = {cluster: i % n for i, cluster in enumerate(order)}
    return {c.id: fold[clusters[c.id]] for c in controls}


def identity(blocks: Sequence[Layer], width: int) -> Projection:
    """The maps that change nothing; of merged layers, the mean."""
    eyes = {k: torch.eye(width).repeat(1, len(layer_list(k))) / len(layer_list(k)) for k in blocks}
    return Projection({k: (eye, torch.zeros(width)) for k, eye in eyes.items()})


def fit_centre(base: Base, config: DecoderConfig, examples: Sequence[dict]) -> Projection:
    """Minus the mean activation of each read layer, over all tokens that the spans of `examples` (train.data) select."""
    readings = []
    for example in examples:
        rendered = render(base.tokenizer, example["chat"])
        readings.append((rendered.ids, resolve_span(example["span"], rendered)))
    sums = {k: torch.zeros(base.hidden_size, dtype=torch.float64) for k in config.read_layers}
    for part in by_length(readings, lambda r: len(r[0])):
        acts = capture_rows(base, [ids for ids, _ in part], config.read_layers)
        for k in sums:
            sums[k] += sum(acts[k][i, span].double().sum(0) for i, (_, span) in enumerate(part))
    n = sum(len(span) for _, span in readings)
    return Projection({k: (None, (-total / n).float()) for k, total in sums.items()})


def fit_projection(
    base: Base, config: DecoderConfig, controls: tuple[Control, ...], how: ProjectionConfig, seed: int, shuffled: bool = False
) -> Projection:
    """The maps of `config.maps` for `controls`, CrossFitted if `how.folds`; the same arguments give the same maps.
    Raises LqaError for too little data.

    shuffled   every control's readings are to predict the text of one far from it: the maps of a fake (mixture.shuffled_activations)
    """
    rng, messages = random.Random(seed), load_messages("train")
    readings = [
        _Observed.of(base, control_chat(control, "system", message), which)
        for which, control in enumerate(controls)
        for message in rng.sample(messages, how.messages)
    ]
    if sum(len(r.span) for r in readings) <= base.hidden_size:
        raise LqaError(f"{len(controls)} controls are too few to fit a projection of width {base.hidden_size}.")
    texts, owners = [c.control for c in controls], list(range(len(controls)))
    for which, control in enumerate(controls) if how.texts else ():
        said = list(dict.fromkeys([*control.descriptions, *(pair.answer for pair in control.qa)]))
        own = rng.sample(said, min(how.texts, len(said)))
        chats = [control_chat(replace(control, control=text), "system", messages[0]) for text in own]
        readings += [_Observed.of(base, chat, len(texts) + i).opening_alone() for i, chat in enumerate(chats)]
        texts, owners = texts + own, owners + [which] * len(own)
    wanted = write_layer_means(base, config, texts)
    if shuffled:
        far = wanted[: len(controls)].roll(len(controls) // 2, 0)  # far off: neighbours in the corpus are alike
        wanted = far[torch.tensor(owners)]
    centre = wanted[: len(controls)].mean(0)
    fold_of = assign_folds(controls, how.folds) if how.folds else {}
    folds = [fold_of.get(controls[owner].id, 0) for owner in owners]
    d, kinds = base.hidden_size, (False, True) if how.texts else (False,)  # maps of the opening, or of all else
    sums = {
        (k, kind): [_Sums.zeros(d * len(layer_list(k)), d) for _ in range(how.folds or 1)] for k in config.maps for kind in kinds
    }
    references = {}  # each message alone: once for all texts that are read with it
    for part in by_length(list(dict.fromkeys(r.alone for r in readings)), len):
        acts = capture_rows(base, [list(ids) for ids in part], config.read_layers)
        references |= {ids: {j: h[i, : len(ids)] for j, h in acts.items()} for i, ids in enumerate(part)}
    for part in by_length(readings, lambda r: len(r.ids)):
        acts = capture_rows(base, [r.ids for r in part], config.read_layers)
        changes = {j: torch.cat([h[i, r.span] - references[r.alone][j][r.places] for i, r in enumerate(part)]) for j, h in acts.items()}
        of = torch.tensor([r.which for r in part for _ in r.span])
        fold, opening = torch.tensor(folds)[of], torch.tensor([own for r in part for own in r.opening])
        for (k, kind), own in sums.items():
            x, y = torch.cat([changes[j] for j in layer_list(k)], 1).double(), wanted[of] - centre
            for n, total in enumerate(own):
                rows = (fold == n) & (opening == kind) if how.texts else fold == n
                total.add(x[rows], y[rows])
    whole = {key: _Sums.total(own) for key, own in sums.items()}

    def solved(found: dict[tuple[Layer, bool], _Sums]) -> Projection:
        maps = {key: total.solve(how, centre) for key, total in found.items()}
        return Projection(*({k: maps[k, kind] for k in config.maps} for kind in kinds))

    if not how.folds:
        return solved(whole)
    others = [solved({key: whole[key].less(own[n]) for key, own in sums.items()}) for n in range(how.folds)]
    return CrossFitted(solved(whole), others, fold_of)


class _Observed(NamedTuple):
    """A reading behind a hidden text: the target's tokens with its span, those of its reference, and the number of the text."""

    ids: list[int]
    span: list[int]
    alone: tuple[int, ...]
    places: list[int]
    opening: list[bool]
    which: int

    @classmethod
    def of(cls, base: Base, chat: list[dict[str, str]], which: int) -> _Observed:
        rendered = render(base.tokenizer, chat)
        span = resolve_span("turn:-1", rendered)
        found = reference(base.tokenizer, rendered, span)
        return cls(rendered.ids, [span[n] for n in found.which], tuple(found.rendered.ids), found.places, found.opening, which)

    def opening_alone(self) -> _Observed:
        """Without what comes behind the opening, which a causal model does not see there."""
        n = sum(self.opening)
        if not n:
            raise LqaError("This model's template puts no header between a system turn and what follows; set projection.texts to 0.")
        ids, alone = self.ids[: self.span[n - 1] + 1], self.alone[: self.places[n - 1] + 1]
        return _Observed(ids, self.span[:n], alone, self.places[:n], self.opening[:n], self.which)


@dataclass
class _Sums:
    """What a regression from x (E,) to y (D,) needs of the data."""

    n: int
    x: Tensor  # (E,)
    y: Tensor  # (D,)
    xx: Tensor  # (E, E)
    xy: Tensor  # (E, D)

    @classmethod
    def zeros(cls, e: int, d: int) -> _Sums:
        return cls(0, *(torch.zeros(size, dtype=torch.float64) for size in ((e,), (d,), (e, e), (e, d))))

    def _parts(self):
        return (self.n, self.x, self.y, self.xx, self.xy)

    @classmethod
    def total(cls, sums: Sequence[_Sums]) -> _Sums:
        return cls(*(sum(parts) for parts in zip(*(s._parts() for s in sums), strict=True)))

    def less(self, other: _Sums) -> _Sums:
        return _Sums(*(a - b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x (N, E) with their targets y (N, D)."""
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def solve(self, how: ProjectionConfig, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (D, E) and bias (D,) of a map to y + centre."""
        mean = self.x / self.n
        covariance = self.xx / self.n - mean.outer(mean)
        spread = covariance.diagonal().clamp_min(1e-12).sqrt()
        cross = (self.xy / self.n - mean.outer(self.y / self.n)) / spread[:, None]
        correlation = covariance / spread.outer(spread)
        solved = torch.linalg.solve(correlation + how.ridge * torch.eye(len(mean), dtype=torch.float64), cross)
        weight = how.scale * (solved / spread[:, None]).T
        return weight.float(), (centre - weight @ mean).float()
