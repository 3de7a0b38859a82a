"""Confidence: metrics by cases made by hand, the fitted map, the sidecar's calibration in Answer.confidence, the suite, the command."""

import dataclasses
import json
import math

import pytest

from lqa import LatentDecoder
from lqa.calibration import Calibration, fit
from lqa.config import SIDECAR, DecoderConfig
from lqa.errors import LqaError
from lqa.evals import calibration as suite
from lqa.evals import data
from lqa.evals.data import Item
from lqa.evals.suite import Job
from lqa.journal import Journal
from train import calibrate


def item(i: int) -> Item:
    return Item(f"goal-test-{i}", "goal", f"Speak of {i} cities." + "!" * i, f"What of {i}?", f"It speaks of {i} cities.")


MAP = Calibration({"logprob": 1.0, "grounded": 2.0}, 0.5, 0.25, "it is right", {"n": 3})


# --- metrics ------------------------------------------------------------------------------------------------------


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    # bin .1-.2: two of 0.15 and 0.19, one right: |0.5 - 0.17|; bin .9-1: 0.95 and 1.0, both right: |1 - 0.975|
    confidence, right = [0.15, 0.95, 0.19, 1.0], [1.0, 1.0, 0.0, 1.0]
    assert suite.reliability(confidence, right) == [(2, pytest.approx(0.17), 0.5), (2, pytest.approx(0.975), 1.0)]
    assert suite.ece(confidence, right) == pytest.approx((2 * 0.33 + 2 * 0.025) / 4)
    assert suite.ece([0.5] * 4, [1.0, 0.0, 1.0, 0.0]) == 0 and suite.ece([1.0], [0.0]) == 1
    assert suite.ece([0.0, 1.0], [0.0, 1.0], bins=2) == 0


def test_auroc_counts_pairs():
    assert suite.auroc([0.9, 0.8, 0.3, 0.1], [1.0, 0.0, 1.0, 0.0]) == 0.75  # 3 of 4 pairs
    assert suite.auroc([0.5, 0.5], [1.0, 0.0]) == 0.5 and suite.auroc([0.1, 0.2], [1.0, 0.0]) == 0
    assert suite.auroc([0.1, 0.2], [1.0, 1.0]) is None


def test_the_abstention_curve_answers_the_surest_first():
    confidence, right = [0.2, 0.9, 0.5, 0.9], [0.0, 1.0, 0.0, 0.0]
    assert suite.risk_coverage(confidence, right) == [(0.5, 0.5), (0.75, pytest.approx(2 / 3)), (1.0, 0.75)]  # equals come together
    assert suite.surer_half(confidence, right) == 0.5
    assert suite.surer_half([0.3, 0.2, 0.1], [1.0, 0.0, 0.0]) == 0.5  # half of three is two
    assert suite.surer_half([0.9, 0.5, 0.5, 0.5], [0.0, 1.0, 1.0, 0.0]) == pytest.approx((2 / 3) / 2)  # a tie at the edge: its mean


def test_intervals_draw_clusters_and_hold_the_estimate():
    confidence, right = [0.1, 0.2, 0.8, 0.9] * 5, [0.0, 1.0, 0.0, 1.0] * 5
    clusters = [list(range(n, n + 4)) for n in range(0, 20, 4)]
    whole = suite.interval(suite.auroc, clusters, confidence, right)
    assert whole == (whole.__class__)(0.75, 0.75, 0.75, 20)  # every cluster is the same
    alone = suite.interval(suite.auroc, [[i] for i in range(20)], confidence, right)
    assert alone.mean == 0.75 and alone.low < 0.75 < alone.high
    assert alone == suite.interval(suite.auroc, [[i] for i in range(20)], confidence, right)
    assert suite.interval(suite.auroc, [[0], [1]], [0.1, 0.2], [1.0, 1.0]) is None


# --- the map ------------------------------------------------------------------------------------------------------


def test_confidence_is_the_logistic_of_the_weighted_features():
    z = 0.5 + 1.0 * -2.0 + 2.0 * 0.25
    assert MAP.confidence({"logprob": -2.0, "grounded": 0.25, "probability": 0.3}) == pytest.approx(1 / (1 + math.exp(-z)))
    assert MAP.confidence({"logprob": -1e6, "grounded": 0.0}) == 0 and MAP.confidence({"logprob": 1e6, "grounded": 0.0}) == 1
    assert Calibration.load(json.loads(json.dumps(MAP.dump()))) == MAP


