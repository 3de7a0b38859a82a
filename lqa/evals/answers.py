"""Free answers and likelihoods of many readings at once: what `Reading` does for one, in batches of rows.

Readings of equal length share a batch, and a prompt that several rows continue runs once: under the fixed message all readings of a
suite fall together.  The answers are those of `Reading.ask`, up to float rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lqa import engine
from lqa.chat import render
from lqa.decoder import LatentDecoder, Reading
from lqa.evals.suite import Job
from lqa.grounding import map_linearly, text_only_chat
from lqa.injection import Injection

WIDTH = 32  # rows of one batch
LEAST = 1e-30  # probabilities below it are rounding


class Ask(NamedTuple):
    """A question put to the decoder over `slots` slots that hold `injected` (slots, D), or are not patched (None)."""

    question: str
    layer: int
    slots: int
    injected: Tensor | None


class Said(NamedTuple):
    """A decoded answer; `probability`: mean over its tokens; `logprob`: mean log-probability (nats).  0 and log(LEAST) for no tokens."""

    text: str
    probability: float
    logprob: float


def ask_true(reading: Reading, question: str) -> Ask:
    return Ask(question, reading.layer, len(reading.span), reading.injected)


def ask_none(reading: Reading, question: str) -> Ask:
    """The reference `none`: the same slots, not patched."""
    return Ask(question, reading.layer, len(reading.span), None)


def ask_shuffled(reading: Reading, donor: Reading, question: str) -> Ask:
    """The reference `shuffled`: a donor's activations, mapped linearly onto the reading's slots."""
    n = len(reading.span)
    return Ask(question, reading.layer, n, donor.injected if len(donor.span) == n else map_linearly(donor.injected, n))


def say(
    decoder: LatentDecoder, asks: Sequence[Ask], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0, width: int = WIDTH
) -> list[Said]:
    """The answers to all `asks`: greedy, or sampled with `seed`."""
    tokenizer, prompt = decoder.base.tokenizer, decoder.config.prompt
    stop = prompt.stop_ids(tokenizer)

    def decode(prefix: engine.Prefix, rows: list[engine.Row], number: int) -> list[Said]:
        choose = engine.sampler(temperature, 1.0, seed * 1_000_003 + number)
        return _collect(decoder, engine.decode(decoder.session, prefix, rows, max_new_tokens, stop, choose), len(rows))

    # Greedy, what is the same to the model is decoded once; samples differ.
    alike = {} if temperature else {_same(ask): ask for ask in asks}
    if len(alike) in (0, len(asks)):
        return _batched(decoder, asks, width, decode)
    said = dict(zip(alike, _batched(decoder, list(alike.values()), width, decode), strict=True))
    return [said[_same(ask)] for ask in asks]


def likelihoods(decoder: LatentDecoder, asks: Sequence[Ask], answers: Sequence[str], *, width: int = 2 * WIDTH) -> list[float]:
    """For every ask the mean log-probability per token (nats, end of turn included) of the answer beside it."""
    tokenizer, prompt = decoder.base.tokenizer, decoder.config.prompt
    keys = [(_same(ask), text) for ask, text in zip(asks, answers, strict=True)]
    alike = dict(zip(keys, asks, strict=True))
    distinct = list(alike.values())
    texts = [text for _, text in alike]
    in_order = iter([prompt.answer(tokenizer, texts[i]) for i in _order(distinct)])

    def score(prefix: engine.Prefix, rows: list[engine.Row], number: int) -> list[float]:
        return engine.score(decoder.session, prefix, rows, [next(in_order) for _ in rows])

    found = dict(zip(alike, _batched(decoder, distinct, width, score), strict=True))
    return [found[key] for key in keys]


def say_text_only(decoder: LatentDecoder, readings: Sequence[Reading], questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """The reference `text_only` for each reading and question: the bare model's greedy answers from the visible turns as text."""
    stop = decoder.config.prompt.stop_ids(decoder.base.tokenizer)

    def decode(prefix: engine.Prefix, suffixes: list[list[int]], _) -> list[str]:
        rows = [engine.Row(0, suffix) for suffix in suffixes]
        steps = engine.decode(decoder.base.decoding, prefix, rows, max_new_tokens, stop)
        return [said.text for said in _collect(decoder, steps, len(rows))]

    return _bare(decoder, readings, questions, [""] * len(readings), decode, max_new_tokens)


