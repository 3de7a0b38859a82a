"""The checks of the whole corpus catch what they are for, and nothing else."""

import copy
from dataclasses import replace

import pytest

from lqa.corpus import checks, load_controls
from lqa.corpus.checks import near_duplicates, shingles

LONG = "the quick brown fox jumps over the lazy dog while seven old wizards watch from the hill and drink their tea"


def row(label="goal-style-pirate", chat=("Talk like a buccaneer.", "What is a good soup?"), qa=(), form="system", **changes):
    roles = {"system": ["system", "user"], "control": ["user"], "stimulus": ["user", "assistant", "user"]}[form]
    pairs = [{"question": q, "answer": a, "alternatives": [], "type": "description", "generic": False} for q, a in qa]
    return {
        "id": f"{label}/0",
        "label": label,
        "kind": label.split("-")[0],
        "category": label.split("-")[1],
        "form": form,
        "chat": [{"role": r, "content": text} for r, text in zip(roles, chat, strict=True)],
        "span": "from:1",
        "message": "own",
        "model": None,
        "qa": pairs,
        "contrast": [],
    } | changes


def test_shingles_are_runs_of_three_words_whatever_their_case_and_punctuation():
    assert shingles("To be, or NOT to be!") == {"to be or", "be or not", "or not to", "not to be"}
    assert shingles("Hi there") == {"hi there"}


def test_near_duplicates_are_exactly_the_pairs_above_the_threshold():
    one_word_changed = LONG.replace("tea", "wine")
    words = LONG.split()
    texts = [LONG, "something else entirely is said here", one_word_changed, LONG.upper() + "!", " ".join(words[:8] + words[12:])]
    a, b = shingles(LONG), shingles(one_word_changed)
    found = near_duplicates(texts)
    assert {(i, j) for i, j, _ in found} == {(0, 2), (0, 3), (2, 3)}
    assert [s for i, j, s in found if (i, j) == (0, 2)] == [len(a & b) / len(a | b)]
    assert {(i, j) for i, j, _ in near_duplicates(texts, 1.0)} == {(0, 3)}


def test_lsh_misses_none_of_many_pairs_at_the_threshold():
    import random

    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(3000)]
    texts = []
    for _ in range(150):
        words = rng.choices(vocabulary, k=22)  # 20 shingles; 3 new ones of 23 leave 17 of 23: 0.74
        texts += [" ".join(words), " ".join(words[:-1] + ["new"] + words[-1:])]
    pairs = {(i, j) for i, j, _ in near_duplicates(texts)}
    assert pairs == {(2 * k, 2 * k + 1) for k in range(150)}


def test_duplicates_across_sides_are_found_but_not_between_the_two_test_splits():
    original, copied = row(chat=(LONG, "What is a good soup?")), row("goal-style-other", (LONG.replace("tea", "rum"), "Why do birds sing?"))
    found = checks.duplicates_across({"train": [original], "test": [copied]})
    assert len(found) == 1 and found[0].startswith("goal-style-pirate (train): the control") and "goal-style-other (test)" in found[0]
    assert checks.duplicates_across({"test": [original], "test_pool": [copied]}) == []
    same_message = checks.duplicates_across(
        {"train": [row()], "test": [row("goal-style-x", ("Be kind and calm.", "What is a good soup?"))]}
    )
    assert len(same_message) == 1 and "the message" in same_message[0]


def test_specific_pairs_and_descriptions_are_compared_but_shared_generic_questions_and_labels_are_not():
    long = row(qa=[("How does the assistant greet somebody?", LONG)])
    other = row("goal-style-y", ("Be kind and calm.", "Why do birds sing?"), qa=[("How does the assistant greet somebody?", LONG)])
    assert any("the pair" in p for p in checks.duplicates_across({"train": [long], "test": [other]}))
    for generic, kind, expected in ((True, "short", 0), (True, "description", 1)):
        a, b = copy.deepcopy([long, other])
        for r in (a, b):
            r["qa"][0] |= {"generic": generic, "type": kind}
        assert len(checks.duplicates_across({"train": [a], "test": [b]})) == expected


def test_leaks_in_message_and_question_are_found_once():
    leaking = row(
        chat=("Talk like a pirate of Tortuga.", "Which pirate sailed to Tortuga?"), qa=[("Does a pirate of Tortuga speak?", "Yes.")]
    )
    found = checks.leaks([leaking, leaking])
    assert len(found) == 2 and "the message" in found[0] and "['pirat', 'tortuga']" in found[1]
    assert checks.leaks([row()]) == []


