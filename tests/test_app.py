"""The page: its handlers called directly, then the page itself in headless Chromium against a running demo over a tiny random decoder."""

import importlib.util
import json
import pickle
import threading
import time
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs the extra 'ui'")

from chromium import TABS, tab

from lqa import LatentDecoder, LqaError
from lqa.chat import render, resolve_span
from lqa.ui import learn as learn_page
from lqa.ui import scan as scan_page
from lqa.ui import steer as steer_page
from lqa.ui import watch as watch_page
from lqa.ui.components import layer_control
from lqa.ui.limits import MAX_CHARACTERS, MAX_FOLLOW_UPS, MAX_SELECTED, check_answers, check_questions, check_turns
from lqa.ui.link import make_restore
from lqa.ui.read import answers_view, make_handlers, toggle_question
from lqa.ui.tokens import token_view

SYSTEM, USER, QUESTION = "Speak like a pirate.", "Who is it\nin the city?", "How will the assistant speak?"
OTHER = "Who is it?"
REFERENCES = ["none", "shuffled", "text_only"]
SKIPPED = {"__type__": "update"}
CONTROL = "Speak like a pirate of the sea."


def turns(system=SYSTEM, user=USER, *more):
    roles = ["system", "user", "assistant", "user"]
    return {"turns": [{"role": r, "content": t} for r, t in zip(roles, [system, user, *more], strict=False)], "busy": False}


@pytest.fixture(scope="module")
def decoder(tiny, decoder_folder, tmp_path_factory):
    """A tiny decoder, and one ready-made steering of its model in the place of steerings/."""
    decoder = LatentDecoder.from_pretrained(decoder_folder(), base=tiny("smol"))
    steering, folder = decoder.steer(control=CONTROL, steps=5), tmp_path_factory.mktemp("steerings")
    steering.save(folder / "pirate")
    steering.remove()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steer_page, "PRESETS", folder)
        yield decoder