def test_a_fit_recovers_what_the_answers_were_drawn_by():
    import random

    rng, true = random.Random(0), Calibration({"logprob": 1.5, "grounded": -2.0}, 0.7, 0.25, "x")
    rows = [{"logprob": rng.gauss(-1, 1), "grounded": rng.gauss(0.2, 0.5), "probability": 0.5} for _ in range(4000)]
    right = [float(rng.random() < true.confidence(row)) for row in rows]
    found = fit(rows, right, ["logprob", "grounded"], threshold=0.25, right="x")
    assert found.weights["logprob"] == pytest.approx(1.5, abs=0.2) and found.weights["grounded"] == pytest.approx(-2.0, abs=0.3)
    assert found.intercept == pytest.approx(0.7, abs=0.2) and found.threshold == 0.25
    assert suite.ece([found.confidence(row) for row in rows], right) < 0.03
    assert fit(rows, right, ["probability"], threshold=0.25, right="x").weights == {"probability": pytest.approx(0)}  # constant
    with pytest.raises(LqaError, match="All 2 answers are wrong"):
        fit(rows[:2], [0.0, 0.0], ["logprob"], threshold=0.25, right="x")


# --- the sidecar --------------------------------------------------------------------------------------------------


def test_the_sidecar_may_hold_a_calibration_and_need_not(tiny, config_for, tmp_path):
    base = tiny("smol")
    config_for(base, calibration=MAP.dump()).save(tmp_path)
    assert DecoderConfig.load(tmp_path).calibration == MAP.dump()
    path = tmp_path / SIDECAR
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in entries.items() if k != "calibration"}))
    assert DecoderConfig.load(tmp_path).calibration is None
    for change, words in (
        ({"weights": {"luck": 1.0}}, "unknown feature 'luck'"),
        ({"threshold": 2}, "threshold in"),
        ({"intercept": "0"}, "finite"),
        ({"novelty": 1}, "malformed"),
        ({"weights": None}, "malformed"),
    ):
        path.write_text(json.dumps(entries | {"calibration": MAP.dump() | change}))
        with pytest.raises(LqaError, match=words):
            DecoderConfig.load(tmp_path)


def test_confidence_is_calibrated_where_the_sidecar_says_how(tiny_decoder, capsys):
    chat = [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "What of the city?"}]
    questions = ["Who is it?", "How will the assistant speak?"]
    plain = tiny_decoder().read(chat, "user").ask(questions, max_new_tokens=6)
    assert not any(a.cannot_tell for a in plain)
    decoder = tiny_decoder(calibration=MAP.dump())
    reading = decoder.read(chat, "user")
    answers = reading.ask(questions, max_new_tokens=6, grounding=True)
    said = reading._decode(questions, ("true",), 6)
    for a, p, q, s in zip(answers, plain, questions, said, strict=True):
        (score,) = reading.score(q, [a.text])
        expected = MAP.confidence({"logprob": s.logprob, "grounded": score.logprob - score.logprob_none})
        assert a.text == p.text and a.confidence == pytest.approx(expected, abs=1e-5) and p.confidence == s.probability
        assert a.cannot_tell == (a.confidence < 0.25)
    never = dataclasses.replace(MAP, threshold=1.0)
    assert all(a.cannot_tell for a in tiny_decoder(calibration=never.dump()).read(chat, "user").ask(questions, max_new_tokens=6))


# --- the suite and the command --------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Eight items each of validation and test, short answers, and half of the answers right."""
    items = [item(i) for i in range(8)]
    about = {"name": "by hand", "sha256": "0"}
    monkeypatch.setattr(data, "items_of", lambda folder=None, form="system": (items, about))
    monkeypatch.setattr(data, "corpus_items", lambda split="test", form="system": (items, about))
    for name, value in {"MAX_NEW_TOKENS": 4, "SAMPLE_TOKENS": 3, "RESAMPLES": 40}.items():
        monkeypatch.setattr(suite, name, value)
    judged = suite._judged
    monkeypatch.setattr(suite, "_judged", lambda chunk, texts: [float(i % 2) for i, _ in enumerate(judged(chunk, texts))])
    return items


