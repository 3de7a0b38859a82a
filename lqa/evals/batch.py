"""Many prompts in few passes.  Suites and baselines run their models through here; how a pass is patched is lqa.injection's business.

Two ways to one batch, and `patch` takes the first that applies:

    equal    prompts that are one but for what is injected: one patched prefill, from which answers can be scored
    ragged   prompts of different lengths, or such that end in a slot: what they have in common runs once, and the rest of each is a row
             whose first pass is patched; for decoding
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lqa import engine
from lqa.activations import capture
from lqa.chat import Rendered, render
from lqa.config import Layer
from lqa.decoder import LatentDecoder
from lqa.errors import LqaError
from lqa.grounding import map_linearly
from lqa.injection import Injection, Operation
from lqa.models import Base

ROWS = 64  # prompts of one batch


class Prompt(NamedTuple):
    """Token ids, and which of them are slots."""

    ids: list[int]
    slots: list[bool]


class Run(NamedTuple):
    """Prefilled prompts, ready for engine.decode and engine.score: which of the given ones (`index`), and a row for each."""

    index: list[int]
    session: Callable
    prefix: engine.Prefix
    rows: list[engine.Row]
    scores: bool = True  # whether answers can be scored from it


def patch(
    base: Base, session: Callable, prompts: Sequence[Prompt], activations: Sequence[Tensor], write_layer: int, operation: Operation
) -> Run:
    """Prompts whose slots receive activations: (n, D) for the n slots of each.  Raises LqaError if one begins with a slot."""
    index, (ids, slots) = list(range(len(prompts))), prompts[0]
    values = torch.cat(list(activations))
    if all(prompt == prompts[0] for prompt in prompts) and not slots[-1]:
        mask = torch.tensor([slots[:-1]] * len(prompts), device=base.device)
        with session() as model, Injection(base, write_layer, operation) as injection, injection.armed(mask, values):
            prefix = engine.prefill(model, [ids[:-1]] * len(prompts))
        return Run(index, session, prefix, [engine.Row(i, ids[-1:]) for i in index])
    first = min(prompt.slots.index(True) for prompt in prompts)
    if not first or any(prompt.ids[:first] != ids[:first] for prompt in prompts):
        raise LqaError("These prompts have nothing in common before their slots, or begin with one; they cannot be one batch.")
    with session() as model:
        prefix = engine.prefill(model, [ids[:first]])
    longest = max(len(prompt.ids) for prompt in prompts)  # the engine pads rows on the left
    mask = torch.tensor([[False] * (longest - len(p.ids)) + p.slots[first:] for p in prompts], device=base.device)
    rows = [engine.Row(0, prompt.ids[first:]) for prompt in prompts]
    return Run(index, _patched_once(session, Injection(base, write_layer, operation), mask, values), prefix, rows, scores=False)


def _patched_once(session: Callable, injection: Injection, slots: Tensor, values: Tensor) -> Callable:
    """A session whose first forward pass is patched, and none after it."""
    done = False

    @contextmanager
    def patched():
        nonlocal done
        with session() as model:
            if done:
                yield model
                return
            with injection:
                injection.arm(slots, values)
                yield model
                done = injection.fired > 0

    return patched


def asked(decoder: LatentDecoder, layer: Layer, injected: Sequence[Tensor], question: str, *, patched: bool = True) -> Iterable[Run]:
    """The decoder asked `question` about what was injected of readings of `layer`, as Reading.ask asks; `patched` False: with its slots
    untouched."""
    base, config, layers = decoder.base, decoder.config, decoder.config.check_layers(layer)
    suffix = config.prompt.question(base.tokenizer, question)
    prompts = []
    for h in injected:
        ids, slots = config.prompt.prefix(base.tokenizer, config.slot_token_id, len(h) // len(layers), layers)
        prompts.append(Prompt(ids + suffix, slots + [False] * len(suffix)))
    if not patched:
        yield from plain(base, [prompt.ids for prompt in prompts], decoder.session)
        return
    for n in range(0, len(prompts), ROWS):
        part = slice(n, n + ROWS)
        run = patch(base, decoder.session, prompts[part], injected[part], config.write_layer, config.operation)
        yield run._replace(index=[n + i for i in run.index])


def plain(base: Base, prompts: Sequence[Sequence[int]], session: Callable | None = None) -> Iterable[Run]:
    """Prompts as they are; in the bare model unless a session says otherwise.  Those of one length are prefilled together."""
    session = session or base.decoding
    for index in by_length([len(ids) for ids in prompts]):
        with session() as model:
            prefix = engine.prefill(model, [prompts[i][:-1] for i in index])
        yield Run(index, session, prefix, [engine.Row(n, list(prompts[i][-1:])) for n, i in enumerate(index)])


def ragged(base: Base, prompts: Sequence[Sequence[int]]) -> Iterable[Run]:
    """Prompts of many lengths in the bare model: what they have in common runs once.  (Scoring would run the rest once per answer.)"""
    for n in range(0, len(prompts), ROWS):
        common, suffixes = engine.common_prefix(prompts[n : n + ROWS])
        if not common:
            yield from (run._replace(index=[n + i for i in run.index]) for run in plain(base, prompts[n : n + ROWS]))
            continue
        with base.decoding() as model:
            prefix = engine.prefill(model, [common])
        rows = [engine.Row(0, suffix) for suffix in suffixes]
        yield Run(list(range(n, n + len(rows))), base.decoding, prefix, rows, scores=False)


def texts(base: Base, runs: Iterable[Run], max_new_tokens: int, stop_ids: Sequence[int]) -> list[str]:
    """The greedy continuation of every prompt, in the order in which they were given."""
    found: dict[int, list[int]] = {}
    for run in runs:
        found |= {i: [] for i in run.index}
        for steps in engine.decode(run.session, run.prefix, run.rows, max_new_tokens, stop_ids):
            for step in steps:
                found[run.index[step.row]].append(step.token)
    ids = [found[i] for i in range(len(found))]
    return [text.strip() for text in base.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def scores(runs: Iterable[Run], answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """For every prompt, the mean log-probability per token (nats) of each of `answers` (token ids) behind it."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if not run.scores:
            raise LqaError("Prompts of different lengths, or such that end in a slot, are for decoding; score them one by one.")
        rows = [row for row in run.rows for _ in answers]
        flat = engine.score(run.session, run.prefix, rows, list(answers) * len(run.rows))
        found |= {i: flat[n * len(answers) : (n + 1) * len(answers)] for n, i in enumerate(run.index)}
    return [found[i] for i in range(len(found))]


