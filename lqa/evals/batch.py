"""Many prompts in few passes: what a model says to each, and how probable answers are.  Suites and baselines run their models through here.

`say` decodes up to ROWS prompts as one batch.  What they have in common is prefilled, once for everything that is injected into it, and the
rest of each is a row; if slots lie in the rest (readings of different lengths, prompts that end in a slot), the first pass over the rows is
patched.  `score` prefills prompts up to their last token, which the answers to a prompt then continue.

A prompt that is given twice runs once; those that differ only in what is injected into them are one up to the block where that happens.
What comes out is what each prompt gives alone, as `Reading.ask` and `Reading.logprobs` do, up to float rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lqa import config, engine
from lqa.activations import capture
from lqa.chat import Chat, Rendered, render
from lqa.decoder import LatentDecoder, Reading, Said, collect
from lqa.errors import LqaError
from lqa.grounding import donor_activations, text_only_chat
from lqa.injection import Injection, Operation
from lqa.models import Base

ROWS = 32  # sampled as one batch: another width would give other samples; what is not sampled takes WIDE
WIDE = 64


class Prompt(NamedTuple):
    """Token ids; which of them are slots; what is injected into these, (slots, D), or None: they are not patched.

    start   the position of the first token (DecoderConfig.first_position)
    """

    ids: tuple[int, ...]
    slots: tuple[bool, ...] = ()
    injected: Tensor | None = None
    start: int = 0

    @property
    def patched(self) -> tuple[bool, ...]:
        """The slots that are patched, one entry for each token."""
        return (False,) * len(self.ids) if self.injected is None else self.slots

    @property
    def name(self) -> tuple:
        """The same for prompts that are the same."""
        return self.ids, self.patched, id(self.injected), self.start


class Runner(NamedTuple):
    """A model as prompts are run through it: in the state that `session` gives, its answers ended as `template` says, its slots patched
    behind block `write_layer` (-1: at the embeddings), its answers held against those of unpatched slots with the weight `guidance`."""

    base: Base
    session: Callable
    template: config.Prompt
    write_layer: int = 0
    operation: Operation = Operation("replace")
    guidance: float = 0.0


def adapted(decoder: LatentDecoder) -> Runner:
    """The decoder."""
    config = decoder.config
    return Runner(decoder.base, decoder.session, config.prompt, config.write_layer, config.operation, config.guidance)


def bare(decoder: LatentDecoder, write_layer: int = 0) -> Runner:
    """The decoder's base model, its adapter off; slots are replaced."""
    return Runner(decoder.base, decoder.base.decoding, decoder.config.prompt, write_layer)


# --- prompts -------------------------------------------------------------------------------------------------------


def ask(reading: Reading, question: str, source: str = "true", donor: Reading | None = None) -> Prompt:
    """A question to the reading's decoder (`adapted`), about its activations.

    source  `true`, or a reference: `none`, the slots are not patched; `shuffled`, they get those of `donor` (None: the packaged one)
    """
    decoder = reading.decoder
    ids, slots = reading._prompt_ids(text=source != "none")
    asked = decoder.config.prompt.question(decoder.base.tokenizer, question)
    injected = None
    if any(slots) and source != "none":
        injected = reading.injected if source == "true" else donor_activations(reading, donor)
    return Prompt((*ids, *asked), (*slots, *[False] * len(asked)), injected, reading._start)


def plain(base: Base, chat: Chat) -> Prompt:
    """A chat, with a header for the reply."""
    return Prompt(tuple(render(base.tokenizer, chat).ids))


def text_only(reading: Reading, question: str) -> Prompt:
    """The reference `text_only`: the visible turns as text and the question, for the bare model."""
    return plain(reading.decoder.base, text_only_chat(reading, question))


# --- what is run ---------------------------------------------------------------------------------------------------


def say(
    runner: Runner, prompts: Sequence[Prompt], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0, width: int | None = None
) -> list[Said]:
    """What the model says to each prompt: greedy, or sampled with `seed`.

    Raises LqaError for a prompt that exceeds the context, has a single token, or has nothing in front of its slots.
    """
    _check_room(runner, prompts, max_new_tokens)
    stop = runner.template.stop_ids(runner.base.tokenizer)

    def run(index: Sequence[int], number: int) -> list[Said]:
        batch = [prompts[i] for i in index]
        against = [prompt._replace(injected=None) for prompt in batch] if runner.guidance else []
        prefix, rows, first = _prefilled(runner, batch + against, _common(batch + against))
        choose = engine.sampler(temperature, 1.0, seed * 1_000_003 + number)
        steps = engine.decode(runner.session, prefix, rows, max_new_tokens, stop, choose, first, runner.guidance)
        return collect(runner.base.tokenizer, steps, len(batch))

    # Prompts with as many slots side by side, and of these the ones that get the same.
    heads = [p.ids[: len(p.ids) - p.slots[::-1].index(True)] if any(p.slots) else p.ids for p in prompts]
    keys = [((p.start, p.ids[0]), (len(h), h, place)) for p, h, place in zip(prompts, heads, _places(prompts), strict=True)]
    # Samples of one prompt differ.
    names = range(len(prompts)) if temperature else [p.name for p in prompts]
    return _batched(names, keys, width or (ROWS if temperature else WIDE), run)


