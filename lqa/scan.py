"""Scan: one question with short answers, asked of every token alone, at every read layer (or every choice of several at once).

A cell is what `decoder.read(chat, [token], layer).probabilities(question, answers)` gives.  The tokens of a turn have the same hidden
context, so that the target runs once per turn and layer, and the decoder reads its tokens as one batch of prompts with a single slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lqa import engine
from lqa.activations import Layer, Passes, layer_name
from lqa.chat import Chat, Span, check_text, render, resolve_span
from lqa.decoder import LatentDecoder, evidence
from lqa.errors import LqaError


class Cell(NamedTuple):
    """What one token at one layer says: a probability for each answer (they add up to 1)."""

    layer: int | tuple[int, ...]
    token: int
    probabilities: tuple[float, ...]


def scan(
    decoder: LatentDecoder,
    chat: Chat,
    question: str,
    answers: Sequence[str],
    span: Span = "all",
    layers: Sequence[Layer] | None = None,
    batch: int = 16,
) -> Iterator[list[Cell]]:
    """Yields the cells of `batch` tokens at a time, layer after layer (None: all that the decoder reads).

    Raises LqaError as `read` and `score` do, and for fewer than two answers.
    """
    if len(answers) < 2:
        raise LqaError("Give at least two answers to compare.")
    tokenizer, prompt = decoder.base.tokenizer, decoder.config.prompt
    readings = [decoder.config.check_layers(layer) for layer in (decoder.config.readings if layers is None else layers)]
    rendered = render(tokenizer, chat)
    turns: dict[int, list[int]] = {}
    for i in resolve_span(span, rendered):
        turns.setdefault(rendered.tokens[i].turn, []).append(i)
    if not isinstance(question, str) or not question.strip() or not all(isinstance(a, str) and a.strip() for a in answers):
        raise LqaError("The question and its answers must not be empty.")
    suffix = prompt.question(tokenizer, check_text(tokenizer, question, "The question"))
    ids = [prompt.answer(tokenizer, check_text(tokenizer, a, "An answer")) for a in answers]

    def totals(prefix: engine.Prefix, n: int) -> list[list[float]]:
        """(n prefixes, answers): log-probability in nats, summed over the answer."""
        rows = [engine.Row(i, suffix) for i in range(n) for _ in ids]
        sums = [sum(tokens) for tokens in engine.token_logprobs(decoder.session, prefix, rows, ids * n)]
        return [sums[i : i + len(ids)] for i in range(0, len(sums), len(ids))]

    if decoder.config.reads_text:
        raise LqaError("This decoder reads text, no activations; there is nothing in a token to scan.")
    shifted = decoder.config.positions != "sequential"  # then prompts of different tokens have different positions
    batch = 1 if shifted else batch
    passes = Passes()
    for layers in readings:
        none = None
        for tokens in turns.values():
            reading = decoder.read(chat, tokens, layers, passes=passes)
            injected = reading.injected.unflatten(0, (len(reading.blocks), -1))  # (B, N, D)
            for at in range(0, len(tokens), batch):
                part = tokens[at : at + batch]
                values = injected[:, at : at + batch].transpose(0, 1).flatten(0, 1)  # token after token, as the prompts are
                start = decoder.config.first_position(part)
                if shifted or none is None:
                    (none,) = totals(decoder.prefill_slots(layers, 1, None, start=start), 1)
                true = totals(decoder.prefill_slots(layers, 1, values, len(part), start), len(part))
                yield [
                    Cell(layer_name(layers), i, tuple(evidence([t - n for t, n in zip(row, none, strict=True)])))
                    for i, row in zip(part, true, strict=True)
                ]