@pytest.fixture(scope="module")
def handlers(decoder):
    return make_handlers(decoder)


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("app", Path(__file__).parent.parent / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Read --------------------------------------------------------------------------------------------------------


def test_empty_turns_are_none_and_length_is_limited():
    assert check_turns(turns("", "Hi", " ")) == [{"role": "user", "content": "Hi"}]
    assert [m["role"] for m in check_turns(turns("S", "U", "A", "U"))] == ["system", "user", "assistant", "user"]
    assert len(check_turns(turns("a" * 1000, "b" * (MAX_CHARACTERS - 1000)))) == 2
    with pytest.raises(LqaError, match="4,001 characters.*at most 4,000"):
        check_turns(turns("a" * 1000, "b" * (MAX_CHARACTERS - 999)))
    with pytest.raises(LqaError, match="13 turns"):
        check_turns({"turns": [{"role": "user", "content": "Hi"}] * 13})


@pytest.mark.parametrize("forged", [None, 5, {}, {"turns": 5}, {"turns": [5]}, {"turns": [{"role": "user", "content": 5}]}])
def test_a_chat_that_no_page_sends_is_refused(handlers, forged):
    strip, message = handlers.show(forged, None)
    assert strip == SKIPPED and message


def test_show_gives_tokens_turns_and_spans(decoder, handlers):
    view, message = handlers.show(turns(), None)
    rendered = render(decoder.base.tokenizer, check_turns(turns()))
    assert message == "" and "".join(t["text"] for t in view["tokens"]) == rendered.text
    assert view["selected"] == view["spans"]["user"] == resolve_span("user", rendered)
    assert view["selected"][-1] == len(rendered) - 1  # the generation header belongs to the user's turn
    assert view["spans"]["assistant"] == [] and view["spans"]["last"] == [len(rendered) - 1] and 0 not in view["spans"]["all"]
    roles = {t["role"] for t in handlers.show(turns("", USER, "Aye."), None)[0]["tokens"]}
    assert roles == {"template", "user", "assistant"}  # the template's own system prompt is no turn


def test_the_strip_follows_the_chat(handlers):
    view = handlers.show(turns(), None)[0]
    edited = handlers.show(turns(user="It is a doctor."), view | {"selected": view["spans"]["last"]})[0]
    assert edited["selected"] == edited["spans"]["last"] != view["spans"]["last"]  # the pressed button stays pressed
    assert handlers.show(turns(), view | {"selected": [2, 5]})[0]["selected"] == [2, 5]  # the same chat keeps a free selection
    assert handlers.show(turns(user="It is a doctor."), view | {"selected": [2, 5]})[0]["selected"] == edited["spans"]["user"]


def test_show_says_what_is_wrong_and_keeps_the_tokens(handlers):
    strip, message = handlers.show(turns(user="  "), None)
    assert strip == SKIPPED and "empty" in message


def test_the_target_replies_into_the_chat(decoder, handlers):
    outputs = list(handlers.reply(turns()))
    expected = decoder.generate(check_turns(turns()), max_new_tokens=96)
    assert outputs[-1][0]["turns"][-1] == {"role": "assistant", "content": expected} and not outputs[-1][0]["busy"]
    assert len(outputs) > 4 and all(chat["busy"] for chat, _ in outputs[:-1])
    (chat, message), *rest = handlers.reply(turns(SYSTEM, USER, "Aye."))
    assert not rest and "ends with the assistant" in message and chat["turns"][-1]["content"] == "Aye." and not chat["busy"]


def ask(handlers, chat=None, strip=None, questions=QUESTION, layer=1, previous=None):
    return list(handlers.ask(chat or turns(), strip, questions, layer, previous))


def test_ask_streams_then_brings_the_grounding(decoder, handlers):
    view = handlers.show(turns(), None)[0]
    outputs = ask(handlers, strip=view | {"selected": [3, 4, 5]}, questions=f"{QUESTION}\n\n{OTHER}\n")
    pickle.dumps(outputs)  # on ZeroGPU they come from another process
    stages = [answers["stage"] for _, answers, _ in outputs]
    assert list(dict.fromkeys(stages)) == ["reading", "answers", "grounding", "references", "done"] and stages.count("answers") > 4
    growing = [answers["items"] for _, answers, _ in outputs if answers["stage"] == "answers"]
    for earlier, later in zip(growing, growing[1:], strict=False):
        assert all(b["text"].startswith(a["text"]) for a, b in zip(earlier, later, strict=True))
    final, reading = outputs[-1][1], decoder.read(check_turns(turns()), [3, 4, 5], 1)
    for item, expected in zip(final["items"], reading.ask([QUESTION, OTHER], grounding=True), strict=True):
        assert (item["question"], item["text"]) == (expected.question, expected.text)
        assert item["confidence"] == pytest.approx(expected.confidence)
        assert item["references"] == {name: getattr(expected.grounding, name) for name in REFERENCES}
        assert "".join(word["text"] for word in item["words"]) == expected.text
        (tokens,) = reading.token_scores([(expected.question, expected.text)])
        assert item["gain"] == pytest.approx(sum(t.logprob - t.logprob_none for t in tokens) / len(tokens), abs=1e-4)
    assert final["note"] == "layer 1 · 3 tokens" and final["reading"]["span"] == [3, 4, 5]


def test_nothing_is_decoded_twice(decoder, handlers, monkeypatch):
    """One decode for the answers, one for the references without and with other activations, one for the text alone."""
    import lqa.engine

    rows, decode = [], lqa.engine.decode
    monkeypatch.setattr(lqa.engine, "decode", lambda *args, **kwargs: rows.append(len(args[2])) or decode(*args, **kwargs))
    ask(handlers, questions=f"{QUESTION}\n{OTHER}")
    assert rows == [2, 4, 2]


def test_follow_up_questions(decoder, handlers):
    view = ask(handlers)[-1][1]
    outputs = list(handlers.follow_up(view | {"ask": {"item": 0, "question": OTHER}}))
    first, (new,) = outputs[-1][0]["items"][0], outputs[-1][0]["items"][0]["follow_ups"]
    reading = decoder.read(check_turns(turns()), view["reading"]["span"], 1)
    (expected,) = reading.ask(OTHER, after=[(QUESTION, first["text"])], grounding=True)
    assert new["text"] == expected.text and new["references"] == {name: getattr(expected.grounding, name) for name in REFERENCES}
    assert first["references"] == view["items"][0]["references"] and outputs[-1][0]["stage"] == "done"
    again = view
    for _ in range(MAX_FOLLOW_UPS):
        again = list(handlers.follow_up(again | {"ask": {"item": 0, "question": OTHER}}))[-1][0]
    assert len(again["items"][0]["follow_ups"]) == MAX_FOLLOW_UPS
    ((kept, message),) = handlers.follow_up(again | {"ask": {"item": 0, "question": OTHER}})
    assert "as many as" in message and kept == again


@pytest.mark.parametrize(
    "change",
    [
        {"ask": {"item": 7, "question": "Who?"}},
        {"ask": {"item": "x", "question": "Who?"}},
        {"ask": None},
        {"ask": {"item": 0, "question": ""}},
        {"ask": {"item": 0, "question": "Who <|im_end|>?"}},
        {"items": [{"question": 5, "text": 6, "follow_ups": []}]},
        {"items": [{"question": "Q", "text": "x" * 5000, "follow_ups": []}]},
        {"reading": {"chat": [], "span": [1], "layer": 1}},
        {"reading": {"chat": [{"role": "user", "content": "Hi"}], "span": [999], "layer": 1}},
        {"reading": {"chat": [{"role": "user", "content": "Hi"}], "span": [3], "layer": "1.0"}},
    ],
)
def test_a_forged_follow_up_is_refused(handlers, change):
    item = {"question": QUESTION, "text": "Aye.", "follow_ups": []}
    reading = {"chat": [{"role": "user", "content": "Hi"}], "span": [3], "layer": 1}
    view = answers_view("done", [item], "", reading) | {"ask": {"item": 0, "question": "Who?"}}
    outputs = list(handlers.follow_up(view | change))
    assert len(outputs) == 1 and outputs[0][1] and list(handlers.follow_up(5))[0][1]


def test_ask_reads_the_edited_chat_not_the_tokens_of_the_old_one(handlers):
    old = handlers.show(turns(user="It is a doctor."), None)[0] | {"selected": [1]}
    outputs = ask(handlers, strip=old)
    assert outputs[0][0] == handlers.show(turns(), None)[0]  # the strip follows, with the default selection
    assert all(strip == SKIPPED for strip, _, _ in outputs[1:])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"questions": " \n "}, "There is no question"),
        ({"questions": 5}, "There is no question"),
        ({"questions": "What is <|im_end|>?"}, "special token"),
        ({"questions": "What\ud800?"}, "half a character"),
        ({"questions": "a\nb\nc\nd\ne"}, "5 questions.*at most 4"),
        ({"questions": "a" * 301}, "301 characters"),
        ({"chat": turns(user="")}, "empty"),
        ({"chat": turns(user="<|im_start|>system")}, "special token"),
        ({"chat": turns(user="x" * 100_000)}, "100,020 characters"),
        ({"chat": turns(user="z" * 450)}, f"at most {MAX_SELECTED}"),
        ({"layer": 2}, "supports the layers 0, 1"),
        ({"layer": "1; drop"}, "whole number"),
    ],
)
def test_ask_says_what_is_wrong_and_keeps_the_answers(handlers, change, message):
    import re

    before = answers_view("done", [], "layer 1")
    outputs = ask(handlers, previous=before, **change)
    assert outputs[-1][0] == SKIPPED and outputs[-1][1] == before and re.search(message, outputs[-1][2])


