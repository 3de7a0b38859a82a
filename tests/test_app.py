"""The page: its handlers called directly, then the page itself in headless Chromium against a running demo over a tiny random decoder."""

import importlib.util
import os
import pickle
import shutil
from pathlib import Path
from urllib.parse import urlparse

import pytest

pytest.importorskip("gradio", reason="the page needs the extra 'ui'")

from lqa import LatentDecoder, LqaError
from lqa.chat import render, resolve_span
from lqa.ui import build, launch
from lqa.ui.handlers import MAX_CHARACTERS, cards, chat_of, make_handlers
from lqa.ui.tokens import MAX_SELECTED, token_view

SYSTEM, USER, QUESTION = "Speak like a pirate.", "Who is it\nin the city?", "How will the assistant speak?"
REFERENCES = ["none", "shuffled", "text_only"]
SKIPPED = {"__type__": "update"}


@pytest.fixture(scope="module")
def decoder(tiny, decoder_folder):
    return LatentDecoder.from_pretrained(decoder_folder(), base=tiny("smol"))


@pytest.fixture(scope="module")
def handlers(decoder):
    return make_handlers(decoder)


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("app", Path(__file__).parent.parent / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- handlers ----------------------------------------------------------------------------------------------------


def test_chat_of_leaves_out_empty_turns_and_limits_length():
    assert chat_of("", "Hi", " ") == [{"role": "user", "content": "Hi"}]
    assert [m["role"] for m in chat_of("S", "U", "A")] == ["system", "user", "assistant"]
    assert len(chat_of("a" * 1000, "b" * (MAX_CHARACTERS - 1000))) == 2
    with pytest.raises(LqaError, match="4,001 characters.*at most 4,000"):
        chat_of("a" * 1000, "b" * (MAX_CHARACTERS - 999))


def test_show_gives_tokens_turns_and_spans(decoder, handlers):
    view, message = handlers.show(SYSTEM, USER, "")
    rendered = render(decoder.base.tokenizer, chat_of(SYSTEM, USER))
    assert message == "" and "".join(t["text"] for t in view["tokens"]) == rendered.text
    assert view["selected"] == view["spans"]["user"] == resolve_span("user", rendered)
    assert view["selected"][-1] == len(rendered) - 1  # the generation header belongs to the user's turn
    assert view["spans"]["assistant"] == [] and view["spans"]["last"] == [len(rendered) - 1] and 0 not in view["spans"]["all"]
    roles = {t["role"] for t in handlers.show("", USER, "Aye.")[0]["tokens"]}
    assert roles == {"template", "user", "assistant"}  # the template's own system prompt is no turn


def test_show_says_what_is_wrong_and_keeps_the_tokens(handlers):
    strip, message = handlers.show(SYSTEM, "  ", "")
    assert strip == SKIPPED and "empty" in message


def ask(handlers, system=SYSTEM, user=USER, strip=None, question=QUESTION, layer=1, previous=None):
    return list(handlers.ask(system, user, "", strip, question, layer, previous))


def test_ask_streams_then_brings_the_references(decoder, handlers):
    view = handlers.show(SYSTEM, USER, "")[0]
    outputs = ask(handlers, strip=view | {"selected": [3, 4, 5]})
    pickle.dumps(outputs)  # on ZeroGPU they come from another process
    stages = [answer["stage"] for _, answer, _ in outputs]
    assert stages == ["answer"] * (len(stages) - 2) + ["references", "done"] and len(stages) > 4
    texts = [answer["answer"] for _, answer, _ in outputs[:-2]]
    assert all(later.startswith(earlier) and later != earlier for earlier, later in zip(texts, texts[1:], strict=False))
    final = outputs[-1][1]
    expected = decoder.read(chat_of(SYSTEM, USER), [3, 4, 5], 1).ask(QUESTION, grounding=True)[0]
    assert (final["answer"], final["confidence"]) == (expected.text, pytest.approx(expected.confidence))
    assert final["references"] == {name: getattr(expected.grounding, name) for name in REFERENCES}
    assert final["note"] == "layer 1 · 3 tokens" and final["question"] == QUESTION


def test_ask_reads_the_edited_chat_not_the_tokens_of_the_old_one(handlers):
    old = handlers.show(SYSTEM, "It is a doctor.", "")[0] | {"selected": [1]}
    outputs = ask(handlers, strip=old)
    assert outputs[0][0] == handlers.show(SYSTEM, USER, "")[0]  # the strip follows, with the default selection
    assert all(strip == SKIPPED for strip, _, _ in outputs[1:])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": " "}, "no empty one"),
        ({"question": "What is <|im_end|>?"}, "special token"),
        ({"user": ""}, "empty"),
        ({"user": "<|im_start|>system"}, "special token"),
        ({"user": "z" * 450}, f"at most {MAX_SELECTED}"),
        ({"layer": 2}, "supports the layers 0, 1"),
    ],
)
def test_ask_says_what_is_wrong_and_keeps_the_answer(handlers, change, message):
    before = cards("Q", "layer 1", "done", "Arr.", 0.5, none="x")
    outputs = ask(handlers, previous=before, **change)
    assert len(outputs) == 1 and outputs[0][:2] == (SKIPPED, before) and message in outputs[0][2]


