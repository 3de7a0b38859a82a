"""The suites `steer-persona`, `generalise` and `steer-curve`: figures by hand, and runs on a tiny decoder."""

import math
from contextlib import ExitStack

import pytest
import torch

from lqa.evals import steer_curve, steer_persona
from lqa.evals.steer_persona import Behaviour, figures, limited, perplexity_ratio
from lqa.evals.suite import Job
from lqa.journal import Journal
from lqa.steering.strength import write_replies

REQUESTS = ("How are you?", "What is it?")
BEHAVIOURS = [
    Behaviour(f"b{i}", f"Speak like a {w}.", f"It is a {w}.", {"kind": "brief", "most": 2 + i}, REQUESTS) for i, w in enumerate("xyz")
]


@pytest.fixture
def job_for(tmp_path):
    """job_for(decoder, suite, **Job's): a job with a journal that jobs of one test share, and two steps for what is trained."""
    with ExitStack() as opened:

        def build(decoder, suite, **kwargs):
            opened.close()  # that of the job before
            journal = opened.enter_context(Journal(tmp_path / f"{suite}.jsonl", {}))
            methods = ["unsteered", "system_prompt", "steering"]
            given = {"data": None, "limit": None, "methods": methods, "examples": 4, "kept": tmp_path / "made"}
            return Job(suite, decoder, journal, **given | kwargs)

        yield build


@pytest.fixture
def short(monkeypatch):
    """Short replies, two behaviours with two requests each, and a search for strengths that asks one request."""
    monkeypatch.setattr(steer_persona, "NEW_TOKENS", 4)
    monkeypatch.setattr(steer_persona, "load", lambda suite: BEHAVIOURS[:2])
    monkeypatch.setattr(steer_persona.methods.strongest, "__kwdefaults__", {"most": 0.5, "step": 0.5, "requests": 1})


def reply(request: str, score: float, logprob: float, tokens: int = 4, greedy: bool = False, text: str = "a b c") -> dict:
    return {"request": request, "greedy": greedy, "text": text, "tokens": tokens, "logprob": logprob, "score": score}


