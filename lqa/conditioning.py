"""Conditioning: what is done to activations before they are injected.

A hidden turn changes the activations of later tokens by about a tenth of their norm; the rest is the visible text.  The reference is the
same visible turns without the hidden context, so that the difference is what the hidden context alone has done.

    raw        h
    contrast   h - h0
    amplified  h + a (h - h0)     equal to raw where nothing is hidden
"""

from __future__ import annotations

from torch import Tensor

from lqa.chat import Rendered, hidden_turns, render
from lqa.errors import LqaError

CONDITIONINGS = ("raw", "contrast", "amplified")


def condition(h: Tensor, h0: Tensor, name: str, constant: float | None) -> Tensor:
    """What is injected for activations h with the reference's h0, both (N, D); differentiable in both."""
    if name == "raw":
        return h
    if name == "contrast":
        return h - h0
    if name == "amplified":
        return h + constant * (h - h0)
    raise LqaError(f"The conditioning {name!r} is unknown; supported are {', '.join(CONDITIONINGS)}.")


def check_conditioning(name: str, constant: float | None) -> None:
    """Raises LqaError for an unknown conditioning, or a constant that is missing or has no use."""
    if name not in CONDITIONINGS:
        raise LqaError(f"The conditioning {name!r} is unknown; supported are {', '.join(CONDITIONINGS)}.")
    if (constant is not None) != (name == "amplified"):
        wants = "needs a constant" if name == "amplified" else "takes no constant"
        raise LqaError(f"The conditioning {name!r} {wants}, but the constant is {constant!r}.")


def reference(tokenizer, rendered: Rendered, indices: list[int]) -> tuple[Rendered, list[int]] | None:
    """The visible turns alone, and where the span's tokens stand in them; None if nothing (or everything) is hidden.

    Tokens are matched from the end of their turn, since a template may put other headers before a turn that now comes first.
    Raises LqaError if the template does not render the visible turns alone, or renders their tokens differently.
    """
    hidden = hidden_turns(rendered, indices)
    visible = [turn for turn in range(len(rendered.chat)) if turn not in hidden]
    if not hidden or not visible:
        return None
    alone = render(tokenizer, [{"role": rendered.chat[t][0], "content": rendered.chat[t][1]} for t in visible])
    here, there = _turns(rendered), _turns(alone)
    places = []
    for i in indices:
        turn = rendered.tokens[i].turn
        own = here[turn]
        other = there.get(visible.index(turn) if turn >= 0 else turn, [])
        place = len(other) - (len(own) - own.index(i))
        if place < 0 or alone.ids[other[place]] != rendered.ids[i]:
            raise LqaError(
                f"Token {i} ({rendered.tokens[i].text!r}) has no counterpart when the hidden turns are left out; "
                "select whole turns, or all."
            )
        places.append(other[place])
    return alone, places


def _turns(rendered: Rendered) -> dict[int, list[int]]:
    turns: dict[int, list[int]] = {}
    for i, token in enumerate(rendered.tokens):
        turns.setdefault(token.turn, []).append(i)
    return turns
