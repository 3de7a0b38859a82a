"""The engine: prefill once, decode many rows with a KV cache, score answers.

It knows tokens and caches; it knows nothing of chats, LoRA, slots or questions.  A `session` is a context manager factory that yields
the model in the right state for one forward pass, so that nothing is held between the steps of a stream (see Base.decoding).

Prefixes of equal length are prefilled as one batch; a row continues one of them with tokens of its own, so the rows of one reading
share its prefix.  Rows are left-padded between prefix and suffix and carry explicit positions, which makes a row's logits those of the
plain forward pass over prefix + suffix.

What is patched behind a block (Injection) makes no difference up to there: given a Trunk, rows of the same tokens run through it as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from lqa.activations import output_tensor
from lqa.errors import LqaError
from lqa.masks import layer_masks, window

PLAUSIBLE = 0.1  # guided without it, tokens that the model finds absurd would win on their ratio alone
# A scoring pass holds (rows, answer tokens, vocabulary) logits; more floats than this are cut into several passes.
MAX_LOGITS = 2**26
# A pass costs by itself about as much as so many tokens; a scoring pass ends where longer rows would pad the others by more than that.
PASS = {"cpu": 16, "cuda": 1024}


class Row(NamedTuple):
    """A row to decode or score: which prefix it continues, and with what (the question)."""

    prefix: int
    suffix: list[int]


class Trunk(NamedTuple):
    """The first `depth` of the model's blocks, in which prefixes of the same tokens are the same whatever is injected into them."""

    blocks: Sequence[nn.Module]
    depth: int


class Step(NamedTuple):
    """One decoded token: the row it belongs to, its id, and the probability that the model gave it."""

    row: int
    token: int
    probability: float


class RoomyLayer(DynamicLayer):
    """A layer of the KV cache with room for the tokens to come.

    DynamicLayer copies everything it holds for every token, a sixth of a decoding step on CPU.  Here a token is written into its place,
    and `keys` and `values` are what is filled of larger tensors; when they are full, or somebody has replaced them, larger ones are made.
    """

    ROOM = 64  # tokens
    _keys = _values = _shown = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if key_states.shape[-2] != 1 or not self.is_initialized:  # a prefill: nothing needs room behind it yet
            return super().update(key_states, value_states, *args, **kwargs)
        held = self.keys.shape[-2]
        if self.keys is not self._shown or held == self._keys.shape[-2]:
            self._keys, self._values = (torch.nn.functional.pad(x, (0, 0, 0, self.ROOM)) for x in (self.keys, self.values))
        self._keys[:, :, held] = key_states[:, :, 0]
        self._values[:, :, held] = value_states[:, :, 0]
        self.keys, self.values = self._keys[:, :, : held + 1], self._values[:, :, : held + 1]
        self._shown = self.keys
        return self.keys, self.values


@dataclass(frozen=True)
class Prefix:
    """The KV cache of a batch of prefilled prefixes, each in `length` columns; `start` is the position of the first token.

    pads   of every prefix, how many of its columns are padding in front; () if they are of one length
    trunk  where prefixes of the same name (of `names`) are the same; None: nowhere
    """

    cache: DynamicCache
    length: int
    start: int = 0
    pads: tuple[int, ...] = ()
    trunk: Trunk | None = None
    names: tuple[Hashable, ...] = ()

    def rows(self, which: Sequence[int]) -> Cache:
        """A cache with a copy of prefix w for every w of `which`; this one stays as it is."""
        cache = Cache(layer_class_to_replicate=RoomyLayer)
        for i, layer in enumerate(self.cache.layers):
            index = torch.as_tensor(which, device=layer.keys.device)
            cache.update(layer.keys.index_select(0, index), layer.values.index_select(0, index), i)
        return cache

    def trunked(self, rows: Sequence[Row], cache: Cache):
        """A context for one pass over `rows`, behind `cache`: through the trunk it runs those that are the same as one."""
        return _trunked(self.trunk, [(self.names[row.prefix], tuple(row.suffix)) for row in rows] if self.trunk else (), cache)


