"""The importer of LatentQA's JSON files: any subset of them, the schema of the corpus, and sentences for what is malformed."""

import json

import pytest

from lqa import LqaError
from lqa.corpus.latentqa import import_latentqa, read_latentqa
from lqa.corpus.stats import load_readings, statistics

CONTROL = {"control_user": "Speak in rhymes.", "label": "goal-style-rhymes"}
STIMULUS = CONTROL | {"control_model": "I shall, at once, in verse.", "stimulus_user": "What should I eat?"}
FILES = {
    "control": [CONTROL],
    "stimulus": [STIMULUS],
    "stimulus_completion": [STIMULUS | {"stimulus_model": "A bun in the sun."}],
    "system": [{"system": "You are a night nurse.", "stimulus_user": "I can't sleep.", "label": "persona-job-nurse"}],
}
QA = {"goal-style-rhymes": [["How does it speak?", "In rhymes."], ["What would it say of soup?", "That a loop of soup is a scoop."]]}


@pytest.fixture
def folder(tmp_path):
    def write(where="eval", files=FILES, qa=QA):
        place = tmp_path / "latentqa" / where
        place.mkdir(parents=True)
        for name, entries in files.items():
            (place / f"{name}.json").write_text(json.dumps(entries))
        if qa is not None:
            (place / "qa.json").write_text(json.dumps(qa))
        return tmp_path / "latentqa"

    return write


def test_the_four_forms_become_chats_spans_and_pairs(folder):
    splits = read_latentqa(folder())
    assert list(splits) == ["test"]
    rows = {row["form"]: row for row in splits["test"]}
    assert [m["role"] for m in rows["stimulus_completion"]["chat"]] == ["user", "assistant", "user", "assistant"]
    assert rows["stimulus_completion"]["chat"][-1]["content"] == "A bun in the sun."
    assert {form: row["span"] for form, row in rows.items()} == {
        "control": "all",
        "stimulus": "from:2",
        "stimulus_completion": "from:2",
        "system": "from:1",
    }
    assert [(p["question"], p["type"]) for p in rows["control"]["qa"]] == [
        ("How does it speak?", "description"),
        ("What would it say of soup?", "reasoning"),
    ]
    assert rows["system"]["qa"] == [] and rows["system"]["kind"] == "persona" and rows["control"]["category"] == "style"
    assert len({row["id"] for row in splits["test"]}) == 4


def test_any_subset_is_taken_and_the_folders_name_says_the_split(folder):
    folder("train", {"system": FILES["system"]}, None)
    root = folder("eval_dev", {"control": FILES["control"]})
    splits = read_latentqa(root)
    assert {name: [row["form"] for row in rows] for name, rows in splits.items()} == {"train": ["system"], "test": ["control"]}
    assert {name: len(rows) for name, rows in read_latentqa(root / "train").items()} == {"train": 1}


def test_what_is_written_loads_as_a_dataset_and_reads_back_the_same(folder, tmp_path, capsys, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = import_latentqa(folder(), tmp_path / "out")
    assert "1 labels have no question" in capsys.readouterr().err
    data = datasets.load_dataset(str(tmp_path / "out"), "latentqa", cache_dir=str(tmp_path / "cache"))
    assert data["test"].to_list() == splits["test"] and set(data) == {"test"}
    assert load_readings(tmp_path / "out") == splits
    figures = statistics(splits)
    assert figures["controls"] == 2 and figures["QA pairs"] == 2 and figures["distinct questions"] == 1.0
    assert figures["answer words, shortest"] == 2 and figures["forms"]["system"] == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("system", [{"system": "x", "label": "goal-a-b"}], r"system.json: entry 0 needs the text fields label, system, stimulus_user"),
        ("system", [{"system": 3, "stimulus_user": "x", "label": "goal-a-b"}], "entry 0 needs"),
        ("control", ["text"], "control.json: entry 0"),
        ("qa", {"goal-a-b": [["one"]]}, "not in LatentQA's format"),
        ("qa", [1], "not in LatentQA's format"),
    ],
)
def test_malformed_entries_are_named(folder, name, content, words):
    root = folder()
    (root / "eval" / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(LqaError, match=words):
        read_latentqa(root)


def test_truncated_json_and_an_empty_folder_are_sentences(folder, tmp_path):
    root = folder()
    (root / "eval" / "system.json").write_text('[{"system": "x"')
    with pytest.raises(LqaError, match="system.json cannot be read as JSON"):
        read_latentqa(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LqaError, match="none of control.json"):
        read_latentqa(tmp_path / "empty")
    with pytest.raises(LqaError, match="holds no corpus"):
        load_readings(tmp_path / "empty")
