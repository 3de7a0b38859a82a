"""The published dataset: what is in it, that it loads, that it is the same to the byte, and that a failed build changes nothing."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lqa import LqaError, corpus
from lqa.corpus import build, checks, completions, load_controls, load_messages, load_questions, message_side, split_of, stats
from lqa.corpus.checks import near_duplicates, side_of
from lqa.corpus.readings import FORMS, control_chat, pool_message, qa_pairs, readings_of
from lqa.corpus.schema import MAX_SHARED_STIMULUS, content_words

REPLY = "I would take the early train and keep the afternoon free. "


def some_controls():
    """Three categories, without their twins in others: small, balanced, and every kind that a card shows."""
    controls = [c for c in load_controls() if f"{c.kind}-{c.category}" in ("goal-tone", "persona-mood", "user-attribute")]
    wanted = {c.id for c in controls}
    return tuple(replace(c, contrast=tuple(p for p in c.contrast if p in wanted)) for c in controls)


CONTROLS = some_controls()


@pytest.fixture
def small(monkeypatch, tokenizer_of, tmp_path):
    """A small corpus to build, with a few completions; tokens are a test tokenizer's."""
    import hashlib
    import json

    folder = tmp_path / "completions"
    folder.mkdir()
    sides, lines = split_of(CONTROLS), [{"model": "tiny/smol"}]
    for i, control in enumerate(CONTROLS[::3]):
        message = next(m for m in load_messages() if message_side(m) == sides[control.id])
        line = {"label": control.id, "control": completions.control_hash(control), "draw": 0, "message": message, "dropped": None}
        lines.append(line | {"reply": REPLY + hashlib.sha256(str(i).encode()).hexdigest()})
    (folder / "tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(build, "load_completions", lambda controls: completions.load_completions(controls, folder))
    monkeypatch.setattr(corpus, "load_controls", lambda split=None: CONTROLS)
    monkeypatch.setattr(build, "_tokenizer", lambda base: (tokenizer_of("chatml"), "tiny/smol"))
    return tmp_path


@pytest.fixture(scope="module")
def readings():
    return build.build_readings(CONTROLS, load_messages(), {})


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- readings ---------------------------------------------------------------------------------------------------


def test_the_rows_of_one_control():
    control, pool = CONTROLS[0], [m for m in load_messages() if message_side(m) == "train"]
    replies = [{"message": "Why is the sky blue?", "reply": "Light scatters.", "model": "m"}]
    rows = readings_of(control, control.stimuli, pool, replies, load_questions())
    made = [(row["form"], row["message"]) for row in rows]
    assert made == [("control", "none"), ("system", "own"), ("stimulus", "own"), *[("system", "pool")] * 2, *[("stimulus", "pool")] * 2] + [
        ("stimulus_completion", "pool")
    ]
    assert all(row["span"] == FORMS[row["form"]] and row["qa"] == rows[0]["qa"] for row in rows)
    assert [m["role"] for m in rows[-1]["chat"]] == ["user", "assistant", "user", "assistant"] and rows[-1]["model"] == "m"
    assert [row["model"] for row in rows[:-1]] == [None] * 7
    assert readings_of(control, control.stimuli, pool, replies, load_questions()) == rows
    assert readings_of(control, control.stimuli, pool, replies, load_questions(), seed=1) != rows


def test_pairs_have_each_answer_once_and_generic_questions_are_the_kinds():
    control, questions = CONTROLS[0], load_questions()
    pairs = qa_pairs(control, questions, random.Random(0))
    answers = [text for p in pairs for text in (p["answer"], *p["alternatives"])]
    assert sorted(answers) == sorted([*control.descriptions, control.short, *(p.answer for p in control.qa)])
    generic = {q for group in questions[control.kind].values() for q in group}
    assert all((p["question"] in generic) == p["generic"] for p in pairs)


def test_a_message_of_the_pool_tells_nothing_of_the_control():
    control = replace(CONTROLS[0], control="Talk of soup and bread at any time.")
    for seed in range(20):
        message = pool_message(control, ["Which soup and bread are good?", "Why do cats purr?"], random.Random(seed))
        assert message == "Why do cats purr?"
    with pytest.raises(ValueError, match="every message of the pool"):
        pool_message(control, ["Which soup and bread are good?"], random.Random(0))
    assert MAX_SHARED_STIMULUS == 1 and len(content_words("soup and bread")) == 2


def test_an_unknown_form_and_a_completion_without_a_reply_are_errors():
    with pytest.raises(ValueError, match="unknown form 'poem'"):
        control_chat(CONTROLS[0], "poem", "x")
    with pytest.raises(ValueError, match="needs a reply"):
        control_chat(CONTROLS[0], "stimulus_completion", "x")


def test_splits_are_those_of_the_labels_and_the_pool_has_a_test_split_of_its_own(readings):
    sides = split_of(CONTROLS)
    assert set(readings) == {"train", "validation", "test", "test_pool"}
    for name, rows in readings.items():
        assert {sides[row["label"]] for row in rows} == {side_of(name)}
    assert {row["message"] for row in readings["test_pool"]} == {"pool"} and {row["message"] for row in readings["test"]} == {"none", "own"}
    assert {row["label"] for row in readings["test"]} == {row["label"] for row in readings["test_pool"]}
    assert sum(row["message"] == "pool" for row in readings["train"]) >= len(readings["train"]) / 2


def test_no_message_stands_on_two_sides_and_checks_pass(readings):
    messages = [(side_of(name), row["chat"][-1]["content"]) for name, rows in readings.items() for row in rows if row["message"] != "none"]
    for i, j, _ in near_duplicates([text for _, text in dict.fromkeys(messages)]):
        assert list(dict.fromkeys(messages))[i][0] == list(dict.fromkeys(messages))[j][0]
    assert checks.check_splits(readings) == []


# --- the dataset ------------------------------------------------------------------------------------------------


def test_build_loads_streams_and_is_the_same_to_the_byte(small, monkeypatch):
    import datasets
    from huggingface_hub import DatasetCard

    configs = build.build(small / "one", progress=lambda text: None)
    build.build(small / "two", progress=lambda text: None)
    assert files(small / "one") == files(small / "two")
    build.build(small / "two", progress=lambda text: None)  # over itself
    assert files(small / "one") == files(small / "two") and not list(small.glob("*.part")) and not list(small.glob("*.old"))

    for config, splits in configs.items():
        data = datasets.load_dataset(str(small / "one"), config, cache_dir=str(small / "cache"))
        assert set(data) == set(splits) and data["train"].features == build.features(config)
        for name, rows in splits.items():
            assert data[name].to_list() == rows
    first = next(iter(datasets.load_dataset(str(small / "one"), "facts", split="test", streaming=True)))
    assert first == configs["facts"]["test"][0]
    assert datasets.load_dataset(str(small / "one"), split="train", cache_dir=str(small / "cache"))[0] == configs["latentqa"]["train"][0]

    card = DatasetCard.load(small / "one" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.language == ["en"]
    assert [c["config_name"] for c in card.data.to_dict()["configs"]] == ["latentqa", "context", "facts"]
    info = {entry["config_name"]: entry for entry in card.data.to_dict()["dataset_info"]}
    counts = {s["name"]: s["num_examples"] for s in info["latentqa"]["splits"]}
    assert counts == {name: len(rows) for name, rows in configs["latentqa"].items()}
    assert "{{" not in card.text and "{%" not in card.text and "taxonomy.png" in card.text and corpus.revision() in card.text
    assert (small / "one" / "taxonomy.png").read_bytes().startswith(b"\x89PNG")
    completed = [row for rows in configs["latentqa"].values() for row in rows if row["form"] == "stimulus_completion"]
    assert completed and all(row["model"] == "tiny/smol" and row["chat"][-1]["content"].startswith(REPLY.strip()) for row in completed)
    assert f"{len(completed)} replies" in card.text
    assert {row["label"] for row in configs["context"]["train"]} <= {row["label"] for row in configs["latentqa"]["train"]}


def test_stats_and_a_sample_of_what_was_built(small, capsys):
    from lqa.cli import main

    configs = build.build(small / "one", progress=lambda text: None)
    assert stats.load_readings(small / "one") == configs["latentqa"]
    figures = stats.statistics(configs["latentqa"])
    assert figures["controls"] == len(CONTROLS) and figures["QA pairs"] == len(CONTROLS) * 2 + sum(len(c.qa) for c in CONTROLS)
    assert figures["leaks"] == 0 and figures["near-duplicates across splits (Jaccard 0.7)"] == 0
    assert figures["question-only picker, 8 of the same kind"] < 0.25
    assert main(["data", "stats", str(small / "one"), "--against", str(small / "one")]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("| controls"))
    assert line == f"| controls | {len(CONTROLS)} |" or line == f"| controls | {len(CONTROLS)} | {len(CONTROLS)} |"
    assert f"by wording or meaning: {len(CONTROLS)}" not in out and "is close (1.00)" in out  # everything is close to itself
    assert main(["data", "stats", str(small / "one"), "--sample", "40", "--seed", "3"]) == 0
    drawn = capsys.readouterr().out
    assert drawn.count("\n--- ") + 1 == 40 and main(["data", "stats", str(small / "one"), "--sample", "40", "--seed", "3"]) == 0
    assert capsys.readouterr().out == drawn
    assert main(["data", "stats", str(small / "one"), "--sample", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_type_token_ratio_is_over_the_same_number_of_words_for_every_corpus():
    assert stats.type_token_ratio(["a b a b"]) == 0.5
    assert stats.type_token_ratio(["a b"] * 100, n=10) == 0.2 and stats.type_token_ratio([]) is None


def test_a_problem_fails_the_build_names_it_and_leaves_the_dataset_as_it_was(small, monkeypatch, capsys):
    from lqa.cli import main

    build.build(small / "one", progress=lambda text: None)
    before = files(small / "one")
    twin = replace(CONTROLS[0], id=f"{CONTROLS[0].id}-twin")
    monkeypatch.setattr(corpus, "load_controls", lambda split=None: (*CONTROLS, twin))
    assert main(["data", "build", "--out", str(small / "one")]) == 2
    err = capsys.readouterr().err
    assert "-twin: its control text repeats" in err and "problem(s), listed above, and was not written" in err.splitlines()[-1]
    assert files(small / "one") == before


def test_further_controls_are_built_in_and_malformed_ones_are_a_sentence(small, capsys):
    from lqa.cli import main

    bad = small / "bad.yaml"
    bad.write_text(yaml.safe_dump([{"id": "goal-a-b"}]))
    assert main(["data", "build", "--out", str(small / "one"), "--controls", str(bad)]) == 2
    err = capsys.readouterr().err
    assert "bad.yaml[0]: goal-a-b" in err and "is missing" in err and len(err.strip().splitlines()) == 1
    assert not (small / "one").exists()


def test_what_is_close_to_an_evaluation_set_fails_the_build(small):
    import json

    (small / "eval").mkdir()
    entry = {"system": CONTROLS[0].control + " Please.", "stimulus_user": "Hm, what now?", "label": "goal-x-y"}
    (small / "eval" / "system.json").write_text(json.dumps([entry]))
    seen = []
    with pytest.raises(LqaError, match="1 problem"):
        build.build(small / "one", against=small / "eval", progress=seen.append)
    assert any(line.startswith(f"{CONTROLS[0].id}: the control") and "goal-x-y" in line for line in seen)


def test_a_folder_of_other_things_is_never_replaced(small):
    (small / "home").mkdir()
    (small / "home" / "letter.txt").write_text("dear")
    with pytest.raises(LqaError, match="is not a dataset of lqa"):
        build.write_dataset(small / "home", {"latentqa": {"train": []}}, str)
    assert (small / "home" / "letter.txt").read_text() == "dear"


def test_a_full_disk_is_one_sentence_and_the_old_dataset_stays(small, monkeypatch):
    import errno

    build.write_dataset(small / "one", {"latentqa": build.build_readings(CONTROLS[:20], load_messages(), {})}, str)
    before = files(small / "one")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    import pyarrow.parquet

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(LqaError, match="No space left on device"):
        build.write_dataset(
            small / "one", {"latentqa": {"train": [], "test": build.build_readings(CONTROLS[:20], load_messages(), {})["train"]}}, str
        )
    assert files(small / "one") == before and not list(small.glob("*.part"))


def test_a_damaged_parquet_file_is_a_sentence(small):
    (small / "one" / "latentqa").mkdir(parents=True)
    (small / "one" / "latentqa" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(LqaError, match="not a readable Parquet file"):
        stats.load_readings(small / "one")


def test_the_committed_dataset_is_that_of_this_corpus():
    folder = Path(__file__).parent.parent / "dataset"
    if not folder.is_dir():
        pytest.skip("no dataset/ in this checkout; `python -m lqa data build` writes it")
    assert f"revision `{corpus.revision()}`" in (folder / "README.md").read_text(encoding="utf-8")
    sides = split_of(load_controls())
    readings = stats.load_readings(folder)
    assert {row["label"] for rows in readings.values() for row in rows} == set(sides)
    assert all(sides[row["label"]] == side_of(name) for name, rows in readings.items() for row in rows)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < build.MAX_BYTES
