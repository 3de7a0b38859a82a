"""The suite `identify` (DESIGN section 9): of m candidate controls of one kind, does the true one's answer score highest?

So that nothing but the activations can tell: all m readings of a draw have the same visible message, all candidates are of one kind and are
asked one generic question, every control is the truth exactly once, and an answer's score is its log-probability minus
its mean over the draw's readings, which cancels how likely the sentence is by itself.  Chance is 1/m, and `none` must give it.

    fixed   every control read under the same message
    own     every control read under the message written for it; `text_only` is the reference there
    hard    as `fixed`, but the candidates are the control and its contrast partners, or where these are not known, controls of one category
    sweep   as `fixed`, by read form, span and layer
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lqa.activations import Layer, layer_name
from lqa.chat import render, resolve_span
from lqa.corpus.readings import FORMS, control_chat
from lqa.decoder import LatentDecoder, Reading
from lqa.errors import LqaError
from lqa.evals import batch
from lqa.evals.data import QUESTIONS, Item, forms_of, items_of
from lqa.evals.suite import Job, Plot, Result, Table, cell

# The committed choices of this suite.
FIXED_MESSAGE = "Hello! Can you help me plan my weekend?"
M = 8
SPANS = ("all", "last 1", "last 4", "first 10")  # of the visible tokens
TITLES = {
    "fixed": "Every control under the same message",
    "own": "Each control under its own message",
    "hard": "The same message, candidates that are near-neighbours",
}
READERS = ("ours", "none", "shuffled", "text_only", "text_only_trained")
COLUMNS = {"accuracy": "%", "gap (nats a token)": ""}

Scores = list[list[float]]  # [i][j]: the log-probability of candidate j's answer under reading i


class Draw(NamedTuple):
    """Candidates of one kind with different answers.  The first `counted` are the truth once; the others fill up."""

    items: tuple[Item, ...]
    counted: int

    @property
    def labels(self) -> list[str]:
        return [item.label for item in self.items]


@dataclass(frozen=True)
class Setting:
    """How the controls of a table are read."""

    layer: Layer
    form: str = "system"
    message: str = "fixed"  # or "own"
    span: str = "all"

    def chat(self, item: Item) -> list[dict[str, str]]:
        own = self.message == "own" or self.form == "stimulus_completion"  # a reply belongs to its message
        return control_chat(item, self.form, item.message if own else FIXED_MESSAGE, item.reply or None)

    def tokens(self, decoder: LatentDecoder, chat) -> str | list[int]:
        """The span in this chat: of what the read form shows, all or some tokens."""
        if self.span == "all":
            return FORMS[self.form]
        tokens = resolve_span(FORMS[self.form], render(decoder.base.tokenizer, chat))
        side, n = self.span.split()
        return tokens[-int(n) :] if side == "last" else tokens[: int(n)]


def centred(scores: Scores) -> torch.Tensor:
    """Scores minus their mean over the readings: how likely a sentence is by itself does not count."""
    s = torch.tensor(scores, dtype=torch.float64)
    return s - s.mean(0, keepdim=True)


def best(scores: Scores) -> torch.Tensor:
    """(m, m) bool: the candidates that score highest under each reading.

    Equal up to rounding is equal: with `none` all readings are one, and rounding must not decide.
    """
    c = centred(scores)
    return c >= c.max(1, keepdim=True).values - 1e-6


def hits(scores: Scores, counted: int) -> list[float]:
    """For every counted reading, 1 if its own answer has the highest centred score; a tie counts as the share of a blind pick."""
    top = best(scores)
    return [top[i, i].item() / top[i].sum().item() for i in range(counted)]


# --- draws ------------------------------------------------------------------------------------------------------


def _draws(pool: Sequence[Item], m: int, rng: random.Random) -> list[Draw]:
    """Draws of m items with m different answers; every item counts in exactly one, and the last ones are filled up with items that have
    counted before."""
    pool, everything, draws = list(pool), list(pool), []
    rng.shuffle(pool)
    while pool:
        draw: list[Item] = []
        for item in list(pool):
            if len(draw) < m and item.answer not in {d.answer for d in draw}:
                draw.append(item)
                pool.remove(item)
        counted = len(draw)
        for item in rng.sample(everything, len(everything)):
            if len(draw) < m and item.answer not in {d.answer for d in draw}:
                draw.append(item)
        draws.append(Draw(tuple(draw), counted))
    return draws


def make_draws(items: Sequence[Item], m: int, seed: int) -> list[Draw]:
    """Seeded draws of m items of one kind.  Kinds with fewer than m answers are left out; raises LqaError if that is all of them."""
    rng, draws = random.Random(seed), []
    for kind in sorted({item.kind for item in items}):
        pool = [item for item in items if item.kind == kind]
        if len({item.answer for item in pool}) >= m:
            draws += _draws(pool, m, rng)
    if not draws:
        raise LqaError(f"There are too few items for draws of {m}; raise --limit or give more data.")
    return draws


def make_hard_draws(items: Sequence[Item], everything: Sequence[Item], m: int, seed: int) -> list[Draw]:
    """Draws whose candidates are near-neighbours: each item with its contrast partners among `everything`; where no item names any, items
    of one category, at most m.  An item without a neighbour is left out."""
    rng, draws = random.Random(seed), []
    if not any(item.contrast for item in items):
        for category in sorted({item.category for item in items}):
            pool = [item for item in items if item.category == category]
            if (answers := len({item.answer for item in pool})) > 1:
                draws += _draws(pool, min(m, answers), rng)
        return draws
    by_label = {item.label: item for item in everything}
    neighbours: dict[frozenset[str], list[Item]] = {}  # items with the same candidates share their readings
    for item in items:
        candidates = {item.answer: item}
        for partner in (by_label.get(label) for label in item.contrast):
            if partner and partner.kind == item.kind:
                candidates.setdefault(partner.answer, partner)
        if len(candidates) > 1:
            neighbours.setdefault(frozenset(c.label for c in candidates.values()), []).append(item)
    for labels, counted in neighbours.items():
        others = [by_label[label] for label in sorted(labels - {item.label for item in counted})]
        draws.append(Draw((*counted, *others), len(counted)))
    return draws


# --- scores -----------------------------------------------------------------------------------------------------


def score_draw(job: Job, draw: Draw, setting: Setting, decoder: LatentDecoder | None = None) -> dict[str, Scores]:
    """The draw's scores by reader: ours, none, text_only, and text_only_trained if there is one; of another `decoder`, its own alone."""
    question, answers, n = QUESTIONS[draw.items[0].kind], [item.answer for item in draw.items], len(draw.items)

    def read(decoder: LatentDecoder | None) -> list[Reading]:
        return [_read(job, item, setting, decoder) for item in draw.items]

    def matrix(runner: batch.Runner, prompts: list[batch.Prompt]) -> Scores:
        return batch.matrix(runner, prompts, answers)

    readings = read(decoder)
    ours = [batch.ask(reading, question) for reading in readings]
    if decoder is not None:
        return {"ours": matrix(batch.adapted(decoder), ours)}
    both = matrix(batch.adapted(job.decoder), ours + [batch.ask(reading, question, "none") for reading in readings])
    text_only = [batch.text_only(reading, question) for reading in readings]
    scores = {"ours": both[:n], "none": both[n:], "text_only": matrix(batch.bare(job.decoder), text_only)}
    if (trained := job.text_only_trained) is not None:
        scores["text_only_trained"] = matrix(batch.adapted(trained), [batch.ask(reading, question) for reading in read(trained)])
    return scores


