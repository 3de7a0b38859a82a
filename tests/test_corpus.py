"""The authored corpus keeps its own rules, the rules catch what they are for, and the splits share nothing."""

from collections import Counter
from dataclasses import replace

import pytest
import yaml

from lqa.corpus import KINDS, SPLITS, load_controls, load_messages, load_questions, revision, schema, split_of
from lqa.corpus.schema import QA, check, content_words, parse_control, problems, read_controls

ENTRY = {
    "id": "goal-style-pirate",
    "control": "Speak like a pirate of the old Caribbean in every reply.",
    "acknowledgement": "Aye, from here on I shall talk that way.",
    "stimuli": ["What is a good way to learn cooking?", "Tell me how a fridge works, please."],
    "descriptions": ["The assistant talks as a buccaneer at sea would talk.", "Its language is that of a seafaring robber long ago."],
    "short": "Like a buccaneer",
    "qa": [
        {"q": "What manner of talking does the assistant have?", "a": "That of a buccaneer.", "type": "description"},
        {"q": "Which century does its language belong to?", "a": "The seventeenth.", "type": "description"},
        {"q": "How does it greet somebody?", "a": "With ahoy.", "type": "reasoning"},
        {"q": "What does it call a friend?", "a": "A matey.", "type": "reasoning"},
    ],
    "contrast": ["goal-style-cowboy", "goal-style-knight"],
}


def control(**changes):
    return replace(parse_control(ENTRY, "here"), **changes)


# --- the corpus itself ------------------------------------------------------------------------------------------


def test_the_authored_corpus_has_no_problem_and_at_least_400_controls():
    controls = load_controls()
    assert check(list(controls)) == []
    assert len(controls) >= 400


def test_splits_have_sensible_shares_of_the_kinds():
    sizes = {split: Counter(c.kind for c in load_controls(split)) for split in SPLITS}
    assert set(sizes["train"]) == set(sizes["test"]) == set(KINDS)
    assert all(sizes[split][kind] >= 10 for split in SPLITS for kind in ("goal", "persona"))  # those that candidates are drawn from
    total = len(load_controls())
    for split in ("validation", "test"):
        assert 0.03 < sum(sizes[split].values()) / total < 0.12


def test_splits_are_a_partition_with_contrast_partners_on_one_side():
    sides = split_of(load_controls())
    assert sum(len(load_controls(split)) for split in SPLITS) == len(load_controls()) == len(sides)
    for split in SPLITS:
        assert {sides[c.id] for c in load_controls(split)} == {split}
    assert not [(c.id, p) for c in load_controls() for p in c.contrast if sides[p] != sides[c.id]]


def test_no_control_text_stands_in_two_splits():
    seen = {}
    for split in SPLITS:
        for c in load_controls(split):
            assert seen.setdefault(frozenset(content_words(c.control)), split) == split


def test_a_side_hangs_on_ids_and_partners_alone():
    controls = list(load_controls())
    changed = [replace(c, control="Something else.", qa=()) for c in reversed(controls)]
    assert split_of(changed) == split_of(controls)


def test_partners_of_partners_stay_together():
    chain = [control(id=f"goal-chain-{i}", contrast=(f"goal-chain-{i + 1}",)) for i in range(30)]
    chain.append(control(id="goal-chain-30", contrast=()))
    assert len(set(split_of(chain).values())) == 1
    alone = [control(id=f"goal-alone-{i}", contrast=()) for i in range(200)]
    assert set(split_of(alone).values()) == set(SPLITS)


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="train, validation, test"):
        load_controls("dev")


def test_the_message_pool_is_large_distinct_and_about_no_control():
    messages = load_messages()
    assert len(messages) >= 150 and len({" ".join(m.lower().split()) for m in messages}) == len(messages)
    assert all(isinstance(m, str) and m.strip() == m and m for m in messages)


def test_every_kind_has_generic_questions():
    questions = load_questions()
    assert set(questions) == set(KINDS)
    for kind in KINDS:
        description, short = questions[kind]["description"], questions[kind]["short"]
        assert len(set(description)) == len(description) >= 2 and len(set(short)) == len(short) >= 2
        assert not set(description) & set(short)
        assert description[0].endswith("?") and short[0].endswith("?")  # the standard ones


def test_the_revision_changes_with_the_files(tmp_path, monkeypatch):
    import shutil

    from lqa import corpus

    before = revision()
    assert before == revision()
    shutil.copytree(corpus.HERE, tmp_path / "corpus")
    monkeypatch.setattr(corpus, "HERE", tmp_path / "corpus")
    assert revision() == before
    with open(tmp_path / "corpus" / "messages.yaml", "a") as file:
        file.write("- One more?\n")
    assert revision() != before


