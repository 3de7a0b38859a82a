"""The command line: JSON on stdout and nothing else there; bad input is one sentence on stderr and exit code 2."""

import json

import pytest

from lqa import LatentDecoder
from lqa.cli import main

CHAT = [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "Who is it in the city?"}]
WHO = ["--system", CHAT[0]["content"], "--user", CHAT[1]["content"]]


@pytest.fixture(autouse=True)
def tiny_default(monkeypatch, tiny_decoder):
    """Every command gets the same tiny decoder, whatever --decoder says."""
    decoder = tiny_decoder()
    monkeypatch.setattr(LatentDecoder, "from_pretrained", classmethod(lambda cls, source=None, **_: decoder))
    return decoder


def run(capsys, *argv) -> dict:
    assert main(list(argv)) == 0
    return json.loads(capsys.readouterr().out)  # one document, or this raises


def test_ask_json_has_the_keys_of_the_design(capsys, tiny_default):
    out = run(capsys, "ask", *WHO, "-q", "Who is it?", "-q", "How?", "--span", "user", "--grounding", "--json", "--max-new-tokens", "5")
    assert set(out) == {"answers", "tokens", "span", "layer"}
    assert [a["question"] for a in out["answers"]] == ["Who is it?", "How?"]
    for answer in out["answers"]:
        assert set(answer) == {"question", "answer", "confidence", "grounding"}
        assert set(answer["grounding"]) == {"none", "shuffled", "text_only"} and 0 <= answer["confidence"] <= 1
        assert all(isinstance(text, str) for text in answer["grounding"].values())
    reading = tiny_default.read(CHAT, "user")
    assert out["tokens"] == reading.tokens and out["span"] == list(reading.span) and out["layer"] == 1
    assert run(capsys, "ask", *WHO, "-q", "Who is it?", "--json", "--max-new-tokens", "2")["answers"][0]["grounding"] is None


def test_chat_file_layer_and_index_span(capsys, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(CHAT))
    out = run(capsys, "ask", "--chat", str(file), "-q", "Who?", "--span", "3,5,8", "--layer", "0", "--json", "--max-new-tokens", "2")
    assert out["span"] == [3, 5, 8] and out["layer"] == 0


def test_score_and_chat_json(capsys, tiny_default):
    out = run(capsys, "score", *WHO, "-q", "Who is it?", "--answer", "A pirate.", "--answer", "A doctor.", "--json")
    assert set(out) == {"question", "answers"} and [a["text"] for a in out["answers"]] == ["A pirate.", "A doctor."]
    assert all(set(a) == {"text", "logprob", "logprob_none"} and a["logprob"] < 0 for a in out["answers"])
    assert run(capsys, "chat", *WHO, "--json", "--max-new-tokens", "5") == {"reply": tiny_default.generate(CHAT, max_new_tokens=5)}


def test_plain_output_shows_the_same(capsys, tiny_default):
    assert main(["ask", *WHO, "-q", "Who is it?", "--span", "user", "--grounding", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    (answer,) = tiny_default.read(CHAT, "user").ask("Who is it?", grounding=True, max_new_tokens=4)
    assert answer.text in out and answer.grounding.text_only in out and "confidence" in out
    assert main(["chat", *WHO, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip() == tiny_default.generate(CHAT, max_new_tokens=4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ask", "--user", "", "-q", "Who?"], "empty"),
        (["ask", "-q", "Who?"], "--user TEXT"),
        (["ask", *WHO, "--chat", "x.json", "-q", "Who?"], "not both"),
        (["ask", *WHO, "-q", "Who?", "--span", "assistant"], "selects no token"),
        (["ask", *WHO, "-q", "Who?", "--span", "7:9999"], "ends behind the chat"),
        (["ask", *WHO, "-q", "Who?", "--layer", "99"], "supports the layers 0, 1"),
        (["ask", *WHO, "-q", " "], "no empty one"),
        (["ask", "--user", "city " * 600, "-q", "Who?"], "context is 512"),
        (["score", *WHO, "-q", "Who?", "--answer", ""], "no empty one"),
        (["chat", "--chat", "not-there.json"], "cannot be read"),
        (["eval", "identify"], "--out"),
        (["eval", "magic", "--out", "x"], "'magic' is unknown"),
        (["eval", "identify", "--out", "x", "--limit", "0"], "at least 1"),
        (["eval", "identify", "--out", "x", "--limit", "0"], "github.com/aypan17/latentqa"),
        (["eval", "identify", "--out", "x", "--data", "not-there"], "github.com/aypan17/latentqa"),
        (["eval", "identify", "--out", "x", "--data", "."], "github.com/aypan17/latentqa"),
        (["eval", "identify", "--out", "x", "--rows", "magic"], "'magic'"),
        (["eval", "identify", "--out", "x", "--text-only-trained", "no"], "visible_text=true"),
        (["eval", "tables", "results/identify"], "--decoder"),
        (["eval", "tables", "--out", "not-there.md"], "not-there.md"),
        (["eval", "tables", "--decoder", "x"], "one results folder"),
        (["eval", "report"], "results folder"),
        (["data", "stats", "not-there"], "holds no corpus"),
        (["data", "import-latentqa", "not-there", "--out", "x"], "github.com/aypan17/latentqa"),
        (["data", "build", "--controls", "not-there.yaml", "--out", "x"], "not-there.yaml"),
        (["eval", "report", "not-there"], "holds no results"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, argv, message):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("{not json", "is not JSON"), ('{"role": "user"}', "non-empty list"), ('[{"role": "pirate", "content": "x"}]', "role 'pirate'")],
)
def test_malformed_chat_file(capsys, tmp_path, text, message):
    file = tmp_path / "chat.json"
    file.write_text(text)
    assert main(["ask", "--chat", str(file), "-q", "Who?"]) == 2
    assert message in capsys.readouterr().err


def test_unknown_command_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["explain"])
    assert stop.value.code == 2
