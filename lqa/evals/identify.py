"""The suite `identify` (DESIGN section 9): of m candidate controls of one kind, does the true one's answer score highest?

So that nothing but the activations can tell: all m readings of a draw have the same visible message, all candidates are of one kind and are
asked one generic question, each candidate is the truth exactly once in its draw, and an answer's score is its log-probability minus
its mean over the draw's readings, which cancels how likely the sentence is by itself.  Chance is 1/m, and `none` must give it.

    fixed   every control read under the same message
    own     every control read under the message written for it; `text_only` is the reference there
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lqa.corpus import load_questions
from lqa.decoder import LatentDecoder, Reading
from lqa.errors import LqaError
from lqa.evals.statistics import bootstrap

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
    """One question put to m candidates: `scores[i][j]` is the log-probability of candidate j's answer under reading i."""

    labels: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]

    def hits(self) -> list[float]:
        """For every reading, 1 if its own answer has the highest centred score; ties count as the share of a blind pick among them."""
        s = torch.tensor(self.scores, dtype=torch.float64)
        centred = s - s.mean(0, keepdim=True)
        # Equal up to rounding is equal: with `none` all readings are one, and rounding must not decide.
        best = centred >= centred.max(1, keepdim=True).values - 1e-6
        return [best[i, i].item() / best[i].sum().item() for i in range(len(s))]


def make_draws(items: Sequence[Item], m: int, seed: int) -> list[list[Item]]:
    """Draws of m items of one kind with m different answers, seeded.  Every item is in one draw; what is left over is filled up again."""
    rng, draws = random.Random(seed), []
    for kind in sorted({item.kind for item in items}):
        pool = [item for item in items if item.kind == kind]
        if len({item.answer for item in pool}) < m:
            continue
        rng.shuffle(pool)
        while pool:
            draw: list[Item] = []
            for source in (pool, rng.sample([i for i in items if i.kind == kind], sum(i.kind == kind for i in items))):
                for item in list(source):
                    if len(draw) < m and item.answer not in {d.answer for d in draw}:
                        draw.append(item)
                        if source is pool:
                            pool.remove(item)
            draws.append(draw)
    if not draws:
        raise LqaError(f"There are too few items for draws of {m}; raise --limit or give more data.")
    return draws


def score_draw(decoder: LatentDecoder, draw: Sequence[Item], message: str | None, layer: int | None) -> dict[str, Draw]:
    """{"ours", "none", "shuffled"}: the draw's score matrices.  `message` None: each control's own.

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
    return {"ours": Draw(labels, ours), "none": Draw(labels, none), "shuffled": Draw(labels, ours[1:] + ours[:1])}


def _read(decoder: LatentDecoder, item: Item, message: str | None, layer: int | None) -> Reading:
    user = message if message is not None else item.message
    return decoder.read([{"role": "system", "content": item.system}, {"role": "user", "content": user}], SPAN, layer)


def text_only_draw(decoder: LatentDecoder, draw: Sequence[Item], layer: int | None) -> Draw:
    """The bare model's scores from each control's own message as text."""
    from lqa.grounding import text_only_scores

    question, answers = QUESTIONS[draw[0].kind], [item.answer for item in draw]
    rows = [tuple(text_only_scores(_read(decoder, item, None, layer), question, answers)) for item in draw]
    return Draw(tuple(item.label for item in draw), tuple(rows))


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
    for n, draw in enumerate(draws, start=1):
        scored = score_draw(decoder, draw, message, layer)
        if message is None:
            scored["text_only"] = text_only_draw(decoder, draw, layer)
        for name, result in scored.items():
            results.setdefault(name, []).append(result)
        progress(f"identify ({'own' if message is None else 'fixed'} message): draw {n} of {len(draws)}")
    table = {}
    for name, scored in results.items():
        hits = [h for draw in scored for h in draw.hits()]
        mean, low, high = bootstrap(hits, seed=seed)
        gaps = [draw.scores[i][i] - sum(row[i] for row in draw.scores) / m for draw in scored for i in range(m)]
        table[name] = {"accuracy": mean, "low": low, "high": high, "n": len(hits), "gap": sum(gaps) / len(gaps)}
    return {
        "m": m,
        "chance": 1 / m,
        "message": message,
        "layer": decoder.config.check_layer(layer),
        "seed": seed,
        "draws": len(draws),
        "table": table,
        "items": [
            {"labels": d.labels, "hits": d.hits(), "scores": [[round(x, 4) for x in row] for row in d.scores]} for d in results["ours"]
        ],
    }