@pytest.mark.parametrize(
    "selected, message", [([], "No token is selected"), ([999], "token indices"), (["1"], "token indices"), (5, "No token is selected")]
)
def test_ask_refuses_a_selection_that_no_page_sends(decoder, handlers, selected, message):
    view = token_view(render(decoder.base.tokenizer, check_turns(turns())), selected)
    assert message in ask(handlers, strip=view)[-1][2]


def test_text_of_any_script_is_read(decoder, handlers):
    odd = "\u202eשלום 🏴‍☠️ \x07\x1b[31m\u0000 é\u200b 日本 <b>${1+1}</b> {{value}}"
    final = ask(handlers, chat=turns(odd, odd + "?"), questions=odd)[-1]
    assert final[2] == "" and final[1]["stage"] == "done" and final[1]["items"][0]["question"] == odd


def test_the_code_repeats_the_reading(decoder, handlers, monkeypatch, capsys):
    import lqa

    view = ask(handlers, questions=f'{QUESTION}\nWho said "it"?')[-1][1]
    monkeypatch.setattr(lqa.LatentDecoder, "from_pretrained", lambda *args: decoder)
    exec(view["code"], {})  # noqa: S102  the page's own snippet
    printed = capsys.readouterr().out
    assert all(item["text"] in printed and item["references"]["none"] in printed for item in view["items"])
    assert 'span="user"' in view["code"]


def test_suggestions_and_lists():
    added = toggle_question({"pick": [0, 1]}, "Mine?")
    assert added.startswith("Mine?\n") and toggle_question({"pick": [0, 1]}, added) == "Mine?"
    assert toggle_question({"pick": [9, 9]}, "Mine?") == toggle_question(None, "Mine?") == SKIPPED
    assert check_questions("a\n b \na") == ["a", "b"] and check_answers("x\ny") == ["x", "y"]


# --- Scan, Watch, Learn, link ------------------------------------------------------------------------------------


def test_scan_fills_its_cells(decoder):
    from lqa.scan import scan

    handlers, answers = scan_page.make_handlers(decoder), ["Formally.", "Like a pirate."]
    outputs = list(handlers.scan(turns(), None, QUESTION, "\n".join(answers), scan_page.EVERY, None))
    pickle.dumps(outputs)
    count = [sum(p is not None for row in view["cells"].values() for p in row) for view, _ in outputs]
    n = len(outputs[0][0]["tokens"])
    assert count[0] == 0 and count == sorted(set(count)) and count[-1] == 2 * (n - 1) and len(outputs) > 3
    assert outputs[-1][0]["stage"] == "done" and outputs[1][0]["cells"]["0"] == [None] * n  # the default layer, 1, comes first
    for part in scan(decoder, check_turns(turns()), QUESTION, answers):
        for cell in part:
            assert outputs[-1][0]["cells"][str(cell.layer)][cell.token] == pytest.approx(cell.probabilities, abs=1e-3)

    view = outputs[-1][0] | {"pick": {"token": 4, "layer": 0}}
    tabs, strip, layer, question, message = handlers.pick(view, turns())
    assert tabs["selected"] == "read" and strip["selected"] == [4] and (layer, question, message) == (0, QUESTION, "")
    assert "changed" in handlers.pick(view, turns(user="Other"))[-1]
    for pick in (None, {"token": 999, "layer": 0}, {"token": 4, "layer": 77}, {"token": "x", "layer": []}):
        assert handlers.pick(view | {"pick": pick}, turns())[-1]


@pytest.mark.parametrize(
    "change, message",
    [({"answers": "One."}, "2 to 6 answers"), ({"question": ""}, "empty"), ({"chat": turns(user="z" * 200)}, "at most 160 tokens")],
)
def test_scan_says_what_is_wrong(decoder, change, message):
    arguments = {"chat": turns(), "strip": None, "question": QUESTION, "answers": "A.\nB.", "what": scan_page.EVERY, "previous": None}
    ((_, notice),) = scan_page.make_handlers(decoder).scan(*(arguments | change).values())
    assert message in notice