def texts(runner: Runner, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    """The texts that `say` gives, greedy."""
    return [said.text for said in say(runner, prompts, max_new_tokens)]


def score(runner: Runner, prompts: Sequence[Prompt], answers: Sequence[str], *, width: int = 2 * WIDE) -> list[float]:
    """For every prompt the mean log-probability per token (nats, end of turn included) of the answer beside it.

    Raises LqaError for a prompt that exceeds the context or ends in a slot.
    """
    ids = [runner.template.answer(runner.base.tokenizer, answer) for answer in answers]
    _check_room(runner, prompts, max(map(len, ids), default=0))
    if any(p.patched[-1] for p in prompts):
        raise LqaError("A prompt that ends in a slot cannot be scored; put a token behind it.")

    def run(index: Sequence[int], _) -> list[float]:
        prefixes, rows = [], []
        for n, group in groupby(index, lambda i: len(prompts[i].ids)):
            before = sum(len(own.names) for own in prefixes)
            prefix, own, _ = _prefilled(runner, [prompts[i] for i in group], n - 1)
            prefixes.append(prefix)
            rows += [row._replace(prefix=before + row.prefix) for row in own]
        return engine.score(runner.session, engine.join(prefixes), rows, [ids[i] for i in index])

    keys = [(p.start, (len(p.ids), p.ids, place)) for p, place in zip(prompts, _places(prompts), strict=True)]
    return _batched([(p.name, answer) for p, answer in zip(prompts, answers, strict=True)], keys, width, run)


def matrix(runner: Runner, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[list[float]]:
    """`score` of every prompt with each of `answers`."""
    n = len(answers)
    flat = score(runner, [prompt for prompt in prompts for _ in answers], list(answers) * len(prompts))
    return [flat[i * n : (i + 1) * n] for i in range(len(prompts))]


def states(base: Base, rendered: Sequence[Rendered], layers: Sequence[int]) -> list[dict[int, Tensor]]:
    """The target's activations of whole chats, {layer: (S, D)} for each: one pass for chats of one length, all layers from it."""

    def run(index: Sequence[int], _) -> list[dict[int, Tensor]]:
        ids = torch.tensor([rendered[i].ids for i in index], device=base.device)
        with base.decoding() as model:
            acts = capture(model, base.blocks, ids, torch.ones_like(ids), layers)
        return [{k: acts[k][n] for k in layers} for n in range(len(index))]

    return _batched(range(len(rendered)), [(len(r), 0) for r in rendered], WIDE, run)


# --- how -----------------------------------------------------------------------------------------------------------


def _batched(names: Sequence, keys: Sequence[tuple], width: int, run: Callable) -> list:
    """`run(index, number)` over batches of at most `width` indices whose `keys` (group, place) name one group; one result for every index.

    Of those with the same name only the first runs.
    """
    first: dict = {}
    for i, name in enumerate(names):
        first.setdefault(name, i)
    found, number = {}, 0
    for _, group in groupby(sorted(first.values(), key=lambda i: keys[i]), lambda i: keys[i][0]):
        group = list(group)
        for n in range(0, len(group), width):
            index = group[n : n + width]
            found |= zip((names[i] for i in index), run(index, number), strict=True)
            number += 1
    return [found[name] for name in names]


def _places(prompts: Sequence[Prompt]) -> list[int]:
    """For every prompt which of the things that are injected it gets, numbered as they come."""
    seen: dict[int, int] = {}
    return [seen.setdefault(id(prompt.injected), len(seen)) for prompt in prompts]


def _common(prompts: Sequence[Prompt]) -> int:
    """How many tokens can be prefilled for all: what they have in common, only up to the first slot if not all slots are in it."""
    n = len(engine.common_prefix([prompt.ids for prompt in prompts])[0])
    slots = [i for prompt in prompts for i, slot in enumerate(prompt.patched) if slot]
    if slots and max(slots) >= n:
        n = min(n, *slots)
    return n


def _prefilled(runner: Runner, prompts: Sequence[Prompt], n: int) -> tuple[engine.Prefix, list[engine.Row], Callable]:
    """The first n tokens of every prompt prefilled, what is the same once; the rows that continue them; the session of their first pass."""
    if not n:
        raise LqaError("A prompt of a single token, or one that begins with its slots, cannot be run; put a token in front.")
    heads = [(p.ids[:n], id(p.injected) if any(p.patched[:n]) else None) for p in prompts]
    distinct = dict(zip(heads, prompts, strict=True))
    place = {head: i for i, head in enumerate(distinct)}
    with _session(runner, distinct.values(), [p.patched[:n] for p in distinct.values()]) as model:
        trunk = engine.Trunk(runner.base.blocks, runner.write_layer + 1)
        prefix = engine.prefill(model, [ids for ids, _ in distinct], prompts[0].start, trunk)
    longest = max(len(p.ids) for p in prompts)  # the engine pads rows on the left
    slots = [(False,) * (longest - len(p.ids)) + p.patched[n:] for p in prompts]
    rows = [engine.Row(place[head], list(p.ids[n:])) for head, p in zip(heads, prompts, strict=True)]
    return prefix, rows, partial(_session, runner, prompts, slots)


@contextmanager
def _session(runner: Runner, prompts: Sequence[Prompt], slots: Sequence[Sequence[bool]]):
    """The runner's session for one pass, over rows with these `slots`: they get what the prompts hold."""
    values = [prompt.injected for prompt, own in zip(prompts, slots, strict=True) if any(own)]
    with runner.session() as model:
        if not values:
            yield model
            return
        with Injection(runner.base, runner.write_layer, runner.operation) as injection:
            with injection.armed(torch.tensor(slots, device=runner.base.device), torch.cat(values)):
                yield model


def _check_room(runner: Runner, prompts: Sequence[Prompt], new: int) -> None:
    tokens = max((prompt.start + len(prompt.ids) for prompt in prompts), default=0)
    if tokens + new > runner.base.context:
        text = f"A prompt has {tokens} tokens and {new} more belong behind it, but the model's context is {runner.base.context}"
        raise LqaError(f"{text}; leave the item that is so long out.")
