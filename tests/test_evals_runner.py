"""Runs leave a folder that reports, README and cards are made from; a killed run goes on and gives the same numbers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lqa import LqaError
from lqa.evals import identify, report, runner
from lqa.evals.suite import Cell, Job, Plot, Result, Table
from lqa.journal import Journal

ROOT = Path(__file__).parent.parent
TEXTS = "pirate doctor cook sailor king queen nurse judge baker miner poet monk clown thief guard scout".split()


@pytest.fixture
def evaluate(tiny_decoder, monkeypatch, tmp_path):
    """evaluate(name, suites=["identify"], **run's): runs on a tiny decoder and sixteen items, into the folder `name`."""
    decoder = tiny_decoder()
    items = [identify.Item(f"goal-x{i % 4}-{t}", "goal", f"Be a {t}.", f"What of {t}s?", f"It is a {t}.") for i, t in enumerate(TEXTS)]
    monkeypatch.setattr(runner.LatentDecoder, "from_pretrained", classmethod(lambda cls, source=None, **_: decoder))
    monkeypatch.setattr(identify, "items_of", lambda folder, form="system": (list(items), {"name": "test", "sha256": "0"}))
    monkeypatch.setattr(identify, "forms_of", lambda folder: ["control", "system"])
    monkeypatch.setattr(identify, "M", 4)
    return lambda name, suites=("identify",), **kwargs: runner.run(suites, tmp_path / name, **kwargs)


def numbers(folder: Path) -> dict:
    document = json.loads((folder / "identify.json").read_text())
    del document["provenance"]["seconds"]
    return document


def test_a_run_leaves_a_folder_that_the_report_reads(evaluate, tmp_path, capsys):
    evaluate("out", limit=8, seed=3)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"identify.json", "identify-confusion.png", "README.md"}  # no journal is left
    written = json.loads((out / "identify.json").read_text())
    about = written["provenance"]
    assert about["command"] == "python -m lqa eval identify --limit 8 --seed 3 --out OUT" and about["model"]["name"] == "tiny/smol"
    assert about["code"] and about["corpus_revision"] and len(about["decoder"]["sha256"]) == 64 and written["data"]["items"] == "8"
    runner.print_report([str(out)])
    table, page = capsys.readouterr().out, (out / "README.md").read_text()
    ours = written["tables"]["fixed"]["rows"]["ours"][0]
    for text in (table, page):
        assert f"| ours | {ours['mean']:.1%} ({ours['low']:.1%}"[:-1] in text and "| text_only |" in text and "chance 25.0%" in text
    assert "](identify-confusion.png)" in page and "](identify-confusion.png)" not in table
    (out / "identify.json").write_text("{")
    with pytest.raises(LqaError, match="cannot be read"):
        runner.print_report([str(out)])