def test_a_decoder_of_several_layers_has_a_page_too(tiny_decoder):
    decoder = tiny_decoder(layers_per_reading=2, default_layer=[0, 1])
    control = layer_control(decoder.config, "layer")
    assert control.value == "0, 1" and control.choices == [("0, 1", "0, 1")]
    handlers = make_handlers(decoder)
    view = ask(handlers, questions=OTHER, layer=control.value)[-1][1]
    assert view["stage"] == "done" and view["note"].startswith("layer 0, 1 ") and "layer=(0, 1)" in view["code"]
    back = json.loads(json.dumps(view)) | {"ask": {"item": 0, "question": OTHER}}  # as the browser sends it
    assert list(handlers.follow_up(back))[-1][0]["items"][0]["follow_ups"]
    scanned = scan_page.make_handlers(decoder)
    heat = list(scanned.scan(turns("", "Who?"), None, QUESTION, "Formally.\nLike a pirate.", scan_page.EVERY, None))[-1][0]
    assert heat["stage"] == "done" and heat["layers"] == ["0, 1"] and None not in heat["cells"]["0, 1"][1:]
    assert scanned.pick(heat | {"pick": {"token": 4, "layer": "0, 1"}}, turns("", "Who?"))[2] == control.value
    link = {"chat": check_turns(turns()), "span": "user", "layer": control.value, "questions": QUESTION}
    assert make_restore(decoder)(json.dumps(link))[2] == control.value


@pytest.mark.parametrize("answers", ["Formally.\nLike a pirate.", ""])
def test_watch_reads_while_the_target_writes(decoder, answers):
    outputs = list(watch_page.make_watch(decoder)(turns(), QUESTION, answers, watch_page.BOTH, 1, None))
    pickle.dumps(outputs)
    final = outputs[-1][0]
    assert final["stage"] == "done" and "".join(final["pieces"]).strip() == decoder.generate(check_turns(turns()), max_new_tokens=96)
    assert [p["at"] for p in final["points"][:3]] == [4, 8, 12] and final["points"][-1]["at"] == len(final["pieces"])
    chat = [*check_turns(turns()), {"role": "assistant", "content": "".join(final["pieces"][:8]).lstrip()}]
    span = watch_page.reply_span(decoder, chat, watch_page.BOTH)
    reading = decoder.read(chat, span, 1)
    assert reading.hidden == {0} and set(watch_page.reply_span(decoder, chat, watch_page.REPLY)) < set(span)
    if answers:
        assert final["points"][1]["p"] == pytest.approx(reading.probabilities(QUESTION, answers.split("\n")), abs=1e-3)
    else:
        assert final["points"][1]["text"] == reading.ask(QUESTION, max_new_tokens=watch_page.SHORT)[0].text
    *_, (kept, notice) = watch_page.make_watch(decoder)(turns(SYSTEM, USER, "Aye."), QUESTION, answers, watch_page.BOTH, 1, final)
    assert "ends with the assistant" in notice and kept == final


@pytest.fixture
def steer(tiny, decoder_folder):
    """The handlers of Steer over a decoder of their own."""
    return steer_page.make_handlers(LatentDecoder.from_pretrained(decoder_folder(), base=tiny("smol")))


TABLE = [["Who is it?", "It is a doctor."], ["", ""], [OTHER + " Really", "A pirate."]]


def test_steering_trains_with_its_loss_and_compares(steer):
    outputs = list(steer.train("", TABLE, 5, None, None))
    pickle.dumps(outputs)
    curve, folder, table, preset, message = outputs[-1]
    assert message == "" and preset == steer_page.OWN and curve["stage"] == "done" and table == [TABLE[0], TABLE[2]]
    steps = [len(o[0]["points"]) for o in outputs]
    assert steps[:3] == [0, 1, 2] and steps == sorted(steps) and all(p["loss"] > 0 for p in curve["points"])
    assert all(o[1] == SKIPPED for o in outputs[:-1]) and (Path(folder) / "lqa_steering.json").is_file()

    def replies(strength, seed=0):
        return list(steer.compare(turns(), "", None, folder, strength, True, seed))[-1]

    zero, one, again = replies(0), replies(3.0), replies(3.0)
    assert zero[0] == zero[1] == one[0] and one[1] != one[0] and one == again  # the same seed, steered and not
    assert replies(3.0, seed=1) != one

    button = steer.archive(None, folder)
    assert button["interactive"] and "adapter_model.safetensors" in zipfile.ZipFile(button["value"]).namelist()
    assert not steer.archive("../../etc", None)["interactive"]
    new = list(steer.train("", TABLE, 5, curve, folder))[-1][1]
    assert new != folder and not Path(folder).exists()  # the session's next steering takes its place
    steer.forget(new)
    assert not Path(new).exists() and "no steering yet" in list(steer.compare(turns(), "", None, new, 1.0, False, 0))[-1][2]


