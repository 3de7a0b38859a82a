"""The page's own components: gr.HTML with a fixed template, a script and a style from static/.

Text of users and models reaches the page only through the scripts' `textContent`.  In a template, Gradio would run it as script.
They are instances, not subclasses: a subclass of a Gradio component writes a .pyi file beside its source when it is imported.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from lqa.activations import Layer, layer_list

STATIC = Path(__file__).parent / "static"
PAGE_CSS = STATIC / "page.css"
GPU = {"concurrency_limit": 2, "concurrency_id": "gpu"}  # forward passes take turns; two, so that a long one leaves room
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}  # plumbing: no endpoint, no tool
QUICK = PRIVATE | {"queue": False}  # no forward pass: does not wait for those who make one
MAX_RADIO = 6  # more choices of a layer than this are a dropdown


def component(name: str, value, elem_id: str) -> gr.HTML:
    """static/NAME.js and .css over `value`:

    chat     {"turns": [{"role", "content"}], "busy"}: the editor.  input: edited; submit: the model shall reply; stop
    tokens   lqa.ui.tokens.token_view: a chat's tokens to select; the page changes "selected"
    chips    chips_view: texts to click, the clicked one in "pick": [group, item].  select: one was
    answers  lqa.ui.read.answers_view: answers with their grounding.  submit: a follow-up question in "ask"
    heat     lqa.ui.scan.scan_view: tokens and layers.  select: a cell, in "pick"
    watch    lqa.ui.watch.watch_view: a reply, and a line under it
    curve    lqa.ui.steer.curve_view: a loss as it falls
    notice   a sentence that says what is wrong; "" hides it
    link     an address to copy; "" hides it
    """
    parts = [(STATIC / f"{part}.js").read_text(encoding="utf-8") for part in ("common", name)]
    return gr.HTML(
        value,
        html_template=f'<div class="lqa-{name}"></div>',
        css_template=(STATIC / f"{name}.css").read_text(encoding="utf-8"),
        js_on_load="\n".join(parts),
        apply_default_css=False,
        elem_id=elem_id,
    )


def chips_view(name: str, groups: dict[str, list[str]]) -> dict:
    """{label: texts} as the value of `chips`; `name` is what screen readers call it."""
    return {"groups": [{"label": label, "items": items} for label, items in groups.items()], "pick": None, "name": name}


def fixed(html: str, elem_id: str | None = None) -> gr.HTML:
    """Text of ours."""
    return gr.HTML(html, elem_id=elem_id, apply_default_css=False)


def layer_choice(layer: Layer) -> int | str:
    """A reading's layer in `layer_control`; several as "7, 14, 21"."""
    layers = layer_list(layer)
    return layers[0] if len(layers) == 1 else ", ".join(map(str, layers))


def layer_control(config, elem_id: str) -> gr.Radio | gr.Dropdown:
    """A choice of what the decoder reads: a layer, or several at once."""
    choices = [(str(choice), choice) for choice in map(layer_choice, config.readings)]
    control = gr.Radio if len(choices) <= MAX_RADIO else gr.Dropdown
    default = layer_choice(config.check_layers(None))
    return control(choices, value=default, label="Layer", min_width=260, scale=1, elem_id=elem_id)


_BUSY = "!['idle', 'done', 'stopped'].includes(view?.stage)"
WAITING = "(view) => ({...view, waiting: true})"  # until the first of what the run shows, which may be queued behind others
STOPPING = f"(view) => ({_BUSY} ? {{...view, stage: 'stopping'}} : view)"
ENDED = f"(view) => ({{...view, waiting: false, stage: {_BUSY} ? 'stopped' : view.stage}})"


def runs(triggers: list, fn, inputs, outputs: list, shown: gr.HTML, stop: gr.Button, **options):
    """Wires a run of some seconds, which is drawn in `shown` (a view with a "stage"): what begins it, and the button that cancels it."""
    gr.on(triggers, None, shown, shown, js=WAITING, **QUICK)
    run = gr.on(triggers, fn, inputs, outputs, trigger_mode="once", **PRIVATE, **options)
    stop.click(None, shown, shown, js=STOPPING, cancels=[run], **QUICK)
    # Stopped only when the run itself has ended: until then its last steps may be on their way, and no new one would begin.
    run.then(None, shown, shown, js=ENDED, **QUICK)
    return run
