"""What a visitor may ask of the page.  Every check raises LqaError with the limit in it; LIMITS says them all in words."""

from __future__ import annotations

from lqa.activations import layer_list
from lqa.chat import Chat, check_chat
from lqa.errors import LqaError

MAX_TURNS = 12
MAX_CHARACTERS = 4000  # of a chat
MAX_SELECTED = 400  # tokens of a reading
MAX_QUESTIONS = 4
MAX_QUESTION = 300  # characters
MAX_ANSWERS = 6  # to choose among
MAX_ANSWER = 120  # characters
MAX_FOLLOW_UPS = 3
MAX_SCANNED = 160  # tokens
MAX_REPLY = 96  # new tokens
MAX_STEPS = 60  # of a steering
MAX_PAIRS = 12
MAX_ANSWER_TEXT = 300  # characters of a question or answer of a steering

LIMITS = (
    f"A chat may have {MAX_TURNS} turns and {MAX_CHARACTERS:,} characters. A reading takes at most {MAX_SELECTED} tokens and "
    f"{MAX_QUESTIONS} questions of {MAX_QUESTION} characters, each with {MAX_FOLLOW_UPS} follow-up questions. Scan takes {MAX_SCANNED} "
    f"tokens and {MAX_ANSWERS} answers of {MAX_ANSWER} characters. The model's own replies end after {MAX_REPLY} tokens. A "
    f"steering takes {MAX_STEPS} steps and {MAX_PAIRS} pairs, and is kept for an hour. "
    "Visitors are served one after the other; a page that is closed gives its place away."
)


def check_turns(value) -> Chat:
    """The chat in the editor: empty system and assistant turns are none."""
    turns = value.get("turns") if isinstance(value, dict) else value
    if isinstance(turns, list) and len(turns) > MAX_TURNS:
        raise LqaError(f"The chat has {len(turns)} turns, this page takes at most {MAX_TURNS}; remove some.")
    if isinstance(turns, list):
        turns = [t for t in turns if not isinstance(t, dict) or t.get("role") == "user" or str(t.get("content") or "").strip()]
    chat = check_chat(turns)
    if (n := sum(len(turn["content"]) for turn in chat)) > MAX_CHARACTERS:
        raise LqaError(f"The chat has {n:,} characters, this page takes at most {MAX_CHARACTERS:,}; shorten it.")
    return chat


def check_selection(selected) -> list[int]:
    """The tokens to read."""
    if not isinstance(selected, list) or not selected:
        raise LqaError("No token is selected; click some, or choose a span above them.")
    if len(selected) > MAX_SELECTED:
        raise LqaError(f"{len(selected)} tokens are selected, this page reads at most {MAX_SELECTED}; select fewer.")
    return selected


def check_question(text, what: str = "The question") -> str:
    if not isinstance(text, str) or not text.strip():
        raise LqaError(f"{what} is empty; write one.")
    if len(text) > MAX_QUESTION:
        raise LqaError(f"{what} has {len(text):,} characters, this page takes at most {MAX_QUESTION}; shorten it.")
    return text.strip()


def check_questions(text) -> list[str]:
    """The questions in a box, one a line."""
    questions = lines(text)
    if not questions:
        raise LqaError("There is no question; write one, or choose a suggestion.")
    if len(questions) > MAX_QUESTIONS:
        raise LqaError(f"There are {len(questions)} questions, this page takes at most {MAX_QUESTIONS} at once; remove some.")
    return [check_question(q) for q in questions]


def check_answers(text, least: int = 2) -> list[str]:
    """The answers in a box, one a line."""
    answers = lines(text)
    if not least <= len(answers) <= MAX_ANSWERS:
        raise LqaError(f"Give {least} to {MAX_ANSWERS} answers, one a line, not {len(answers)}.")
    if long := next((a for a in answers if len(a) > MAX_ANSWER), None):
        raise LqaError(f"An answer has {len(long):,} characters, this page takes at most {MAX_ANSWER}; shorten it.")
    return answers


def check_control(text) -> str:
    """How the model shall behave."""
    return check_question(text, "The control")


def check_layer(layer) -> list[int] | None:
    """An integer, several as a list or as "7, 14, 21", or None for the decoder's default; whether the decoder reads it is the decoder's to
    say."""
    if layer is None:
        return None
    layers = [int(k) if k.strip().isdecimal() else k for k in layer[:200].split(",")] if isinstance(layer, str) else layer_list(layer)
    if any(not isinstance(k, int) or isinstance(k, bool) for k in layers):
        raise LqaError(f"The layer must be a whole number, or several, not {str(layer)[:40]!r}.")
    return layers


def lines(text) -> list[str]:
    """The lines of a box that hold something, each once."""
    if not isinstance(text, str):
        return []
    return list(dict.fromkeys(line.strip() for line in text[:1_000_000].split("\n") if line.strip()))