def test_a_training_that_is_left_ends(steer):
    running = steer.train("", TABLE, 60, None, None)
    for _ in range(3):
        next(running)
    running.close()
    ends = time.monotonic() + 60
    while any(t.name.endswith("(work)") for t in threading.enumerate()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert list(steer.train("", TABLE, 5, None, None))[-1][0]["stage"] == "done"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"table": [], "control": " "}, "empty"),
        ({"table": [["Who?", ""]]}, "answer of pair 0"),
        ({"table": [["Q", "A"]] * 13}, "13 pairs"),
        ({"table": [["Q", "A" * 400]]}, "longer than"),
        ({"table": [["Q", "<|im_end|>"]]}, "special token"),
        ({"table": "x", "control": 5}, "empty"),
        ({"steps": 61}, "from 5 to 60"),
        ({"steps": "many"}, "from 5 to 60"),
    ],
)
def test_steering_says_what_is_wrong(steer, change, message):
    arguments = {"control": "", "table": TABLE, "steps": 5, "curve": None, "folder": None} | change
    assert message in list(steer.train(*arguments.values()))[-1][-1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"strength": 99}, "from -3 to 3"),
        ({"strength": float("nan")}, "from -3 to 3"),
        ({"seed": -1}, "seed"),
        ({"preset": "../../etc"}, "no steering yet"),
        ({"chat": turns(user="")}, "empty"),
        ({"message": "x" * 5000}, "at most 4,000"),
    ],
)
def test_comparing_says_what_is_wrong(steer, change, message):
    arguments = {"chat": turns(), "message": "", "preset": None, "folder": None, "strength": 1.0, "sample": False, "seed": 0} | change
    assert message in list(steer.compare(*arguments.values()))[-1][-1]


def test_steerings_in_memory_are_few_and_none_in_use_is_dropped(tiny, decoder_folder, tmp_path):
    decoder = LatentDecoder.from_pretrained(decoder_folder(), base=tiny("smol"))
    made = decoder.steer(qa=TABLE[:1], steps=1)
    for name in "abc":
        made.save(tmp_path / name)
    held = steer_page.Loaded(decoder, keep=1)
    with held.using(str(tmp_path / "a")) as a:
        with held.using(str(tmp_path / "b")) as b:
            assert a.adapter and b.adapter and a.adapter != b.adapter
        with held.using(str(tmp_path / "c")) as c:
            assert b.adapter is None and a.adapter and c.adapter
    with held.using(str(tmp_path / "a")) as again:
        assert again is a


def test_ready_made_steerings_need_no_training(decoder, tiny, decoder_folder, monkeypatch, tmp_path):
    handlers = steer_page.make_handlers(decoder)
    control, table, curve, download = handlers.choose("pirate", None)
    assert control == table[0][1] == CONTROL and curve["stage"] == "done" and curve["points"][0]["loss"] > 0
    assert "lqa_steering.json" in zipfile.ZipFile(download["value"]).namelist() and Path(download["value"]).name == "pirate.zip"
    *_, (plain, steered, notice) = handlers.compare(turns(), "Who is it?", "pirate", None, 3.0, False, 0)
    chat = [{"role": "user", "content": "Who is it?"}]
    assert notice == "" and steered != plain and plain.strip() == decoder.generate(chat, max_new_tokens=96)
    assert handlers.choose(steer_page.OWN, None)[:3] == (SKIPPED,) * 3 and not handlers.choose(steer_page.OWN, None)[3]["interactive"]

    other = LatentDecoder.from_pretrained(decoder_folder("llama"), base=tiny("llama"))
    assert list(steer_page.presets(decoder)) == ["pirate"] and steer_page.presets(other) == {}  # made for another base
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "lqa_steering.json").write_text("{")
    monkeypatch.setattr(steer_page, "PRESETS", tmp_path)
    with pytest.raises(LqaError, match="malformed"):
        steer_page.presets(decoder)


def test_learn_shows_the_picture_and_the_answers_of_the_embedded_decoder():
    assert learn_page.PICTURE.read_text(encoding="utf-8") == learn_page.picture()
    assert len(learn_page.SENTENCES) == 10 and len(learn_page.cached()) == len(learn_page.EXAMPLES)
    stored = json.loads(learn_page.RESULTS.read_text(encoding="utf-8"))
    assert stored["decoder"] == learn_page.decoder_digest(), "another decoder is embedded now: python -m lqa.ui.learn"
    for view, (chat, _, question, _) in zip(stored["views"], learn_page.EXAMPLES.values(), strict=True):
        assert view["stage"] == "done" and view["items"][0]["question"] == question and view["reading"]["chat"] == check_turns(chat)
        assert view["items"][0]["text"] and all(view["items"][0]["references"].values())
    assert learn_page.open_lesson({"pick": [0, 3]})[3] == stored["views"][3] and learn_page.open_lesson({"pick": [0, 99]})[3] == SKIPPED


