"""The public endpoints, which are also tools for agents (MCP): `read`, `score` and `steer`.  Everything else on the page is private."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gradio as gr
import spaces

from lqa.chat import Chat
from lqa.decoder import LatentDecoder, Reading
from lqa.errors import LqaError
from lqa.ui.components import GPU
from lqa.ui.limits import (
    MAX_ANSWERS,
    MAX_STEPS,
    check_answers,
    check_control,
    check_layer,
    check_question,
    check_selection,
    check_turns,
)
from lqa.ui.read import REFERENCES
from lqa.ui.steer import LEAST_STEPS, STEER, STEPS, STRONGEST, side_by_side


class Endpoints(NamedTuple):
    read: Callable
    score: Callable
    steer: Callable


def make_endpoints(decoder: LatentDecoder) -> Endpoints:
    def reading_of(system, user, assistant, span, layer) -> Reading:
        if not all(isinstance(text, str | None) for text in (system, user, assistant)):
            raise LqaError("system, user and assistant must be text.")
        turns: Chat = [{"role": r, "content": t or ""} for r, t in (("system", system), ("user", user), ("assistant", assistant))]
        if not isinstance(span, str) or len(span) > 40:
            raise LqaError("The span must be one of all, system, user, assistant, turn:T, from:T, last:N, A:B.")
        reading = decoder.read(check_turns(turns), span, check_layer(layer))
        check_selection(list(reading.span))
        return reading

    # A class that Gradio does not know reaches the caller as its name only: LqaError becomes gr.Error, which carries the sentence.
    @spaces.GPU(duration=15)
    def read(
        system: str, user: str, question: str, span: str = "user", layer: int | None = None, assistant: str = ""
    ) -> dict[str, object]:
        """Answer a question about a language model from its activations while it reads a chat.

        The answer comes from a decoder that is given the activations of the span, not the chat's text. It can be wrong, so compare it
        with the references: the answers without activations (none), with another chat's (shuffled), and of the bare model given the
        visible text (text_only).

        Args:
            system: The chat's system prompt; empty for none.
            user: The chat's user message.
            question: What to ask about the model, such as "Who is the assistant pretending to be?"
            span: The tokens whose activations are read: all, system, user, assistant, turn:T, from:T, last:N, or A:B (token indices).
            layer: The layer to read; null for the decoder's default.
            assistant: The assistant's reply to the user's message; empty for none.

        Returns:
            answer (text), confidence (0 to 1), cannot_tell (whether the answer is but a guess), references (text by name), layer.
        """
        try:
            question = check_question(question)
            reading = reading_of(system, user, assistant, span, layer)
            answer = reading.ask(question, grounding=True)[0]
        except LqaError as error:
            raise gr.Error(str(error), print_exception=False) from error
        references = {name: getattr(answer.grounding, name) for name in REFERENCES}
        sure = {"confidence": answer.confidence, "cannot_tell": answer.cannot_tell}
        return {"answer": answer.text, **sure, "references": references, "layer": reading.layer}

    @spaces.GPU(duration=10)
    def score(
        system: str, user: str, question: str, answers: list[str], span: str = "user", layer: int | None = None, assistant: str = ""
    ) -> dict[str, object]:
        """Say how probable each of some answers to a question about a language model is, by its activations while it reads a chat.

        Args:
            system: The chat's system prompt; empty for none.
            user: The chat's user message.
            question: What to ask about the model, such as "How will the assistant speak?"
            answers: Two to six short answers to compare, such as ["Like a pirate.", "Formally."]
            span: The tokens whose activations are read: all, system, user, assistant, turn:T, from:T, last:N, or A:B (token indices).
            layer: The layer to read; null for the decoder's default.
            assistant: The assistant's reply to the user's message; empty for none.

        Returns:
            question, layer, and answers: for each its text, its mean log-probability per token in nats with the activations (logprob) and
            without them (logprob_none), and its probability among the answers if all were equally probable without activations.
        """
        try:
            question = check_question(question)
            if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers) or len(answers) > MAX_ANSWERS:
                raise LqaError(f"answers must be a list of 2 to {MAX_ANSWERS} texts.")
            texts = check_answers("\n".join(a.replace("\n", " ") for a in answers))
            reading = reading_of(system, user, assistant, span, layer)
            scores, probabilities = reading.score(question, texts), reading.probabilities(question, texts)
        except LqaError as error:
            raise gr.Error(str(error), print_exception=False) from error
        rows = [
            {"text": s.text, "logprob": s.logprob, "logprob_none": s.logprob_none, "probability": p}
            for s, p in zip(scores, probabilities, strict=True)
        ]
        return {"question": question, "layer": reading.layer, "answers": rows}

    @spaces.GPU(duration=60)
    def steer(control: str, user: str, system: str = "", strength: float = 1.0, steps: int = STEPS) -> dict[str, object]:
        """Make a language model behave as told by a small LoRA trained through a decoder of its activations, and compare its replies.

        Takes a few seconds a step without a GPU.

        Args:
            control: How the model shall behave, such as "Speak like a pirate."
            user: The user message that the unsteered and the steered model reply to.
            system: A system prompt for both; empty for none.
            strength: 0 is the unsteered model, 1 the steering as trained, negative goes the other way; from -3 to 3.
            steps: The most training steps, from 5 to 60.

        Returns:
            baseline and steered (the two replies, greedy), qa (what the decoder was trained to read, as question and answer), loss
            (nats per token, on held-out chats), steps (taken).
        """
        try:
            control = check_control(control)
            if not all(isinstance(text, str) for text in (system, user)):
                raise LqaError("system and user must be text.")
            chat = check_turns([{"role": "system", "content": system}, {"role": "user", "content": user}])
            if not isinstance(strength, int | float) or not -STRONGEST <= strength <= STRONGEST:
                raise LqaError(f"The strength must be from {-STRONGEST:g} to {STRONGEST:g}, not {strength!r}.")
            if not isinstance(steps, int) or not LEAST_STEPS <= steps <= MAX_STEPS:
                raise LqaError(f"The number of steps must be from {LEAST_STEPS} to {MAX_STEPS}, not {steps!r}.")
            steering = decoder.steer(control=control, steps=steps)
            try:
                *_, (baseline, steered) = side_by_side(decoder, steering, chat, strength, 0.0, 0)
            finally:
                steering.remove()
        except LqaError as error:
            raise gr.Error(str(error), print_exception=False) from error
        record = steering.record
        return {"baseline": baseline.strip(), "steered": steered.strip()} | {key: record[key] for key in ("qa", "loss", "steps")}

    return Endpoints(read, score, steer)


def add_endpoints(decoder: LatentDecoder) -> None:
    """Adds them to the Blocks under construction."""
    endpoints = make_endpoints(decoder)
    for name in endpoints._fields:
        gr.api(getattr(endpoints, name), api_name=name, **STEER if name == "steer" else GPU)