@contextmanager
def _trunked(trunk: Trunk | None, names: Sequence[Hashable], cache: Cache):
    """Inside, one pass over rows with these `names` runs every name once through the trunk, and from there on every row.

    Yields the rows to give to the model, (N,) long, or None for all of them.  Behind the pass the cache holds every row in all layers.
    """
    first: dict = {}
    for i, name in enumerate(names):
        first.setdefault(name, i)
    if trunk is None or trunk.depth < 1 or len(first) == len(names):
        yield None
        return
    device = next(trunk.blocks[0].parameters()).device
    place = {name: n for n, name in enumerate(first)}
    chosen, every = torch.tensor([*first.values()], device=device), torch.tensor([place[name] for name in names], device=device)

    def widen(x):
        if isinstance(x, tuple | list):
            return type(x)(map(widen, x))
        return x.index_select(0, every) if isinstance(x, Tensor) and x.dim() > 1 and len(x) == len(first) else x

    def behind(_, args, output):
        wide = output_tensor(output).index_select(0, every)
        return (wide, *output[1:]) if isinstance(output, tuple) else wide

    def before(_, args, kwargs):
        return args, {key: widen(value) for key, value in kwargs.items()}

    last, *further = trunk.blocks[trunk.depth - 1 :]
    lower = cache.layers[: trunk.depth]
    for layer in lower:
        layer.batch_select_indices(chosen)
    # In front of the injection's hook, which patches every row.
    handles = [last.register_forward_hook(behind, prepend=True)]
    handles += [block.register_forward_pre_hook(before, with_kwargs=True) for block in further]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()
    for layer in cache.layers[: trunk.depth]:  # a prefill makes them
        layer.batch_select_indices(every)


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The longest token prefix that all `sequences` share, and what is left of each (at least one token)."""
    shortest = min(map(len, sequences)) - 1
    n = next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)
    return list(sequences[0][:n]), [list(s[n:]) for s in sequences]


def join(prefixes: Sequence[Prefix]) -> Prefix:
    """One batch of prefixes with one `start`; where their lengths differ, the shorter ones are padded in front."""
    longest = max(p.length for p in prefixes)

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, 0, longest - t.shape[-2], 0)) for t in tensors])

    cache = DynamicCache()
    for i, layers in enumerate(zip(*(p.cache.layers for p in prefixes), strict=True)):
        cache.update(joined([layer.keys for layer in layers]), joined([layer.values for layer in layers]), i)
    pads = [longest - p.length + own for p in prefixes for own in p.pads or (0,) * len(p.cache.layers[0].keys)]
    names = tuple(name for p in prefixes for name in p.names)
    return Prefix(cache, longest, prefixes[0].start, tuple(pads) if any(pads) else (), prefixes[0].trunk, names)


def prefill(model, ids: Sequence[Sequence[int]], start: int = 0, trunk: Trunk | None = None) -> Prefix:
    """Runs prefixes of equal length (P, length), whose first token has the position `start`; what continues them counts on from there.

    What the caller has armed (an Injection) acts on this pass and no other; a `trunk` ends where it acts.
    """
    names = tuple(map(tuple, ids)) if trunk else ()
    cache = DynamicCache()  # without the model's config: plain layers, whose rows can be selected and extended at will
    positions = torch.arange(start, start + len(ids[0]), device=model.device).expand(len(ids), -1)
    inputs = {"input_ids": torch.tensor(ids, device=model.device), "position_ids": positions}
    with _trunked(trunk, names, cache) as some:
        model(**_selected(inputs, some), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Prefix(cache, len(ids[0]), start, (), trunk, names)


def _selected(inputs: dict[str, Tensor], some: Tensor | None) -> dict[str, Tensor]:
    return inputs if some is None else {key: x.index_select(0, some) for key, x in inputs.items()}


def _left_padded(prefix: Prefix, rows: Sequence[Row], device) -> dict[str, Tensor]:
    """input_ids (R, L), position_ids (R, L) and attention_mask (R, length + L) for rows that continue `prefix`."""

    def real(pads: Sequence[int], length: int) -> Tensor:
        return torch.arange(length, device=device) >= torch.tensor(pads, device=device).unsqueeze(1)

    longest = max(len(row.suffix) for row in rows)
    pads = [longest - len(row.suffix) for row in rows]
    ids = torch.tensor([[0] * p + list(row.suffix) for p, row in zip(pads, rows, strict=True)], device=device)
    before = real([prefix.pads[row.prefix] if prefix.pads else 0 for row in rows], prefix.length)
    own = real(pads, longest)
    positions = prefix.start + before.sum(1, keepdim=True) + (own.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": torch.cat([before, own], 1).long()}


def _logits(model, inputs: dict[str, Tensor], cache: Cache, keep: int) -> Tensor:
    """The last `keep` logits (R, keep, V) of rows as `_left_padded` gives them."""
    if window(model.config) is not None:  # counted in columns of the cache, it would be shortened by the padding
        mask = inputs["attention_mask"]
        places = mask.cumsum(1) - 1  # positions, counted from the prefix's first token
        distance = places[:, -inputs["input_ids"].shape[1] :].unsqueeze(2) - places.unsqueeze(1)
        inputs = inputs | {"attention_mask": layer_masks(model.config, mask.bool().unsqueeze(1) & (distance >= 0), distance, model.dtype)}
    return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits.float()


def decode(
    session: Callable,
    prefix: Prefix,
    rows: Sequence[Row],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    choose: Callable | None = None,
    first: Callable | None = None,
    guidance: float = 0.0,
) -> Iterator[list[Step]]:
    """Decodes all rows at once, yielding the new tokens of every step; a row ends at a stop token, which is not yielded.

    choose    (R, V) logits -> (R,) ids; greedy if None.  Rows that have ended leave the batch.
    first     the session of the first pass, over the rows' suffixes, if it is another: what a caller has armed acts on that pass alone
    guidance  if not 0, the second half of `rows` are what the first half is held against (see `guided`), row by row; what they say is that
              of the first half and is not yielded.  A step's probability is the model's own, in its row of the first half
    """
    choose = choose or (lambda logits: logits.argmax(-1))
    shown = len(rows) // 2 if guidance else len(rows)
    with session() as model:
        device = model.device
        cache = prefix.rows([row.prefix for row in rows])
        inputs = _left_padded(prefix, rows, device)
    alive = list(range(len(rows)))
    for n in range(max_new_tokens):
        with (first if first and n == 0 else session)() as model:
            with nullcontext() if n else prefix.trunked(rows, cache) as some:
                logits = _logits(model, _selected(inputs, some), cache, 1)[:, -1]
            tokens = choose(guided(logits, guidance)).repeat(2) if guidance else choose(logits)
            probabilities = logits.softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            stopped = torch.isin(tokens, torch.tensor(stop_ids, device=device))
            steps = [
                Step(row, token, p)
                for row, token, p, stop in zip(alive, tokens.tolist(), probabilities.tolist(), stopped.tolist(), strict=True)
                if not stop and row < shown
            ]
            keep = (~stopped).nonzero().squeeze(1)
            if len(keep) < len(alive):
                alive = [alive[i] for i in keep.tolist()]
                cache.batch_select_indices(keep)
            inputs = {
                "input_ids": tokens[keep].unsqueeze(1),
                "position_ids": inputs["position_ids"][keep, -1:] + 1,
                "attention_mask": torch.nn.functional.pad(inputs["attention_mask"][keep], (0, 1), value=1),
            }
        if steps:
            yield steps
        if not alive:
            return


def guided(logits: Tensor, weight: float) -> Tensor:
    """The scores (R, V) by which tokens are chosen for rows, given their logits and those of what they are held against, (2 R, V):

        log p + weight (log p - log q)      where p is at least PLAUSIBLE of the likeliest token's; elsewhere minus infinity

    What q knows without them counts for less: classifier-free guidance (Sanchez et al. 2023, arXiv 2306.17806) with the plausibility
    constraint of contrastive decoding (Li et al. 2022, arXiv 2210.15097, section 3.3).
    """
    p, q = logits.log_softmax(-1).chunk(2)
    return (p + weight * (p - q)).masked_fill(p < p.amax(-1, keepdim=True) + math.log(PLAUSIBLE), -math.inf)


def _extended(session: Callable, prefix: Prefix, row: Row) -> Prefix:
    """The prefix of a row with its suffix behind it, but for the suffix's last token, whose logits are still wanted."""
    with session() as model:
        cache = prefix.rows([row.prefix])
        _logits(model, _left_padded(prefix, [Row(row.prefix, row.suffix[:-1])], model.device), cache, 1)
    return Prefix(cache, prefix.length + len(row.suffix) - 1, prefix.start, prefix.pads[row.prefix : row.prefix + 1])