def filed(draw: Draw, setting: Setting, other: str = "ours") -> str:
    """The key of a draw's scores in the journal."""
    return "/".join([*map(str, asdict(setting).values()), other, " ".join(draw.labels)])


def _read(job: Job, item: Item, setting: Setting, decoder: LatentDecoder | None = None) -> Reading:
    chat = setting.chat(item)
    layer = setting.layer if decoder is None or decoder.config.reads(setting.layer) else None
    return job.read(chat, setting.tokens(decoder or job.decoder, chat), layer, decoder)


# --- the suite --------------------------------------------------------------------------------------------------


def check(folder: Path | None) -> None:
    """Raises LqaError if the data cannot be had."""
    items_of(folder)


def run(job: Job) -> Result:
    """Tables `fixed`, `own` and `hard`, the confusion of categories, and with `job.sweep` tables and curves by form, span and layer."""
    everything, data = items_of(job.data)
    items = job.limited(everything)
    main = Setting(layer_name(job.decoder.config.check_layers(None)))
    draws = make_draws(items, M, job.seed)
    work = {"fixed": (main, draws, "")}  # what is scored: (setting, draws, other decoder's name or "")
    work |= {f"fixed/{name}": (main, draws, name) for name in job.rows}
    work |= {"own": (replace(main, message="own"), draws, ""), "hard": (main, make_hard_draws(items, everything, M, job.seed), "")}
    few: list[str] = []
    if job.sweep:
        for form in forms_of(job.data):
            of_form = items if form == "system" else job.limited(items_of(job.data, form)[0])
            try:
                work[f"sweep-form/{form}"] = (replace(main, form=form), make_draws(of_form, M, job.seed), "")
            except LqaError:  # too few items of this form; those of `system` suffice
                few.append(form)
        work |= {f"sweep-span/{span}": (replace(main, span=span), draws, "") for span in SPANS}
        layers = map(layer_name, sorted(job.decoder.config.readings))
        work |= {f"sweep-layer/{layer}": (replace(main, layer=layer), draws, "") for layer in layers}

    total, done, found = sum(len(drawn) for _, drawn, _ in work.values()), 0, {name: [] for name in work}
    for name, (setting, drawn, other) in work.items():
        for draw in drawn:
            make = partial(score_draw, job, draw, setting, job.rows[other] if other else None)
            found[name].append(job.once(filed(draw, setting, other or "ours"), make))
            done += 1
            job.progress(done, total, name)

    tables, entries = {}, []
    for name, title in TITLES.items():
        drawn, readers = work[name][1], _by_reader(found[name])
        if not drawn:
            continue
        for other in job.rows if name == "fixed" else ():
            readers[other] = [scores["ours"] for scores in found[f"fixed/{other}"]]
        rows = {reader: _cells(drawn, scores) for reader, scores in readers.items()}
        tables[name] = Table(title, COLUMNS, rows, _note(items, drawn, main))
        entries += [_entry(name, draw, scores) for draw, scores in zip(drawn, found[name], strict=True)]
    plots = [_confusion(draws, found["fixed"])]
    for by in ("form", "span", "layer") if job.sweep else ():
        parts = {name.partition("/")[2]: (work[name][1], found[name]) for name in work if name.startswith(f"sweep-{by}/")}
        tables[f"sweep-{by}"], plot = _sweep(by, parts, main, few)
        plots.append(plot)
    settings = {"m": M, "message": FIXED_MESSAGE, "layer": main.layer, "seed": job.seed, "questions": QUESTIONS, "chance": 1 / M}
    return Result(data | {"items": str(len(items))}, tables, entries, plots, settings)


