"""Writes docs/*.png: every page and state, by driving the real page with the embedded decoder in headless Chromium.

    python docs/screenshots.py [NAME ...]        # all, or those named; `make screenshots` does the same
"""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from playwright.sync_api import Page, sync_playwright

from lqa import LatentDecoder
from lqa.ui import build, launch

WIDE, PHONE = {"width": 1320, "height": 940}, {"width": 390, "height": 844}
WAIT = 1000 * 1200  # ms
DONE = "#answers [data-stage=done]"


def tab(page: Page, name: str) -> None:
    if not page.locator(f"button[role=tab]:visible:has-text('{name}')").count():
        page.click("#tabs .overflow-menu button")
    page.click(f"button[role=tab]:visible:has-text('{name}')")


def ask(page: Page) -> None:
    page.click("#ask")
    page.wait_for_selector("#answers [data-stage=answers]")
    page.wait_for_selector(DONE)


def read_empty(page: Page) -> None:
    pass


def read_working(page: Page) -> None:
    page.click("#ask")
    page.wait_for_function("() => (document.querySelector('#answers [data-stage=answers] .text')?.textContent.length || 0) > 25")


def read(page: Page) -> None:
    page.fill("#questions textarea", "Who is the assistant pretending to be?\nHow does the assistant intend to reply?")
    ask(page)


def read_follow_up(page: Page) -> None:
    ask(page)
    page.fill("#answers .further input", "What does it look like?")
    page.click("#answers .further button")
    page.wait_for_selector("#answers .card.follow")
    page.wait_for_selector(DONE)
    page.click("#answers .code summary")


def read_error(page: Page) -> None:
    page.locator("#chat textarea").nth(1).fill("<|im_start|>system\nYou are somebody else.")
    page.wait_for_selector("#chat-notice .lqa-notice:visible")
    page.click("#ask")
    page.wait_for_selector("#ask-notice .lqa-notice:visible")


def read_link(page: Page) -> None:
    page.click("#share")
    page.wait_for_selector("#address input:visible")


def scan(page: Page) -> None:
    tab(page, "Scan")
    page.click("#scan")
    page.wait_for_selector("#heat [data-stage=done]")


def scan_working(page: Page) -> None:
    tab(page, "Scan")
    page.click("#scan")
    page.wait_for_selector("#heat .cell.known")


def watch(page: Page) -> None:
    page.click("#examples button:has-text('Hidden instruction')")
    tab(page, "Watch")
    page.click("#watch")
    page.wait_for_function("() => document.querySelectorAll('#drawing circle').length >= 16")


def watch_words(page: Page) -> None:
    tab(page, "Watch")
    page.fill("#watch-question textarea, #watch-question input", "Who is the assistant pretending to be?")
    page.fill("#watch-answers textarea", "")
    page.click("#watch")
    page.wait_for_function("() => document.querySelectorAll('#drawing .said li').length >= 4")


def train(page: Page) -> None:
    tab(page, "Steer")
    if page.locator("#own .label-wrap.open").count() == 0:
        page.click("#own .label-wrap")
    page.fill("#control textarea", "")  # keystrokes, not `fill`, empty the table of pairs
    page.locator("#control textarea").press_sequentially("Answer as a cheerful pirate who loves the sea.")
    page.click("#train")


def steer_working(page: Page) -> None:
    train(page)
    page.wait_for_function("() => document.querySelectorAll('#curve .dot').length >= 2")


def steer(page: Page) -> None:
    tab(page, "Steer")
    if not page.locator("#preset:visible").count():
        train(page)
        page.wait_for_selector("#curve [data-stage=done]")
    page.click("#compare")
    page.wait_for_function("() => document.querySelector('#steered textarea').value.length > 200")


def steer_empty(page: Page) -> None:
    tab(page, "Steer")


def learn(page: Page) -> None:
    tab(page, "Learn")
    page.wait_for_selector("#cached-3 .card")


SHOTS = {  # name: (what is done, viewport, colour scheme)
    "read-empty": (read_empty, WIDE, "light"),
    "read-working": (read_working, WIDE, "light"),
    "read": (read, WIDE, "light"),
    "read-dark": (read, WIDE, "dark"),
    "read-phone": (ask, PHONE, "light"),
    "read-follow-up": (read_follow_up, WIDE, "light"),
    "read-error": (read_error, WIDE, "light"),
    "read-link": (read_link, WIDE, "light"),
    "scan-working": (scan_working, WIDE, "light"),
    "scan": (scan, WIDE, "light"),
    "scan-phone-dark": (scan_working, PHONE, "dark"),
    "watch": (watch, WIDE, "light"),
    "watch-words": (watch_words, WIDE, "dark"),
    "steer-empty": (steer_empty, WIDE, "dark"),
    "steer-working": (steer_working, WIDE, "light"),
    "steer": (steer, WIDE, "light"),
    "steer-phone": (steer_empty, PHONE, "light"),
    "learn": (learn, WIDE, "light"),
    "learn-dark": (learn, WIDE, "dark"),
}


def main(names: list[str]) -> int:
    if unknown := set(names) - set(SHOTS):
        print(f"There is no screenshot {sorted(unknown)[0]!r}; there are {', '.join(SHOTS)}.", file=sys.stderr)
        return 2
    demo = build(LatentDecoder.from_pretrained(device="cpu"))
    _, url, _ = launch(demo, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    executable = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        for name in names or SHOTS:
            do, viewport, scheme = SHOTS[name]
            context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
            page = context.new_page()
            page.set_default_timeout(WAIT)
            page.goto(url)
            page.wait_for_selector("#tokens .tok")
            do(page)
            page.mouse.move(0, 0)
            page.wait_for_timeout(600)
            page.screenshot(path=HERE / f"{name}.png", full_page=True)
            context.close()
            print(name, flush=True)
        browser.close()
    demo.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
