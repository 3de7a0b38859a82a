"""The question-answer pairs that say how the target shall be: given by the user, or written by the decoder from a control text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lqa import engine
from lqa.chat import check_text
from lqa.corpus import load_questions
from lqa.errors import LqaError
from lqa.steering.neutral import load_neutral

PAIRS = 5  # how many are used: the loss of a step is a mean over all of them
TOLD = "What instruction does the assistant seem to be following?"  # a generic question, which the control's own text answers
MARGIN = 0.1  # nats per token by which an answer must beat both of its references


def check_pairs(qa) -> list[tuple[str, str]]:
    """`qa` as (question, answer) tuples, given as such or as mappings.  Raises LqaError for anything that is missing or empty."""
    if isinstance(qa, str) or not isinstance(qa, Sequence) or not qa:
        raise LqaError("Give the pairs as a non-empty list of [question, answer].")
    pairs = []
    for i, pair in enumerate(qa):
        if isinstance(pair, dict):
            if missing := {"question", "answer"} - set(pair):
                raise LqaError(f"Pair {i} lacks the field {sorted(missing)[0]!r}; every pair needs a question and an answer.")
            pair = (pair["question"], pair["answer"])
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise LqaError(f"Pair {i} is not [question, answer], nor a mapping with these two fields.")
        for what, text in zip(("question", "answer"), pair, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise LqaError(f"The {what} of pair {i} is empty or no text; write one.")
        pairs.append((pair[0].strip(), pair[1].strip()))
    return pairs


def load_pairs(path: str | Path) -> list:
    """The pairs in a JSON file, unchecked.  Raises LqaError if it cannot be read or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LqaError(f"The QA file {path} cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise LqaError(f"The QA file {path} is not JSON ({error}); it must hold a list of question/answer pairs.") from error


def write_pairs(decoder, control: str, n: int = PAIRS) -> list[tuple[str, str]]:
    """What the decoder shall say of the steered target: the control's own text, then what it says of the control, best grounded first;
    at most `n` pairs.

    The target reads the control as a user's message (a decoder for contrasts: as a hidden system prompt), and the decoder answers the
    corpus's generic questions from its activations.  An answer counts if its log-probability beats that without activations and that
    with another chat's by MARGIN.  Raises LqaError for an empty control.
    """
    if not isinstance(control, str) or not control.strip():
        raise LqaError("The control is empty; write how the model shall behave.")
    kinds = load_questions()
    questions = [q for pair in zip(kinds["goal"]["description"], kinds["persona"]["description"], strict=True) for q in pair]
    check_text(decoder.base.tokenizer, control, "The control")
    chat, span = [{"role": "user", "content": control.strip()}], "all"
    if decoder.config.conditioning == "contrast":  # it reads what is hidden, and nothing else
        chat, span = [{"role": "system", "content": control.strip()}, {"role": "user", "content": load_neutral()["train"][0]}], "turn:-1"
    reading = decoder._read(chat, span, None)
    answers = reading.ask(questions, max_new_tokens=32)
    pairs = list({a.text: (a.question, a.text) for a in answers if a.text}.values())
    logprobs = {source: _logprobs(reading, pairs, source) for source in ("true", "none", "shuffled")}
    margins = [t - max(*references) for t, *references in zip(*logprobs.values(), strict=True)]
    order = sorted((i for i in range(len(pairs)) if margins[i] > MARGIN), key=lambda i: -margins[i])
    return [(TOLD, control.strip()), *(pairs[i] for i in order[: n - 1])]


def _logprobs(reading, pairs: list[tuple[str, str]], source: str) -> list[float]:
    """The mean log-probability per token (nats) of every pair's answer to its own question."""
    decoder = reading.decoder
    answers = [decoder.config.prompt.answer(decoder.base.tokenizer, a) for _, a in pairs]
    rows = reading._rows([q for q, _ in pairs], (source,), max(map(len, answers)))
    return engine.score(decoder.session, reading._prefix((source,)), rows, answers)