def score_text_only(decoder: LatentDecoder, readings: Sequence[Reading], questions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """The mean log-probability per token (nats, end included) that the bare model gives each answer, from the visible turns as text."""
    tokenizer, prompt = decoder.base.tokenizer, decoder.config.prompt

    def score(prefix: engine.Prefix, suffixes: list[list[int]], texts: list[str]) -> list[float]:
        rows = [engine.Row(0, suffix) for suffix in suffixes]
        return engine.score(decoder.base.decoding, prefix, rows, [prompt.answer(tokenizer, text) for text in texts])

    return _bare(decoder, readings, questions, answers, score, 0)


def further(job: Job) -> dict[str, LatentDecoder]:
    """The decoders besides the suite's own that get a row: text_only_trained if there is one, and those asked for by name."""
    trained = {"text_only_trained": job.text_only_trained} if job.text_only_trained else {}
    return trained | job.rows


# --- how -----------------------------------------------------------------------------------------------------------


def _same(ask: Ask) -> tuple:
    return ask.question, ask.layer, ask.slots, None if ask.injected is None else id(ask.injected)


def _order(asks: Sequence[Ask]) -> list[int]:
    """Rows in the order of their batches: prompts of one form together, rows of one prompt side by side."""
    first: dict[tuple, int] = {}
    for i, ask in enumerate(asks):
        first.setdefault(_same(ask)[1:], i)
    return sorted(range(len(asks)), key=lambda i: (asks[i].layer, asks[i].slots, first[_same(asks[i])[1:]], i))


def _batched(decoder: LatentDecoder, asks: Sequence[Ask], width: int, run: Callable) -> list:
    """`run(prefix, rows, number)` over batches of at most `width` rows in `_order`; its results in the order of `asks`."""
    tokenizer, prompt = decoder.base.tokenizer, decoder.config.prompt
    order, results, number = _order(asks), {}, 0
    while order:
        form = asks[order[0]].layer, asks[order[0]].slots
        batch = [i for i in order[:width] if (asks[i].layer, asks[i].slots) == form]
        order = order[len(batch) :]
        injected: dict[int | None, Tensor | None] = {}
        rows = []
        for i in batch:
            key = None if asks[i].injected is None else id(asks[i].injected)
            injected.setdefault(key, asks[i].injected)
            rows.append(engine.Row(list(injected).index(key), prompt.question(tokenizer, asks[i].question)))
        results |= zip(batch, run(_prefill(decoder, *form, list(injected.values())), rows, number), strict=True)
        number += 1
    return [results[i] for i in range(len(asks))]


def _prefill(decoder: LatentDecoder, layer: int, n: int, injected: Sequence[Tensor | None]) -> engine.Prefix:
    """The prompts with n slots, one row for each of `injected`, as one batch."""
    base, config = decoder.base, decoder.config
    ids, slots = config.prompt.prefix(base.tokenizer, config.slot_token_id, n, [layer])
    values = [x for x in injected if x is not None]
    if not values:
        with decoder.session() as model:
            return engine.prefill(model, [ids] * len(injected))
    mask = torch.tensor([[s and x is not None for s in slots] for x in injected], device=base.device)
    with decoder.session() as model, Injection(base, config.write_layer, config.operation) as injection:
        with injection.armed(mask, torch.cat(values)):
            return engine.prefill(model, [ids] * len(injected))


def _bare(decoder: LatentDecoder, readings: Sequence[Reading], questions, answers: Sequence[str], run: Callable, new: int) -> list:
    """`run(prefix, suffixes, answers)` of the bare model over what each reading shows as text; what is the same runs once."""
    tokenizer = decoder.base.tokenizer
    keys = [(*render(tokenizer, text_only_chat(r, q)).ids, a) for r, q, a in zip(readings, questions, answers, strict=True)]
    distinct = sorted(set(keys), key=lambda key: (len(key), key[:-1], key[-1]))
    decoder._check_room(len(distinct[-1]) - 1, new)
    found = {}
    for start in range(0, len(distinct), WIDTH):
        part = distinct[start : start + WIDTH]
        common, suffixes = engine.common_prefix([key[:-1] for key in part])
        with decoder.base.decoding() as model:
            prefix = engine.prefill(model, [common])
        found |= zip(part, run(prefix, suffixes, [key[-1] for key in part]), strict=True)
    return [found[key] for key in keys]


def _collect(decoder: LatentDecoder, steps, rows: int) -> list[Said]:
    ids, probabilities = [[] for _ in range(rows)], [[] for _ in range(rows)]
    for step in steps:
        for row, token, probability in step:
            ids[row].append(token)
            probabilities[row].append(probability)
    texts = decoder.base.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def said(text: str, p: list[float]) -> Said:
        if not p:
            return Said("", 0.0, math.log(LEAST))
        return Said(text.strip(), sum(p) / len(p), sum(math.log(max(x, LEAST)) for x in p) / len(p))

    return [said(text, p) for text, p in zip(texts, probabilities, strict=True)]
