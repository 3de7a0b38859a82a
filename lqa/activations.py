"""Capture: a target's forward pass, stopped at the deepest block that is read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lqa.errors import LqaError

ROWS = 32  # passes at a time
Layer = int | Sequence[int]  # what a reading reads: a layer, or several at once


def layer_list(layer: Layer) -> list[int]:
    """The layers that `layer` names."""
    return list(layer) if isinstance(layer, Sequence) else [layer]


def layer_name(layers: Sequence[int]) -> int | tuple[int, ...]:
    """What names `layers` in a call or a document: the one layer, or all of several."""
    return layers[0] if len(layers) == 1 else tuple(layers)


class _Stop(Exception):
    """Ends the forward pass once the deepest layer is captured; only the Capture that armed it swallows it."""


def output_tensor(output) -> Tensor:
    """The residual stream in a block's output: a Tensor in transformers 5, the first entry of a tuple before."""
    return output[0] if isinstance(output, tuple) else output


class Capture:
    """Context manager that holds the residual stream after chosen blocks.

        with Capture(blocks, [7, 14]) as captured:
            model.model(input_ids)
        captured[14]                                     # (B, S, D), in the graph if gradients are on

    With `stop` (default) the pass ends after the deepest of `layers`.  Raises LqaError on leaving if a layer was not reached.
    """

    def __init__(self, blocks: Sequence[nn.Module], layers: Iterable[int], stop: bool = True):
        self.layers = sorted(set(layers))
        self._blocks, self._stop, self._handles, self._acts = blocks, stop, [], {}

    def __getitem__(self, layer: int) -> Tensor:
        return self._acts[layer]

    def __enter__(self) -> Capture:
        if outside := [layer for layer in self.layers if not 0 <= layer < len(self._blocks)]:
            raise LqaError(f"There is no block {outside[0]}; this model has the blocks 0 to {len(self._blocks) - 1}.")
        for layer in self.layers:
            self._handles.append(self._blocks[layer].register_forward_hook(self._keep(layer)))
        return self

    def _keep(self, layer: int):
        def hook(module, args, output):
            self._acts[layer] = output_tensor(output)
            if self._stop and layer == self.layers[-1]:
                raise _Stop(self)

        return hook

    def __exit__(self, kind, error, trace) -> bool:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        stopped = kind is _Stop and error.args[0] is self
        if (kind is None or stopped) and (missing := set(self.layers) - set(self._acts)):
            raise LqaError(f"The forward pass did not run through block(s) {sorted(missing)}; no activations were captured there.")
        return stopped


def capture(model: nn.Module, blocks: Sequence[nn.Module], input_ids: Tensor, attention_mask: Tensor, layers: Iterable[int]):
    """Runs `model` on (B, S) tokens up to the deepest of `layers`; returns {layer: (B, S, D)}.

    Adapters and gradient mode are the caller's: with gradients on, the activations are part of the graph (steering needs that).
    """
    with Capture(blocks, layers) as captured:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return {layer: captured[layer] for layer in captured.layers}


def by_length(items: Sequence, length: Callable) -> Iterator[list]:
    """The items in batches of ROWS, sorted by `length`, so that little is padded."""
    ordered = sorted(items, key=length)
    return (ordered[i : i + ROWS] for i in range(0, len(ordered), ROWS))


def capture_rows(base, rows: Sequence[Sequence[int]], layers: Iterable[int]) -> dict[int, Tensor]:
    """{layer: (B, S, D)} of the bare model `base` (lqa.models.Base), on the CPU in float32, for rows of token ids; padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=base.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=base.device)
    with base.decoding() as model:
        return {k: acts.float().cpu() for k, acts in capture(model, base.blocks, ids, mask, layers).items()}


def gather_spans(acts: dict[int, Tensor], spans: Sequence[Sequence[int]], layers: Sequence[Sequence[int]]) -> Tensor:
    """The activations of every row's span, row after row, layer block after layer block: (sum of len(span) * len(layers), D)."""
    rows = [acts[k][b, torch.as_tensor(span, device=acts[k].device)] for b, span in enumerate(spans) for k in layers[b]]
    return torch.cat(rows)


class Passes:
    """Target passes kept for further readings: the residual streams of chats, as many of the last used as fit into `room` bytes.

    For one thread.
    """

    def __init__(self, room: int = 2**28):
        self.room, self.held = room, 0
        self._kept: OrderedDict[tuple[int, ...], dict[int, Tensor]] = OrderedDict()

    def get(self, ids: Sequence[int], layers: Iterable[int], run: Callable[[], dict[int, Tensor]]) -> dict[int, Tensor]:
        """{layer: (1, S, D)} of the chat with the tokens `ids`: what is kept, else what `run` returns, which must hold `layers`."""
        key = tuple(ids)
        found = self._kept.pop(key, {})
        self.held -= _bytes(found)
        if not set(layers) <= set(found):
            found = found | run()
        self._kept[key] = found
        self.held += _bytes(found)
        while self.held > self.room and len(self._kept) > 1:
            self.held -= _bytes(self._kept.popitem(last=False)[1])
        return found


def _bytes(acts: dict[int, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in acts.values())
