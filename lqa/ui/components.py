"""The page's own components: gr.HTML with a fixed template, a script and a style from static/.

Text of users and models reaches the page only through the scripts' `textContent`.  In a template, Gradio would run it as script.
They are instances, not subclasses: a subclass of a Gradio component writes a .pyi file beside its source when it is imported.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

STATIC = Path(__file__).parent / "static"
PAGE_CSS = STATIC / "page.css"


def token_strip(value: dict | None, elem_id: str) -> gr.HTML:
    """A chat as tokens to select.  The value is that of `lqa.ui.tokens.token_view`; the page changes its "selected"."""
    return _component("tokens", value, elem_id)


def answer_cards(value: dict | None, elem_id: str) -> gr.HTML:
    """An answer and its references; the value is that of `lqa.ui.handlers.cards`."""
    return _component("answers", value, elem_id)


def notice(elem_id: str) -> gr.HTML:
    """A sentence that says what went wrong; "" hides it."""
    return _component("notice", "", elem_id)


def _component(name: str, value, elem_id: str) -> gr.HTML:
    return gr.HTML(
        value,
        html_template=f'<div class="lqa-{name}"></div>',
        css_template=(STATIC / f"{name}.css").read_text(encoding="utf-8"),
        js_on_load=(STATIC / f"{name}.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=elem_id,
    )
