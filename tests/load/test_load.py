"""Load (`make test-load`): the real page with the embedded decoder, asked by many sessions at once, as browsers ask it.

LQA_LOAD_REQUESTS: how many requests memory is watched over (300); LQA_LOAD_SESSIONS: how many sessions ask at once (24).
"""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
SESSIONS = int(os.environ.get("LQA_LOAD_SESSIONS", "24"))
REQUESTS = int(os.environ.get("LQA_LOAD_REQUESTS", "300"))
LONG = httpx.Timeout(3600, connect=60)
TOPICS = "dinner|chess|a train|a puppy|the garden|a letter|my desk|a song|the weather|a cake|running|paint".split("|")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = open(tmp_path_factory.mktemp("log") / "app.log", "w")
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", "7997"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
    url = "http://127.0.0.1:7997"
    for _ in range(600):
        try:
            if httpx.get(url + "/config", timeout=5).status_code == 200:
                break
        except httpx.HTTPError:
            assert process.poll() is None, "app.py has ended"
            time.sleep(0.5)
    yield url, process.pid
    process.terminate()
    process.wait(30)


class Session:
    """A browser's session: it joins the queue and listens to its stream, by the protocol of Gradio's own page."""

    def __init__(self, url: str):
        self.url, self.hash = url, uuid.uuid4().hex
        config = httpx.get(url + "/config", timeout=LONG).json()
        ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
        wanted = [ids[name] for name in ("tokens", "answers", "ask-notice")]
        self.ask_id = next(d["id"] for d in config["dependencies"] if d["outputs"] == wanted)

    def join(self, i: int) -> None:
        chat = {"turns": [{"role": "user", "content": f"Tell me something about {TOPICS[i % len(TOPICS)]}, number {i}."}], "busy": False}
        data = [chat, None, "Who is the assistant pretending to be?", 14, None]
        body = {"data": data, "fn_index": self.ask_id, "session_hash": self.hash}
        httpx.post(self.url + "/gradio_api/queue/join", json=body, timeout=LONG).raise_for_status()

    def messages(self):
        with httpx.stream("GET", self.url + "/gradio_api/queue/data", params={"session_hash": self.hash}, timeout=LONG) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def ask(self, i: int) -> dict:
        """The answers view at the end."""
        self.join(i)
        for message in self.messages():
            if message["msg"] == "process_completed":
                assert message["success"], message
                return message["output"]["data"][1]
        raise AssertionError("the stream ended without an answer")


def text(view: dict) -> list:
    (item,) = view["items"]
    return [item["text"], item["references"]]


def memory(pid: int) -> float:
    """MB of resident memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def test_many_sessions_get_the_serial_answers_and_the_page_stays_responsive(server):
    url, _ = server
    serial = [text(Session(url).ask(i)) for i in range(SESSIONS)]
    results: list = [None] * SESSIONS
    threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, text(Session(url).ask(i)))) for i in range(SESSIONS)]
    for thread in threads:
        thread.start()
    waits = []
    while any(thread.is_alive() for thread in threads):
        begun = time.perf_counter()
        assert httpx.get(url, timeout=60).status_code == 200
        waits.append(time.perf_counter() - begun)
        time.sleep(1)
    assert results == serial
    print(f"\npage under load: {len(waits)} loads, median {sorted(waits)[len(waits) // 2]:.2f} s, longest {max(waits):.2f} s")
    assert sorted(waits)[len(waits) // 2] < 2


def test_a_session_that_disappears_frees_its_place(server):
    url, _ = server
    begun = time.perf_counter()
    alone = text(Session(url).ask(1))
    once = time.perf_counter() - begun
    gone = [Session(url) for _ in range(8)]
    for i, session in enumerate(gone):
        session.join(i)
    for session in gone[:2]:  # two are served at once: these leave in the middle of their answer, the others while they wait
        for message in session.messages():
            if message["msg"] == "process_generating":
                break
    for session in gone[2:]:
        next(session.messages())
    begun = time.perf_counter()
    assert text(Session(url).ask(1)) == alone
    assert time.perf_counter() - begun < 4 * once + 5  # eight whole answers would take eight times as long


def test_memory_stays_flat(server):
    url, pid = server
    for i in range(min(20, REQUESTS)):
        Session(url).ask(i)
    begun = memory(pid)
    for i in range(REQUESTS):
        Session(url).ask(i)
    ended = memory(pid)
    print(f"\nresident memory: {begun:.0f} MB, after {REQUESTS} requests {ended:.0f} MB")
    assert ended < begun + 100
