"""The link that restores chat, span, layer and questions: all of it stands behind the "#", which browsers keep to themselves."""

from __future__ import annotations

import json

import gradio as gr

from lqa.chat import render
from lqa.decoder import LatentDecoder
from lqa.errors import LqaError
from lqa.ui.components import QUICK, component, layer_choice
from lqa.ui.limits import check_layer, check_questions, check_selection, check_turns
from lqa.ui.read import Read
from lqa.ui.tokens import token_view

MAX_LINK = 20_000  # characters of JSON

# (chat, strip, layer, questions) -> the address.  A span that a button selects goes by its name, so that a link may be written by hand.
MAKE = """(chat, strip, layer, questions) => {
    const chosen = strip.selected || [], spans = strip.spans || {};
    const same = (span) => span.length > 0 && span.length === chosen.length && span.every((t, i) => t === chosen[i]);
    const name = Object.keys(spans).find((key) => same(spans[key]));
    const turns = chat.turns.filter((turn) => turn.content.trim());
    const bytes = new TextEncoder().encode(JSON.stringify({ chat: turns, span: name || chosen, layer, questions }));
    let binary = "";
    bytes.forEach((byte) => { binary += String.fromCharCode(byte); });
    const url = new URL(location.href);
    url.hash = "read=" + btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
    history.replaceState(null, "", url);
    if (navigator.clipboard) navigator.clipboard.writeText(url.href).catch(() => {});
    return url.href;
}"""
# The page's own address -> the JSON in it; "" where there is none, and something that is no JSON where it is damaged.
READ = """() => {
    const found = location.hash.match(/^#read=([\\w-]+)$/);
    if (!found) return location.hash.startsWith("#read=") ? "damaged" : "";
    try {
        const binary = atob(found[1].replaceAll("-", "+").replaceAll("_", "/"));
        return new TextDecoder().decode(Uint8Array.from(binary, (c) => c.charCodeAt(0)));
    } catch { return "damaged"; }
}"""


def make_restore(decoder: LatentDecoder):
    def restore(text):
        """-> chat, token strip, layer, questions, notice"""
        if not text:
            return (gr.skip(),) * 5
        try:
            try:
                state = json.loads(text) if isinstance(text, str) and len(text) <= MAX_LINK else None
                chat, span, layer, questions = (state[key] for key in ("chat", "span", "layer", "questions"))
            except (json.JSONDecodeError, TypeError, KeyError, RecursionError) as error:
                raise LqaError("The link is damaged: it cannot be read; make it again.") from error
            turns = check_turns(chat)
            rendered = render(decoder.base.tokenizer, turns)
            if not isinstance(span, str):
                span = check_selection(span)
                if not all(isinstance(i, int) and 0 < i < len(rendered) for i in span):
                    raise LqaError("The link names tokens that this chat does not have.")
            layer = layer_choice(decoder.config.check_layers(check_layer(layer)))
            questions = "\n".join(check_questions(questions))
            view = token_view(rendered, span)
            if isinstance(span, str) and not view["spans"].get(span):
                raise LqaError("The link names a span that this chat does not have.")
            return {"turns": turns, "busy": False}, view, layer, questions, ""
        except LqaError as error:
            return *(gr.skip(),) * 4, str(error)

    return restore


def add_link(demo: gr.Blocks, decoder: LatentDecoder, chat: gr.HTML, read: Read, notice: gr.HTML, share: gr.Button) -> None:
    """The button that makes a link, the box it is shown in (here), and what happens when a page is opened by one."""
    address = component("link", "", "address")
    state = gr.Textbox(visible=False)
    parts = [chat, read.strip, read.layer, read.questions]
    share.click(None, parts, address, js=MAKE, **QUICK)
    demo.load(make_restore(decoder), state, [*parts, notice], js=READ, **QUICK)