def test_a_link_restores_what_it_holds_and_nothing_else(decoder):
    restore = make_restore(decoder)
    state = {"chat": turns()["turns"], "span": [3, 4], "layer": 0, "questions": f"{QUESTION}\n{OTHER}"}
    chat, strip, layer, questions, message = restore(json.dumps(state))
    assert chat["turns"] == turns()["turns"] and strip["selected"] == [3, 4] and (layer, questions, message) == (0, state["questions"], "")
    assert restore(json.dumps(state | {"span": "last"}))[1]["selected"] == strip["spans"]["last"]
    assert restore("") == (SKIPPED,) * 5
    damaged = ["damaged", "[]", "{}", "[" * 5000, json.dumps(state)[:-3], "x" * 30_000, 5]
    changes = [("layer", 9), ("span", [0]), ("span", [999]), ("span", "assistant"), ("span", {}), ("chat", "x"), ("questions", [])]
    for text in [*damaged, *(json.dumps(state | {key: value}) for key, value in changes)]:
        *skipped, message = restore(text)
        assert message and skipped == [SKIPPED] * 4, text


# --- app.py ------------------------------------------------------------------------------------------------------


def test_check_asks_one_question(app, decoder, monkeypatch, capsys):
    monkeypatch.setattr(app, "load", lambda source: decoder)
    monkeypatch.setattr(app, "QUESTION", QUESTION)
    assert app.main(["--check"]) == 0
    question, answer = capsys.readouterr().out.split("\n", 1)
    assert question == QUESTION and answer.strip() == decoder.read(app.CHAT, "user").ask(QUESTION)[0].text


def test_check_names_what_is_wrong(app, tmp_path, capsys):
    assert app.main(["--check", "--decoder", str(tmp_path)]) == 2
    assert "lqa_config.json" in capsys.readouterr().err


# --- the running page --------------------------------------------------------------------------------------------


@pytest.fixture
def page(visit):
    return visit()


def write(page, *texts):
    """Fills the chat's boxes, one after the other, and waits for the tokens of the last one."""
    boxes = page.locator("#chat textarea")
    while boxes.count() < len(texts):
        page.click("#chat .bar button:has-text('Add')")
    for i, text in enumerate(texts):
        boxes.nth(i).fill(text)
    drawn = "() => document.querySelector('#tokens .box').textContent"
    wanted = [text.split("\n")[-1].replace(" ", "·").replace("\t", "⇥") for text in texts]
    page.wait_for_function(f"texts => texts.every((text) => ({drawn})().includes(text))", arg=wanted)


def selected(page) -> list[int]:
    return page.eval_on_selector_all("#tokens .tok[aria-selected=true]", "nodes => nodes.map(node => Number(node.dataset.index))")


def token(page, i):
    return page.locator(f"#tokens .tok[data-index='{i}']")


@pytest.mark.browser
def test_tokens_show_turns_and_whitespace(page, decoder):
    write(page, SYSTEM, USER, "Like\ta pirate.")
    assert page.locator("#tokens .role").all_text_contents() == ["system", "user", "assistant"]
    rendered = render(decoder.base.tokenizer, check_turns(turns(SYSTEM, USER, "Like\ta pirate.")))
    drawn = page.locator("#tokens .tok").all_text_contents()
    assert "".join(drawn) == rendered.text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    special = page.eval_on_selector_all("#tokens .tok.special", "nodes => nodes.map(node => Number(node.dataset.index))")
    assert special == [i for i, t in enumerate(rendered.tokens) if not t.content]
    assert selected(page) == resolve_span("user", rendered)
    assert page.locator("#tokens .pill").all_text_contents()[0] == "hidden from the decoder"

    page.click("#chat .bar button:has-text('Remove')")
    write(page, "", USER)
    page.wait_for_function("() => document.querySelector('#tokens .box').textContent.includes('helpful')")
    assert page.locator("#tokens .role").all_text_contents() == ["template preamble", "user"]


@pytest.mark.browser
def test_selecting_tokens(page, handlers):
    write(page, SYSTEM, USER)
    spans = handlers.show(turns(), None)[0]["spans"]
    for name, span in spans.items():
        button = page.locator(f"#tokens [data-span={name}]")
        if not span:
            assert button.is_disabled()
            continue
        button.click()
        assert selected(page) == span and button.get_attribute("aria-pressed") == "true"
    last = spans["last"][0]

    token(page, last).click()  # a click toggles
    assert selected(page) == []
    token(page, 0).click(force=True)  # position 0 belongs to no span
    assert selected(page) == []
    token(page, 4).click()
    token(page, 8).click(modifiers=["Shift"])
    assert selected(page) == [4, 5, 6, 7, 8]
    token(page, 6).click()
    assert selected(page) == [4, 5, 7, 8]
    assert page.locator("#tokens .count").text_content() == f"4 of {len(spans['all'])} tokens"

    token(page, 10).hover()  # dragging selects what it passes over
    page.mouse.down()
    token(page, 11).hover()
    token(page, 12).hover()
    page.mouse.up()
    assert selected(page) == [4, 5, 7, 8, 10, 11, 12]

    token(page, 6).focus()  # the keyboard goes on from the last token used
    for key in ("Home", "Space", "ArrowRight", "ArrowRight", "ArrowLeft", "Space", "Shift+ArrowRight"):
        page.keyboard.press(key)
    assert selected(page) == [1, 2, 3, 4, 5, 7, 8, 10, 11, 12]
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")  # stopped at 1
    assert selected(page) == [2, 3, 4, 5, 7, 8, 10, 11, 12]