def states(base: Base, rendered: Sequence[Rendered], layers: Sequence[int]) -> list[dict[int, Tensor]]:
    """The target's activations of whole chats, {layer: (S, D)} for each: one pass for chats of one length, all layers from it."""
    found: dict[int, dict[int, Tensor]] = {}
    for index in by_length([len(r) for r in rendered]):
        ids = torch.tensor([rendered[i].ids for i in index], device=base.device)
        with base.decoding() as model:
            acts = capture(model, base.blocks, ids, torch.ones_like(ids), layers)
        found |= {i: {k: acts[k][n] for k in layers} for n, i in enumerate(index)}
    return [found[i] for i in range(len(found))]


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Positions with the same length, at most ROWS together, the shortest first."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    return [group[n : n + ROWS] for _, group in sorted(groups.items()) for n in range(0, len(group), ROWS)]


def chat_ids(base: Base, chats: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    """The chats as token ids, with a header for the reply."""
    return [render(base.tokenizer, chat).ids for chat in chats]


def donated(injected: Sequence[Tensor], layers: int = 1) -> list[Tensor]:
    """The reference `shuffled` of a set: each reading (of so many layers) gets the next one's activations, mapped linearly onto its own
    slots."""
    return [map_linearly(injected[(i + 1) % len(injected)], len(h) // layers, layers) for i, h in enumerate(injected)]