# --- the rules --------------------------------------------------------------------------------------------------


def test_the_example_of_these_tests_is_a_good_control():
    assert problems(control()) == []


QAS = control().qa


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stimuli": ("Which pirate sailed the Caribbean?", "Tell me how a fridge works.")}, "stimulus.*shares.*caribbean"),
        ({"qa": (QA("Does it speak as a pirate?", "Yes.", "description"), *QAS[1:])}, "question.*shares.*pirat"),
        ({"qa": QAS[:3]}, "at least two.*reasoning"),
        ({"qa": QAS[1:]}, "at least two of type description"),
        ({"qa": (*QAS, QA("Is this a kind that exists?", "No.", "riddle"))}, "at least two of type description"),
        ({"qa": (QA("Tell me its manner of talking", "So.", "description"), *QAS)}, "question mark"),
        ({"stimuli": ENTRY["stimuli"][:1]}, "at least two stimuli"),
        ({"descriptions": ENTRY["descriptions"][:1]}, "at least two descriptions"),
        ({"contrast": ("goal-style-cowboy",)}, "at least two contrast"),
        ({"contrast": ("goal-style-cowboy", "goal-style-pirate")}, "none of them itself"),
        ({"id": "mood-style-pirate"}, "kind one of goal"),
        ({"id": "goal-Style-pirate"}, "lower case"),
        ({"id": "goal-pirate"}, "kind-category-detail"),
        ({"control": "Be nice."}, "control has 2 words, allowed are 4 to 75"),
        ({"short": "one two three four five six"}, "short has 6 words"),
        ({"acknowledgement": "Aye."}, "acknowledgement has 1 words"),
        ({"stimuli": ("Hi there.", *ENTRY["stimuli"])}, "stimulus has 2 words"),
        ({"descriptions": ("Too few.", *ENTRY["descriptions"])}, "description has 2 words"),
    ],
)
def test_every_rule_catches_its_case(changes, words):
    import re

    found = problems(control(**changes))
    assert len(found) >= 1 and any(re.search(words, p) for p in found), found
    assert all(p.startswith(changes.get("id", "goal-style-pirate")) for p in found)


def test_words_are_compared_by_their_stems():
    assert content_words("The pirates were sailing quickly") == content_words("a Pirate's sail? Quick!")


def test_repeated_ids_repeated_texts_and_lost_partners_are_caught():
    a = control(contrast=("goal-style-other", "goal-style-lost"))
    b = control(id="goal-style-other", contrast=("goal-style-pirate", "goal-style-pirate"))
    found = check([a, a, b])
    assert "goal-style-pirate: the id occurs 2 times" in found
    assert "goal-style-pirate: contrast partner 'goal-style-lost' does not exist" in found
    assert any("goal-style-other: its control text repeats another's" in p for p in found)


@pytest.mark.parametrize("name", list(ENTRY))
def test_a_missing_field_is_an_error_that_names_place_and_field(name):
    entry = {k: v for k, v in ENTRY.items() if k != name}
    with pytest.raises(ValueError, match=f"file.yaml.*'{name}' is missing"):
        parse_control(entry, "file.yaml[3]")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"novelty": 1}, "novelty"),
        ({"short": ""}, "non-empty"),
        ({"short": " spaced"}, "spaces at its ends"),
        ({"short": 1984}, "1984"),
        ({"stimuli": ["Fine.", None]}, "None"),
        ({"qa": [{"q": "Why?", "a": "So."}]}, r"qa\[0\]"),
        ({"qa": [*ENTRY["qa"], "why"]}, r"qa\[4\]"),
    ],
)
def test_a_field_of_the_wrong_form_is_an_error(changes, words):
    with pytest.raises(ValueError, match=words):
        parse_control(ENTRY | changes, "file.yaml[0]")


@pytest.mark.parametrize("text", ["a: 1", "- [", "- text", "\x00"])
def test_a_file_that_is_not_a_list_of_controls_is_an_error_that_names_it(text, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="bad.yaml"):
        read_controls([path])


def test_the_checker_s_command_says_what_is_wrong_and_exits_with_2(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    partners = [ENTRY | {"id": i, "contrast": []} for i in ENTRY["contrast"]]
    path.write_text(yaml.safe_dump([ENTRY, *partners]))
    assert schema.main([str(path)]) == 2
    assert "at least two contrast partners" in capsys.readouterr().err
    path.write_text("- {}")
    assert schema.main([str(path)]) == 2
    assert "mine.yaml[0]" in capsys.readouterr().err
    assert schema.main([]) == 0  # the package's own
