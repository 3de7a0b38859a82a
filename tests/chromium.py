"""The running page in headless Chromium, for tests/test_app.py and tests/browser.

LQA_TEST_SLOWNESS: by what all limits on time are multiplied (1: two idle cores).
"""

import os
import shutil
from urllib.parse import urlparse

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SLOWNESS = float(os.environ.get("LQA_TEST_SLOWNESS", "1"))
WAIT = 60_000 * SLOWNESS  # ms that a result may take
DONE = "#answers [data-stage=done]"
TABS = ("Read", "Scan", "Watch", "Steer", "Learn")


@pytest.fixture(scope="module")
def url(decoder):
    """The address of the page over the module's `decoder`."""
    from lqa.ui import build, launch

    demo = build(decoder)
    _, address, _ = launch(demo, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield address
    demo.close()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url):
    """visit(address="", **context options): a visitor's page.  Afterwards: no other host was asked for anything, no script has failed."""
    contexts, hosts, errors = [], set(), []

    def visit(address="", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, "permissions": ["clipboard-read"]} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address or url)
        page.wait_for_selector("#tokens .tok")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert hosts <= {"127.0.0.1", "localhost", None} and not errors


def tab(page, name):
    """Opens a tab; on a phone it may stand in the menu."""
    if not page.locator(f"button[role=tab]:visible:has-text('{name}')").count():
        page.click("#tabs .overflow-menu button")
    page.click(f"button[role=tab]:visible:has-text('{name}')")
