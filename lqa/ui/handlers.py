"""What the page's buttons do.  Strings, lists and dicts go in and come out: on ZeroGPU they cross a process boundary.

Nothing is kept between two calls: a call gets all it needs from the page, and one visitor's chat never meets another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import gradio as gr
import spaces

from lqa.chat import Chat, Rendered, render, resolve_span
from lqa.decoder import LatentDecoder
from lqa.errors import LqaError
from lqa.ui.tokens import check_selection, shows, token_view

MAX_CHARACTERS = 4000
GPU_SECONDS = 30
REFERENCES = ("none", "shuffled", "text_only")


class Handlers(NamedTuple):
    show: Callable  # the chat as tokens; no forward pass
    ask: Callable  # a streamed answer, then its references
    read: Callable  # the public endpoint


def chat_of(system: str, user: str, assistant: str = "") -> Chat:
    """The chat of the three boxes; empty system and assistant boxes are no turns.  Raises LqaError if it is too long."""
    turns = {"system": system or "", "user": user or "", "assistant": assistant or ""}
    if (n := sum(map(len, turns.values()))) > MAX_CHARACTERS:
        raise LqaError(f"The chat has {n:,} characters, this page takes at most {MAX_CHARACTERS:,}; shorten it.")
    return [{"role": role, "content": text} for role, text in turns.items() if role == "user" or text.strip()]


def cards(question: str = "", note: str = "", stage: str = "idle", answer: str = "", confidence: float | None = None, **references) -> dict:
    """What the answer cards show.  `stage`: idle, answer (being written), references (being fetched), done."""
    return {
        "question": question,
        "note": note,
        "stage": stage,
        "answer": answer,
        "confidence": confidence,
        "references": {name: references.get(name) for name in REFERENCES},
    }


def make_handlers(decoder: LatentDecoder) -> Handlers:
    """The handlers over one decoder."""

    def rendered(chat: Chat) -> Rendered:
        return render(decoder.base.tokenizer, chat)

    def show(system, user, assistant):
        """-> token strip, notice"""
        try:
            return token_view(rendered(chat_of(system, user, assistant))), ""
        except LqaError as error:
            return gr.skip(), str(error)

    @spaces.GPU(duration=GPU_SECONDS)
    def ask(system, user, assistant, strip, question, layer, previous) -> Iterator[tuple]:
        """-> token strip, answer cards, notice.  What stood in the cards (`previous`) comes back if something is wrong."""
        try:
            chat = chat_of(system, user, assistant)
            view = strip if shows(strip, now := rendered(chat)) else token_view(now)
            reading = decoder.read(chat, check_selection(view["selected"]), int(layer))
            note = f"layer {reading.layer} · {len(reading.span)} token{'s' if len(reading.span) > 1 else ''}"
            text, started = "", False
            for piece in reading.stream(question):
                text += piece
                # The strip is sent once, with the first piece: later it could undo a selection made in the meantime.
                yield gr.skip() if started else view, cards(question, note, "answer", text), ""
                started = True
            yield gr.skip() if started else view, cards(question, note, "references", text.strip()), ""
            answer = reading.ask(question, grounding=True)[0]
            references = {name: getattr(answer.grounding, name) for name in REFERENCES}
            yield gr.skip(), cards(question, note, "done", answer.text, answer.confidence, **references), ""
        except LqaError as error:
            yield gr.skip(), previous, str(error)

    @spaces.GPU(duration=GPU_SECONDS)
    def read(system: str, user: str, question: str, span: str = "user", layer: int | None = None) -> dict[str, object]:
        """Answer a question about a language model from its activations while it reads a chat.

        The answer comes from a decoder that is given the activations of the span, not the chat's text. It can be wrong, so compare it
        with the references: the answers without activations (none), with another chat's (shuffled), and of the bare model given the
        visible text (text_only).

        Args:
            system: The chat's system prompt; empty for none.
            user: The chat's user message.
            question: What to ask about the model, such as "Who is the assistant pretending to be?"
            span: The tokens whose activations are read: all, system, user, turn:T, from:T, last:N, or A:B (token indices).
            layer: The layer to read; null for the decoder's default.
        """
        try:
            chat = chat_of(system, user)
            indices = check_selection(resolve_span(span, rendered(chat)))
            reading = decoder.read(chat, indices, layer)
            answer = reading.ask(question, grounding=True)[0]
        except LqaError as error:
            raise gr.Error(str(error)) from error
        references = {name: getattr(answer.grounding, name) for name in REFERENCES}
        return {"answer": answer.text, "confidence": answer.confidence, "references": references, "layer": reading.layer}

    return Handlers(show, ask, read)
