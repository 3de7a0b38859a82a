"""The tab "Read": tokens of the chat, questions, and answers with what they owe to the activations.

Handlers get all they need from the page and keep nothing: one visitor's chat never meets another's.  Strings, lists and dicts go in and
come out, since on ZeroGPU they cross a process boundary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import spaces

from lqa.activations import Layer
from lqa.chat import Chat, Rendered, render
from lqa.decoder import EMBEDDED_DECODER, Answer, Grounding, LatentDecoder, Reading, TokenScore
from lqa.errors import LqaError
from lqa.ui.components import GPU, QUICK, chips_view, component, fixed, layer_choice, layer_control, runs
from lqa.ui.examples import CHATS, suggestions
from lqa.ui.limits import (
    MAX_FOLLOW_UPS,
    MAX_QUESTIONS,
    MAX_REPLY,
    check_layer,
    check_question,
    check_questions,
    check_selection,
    check_turns,
    lines,
)
from lqa.ui.tokens import follow, span_name, token_view, tokens_of

REFERENCES = ("none", "shuffled", "text_only")


# --- what is shown -------------------------------------------------------------------------------------------------


def item_of(answer: Answer, scores: list[TokenScore] | None = None, references: Grounding | None = None) -> dict:
    """An answer on the page.  `words`: its words, each with its gain; `gain`: nats a token that activations add to its log-probability."""
    gains = [t.logprob - t.logprob_none for t in scores or []]
    return {
        "question": answer.question,
        "text": answer.text,
        "confidence": answer.confidence,
        "cannot_tell": answer.cannot_tell,
        "words": words_of(scores) if scores else None,
        "gain": sum(gains) / len(gains) if gains else None,
        "references": {name: getattr(references, name) for name in REFERENCES} if references else None,
        "follow_ups": [],
    }


def words_of(scores: list[TokenScore]) -> list[dict]:
    """[{"text", "gain"}]: tokens joined to words (with the space before them); the gain is the mean of their tokens', in nats."""
    words: list[list[TokenScore]] = []
    for score in scores:
        if not words or score.text[:1].isspace():
            words.append([])
        words[-1].append(score)
    gains = [sum(t.logprob - t.logprob_none for t in word) / len(word) for word in words]
    return [{"text": "".join(t.text for t in word), "gain": round(gain, 3)} for word, gain in zip(words, gains, strict=True)]


def answers_view(stage: str = "idle", items: list[dict] | None = None, note: str = "", reading: dict | None = None, code: str = "") -> dict:
    """What the answers show.  `reading`: {"chat", "span", "layer", "tokens"}; `stage`: idle,
    reading, answers, grounding, references, done; stopping, stopped."""
    return {"stage": stage, "items": items or [], "note": note, "reading": reading, "code": code, "ask": None, "most": MAX_FOLLOW_UPS}


def code_of(decoder: LatentDecoder, chat: Chat, span: str | list[int], layer: Layer, questions: list[str]) -> str:
    """A script that repeats a reading with `lqa`."""
    known = Path(decoder.name).exists()
    source = "" if decoder.name == str(EMBEDDED_DECODER) else json.dumps(Path(decoder.name).name if known else decoder.name)
    turns = "".join(f"    {json.dumps(turn, ensure_ascii=False)},\n" for turn in chat)
    asked = "".join(f"    {json.dumps(q, ensure_ascii=False)},\n" for q in questions)
    return (
        f"import lqa\n\ndecoder = lqa.LatentDecoder.from_pretrained({source})\nchat = [\n{turns}]\n"
        f"reading = decoder.read(chat, span={json.dumps(span)}, layer={layer})\nquestions = [\n{asked}]\n"
        "for answer in reading.ask(questions, grounding=True):\n    print(answer.text, answer.confidence, answer.grounding)\n"
    )


# --- what the buttons do ---------------------------------------------------------------------------------------------


class Handlers(NamedTuple):
    show: Callable  # the chat as tokens; no forward pass
    reply: Callable  # the target's own reply, into the chat
    ask: Callable  # streamed answers, then what they owe to the activations
    follow_up: Callable  # a question that refers to an answer


def seconds(chat, strip, questions, layer, previous) -> int:
    """GPU time asked for: a few seconds for each question and its references."""
    return 8 + 4 * min(len(lines(questions)), MAX_QUESTIONS)