def test_the_same_seed_gives_the_same_numbers_and_pictures_and_another_one_does_not(evaluate, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        evaluate(name, seed=seed)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b") != numbers(tmp_path / "c")
    pictures = [(tmp_path / name / "identify-confusion.png").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


def test_an_interrupted_run_goes_on_with_the_same_settings_only(evaluate, tmp_path, monkeypatch):
    evaluate("whole", sweep=True)
    scored = []

    def stopping(job, draw, *more, score=identify.score_draw):
        if len(scored) == 5:
            raise KeyboardInterrupt
        scored.append(draw.labels)
        return score(job, draw, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(identify, "score_draw", stopping)
        evaluate("out", sweep=True)
    with pytest.raises(LqaError, match=r"was begun with limit None, not 8; go on with the same, or name another folder"):
        evaluate("out", sweep=True, limit=8)
    with pytest.raises(LqaError, match="begun with seed 0, not 1"):
        evaluate("out", sweep=True, seed=1)
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(identify, "score_draw", lambda job, draw, *more, s=identify.score_draw: again.append(draw) or s(job, draw, *more))
        evaluate("out", sweep=True)
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole") and not (tmp_path / "out" / "journal.jsonl").exists()
    whole = json.loads((tmp_path / "whole" / "identify.json").read_text())
    assert whole["plots"] and len(again) > 5  # what was scored is not scored again, the rest is


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_numbers_of_an_unbroken_one(tiny, decoder_folder, tmp_path):
    from dataclasses import replace

    from lqa.config import DecoderConfig

    base = tiny("smol")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    folder = decoder_folder("smol")
    config = DecoderConfig.load(folder)
    replace(config, base=config.base | {"name": str(tmp_path / "base")}).save(folder)
    command = [sys.executable, "-m", "lqa", "eval", "identify", "--decoder", str(folder), "--limit", "40", "--out"]

    def start(name: str) -> subprocess.Popen:
        return subprocess.Popen([*command, str(tmp_path / name)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    killed = start("killed")
    journal, deadline = tmp_path / "killed" / "journal.jsonl", time.monotonic() + 240
    while (not journal.is_file() or journal.read_bytes().count(b"\n") < 4) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and journal.read_bytes().count(b"\n") >= 4
    for name in ("killed", "whole"):
        done = start(name)
        _, errors = done.communicate(timeout=300)
        assert done.returncode == 0, errors
        assert ("from an earlier run" in errors) == (name == "killed")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def test_bad_input_is_found_before_anything_is_computed(evaluate, tmp_path):
    for words, kwargs in (
        ("'magic' is unknown; the suites are identify, open", {"suites": ["identify", "magic"]}),
        ("--limit must be at least 1, not 0.*github.com/aypan17/latentqa", {"limit": 0}),
        ("--methods names 'prayer'; the methods are unsteered, system_prompt", {"methods": ["prayer"]}),
        ("--examples must be at least 1, not 0", {"examples": 0}),
        ("no folder .*nowhere.*github.com/aypan17/latentqa.*github.com/PAIR-code/interpretability", {"folder": tmp_path / "nowhere"}),
    ):
        with pytest.raises(LqaError, match=words):
            evaluate("out", **kwargs)
    assert not (tmp_path / "out").exists()


def test_a_decoder_without_sidecar_is_refused(tmp_path):
    with pytest.raises(LqaError, match="has no lqa_config.json"):
        runner.run(["identify"], tmp_path / "out", decoder_source=str(tmp_path), limit=8)


# --- the job ----------------------------------------------------------------------------------------------------


def test_once_computes_once_and_limited_draws_by_the_seed(tiny_decoder, tmp_path):
    def job(journal, **kwargs):
        return Job("test", decoder, journal, **{"data": None, "limit": 5} | kwargs)

    decoder, calls = tiny_decoder(), []
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        first = job(journal)
        assert first.once("a", lambda: calls.append(1) or {"x": (0.1, 2)}) == {"x": [0.1, 2]}  # as a later run reads it
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        assert job(journal).once("a", lambda: calls.append(2)) == {"x": [0.1, 2]} and calls == [1]
        assert job(journal).limited(range(50)) == job(journal).limited(range(50)) != job(journal, seed=1).limited(range(50))
        assert len(job(journal).limited(range(50))) == 5 and sorted(job(journal).limited("abc")) == [*"abc"]
        assert job(journal, limit=None).limited("abc") == [*"abc"]


# --- the report -------------------------------------------------------------------------------------------------


def document(mean: float, **more) -> dict:
    tables = {"main": Table("Both", {"hits": "%", "loss": ""}, {"ours": [Cell(mean, 0.1, 0.9, 20), None], "none": [Cell(0, 0, 0, 20)] * 2})}
    result = Result({"name": "some data", "sha256": "0"}, tables, [{"id": "a", "hit": 1}, {"id": "b", "hit": 0}], **more)
    provenance = {"decoder": {"name": "d"}, "code": "c", "command": "python -m lqa eval identify", "seconds": 3}
    return {"provenance": provenance, **asdict(result)}


@pytest.fixture
def folder(tmp_path):
    def make(name: str, mean: float, suite: str = "identify", **more) -> Path:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / f"{suite}.json").write_text(report.dump(document(mean, **more)))
        return tmp_path / name

    return make


def test_dumped_json_has_a_line_for_each_item_and_reads_back():
    text = report.dump(document(0.5))
    assert json.loads(text)["items"] == [{"id": "a", "hit": 1}, {"id": "b", "hit": 0}]
    assert '\n  {"id": "a", "hit": 1},\n  {"id": "b", "hit": 0}\n' in text
    assert json.loads(report.dump(document(0.5) | {"items": []}))["items"] == []


def test_one_folder_is_printed_as_its_tables(folder, capsys):
    runner.print_report([str(folder("one", 0.5))])
    lines = capsys.readouterr().out.splitlines()
    assert "| | hits | loss | n |" in lines and "| ours | 50.0% (10.0 to 90.0) | - | 20 |" in lines
    assert "| none | 0.0% (0.0 to 0.0) | 0.000 (0.000 to 0.000) | 20 |" in lines
    assert any("*ours*: the decoder" in line and "text_only" not in line for line in lines)


def test_several_folders_stand_side_by_side(folder, capsys):
    one, two = folder("runs/one", 0.5), folder("runs/two", 0.25)
    folder("runs/two", 0.1, suite="relations")
    runner.print_report([str(one), str(two)])
    out = capsys.readouterr().out
    assert "| | hits, one | loss, one | hits, two | loss, two | n |" in out
    assert "| ours | 50.0% (10.0 to 90.0) | - | 25.0% (10.0 to 90.0) | - | 20 |" in out
    assert "## relations" in out and out.index("## identify") < out.index("## relations") and "one: some data" in out
    with pytest.raises(LqaError, match="holds no results"):
        runner.print_report([str(one.parent)])
    assert list(report.names(["a/x", "b/x", "c/y"])) == ["a/x", "b/x", "y"]


def test_counts_that_differ_in_a_row_stand_in_its_cells():
    table = Table("T", {"a": "", "b": ""}, {"ours": [Cell(1, 1, 1, 3), Cell(2, 2, 2, 4)]})
    assert "| ours | 1.000 (1.000 to 1.000; n 3) | 2.000 (2.000 to 2.000; n 4) |" in report.table({"": table})


def test_marked_tables_are_made_anew_and_nothing_else_is_touched(folder, tmp_path, capsys):
    from lqa.cli import main

    folder("results/one", 0.5)
    page = tmp_path / "README.md"
    first = "<!-- results/one identify/main -->\nold\n<!-- end -->\n"
    page.write_text(f"before\n{first}between <!-- end -->\n<!-- results/one -->\n<!-- end -->\n")
    assert main(["eval", "tables", "--out", str(page)]) == 0 and capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert text.startswith("before\n<!-- results/one identify/main -->\n**Both.**") and "old" not in text and "between <!-- end -->" in text
    assert text.count("| ours | 50.0% (10.0 to 90.0) | - | 20 |") == 2
    assert report.fill(text, tmp_path) == text
    folder("results/one", 0.75)
    assert report.fill(text, tmp_path) != text  # what the test of the README lives on
    with pytest.raises(LqaError, match="no results of open"):
        report.fill("<!-- results/one open -->\n<!-- end -->", tmp_path)


def test_plots_are_drawn_from_their_numbers_and_the_same_each_time(tmp_path):
    curve = {"x": [7, 14], "y": [0.1, 0.2], "low": [0, 0.1], "high": [0.2, 0.3]}
    lines = Plot("curve", "A curve", "lines", {"ours": curve}, "layer", "hits")
    matrix = Plot("confusion", "A matrix", "matrix", {"": {"x": ["a", "b", "c"], "y": ["a", "b"], "values": [[1, 0, 0], [0, 0.5, 0.5]]}})
    for plot in (lines, replace(lines, kind="points"), matrix):
        for name in ("a.png", "b.png"):
            report.draw(plot, tmp_path / name)
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        assert re.match(rb"\x89PNG", (tmp_path / "a.png").read_bytes())
    with pytest.raises(LqaError, match="unknown kind 'pie'"):
        report.draw(Plot("x", "x", "pie", {}), tmp_path / "x.png")


def test_a_plot_may_have_single_layers_beside_several_at_once(tmp_path):
    line = {"x": [7, 14, "(7, 14)"], "y": [0.1, 0.2, 0.3], "low": [0.0, 0.1, 0.2], "high": [0.2, 0.3, 0.4]}
    report.draw(Plot("x", "x", "lines", {"a": line, "b": line}), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