def fixed(job: Job, items: Sequence[Item]) -> Table:
    """The table `fixed` alone, of any items (a sweep's: those of the validation split)."""
    setting = Setting(layer_name(job.decoder.config.check_layers(None)))
    draws, found = make_draws(items, M, job.seed), []
    for draw in draws:
        found.append(job.once(filed(draw, setting), partial(score_draw, job, draw, setting)))
        job.progress(len(found), len(draws), "fixed")
    rows = {reader: _cells(draws, scores) for reader, scores in _by_reader(found).items()}
    return Table(TITLES["fixed"], COLUMNS, rows, _note(items, draws, setting))


def _by_reader(found: list[dict[str, Scores]]) -> dict[str, list[Scores]]:
    """{reader: the scores of all draws}, with `shuffled`: the next reading of the draw stands in for the right one, so that its hits are
    those of a stranger's activations."""
    readers = {reader: [scores[reader] for scores in found] for reader in (found[0] if found else ())}
    readers["shuffled"] = [ours[1:] + ours[:1] for ours in readers.get("ours", [])]
    return {reader: readers[reader] for reader in READERS if reader in readers}


def _cells(draws: list[Draw], scores: list[Scores]) -> list:
    """Accuracy, and by how much the own reading makes the true answer likelier than the draw's readings do on average."""
    gaps = [[centred(s)[i, i].item() for i in range(draw.counted)] for draw, s in zip(draws, scores, strict=True)]
    return [cell([hits(s, draw.counted) for draw, s in zip(draws, scores, strict=True)]), cell(gaps)]


