"""On-policy completions: the target's own replies; the same file after a kill, nothing sampled twice, nothing lost."""

import json
from dataclasses import replace

import pytest
import torch

from lqa import LqaError
from lqa.chat import render
from lqa.corpus import completions, load_controls, load_messages, message_side, split_of
from lqa.corpus.completions import _whole, complete, control_hash, load_completions, make_items
from lqa.corpus.readings import control_chat

CONTROLS = tuple(replace(c, contrast=()) for c in load_controls()[:9])
MESSAGES = tuple(m for m in load_messages() if len(m) < 40)
SAMPLING = {"controls": CONTROLS, "messages": MESSAGES, "draws": 2, "max_new_tokens": 6, "progress": lambda text: None}


@pytest.fixture(scope="module")
def base(tiny):
    return tiny("smol", max_position_embeddings=2048)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(completions, "CHUNK", 4)
    monkeypatch.setattr(completions, "_whole", lambda text, finished: text.strip())  # a random model ends no sentence


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_item_has_one_line_and_messages_are_of_the_controls_side(base, tmp_path):
    kept = complete(base, tmp_path / "a.jsonl", **SAMPLING)
    head, *items = lines(tmp_path / "a.jsonl")
    assert head["model"] == base.name and head["temperature"] == 0.8 and head["items"] == len(items) == 18
    assert [(i["label"], i["draw"]) for i in items] == [(c.id, d) for c in CONTROLS for d in range(2)]
    assert kept == sum(i["reply"] is not None for i in items) and all((i["reply"] is None) == bool(i["dropped"]) for i in items)
    sides = split_of(CONTROLS)
    assert all(message_side(i["message"]) == sides[i["label"]] for i in items)


def test_greedy_replies_are_the_bare_models_own(base, tmp_path):
    complete(base, tmp_path / "a.jsonl", **SAMPLING | {"temperature": 0.0})
    item = lines(tmp_path / "a.jsonl")[1]
    ids = render(base.tokenizer, control_chat(CONTROLS[0], "stimulus", item["message"])).ids
    own = []
    with torch.no_grad():
        for _ in range(6):
            own.append(base.model(input_ids=torch.tensor([ids + own])).logits[0, -1].argmax().item())
    assert base.tokenizer.eos_token_id not in own
    assert item["reply"] == base.tokenizer.decode(own, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kill_after", [1, 2, 4])
def test_killed_and_resumed_is_the_same_file_and_samples_nothing_twice(base, tmp_path, monkeypatch, kill_after):
    complete(base, tmp_path / "whole.jsonl", **SAMPLING)
    calls = []
    sample_chunk = completions.sample_chunk

    def counted(base, chats, settings, seed):
        if len(calls) == kill_after:
            raise KeyboardInterrupt
        calls.append(tuple(chat[-1]["content"] for chat in chats))
        return sample_chunk(base, chats, settings, seed)

    monkeypatch.setattr(completions, "sample_chunk", counted)
    with pytest.raises(KeyboardInterrupt):
        complete(base, tmp_path / "part.jsonl", **SAMPLING)
    with (tmp_path / "part.jsonl").open("a") as file:
        file.write('{"label": "cut off in the mid')  # what a kill in a write leaves
    done = len(calls)
    monkeypatch.setattr(completions, "sample_chunk", lambda *a: (calls.append(a[1]), sample_chunk(*a))[1])
    complete(base, tmp_path / "part.jsonl", **SAMPLING)
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(calls) == 5 and done < 5  # 18 items in chunks of 4
    complete(base, tmp_path / "part.jsonl", **SAMPLING)
    assert len(calls) == 5


def test_repeated_replies_are_dropped_and_counted(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        completions, "sample_chunk", lambda base, chats, *a: ["Well, hello!", "Well hello", "", "Other words."][: len(chats)]
    )
    assert complete(base, tmp_path / "a.jsonl", **SAMPLING) == 2
    dropped = [line["dropped"] for line in lines(tmp_path / "a.jsonl")[1:]]
    assert dropped[:4] == [None, "duplicate", "empty", None] and set(dropped[4:]) == {"duplicate", "empty"}


def test_a_cut_reply_ends_with_its_last_whole_sentence():
    assert _whole("One. Two is 'said'. And thr", False) == "One. Two is 'said'."
    assert _whole("It is 3.5 metres lo", False) == ""
    assert _whole(" All of it, no stop ", True) == "All of it, no stop"


def test_completions_of_reworded_controls_are_left_out(base, tmp_path):
    complete(base, tmp_path / "a.jsonl", **SAMPLING)
    kept = sum(line["reply"] is not None for line in lines(tmp_path / "a.jsonl")[1:])
    found, stale = load_completions(CONTROLS, tmp_path)
    assert stale == 0 and sum(map(len, found.values())) == kept
    assert all(set(entry) == {"message", "reply", "model"} for entries in found.values() for entry in entries)
    changed = [replace(CONTROLS[0], control="Something else is asked for here."), *CONTROLS[1:]]
    found, stale = load_completions(changed, tmp_path)
    assert stale == 2 and CONTROLS[0].id not in found
    assert control_hash(changed[0]) != control_hash(CONTROLS[0])


def test_a_file_of_other_settings_and_bad_numbers_are_sentences(base, tmp_path):
    complete(base, tmp_path / "a.jsonl", **SAMPLING)
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(LqaError, match=r"other settings \(temperature\)"):
        complete(base, tmp_path / "a.jsonl", **SAMPLING | {"temperature": 1.0})
    assert (tmp_path / "a.jsonl").read_bytes() == before
    with pytest.raises(LqaError, match="must be at least 1"):
        complete(base, tmp_path / "b.jsonl", **SAMPLING | {"draws": 0})
    with pytest.raises(LqaError, match="lower --max-new-tokens"):
        complete(base, tmp_path / "b.jsonl", **SAMPLING | {"max_new_tokens": 5000})


def test_a_full_disk_is_one_sentence_and_loses_nothing(base, tmp_path, monkeypatch):
    import errno

    complete(base, tmp_path / "whole.jsonl", **SAMPLING)
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(completions.os, "fsync", full)
    with pytest.raises(LqaError, match="cannot be written .No space left on device"):
        complete(base, tmp_path / "a.jsonl", **SAMPLING)
    complete(base, tmp_path / "a.jsonl", **SAMPLING)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_limit_takes_fewer_controls_with_the_same_items(base, tmp_path):
    complete(base, tmp_path / "a.jsonl", **SAMPLING | {"limit": 3})
    _, *items = lines(tmp_path / "a.jsonl")
    wanted = make_items(CONTROLS, MESSAGES, 2, seed=0)
    assert len(items) == 6 and all({k: i[k] for k in wanted[0]} in wanted for i in items)
    assert len({i["label"] for i in items}) == 3
    assert make_items(CONTROLS, MESSAGES, 1, seed=0) == [i for i in wanted if i["draw"] == 0]
