"""Metrics by cases made by hand; the suite `identify` on a tiny decoder; results folders."""

import json
import random

import pytest

from lqa import LqaError
from lqa.evals import data, runner
from lqa.evals.identify import FIXED_MESSAGE, QUESTIONS, Draw, Item, identify, make_draws
from lqa.evals.statistics import bootstrap


def item(i: int, kind: str = "goal") -> Item:
    return Item(f"{kind}-test-{i}", kind, f"Speak of {i} cities." + " Please." * (i % 3), f"What of {i}?", f"It speaks of {i} cities.")


def test_hits_are_argmax_of_centred_scores():
    # Sentence 0 is likely under every reading; only what differs from its mean may count.
    scores = ((-1.0, -5.0, -6.0), (-1.2, -4.0, -6.0), (-1.4, -5.0, -5.0))
    assert Draw(("a", "b", "c"), scores, 3).hits() == [1.0, 1.0, 1.0]
    swapped = (scores[1], scores[0], scores[2])
    assert Draw(("a", "b", "c"), swapped, 3).hits() == [0.0, 0.0, 1.0]
    assert Draw(("a", "b", "c"), swapped, 1).hits() == [0.0]


def test_equal_readings_hit_by_chance_exactly():
    draw = Draw(tuple("abcd"), ((-1.0, -2.0, -3.0, -4.0),) * 4, 4)
    assert draw.hits() == [0.25] * 4
    wobbly = Draw(tuple("abcd"), tuple(tuple(-i + 1e-8 * (i * j % 3) for i in range(4)) for j in range(4)), 4)
    assert wobbly.hits() == [0.25] * 4  # rounding does not decide


def test_draws_are_of_one_kind_seeded_and_cover_everything():
    items = [item(i) for i in range(21)] + [item(i, "persona") for i in range(9)]
    draws = make_draws(items, 8, seed=0)
    assert draws == make_draws(items, 8, seed=0) != make_draws(items, 8, seed=1)
    assert sorted(i.label for draw, counted in draws for i in draw[:counted]) == sorted(i.label for i in items)  # each counts once
    for draw, _ in draws:
        assert len(draw) == 8 and len({i.kind for i in draw}) == 1 and len({i.answer for i in draw}) == 8
    with pytest.raises(LqaError, match="too few items"):
        make_draws(items[:5], 8, seed=0)


def test_bootstrap_covers_the_mean_and_is_seeded():
    rng = random.Random(3)
    covered = 0
    for seed in range(60):
        values = [float(rng.random() < 0.3) for _ in range(80)]
        mean, low, high = bootstrap([[v] for v in values], resamples=400, seed=seed)
        assert mean == pytest.approx(sum(values) / 80) and low <= mean <= high
        covered += low <= 0.3 <= high
    assert covered >= 50  # 95 % nominal
    pairs = [[0.0, 0.0], [1.0, 1.0], [1.0]] * 10
    assert bootstrap(pairs, seed=5) == bootstrap(pairs, seed=5) and bootstrap(pairs)[0] == 0.6
    alone = bootstrap([[v] for pair in pairs for v in pair])
    assert bootstrap(pairs)[1] < alone[1]  # values that hang together say less
    with pytest.raises(ValueError):
        bootstrap([])


def test_identify_none_is_chance_and_rerun_is_equal(tiny_decoder):
    decoder = tiny_decoder()
    items = [item(i) for i in range(8)]
    result = identify(decoder, items, m=4, progress=lambda _: None)
    assert result == identify(decoder, items, m=4, progress=lambda _: None)
    assert result["table"]["none"]["accuracy"] == 0.25 and result["chance"] == 0.25 and result["message"] == FIXED_MESSAGE
    for row in result["table"].values():
        assert row["n"] == 8 and row["low"] <= row["accuracy"] <= row["high"]
    assert set(result["table"]) == {"ours", "none", "shuffled"} and result["left_out"] == {}
    assert identify(decoder, [*items, item(9, "user")], m=4, progress=lambda _: None)["left_out"] == {"user": 1}
    own = identify(decoder, items, m=4, message=None, progress=lambda _: None)
    assert set(own["table"]) == {"ours", "none", "shuffled", "text_only"}


def test_identify_tells_a_reader_from_a_guesser(tiny_decoder, monkeypatch):
    """A stand-in reading that knows its control is right every time; with the next reading's scores it never is."""
    from lqa.evals import identify as suite

    class Knowing:
        def __init__(self, item):
            self.item, self.span = item, (1, 2)

        def logprobs(self, question, answers, source="true"):
            assert question == QUESTIONS["goal"]
            return [-1.0 - (source == "true" and a != self.item.answer) * 0.1 - len(a) / 10 for a in answers]

    monkeypatch.setattr(suite, "_read", lambda decoder, item, message, layer: Knowing(item))
    result = identify(tiny_decoder(), [item(i) for i in range(16)], m=8, progress=lambda _: None)
    assert {name: row["accuracy"] for name, row in result["table"].items()} == {"ours": 1, "shuffled": 0, "none": 1 / 8}


def test_runner_writes_a_folder_that_the_report_reads(tiny_decoder, monkeypatch, tmp_path, capsys):
    decoder = tiny_decoder()
    monkeypatch.setattr(runner.LatentDecoder, "from_pretrained", classmethod(lambda cls, source=None, **_: decoder))
    monkeypatch.setattr(runner.data, "corpus_items", lambda: ([item(i) for i in range(9)], {"name": "own", "sha256": "0"}))
    runner.run(["identify"], tmp_path / "out", folder=None, decoder_source=None, limit=8)
    written = json.loads((tmp_path / "out" / "identify.json").read_text())
    about = written["provenance"]
    assert about["items"] == 8 and about["command"] == "python -m lqa eval identify --limit 8 --out OUT"
    assert about["code"] and about["corpus_revision"]
    runner.print_report([str(tmp_path / "out")])
    table = capsys.readouterr().out
    (tmp_path / "out" / "identify.json").write_text("{")
    with pytest.raises(LqaError, match="cannot be read"):
        runner.print_report([str(tmp_path / "out")])
    assert (tmp_path / "out" / "README.md").read_text() in table
    assert f"{written['fixed']['table']['ours']['accuracy']:.1%}" in table and "text_only" in table and "95 % interval" in table


def test_latentqa_format_is_read_in_place(tmp_path):
    folder = tmp_path / "latentqa" / "eval_dev"
    folder.mkdir(parents=True)
    system = [{"label": "goal-x-y", "system": "S", "stimulus_user": "U"}, {"label": "goal-no-qa", "system": "S", "stimulus_user": "U"}]
    (folder / "system.json").write_text(json.dumps(system))
    (folder / "qa.json").write_text(json.dumps({"goal-x-y": [["Q1", "A1"], ["Q2", "A2"]]}))
    expected = [Item("goal-x-y", "goal", "S", "U", "A1")]
    assert data.latentqa_items(tmp_path)[0] == expected == data.latentqa_items(folder)[0]
    (folder / "qa.json").write_text("[1]")
    with pytest.raises(LqaError, match="github.com/aypan17/latentqa"):
        data.latentqa_items(tmp_path)


def test_own_test_split_serves_without_outside_data():
    items, _ = data.corpus_items()
    assert len(items) >= 16 and {i.kind for i in items} <= set(QUESTIONS)
    assert all(i.system and i.message and i.answer for i in items)
