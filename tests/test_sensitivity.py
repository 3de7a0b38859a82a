"""The suite `sensitivity`: swaps by cases made by hand, the committed inversion items, and the suite on a tiny decoder."""

import pytest

from lqa import LqaError
from lqa.corpus.schema import content_words
from lqa.evals import data
from lqa.evals import sensitivity as suite
from lqa.evals.data import Item
from lqa.evals.suite import Job
from lqa.journal import Journal


def item(i: int, kind: str = "goal") -> Item:
    return Item(f"{kind}-test-{i}", kind, f"Speak of {i} cities." + "!" * i, f"What of {i}?", f"It speaks of {i} cities.")


def test_a_swap_follows_the_state_if_the_preference_moves_with_it():
    # B's answer is likelier under both readings; under A less so: the answer follows.
    assert suite.follows(own_a=-3.0, other_a=-2.5, own_b=-2.0, other_b=-3.5) == 1
    assert suite.follows(own_a=-3.0, other_a=-2.0, own_b=-2.5, other_b=-3.0) == 0  # A's answer gains under B
    assert suite.follows(own_a=-3.0, other_a=-2.5, own_b=-2.5, other_b=-3.0) == 0.5  # the same under both
    scores = [[-1.0, -2.0, -3.0], [-1.5, -1.0, -3.0], [-0.5, -2.0, -3.0]]
    # 0 and 1: (-1+2) - (-1.5+1) > 0; 0 and 2: (-1+3) - (-0.5+3) < 0; 1 and 2: (-1+3) - (-2+3) > 0
    assert suite.swaps(scores) == [1, 0, 1]
    assert suite.swaps([[-1.0, -2.0]] * 2) == [0.5]


def test_groups_are_of_one_kind_with_different_answers():
    items = [item(i) for i in range(9)] + [item(i, "persona") for i in range(3)] + [item(0, "user")]
    items.append(items[0]._replace(label="goal-test-twin"))  # the same answer: no swap would tell
    found = suite.groups(items, 0)
    assert sorted(len(g) for g in found) == [3, 4, 4] and found == suite.groups(items, 0) != suite.groups(items, 1)
    assert all(len({i.kind for i in g}) == 1 and len({i.answer for i in g}) == len(g) for g in found)


def test_the_inversion_items_say_one_thing_hidden_and_the_other_in_the_text():
    facts = suite.load_facts()
    assert len(facts) >= 40 and len({f.id for f in facts}) == len(facts)
    for fact in facts:
        x, y = fact.values
        assert x != y
        for text in (fact.system, fact.user, fact.answer):
            assert text.count("{}") == 1, fact.id
        first, second = fact.sides()
        assert first.system == fact.system.format(x) and first.message == fact.user.format(y) and first.answer == fact.answer.format(x)
        assert second.system == fact.system.format(y) and second.message == fact.user.format(x) and second.answer == fact.answer.format(y)
        assert fact.question.endswith("?") and "{" not in fact.question
        for text in (suite.FIXED_MESSAGE, fact.user.format("")):  # a silent text is silent
            assert not (content_words(x) - content_words(y)) & content_words(text), fact.id
        both = [value.lower() in fact.question.lower() for value in fact.values]
        assert both[0] == both[1], f"{fact.id}: the question names one value alone"
        silent = fact.sides("Hello!")
        assert [s.message for s in silent] == ["Hello!"] * 2 and [s.answer for s in silent] == [first.answer, second.answer]


def test_the_suite_on_a_tiny_decoder(tiny_decoder, monkeypatch, tmp_path):
    items = [item(i) for i in range(6)]
    monkeypatch.setattr(data, "items_of", lambda folder=None, form="system": (items, {"name": "by hand", "sha256": "0"}))
    monkeypatch.setattr(suite, "MAX_NEW_TOKENS", 4)
    facts = suite.load_facts()[:3]
    monkeypatch.setattr(suite, "load_facts", lambda: facts)
    decoder = tiny_decoder()

    def run():
        with Journal(tmp_path / "journal.jsonl", {}) as journal:
            return suite.run(Job("sensitivity", decoder, journal, data=None, limit=None)), list(journal.records)

    result, made = run()
    swaps, inversion, silent = (result.tables[name].rows for name in ("swaps", "inversion", "silent"))
    assert list(swaps) == ["ours", "none", "shuffled", "text_only"] and list(inversion) == list(silent) == list(swaps)
    assert [c.n for c in swaps["ours"]] == [7] * 3 and [c.n for c in inversion["ours"]] == [3] * 3  # 6 + 1 pairs; 3 items
    for row in ("none", "text_only"):  # they see the same under both
        assert [c.mean for c in swaps[row]] == [0.5, 0.5, 0.0] == [c.mean for c in silent[row]]
    entry = next(e for e in result.items if e["part"] == "swaps")
    reading = decoder.read(
        [{"role": "system", "content": items[int(entry["ids"][0][-1])].control}, {"role": "user", "content": suite.FIXED_MESSAGE}], "from:1"
    )
    answers = [items[int(label[-1])].answer for label in entry["ids"]]
    assert entry["scores"]["ours"][0] == pytest.approx(reading.logprobs(suite.QUESTIONS["goal"], answers), abs=1e-4)
    assert entry["answers"]["ours"][0] == reading.ask(suite.QUESTIONS["goal"], max_new_tokens=4)[0].text
    assert entry["follows"]["ours"]["score"] == suite.swaps(entry["scores"]["ours"])

    items[1:] = [item(0, "persona")]
    with Journal(tmp_path / "other.jsonl", {}) as journal, pytest.raises(LqaError, match="too few items of one kind"):
        suite.run(Job("sensitivity", decoder, journal, data=None, limit=None))
    items[:] = [item(i) for i in range(6)]
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:2]))
    assert run() == (result, made)


def test_a_reader_follows_the_state_and_a_parrot_the_text(monkeypatch):
    group = suite.load_facts()[0].sides()
    state, text = group[0].answer, group[1].answer
    close = {(a, b): float(a == b) for a in (state, text) for b in (state, text)}
    monkeypatch.setattr(suite, "similarities", lambda said, refs: suite_tensor([[close[s, r] for r in refs] for s in said]))
    reader = {"scores": [[-1.0, -2.0], [-2.0, -1.0]], "answers": [state, text]}
    parrot = {"scores": [[-2.0, -1.0], [-1.0, -2.0]], "answers": [text, state]}
    stubborn = {"scores": [[-1.0, -2.0]] * 2, "answers": [state, state]}
    assert suite._hits(reader, group) == {"score": [1.0], "answer": [1.0], "differ": [1.0]}
    assert suite._hits(parrot, group) == {"score": [0.0], "answer": [0.0], "differ": [1.0]}
    assert suite._hits(stubborn, group) == {"score": [0.5], "answer": [0.5], "differ": [0.0]}


def suite_tensor(rows):
    import torch

    return torch.tensor(rows)