def test_the_question_only_picker_is_right_when_questions_betray_and_blind_when_they_do_not():
    betraying = [
        row(f"goal-a-{i}", qa=[(f"Is it about word{'abcdefghijklmnop'[i]}x?", f"Yes, word{'abcdefghijklmnop'[i]}x.")]) for i in range(16)
    ]
    assert checks.question_only(betraying) == 1.0
    blind = [row(f"goal-a-{i}", qa=[("What is it?", f"Answer{'abcdefghijklmnop'[i]}x.")]) for i in range(16)]
    assert checks.question_only(blind) == pytest.approx(1 / 8)  # all tie: a blind pick among eight
    assert checks.question_only(blind[:5]) is None


def test_contamination_finds_the_same_in_other_words_and_leaves_neighbours_alone():
    ours = [
        row("persona-job-captain", ("You are a pirate captain.", "What is a good soup?")),
        row("goal-a-b", ("Answer in French.", "Why?")),
    ]
    theirs = [
        row("persona-x-y", ("Imagine you are a captain of pirates.", "Tell me a joke.")),
        row("goal-c-d", ("Answer in rhymes.", "Why?")),
    ]
    found = checks.contamination(ours, theirs)
    assert len(found) == 1 and found[0].startswith("persona-job-captain: the control 'You are a pirate captain.' is close")
    assert "persona-x-y" in found[0]
    assert checks.contamination(ours, [row("goal-c-d", ("Answer in rhymes.", "Why?"))]) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Write to jane.doe@example.org for the key of the house.", "an e-mail address"),
        ("The manual lies at https://example.org/manual for you to read.", "a web address"),
        ("Ring me at +44 20 7946 0958 when the train has arrived.", "a telephone number"),
        ("Ring me at 555-123-4567 when the train has arrived, please.", "a telephone number"),
        ("Send the rent to DE89 3704 4440 5320 1305 99 on the first day.", "an account number"),
        ("It\u2019s a fine day for a walk along the river with the dog.", "U\\+2019"),
        ("The cafe\u0301 at the corner is open until late in the evening.", "NFC"),
        ("Il fait beau aujourd'hui et nous allons nous promener dans la forêt avec les enfants.", "'fr', not English"),
    ],
)
def test_private_data_encoding_and_language_are_caught(text, words):
    import re

    found = checks.text_problems("goal-a-b", [text])
    assert len(found) == 1 and found[0].startswith("goal-a-b") and re.search(words, found[0])


def test_ordinary_texts_have_no_problem():
    texts = ["2031-05-02 08:14:07 INFO ready to go", "It was 1984, and 12,000 people came.", "Call me at 6, said José, who sells 3 cafés."]
    assert checks.text_problems("goal-a-b", [*texts, LONG]) == []


def test_a_living_person_an_unbalanced_category_and_near_duplicates_within_are_caught():
    good = list(load_controls())[:12]
    assert not [p for p in checks.check_controls(good, ["What is a good soup?"]) if "close" in p or "living" in p]
    bad = [replace(good[0], control="You are Taylor Swift, and you write songs about everything."), *good[1:]]
    assert any("names Taylor Swift, a living person" in p for p in checks.check_controls(bad, []))
    twin = replace(good[1], id="goal-emotion-twin")
    found = checks.check_controls([*good, twin], ["One, two, three.", "One, two, three!", "x"])
    assert {what for what in ("control", "description", "pair", "message") if any(f"the {what} " in p for p in found)} == {
        "control",
        "description",
        "pair",
        "message",
    }
    assert "messages: 'x' has 1 words, allowed are 2 to 45" in found
    many = [replace(good[0], id=f"goal-big-{i}") for i in range(40)] + [replace(good[0], id=f"goal-c{'abcdefgh'[i]}-{i}") for i in range(8)]
    assert [p.split(":")[0] for p in checks.balance_problems(many)] == ["goal-big", *(f"goal-c{c}" for c in "abcdefgh")]


def test_splits_with_shared_labels_lost_partners_or_bad_answers_are_caught():
    a, b = (
        row(contrast=["goal-style-b"]),
        row("goal-style-b", ("Be very polite.", "Why do birds sing?"), qa=[("How polite is it?", "so " * 61)]),
    )
    found = checks.check_splits({"train": [a], "test": [b], "test_pool": [copy.deepcopy(a)]})
    assert "goal-style-pirate: it lies in the splits test, train" in found
    assert "goal-style-pirate: its contrast partner goal-style-b lies in another split" in found
    assert any(p.startswith("goal-style-b: the answer") and "1 to 60" in p for p in found)