@pytest.mark.browser
def test_asking_streams_answers_and_brings_their_grounding(page, decoder):
    write(page, SYSTEM, USER)
    page.click("#tokens [data-span=last]")
    token(page, 5).click()
    span = selected(page)
    page.click("#layer label:has-text('0')")
    page.fill("#questions textarea", f"{QUESTION}\n{OTHER}")
    page.evaluate(
        """() => {
            window.states = [];
            new MutationObserver(() => {
                const node = document.querySelector("#answers .card .text");
                if (node) window.states.push(node.textContent);
            }).observe(document.querySelector("#answers"), { childList: true, subtree: true, characterData: true });
        }"""
    )
    page.press("#questions textarea", "Shift+Enter")
    page.wait_for_selector("#answers [data-stage=done]")
    expected = decoder.read(check_turns(turns()), span, 0).ask([QUESTION, OTHER], grounding=True)
    texts = page.locator("#answers .card .text").all_text_contents()
    assert texts == [answer.text for answer in expected]
    states = [s for s in dict.fromkeys(page.evaluate("window.states")) if s and s != texts[0]]
    assert len(states) >= 2 and all(texts[0].startswith(s.strip()) for s in states)
    for name in REFERENCES:
        shown = page.locator(f"#answers .reference.{name} .said").all_text_contents()
        assert shown == [getattr(answer.grounding, name) or "(no words)" for answer in expected]
    shown = page.locator("#answers .confidence").all_text_contents()
    assert shown == [f"confidence {100 * answer.confidence:.0f} %" for answer in expected]
    assert "layer 0 · 2 tokens" in page.locator("#answers .status").text_content() and selected(page) == span
    assert page.locator("#answers .word").count() == sum(len(answer.text.split()) for answer in expected)


@pytest.mark.browser
def test_errors_are_said_in_the_page_and_nothing_is_lost(page):
    write(page, SYSTEM, USER)
    page.click("#tokens [data-span=last]")
    before = selected(page)
    page.locator("#chat textarea").nth(1).fill("")
    page.wait_for_selector("#chat-notice .lqa-notice:visible")
    assert "user's message" in page.locator("#chat-notice .lqa-notice").text_content()
    assert selected(page) == before and page.locator("#chat textarea").first.input_value() == SYSTEM

    write(page, SYSTEM, USER)
    page.fill("#questions textarea", " ")
    page.click("#ask")
    page.wait_for_selector("#ask-notice .lqa-notice:visible")
    assert "There is no question" in page.locator("#ask-notice .lqa-notice").text_content()
    page.fill("#questions textarea", QUESTION)
    page.click("#ask")
    page.wait_for_selector("#answers [data-stage=done]")
    assert page.locator("#ask-notice .lqa-notice").is_hidden()  # the message goes when it is no longer true


@pytest.mark.browser
def test_text_of_users_stays_text(page):
    page.evaluate("() => { window.alert = () => { window.hit = true; }; }")
    evil = "<img src=x onerror=alert(1)> ${1+1} {{value}} ${alert(1)} `"
    write(page, evil, evil, evil, evil)
    assert evil.replace(" ", "·") in page.locator("#tokens .turn.user .body").first.text_content()
    page.fill("#questions textarea", evil)
    page.click("#ask")
    page.wait_for_selector("#answers [data-stage=done]")
    assert page.locator("#answers .question").text_content() == evil
    page.click("#share")
    page.wait_for_selector("#address input:visible")
    page.locator("#chat textarea").nth(1).fill("<|im_start|><img src=x onerror=alert(1)>${1+1}")  # this one is quoted in an error
    page.wait_for_selector("#chat-notice .lqa-notice:visible")
    for name, box, go in (("Scan", "scan-question", "scan"), ("Watch", "watch-question", "watch")):
        tab(page, name)
        page.fill(f"#{box} textarea, #{box} input", evil)
        page.click(f"#{go}")
        page.wait_for_selector(f"#{go}-notice .lqa-notice:visible")
    assert page.locator("#lqa-page img").count() == 0 and page.evaluate("window.hit") is None


@pytest.mark.browser
def test_steering_from_ready_made_to_own(page, decoder):
    tab(page, "Steer")
    assert [t.strip() for t in page.locator("#preset label").all_text_contents()] == [CONTROL, steer_page.OWN]
    page.fill("#strength input[type=number]", "3")
    page.fill("#message textarea", OTHER)
    page.click("#compare")
    chat, steering = [{"role": "user", "content": OTHER}], decoder.load_steering(steer_page.PRESETS / "pirate")
    plain = decoder.generate(chat, max_new_tokens=96)
    with steering.apply(3.0):
        steered = decoder.generate(chat, max_new_tokens=96)
    steering.remove()
    for box, text in (("plain", plain), ("steered", steered)):
        page.wait_for_function("([box, text]) => document.querySelector(box).value.trim() === text", arg=[f"#{box} textarea", text])
    with page.expect_download() as download:
        page.click("#download")
    assert "adapter_model.safetensors" in zipfile.ZipFile(download.value.path()).namelist()

    page.click("#own .label-wrap")
    page.wait_for_selector("#curve [data-stage=done] .line")
    page.locator("#pairs [data-testid=cell-0-1]").dblclick()  # its own text is the first answer
    page.keyboard.press("Control+a")
    page.keyboard.type("It is a doctor.")
    page.keyboard.press("Enter")
    page.fill("#steps input[type=number]", "5")
    page.click("#train")  # which may be over before anybody looks
    page.wait_for_selector(f"#preset input[value='{steer_page.OWN}']:checked")
    page.wait_for_selector("#curve [data-stage=done]")
    assert "It is a doctor." in page.locator("#pairs [data-testid=cell-0-1]").text_content()
    page.locator("#control textarea").press_sequentially("Formally.")  # the pairs of another control go away
    page.wait_for_function("() => !document.querySelector('#pairs').textContent.includes('doctor')")


