"""The suite `inversion` on a tiny decoder: who sees no difference has 50 %, and who goes by the text is told from who goes by the state."""

import pytest

from lqa.evals import inversion, steer_persona
from lqa.evals.steer_persona import Behaviour
from lqa.evals.suite import Job
from lqa.journal import Journal

BEHAVIOURS = [
    Behaviour(f"b{i}", f"Speak like a {w}.", f"It is a {w}.", {}, ("How are you?", "What?")) for i, w in enumerate(("cook", "doctor"))
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(decoder, *methods): the suite's result on two behaviours and two messages, and the keys of its journal."""
    monkeypatch.setattr(inversion, "load", lambda suite: list(BEHAVIOURS))
    monkeypatch.setattr(steer_persona.methods.strongest, "__kwdefaults__", {"most": 0.5, "step": 0.5, "requests": 1})

    def go(decoder, *methods):
        with Journal(tmp_path / "journal.jsonl", {}) as journal:
            given = {"data": None, "limit": None, "methods": ["unsteered", *methods], "examples": 2, "kept": tmp_path / "made"}
            return inversion.run(Job("inversion", decoder, journal, **given)), list(journal.records)

    return go


def test_references_are_at_chance_where_the_text_is_silent(tiny_decoder, run):
    decoder = tiny_decoder(conditioning="amplified", conditioning_constant=2.0, layers_per_reading=2, default_layer=[0, 1])
    result, keys = run(decoder, "system_prompt", "caa", "steering")
    rows, columns = result.tables["follows"].rows, list(result.tables["follows"].columns)
    assert columns == ["contradicted", "silent", "contradicted, compared", "silent, compared"]
    assert list(rows) == ["unsteered", "system_prompt", "steering", "none", "shuffled", "text_only"] and len(keys) == 3  # caa has no row
    for row in ("unsteered", "none", "shuffled", "text_only"):
        assert rows[row][1].mean == 0.5 and rows[row][1].n == 2, row
    assert rows["none"][2] is None and rows["steering"][3].n == 2
    first = next(e for e in result.items if e["message"] == "How are you?")
    a, b = (next(x for x in BEHAVIOURS if x.id == i) for i in first["ids"])
    chat = [{"role": "system", "content": a.control}, {"role": "user", "content": f"{b.control} How are you?"}]
    expected = decoder.read(chat, "turn:-1").logprobs(inversion.QUESTION, [a.answer, b.answer])
    assert first["scores"]["system_prompt"]["contradicted"][0] == pytest.approx(expected, abs=1e-4)
    assert first["scores"]["steering"]["silent"] != first["scores"]["steering"]["silent, compared"]
    assert not decoder.base.steered
    assert run(decoder, "system_prompt", "caa", "steering")[0] == result


def test_pairs_are_seeded_and_a_limit_counts_messages(tiny_decoder, tmp_path):
    decoder = tiny_decoder()
    with Journal(tmp_path / "journal.jsonl", {}) as journal:

        def pairs(**kwargs):
            found, messages = inversion.pairs_of(Job("inversion", decoder, journal, **{"data": None, "limit": None} | kwargs))
            return [tuple(b.id for b in pair) for pair in found], len(messages)

        every, n = pairs()
        assert n == inversion.MESSAGES and len({i for pair in every for i in pair}) == 2 * len(every) >= 14
        assert pairs() == (every, n) != pairs(seed=1)
        assert pairs(limit=9) == (every[:2], n) and pairs(limit=3) == (every[:1], 3)
