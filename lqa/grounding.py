"""Grounding: the references against which an answer is held (DESIGN's vocabulary: none, shuffled, text_only).

`none` needs nothing from here: it is the decoder with unpatched slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lqa import engine
from lqa.chat import render, visible_text
from lqa.decoder import Reading, collect
from lqa.errors import LqaError

# The donor of `shuffled` where a reading stands alone: an ordinary chat about something else.
DONOR_CHAT = [
    {"role": "system", "content": "You are a patient museum guide who loves old clocks."},
    {"role": "user", "content": "My train is late again and I have an hour to spare near the station. What could I do?"},
]

TEXT_ONLY = (
    "Here is part of a conversation with an AI assistant.\n\n{visible}\n\n"
    "Answer the following question about the assistant in one sentence.\n\nQuestion: {question}"
)


def map_linearly(activations: Tensor, n: int, blocks: int = 1) -> Tensor:
    """(B * M, D) -> (B * n, D): in each of B blocks, a donor's positions mapped linearly onto n slots, first to first and last to
    last."""
    parts = activations.unflatten(0, (blocks, -1))
    m = parts.shape[1]
    if m == n:
        return activations  # itself: who asks of one and of the other asks the same
    index = torch.linspace(0, m - 1, n, device=activations.device).round().long() if n > 1 else torch.tensor([m - 1])
    return parts[:, index].flatten(0, 1)


def donor_activations(reading: Reading, donor: Reading | None = None) -> Tensor:
    """Another chat's activations at the same layers, conditioned, for the reading's slots: (B * N, D).  Without `donor`, the packaged
    one's."""
    # Hidden where the reading hides something too: the references must differ in content, not in kind.
    # Never steered: a steering of this thread would be in the donor's activations too.
    donor = donor or reading.decoder._read(DONOR_CHAT, "turn:-1" if reading.conditioned else "all", reading.layers)
    if donor.layers != reading.layers:
        raise LqaError(f"The donor was read at layer {donor.layer}, the reading at layer {reading.layer}; they must be the same.")
    return map_linearly(donor.injected, len(reading.span), len(reading.blocks))


def text_only_chat(reading: Reading, question: str, after: Sequence[tuple[str, str]] = ()) -> list[dict[str, str]]:
    """What the bare model is told instead of activations: the turns that the span touches, as text, and the question (`after` others)."""
    visible = visible_text(reading.rendered, list(reading.span))
    first, *others = [*(q for q, _ in after), question]
    asked = [TEXT_ONLY.format(visible=visible, question=first), *others]
    turns = [text for q, (_, a) in zip(asked, after, strict=False) for text in (q, a)] + asked[-1:]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def text_only(reading: Reading, questions: Sequence[str], max_new_tokens: int, after: Sequence[tuple[str, str]] = ()) -> list[str]:
    """The bare model's answers (adapter off) from the visible turns as text; one batch, the shared text run once."""
    decoder = reading.decoder
    ids = [render(decoder.base.tokenizer, text_only_chat(reading, q, after)).ids for q in questions]
    decoder.check_room(max(map(len, ids)), max_new_tokens)
    common, suffixes = engine.common_prefix(ids)
    with decoder.base.decoding() as model:
        prefix = engine.prefill(model, [common])
    rows = [engine.Row(0, suffix) for suffix in suffixes]
    stop = decoder.config.prompt.stop_ids(decoder.base.tokenizer)
    steps = engine.decode(decoder.base.decoding, prefix, rows, max_new_tokens, stop)
    return [said.text for said in collect(decoder.base.tokenizer, steps, len(rows))]


def text_only_scores(reading: Reading, question: str, answers: Sequence[str]) -> list[float]:
    """Mean log-probability per token (nats, end included) that the bare model gives each answer, from the visible text alone."""
    decoder = reading.decoder
    common, suffixes = engine.common_prefix([render(decoder.base.tokenizer, text_only_chat(reading, question)).ids])
    with decoder.base.decoding() as model:
        prefix = engine.prefill(model, [common])
    ids = [decoder.config.prompt.answer(decoder.base.tokenizer, a) for a in answers]
    return engine.score(decoder.base.decoding, prefix, [engine.Row(0, suffixes[0])] * len(ids), ids)
