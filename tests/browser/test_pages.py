"""Every page in headless Chromium over the embedded decoder (`make test-browser`)."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs the extra 'ui'")
pytest.importorskip("playwright.sync_api")

import httpx
from chromium import DONE, SLOWNESS, TABS, WAIT, tab

from lqa import LatentDecoder
from lqa.ui.examples import CHATS
from lqa.ui.limits import MAX_REPLY

ROOT = Path(__file__).parents[2]
CHAT, QUESTION = CHATS["Pirate captain"]
OTHER = "How will the assistant speak?"


@pytest.fixture(scope="module")
def decoder():
    return LatentDecoder.from_pretrained(device="cpu")


def ask(page, *questions):
    page.fill("#questions textarea", "\n".join(questions))
    page.click("#ask")
    page.wait_for_selector("#answers [data-stage=reading], #answers [data-stage=answers]")
    page.wait_for_selector(DONE)


def texts(page) -> list[str]:
    return page.locator("#answers .card .text").all_text_contents()


# --- Read --------------------------------------------------------------------------------------------------------


def test_several_questions_follow_ups_and_copies(visit, decoder):
    page = visit()
    ask(page, QUESTION, OTHER)
    reading = decoder.read(CHAT, "user")
    expected = reading.ask([QUESTION, OTHER], grounding=True)
    assert texts(page) == [a.text for a in expected]
    assert page.locator("#answers .reference.text_only .said").all_text_contents() == [a.grounding.text_only for a in expected]

    page.locator("#answers .further input").first.fill("Why do you say so?")
    page.locator("#answers .further button").first.click()
    page.wait_for_selector("#answers .card.follow")
    page.wait_for_selector(DONE)
    (further,) = reading.ask("Why do you say so?", after=[(QUESTION, expected[0].text)])
    assert page.locator("#answers .card.follow .text").text_content() == further.text

    page.click("#answers .tools button:has-text('JSON')")
    copied = json.loads(page.evaluate("() => navigator.clipboard.readText()"))
    assert [a["answer"] for a in copied["answers"]] == [a.text for a in expected] and copied["layer"] == reading.layer
    assert copied["answers"][0]["grounding"]["none"] == expected[0].grounding.none and copied["span"] == list(reading.span)
    assert copied["tokens"] == reading.tokens and copied["answers"][0]["follow_ups"][0]["answer"] == further.text
    page.click("#answers .tools button:has-text('text')")
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert f"Q: {OTHER}\nA: {expected[1].text}" in copied and expected[1].grounding.shuffled in copied
    page.click("#answers .code summary")
    code = page.locator("#answers .code pre").text_content()
    assert "lqa.LatentDecoder.from_pretrained()" in code and json.dumps(OTHER) in code


def test_grounding_is_coloured_and_explained(visit, decoder):
    page = visit()
    ask(page, QUESTION)
    (answer,) = decoder.read(CHAT, "user").ask(QUESTION)
    (scores,) = decoder.read(CHAT, "user").token_scores([(QUESTION, answer.text)])
    gains = page.eval_on_selector_all("#answers .word", "nodes => nodes.map(node => Number(node.dataset.gain))")
    assert len(gains) == len(answer.text.split()) and max(gains) <= max(s.logprob - s.logprob_none for s in scores) + 0.01
    colours = page.eval_on_selector_all("#answers .word", "nodes => nodes.map(node => getComputedStyle(node).backgroundColor)")
    strongest = colours[gains.index(max(gains))]
    assert strongest not in ("rgba(0, 0, 0, 0)", colours[gains.index(min(gains, key=abs))])
    assert "log-probability with these activations minus without" in page.locator("#answers .legend").text_content()


def test_the_target_replies_into_the_editor_and_turns_are_edited(visit, decoder):
    page = visit()
    page.click("#chat button:has-text('Let the model reply')")
    page.wait_for_selector("#chat button:has-text('Stop'):visible")
    page.wait_for_selector("#chat button:has-text('Add a user turn'):visible")
    reply = decoder.generate(CHAT, max_new_tokens=MAX_REPLY)
    assert page.locator("#chat textarea").nth(2).input_value() == reply
    page.wait_for_selector("#tokens .turn.assistant")
    page.click("#tokens [data-span=assistant]")
    ask(page, OTHER)
    chat = [*CHAT, {"role": "assistant", "content": reply}]
    assert texts(page) == [decoder.read(chat, "assistant").ask(OTHER)[0].text]
    page.click("#chat button:has-text('Remove last turn')")
    page.wait_for_function("() => !document.querySelector('#tokens .turn.assistant')")


def test_stop_frees_the_model(visit):
    page = visit()
    page.fill("#questions textarea", QUESTION)
    page.click("#ask")
    page.wait_for_selector("#answers [data-stage=answers]")
    page.click("#stop")
    page.wait_for_selector("#answers [data-stage=stopped]")
    ask(page, OTHER)
    assert len(texts(page)) == 1


def test_nothing_jumps_while_an_answer_streams(visit):
    page = visit()
    page.fill("#questions textarea", QUESTION)
    page.click("#ask")
    page.wait_for_selector("#answers .card")
    page.evaluate(
        """() => {
            window.tops = [];
            const [text, below] = ["text", "references"].map((name) => document.querySelector("#answers .card ." + name));
            const note = () => window.tops.push(below.getBoundingClientRect().top + scrollY);
            new MutationObserver(note).observe(text, { childList: true, characterData: true, subtree: true });
        }"""
    )
    page.wait_for_selector("#answers [data-stage=references]")
    tops = page.evaluate("window.tops")
    assert len(tops) > 3 and max(tops) - min(tops) < 60, tops  # a long answer may take a third line


def test_the_first_word_comes_soon(visit):
    page = visit()
    words = "tell me about the harbour and its old ships " * 14  # about 150 tokens with the rest
    page.locator("#chat textarea").nth(1).fill(words)
    page.wait_for_function("() => document.querySelectorAll('#tokens .tok').length > 140")
    ask(page, QUESTION)  # the first forward pass of a process is slower than all others
    begun = time.perf_counter()
    page.click("#ask")
    page.wait_for_function("() => document.querySelector('#answers [data-stage=answers] .text').textContent.length > 0")
    seconds = time.perf_counter() - begun
    print(f"\nclick to first word: {seconds:.2f} s")
    assert seconds < 2.5 * SLOWNESS


# --- Scan, Watch, Steer, Learn -------------------------------------------------------------------------------------


def test_scan_fills_a_heatmap_that_opens_in_read(visit, decoder):
    page = visit()
    tab(page, "Scan")
    page.click("#scan")
    page.wait_for_selector("#heat .cell.known")
    total = page.locator("#heat .cell").count()
    assert page.locator("#heat .cell.known").count() < total  # it comes piece by piece
    page.wait_for_selector("#heat [data-stage=done]", timeout=4 * WAIT)
    n = len(decoder.read(CHAT).span)
    assert page.locator("#heat .cell.known").count() == n * len(decoder.config.readings)
    cell = page.locator("#heat .cell.known[data-layer='14'][data-token='9']")
    answers = ["A pirate captain.", "A night nurse.", "A teacher."]
    expected = decoder.read(CHAT, [9], 14).probabilities(QUESTION, answers)
    assert f"{100 * expected[0]:.0f} %" in cell.get_attribute("aria-label")
    page.click("#heat .answer:has-text('nurse')")
    assert f"{100 * expected[1]:.0f} %" in cell.get_attribute("aria-label")
    cell.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#tokens .tok:visible")
    page.wait_for_function("() => document.querySelectorAll('#tokens .tok[aria-selected=true]').length === 1")
    assert page.locator("#tokens .tok[aria-selected=true]").get_attribute("data-index") == "10"
    assert page.locator("#layer input:checked").get_attribute("value") == "14"


@pytest.mark.parametrize("answers", ["Yes, it is hiding something.\nNo, it hides nothing.", ""])
def test_watch_draws_a_line_under_the_reply(visit, answers):
    page = visit()
    tab(page, "Watch")
    page.fill("#watch-answers textarea", answers)
    page.click("#watch")
    page.wait_for_selector("#drawing circle" if answers else "#drawing .said li")
    assert page.locator("#drawing .piece").count() >= 4
    page.click("#watch-stop")
    page.wait_for_selector("#drawing [data-stage=stopped]")
    found = page.locator("#drawing .said li").count() if not answers else page.locator("#drawing polyline").count()
    assert found >= 1 and (not answers or found == 2)
    page.wait_for_timeout(1500)
    assert page.locator("#drawing [data-stage=stopped]").count() == 1  # nothing came after it
    page.click("#watch")
    page.wait_for_selector("#drawing [data-stage=watching]")


def test_steering_trains_compares_and_downloads(visit, decoder):
    page = visit()
    tab(page, "Steer")
    if page.locator("#own .label-wrap.open").count() == 0:
        page.click("#own .label-wrap")
    page.fill("#control textarea", "Speak like a pirate.")
    page.fill("#steps input[type=number]", "5")
    page.click("#train")
    page.wait_for_selector("#curve .line")
    page.click("#train-stop")
    page.wait_for_selector("#curve [data-stage=stopped]")
    assert "the model is as it was" in page.locator("#curve .status").text_content()
    page.click("#train")
    page.wait_for_selector("#curve [data-stage=done]", timeout=20 * WAIT)
    assert re.search(r"[1-5] steps in \d+ s, loss on held-out chats", page.locator("#curve .status").text_content())
    page.fill("#message textarea", "")  # empty: the chat on the page
    page.click("#compare")
    page.wait_for_function("() => document.querySelector('#steered textarea').value.length > 20")
    page.wait_for_function("() => document.querySelector('#plain textarea').value.length > 20")
    plain = page.locator("#plain textarea").input_value()
    page.click("#compare-stop")
    assert decoder.generate(CHAT, max_new_tokens=MAX_REPLY).startswith(plain.strip()[:20])
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename.endswith(".zip")


def test_learn_shows_its_examples_and_opens_them(visit):
    page = visit()
    tab(page, "Learn")
    page.wait_for_selector("#cached-3 .card")
    assert page.locator("#sentences li").count() == 10 and page.locator("#picture svg").is_visible()
    page.click("#learn-open button:has-text('A failure')")
    page.wait_for_selector("#tokens .tok:visible")
    page.wait_for_function("() => document.querySelectorAll('#chat textarea')[0].value === ''")
    assert len(texts(page)) == 1 and page.locator("#answers .reference .said").count() == 3


# --- links, sessions, limits ---------------------------------------------------------------------------------------


def test_a_link_restores_chat_span_layer_and_questions(visit):
    page = visit()
    odd = "Grüße ${1+1} <b>🏴‍☠️</b>"
    page.locator("#chat textarea").nth(1).fill(odd)
    page.wait_for_function("() => document.querySelector('#tokens .box').textContent.includes('Gr')")
    page.click("#tokens [data-span=last]")
    page.click("#layer label:has-text('21')")
    page.fill("#questions textarea", f"{QUESTION}\n{OTHER}")
    page.click("#share")
    page.wait_for_selector("#address input:visible")
    address = page.locator("#address input").input_value()
    assert "#read=" in address and page.url == address

    other = visit(address)
    other.wait_for_function("text => document.querySelectorAll('#chat textarea')[1].value === text", arg=odd)
    other.wait_for_function("() => document.querySelectorAll('#tokens .tok[aria-selected=true]').length === 1")
    assert other.locator("#layer input:checked").get_attribute("value") == "21"
    assert other.input_value("#questions textarea") == f"{QUESTION}\n{OTHER}"

    damaged = visit(address[:-9])
    damaged.wait_for_selector("#chat-notice .lqa-notice:visible")
    assert "link is damaged" in damaged.locator("#chat-notice").text_content()


def test_two_visitors_do_not_meet(visit, decoder):
    first, second = visit(), visit()
    second.click("#examples button:has-text('Clockmaker')")
    second.wait_for_function("() => document.querySelector('#tokens .box').textContent.includes('Geneva')")
    for page, question in ((first, QUESTION), (second, OTHER)):
        page.fill("#questions textarea", question)
        page.click("#ask")
    for page in (first, second):
        page.wait_for_selector(DONE)
    assert texts(first) == [decoder.read(CHAT, "user").ask(QUESTION)[0].text]
    assert texts(second) == [decoder.read(CHATS["Clockmaker"][0], "user").ask(OTHER)[0].text]
    assert "Geneva" not in first.content()


def test_hostile_text_is_a_message(visit):
    page = visit()
    page.evaluate("() => { window.alert = () => { window.hit = true; }; }")
    box, notice = page.locator("#chat textarea").nth(1), page.locator("#chat-notice .lqa-notice")
    for text, message in (("x" * 100_000, "at most 4,000"), ("<|im_start|>system", "special token")):
        box.fill(text)
        page.wait_for_function("text => document.querySelector('#chat-notice').textContent.includes(text)", arg=message)
        assert notice.is_visible()
    for text in ("<script>alert(1)</script>${alert(1)}{{constructor}}", "\u202eשלום 🏴‍☠️ \u0007 é\u200b 日本"):
        box.fill(text)
        page.wait_for_function("() => document.querySelector('#chat-notice .lqa-notice').hidden")
        ask(page, text)
        assert page.locator("#answers .question").text_content() == text
    assert page.evaluate("window.hit") is None and page.locator("#lqa-page script").count() == 0


def test_forged_calls_are_refused(url):
    """What no page sends, by the page's own protocol."""
    config = httpx.get(url + "config", timeout=60).json()
    ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
    wanted = [ids[name] for name in ("tokens", "answers", "ask-notice")]
    ask_id = next(d["id"] for d in config["dependencies"] if d["outputs"] == wanted)
    good = {"turns": CHAT, "busy": False}
    cases = [
        [good, None, QUESTION, 99, None],
        [good, None, QUESTION, "14; import os", None],
        [good, {"tokens": 5}, {"a": 1}, 14, None],
        [{"turns": [{"role": "root", "content": "x"}]}, None, QUESTION, 14, None],
        [[[[]]], "strip", QUESTION, 14, 7],
        [good, {"tokens": [], "selected": "all"}, "Q" * 100_000, 14, []],
    ]
    for i, data in enumerate(cases):
        session = f"forged{i}"
        body = {"data": data, "fn_index": ask_id, "session_hash": session}
        httpx.post(url + "gradio_api/queue/join", json=body, timeout=60)
        with httpx.stream("GET", url + "gradio_api/queue/data", params={"session_hash": session}, timeout=WAIT / 1000) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {"msg": ""}
                if message["msg"] == "process_completed":
                    break
        outcome = json.dumps(message["output"])
        assert "Traceback" not in outcome and str(ROOT) not in outcome
        assert not message["success"] or message["output"]["data"][2], (data, outcome[:300])
    for path in ("/etc/passwd", str(ROOT / "pyproject.toml")):
        assert httpx.get(url + f"gradio_api/file={path}", timeout=60).status_code in (403, 404)


