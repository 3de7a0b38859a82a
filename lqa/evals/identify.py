"""The suite `identify` (DESIGN section 9): of m candidate controls of one kind, does the true one's answer score highest?

So that nothing but the activations can tell: all m readings of a draw have the same visible message, all candidates are of one kind and are
asked one generic question, every control is the truth exactly once, and an answer's score is its log-probability minus
its mean over the draw's readings, which cancels how likely the sentence is by itself.  Chance is 1/m, and `none` must give it.

    fixed   every control read under the same message
    own     every control read under the message written for it; `text_only` is the reference there
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lqa.corpus import load_questions
from lqa.decoder import LatentDecoder, Reading
from lqa.errors import LqaError
from lqa.evals.statistics import bootstrap
from lqa.grounding import text_only_scores

# The committed choices of this suite.
FIXED_MESSAGE = "Hello! Can you help me plan my weekend?"
QUESTIONS = {kind: questions["description"][0] for kind, questions in load_questions().items()}  # one generic question per kind
SPAN = "turn:-1"  # the user's turn with the generation header
SEED = 0


class Item(NamedTuple):
    """A control to identify: its label, kind, system prompt, own message, and the first (descriptive) answer about it."""

    label: str
    kind: str
    system: str
    message: str
    answer: str


@dataclass(frozen=True)
class Draw:
    """One question put to m candidates: `scores[i][j]` is the log-probability of candidate j's answer under reading i.

    The first `counted` readings count; the others fill up a last draw, and have counted in an earlier one.
    """

    labels: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    counted: int

    def hits(self) -> list[float]:
        """For every counted reading, 1 if its own answer has the highest centred score; a tie counts as the share of a blind pick."""
        s = torch.tensor(self.scores, dtype=torch.float64)
        centred = s - s.mean(0, keepdim=True)
        # Equal up to rounding is equal: with `none` all readings are one, and rounding must not decide.
        best = centred >= centred.max(1, keepdim=True).values - 1e-6
        return [best[i, i].item() / best[i].sum().item() for i in range(self.counted)]


def make_draws(items: Sequence[Item], m: int, seed: int) -> list[tuple[list[Item], int]]:
    """Draws of m items of one kind with m different answers, seeded, and how many of each count: every item counts in exactly one draw.

    The last draws of a kind are filled up with items that have counted before.  Kinds with fewer than m answers are left out.
    """
    rng, draws = random.Random(seed), []
    for kind in sorted({item.kind for item in items}):
        pool = [item for item in items if item.kind == kind]
        if len({item.answer for item in pool}) < m:
            continue
        everything = list(pool)
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
            draws.append((draw, counted))
    if not draws:
        raise LqaError(f"There are too few items for draws of {m}; raise --limit or give more data.")
    return draws


def score_draw(decoder: LatentDecoder, draw: Sequence[Item], counted: int, message: str | None, layer: int | None) -> dict[str, Draw]:
    """{"ours", "none", "shuffled"}: the draw's score matrices.  `message` None: each control's own, and "text_only" besides.

    `shuffled`: the next reading of the draw stands in for the right one, so that its hits are those of a stranger's activations.
    """
    question = QUESTIONS[draw[0].kind]
    answers = [item.answer for item in draw]
    readings = [_read(decoder, item, message, layer) for item in draw]
    ours = tuple(tuple(reading.logprobs(question, answers)) for reading in readings)
    # Unpatched prompts differ in their number of slots only.
    lengths = {len(reading.span): reading for reading in readings}
    unpatched = {n: tuple(reading.logprobs(question, answers, "none")) for n, reading in lengths.items()}
    none = tuple(unpatched[len(reading.span)] for reading in readings)
    labels = tuple(item.label for item in draw)
    rows = {"ours": ours, "none": none, "shuffled": ours[1:] + ours[:1]}
    if message is None:  # the visible text differs only then
        rows["text_only"] = tuple(tuple(text_only_scores(reading, question, answers)) for reading in readings)
    return {name: Draw(labels, scores, counted) for name, scores in rows.items()}


def _read(decoder: LatentDecoder, item: Item, message: str | None, layer: int | None) -> Reading:
    user = message if message is not None else item.message
    return decoder.read([{"role": "system", "content": item.system}, {"role": "user", "content": user}], SPAN, layer)


def identify(
    decoder: LatentDecoder,
    items: Sequence[Item],
    *,
    m: int = 8,
    message: str | None = FIXED_MESSAGE,
    layer: int | None = None,
    seed: int = SEED,
    progress: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict:
    """Accuracies with bootstrap intervals, for the fixed message, or for each control's own (`message` None, with `text_only`)."""
    draws = make_draws(items, m, seed)
    results: dict[str, list[Draw]] = {}
    for n, (draw, counted) in enumerate(draws, start=1):
        for name, result in score_draw(decoder, draw, counted, message, layer).items():
            results.setdefault(name, []).append(result)
        progress(f"identify ({'own' if message is None else 'fixed'} message): draw {n} of {len(draws)}")
    table = {}
    for name, scored in results.items():
        mean, low, high = bootstrap([draw.hits() for draw in scored], seed=seed)
        gaps = [draw.scores[i][i] - sum(row[i] for row in draw.scores) / m for draw in scored for i in range(draw.counted)]
        table[name] = {"accuracy": mean, "low": low, "high": high, "n": len(gaps), "gap": sum(gaps) / len(gaps)}
    return {
        "m": m,
        "chance": 1 / m,
        "message": message,
        "layer": decoder.config.check_layer(layer),
        "seed": seed,
        "draws": len(draws),
        "left_out": dict(Counter(i.kind for i in items) - Counter(i.kind for draw, counted in draws for i in draw[:counted])),
        "table": table,
        "items": [
            {"labels": d.labels, "hits": d.hits(), "scores": [[round(x, 4) for x in row] for row in d.scores]} for d in results["ours"]
        ],
    }
