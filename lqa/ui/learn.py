"""The tab "Learn": what happens, in one picture and ten sentences, and examples with the answers that the embedded decoder gave.

    python -m lqa.ui.learn        # draws the picture and asks the embedded decoder again: static/learn.svg, learn.json
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gradio as gr

from lqa.decoder import EMBEDDED_DECODER, LatentDecoder
from lqa.ui.components import STATIC, chips_view, component, fixed
from lqa.ui.examples import CHATS, GOAL, PERSONA, USER

RESULTS = Path(__file__).parent / "learn.json"
PICTURE = STATIC / "learn.svg"

SENTENCES = (
    "A language model turns every token of a chat into a list of numbers, and changes these numbers from layer to layer: its activations.",
    "They hold more than the token itself: at the last word of your message the model has already prepared how it will answer.",
    "Here the activations of some tokens are taken out at one layer, or a few.",
    "A second run of the same model, with a small set of extra weights (a LoRA), gets them in place of words: this is the decoder.",
    "It was trained on chats whose hidden instructions are known, to answer questions about them, and so it learnt to say in words what "
    "activations hold.",
    "What you leave unselected, the system prompt for instance, the decoder never sees; it can only have left its mark on the tokens that "
    "come later.",
    "So ask about what is hidden, and compare with the three references: no activations, another chat's, and the visible text alone.",
    "If the references say the same, the answer owes nothing to the activations, however well it sounds.",
    "The colour of a word tells how much more probable the activations make it.",
    "The same can be run backwards: what the decoder should have answered can be trained into the model, and that steers it.",
)
LIMITS = (
    "A decoder can invent: it always answers, fluently, even where there is nothing to read.",
    "This one is small (135 million parameters, trained on two CPU cores); it tells kinds of things rather than details.",
    "A high confidence says that the decoder is sure of its words, not that they are true.",
    "Nothing here is evidence about what a model feels or intends; it is evidence about what can be predicted from its activations.",
)
EXAMPLES = {  # title: (chat, span, question, what it shows)
    "A hidden persona": (
        CHATS["Pirate captain"][0],
        "user",
        PERSONA,
        "The decoder got the user's message only. What it says about the persona must have come through the activations: compare the "
        "references, and see which words the activations made more probable.",
    ),
    "A hidden instruction": (
        CHATS["Hidden instruction"][0],
        "user",
        GOAL,
        "The same with an instruction that the assistant is told to conceal. Small decoders find the kind of goal sooner than its object.",
    ),
    "About the user": (
        CHATS["Who is asking?"][0],
        "user",
        USER,
        "Here nothing is hidden: the message itself says who is writing. The bare model, shown the text, needs no activations for this; "
        "where it does as well as the decoder or better, the decoder has added nothing.",
    ),
    "A failure": (
        [{"role": "user", "content": "What should I cook for dinner tonight?"}],
        "user",
        PERSONA,
        "Nobody has told the model to be anybody. The decoder names somebody all the same, and so do the references, whatever they are "
        "given: the question asks for a persona, and one is invented. Without the references you might have believed it.",
    ),
}


def decoder_digest(folder: str | Path = EMBEDDED_DECODER) -> str:
    """A hash of a decoder's weights, which says whose answers the cached ones are."""
    return hashlib.sha256(Path(folder, "adapter_model.safetensors").read_bytes()).hexdigest()[:16]


def results(decoder: LatentDecoder) -> list[dict]:
    """The examples, answered: what the answers show (lqa.ui.read.answers_view) for each."""
    from lqa.chat import render, resolve_span
    from lqa.ui.read import make_handlers
    from lqa.ui.tokens import token_view

    ask, views = make_handlers(decoder).ask, []
    for chat, span, question, _ in EXAMPLES.values():
        rendered = render(decoder.base.tokenizer, chat)
        strip = token_view(rendered, resolve_span(span, rendered))
        *_, (_, view, notice) = ask(chat, strip, question, decoder.config.default_layer, None)
        if notice:
            raise RuntimeError(notice)
        views.append(view)
    return views


