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


def test_several_layers_are_named_with_commas(capsys, monkeypatch, tiny_decoder):
    monkeypatch.undo()
    decoder = tiny_decoder(layers_per_reading=2, default_layer=[0, 1])
    monkeypatch.setattr(LatentDecoder, "from_pretrained", classmethod(lambda cls, source=None, **_: decoder))
    for layer in ([], ["--layer", "1,0"]):
        assert run(capsys, "ask", *WHO, "-q", "Who?", *layer, "--json", "--max-new-tokens", "2")["layer"] == [0, 1]


def test_a_reference_chat_is_what_a_decoder_of_differences_compares_with(capsys, tmp_path, monkeypatch, tiny_decoder):
    monkeypatch.undo()  # the default of the other tests
    decoder = tiny_decoder(conditioning="contrast")
    monkeypatch.setattr(LatentDecoder, "from_pretrained", classmethod(lambda cls, source=None, **_: decoder))
    other = [{"role": "system", "content": "Formally."}, CHAT[1]]
    file = tmp_path / "other.json"
    file.write_text(json.dumps(other))
    flags = ["--user", CHAT[1]["content"], "--span", "user", "-q", "Who?"]
    out = run(capsys, "score", *flags, "--answer", "A cook.", "--reference", str(file), "--json")
    expected = decoder.read(CHAT[1:], "user", reference=other).score("Who?", ["A cook."])[0]
    assert out["answers"][0]["logprob"] == pytest.approx(expected.logprob, abs=1e-5)
    for wrong, words in (([], "or give a reference chat"), (["--reference", "no.json"], "no.json cannot be read")):
        assert main(["ask", *flags, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_score_and_chat_json(capsys, tiny_default):
    out = run(capsys, "score", *WHO, "-q", "Who is it?", "--answer", "A pirate.", "--answer", "A doctor.", "--json")
    assert set(out) == {"question", "answers"} and [a["text"] for a in out["answers"]] == ["A pirate.", "A doctor."]
    assert all(set(a) == {"text", "logprob", "logprob_none"} and a["logprob"] < 0 for a in out["answers"])
    assert run(capsys, "chat", *WHO, "--json", "--max-new-tokens", "5") == {"reply": tiny_default.generate(CHAT, max_new_tokens=5)}


SMALL = ["--steps", "1", "--method", "per-layer"]


def test_steer_and_chat_steered(capsys, tiny_default, tmp_path):
    pairs, out = tmp_path / "qa.json", str(tmp_path / "deep" / "pirate")
    pairs.write_text(json.dumps([{"question": "Who is it?", "answer": "A pirate."}, ["How will it speak?", "Like a pirate."]]))
    found = run(capsys, "steer", "--qa", str(pairs), "--out", out, *SMALL, "--json")
    assert set(found) == {"out", "steps", "seconds", "loss", "qa"} and found["out"] == out and found["steps"] == 1
    assert found["qa"] == [["Who is it?", "A pirate."], ["How will it speak?", "Like a pirate."]]
    assert found["seconds"] > 0 and found["loss"] > 0
    plain = tiny_default.generate(CHAT, max_new_tokens=8)
    reply = lambda *more: run(capsys, "chat", *WHO, "--max-new-tokens", "8", "--json", *more)["reply"]  # noqa: E731
    steered = tiny_default.load_steering(out)
    assert reply("--steering", out, "--strength", "0") == plain == reply()
    for more, strength in ((["--strength", "300"], 300), (["--strength", "-300"], -300), ([], 1)):
        with steered.apply(strength):
            expected = tiny_default.generate(CHAT, max_new_tokens=8)
        assert reply("--steering", out, *more) == expected
        assert (expected != plain) or not more
    assert main(["chat", *WHO, "--max-new-tokens", "8", "--steering", out, "--strength", "300"]) == 0
    assert capsys.readouterr().out.strip() == reply("--steering", out, "--strength", "300")
    assert main(["steer", "--qa", str(pairs), "--out", out, *SMALL]) == 0
    captured = capsys.readouterr()
    assert "A: Like a pirate." in captured.out and "held-out loss" in captured.out and "step 1/1" in captured.err


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
        (["ask", *WHO, "-q", "Who?", "--layer", "0,1"], "cannot read layer 0, 1"),
        (["ask", *WHO, "-q", "Who?", "--layer", "deep"], "'deep' is no number of a block"),
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
        (["steer", "--control", " ", "--out", "x"], "control is empty"),
        (["steer", "--out", "x"], "--control TEXT or --qa"),
        (["steer", "--control", "x", "--qa", "x.json", "--out", "x"], "--control TEXT or --qa"),
        (["steer", "--qa", "not-there.json", "--out", "x"], "cannot be read"),
        (["steer", "--control", "x", "--out", "pyproject.toml/x"], "cannot be made"),
        (["chat", *WHO, "--steering", "not-there"], "steering 'not-there'"),
        (["chat", *WHO, "--steering", "not-there", "--strength", "much"], "must be a number"),
        (["chat", *WHO, "--strength", "1"], "--steering DIR"),
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


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "non-empty list"), ('[{"question": "Who?"}]', "lacks the field 'answer'")]
)
def test_malformed_qa_file(capsys, tmp_path, text, message):
    file = tmp_path / "qa.json"
    file.write_text(text)
    assert main(["steer", "--qa", str(file), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_unknown_command_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["explain"])
    assert stop.value.code == 2
