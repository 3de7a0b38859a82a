"""The page: a chat on the left, and what can be done with it in tabs on the right."""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: nothing on this page calls home

import html
from pathlib import Path

import gradio as gr

from lqa.decoder import LatentDecoder
from lqa.ui.api import add_endpoints
from lqa.ui.components import GPU, PAGE_CSS, PRIVATE, QUICK, chips_view, component, fixed
from lqa.ui.examples import CHATS
from lqa.ui.learn import learn_tab, open_lesson
from lqa.ui.limits import LIMITS
from lqa.ui.link import add_link
from lqa.ui.read import make_handlers, read_tab
from lqa.ui.scan import scan_tab
from lqa.ui.steer import steer_tab
from lqa.ui.watch import watch_tab

# The semi-bold files that Gradio bundles hold a few letters only; with 700 in their place, headings use the bold face.
FONT, FONT_MONO = (gr.themes.LocalFont(name, weights=(400, 700)) for name in ("IBM Plex Sans", "IBM Plex Mono"))

NOT_BUSY = "(chat) => ({...chat, busy: false})"  # behind a reply, also one that was stopped

INTRO = """
<h1>Ask what a language model has in mind</h1>
<p>A model reads the chat. The activations of the tokens that you select, and no text, are handed to a <b>decoder</b>: the same model
with a small LoRA, trained to answer questions about activations in words. It can be wrong and it can invent; so every question is also
answered without these activations. What those answers say as well, the activations did not add.</p>
"""


def build(decoder: LatentDecoder) -> gr.Blocks:
    """The demo over one decoder; `launch` starts it."""
    handlers = make_handlers(decoder)
    with gr.Blocks(title="lqa: ask a language model about its activations", analytics_enabled=False, delete_cache=(3600, 7200)) as demo:
        with gr.Column(elem_id="lqa-page"):
            fixed(INTRO, "intro")
            with gr.Row(equal_height=False, elem_id="columns"):
                with gr.Column(scale=4, min_width=300, elem_id="chat-column"):
                    fixed("<h2>A chat</h2>")
                    examples = component("chips", chips_view("Examples", {"": list(CHATS)}), "examples")
                    turns, _ = next(iter(CHATS.values()))
                    chat = component("chat", {"turns": turns, "busy": False}, "chat")
                    chat_notice = component("notice", "", "chat-notice")
                    share = gr.Button("Copy a link to this reading", size="sm", elem_id="share")
                    link_place = gr.Column(elem_id="link")
                with gr.Column(scale=7, min_width=320, elem_id="tabs-column"):
                    with gr.Tabs(elem_id="tabs") as tabs:
                        with gr.Tab("Read", id="read", elem_id="tab-read"):
                            read = read_tab(decoder, handlers, chat)
                        with gr.Tab("Scan", id="scan", elem_id="tab-scan"):
                            scan_tab(decoder, chat, read, tabs)
                        with gr.Tab("Watch", id="watch", elem_id="tab-watch"):
                            watch_tab(decoder, chat)
                        with gr.Tab("Steer", id="steer", elem_id="tab-steer"):
                            steer_tab(decoder, chat)
                        with gr.Tab("Learn", id="learn", elem_id="tab-learn"):
                            lessons = learn_tab()
            names = (html.escape(Path(name).name) for name in (decoder.base.name, decoder.name))
            fixed("<p>{}</p><p>model {} · decoder {}</p>".format(LIMITS, *names), "limits")
        with link_place:
            add_link(demo, decoder, chat, read, chat_notice, share)
        add_endpoints(decoder)

        shown = [read.strip, chat_notice]
        chat.input(handlers.show, [chat, read.strip], shown, trigger_mode="always_last", **QUICK)
        examples.select(open_example, examples, [chat, read.questions], **QUICK).then(handlers.show, [chat, read.strip], shown, **QUICK)
        opened = lessons.select(open_lesson, lessons, [tabs, chat, read.questions, read.answers], **QUICK)
        opened.then(handlers.show, [chat, read.strip], shown, **QUICK)
        reply = chat.submit(handlers.reply, chat, [chat, chat_notice], trigger_mode="once", **GPU, **PRIVATE)
        reply.then(None, chat, chat, js=NOT_BUSY, **QUICK).then(handlers.show, [chat, read.strip], shown, **QUICK)
        chat.stop(None, cancels=[reply], **QUICK)
    return demo.queue(max_size=64)


def open_example(chips):
    """-> chat, questions"""
    try:
        turns, question = list(CHATS.values())[chips["pick"][1]]
    except (TypeError, KeyError, IndexError):
        return gr.skip(), gr.skip()
    return {"turns": turns, "busy": False}, question


def launch(demo: gr.Blocks, **options):
    """`demo.launch` with the page's theme and style; `options` are launch's own."""
    hues = {"primary_hue": "indigo", "secondary_hue": "indigo", "neutral_hue": "slate"}
    theme = gr.themes.Default(**hues, radius_size="lg", font=[FONT, "system-ui", "sans-serif"], font_mono=[FONT_MONO, "monospace"])
    defaults = {"theme": theme, "css_paths": [PAGE_CSS], "footer_links": ["api", "gradio", "settings"], "run_history": False}
    return demo.launch(**defaults | {"mcp_server": True, "max_file_size": "1mb"} | options)