@pytest.mark.browser
def test_nothing_sticks_out_on_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    for name in TABS:
        tab(page, name)
        page.wait_for_function("() => document.documentElement.scrollWidth <= 390")


def test_the_public_endpoints(url, decoder):
    from gradio_client import Client

    client = Client(url, verbose=False, analytics_enabled=False)
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/read", "/score", "/steer"]  # everything public is also a tool for agents
    result = client.predict(SYSTEM, USER, QUESTION, "last:2", 0, api_name="/read")
    reading = decoder.read(check_turns(turns()), "last:2", 0)
    expected = reading.ask(QUESTION, grounding=True)[0]
    assert result["answer"] == expected.text and result["references"] == {n: getattr(expected.grounding, n) for n in REFERENCES}
    assert result["layer"] == 0 and result["confidence"] == pytest.approx(expected.confidence)
    assert client.predict(SYSTEM, USER, QUESTION, api_name="/read")["layer"] == decoder.config.default_layer
    answers = ["Formally.", "Like a pirate."]
    result = client.predict(SYSTEM, USER, QUESTION, answers, "last:2", 0, api_name="/score")
    scores, probabilities = reading.score(QUESTION, answers), reading.probabilities(QUESTION, answers)
    for row, score, p in zip(result["answers"], scores, probabilities, strict=True):
        assert row == {"text": score.text} | {
            name: pytest.approx(x) for name, x in (("logprob", score.logprob), ("logprob_none", score.logprob_none), ("probability", p))
        }
    result = client.predict(CONTROL, USER, "", 3.0, 5, api_name="/steer")
    assert result["baseline"] == decoder.generate([{"role": "user", "content": USER}], max_new_tokens=96) != result["steered"]
    assert result["qa"][0][1] == CONTROL and 1 <= result["steps"] <= 5 and result["loss"] > 0

    wrong = [
        ((SYSTEM, USER, QUESTION, "everything"), "/read", "not understood"),
        ((SYSTEM, USER, QUESTION, "9:" + "9" * 5000), "/read", "The span must be"),
        ((SYSTEM, USER, QUESTION, 5), "/read", "The span must be"),
        ((SYSTEM, USER, QUESTION, "user", 99), "/read", "supports the layers"),
        ((SYSTEM, USER, QUESTION, "user", "deep"), "/read", "whole number"),
        (({"a": 1}, USER, QUESTION), "/read", "must be text"),
        ((SYSTEM, "x" * 100_000, QUESTION), "/read", "at most 4,000"),
        ((SYSTEM, "<|im_end|>", QUESTION), "/read", "special token"),
        ((SYSTEM, USER, "Q" * 1000), "/read", "1,000 characters"),
        ((SYSTEM, USER, QUESTION, ["One."]), "/score", "2 to 6"),
        ((SYSTEM, USER, QUESTION, "One."), "/score", "must be a list"),
        ((SYSTEM, USER, QUESTION, [1, 2]), "/score", "must be a list"),
        (("", USER), "/steer", "The control is empty"),
        (("Speak.", USER, "", 99), "/steer", "from -3 to 3"),
        (("Speak.", USER, "", 1, 1000), "/steer", "from 5 to 60"),
        (("Speak.", 5), "/steer", "must be text"),
    ]
    for arguments, name, message in wrong:
        with pytest.raises(Exception, match=message):
            client.predict(*arguments, api_name=name)


def test_agents_get_the_same_as_tools(url, decoder):
    """Over MCP: exactly the public endpoints, documented, callable."""
    mcp = pytest.importorskip("mcp")
    import ast
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from mcp.client.streamable_http import streamablehttp_client

    async def call():
        async with streamablehttp_client(f"{url}gradio_api/mcp/") as (reader, writer, _), mcp.ClientSession(reader, writer) as session:
            await session.initialize()
            tools = (await session.list_tools()).tools
            arguments = {"system": SYSTEM, "user": USER, "question": QUESTION, "span": "last:2", "layer": 0}
            name = next(tool.name for tool in tools if tool.name.endswith("read"))
            return tools, await session.call_tool(name, arguments)

    with ThreadPoolExecutor(1) as pool:  # Playwright keeps an event loop in this thread
        tools, result = pool.submit(lambda: asyncio.run(call())).result()
    assert sorted(tool.name.rsplit("_", 1)[-1] for tool in tools) == ["read", "score", "steer"]
    for tool in tools:
        assert len(tool.description) > 40 and {"system", "user"} <= set(tool.inputSchema["properties"])
    expected = decoder.read(check_turns(turns()), "last:2", 0).ask(QUESTION)[0]
    assert not result.isError and ast.literal_eval(result.content[0].text)["answer"] == expected.text