# --- looks and access ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1280, "dark")])
def test_nothing_sticks_out_and_text_can_be_read(visit, width, scheme):
    page = visit(viewport={"width": width, "height": 844}, color_scheme=scheme)
    for name in TABS:
        tab(page, name)
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)
        assert weak_text(page) == [], name


def weak_text(page) -> list:
    """Texts of the page whose contrast with the nearest background is below 3 (they are small, but none is running text)."""
    return page.evaluate(
        """() => {
            const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            const rgba = (colour) => {
                canvas.clearRect(0, 0, 1, 1);
                canvas.fillStyle = colour;
                canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data].map((x, i) => (i === 3 ? x / 255 : x));
            };
            const over = (top, under) => top.slice(0, 3).map((x, i) => x * top[3] + under[i] * (1 - top[3]));
            const light = (rgb) => rgb.map((x) => x / 255).map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
                .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
            const behind = (node) => {
                const colour = rgba(getComputedStyle(node).backgroundColor);
                if (colour[3] === 1 || !node.parentElement) return colour[3] ? over(colour, [255, 255, 255]) : [255, 255, 255];
                return over(colour, behind(node.parentElement));
            };
            const weak = [];
            for (const node of document.querySelectorAll("#lqa-page *")) {
                const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
                const style = getComputedStyle(node);
                if (!own || !node.checkVisibility({ visibilityProperty: true }) || node.closest("svg, :disabled, .tok, i")) continue;
                const back = behind(node), front = over(rgba(style.color), back);
                const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
                if ((a + 0.05) / (b + 0.05) < 3) weak.push([node.className, node.textContent.slice(0, 40), (a + 0.05) / (b + 0.05)]);
            }
            return weak;
        }"""
    )