def cached() -> list[dict]:
    """The views in learn.json."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["views"]


def picture() -> str:
    """The picture as SVG: a chat through the target, its activations into the decoder, a question in, an answer out."""
    parts, blue, grey = [], "#2f7fd6", "#8b95a5"

    def text(x, y, words, size=14, anchor="middle", weight=400, fill="currentColor"):
        parts.append(f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}">{words}</text>')

    def box(x, y, w, h, colour, alpha, dashed=False):
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{colour}" fill-opacity="{alpha}" stroke="{colour}" '
            f'stroke-width="1.5"{dash}/>'
        )

    def arrow(path, colour=blue):
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" marker-end="url(#tip)"/>')

    # the target, with a column for every token
    text(215, 24, "The model reads a chat", 15, weight=700)
    box(20, 300, 150, 44, grey, 0.12, dashed=True)
    text(95, 318, "system prompt")
    text(95, 336, "hidden from the decoder", 11)
    box(180, 300, 230, 44, blue, 0.16)
    text(295, 318, "user’s message")
    text(295, 336, "the tokens that you select", 11)
    for layer, (y, name) in enumerate(((250, "first layers"), (196, "middle layers"), (142, "later layers"), (88, "last layers"))):
        box(20, y, 390, 34, blue if layer == 1 else grey, 0.1 if layer == 1 else 0.05)
        text(30, y + 22, name, 12, "start")
    for x in (60, 95, 130):
        arrow(f"M{x} 298 V 288", grey)
    for x in (210, 250, 290, 330, 370):
        arrow(f"M{x} 298 V 288", blue)
    arrow("M135 262 C 165 262, 170 215, 198 213", grey)
    text(128, 240, "leaves its mark", 11, fill="currentColor")
    for x in (210, 250, 290, 330, 370):
        parts.append(f'<circle cx="{x}" cy="213" r="8" fill="{blue}"/>')
    text(215, 70, "… and would go on to write its reply", 12)
    # from here to there
    arrow("M414 213 C 470 213, 470 317, 528 317")
    text(474, 190, "activations,", 12, weight=700)
    text(474, 206, "no text", 12)
    # the decoder
    text(725, 24, "The decoder answers", 15, weight=700)
    box(535, 300, 150, 44, blue, 0.16)
    for x in (558, 584, 610, 636, 662):
        parts.append(f'<circle cx="{x}" cy="322" r="8" fill="{blue}"/>')
    box(695, 300, 225, 44, grey, 0.05)
    text(807, 327, "“Who is it pretending to be?”", 13)
    box(535, 142, 385, 142, grey, 0.05)
    text(727, 205, "the same model", 14)
    text(727, 226, "+ a small LoRA, trained to answer questions about activations", 12)
    arrow("M610 298 V 288")
    arrow("M807 298 V 288", grey)
    arrow("M727 140 V 104")
    box(575, 56, 305, 44, blue, 0.1)
    text(727, 83, "an answer in words", 14, weight=700)
    # the references
    box(20, 372, 900, 52, grey, 0.05, dashed=True)
    text(470, 394, "Asked again without these activations: none at all · another chat’s · only the visible text", 13)
    text(470, 413, "What these say as well, the activations did not add.", 12)
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 436" role="img" font-family="inherit" aria-labelledby="lqa-t">'
        '<title id="lqa-t">A model reads a chat; the activations of the selected tokens go into a decoder, which is asked a question and '
        "answers in words; the same is asked without these activations.</title>"
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{blue}"/></marker></defs>'
    )
    return head + "".join(parts) + "</svg>\n"


def learn_tab() -> gr.HTML:
    """Builds the tab; returns the chips that open an example in Read."""
    fixed("<h2>What happens here</h2>")
    fixed(PICTURE.read_text(encoding="utf-8"), "picture")
    fixed("<ol>" + "".join(f"<li>{sentence}</li>" for sentence in SENTENCES) + "</ol>", "sentences")
    fixed("<h2>What it cannot do</h2><ul>" + "".join(f"<li>{sentence}</li>" for sentence in LIMITS) + "</ul>", "cannot")
    fixed("<h2>Four examples</h2><p>Answers that the decoder in this repository gave. Open one in Read:</p>")
    chips = component("chips", chips_view("Examples to open in Read", {"": list(EXAMPLES)}), "learn-open")
    for i, ((title, (chat, _, _, lesson)), view) in enumerate(zip(EXAMPLES.items(), cached(), strict=True)):
        turns = "".join(f"<p><b>{turn['role']}</b> {turn['content']}</p>" for turn in chat if turn["content"])
        fixed(f'<div class="example"><h3>{title}</h3>{turns}<p class="lesson">{lesson}</p></div>', f"example-{i}")
        component("answers", view | {"most": 0}, f"cached-{i}")
    return chips


def open_lesson(chips):
    """-> tabs, chat, questions, answers"""
    try:
        i = chips["pick"][1]
        chat, _, question, _ = list(EXAMPLES.values())[i]
        return gr.update(selected="read"), {"turns": chat, "busy": False}, question, cached()[i]
    except (TypeError, KeyError, IndexError):
        return (gr.skip(),) * 4


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    made = {"decoder": decoder_digest(), "command": "python -m lqa.ui.learn", "views": results(LatentDecoder.from_pretrained())}
    RESULTS.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
