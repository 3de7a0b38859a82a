"""The suite `system-prompts`: its personas, its metrics by hand, and a run on a tiny decoder."""

import pytest

from lqa.evals import system_prompts
from lqa.evals.mention import contains
from lqa.evals.suite import Job
from lqa.evals.system_prompts import ROWS, Persona, choice, groups, load, majority
from lqa.journal import Journal


def test_the_personas_are_ten_and_ten_and_the_messages_name_none():
    sets, messages, question = load()
    everybody = [*sets["easy"], *sets["hard"]]
    assert [len(sets[name]) for name in ("easy", "hard")] == [10, 10] and len(messages) == 8 and question
    assert len({p.name for p in everybody}) == 20 == len({p.answer for p in everybody}) == len({p.system for p in everybody})
    for persona in everybody:
        assert contains(persona.answer, persona.name) and contains(persona.system, persona.name)
        others = [p for p in everybody if p is not persona]
        assert not any(contains(p.system + p.answer, name) for p in others for name in persona.names)
        assert not any(contains(message, name) for message in messages for name in persona.names)
    for a, b in zip(sets["hard"][::2], sets["hard"][1::2], strict=True):  # pairs share what they are
        assert a.answer.removeprefix(a.name) == b.answer.removeprefix(b.name)


PEOPLE = [Persona(name, (name, name.split()[-1]), "", "") for name in ("Ada Byron", "Ida Stone", "Eve Marsh")]


def test_scores_are_centred_and_averaged_over_messages():
    # Ida's answer is likely under every reading; only what differs from its mean counts.
    first = [[-2.0, -1.0, -3.0], [-2.5, -0.5, -3.0], [-2.5, -1.0, -2.5]]
    assert choice(PEOPLE, [first]) == [1.0, 1.0, 1.0]
    wrong = [first[1], first[0], first[2]]
    assert choice(PEOPLE, [wrong]) == [0.0, 0.0, 1.0]
    strong = [[10 * s for s in row] for row in first]
    assert choice(PEOPLE, [wrong, strong]) == [1.0, 1.0, 1.0]
    assert choice(PEOPLE, [[[-1.0, -2.0, -3.0]] * 3]) == [1 / 3] * 3


def test_the_name_that_most_answers_contain_wins():
    once = ["It is Ada Byron.", "I do not know.", "A Marsh, surely."]
    assert majority(PEOPLE, [once]) == [1.0, 0.0, 1.0]
    again = ["It is Stone.", "Ida Stone", "Eve"]
    assert majority(PEOPLE, [once, again]) == [0.5, 1.0, 1.0]
    assert majority(PEOPLE, [once, again, again]) == [0.0, 1.0, 1.0]


def test_messages_are_grouped_without_rest():
    assert groups(list("abcde"), 2) == [["a", "b"], ["c", "d"]] and groups(list("abc"), 1) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("limit", [20, 40])
def test_run_has_every_method_and_what_knows_nothing_is_at_chance(tiny_decoder, tmp_path, limit):
    decoder = tiny_decoder("smol", conditioning="projected")
    n = limit // 20  # messages

    def run(out):
        with Journal(out / "journal.jsonl", {}) as journal:
            return system_prompts.run(Job("system-prompts", decoder, journal, data=None, limit=limit, rows={"twin": decoder}))

    result = run(tmp_path)
    with_probe = {"probe"} if n > 1 else set()  # a probe is trained on other messages
    for name in ("easy", "hard"):
        table = result.tables[name]
        known = set(ROWS) - {"text_only_trained", "probe"} | with_probe
        assert set(table.rows) == {ROWS[method] for method in known} | {"twin"}
        assert list(table.columns) == [f"{what}, {m}" for what in ("choice", "named") for m in range(1, n + 1)]
        for method in ("none", "text_only"):  # the same for all personas
            cells = table.rows[ROWS[method]][:n]
            assert [(c.mean, c.low, c.high) for c in cells] == [pytest.approx((0.1, 0.1, 0.1))] * len(cells)
        assert table.rows["twin"] == table.rows[ROWS["ours"]] and table.rows[ROWS["ours"]][0].n == 10 * n
        if with_probe:
            assert table.rows[ROWS["nearest"]][0].n == 10 * n and table.rows[ROWS["nearest"]][-1] is None
            assert table.rows[ROWS["probe"]][0].mean > 0.5 and table.rows[ROWS["probe"]][-1] is None
    assert len(result.items) == limit and len(result.plots) == 4
    confusion = result.plots[1].series[""]["values"]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in confusion)
    assert run(tmp_path) == result