@pytest.mark.parametrize("selected, message", [([], "No token is selected"), ([999], "token indices"), (["1"], "token indices")])
def test_ask_refuses_a_selection_that_no_page_sends(decoder, handlers, selected, message):
    view = token_view(render(decoder.base.tokenizer, chat_of(SYSTEM, USER)), selected)
    assert message in ask(handlers, strip=view)[-1][2]


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

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
WAIT = 1000 * int(os.environ.get("LQA_TEST_WAIT", "30"))  # ms


@pytest.fixture(scope="module")
def url(decoder):
    demo = build(decoder)
    _, address, _ = launch(demo, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield address
    demo.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page, freshly loaded.  Afterwards: it has asked no other host for anything, and its scripts have raised no error."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page, hosts, errors = context.new_page(), set(), []
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#tokens .tok")
    yield page
    context.close()
    assert hosts <= {"127.0.0.1", "localhost", None} and not errors


def fill(page, **boxes):
    for box, text in boxes.items():
        page.fill(f"#{box} textarea, #{box} input[type=text]", text)


def read(page, expected):
    """Presses the button and waits for tokens that say `expected`."""
    page.click("#show")
    page.wait_for_function("text => document.querySelector('#tokens .box').textContent.includes(text)", arg=expected)


def selected(page) -> list[int]:
    return page.eval_on_selector_all("#tokens .tok[aria-selected=true]", "nodes => nodes.map(node => Number(node.dataset.index))")


def token(page, i):
    return page.locator(f"#tokens .tok[data-index='{i}']")


@pytest.mark.browser
def test_tokens_show_turns_and_whitespace(page, decoder):
    fill(page, system=SYSTEM, user=USER, assistant="Like\ta pirate.")
    read(page, "⇥")
    assert page.locator("#tokens .role").all_text_contents() == ["system", "user", "assistant"]
    rendered = render(decoder.base.tokenizer, chat_of(SYSTEM, USER, "Like\ta pirate."))
    drawn = page.locator("#tokens .tok").all_text_contents()
    assert "".join(drawn) == rendered.text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    special = page.eval_on_selector_all("#tokens .tok.special", "nodes => nodes.map(node => Number(node.dataset.index))")
    assert special == [i for i, t in enumerate(rendered.tokens) if not t.content]
    assert selected(page) == resolve_span("user", rendered)
    assert page.locator("#tokens .pill").all_text_contents()[0] == "hidden from the decoder"

    fill(page, system="", assistant="")
    read(page, "helpful")
    assert page.locator("#tokens .role").all_text_contents() == ["template preamble", "user"]


@pytest.mark.browser
def test_selecting_tokens(page, handlers):
    fill(page, system=SYSTEM, user=USER)
    read(page, "city")
    spans = handlers.show(SYSTEM, USER, "")[0]["spans"]
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
def test_asking_streams_an_answer_and_brings_its_references(page, decoder):
    fill(page, system=SYSTEM, user=USER, question=QUESTION)
    read(page, "city")
    page.click("#tokens [data-span=last]")
    token(page, 5).click()
    span = selected(page)
    page.click("#layer label:has-text('0')")
    page.evaluate(
        """() => {
            const node = document.querySelector("#answers .card.answer .text");
            window.states = [];
            new MutationObserver(() => window.states.push(node.textContent)).observe(node, { childList: true });
        }"""
    )
    page.press("#question input, #question textarea", "Enter")
    page.wait_for_selector("#answers [data-stage=done]")
    expected = decoder.read(chat_of(SYSTEM, USER), span, 0).ask(QUESTION, grounding=True)[0]
    text = page.locator("#answers .card.answer .text").text_content()
    assert text == expected.text
    states = [s for s in dict.fromkeys(page.evaluate("window.states")) if s and s != text]
    assert len(states) >= 2 and all(text.startswith(s.strip()) for s in states)
    for name in REFERENCES:
        shown = page.locator(f"#answers .card.{name} .text").text_content()
        assert shown == (getattr(expected.grounding, name) or "(no words)")
    assert f"{100 * expected.confidence:.0f} %" in page.locator("#answers .confidence").text_content()
    assert page.locator("#answers .note").text_content() == "layer 0 · 2 tokens" and selected(page) == span

    page.click("#suggestions button:has-text('Describe the character')")  # a suggestion becomes the question
    page.wait_for_function("() => document.querySelector('#question input, #question textarea').value.startsWith('Describe the character')")


@pytest.mark.browser
def test_an_example_fills_the_boxes_and_shows_its_tokens(page):
    page.click("#examples button:has-text('Hidden instruction')")
    page.wait_for_function("() => document.querySelector('#tokens .box').textContent.replaceAll('·', ' ').includes('chamomile')")
    assert "chamomile" in page.input_value("#system textarea") and page.input_value("#user textarea")


@pytest.mark.browser
def test_errors_are_said_in_the_page_and_nothing_is_lost(page):
    fill(page, system=SYSTEM, user=USER, question=QUESTION)
    read(page, "city")
    page.click("#tokens [data-span=last]")
    before = selected(page)
    fill(page, user="")
    page.click("#show")
    page.wait_for_selector("#chat-notice .lqa-notice:visible")
    assert "user's message" in page.locator("#chat-notice .lqa-notice").text_content()
    assert selected(page) == before and page.input_value("#system textarea") == SYSTEM

    fill(page, user=USER, question=" ")
    page.click("#ask")
    page.wait_for_selector("#ask-notice .lqa-notice:visible")
    assert "no empty one" in page.locator("#ask-notice .lqa-notice").text_content()
    fill(page, question=QUESTION)
    page.click("#ask")
    page.wait_for_selector("#answers [data-stage=done]")
    assert page.locator("#ask-notice .lqa-notice").is_hidden()  # the message goes when it is no longer true


@pytest.mark.browser
def test_text_of_users_stays_text(page):
    page.evaluate("() => { window.alert = () => { window.hit = true; }; }")
    evil = "<img src=x onerror=alert(1)> ${1+1} {{value}} ${alert(1)} `"
    fill(page, system=SYSTEM, user=evil, question=evil)
    read(page, "onerror")
    drawn = page.locator("#tokens .turn.user .body").text_content()
    assert evil.replace(" ", "·") in drawn
    page.click("#ask")
    page.wait_for_selector("#answers [data-stage=done]")
    assert page.locator("#answers .question").text_content() == evil
    fill(page, user="<|im_start|><img src=x onerror=alert(1)>${1+1}")  # this one is quoted in an error
    page.click("#show")
    page.wait_for_selector("#chat-notice .lqa-notice:visible")
    assert page.locator("#tokens img, #answers img, #chat-notice img").count() == 0 and page.evaluate("window.hit") is None


@pytest.mark.browser
def test_nothing_sticks_out_on_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("() => document.documentElement.scrollWidth <= 390")


def test_the_public_endpoint(url, decoder, handlers):
    from gradio_client import Client

    client = Client(url, verbose=False, analytics_enabled=False)
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/read"]  # everything public is also a tool for agents
    result = client.predict(SYSTEM, USER, QUESTION, "last:2", 0, api_name="/read")
    expected = decoder.read(chat_of(SYSTEM, USER), "last:2", 0).ask(QUESTION, grounding=True)[0]
    assert result["answer"] == expected.text and result["references"] == {n: getattr(expected.grounding, n) for n in REFERENCES}
    assert result["layer"] == 0 and result["confidence"] == pytest.approx(expected.confidence)
    assert client.predict(SYSTEM, USER, QUESTION, api_name="/read")["layer"] == decoder.config.default_layer
    with pytest.raises(Exception, match="not understood"):
        client.predict(SYSTEM, USER, QUESTION, "everything", api_name="/read")
