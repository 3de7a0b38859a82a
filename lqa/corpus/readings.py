"""Readings as data: a chat in one of LatentQA's four forms, the span that is read, and questions with answers about it.

A row of the dataset's config `latentqa`, and what the importer and `stats` understand:

    {"id", "label", "kind", "category", "form", "chat": [{"role", "content"}], "span", "message", "model", "qa": [PAIR], "contrast"}
    PAIR = {"question", "answer", "alternatives": [str], "type": "description" | "reasoning" | "short", "generic": bool}

`label` is the control's id.  `message`: "own" (written for this control), "pool" (drawn from messages that know of no control), or
"none" (the form has none).  `model` wrote the last assistant turn, None where it was authored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lqa.corpus.schema import MAX_SHARED_STIMULUS, Control, content_words

# The span of each form: what follows the control, or the control itself (Pan et al. 2024, section 3).
FORMS = {"control": "all", "stimulus": "from:2", "stimulus_completion": "from:2", "system": "from:1"}


def control_chat(control: Control, form: str, message: str, reply: str | None = None) -> list[dict[str, str]]:
    """The target's chat in one of the paper's read forms; `message` is unused by "control", `reply` ends a "stimulus_completion"."""
    user = {"role": "user", "content": message}
    if form == "control":
        return [{"role": "user", "content": control.control}]
    if form == "system":
        return [{"role": "system", "content": control.control}, user]
    if form == "stimulus":
        acknowledged = {"role": "assistant", "content": control.acknowledgement}
        return [{"role": "user", "content": control.control}, acknowledged, user]
    if form == "stimulus_completion":
        if not reply:
            raise ValueError("the form 'stimulus_completion' needs a reply")
        return [*control_chat(control, "stimulus", message), {"role": "assistant", "content": reply}]
    raise ValueError(f"unknown form {form!r}; use {', '.join(FORMS)}")


def pool_message(control: Control, pool: Sequence[str], rng: random.Random) -> str:
    """A message of the pool that shares no more content words with `control` than a stimulus may.  Raises ValueError if there is none."""
    words = content_words(control.control)
    for message in rng.sample(pool, len(pool)):
        if len(words & content_words(message)) <= MAX_SHARED_STIMULUS:
            return message
    raise ValueError(f"{control.id}: every message of the pool shares words with the control")


def qa_pairs(control: Control, questions: dict[str, dict[str, list[str]]], rng: random.Random) -> list[dict]:
    """All pairs about `control`: a generic description (its two wordings are one pair), a generic short one, and the specific ones."""

    def pair(question: str, answer: str, kind: str, generic: bool, alternatives: Sequence[str] = ()) -> dict:
        return {"question": question, "answer": answer, "alternatives": list(alternatives), "type": kind, "generic": generic}

    generic = questions[control.kind]
    first, *others = control.descriptions
    return [
        pair(rng.choice(generic["description"]), first, "description", True, others),
        pair(rng.choice(generic["short"]), control.short, "short", True),
        *(pair(p.question, p.answer, p.type, False) for p in control.qa),
    ]


def readings_of(
    control: Control,
    stimuli: Sequence[str],
    pool: Sequence[str],
    completions: Sequence[dict],
    questions: dict[str, dict[str, list[str]]],
    seed: int = 0,
) -> list[dict]:
    """The rows of one control: itself, its own stimuli (those given), messages of the pool, and its sampled completions.

    More than half of the rows draw on the pool, so that what is visible tells nothing of the control.
    """
    rng = random.Random(f"{seed}/{control.id}")
    qa = qa_pairs(control, questions, rng)
    rows: list[dict] = []

    def add(form: str, source: str, message: str = "", completion: dict | None = None) -> None:
        rows.append(
            {
                "id": f"{control.id}/{len(rows)}",
                "label": control.id,
                "kind": control.kind,
                "category": control.category,
                "form": form,
                "chat": control_chat(control, form, message, completion and completion["reply"]),
                "span": FORMS[form],
                "message": source,
                "model": completion and completion["model"],
                "qa": qa,
                "contrast": list(control.contrast),
            }
        )

    add("control", "none")
    for form, message in zip(("system", "stimulus"), stimuli, strict=False):
        add(form, "own", message)
    for form in ("system", "system", "stimulus", "stimulus"):
        add(form, "pool", pool_message(control, pool, rng))
    for completion in completions:
        add("stimulus_completion", "pool", completion["message"], completion)
    return rows