def score(session: Callable, prefix: Prefix, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> list[float]:
    """The mean log-probability per token, in nats, of each answer (its end included) behind its row's prefix and suffix."""
    return [sum(tokens) / len(tokens) for tokens in token_logprobs(session, prefix, rows, answers)]


def token_logprobs(session: Callable, prefix: Prefix, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probability, in nats, of every token of each answer behind its row's prefix and suffix."""
    if len(rows) != len(answers) or not all(answers):
        raise LqaError("Every row needs one answer with at least one token.")
    if len(rows) > 1 and len(rows[0].suffix) > 1 and all(row == rows[0] for row in rows):  # one question: run once, not for every answer
        prefix, rows = _extended(session, prefix, rows[0]), [Row(0, rows[0].suffix[-1:])] * len(rows)
    scores: list[list[float]] = [[] for _ in rows]
    with session() as model:
        device, vocabulary = model.device, model.config.get_text_config().vocab_size
    for batch in _passes(rows, answers, PASS.get(device.type, 1024), MAX_LOGITS // vocabulary):
        # The last token of an answer predicts nothing that is asked for.
        continued = [Row(rows[i].prefix, [*rows[i].suffix, *answers[i][:-1]]) for i in batch]
        with session() as model:
            inputs = _left_padded(prefix, continued, device)
            cache = prefix.rows([rows[i].prefix for i in batch])
            with prefix.trunked(continued, cache) as some:
                logits = _logits(model, _selected(inputs, some), cache, max(len(answers[i]) for i in batch))
            for i, row in zip(batch, logits, strict=True):
                targets = torch.tensor(answers[i], device=device).unsqueeze(1)
                scores[i] = row[-len(targets) :].log_softmax(-1).gather(1, targets).squeeze(1).tolist()
    return scores


def _passes(rows: Sequence[Row], answers: Sequence[Sequence[int]], waste: int, room: int) -> Iterator[list[int]]:
    """The indices of `rows` pass by pass, rows of like length together: one more row may pad a pass by `waste` tokens, and a pass may hold
    `room` logits vectors."""
    lengths = [len(row.suffix) + len(answer) for row, answer in zip(rows, answers, strict=True)]
    batch, longest = [], 0  # longest: answer
    for i in sorted(range(len(rows)), key=lambda i: (lengths[i], rows[i].prefix)):
        longest = max(longest, len(answers[i]))
        if batch and ((lengths[i] - lengths[batch[-1]]) * len(batch) > waste or (len(batch) + 1) * longest > room):
            yield batch
            batch, longest = [], len(answers[i])
        batch.append(i)
    if batch:
        yield batch


def sampler(temperature: float, top_p: float = 1.0, seed: int = 0) -> Callable | None:
    """A `choose` for `decode`: nucleus sampling, the same tokens for the same seed; greedy for temperature 0."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise LqaError(f"temperature must be at least 0 and top_p in (0, 1], not {temperature} and {top_p}.")
    if temperature == 0:
        return None
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        probabilities, ids = (logits / temperature).softmax(-1).cpu().sort(-1, descending=True)
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
        return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1).to(logits.device)

    return choose
