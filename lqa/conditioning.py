"""Conditioning: what is done to activations before they are injected.

A hidden turn changes the activations of later tokens only a little; most of them is the visible text.  The reference h0 is the same
visible turns without the hidden context, so that the difference is what the hidden context alone has done.  Another reference chat with the
same visible turns may be given instead; the difference is then what one hidden context does more than the other.  A steering that counts as
hidden is left out of the reference likewise, and every token has one then: itself in the unsteered target.

    raw        h
    centred    h - mu_k               mu_k: the mean over what is read in training
    contrast   h - h0
    amplified  h + a (h - h0)
    projected  P_k (h - h0) + b_k

mu_k, or P_k and b_k, for each read layer k lie beside the adapter.  A token that no hidden turn precedes has no reference: where that is
all of them `contrast` is an error, else it injects h as the others do.

All read layers may be merged into one block (DecoderConfig.merged): one map P, of the differences at all of them, side by side.  What each
layer holds of the hidden text is noisy, and the noise differs: together they tell it much better.

The opening, the tokens of the header before any visible word, may have maps of their own: what changed there owes to the hidden text alone,
and not to how it goes with the visible words.

`projected` starts from a fit (train.projection): from the difference at one token it predicts what the write layer would hold for the
hidden text.  The model can already read that, so a decoder starts with its input in a form that it knows.  Or it starts at the identity,
as `contrast`; and from either it may be trained together with the adapter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lqa.activations import Layer, by_length, capture_rows, layer_list
from lqa.chat import Chat, Rendered, hidden_turns, render
from lqa.errors import LqaError

CONDITIONINGS = ("raw", "centred", "contrast", "amplified", "projected")
REFERENCED = ("contrast", "amplified", "projected")  # those that compare with a reference
MAPPED = ("centred", "projected")  # those with a map beside the adapter
PROJECTION = "projection.safetensors"


class Projection:
    """An affine map for each block that is read: `maps[k]` = weight (D, D), bias (D); what is injected is `weight @ x + bias`.

    The weight of "centred" is None, the identity, and its bias -mu_k.  Of L merged layers, a tuple, the weight is (D, L * D).
    `opening` are such maps for the tokens of the opening; empty where these have none of their own.
    """

    def __init__(self, maps: dict[Layer, Map], opening: dict[Layer, Map] | None = None):
        self.maps, self.opening = maps, opening or {}

    def __call__(self, x: Tensor, block: Layer, opening: Sequence[bool] | None = None) -> Tensor:
        """(N, D), or (N, L * D) of merged layers -> (N, D); differentiable.  `opening` tells which of the N rows are of the opening."""
        out = _affine(x, *self.maps[block])
        if not self.opening or not opening or not any(opening):
            return out
        return torch.where(torch.tensor(opening, device=x.device)[:, None], _affine(x, *self.opening[block]), out)

    def trainable(self, device) -> nn.ParameterDict:
        """Makes parameters of the maps, on `device`, for an optimizer."""
        for maps in (self.maps, self.opening):
            maps |= {k: tuple(t if t is None else nn.Parameter(t.to(device, torch.float32)) for t in m) for k, m in maps.items()}
        return nn.ParameterDict({name.replace(".", "_"): t for name, t in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        both = (("", self.maps), (_OPENING, self.opening))
        named = {f"{_name(k)}{of}.{part}": t for of, maps in both for k, m in maps.items() for part, t in zip(_PARTS, m, strict=True)}
        return {name: t for name, t in named.items() if t is not None}

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes the maps, beside their place and then renamed: a killed run leaves no half a file."""
        from safetensors.torch import save_file

        tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in self._tensors().items()}
        part = Path(folder, f".{PROJECTION}.{os.getpid()}")
        save_file(tensors, part)
        os.replace(part, Path(folder, PROJECTION))

    def digest(self) -> str:
        """A hash of the maps."""
        tensors = [t for maps in (self.maps, self.opening) for k in sorted(maps, key=layer_list) for t in maps[k] if t is not None]
        parts = [t.detach().cpu().contiguous().numpy().tobytes() for t in tensors]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    @classmethod
    def load(
        cls, folder: str | Path, blocks: Sequence[Layer], width: int, conditioning: str = "projected", digest: str | None = None
    ) -> Projection:
        """Reads the maps of `blocks` (DecoderConfig.maps) for a conditioning of MAPPED; `digest` is the sidecar's, if it names one.

        Raises LqaError if the file is absent, damaged, has another digest, or was made for other layers, width or conditioning.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder, PROJECTION)
        try:
            tensors = load_file(path)
        except FileNotFoundError as error:
            raise LqaError(f"{folder} has no {PROJECTION}, which its conditioning needs; download or train the decoder again.") from error
        except (SafetensorError, OSError) as error:
            raise LqaError(f"{path} is damaged ({error}); download or train the decoder again.") from error
        openings = ("", _OPENING) if any(_OPENING in name for name in tensors) else ("",)
        shapes = {f"{_name(k)}{of}.bias": (width,) for k in blocks for of in openings}
        if conditioning != "centred":
            shapes |= {f"{_name(k)}{of}.weight": (width, width * len(layer_list(k))) for k in blocks for of in openings}
        if {name: tuple(t.shape) for name, t in tensors.items()} != shapes:
            wanted = f"maps of width {width} for the layers {', '.join(map(_name, blocks))} and the conditioning {conditioning!r}"
            raise LqaError(f"{path} does not hold {wanted}; it is another decoder's.")
        if not all(torch.isfinite(t).all() for t in tensors.values()):
            raise LqaError(f"{path} holds values that are not finite; download or train the decoder again.")
        tensors = {name: t.float() for name, t in tensors.items()}
        found = cls(*({k: tuple(tensors.get(f"{_name(k)}{of}.{part}") for part in _PARTS) for k in blocks} for of in openings))
        if digest not in (None, found.digest()):
            raise LqaError(f"{path} has the digest {found.digest()}, but the sidecar names {digest}; it is another decoder's.")
        return found


Map = tuple[Tensor | None, Tensor]  # weight, bias
_PARTS = ("weight", "bias")
_OPENING = ".opening"


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
    return (x if weight is None else x @ weight.to(x).T) + bias.to(x)


def _name(block: Layer) -> str:
    return "+".join(map(str, layer_list(block)))


def condition(
    h: Tensor,
    h0: Tensor | None,
    which: list[int] | None,
    blocks: Sequence[Layer],
    name: str,
    constant: float | None = None,
    projection: Projection | None = None,
    opening: Sequence[bool] | None = None,
) -> Tensor:
    """What is injected, (B * N, D), for activations h (L * N, D), layer after layer, of the L layers of the B `blocks`; differentiable.

    h0     (L * M, D) the reference's activations; None if no token has a reference
    which  the M of a layer's N rows that h0 belongs to; None: all
    opening  which of the M are of the opening; None: none
    """
    sizes = [len(layer_list(block)) for block in blocks]
    own = h.unflatten(0, (sum(sizes), -1)).split(sizes)  # (layers of the block, N, D)
    others = [None] * len(sizes) if h0 is None else h0.unflatten(0, (sum(sizes), -1)).split(sizes)
    parts = zip(own, others, blocks, strict=True)
    return torch.cat([_condition(h, h0, which, block, name, constant, projection, opening) for h, h0, block in parts])


def _condition(
    h: Tensor,
    h0: Tensor | None,
    which: list[int] | None,
    block: Layer,
    name: str,
    constant: float | None,
    projection: Projection | None,
    opening: Sequence[bool] | None,
) -> Tensor:
    """One block: (L, N, D) -> (N, D).  Of merged layers, the middle one stands for what has nothing hidden before it."""
    every, h = h, h[len(h) // 2]
    if name not in CONDITIONINGS:
        raise LqaError(f"The conditioning {name!r} is unknown; supported are {', '.join(CONDITIONINGS)}.")
    if name == "contrast" and h0 is None:
        raise LqaError(
            "This decoder reads what a hidden turn changes, but the span hides none; select tokens of fewer turns, or give a reference "
            "chat."
        )
    if name == "centred":
        return projection(h, block)
    if name == "raw" or h0 is None:
        return h
    own = h if which is None else h[which]
    change = (every if which is None else every[:, which]) - h0  # (L, M, D)
    if name == "contrast":
        conditioned = change[0]
    elif name == "amplified":
        conditioned = own + constant * change[0]
    else:
        conditioned = projection(change.transpose(0, 1).flatten(1), block, opening)
    if len(own) == len(h):
        return conditioned
    return h.index_put((torch.tensor(which, device=h.device),), conditioned.to(h.dtype))


def check_conditioning(name: str, constant: float | None) -> None:
    """Raises LqaError for an unknown conditioning, or a constant that is missing or has no use."""
    if name not in CONDITIONINGS:
        raise LqaError(f"The conditioning {name!r} is unknown; supported are {', '.join(CONDITIONINGS)}.")
    if (constant is not None) != (name == "amplified"):
        wants = "needs a constant" if name == "amplified" else "takes no constant"
        raise LqaError(f"The conditioning {name!r} {wants}, but the constant is {constant!r}.")


class Reference(NamedTuple):
    """The visible turns without the hidden ones: `rendered`, the `places` in it of the tokens that have a reference, which of the span
    these are, and which of those are of the opening: behind something hidden, before any visible word."""

    rendered: Rendered
    places: list[int]
    which: list[int]  # positions in the span, ascending
    opening: list[bool]  # for each of `which`


def reference(
    tokenizer, rendered: Rendered, indices: list[int], steered: bool = False, chat: Chat | None = None
) -> Reference | None:
    """The reference of the tokens in the span that come after a hidden turn; None if none does.  (The template may put its default
    system prompt where a system turn is left out.)

    steered  by something hidden: a token that no hidden turn precedes has a reference too, itself in the unsteered target
    chat     to compare with, in place of the visible turns alone; it must have the visible turns too, and all their tokens have a reference

    Tokens are matched from the end of their turn, since a template may put other headers before a turn that now comes first.
    Raises LqaError if the template does not render the visible turns alone, or renders their tokens differently; or if `chat` lacks one.
    """
    hidden = hidden_turns(rendered, indices)
    visible = [turn for turn in range(len(rendered.chat)) if turn not in hidden]
    if chat is None:
        if not visible or not any(turn < visible[-1] for turn in hidden):
            nothing = [False] * len(indices)
            return Reference(rendered, list(indices), list(range(len(indices))), nothing) if steered else None
        # Turns behind the last visible one change nothing before them, and without them the template would end that one otherwise.
        kept = [turn for turn in range(len(rendered.chat)) if turn not in hidden or turn > visible[-1]]
        try:
            alone = render(tokenizer, [{"role": rendered.chat[t][0], "content": rendered.chat[t][1]} for t in kept])
        except LqaError as error:
            raise LqaError(f"The selected turns cannot be rendered without the hidden ones, select other tokens: {error}") from error
        counterpart = {turn: place for place, turn in enumerate(kept) if any(other < turn for other in hidden)}
    else:
        alone = render(tokenizer, chat)
        counterpart = _counterparts(rendered, visible, alone)
    here, there = _turns(rendered), _turns(alone)
    places, which, begun = [], [], set()
    for n, i in enumerate(indices):
        turn = rendered.tokens[i].turn
        if turn not in counterpart:
            if steered and i < len(alone) and alone.ids[i] == rendered.ids[i]:  # the two chats begin alike
                places.append(i)
                which.append(n)
            continue
        own, other = here[turn], there[counterpart[turn]]
        place = len(other) - (len(own) - own.index(i))
        if place < 0 or alone.ids[other[place]] != rendered.ids[i]:
            if turn not in begun:
                continue  # a template may join a turn to the one before it, and tokens merge there
            text = rendered.tokens[i].text
            raise LqaError(f"Token {i} ({text!r}) has no counterpart {_WHERE[chat is None]}; select whole turns, or all.")
        begun.add(turn)
        places.append(other[place])
        which.append(n)
    if lost := {rendered.tokens[i].turn for i in indices if rendered.tokens[i].turn in counterpart} - begun:
        raise LqaError(f"No selected token of turn {min(lost)} has a counterpart {_WHERE[chat is None]}; select more of it.")
    words = next((i for i, token in enumerate(rendered.tokens) if token.content and token.turn in visible), len(rendered))
    opening = [indices[n] < words and rendered.tokens[indices[n]].turn in counterpart for n in which]
    return Reference(alone, places, which, opening)


_WHERE = {True: "when the hidden turns are left out", False: "in the reference chat"}


def _counterparts(rendered: Rendered, visible: list[int], other: Rendered) -> dict[int, int]:
    """{visible turn: its turn in a reference chat}, found from the end.  Raises LqaError for a turn that is not there."""
    found, place = {}, len(other.chat)
    for turn in reversed(visible):
        place = next((p for p in range(place - 1, -1, -1) if other.chat[p] == rendered.chat[turn]), -1)
        if place < 0:
            role, text = rendered.chat[turn]
            missing = f"the selected turn {turn} ({role}: {text[:40]!r})"
            raise LqaError(f"The reference chat lacks {missing}; give a chat with the same visible turns in the same order.")
        found[turn] = place
    return found


def _turns(rendered: Rendered) -> dict[int, list[int]]:
    turns: dict[int, list[int]] = {}
    for i, token in enumerate(rendered.tokens):
        turns.setdefault(token.turn, []).append(i)
    return turns


def write_layer_means(base, config, texts: Sequence[str]) -> Tensor:
    """(C, D) in float64: the mean over a text's tokens of the write layer's output where the decoder's prompt has them instead of slots.

    That is what the maps of "projected" are fitted to.  `base` is a lqa.models.Base, the bare model is asked; `config` a DecoderConfig.
    """
    start = base.tokenizer(config.prompt.start, add_special_tokens=False)["input_ids"]
    tokens = [(i, base.tokenizer(text, add_special_tokens=False)["input_ids"]) for i, text in enumerate(texts)]
    means = torch.zeros(len(texts), base.hidden_size, dtype=torch.float64)
    for part in by_length(tokens, lambda t: len(t[1])):
        if config.write_layer < 0:
            rows = [base.embeddings(torch.tensor(start + ids, device=base.device)).detach() for _, ids in part]
        else:
            rows = capture_rows(base, [start + ids for _, ids in part], [config.write_layer])[config.write_layer]
        for row, (i, ids) in zip(rows, part, strict=True):
            means[i] = row[len(start) : len(start) + len(ids)].double().mean(0).cpu()
    return means
