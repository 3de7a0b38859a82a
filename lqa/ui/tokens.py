"""What the token strip shows: plain lists and strings, made from a rendered chat."""

from __future__ import annotations

from lqa.chat import PREAMBLE, Rendered, resolve_span
from lqa.errors import LqaError
from lqa.ui.limits import MAX_SELECTED

SPANS = {"all": "all", "system": "system", "user": "user", "assistant": "assistant", "last": "last:1"}  # button: span


def tokens_of(rendered: Rendered) -> list[dict]:
    """[{"text", "turn", "role", "special"}, ...]"""
    return [
        {"text": t.text, "turn": t.turn, "role": "template" if t.turn == PREAMBLE else t.role, "special": not t.content}
        for t in rendered.tokens
    ]


def token_view(rendered: Rendered, selected: list[int] | str = "user") -> dict:
    """{"tokens", "selected": [index, ...], "spans": {button: indices}, "limit"}; `selected` may name a button."""
    spans = {button: _indices(span, rendered) for button, span in SPANS.items()}
    if isinstance(selected, str):
        selected = spans.get(selected) or spans["user"]
    return {"tokens": tokens_of(rendered), "selected": selected, "spans": spans, "limit": MAX_SELECTED}


def _indices(span: str, rendered: Rendered) -> list[int]:
    try:
        return resolve_span(span, rendered)
    except LqaError:
        return []  # no turn of that role: the button is switched off


def follow(view, rendered: Rendered) -> dict:
    """The strip for a chat, given the strip as it was: unchanged for the same chat, else with the same button pressed."""
    try:
        if [t["text"] for t in view["tokens"]] == [t.text for t in rendered.tokens]:
            return view | {"tokens": tokens_of(rendered), "spans": {b: _indices(s, rendered) for b, s in SPANS.items()}}
        return token_view(rendered, span_name(view["selected"], view["spans"]) or "user")
    except (TypeError, KeyError, AttributeError):  # no strip yet, or one that no page sends
        return token_view(rendered)


def span_name(selected: list[int], spans: dict[str, list[int]]) -> str | None:
    """The button that selects just these tokens."""
    return next((button for button, indices in spans.items() if indices and indices == selected), None)