def make_handlers(decoder: LatentDecoder) -> Handlers:
    def rendered(chat: Chat) -> Rendered:
        return render(decoder.base.tokenizer, chat)

    def show(chat, strip):
        """-> token strip, notice"""
        try:
            return follow(strip, rendered(check_turns(chat))), ""
        except LqaError as error:
            return gr.skip(), str(error)

    @spaces.GPU(duration=15)
    def reply(chat) -> Iterator[tuple]:
        """-> chat, notice"""
        try:
            turns, text = check_turns(chat), ""
            for piece in decoder.stream_reply(turns, max_new_tokens=MAX_REPLY):
                text += piece
                yield {"turns": [*turns, {"role": "assistant", "content": text.lstrip()}], "busy": True}, ""
            if not text.strip():
                raise LqaError("The model ends its turn at once: it has no reply to this chat.")
            yield {"turns": [*turns, {"role": "assistant", "content": text.strip()}], "busy": False}, ""
        except LqaError as error:
            yield {"turns": chat.get("turns", []) if isinstance(chat, dict) else [], "busy": False}, str(error)

    def answer(reading: Reading, questions: list[str], after: list[tuple[str, str]]) -> Iterator[tuple[str, list[dict]]]:
        """(stage, items): answers as they grow, then their grounding, then their references; nothing is decoded twice."""
        answers: list[Answer] = []
        for answers in reading.answers(questions, after=after):
            yield "answers", [item_of(a) for a in answers]
        yield "grounding", [item_of(a) for a in answers]
        said = [a for a in answers if a.text]
        found = iter(reading.token_scores([(a.question, a.text) for a in said], after=after) if said else [])
        scores = [next(found) if a.text else None for a in answers]
        yield "references", [item_of(*pair) for pair in zip(answers, scores, strict=True)]
        references = reading.references(questions, after=after)
        yield "done", [item_of(*row) for row in zip(answers, scores, references, strict=True)]

    @spaces.GPU(duration=seconds)
    def ask(chat, strip, questions, layer, previous) -> Iterator[tuple]:
        """-> token strip, answers, notice.  What stood in the answers (`previous`) comes back if something is wrong."""
        try:
            turns, asked = check_turns(chat), check_questions(questions)
            strip = follow(strip, now := rendered(turns))
            span = check_selection(strip["selected"])
            name = span_name(span, strip["spans"])
            name = "last:1" if name == "last" else name
            blank = [item_of(Answer(q, "", 0.0)) for q in asked]
            yield strip, answers_view("reading", blank), ""
            reading = decoder.read(turns, span, check_layer(layer))
            about = {"chat": turns, "span": span, "layer": reading.layer, "tokens": [t["text"] for t in tokens_of(now)]}
            note = f"layer {layer_choice(reading.layers)} · {len(span)} token{'s' if len(span) > 1 else ''}"
            code = code_of(decoder, turns, name or span, reading.layer, asked)
            # The strip is sent once: later it could undo a selection made in the meantime.
            for stage, items in answer(reading, asked, []):
                yield gr.skip(), answers_view(stage, items, note, about, code), ""
        except LqaError as error:
            yield gr.skip(), previous if isinstance(previous, dict) else answers_view(), str(error)

    @spaces.GPU(duration=12)
    def follow_up(view) -> Iterator[tuple]:
        """-> answers, notice.  The question is in the view's "ask": {"item", "question"}."""
        before = view | {"ask": None} if isinstance(view, dict) else answers_view()
        try:
            try:
                asked, about, items = view["ask"], view["reading"], list(view["items"])
                item, note, code = items[int(asked["item"])], str(view["note"]), str(view["code"])
                question, earlier = asked["question"], [(i["question"], i["text"]) for i in (item, *item["follow_ups"])]
                chat, span, layer = about["chat"], about["span"], about["layer"]
                if not all(isinstance(t, str) for pair in earlier for t in pair):
                    raise TypeError("no text")
            except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
                raise LqaError("There is no answer to ask further about; ask a question first.") from error
            question = check_question(question, "The follow-up question")
            if len(earlier) > MAX_FOLLOW_UPS:
                raise LqaError(f"There are {MAX_FOLLOW_UPS} follow-up questions, which is as many as this page takes; ask anew.")
            for text in (text for pair in earlier for text in pair):
                if len(text) > 2000:
                    raise LqaError("The earlier answer is too long to ask further about; ask anew.")
            reading = decoder.read(check_turns(chat), check_selection(span), check_layer(layer))
            for stage, (new,) in answer(reading, [question], earlier):
                items[int(asked["item"])] = item | {"follow_ups": [*item["follow_ups"], new]}
                yield answers_view(stage, items, note, about, code), ""
        except LqaError as error:
            yield before, str(error)

    return Handlers(show, reply, ask, follow_up)


def toggle_question(chips, questions):
    """-> questions.  A suggestion is added to the box, or taken out again."""
    try:
        group, i = chips["pick"]
        text = list(suggestions().values())[group][i]
    except (TypeError, KeyError, IndexError):
        return gr.skip()
    now = lines(questions)
    return "\n".join([q for q in now if q != text] if text in now else [*now, text])


# --- the tab -----------------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """The components that other parts of the page read or fill."""

    strip: gr.HTML
    layer: gr.Component
    questions: gr.Textbox
    answers: gr.HTML
    notice: gr.HTML


def read_tab(decoder: LatentDecoder, handlers: Handlers, chat: gr.HTML) -> Read:
    """Builds the tab over the page's chat editor."""
    turns, question = next(iter(CHATS.values()))
    fixed("<h2>Which tokens?</h2><p>The decoder gets the activations of these tokens and no text; the rest is hidden from it.</p>")
    strip = component("tokens", token_view(render(decoder.base.tokenizer, turns)), "tokens")
    fixed("<h2>Which questions?</h2>")
    chips = component("chips", chips_view("Suggested questions", suggestions()), "suggestions")
    with gr.Row(equal_height=True, elem_id="question-row"):
        questions = gr.Textbox(
            question,
            label="Questions, one a line",
            lines=2,
            max_lines=MAX_QUESTIONS,
            min_width=260,
            scale=5,
            elem_id="questions",
            info="Shift + Enter asks",
        )
        layer = layer_control(decoder.config, "layer")
    with gr.Row(elem_classes="buttons"):
        ask = gr.Button("Ask", variant="primary", elem_id="ask")
        stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=90)
    notice = component("notice", "", "ask-notice")
    answers = component("answers", answers_view(), "answers")

    inputs, outputs = [chat, strip, questions, layer, answers], [strip, answers, notice]
    runs([ask.click, questions.submit], handlers.ask, inputs, outputs, answers, stop, **GPU)
    runs([answers.submit], handlers.follow_up, answers, [answers, notice], answers, stop, **GPU)
    chips.select(toggle_question, [chips, questions], questions, **QUICK)
    return Read(strip, layer, questions, answers, notice)
