"""The tab "Scan": one question with short answers, asked of every token alone at every layer, drawn as a heatmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import gradio as gr
import spaces

from lqa.chat import render
from lqa.decoder import LatentDecoder
from lqa.errors import LqaError
from lqa.scan import scan
from lqa.ui.components import GPU, QUICK, component, fixed, layer_choice, runs
from lqa.ui.limits import MAX_ANSWERS, MAX_SCANNED, check_answers, check_layer, check_question, check_turns
from lqa.ui.read import Read
from lqa.ui.tokens import follow, token_view, tokens_of

EVERY, SELECTED = "every token", "the tokens selected in Read"
QUESTION = "Who is the assistant pretending to be?"
ANSWERS = "A pirate captain.\nA night nurse.\nA teacher."
WORKING = "scanning"


def scan_view(stage="idle", question="", answers=(), tokens=(), layers=(), cells=None, note="", shown=0) -> dict:
    """What the heatmap shows.  `cells`: {layer: [probabilities of the answers, or None, for every token]}; `shown`: the answer drawn."""
    view = {"stage": stage, "question": question, "answers": list(answers), "tokens": list(tokens), "layers": [str(k) for k in layers]}
    return view | {"cells": cells or {}, "note": note, "shown": shown, "pick": None}


class Handlers(NamedTuple):
    scan: Callable  # the heatmap as it fills
    pick: Callable  # a clicked cell, opened in Read


def make_handlers(decoder: LatentDecoder) -> Handlers:
    @spaces.GPU(duration=30)
    def run(chat, strip, question, answers, what, previous) -> Iterator[tuple]:
        """-> heatmap, notice"""
        try:
            turns, question, answers = check_turns(chat), check_question(question), check_answers(answers)
            rendered = render(decoder.base.tokenizer, turns)
            span = follow(strip, rendered)["selected"] if what == SELECTED else list(range(1, len(rendered)))
            if not isinstance(span, list) or len(span) > MAX_SCANNED:
                raise LqaError(f"Scan takes at most {MAX_SCANNED} tokens, not {len(span)}; shorten the chat, or select some in Read.")
            readings, default = decoder.config.readings, decoder.config.check_layers(None)
            # The default layer first: it is the one that says most.
            order = sorted(readings, key=lambda layers: layers != default)
            layers = list(map(layer_choice, readings))
            cells: dict[str, list] = {str(k): [None] * len(rendered) for k in layers}
            head = question, answers, tokens_of(rendered), layers
            yield scan_view(WORKING, *head), ""
            done, total = 0, len(span) * len(layers)
            for part in scan(decoder, turns, question, answers, span, order):
                for cell in part:
                    cells[str(layer_choice(cell.layer))][cell.token] = [round(p, 3) for p in cell.probabilities]
                done += len(part)
                so_far = {layer: list(row) for layer, row in cells.items()}
                yield scan_view(WORKING if done < total else "done", *head, so_far, f"{done} of {total} cells"), ""
        except LqaError as error:
            yield previous if isinstance(previous, dict) else scan_view(), str(error)

    def pick(view, chat):
        """-> tabs, token strip, layer, questions, notice"""
        try:
            rendered = render(decoder.base.tokenizer, check_turns(chat))
            try:
                cell, tokens, question = view["pick"], view["tokens"], str(view["question"])
                token, layer = int(cell["token"]), str(cell["layer"])
                same = [t["text"] for t in tokens] == [t.text for t in rendered.tokens]
            except (TypeError, KeyError, ValueError) as error:
                raise LqaError("That is no cell of a scan; click one.") from error
            if not same or not 0 < token < len(rendered):
                raise LqaError("The chat has changed since this scan; scan it again.")
            layer = layer_choice(decoder.config.check_layers(check_layer(layer)))
            return gr.update(selected="read"), token_view(rendered, [token]), layer, question, ""
        except LqaError as error:
            return *(gr.skip(),) * 4, str(error)

    return Handlers(run, pick)


def scan_tab(decoder: LatentDecoder, chat: gr.HTML, read: Read, tabs: gr.Tabs) -> None:
    """Builds the tab."""
    handlers = make_handlers(decoder)
    fixed(
        "<h2>Where is it?</h2><p>One question with a few short answers, asked of every token alone, at every layer that the decoder reads. "
        "The colour is an answer's probability among them, by how much the activations raise it. Click a cell to open it in Read.</p>"
    )
    with gr.Row(equal_height=True):
        question = gr.Textbox(QUESTION, label="Question", lines=1, max_lines=2, min_width=240, scale=3, elem_id="scan-question")
        answers = gr.Textbox(
            ANSWERS, label="Answers, one a line", lines=3, max_lines=MAX_ANSWERS, min_width=200, scale=2, elem_id="scan-answers"
        )
    what = gr.Radio([EVERY, SELECTED], value=EVERY, label="Scan", elem_id="scan-what")
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Scan", variant="primary", elem_id="scan", scale=1, min_width=110)
        stop = gr.Button("Stop", scale=0, min_width=90, elem_id="scan-stop")
    notice = component("notice", "", "scan-notice")
    heat = component("heat", scan_view(), "heat")
    inputs = [chat, read.strip, question, answers, what, heat]
    runs([go.click], handlers.scan, inputs, [heat, notice], heat, stop, **GPU)
    heat.select(handlers.pick, [heat, chat], [tabs, read.strip, read.layer, read.questions, notice], **QUICK)