def test_the_suite_on_a_tiny_decoder(few, tiny_decoder, tmp_path):
    decoder = tiny_decoder(calibration=MAP.dump())

    def run():
        with Journal(tmp_path / "journal.jsonl", {}) as journal:
            return suite.run(Job("calibration", decoder, journal, data=None, limit=None)), list(journal.records)

    result, made = run()
    rows = result.tables["answers"].rows
    assert list(rows) == [*suite.SIGNALS, "all", "shipped"]
    assert rows["grounded"][1] is None and rows["all"][1] is None and rows["shipped"][2] is None
    assert all(c.n == 8 and c.low <= c.mean <= c.high for cells in rows.values() for c in cells if c)
    assert list(result.tables["references"].rows) == ["ours", "none", "shuffled", "text_only"]
    assert result.tables["references"].rows["text_only"][1] is None
    assert [p.name for p in result.plots] == ["reliability", "abstention"]

    entry = result.items[0]
    reading = decoder.read(
        [{"role": "system", "content": few[int(entry["id"][-1])].control}, {"role": "user", "content": suite.FIXED_MESSAGE}], "from:1"
    )
    question = suite.QUESTIONS["goal"]
    (score,), (said,) = reading.score(question, [entry["answer"]]), reading._decode([question], ("true",), 4)
    assert entry["answer"] == said.text and entry["probability"] == pytest.approx(said.probability, abs=1e-4)
    assert entry["grounded"] == pytest.approx(score.logprob - score.logprob_none, abs=1e-4)
    shipped = [MAP.confidence({"logprob": e["logprob"], "grounded": e["grounded"]}) for e in result.items]
    assert rows["shipped"][0].mean == pytest.approx(suite.auroc(shipped, [e["right"] for e in result.items]))
    (confidence,) = reading.ask(question, max_new_tokens=4)
    assert confidence.confidence == pytest.approx(shipped[0], abs=1e-3)  # the suite measures what users see

    path = tmp_path / "journal.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:4]))
    assert run() == (result, made)


def test_where_all_answers_are_wrong_nothing_is_fitted_and_the_rest_is_told(few, tiny_decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_judged", lambda chunk, texts: [0.0] * sum(draw.counted for draw in chunk))
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        result = suite.run(Job("calibration", tiny_decoder(), journal, data=None, limit=None))
    rows = result.tables["answers"].rows
    assert list(rows) == [name for name, (_, share) in suite.SIGNALS.items() if share]  # nothing stands for itself but shares
    assert all(cells[0] is None and cells[1] is not None and cells[2] is None for cells in rows.values())
    assert result.tables["references"].rows["ours"][0].mean == 0 and result.tables["references"].rows["ours"][1] is None
    assert all(item["confidence"] is None for item in result.items)


def test_right_is_nearest_to_its_own_reference(monkeypatch):
    draw = suite.Draw(tuple(item(i) for i in range(4)), 3)
    import torch

    close = torch.tensor([[0.9, 0.1, 0.2, 0.8], [0.3, 0.4, 0.1, 0.4], [0.0, 0.7, 0.3, 0.2]])
    monkeypatch.setattr(suite, "similarities", lambda texts, references: close)
    assert suite._judged([draw], ["a", "b", "c"]) == [1, 0, 0]  # a tie is not right; the fourth fills up


def test_the_command_stores_a_map_that_the_decoder_then_uses(few, decoder_folder, tiny, monkeypatch, capsys):
    folder = decoder_folder("smol")
    load = LatentDecoder.from_pretrained
    monkeypatch.setattr(calibrate.LatentDecoder, "from_pretrained", lambda source: load(source, base=tiny("smol")))
    before = DecoderConfig.load(folder)
    assert calibrate.main([str(folder), "--threshold", "0.4"]) == 0
    after = DecoderConfig.load(folder)
    assert dataclasses.replace(after, calibration=None) == before
    stored = Calibration.load(after.calibration)
    assert (
        set(stored.weights) == set(suite.ALL)
        and stored.threshold == 0.4
        and stored.fitted["n"] == 8
        and stored.fitted["share right"] == 0.5
    )
    chat = [{"role": "system", "content": few[0].control}, {"role": "user", "content": suite.FIXED_MESSAGE}]
    assert load(folder, base=tiny("smol")).calibration == stored
    reading = load(folder, base=tiny("smol")).read(chat, "user")
    assert 0 < reading.ask("Who is it?", max_new_tokens=4)[0].confidence < 1

    assert calibrate.main([str(folder), "--guidance", "3", "0.5"]) == 0
    chosen = DecoderConfig.load(folder)
    shares = chosen.calibration["fitted"]["guidance"]
    assert set(shares) == {"0.5", "3.0"} and shares[str(chosen.guidance)] == max(shares.values())
    assert dataclasses.replace(chosen, calibration=None, guidance=0.0) == before
    assert chosen.guidance == 0.5 or shares["3.0"] > shares["0.5"]  # the smaller one of equals

    capsys.readouterr()
    for argv, words in (
        (["nowhere"], "no decoder folder nowhere"),
        ([str(folder), "--limit", "0"], "at least 1, not 0"),
        ([str(folder), "--guidance", "-1"], "guidance is -1.0; give a number of at least 0"),
        ([str(folder), "--limit", "3"], "too few items"),
    ):
        assert calibrate.main(argv) == 2
        assert words in capsys.readouterr().err
