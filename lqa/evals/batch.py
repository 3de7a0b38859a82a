"""Many prompts in few passes: prompts of one length are one batch.  Suites and baselines run their models through here.

A prompt's last token is left to the row that continues it, so that decoding and scoring (lqa.engine) start from the same prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lqa import engine
from lqa.activations import capture
from lqa.chat import Rendered, render
from lqa.decoder import LatentDecoder
from lqa.grounding import map_linearly
from lqa.injection import Injection, Operation
from lqa.models import Base

ROWS = 32  # prompts of one batch


class Run(NamedTuple):
    """Prefilled prompts, ready for engine.decode and engine.score: which of the given ones (`index`), and a row for each."""

    index: list[int]
    session: Callable
    prefix: engine.Prefix
    rows: list[engine.Row]


def patch(
    base: Base,
    session: Callable,
    ids: Sequence[int],
    slots: Sequence[bool],
    activations: Tensor,
    write_layer: int,
    operation: Operation,
    index: Sequence[int] | None = None,
) -> Run:
    """One prompt, filled with the activations of R sources: (R, n, D) for its n slots.  What stands before the slots runs once for all.

    The last token may be a slot too: then the first pass of the decoding is patched (and such a run cannot be scored).
    """
    count = len(activations)
    head, last = list(ids[:-1]), list(ids[-1:])
    inside = sum(slots[:-1])
    with session() as model, Injection(base, write_layer, operation) as injection:
        if inside:
            mask = torch.tensor([list(slots[:-1])] * count, device=base.device)
            with injection.armed(mask, activations[:, :inside].flatten(0, 1)):
                prefix = engine.prefill(model, [head] * count)
        else:
            prefix = engine.prefill(model, [head])
    rows = [engine.Row(i if inside else 0, last) for i in range(count)]
    if slots[-1]:
        session = _patched_once(session, Injection(base, write_layer, operation), activations[:, -1])
    return Run(list(index) if index is not None else list(range(count)), session, prefix, rows)


def _patched_once(session: Callable, injection: Injection, activations: Tensor) -> Callable:
    """A session whose first forward pass, over one token a row, is patched, and none after it."""
    slots = torch.ones(len(activations), 1, dtype=torch.bool, device=activations.device)
    done = False

    @contextmanager
    def patched():
        nonlocal done
        with session() as model:
            if done:
                yield model
                return
            with injection:
                injection.arm(slots, activations)
                yield model
                done = injection.fired > 0

    return patched


def plain(base: Base, prompts: Sequence[Sequence[int]]) -> Iterator[Run]:
    """The bare model on prompts of token ids, those of one length together."""
    for index in by_length([len(ids) for ids in prompts]):
        with base.decoding() as model:
            prefix = engine.prefill(model, [prompts[i][:-1] for i in index])
        yield Run(index, base.decoding, prefix, [engine.Row(n, list(prompts[i][-1:])) for n, i in enumerate(index)])


def asked(decoder: LatentDecoder, layer: int, injected: Sequence[Tensor], question: str, *, patched: bool = True) -> Iterator[Run]:
    """The decoder asked `question` about activations (N, D) of `layer`, as Reading.ask asks; `patched` False: with its slots untouched."""
    base, config = decoder.base, decoder.config
    suffix = config.prompt.question(base.tokenizer, question)
    for index in by_length([len(h) for h in injected]):
        ids, slots = config.prompt.prefix(base.tokenizer, config.slot_token_id, len(injected[index[0]]), [layer])
        ids, slots = ids + suffix, slots + [False] * len(suffix)
        if patched:
            values = torch.stack([injected[i] for i in index])
            yield patch(base, decoder.session, ids, slots, values, config.write_layer, config.operation, index)
        else:
            with decoder.session() as model:
                prefix = engine.prefill(model, [ids[:-1]])
            yield Run(index, decoder.session, prefix, [engine.Row(0, ids[-1:])] * len(index))


def texts(base: Base, runs: Iterator[Run] | Sequence[Run], max_new_tokens: int, stop_ids: Sequence[int]) -> list[str]:
    """The greedy continuation of every prompt, in the order in which they were given."""
    found: dict[int, list[int]] = {}
    for run in runs:
        found |= {i: [] for i in run.index}
        for steps in engine.decode(run.session, run.prefix, run.rows, max_new_tokens, stop_ids):
            for step in steps:
                found[run.index[step.row]].append(step.token)
    ids = [found[i] for i in range(len(found))]
    return [text.strip() for text in base.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def scores(runs: Iterator[Run] | Sequence[Run], answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """For every prompt, the mean log-probability per token (nats) of each of `answers` (token ids) behind it."""
    found: dict[int, list[float]] = {}
    for run in runs:
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


def donated(injected: Sequence[Tensor]) -> list[Tensor]:
    """The reference `shuffled` of a set: each reading gets the next one's activations, mapped linearly onto its own slots."""
    return [map_linearly(injected[(i + 1) % len(injected)], len(h)) for i, h in enumerate(injected)]
