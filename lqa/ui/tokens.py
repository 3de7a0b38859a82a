"""What the token strip shows: plain lists and strings, made from a rendered chat."""

from __future__ import annotations

from lqa.chat import PREAMBLE, Rendered, resolve_span
from lqa.errors import LqaError

SPANS = {"all": "all", "system": "system", "user": "user", "assistant": "assistant", "last": "last:1"}  # button: span
MAX_SELECTED = 400


def token_view(rendered: Rendered, selected: list[int] | None = None) -> dict:
    """{"tokens": [{"text", "turn", "role", "special"}, ...], "selected": [index, ...], "spans": {button: indices}, "limit"}.

    Without `selected`, the user's turns are (with the generation header, where there is one).
    """
    tokens = [
        {"text": t.text, "turn": t.turn, "role": "template" if t.turn == PREAMBLE else t.role, "special": not t.content}
        for t in rendered.tokens
    ]
    spans = {button: _indices(span, rendered) for button, span in SPANS.items()}
    return {"tokens": tokens, "selected": spans["user"] if selected is None else selected, "spans": spans, "limit": MAX_SELECTED}


def _indices(span: str, rendered: Rendered) -> list[int]:
    try:
        return resolve_span(span, rendered)
    except LqaError:
        return []  # no turn of that role: the button is switched off


def shows(view: dict | None, rendered: Rendered) -> bool:
    """Whether the strip shows this chat: it does not if the text was edited after its tokens were shown."""
    return bool(view) and [t["text"] for t in view["tokens"]] == [t.text for t in rendered.tokens]


def check_selection(selected: list[int]) -> list[int]:
    """Raises LqaError if nothing or too much is selected."""
    if not selected:
        raise LqaError("No token is selected; click some, or choose a span above them.")
    if len(selected) > MAX_SELECTED:
        raise LqaError(f"{len(selected)} tokens are selected, this page reads at most {MAX_SELECTED}; select fewer.")
    return selected
