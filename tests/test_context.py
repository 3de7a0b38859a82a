"""Context prediction: the answer is the text beside the span, in the same turn's own words, for every tokenizer and template."""

import random

import pytest

from lqa import LqaError
from lqa.chat import render, resolve_span
from lqa.corpus.context import LEAST, MOST, build_context, context_row

CHAT = [
    {"role": "system", "content": "Speak like a pirate and tell me what the weather will be like tomorrow in the city."},
    {"role": "user", "content": "How will the assistant speak when the user asks what it likes to cook?"},
]
REPLY = {"role": "assistant", "content": "The doctor from France likes to cook with many words of the sea, and asks about the weather."}


def reading(chat=CHAT, model=None, label="goal-style-pirate"):
    return {"id": f"{label}/1", "label": label, "chat": chat, "model": model}


@pytest.mark.parametrize("style", ["chatml", "llama3", "qwen3", "gemma", "mistral", "harmony"])
def test_the_answer_lies_right_beside_the_span_and_inside_one_turn(style, tokenizer_of):
    tokenizer = tokenizer_of(style)
    rendered = render(tokenizer, CHAT)
    seen = set()
    for seed in range(60):
        row = context_row(reading(), tokenizer, "tiny", random.Random(seed))
        span = resolve_span(row["span"], rendered)
        assert span[0] >= 1 and row["activations"] == len(span) <= MOST
        texts, answer = [t.text for t in rendered.tokens], row["qa"][0]["answer"]
        if row["direction"] == "next":
            beside = ["".join(texts[span[-1] + 1 : i]).strip() for i in range(span[-1] + 2, len(texts) + 1)]
        else:
            beside = ["".join(texts[i : span[0]]).strip() for i in range(span[0])]
        assert answer in beside
        assert any(answer in m["content"] for m in CHAT)  # a turn's own words, no template
        seen.add(row["direction"])
    assert seen == {"next", "previous"}


def test_the_number_of_words_in_a_question_is_the_answers(tokenizer_of):
    rows = [context_row(reading(), tokenizer_of("chatml"), "tiny", random.Random(seed)) for seed in range(80)]
    named = [(q, a) for q, a in ((r["qa"][0]["question"], r["qa"][0]["answer"]) for r in rows) if any(c.isdigit() for c in q)]
    assert named and all(f" {len(a.split())} words" in q for q, a in named)


def test_of_a_completion_the_targets_own_text_is_predicted(tokenizer_of):
    for seed in range(20):
        row = context_row(reading([*CHAT, REPLY], model="tiny"), tokenizer_of("chatml"), "tiny", random.Random(seed))
        assert row["qa"][0]["answer"] in REPLY["content"]


def test_a_chat_of_too_few_words_gives_no_row(tokenizer_of):
    assert context_row(reading([{"role": "user", "content": "?"}]), tokenizer_of("chatml"), "tiny", random.Random(0)) is None
    assert LEAST > 1


def test_splits_keep_their_sides_and_the_same_seed_gives_the_same_rows(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    own = [reading() | {"id": f"goal-style-pirate/{i}"} for i in range(4)]
    splits = {"train": own, "test": [reading(label="goal-a-b")], "test_pool": [reading(label="goal-a-b")]}
    built = build_context(splits, tokenizer, "tiny")
    assert {name: len(rows) for name, rows in built.items()} == {"train": 2, "test": 2}
    assert built == build_context(splits, tokenizer, "tiny") and built["train"][0]["target"] == "tiny"
    with pytest.raises(LqaError, match="at least 1"):
        build_context(splits, tokenizer, "tiny", per_control=0)
