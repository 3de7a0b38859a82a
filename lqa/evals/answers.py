"""Free answers and likelihoods of many readings at once: what `Reading` does for one, in batches of rows.

Readings of equal length share a batch, and a prompt that several rows continue runs once: under the fixed message all readings of a
suite fall together.  The answers are those of `Reading.ask`, up to float rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lqa import engine
from lqa.chat import render
from lqa.corpus.readings import FORMS
from lqa.decoder import LatentDecoder, Reading, Said
from lqa.evals.suite import Job
from lqa.grounding import map_linearly, text_only_chat
from lqa.injection import Injection

WIDTH = 32  # rows of one batch


class Ask(NamedTuple):
    """A question, behind a prompt of token ids; of these `slots` hold `injected` (slots, D), or are not patched (None)."""

    question: str
    ids: tuple[int, ...]
    slots: tuple[bool, ...]
    injected: Tensor | None


def ask_true(reading: Reading, question: str) -> Ask:
    """The question asked of the reading."""
    ids, slots = reading._prompt_ids()
    return Ask(question, tuple(ids), tuple(slots), reading.injected if any(slots) else None)


def ask_none(reading: Reading, question: str) -> Ask:
    """The reference `none`: the same slots, not patched."""
    return ask_true(reading, question)._replace(injected=None)


def ask_shuffled(reading: Reading, donor: Reading, question: str) -> Ask:
    """The reference `shuffled`: a donor's activations, mapped linearly onto the reading's slots."""
    n = len(reading.span)
    return ask_true(reading, question)._replace(injected=donor.injected if len(donor.span) == n else map_linearly(donor.injected, n))


def say(
    decoder: LatentDecoder, asks: Sequence[Ask], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0, width: int = WIDTH
) -> list[Said]:
    """The answers to all `asks`: greedy, or sampled with `seed`."""
    stop = decoder.config.prompt.stop_ids(decoder.base.tokenizer)

    def decode(prefix: engine.Prefix, rows: list[engine.Row], number: int) -> list[Said]:
        choose = engine.sampler(temperature, 1.0, seed * 1_000_003 + number)
        return decoder.collect(engine.decode(decoder.session, prefix, rows, max_new_tokens, stop, choose), len(rows))

    if temperature:  # samples of one prompt differ
        return _batched(decoder, asks, width, decode)
    keys = [(ask.question, _prompt(ask)) for ask in asks]
    alike = dict(zip(keys, asks, strict=True))
    said = dict(zip(alike, _batched(decoder, list(alike.values()), width, decode), strict=True))
    return [said[key] for key in keys]


def likelihoods(decoder: LatentDecoder, asks: Sequence[Ask], answers: Sequence[str], *, width: int = 2 * WIDTH) -> list[float]:
    """For every ask the mean log-probability per token (nats, end of turn included) of the answer beside it."""
    tokenizer, prompt = decoder.base.tokenizer, decoder.config.prompt
    keys = [(ask.question, _prompt(ask), text) for ask, text in zip(asks, answers, strict=True)]
    alike = dict(zip(keys, asks, strict=True))
    distinct = list(alike.values())
    texts = [text for _, _, text in alike]
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
        return [said.text for said in decoder.collect(steps, len(rows))]

    return _bare(decoder, readings, questions, [""] * len(readings), decode, max_new_tokens)


def score_text_only(decoder: LatentDecoder, readings: Sequence[Reading], questions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """The mean log-probability per token (nats, end included) that the bare model gives each answer, from the visible turns as text."""
    tokenizer, prompt = decoder.base.tokenizer, decoder.config.prompt

    def score(prefix: engine.Prefix, suffixes: list[list[int]], texts: list[str]) -> list[float]:
        rows = [engine.Row(0, suffix) for suffix in suffixes]
        return engine.score(decoder.base.decoding, prefix, rows, [prompt.answer(tokenizer, text) for text in texts])

    return _bare(decoder, readings, questions, answers, score, 0)


def read(job: Job, system: str, message: str, decoder: LatentDecoder | None = None) -> Reading:
    """The reading of a message under a hidden system prompt, at the decoder's default layer."""
    return job.read([{"role": "system", "content": system}, {"role": "user", "content": message}], FORMS["system"], decoder=decoder)


def further(job: Job) -> dict[str, LatentDecoder]:
    """The decoders besides the suite's own that get a row: text_only_trained if there is one, and those asked for by name."""
    trained = {"text_only_trained": job.text_only_trained} if job.text_only_trained else {}
    return trained | job.rows


# --- how -----------------------------------------------------------------------------------------------------------


def _prompt(ask: Ask) -> tuple:
    """What is prefilled for the ask: the same for asks that may share it."""
    return ask.ids, None if ask.injected is None else id(ask.injected)


def _order(asks: Sequence[Ask]) -> list[int]:
    """Rows in the order of their batches: prompts of one form together, rows of one prompt side by side."""
    first: dict[tuple, int] = {}
    for i, ask in enumerate(asks):
        first.setdefault(_prompt(ask), i)
    return sorted(range(len(asks)), key=lambda i: (len(asks[i].ids), asks[i].ids, first[_prompt(asks[i])], i))


def _batched(decoder: LatentDecoder, asks: Sequence[Ask], width: int, run: Callable) -> list:
    """`run(prefix, rows, number)` over batches of at most `width` rows in `_order`; its results in the order of `asks`."""
    order, results, number = _order(asks), {}, 0
    while order:
        ids = asks[order[0]].ids
        batch = [i for i in order[:width] if asks[i].ids == ids]
        order = order[len(batch) :]
        prompts = {_prompt(asks[i]): asks[i] for i in batch}
        place = {prompt: n for n, prompt in enumerate(prompts)}
        suffixes = [decoder.config.prompt.question(decoder.base.tokenizer, asks[i].question) for i in batch]
        rows = [engine.Row(place[_prompt(asks[i])], suffix) for i, suffix in zip(batch, suffixes, strict=True)]
        results |= zip(batch, run(_prefill(decoder, list(prompts.values())), rows, number), strict=True)
        number += 1
    return [results[i] for i in range(len(asks))]


def _prefill(decoder: LatentDecoder, asks: Sequence[Ask]) -> engine.Prefix:
    """The prompts of asks with the same ids, one row for each, as one batch."""
    base, config, ids = decoder.base, decoder.config, [list(ask.ids) for ask in asks]
    values = [ask.injected for ask in asks if ask.injected is not None]
    if not values:
        with decoder.session() as model:
            return engine.prefill(model, ids)
    slots = torch.tensor([[s and ask.injected is not None for s in ask.slots] for ask in asks], device=base.device)
    with decoder.session() as model, Injection(base, config.write_layer, config.operation) as injection:
        with injection.armed(slots, torch.cat(values)):
            return engine.prefill(model, ids)


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
