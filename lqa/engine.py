"""The engine: prefill once, decode many rows with a KV cache, score answers.

It knows tokens and caches; it knows nothing of chats, LoRA, slots or questions.  A `session` is a context manager factory that yields
the model in the right state for one forward pass, so that nothing is held between the steps of a stream (see Base.decoding).

Prefixes of equal length are prefilled as one batch; a row continues one of them with tokens of its own, so the rows of one reading
share its prefix.  Rows are left-padded between prefix and suffix and carry explicit positions, which makes a row's logits those of the
plain forward pass over prefix + suffix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from lqa.errors import LqaError
from lqa.masks import layer_masks, window

# A scoring pass holds (rows, answer tokens, vocabulary) log-probabilities; more floats than this are cut into several passes.
MAX_LOGITS = 2**26


class Row(NamedTuple):
    """A row to decode or score: which prefix it continues, and with what (the question)."""

    prefix: int
    suffix: list[int]


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
    """The KV cache of a batch of prefilled prefixes, each of `length` tokens; `start` is the position of the first one."""

    cache: DynamicCache
    length: int
    start: int = 0

    def rows(self, which: Sequence[int]) -> Cache:
        """A cache with a copy of prefix w for every w of `which`; this one stays as it is."""
        cache = Cache(layer_class_to_replicate=RoomyLayer)
        for i, layer in enumerate(self.cache.layers):
            index = torch.as_tensor(which, device=layer.keys.device)
            cache.update(layer.keys.index_select(0, index), layer.values.index_select(0, index), i)
        return cache


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The longest token prefix that all `sequences` share, and what is left of each (at least one token)."""
    shortest = min(map(len, sequences)) - 1
    n = next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)
    return list(sequences[0][:n]), [list(s[n:]) for s in sequences]


def join(prefixes: Sequence[Prefix]) -> Prefix:
    """One batch of prefixes of the same length."""
    cache = DynamicCache()
    for i, layers in enumerate(zip(*(p.cache.layers for p in prefixes), strict=True)):
        cache.update(torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers]), i)
    return Prefix(cache, prefixes[0].length, prefixes[0].start)


def prefill(model, ids: Sequence[Sequence[int]], start: int = 0) -> Prefix:
    """Runs prefixes of equal length (P, length), whose first token has the position `start`; what continues them counts on from there.

    What the caller has armed (an Injection) acts on this pass and no other.
    """
    cache = DynamicCache()  # without the model's config: plain layers, whose rows can be selected and extended at will
    positions = torch.arange(start, start + len(ids[0]), device=model.device).expand(len(ids), -1)
    inputs = {"input_ids": torch.tensor(ids, device=model.device), "position_ids": positions}
    model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Prefix(cache, len(ids[0]), start)


def _left_padded(prefix: Prefix, suffixes: Sequence[Sequence[int]], device) -> dict[str, Tensor]:
    """input_ids (R, L), position_ids (R, L) and attention_mask (R, length + L) for rows that continue `prefix`."""
    longest = max(map(len, suffixes))
    pads = [longest - len(s) for s in suffixes]
    ids = torch.tensor([[0] * p + list(s) for p, s in zip(pads, suffixes, strict=True)], device=device)
    real = torch.arange(longest, device=device) >= torch.tensor(pads, device=device).unsqueeze(1)
    positions = prefix.start + prefix.length + (real.cumsum(1) - 1).clamp_min(0)
    mask = torch.cat([torch.ones(len(pads), prefix.length, dtype=torch.bool, device=device), real], 1)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask.long()}


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
) -> Iterator[list[Step]]:
    """Decodes all rows at once, yielding the new tokens of every step; a row ends at a stop token, which is not yielded.

    choose  (R, V) logits -> (R,) ids; greedy if None.  Rows that have ended leave the batch.
    first   the session of the first pass, over the rows' suffixes, if it is another: what a caller has armed acts on that pass alone
    """
    choose = choose or (lambda logits: logits.argmax(-1))
    with session() as model:
        device = model.device
        cache = prefix.rows([row.prefix for row in rows])
        inputs = _left_padded(prefix, [row.suffix for row in rows], device)
    alive = list(range(len(rows)))
    for n in range(max_new_tokens):
        with (first if first and n == 0 else session)() as model:
            logits = _logits(model, inputs, cache, 1)[:, -1]
            tokens = choose(logits)
            probabilities = logits.softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            stopped = torch.isin(tokens, torch.tensor(stop_ids, device=device))
            steps = [
                Step(row, token, p)
                for row, token, p, stop in zip(alive, tokens.tolist(), probabilities.tolist(), stopped.tolist(), strict=True)
                if not stop
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


def _extended(session: Callable, prefix: Prefix, row: Row) -> Prefix:
    """The prefix of a row with its suffix behind it, but for the suffix's last token, whose logits are still wanted."""
    with session() as model:
        cache = prefix.rows([row.prefix])
        _logits(model, _left_padded(prefix, [row.suffix[:-1]], model.device), cache, 1)
    return Prefix(cache, prefix.length + len(row.suffix) - 1, prefix.start)


def score(session: Callable, prefix: Prefix, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> list[float]:
    """The mean log-probability per token, in nats, of each answer (its end included) behind its row's prefix and suffix."""
    return [sum(tokens) / len(tokens) for tokens in token_logprobs(session, prefix, rows, answers)]


def token_logprobs(session: Callable, prefix: Prefix, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probability, in nats, of every token of each answer behind its row's prefix and suffix."""
    if len(rows) != len(answers) or not all(answers):
        raise LqaError("Every row needs one answer with at least one token.")
    if len(rows) > 1 and len(rows[0].suffix) > 1 and all(row == rows[0] for row in rows):  # one question: run once, not for every answer
        prefix, rows = _extended(session, prefix, rows[0]), [Row(0, rows[0].suffix[-1:])] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].suffix) + len(answers[i]))
    scores: list[list[float]] = [[] for _ in rows]
    while order:
        with session() as model:
            per_row = (max(len(answers[i]) for i in order) + 1) * model.config.get_text_config().vocab_size
            batch, order = order[: max(1, MAX_LOGITS // per_row)], order[max(1, MAX_LOGITS // per_row) :]
            inputs = _left_padded(prefix, [list(rows[i].suffix) + list(answers[i]) for i in batch], model.device)
            keep = max(len(answers[i]) for i in batch) + 1
            cache = prefix.rows([rows[i].prefix for i in batch])
            logits = _logits(model, inputs, cache, keep)
            for i, row in zip(batch, logits, strict=True):
                n = len(answers[i])
                targets = torch.tensor(answers[i], device=row.device).unsqueeze(1)
                scores[i] = row[-n - 1 : -1].log_softmax(-1).gather(1, targets).squeeze(1).tolist()
    return scores


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
