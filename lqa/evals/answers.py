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
    n, given = len(reading.span), donor.injected
    return ask_true(reading, question)._replace(injected=given if len(donor.span) == n else map_linearly(given, n, len(donor.layers)))


def say(
    decoder: LatentDecoder, asks: Sequence[Ask], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0, width: int = WIDTH
) -> list[Said]:
    """The answers to all `asks`: greedy, or sampled with `seed`."""
    stop = decoder.config.prompt.stop_ids(decoder.base.tokenizer)

    def decode(prefix: engine.Prefix, rows: list[engine.Row], number: int) -> list[Said]:
        choose = engine.sampler(temperature, 1.0, seed * 1_000_003 + number)
        return decoder.collect(engine.decode(decoder.session, prefix, rows, max_new_tokens, stop, choose), len(rows))

    prompts = [_prompt(decoder, ask) for ask in asks]
    if temperature:  # samples of one prompt differ
        return _batched(decoder, prompts, width, decode)
    alike = {prompt.key: prompt for prompt in prompts}
    said = dict(zip(alike, _batched(decoder, list(alike.values()), width, decode), strict=True))
    return [said[prompt.key] for prompt in prompts]


def likelihoods(decoder: LatentDecoder, asks: Sequence[Ask], answers: Sequence[str], *, width: int = 2 * WIDTH) -> list[float]:
    """For every ask the mean log-probability per token (nats, end of turn included) of the answer beside it."""
    tokenizer, end = decoder.base.tokenizer, decoder.config.prompt
    # All answers to a question share the pass over it.
    prompts = [_prompt(decoder, ask).folded() for ask in asks]
    keys = [(prompt.key, text) for prompt, text in zip(prompts, answers, strict=True)]
    alike = dict(zip(keys, prompts, strict=True))
    distinct, texts = list(alike.values()), [text for _, text in alike]
    in_order = iter([end.answer(tokenizer, texts[i]) for i in _order(distinct)])

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


class _Prompt(NamedTuple):
    """What is prefilled (`ids` with their slots), and the tokens of the row that continues it."""

    ids: tuple[int, ...]
    slots: tuple[bool, ...]
    injected: Tensor | None
    suffix: tuple[int, ...]

    @property
    def prefix(self) -> tuple:
        """The same for rows that may share what is prefilled."""
        return self.ids, None if self.injected is None else id(self.injected)

    @property
    def key(self) -> tuple:
        return *self.prefix, self.suffix

    def folded(self) -> _Prompt:
        """The same with all but the last token prefilled."""
        moved = self.suffix[:-1]
        return _Prompt(self.ids + moved, self.slots + (False,) * len(moved), self.injected, self.suffix[-1:])


def _prompt(decoder: LatentDecoder, ask: Ask) -> _Prompt:
    return _Prompt(ask.ids, ask.slots, ask.injected, tuple(decoder.config.prompt.question(decoder.base.tokenizer, ask.question)))


def _order(prompts: Sequence[_Prompt]) -> list[int]:
    """Rows in the order of their batches: prefixes of the same ids together, rows of one prefix side by side."""
    first: dict[tuple, int] = {}
    for i, prompt in enumerate(prompts):
        first.setdefault(prompt.prefix, i)
    return sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), prompts[i].ids, first[prompts[i].prefix], i))


def _batched(decoder: LatentDecoder, prompts: Sequence[_Prompt], width: int, run: Callable) -> list:
    """`run(prefix, rows, number)` over batches of at most `width` rows in `_order`; its results in the order of `prompts`."""
    order, results, number = _order(prompts), {}, 0
    while order:
        ids = prompts[order[0]].ids
        batch = [i for i in order[:width] if prompts[i].ids == ids]
        order = order[len(batch) :]
        prefixes = {prompts[i].prefix: prompts[i] for i in batch}
        place = {prefix: n for n, prefix in enumerate(prefixes)}
        rows = [engine.Row(place[prompts[i].prefix], list(prompts[i].suffix)) for i in batch]
        results |= zip(batch, run(_prefill(decoder, list(prefixes.values())), rows, number), strict=True)
        number += 1
    return [results[i] for i in range(len(prompts))]


def _prefill(decoder: LatentDecoder, prompts: Sequence[_Prompt]) -> engine.Prefix:
    """Prefixes of the same ids as one batch."""
    base, config, ids = decoder.base, decoder.config, [list(prompt.ids) for prompt in prompts]
    values = [prompt.injected for prompt in prompts if prompt.injected is not None]
    if not values:
        with decoder.session() as model:
            return engine.prefill(model, ids)
    slots = torch.tensor([[s and prompt.injected is not None for s in prompt.slots] for prompt in prompts], device=base.device)
    with decoder.session() as model, Injection(base, config.write_layer, config.operation) as injection:
        with injection.armed(slots, torch.cat(values)):
            return engine.prefill(model, ids)


def _bare(decoder: LatentDecoder, readings: Sequence[Reading], questions, answers: Sequence[str], run: Callable, new: int) -> list:
    """`run(prefix, suffixes, answers)` of the bare model over what each reading shows as text; what is the same runs once."""
    tokenizer = decoder.base.tokenizer
    keys = [(*render(tokenizer, text_only_chat(r, q)).ids, a) for r, q, a in zip(readings, questions, answers, strict=True)]
    distinct = sorted(set(keys), key=lambda key: (len(key), key[:-1], key[-1]))
    decoder.check_room(len(distinct[-1]) - 1, new)
    found = {}
    for start in range(0, len(distinct), WIDTH):
        part = distinct[start : start + WIDTH]
        common, suffixes = engine.common_prefix([key[:-1] for key in part])
        with decoder.base.decoding() as model:
            prefix = engine.prefill(model, [common])
        found |= zip(part, run(prefix, suffixes, [key[-1] for key in part]), strict=True)
    return [found[key] for key in keys]