def _chance(draws: list[Draw]) -> float:
    return sum(draw.counted / len(draw.items) for draw in draws) / sum(draw.counted for draw in draws)


def _note(items: list[Item], draws: list[Draw], setting: Setting) -> str:
    sizes = sorted({len(draw.items) for draw in draws})
    m = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    left = Counter(i.kind for i in items) - Counter(i.kind for draw in draws for i in draw.items[: draw.counted])
    rest = f" Left out, having too few such candidates: {', '.join(f'{n} of kind {kind}' for kind, n in left.items())}." if left else ""
    return f"{m} candidates of one kind, layer {setting.layer}; chance {_chance(draws):.1%}.{rest}"


def _confusion(draws: list[Draw], found: list[dict[str, Scores]]) -> Plot:
    """For each category of the truth, the shares of the categories that are picked."""
    picks: dict[str, Counter] = {}
    for draw, scores in zip(draws, found, strict=True):
        top = best(scores["ours"])
        for i in range(draw.counted):
            for j in top[i].nonzero().flatten().tolist():
                picks.setdefault(draw.items[i].category, Counter())[draw.items[j].category] += 1 / top[i].sum().item()
    names = sorted(set(picks) | {name for counter in picks.values() for name in counter})
    rows = [name for name in names if name in picks]
    values = [[round(picks[row][name] / picks[row].total(), 4) for name in names] for row in rows]
    title = "Which category is picked, the same message for all"
    return Plot("confusion", title, "matrix", {"": {"x": names, "y": rows, "values": values}}, "picked", "true")


def _sweep(by: str, parts: dict[str, tuple[list[Draw], list[dict[str, Scores]]]], main: Setting, few: list[str]) -> tuple[Table, Plot]:
    """Accuracy of every reader, for each part (a form, span or layer).  `few`: forms left out."""
    cells = {
        part: {reader: _cells(draws, scores)[0] for reader, scores in _by_reader(found).items()} for part, (draws, found) in parts.items()
    }
    readers = list(next(iter(cells.values())))
    title = f"Accuracy by {'read form' if by == 'form' else 'read layer' if by == 'layer' else 'span'}, the same message for all"
    left = f" Left out, having too few items: {', '.join(few)}." if few else ""
    note = {
        "form": f"Layer {main.layer}; a stimulus_completion has its own message and reply.{left}",
        "span": f"Layer {main.layer}; of the visible tokens.",
        "layer": "",
    }
    rows = {part: [row[reader] for reader in readers] for part, row in cells.items()}
    x = [int(part) if part.isdecimal() else part for part in cells]
    series = {}
    for reader in readers:
        column = [row[reader] for row in cells.values()]
        series[reader] = {"x": x, "y": [c.mean for c in column], "low": [c.low for c in column], "high": [c.high for c in column]}
    table = Table(title, dict.fromkeys(readers, "%"), rows, f"{M} candidates of one kind; chance {1 / M:.1%}. {note[by]}".strip())
    return table, Plot(f"{by}s", title, "lines", series, f"read {by}" if by != "span" else by, "accuracy")


def _entry(name: str, draw: Draw, scores: dict[str, Scores]) -> dict:
    every = {reader: [round(h, 4) for h in hits(s[0], draw.counted)] for reader, s in _by_reader([scores]).items()}
    return {"table": name, "ids": draw.labels, "hits": every, "scores": [[round(x, 4) for x in row] for row in scores["ours"]]}
