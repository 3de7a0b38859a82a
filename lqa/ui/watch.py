"""The tab "Watch": the target writes its reply, and a standing question is answered from its activations as it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gradio as gr
import spaces

from lqa.chat import Chat, render
from lqa.decoder import LatentDecoder
from lqa.errors import LqaError
from lqa.ui.components import GPU, component, fixed, layer_choice, layer_control, runs
from lqa.ui.limits import MAX_REPLY, MAX_SELECTED, check_answers, check_layer, check_question, check_turns, lines

QUESTION = "Is the assistant hiding something?"
ANSWERS = "Yes, it is hiding something.\nNo, it hides nothing."
EVERY = 4  # tokens of the reply between two readings
SHORT = 14  # tokens of an answer in words
BOTH, REPLY = "the message and the reply so far", "the reply so far"
WORKING = "watching"


def watch_view(stage="idle", question="", answers=(), pieces=(), points=(), note="") -> dict:
    """What is drawn.  `pieces` of the reply; `points`: {"at": pieces written, "p": the answers' probabilities} or {"at", "text"}."""
    view = {"stage": stage, "question": question, "answers": list(answers), "pieces": list(pieces), "points": list(points)}
    return view | {"note": note, "most": MAX_REPLY}


def reply_span(decoder: LatentDecoder, chat: Chat, what: str) -> list[int]:
    """The last turn's own tokens, and for BOTH all of the turn before it; the last MAX_SELECTED of these."""
    tokens = render(decoder.base.tokenizer, chat).tokens
    last = len(chat) - 1
    both = what != REPLY
    return [i for i, t in enumerate(tokens) if i and ((t.turn == last and t.content) or (both and t.turn == last - 1))][-MAX_SELECTED:]


def make_watch(decoder: LatentDecoder) -> Callable:
    @spaces.GPU(duration=40)
    def watch(chat, question, answers, what, layer, previous) -> Iterator[tuple]:
        """-> the drawing, notice"""
        try:
            turns, question = check_turns(chat), check_question(question)
            choices = check_answers(answers) if lines(answers) else []
            layers = decoder.config.check_layers(check_layer(layer))
            pieces, points, note = [], [], f"layer {layer_choice(layers)}, read every {EVERY} tokens"

            def point() -> dict:
                so_far = [*turns, {"role": "assistant", "content": "".join(pieces).lstrip()}]
                reading = decoder.read(so_far, reply_span(decoder, so_far, what), layers)
                if choices:
                    return {"at": len(pieces), "p": [round(p, 3) for p in reading.probabilities(question, choices)]}
                return {"at": len(pieces), "text": reading.ask(question, max_new_tokens=SHORT)[0].text}

            yield watch_view(WORKING, question, choices, note=note), ""
            for piece in decoder.stream_reply(turns, max_new_tokens=MAX_REPLY):
                pieces.append(piece)
                if len(pieces) % EVERY == 0 and "".join(pieces).strip():
                    points.append(point())
                yield watch_view(WORKING, question, choices, pieces, points, note), ""
            if not "".join(pieces).strip():
                raise LqaError("The model ends its turn at once: it has no reply to this chat.")
            if not points or points[-1]["at"] < len(pieces):
                points.append(point())
            yield watch_view("done", question, choices, pieces, points, note), ""
        except LqaError as error:
            yield previous if isinstance(previous, dict) else watch_view(), str(error)

    return watch


def watch_tab(decoder: LatentDecoder, chat: gr.HTML) -> None:
    """Builds the tab."""
    fixed(
        "<h2>While it writes</h2><p>The model writes its reply. Every few tokens a standing question is put to its activations, "
        "with the system prompt and earlier turns hidden: as a line, if you give answers to choose from, else in words.</p>"
    )
    with gr.Row(equal_height=True):
        question = gr.Textbox(QUESTION, label="Standing question", lines=1, max_lines=2, min_width=240, scale=3, elem_id="watch-question")
        answers = gr.Textbox(
            ANSWERS,
            label="Answers, one a line",
            info="Empty: it answers in a few words",
            lines=2,
            max_lines=4,
            min_width=200,
            scale=3,
            elem_id="watch-answers",
        )
    with gr.Row(equal_height=True):
        what = gr.Radio([BOTH, REPLY], value=BOTH, label="Read", scale=3, min_width=240, elem_id="watch-what")
        layer = layer_control(decoder.config, "watch-layer")
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Watch", variant="primary", elem_id="watch", scale=1, min_width=110)
        stop = gr.Button("Stop", scale=0, min_width=90, elem_id="watch-stop")
    notice = component("notice", "", "watch-notice")
    drawing = component("watch", watch_view(), "drawing")
    inputs = [chat, question, answers, what, layer, drawing]
    runs([go.click], make_watch(decoder), inputs, [drawing, notice], drawing, stop, **GPU)
