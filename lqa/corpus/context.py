"""Context prediction (Karvonen et al. 2025, arXiv 2512.15674): from one to fifty activations, the text just before or just behind them.

The chats are readings of the corpus; in those that end with a completion it is the target's own text that is predicted.  Spans are token
indices of the chat as one target renders it, so a row is good for models with that tokenizer and template; `target` names it.

A row of the config `context`: {"id", "label", "target", "direction", "activations", "chat", "span", "qa": [PAIR]}.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from lqa.chat import render
from lqa.errors import LqaError

MOST = 50  # activations, and tokens to predict
LEAST = 3  # tokens to predict
QUESTIONS = {
    "next": [
        "What text comes right after this?",
        "Which words follow next?",
        "Continue the text: what are the next {} words?",
        "Predict the {} words that come after these tokens.",
        "How does the passage go on?",
        "What stands immediately behind this part of the conversation?",
    ],
    "previous": [
        "What text comes right before this?",
        "Which words stand just in front?",
        "Give the {} words that lead up to here.",
        "Recall the {} words that precede these tokens.",
        "How did the passage begin before this point?",
        "What stands immediately ahead of this part of the conversation?",
    ],
}


def context_row(row: dict, tokenizer, target: str, rng: random.Random) -> dict | None:
    """The context prediction of a reading; None if no turn of its chat has enough tokens.

    The predicted text is part of one turn's own words, the read tokens lie right beside it and may reach into other turns.
    """
    rendered = render(tokenizer, row["chat"])
    contents: dict[int, list[int]] = {}
    for i, token in enumerate(rendered.tokens):
        if token.content and i:
            contents.setdefault(token.turn, []).append(i)
    turns = [turn for turn, tokens in contents.items() if len(tokens) > LEAST]
    if not turns:
        return None
    own = len(row["chat"]) - 1
    inside = contents[own if row["model"] and own in turns else rng.choice(turns)]
    direction = rng.choice(["next", "previous"])
    n = min(rng.randint(LEAST, MOST), len(inside) - 1)
    reads = rng.randint(1, MOST)
    if direction == "next":
        start = rng.randint(inside[1], inside[-1] - n + 1)  # the first predicted token; at least one token is read before it
        span, answer = (max(1, start - reads), start), (start, start + n)
    else:
        stop = rng.randint(inside[0] + n, inside[-1])  # the first read token
        span, answer = (stop, min(len(rendered), stop + reads)), (stop - n, stop)
    text = "".join(token.text for token in rendered.tokens[slice(*answer)]).strip()
    if not text or text not in rendered.text:  # a character of several tokens was cut
        return None
    question = rng.choice(QUESTIONS[direction]).format(len(text.split()))
    return {
        "id": f"{row['id']}/{direction}",
        "label": row["label"],
        "target": target,
        "direction": direction,
        "activations": span[1] - span[0],
        "chat": row["chat"],
        "span": f"{span[0]}:{span[1]}",
        "qa": [{"question": question, "answer": text, "alternatives": [], "type": "context", "generic": True}],
    }


def build_context(splits: dict[str, list[dict]], tokenizer, target: str, per_control: int = 2, seed: int = 0) -> dict[str, list[dict]]:
    """{split: rows}: `per_control` readings of each control and split, its completions first, with one prediction each."""
    if per_control < 1:
        raise LqaError(f"The context predictions per control must be at least 1, not {per_control}.")
    built: dict[str, list[dict]] = {}
    for name, rows in splits.items():
        part = built.setdefault(name.split("_")[0], [])
        for label, group in _by_label(rows):
            rng = random.Random(f"{seed}/{label}/{name}")
            own = [row for row in group if row["model"]]
            others = [row for row in group if not row["model"]]
            chosen = (own + rng.sample(others, len(others)))[:per_control]
            part += [found for row in chosen if (found := context_row(row, tokenizer, target, rng))]
    return built


def _by_label(rows: Iterable[dict]) -> Iterable[tuple[str, list[dict]]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["label"], []).append(row)
    return groups.items()