def replies(scores, logprob: float) -> list[dict]:
    """Two sampled replies to each of len(scores) / 2 requests, and a greedy one."""
    sampled = [reply(str(i // 2), score, logprob) for i, score in enumerate(scores)]
    return sampled + [reply(str(i), 1.0, -9.0, greedy=True) for i in range(len(scores) // 2)]


def test_figures_of_a_method_by_hand():
    own, plain = replies([1, 1, 1, 1, 1, 0, 1, 1], -2.0), replies([0, 0, 0, 0, 0, 0, 0, 1], -1.5)
    found = figures(own, plain)
    assert found["behaviour"].mean == 7 / 8 and found["behaviour"].n == 8 and found["greedy"].n == 4 and found["greedy"].mean == 1
    assert found["difference"].mean == pytest.approx(6 / 8) and found["tokens"].mean == 4 and found["distinct-2"].mean == 1
    assert found["ratio"].mean == pytest.approx(math.exp(0.5)) and found["apart"].mean == 0  # too strange: the ratio is above 1.5
    assert found["perplexity"].mean == pytest.approx(math.exp(2)) == found["perplexity"].low and found["perplexity"].n == 8
    assert figures(replies([1] * 8, -1.6), plain)["apart"].mean == 1
    assert figures(replies([0, 0, 1, 1] * 2, -1.6), plain)["apart"].mean == 0  # the intervals overlap
    assert figures(plain, plain)["ratio"].mean == 1 and figures(plain, plain)["difference"].low == 0


def test_a_perplexity_ratio_is_per_token_over_all_replies():
    own = [reply("a", 1, -1.0, tokens=1), reply("b", 1, -3.0, tokens=3)]
    plain = [reply("a", 0, -1.0, tokens=10), reply("b", 0, -2.0, tokens=10)]
    assert perplexity_ratio(own, plain).mean == pytest.approx(math.exp(10 / 4 - 30 / 20))
    assert perplexity_ratio(own, plain).low == pytest.approx(1.0)  # request a alone


def test_a_limit_counts_requests_under_controls(tiny_decoder, job_for):
    decoder = tiny_decoder()

    def left(limit):
        return [len(b.requests) for b in limited(job_for(decoder, "steer-persona", limit=limit), BEHAVIOURS)]

    assert left(None) == [2, 2, 2] and left(5) == [2, 2] and left(2) == [2] and left(1) == [1]


def test_a_run_compares_methods_on_the_same_requests_and_resumes(tiny_decoder, job_for, short, tmp_path):
    decoder = tiny_decoder()
    job = job_for(decoder, "steer-persona", sweep=True)
    result = steer_persona.run(job)
    rows = ["unsteered", "system_prompt", "steering", *(f"steering x {x}" for x in steer_persona.STRENGTHS)]
    assert [(e["id"], e["method"]) for e in result.items] == [(b.id, row) for b in BEHAVIOURS[:2] for row in rows]
    assert list(result.tables["summary"].rows) == rows and list(result.tables["behaviour"].columns) == rows
    assert list(result.tables["ratio"].rows) == ["b0", "b1"] and {p.name for p in result.plots} == {"behaviour", "fluency"}
    for e in result.items:
        assert len(e["replies"]) == 2 * (steer_persona.DRAWS + 1) and all(r["tokens"] <= 4 for r in e["replies"])
        assert e["figures"]["behaviour"][0] == sum(r["score"] for r in e["replies"] if not r["greedy"]) / 4
    plain = {e["id"]: e for e in result.items if e["method"] == "unsteered"}
    assert plain["b0"]["replies"][0]["text"] == plain["b1"]["replies"][0]["text"] and plain["b0"]["figures"]["ratio"] == [1, 1, 1]
    columns = list(result.tables["summary"].columns)
    costs = {row: cells[columns.index("examples")].mean for row, cells in result.tables["summary"].rows.items()}
    assert costs["unsteered"] == costs["system_prompt"] == 0 and 2 <= costs["steering"] <= 4

    (greedy, *_) = [r for r in plain["b0"]["replies"] if r["greedy"]]  # by another way
    (ids,) = write_replies(decoder, [greedy["request"]], new_tokens=4)
    assert greedy["text"] == decoder.base.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert not [name for name, _ in decoder.base.model.named_parameters() if "lora" in name and f".{decoder.adapter}." not in name]

    kept = sorted(path.name for path in (tmp_path / "made").rglob("method.json"))
    assert len(kept) == 2  # a steering for each control; the others are not made
    lines = (tmp_path / "steer-persona.jsonl").read_text().splitlines(True)
    (tmp_path / "steer-persona.jsonl").write_text("".join(lines[:3]))
    again = steer_persona.run(job_for(decoder, "steer-persona", sweep=True))
    assert again == result


def test_generalise_is_the_same_measure_on_other_behaviours(tiny_decoder, job_for, monkeypatch):
    from lqa.evals import runner

    assert runner.suite_module("generalise").run is steer_persona.run
    monkeypatch.setattr(steer_persona, "NEW_TOKENS", 3)
    job = job_for(tiny_decoder(), "generalise", limit=2, methods=["unsteered"])
    (entry,) = steer_persona.run(job).items
    assert entry["id"] in {b.id for b in steer_persona.load("generalise")} and len({r["request"] for r in entry["replies"]}) == 2


def test_a_curve_follows_a_training_and_leaves_nothing_behind(tiny_decoder, job_for, short, monkeypatch, tmp_path):
    monkeypatch.setattr(steer_curve, "CONTROLS", ("b1",))
    monkeypatch.setattr(steer_curve, "STEPS", 4)
    monkeypatch.setattr(steer_curve, "EVERY", 2)
    decoder = tiny_decoder()
    before = {name: p.detach().clone() for name, p in decoder.base.model.named_parameters()}
    result = steer_curve.run(job_for(decoder, "steer-curve"))
    labels = list(dict.fromkeys(e["method"] for e in result.items))
    assert labels[1] == "no KL" and [(e["method"], e["step"]) for e in result.items] == [(label, n) for label in labels for n in (0, 2, 4)]
    first, *_, last = [e for e in result.items if e["method"] == "no KL"]
    assert first["control loss"] > last["control loss"] and last["kl"] == 0 and first["figures"]["ratio"] == [1, 1, 1]
    (ids,) = write_replies(decoder, [REQUESTS[0]], new_tokens=4)
    assert [r["text"] for r in first["replies"] if r["greedy"]][0] == decoder.base.tokenizer.decode(ids, skip_special_tokens=True).strip()
    after = dict(decoder.base.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    loss = next(plot for plot in result.plots if plot.name == "loss").series["no KL"]
    assert loss["x"] == [round(e["control loss"], 4) for e in result.items if e["method"] == "no KL"]
    assert list(result.tables["curve"].rows)[0] == f"{labels[0]}, step 0"
    assert steer_curve.run(job_for(decoder, "steer-curve")) == result


def test_ready_made_steerings_are_those_that_were_measured(tiny_decoder, short, monkeypatch, tmp_path, capsys):
    import json

    from lqa.cards import check_card
    from lqa.evals import runner
    from lqa.steering import read_sidecar
    from train.steerings import main

    decoder = tiny_decoder()
    monkeypatch.setattr(runner.LatentDecoder, "from_pretrained", classmethod(lambda cls, source=None, **_: decoder))
    results, out = tmp_path / "results", tmp_path / "steerings"
    runner.run(["steer-persona"], results, methods=["unsteered", "steering"], examples=4)
    document = json.loads((results / "steer-persona.json").read_text())
    assert main([str(results), "b1", "b0", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == [str(out / "b1"), str(out / "b0")]
    steering = decoder.load_steering(out / "b1")
    assert steering.record["control"] == BEHAVIOURS[1].control
    (item,) = [e for e in document["items"] if (e["id"], e["method"]) == ("b1", "steering")]
    effect = read_sidecar(out / "b1")["effect"]
    assert effect["strength"] == item["made"]["strength"] and effect["behaviour"] == item["figures"]["behaviour"]
    assert effect["replies"] == 4 and effect["ratio"] == item["figures"]["ratio"] and effect["suite"] == "steer-persona"
    card = (out / "b1" / "README.md").read_text()
    check_card(card, "model")
    shown = "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * x for x in effect["behaviour"]))
    assert f"| {shown} |" in card and f"apply(strength={effect['strength']})" in card and "load_steering" in card

    assert main([str(results), "b7", "--out", str(out)]) == 2
    assert "no steering of the control 'b7'; it has those of b0, b1." in capsys.readouterr().err
    for record in (results / "made").rglob("method.json"):
        record.unlink()
    assert main([str(results), "b0", "--out", str(out)]) == 2
    assert "is not in" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), "b0"]) == 2