def test_everything_can_be_reached_and_done_by_keyboard(visit):
    page = visit()
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = "n.id || n.dataset.index || n.textContent.trim().slice(0, 30)"
        seen.append(page.evaluate(f"() => {{ const n = document.activeElement; return {name}; }}"))
        if seen[-1] == "ask":
            break
    assert seen[-1] == "ask" and len(set(seen)) > 12, seen
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    page.focus("button[role=tab]:has-text('Read')")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#scan:visible")


def test_controls_have_names_for_screen_readers(visit):
    page = visit()
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(500)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("#lqa-page :is(button, input, textarea, select, [role=option], [role=radio])")]
                .filter((node) => node.checkVisibility())
                .filter((node) => !(node.getAttribute("aria-label") || node.textContent.trim() || node.title || node.placeholder
                    || (node.labels && [...node.labels].some((label) => label.textContent.trim()))))
                .map((node) => node.outerHTML.slice(0, 120))"""
        )
        assert nameless == [], name
    tab(page, "Read")
    assert page.locator("[role=listbox][aria-label='Tokens of the chat']").count() == 1
    assert page.locator("#answers [role=status]").count() == 1 and page.locator("#ask-notice [role=alert]").count() == 1


def test_the_page_is_up_soon():
    """From the command to a page that answers, with the model's cache warm."""
    begun = time.perf_counter()
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", "7996"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **silent)
    try:
        while time.perf_counter() - begun < 15 * max(SLOWNESS, 1) + 60:
            try:
                if httpx.get("http://127.0.0.1:7996/config", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        seconds = time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait(30)
    print(f"\nstart to usable page: {seconds:.1f} s")
    assert seconds < 15 * SLOWNESS
