"""The page "Read": a chat, its tokens, a question, the answer beside its references."""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: nothing on this page calls home

import html
from pathlib import Path

import gradio as gr

from lqa.decoder import LatentDecoder
from lqa.ui.components import PAGE_CSS, answer_cards, notice, token_strip
from lqa.ui.examples import CHATS, questions
from lqa.ui.handlers import cards, make_handlers

GPU = {"concurrency_limit": 1, "concurrency_id": "gpu"}
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
MAX_RADIO = 6  # more read layers than this are a dropdown

# The semi-bold files that Gradio bundles hold a few letters only; with 700 in their place, headings use the bold face.
FONT, FONT_MONO = (gr.themes.LocalFont(name, weights=(400, 700)) for name in ("IBM Plex Sans", "IBM Plex Mono"))

INTRO = """
<h1>Ask what a language model has in mind</h1>
<p>A model reads the chat below. The activations of the tokens that you select, and no text, are handed to a <b>decoder</b>: the same model
with a small LoRA, trained to answer questions about activations in words. It can be wrong and it can invent; so the same question is also
answered without these activations. What those answers say as well, the activations did not add.</p>
"""


def build(decoder: LatentDecoder) -> gr.Blocks:
    """The demo over one decoder; `launch` starts it."""
    with gr.Blocks(title="lqa: read activations", analytics_enabled=False) as demo:
        with gr.Column(elem_id="lqa-page"):
            gr.HTML(INTRO, elem_id="intro", apply_default_css=False)
            _read_page(decoder)
            names = (html.escape(Path(name).name) for name in (decoder.base.name, decoder.name))
            gr.HTML("<p>model {} · decoder {}</p>".format(*names), elem_id="models", apply_default_css=False)
    return demo.queue(max_size=32)


def launch(demo: gr.Blocks, **options):
    """`demo.launch` with the page's theme and style; `options` are launch's own."""
    hues = {"primary_hue": "indigo", "secondary_hue": "indigo", "neutral_hue": "slate"}
    theme = gr.themes.Default(**hues, radius_size="lg", font=[FONT, "system-ui", "sans-serif"], font_mono=[FONT_MONO, "monospace"])
    defaults = {"theme": theme, "css_paths": [PAGE_CSS], "footer_links": ["api", "gradio", "settings"], "run_history": False}
    return demo.launch(**defaults | options)


def _heading(number: int, text: str) -> None:
    gr.HTML(f"<h2><span>{number}</span> {text}</h2>", apply_default_css=False)


def _read_page(decoder: LatentDecoder) -> None:
    handlers, config = make_handlers(decoder), decoder.config
    first = next(iter(CHATS.values()))

    with gr.Row(equal_height=False, elem_id="chat-and-tokens"):
        with gr.Column(scale=4, min_width=320, elem_classes="step"):
            _heading(1, "A chat")
            examples = gr.Column(elem_id="examples")
            system = gr.Textbox(first[0], label="System prompt", lines=3, max_lines=8, elem_id="system")
            user = gr.Textbox(first[1], label="User message", lines=2, max_lines=8, elem_id="user")
            assistant = gr.Textbox(first[2], label="Assistant reply (optional)", lines=1, max_lines=6, elem_id="assistant")
            show = gr.Button("Read activations", variant="secondary", elem_id="show")
            chat_notice = notice("chat-notice")
        with gr.Column(scale=6, min_width=320, elem_classes="step"):
            _heading(2, "The tokens whose activations the decoder gets")
            strip = token_strip(handlers.show(*first[:3])[0], "tokens")
            _heading(3, "A question")
            with gr.Row(equal_height=True, elem_id="question-row"):
                question = gr.Textbox(first[3], label="Question", lines=1, max_lines=1, scale=6, min_width=280, elem_id="question")
                control = gr.Radio if len(config.read_layers) <= MAX_RADIO else gr.Dropdown
                layer = control(
                    [(str(k), k) for k in config.read_layers],
                    value=config.default_layer,
                    label=f"Layer (of 0 to {len(decoder.base.blocks) - 1})",
                    scale=2,
                    min_width=180,
                    elem_id="layer",
                )
                ask = gr.Button("Ask", variant="primary", scale=1, min_width=110, elem_id="ask")
            with gr.Row(elem_id="suggestions"):
                for label, texts in questions().items():
                    with gr.Column(min_width=300):
                        gr.Examples([[text] for text in texts], [question], label=label, cache_examples=False, api_visibility="private")
    ask_notice = notice("ask-notice")
    answers = answer_cards(cards(), "answers")

    chat = [system, user, assistant]
    with examples:
        gr.Examples(
            [list(example) for example in CHATS.values()],
            [*chat, question],
            example_labels=list(CHATS),
            label="Examples",
            fn=lambda system, user, assistant, question: handlers.show(system, user, assistant),
            outputs=[strip, chat_notice],
            run_on_click=True,
            cache_examples=False,
            api_visibility="private",
        )
    gr.on([show.click, user.submit, system.submit], handlers.show, chat, [strip, chat_notice], **PRIVATE)
    gr.on(
        [ask.click, question.submit],
        handlers.ask,
        [*chat, strip, question, layer, answers],
        [strip, answers, ask_notice],
        trigger_mode="once",
        **GPU,
        **PRIVATE,
    )
    gr.api(handlers.read, api_name="read", **GPU)
