"""The generator against real servers on loopback: one that writes well, one that misbehaves, one that runs the embedded model.  What was
answered is neither lost nor asked for again, whatever happens: kill, interrupt, full disk, refused access."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from lqa.cli import main
from lqa.corpus import generate, load_controls
from lqa.corpus.generate import Fault, assemble, partnered, read_expansion, read_probe, read_reply, read_seed, read_verdict, shares, spent
from lqa.corpus.schema import check, parse_control, read_controls
from lqa.errors import LqaError
from lqa.journal import RESERVE, Journal

KEY = "sk-only-for-this-test"
STIMULI = ["What is a good way to learn cooking?", "Tell me how a fridge works, please."]
QA = [
    {"type": "description", "q": "What does the assistant hold dear?", "a": "Small places far from any main road."},
    {"type": "description", "q": "Which century does its taste belong to?", "a": "The nineteenth, more or less."},
    {"type": "reasoning", "q": "How would it greet a stranger?", "a": "With an invitation to walk the streets."},
    {"type": "reasoning", "q": "What would it never recommend?", "a": "A large airport hotel."},
]


def entry(ident: str, improved: bool = False) -> dict:
    """A good entry that hangs on its id alone."""
    words = [chr(97 + b % 26) for b in hashlib.sha256(ident.encode()).digest()[:24]]
    a, b, c = ("".join(words[i : i + 8]) for i in (0, 8, 16))
    return {
        "id": ident,
        "control": f"Praise the {a} {b} of the old {c} town in every reply{', with improved care' if improved else ''}.",
        "acknowledgement": "Gladly, that town deserves it.",
        "stimuli": STIMULI,
        "descriptions": [f"The assistant praises the {a} of a town.", f"It is full of admiration for {b} and {c}."],
        "short": f"praising {a}",
        "qa": QA,
        "contrast": [],
    }


def seed_entries(category: str) -> list[dict]:
    ids = [f"{category}-{name}" for name in ("first", "second", "third")]
    return [{**entry(i), "contrast": [other for other in ids if other != i]} for i in ids]


def chance(*parts) -> int:
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:8], 16)


def write(prompt: str) -> str:
    """What a diligent author replies to one of the generator's prompts.  The judge wants one version in six improved, and no version of
    one in fourteen."""
    if prompt.startswith("Invent"):
        details = [f"{chance(prompt, i):x}-{i}" for i in range(4)]
        return json.dumps({"controls": [{"detail": d, "idea": f"It praises the town of {d}."} for d in details]})
    if found := re.match(r"Write out the control (\S+)\.", prompt):
        full = entry(found[1], "An earlier version was rejected" in prompt)
        return json.dumps({k: full[k] for k in ("control", "acknowledgement", "stimuli", "descriptions", "short")})
    if prompt.startswith("Write questions"):
        return json.dumps({"qa": QA})
    judged = json.loads(prompt.splitlines()[1])
    wrong = chance(judged["id"]) % 14 == 0 or (chance(judged["id"]) % 6 == 0 and "improved" not in judged["control"])
    verdict = {name: True for name in generate.VERDICTS} | {"specific": not wrong}
    return json.dumps({**verdict, "reason": "Say more of the town." if wrong else "Fine."})


def asked(body: dict) -> str:
    """The prompt in a request, without the preface."""
    return body["messages"][0]["content"].split("\n\n", 1)[1]


class Author(ThreadingHTTPServer):
    """An OpenAI-compatible server.  `twist(body, tries)` may return (status, headers, bytes) or an action name in place of the good reply;
    `tries` is how often this very body came before.  `log` has [body, sent a whole reply?] in the order of arrival."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, twist=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.twist, self.log, self.tries = twist or (lambda body, tries: None), [], Counter()
        self.lock, self.hold_from, self.released = threading.Lock(), None, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def answered(self) -> list[str]:
        with self.lock:
            return [key for key, done in self.log if done]

    def await_requests(self, n: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.log) < n:
            assert time.monotonic() < deadline, f"only {len(self.log)} requests came"
            time.sleep(0.005)

    def handle_error(self, request, client_address):  # a killed client is no news
        pass


def completion(text: str, finish: str = "stop", **message) -> bytes:
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return json.dumps({"id": "x", "object": "chat.completion", "model": "served-name", "choices": [choice], "usage": usage}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server: Author = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps(body, sort_keys=True)
        with server.lock:
            tries = server.tries[key]
            server.tries[key] += 1
            record = [key, False]
            server.log.append(record)
            held = server.hold_from is not None and len(server.log) >= server.hold_from
        if held:
            server.released.wait(120)
        answer = server.twist(body, tries)
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            answer = (401, {}, b'{"error": {"message": "no such key"}}')
        if answer == "silence":
            server.released.wait(60)
            self.close_connection = True
            return
        if answer == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
            return
        status, headers, data = answer or (200, {}, completion(write(asked(body))))
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        with server.lock:
            record[1] = status == 200
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def author():
    """author(twist=None): a server, shut down behind the test."""
    servers = []

    def start(twist=None) -> Author:
        servers.append(Author(twist))
        return servers[-1]

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("seeds") / "seeds.yaml"
    path.write_text(yaml.safe_dump(seed_entries("goal-towns") + seed_entries("scenario-towns")))
    return str(path)


def argv(server, out, seeds, *more) -> list[str]:
    url = server if isinstance(server, str) else server.url
    flags = {"--endpoint": url, "--model": "author", "--out": str(out), "--seeds": seeds, "--controls": "24", "--concurrency": "4"}
    given = [w for name, value in flags.items() if name not in more and value for w in (name, value)]
    return ["data", "generate", *given, *more]


def run(capsys, *args) -> dict:
    assert main([*argv(*args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, *args) -> str:
    capsys.readouterr()
    assert main(argv(*args)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1, captured
    return captured.err.strip()


def start(*args, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "lqa", *argv(*args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def journalled(out) -> list[dict]:
    """The whole lines of a journal without its head."""
    data = Path(out, "calls.jsonl").read_bytes() if Path(out, "calls.jsonl").exists() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()][1:]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, seeds):
    """(bytes of controls.yaml, provenance, requests) of an undisturbed run against a server that writes well."""
    server, out = Author(), tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        assert main(argv(server, out, seeds, "--price", "2", "30")) == 0
    server.shutdown()
    return (out / "controls.yaml").read_bytes(), json.loads((out / "provenance.json").read_text()), server.answered


# --- a whole run ------------------------------------------------------------------------------------------------


def test_a_run_writes_controls_that_keep_the_corpus_s_rules_and_says_where_they_come_from(capsys, author, seeds, tmp_path):
    server = author()
    out = run(capsys, server, tmp_path / "new", seeds, "--price", "2", "30", "--judge-model", "umpire", "--request", '{"temperature": 0.5}')
    controls = read_controls([tmp_path / "new" / "controls.yaml"])
    assert check(controls) == [] and len(controls) == out["controls"] >= 18  # six sets of four, of which at least three each
    assert Counter(f"{c.kind}-{c.category}" for c in controls) == out["categories"]
    assert set(out["categories"]) == {"goal-towns", "scenario-towns"}
    assert all(2 <= len(c.contrast) <= 3 for c in controls)

    lines, bodies = journalled(tmp_path / "new"), [json.loads(body) for body in server.answered]
    assert len(lines) == len(bodies) == out["calls"] == out["paid_now"]
    assert {b["model"] for b in bodies} == {"author", "umpire"} and all(b["temperature"] == 0.5 for b in bodies)
    assert {line["step"] for line in lines} == {"seed", "expand", "probe", "judge"} and {line["model"] for line in lines} == {"served-name"}
    assert out["tokens"] == {"prompt": 100 * len(bodies), "completion": 10 * len(bodies)} and out["calls_without_usage"] == 0
    assert out["cost_usd"] == pytest.approx(len(bodies) * (100 * 2 + 10 * 30) / 1e6)
    steps = Counter(line["step"] for line in lines)
    assert {step: counts["accepted"] for step, counts in out["replies"].items()} == steps
    assert out["rejected"] > 0 and out["failures"] == {}
    provenance = json.loads((tmp_path / "new" / "provenance.json").read_text())
    assert provenance.items() <= out.items() and provenance["model"] == "author" and provenance["judge_model"] == "umpire"
    assert provenance["served_models"] == ["served-name"] and provenance["started"] <= provenance["finished"]
    everything = "".join(p.read_text() for p in (tmp_path / "new").iterdir())
    assert KEY not in everything and sorted(p.name for p in (tmp_path / "new").iterdir() if not p.name.endswith(".lock")) == [
        "calls.jsonl",
        "controls.yaml",
        "provenance.json",
    ]


def test_rejected_versions_are_written_again_with_the_judge_s_reason(reference):
    data, provenance, answered = reference
    prompts = [asked(json.loads(body)) for body in answered]
    second = [p for p in prompts if p.startswith("Write out") and "rejected, for this reason: not specific: Say more of the town." in p]
    entries = yaml.safe_load(data)
    improved = [e for e in entries if "improved" in e["control"]]
    assert improved and all(chance(e["id"]) % 6 == 0 for e in improved) and len(second) >= len(improved)
    assert not [e for e in entries if chance(e["id"]) % 14 == 0]
    judged = provenance["replies"]["judge"]["accepted"]
    assert judged == provenance["rejected"] + sum(1 for p in prompts if p.startswith("Judge") and json.loads(write(p))["specific"])


def test_the_same_command_again_pays_nothing_and_more_controls_continue(capsys, author, seeds, tmp_path):
    server = author()
    first = run(capsys, server, tmp_path, seeds, "--controls", "8")
    before = (tmp_path / "controls.yaml").read_bytes()
    n = len(server.log)
    again = run(capsys, server, tmp_path, seeds, "--controls", "8")
    assert len(server.log) == n and (tmp_path / "controls.yaml").read_bytes() == before
    assert again == first | {"paid_now": 0}
    more = run(capsys, server, tmp_path, seeds)
    assert max(server.tries.values()) == 1 and more["paid_now"] == len(server.log) - n
    assert {e["id"] for e in yaml.safe_load(before)} <= {e["id"] for e in yaml.safe_load((tmp_path / "controls.yaml").read_text())}


def test_order_of_arrival_does_not_matter(author, seeds, tmp_path, reference):
    server = author(lambda body, tries: time.sleep(random.random() / 50))
    assert main(argv(server, tmp_path, seeds, "--concurrency", "16")) == 0
    assert (tmp_path / "controls.yaml").read_bytes() == reference[0]


def test_the_authored_corpus_serves_as_seeds_and_its_ids_are_taken(author, tmp_path):
    server = author()
    assert main(argv(server, tmp_path, None, "--controls", "4", "--category", "persona-job")) == 0
    authored = [c for c in load_controls() if c.id.startswith("persona-job-")]
    invent = asked(json.loads(server.answered[0]))
    taken = invent[invent.index("Taken;") :]
    assert all(c.id.removeprefix("persona-job-") in taken for c in authored[-generate.TAKEN :])
    assert sum(c.descriptions[0] in invent for c in authored) == 6
    assert all(e["id"].startswith("persona-job-") for e in yaml.safe_load((tmp_path / "controls.yaml").read_text()))


# --- endpoints that misbehave -----------------------------------------------------------------------------------


def test_whatever_passes_is_retried_and_the_set_is_the_same(capsys, author, seeds, tmp_path, reference):
    tricks = {
        0: (429, {"Retry-After": "0"}, b'{"error": {"message": "slow down"}}'),
        1: (500, {"Retry-After": "0"}, b"<html>oops</html>"),
        2: (503, {"Retry-After": formatdate(time.time() - 5, usegmt=True)}, b""),
        3: (200, {}, completion("cut off")[:-20]),
        4: (200, {}, b'{"error": "upstream"}'),
        5: (200, {}, b'{"choices": []}'),
        6: "cut",
    }
    injected = Counter()
    names = {0: "429", 1: "500", 2: "503", 3: "broken", 4: "broken", 5: "broken", 6: "disconnected"}

    def twist(body, tries):
        which = chance(json.dumps(body, sort_keys=True), tries) % 24
        if tries < 3 and which in tricks:
            injected[names[which]] += 1
            return tricks[which]

    server = author(twist)
    out = run(capsys, server, tmp_path, seeds, "--retries", "3")
    assert set(injected) == set(names.values())
    assert out["failures"] == dict(injected) and out["calls"] == len(journalled(tmp_path))
    assert (tmp_path / "controls.yaml").read_bytes() == reference[0]
    assert out["replies"] == reference[1]["replies"]


def test_a_silent_endpoint_is_asked_again(capsys, author, seeds, tmp_path):
    server = author(lambda body, tries: "silence" if asked(body).startswith("Invent") and not tries else None)
    out = run(capsys, server, tmp_path, seeds, "--controls", "4", "--timeout", "3")
    assert out["failures"] == {"timeout": 1} and out["controls"] >= 3


def test_retry_after_holds_back_all_requests(author, seeds, tmp_path):
    starts = []

    def twist(body, tries):
        starts.append(time.monotonic())
        if len(starts) == 1:
            return 429, {"Retry-After": "2"}, b""

    assert main(argv(author(twist), tmp_path, seeds, "--controls", "4", "--concurrency", "1")) == 0
    assert starts[1] - starts[0] >= 2


def test_rpm_spaces_the_requests(author, seeds, tmp_path):
    starts = []
    server = author(lambda body, tries: starts.append(time.monotonic()))
    assert main(argv(server, tmp_path, seeds, "--controls", "4", "--category", "goal-towns", "--rpm", "1200")) == 0
    assert len(starts) >= 13 and starts[-1] - starts[0] >= 0.05 * (len(starts) - 1) - 0.03


def test_replies_that_cannot_be_used_are_counted_and_redone(capsys, author, seeds, tmp_path):
    """Every expand, probe and seed reply is bad at first, each in one of these ways; the second is good."""
    good, bad = {}, Counter()

    def text(prompt, which):
        reply = json.loads(write(prompt))
        if prompt.startswith("Invent"):
            reply["controls"][0]["detail"] = ["second", "Not A Slug"][which % 2]
            return json.dumps(reply), ["repeated", "malformed"][which % 2], "stop", {}
        if prompt.startswith("Judge"):
            return write(prompt), None, "stop", {}
        leaky = {**reply}
        if "stimuli" in reply:
            leaky["stimuli"] = [reply["control"].replace("Praise", "Who can praise"), STIMULI[0]]
        else:
            shown = json.loads(prompt.splitlines()[1])
            leaky["qa"] = [{**QA[0], "q": shown["control"][:-1] + "?"}, *QA[1:]]
        return [
            (json.dumps(leaky), "leaking", "stop", {}),
            ("I'm sorry, but I can\u2019t help with that.", "refused", "stop", {}),
            ("", "refused", "stop", {"refusal": "No."}),
            ("Sure \ud83d! Here it is:", "malformed", "stop", {}),
            (write(prompt)[:-30], "malformed", "length", {}),
            (json.dumps({**reply, "remark": "\ud83d"}), "malformed", "stop", {}),
            ("```json\n" + write(prompt) + "\n```", None, "stop", {}),
            ("<think>{not this}</think> Here: " + write(prompt), None, "stop", {}),
        ][which]

    def twist(body, tries):
        prompt = asked(body)
        if len(body["messages"]) > 1 or tries:
            good[prompt] = len(body["messages"])
            return None
        reply, fault, finish, message = text(prompt, chance(prompt) % 8)
        step = {"Invent": "seed", "Write out": "expand", "Write questions": "probe", "Judge": "judge"}[
            next(s for s in ("Invent", "Write out", "Write questions", "Judge") if prompt.startswith(s))
        ]
        if fault:
            bad[step, fault] += 1
        return 200, {}, completion(reply, finish, **message)

    out = run(capsys, author(twist), tmp_path, seeds, "--controls", "48")
    assert {name for _, name in bad} == set(generate.FAULTS)
    assert {(s, name): n for s, counts in out["replies"].items() for name, n in counts.items() if n and name != "accepted"} == dict(bad)
    assert sum(n for counts in out["replies"].values() for n in counts.values()) == out["calls"] == len(journalled(tmp_path))
    assert set(good.values()) == {1, 3}  # asked afresh after a refusal, else with the bad reply and what was wrong with it
    assert check(read_controls([tmp_path / "controls.yaml"])) == [] and out["controls"] >= 36


def test_a_control_is_given_up_after_the_attempts_and_its_set_replaced_if_too_few_are_left(capsys, author, seeds, tmp_path):
    lost = []

    def twist(body, tries):
        prompt = asked(body)
        if prompt.startswith("Invent") and not lost:
            lost.extend(f"goal-towns-{c['detail']}" for c in json.loads(write(prompt))["controls"][:2])
        if any(prompt.startswith(f"Write out the control {i}.") for i in lost):
            return 200, {}, completion("no")

    out = run(capsys, author(twist), tmp_path, seeds, "--controls", "4", "--category", "goal-towns", "--attempts", "2")
    assert out["replies"]["expand"]["malformed"] == 4 and out["given_up"] >= 2 and out["incomplete_sets"] >= 1
    assert out["replies"]["seed"]["accepted"] == 1 + out["incomplete_sets"] and 3 <= out["controls"] <= 4
    made = {c.id for c in read_controls([tmp_path / "controls.yaml"])}
    first = {e["about"].rsplit("/", 1)[0] for e in journalled(tmp_path) if e["step"] == "expand"}
    assert len(lost) == 2 and set(lost) <= first and not made & set(lost)


def test_a_model_that_never_makes_sense_is_one_sentence_and_the_count_stands_in_the_provenance(capsys, author, seeds, tmp_path):
    server = author(lambda body, tries: (200, {}, completion("Once upon a time")))
    message = fails(capsys, server, tmp_path, seeds, "--controls", "4", "--attempts", "2")
    assert "8 were malformed" in message and "--model" in message
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["controls"] == 0 and provenance["calls"] == 8 and provenance["replies"]["seed"]["malformed"] == 8


# --- kills ------------------------------------------------------------------------------------------------------


def finish(server, out, seeds, reference, before: list[str], kept: int) -> None:
    """Goes on in this process: nothing of `before` is asked again, the result is the undisturbed run's."""
    server.hold_from = None
    server.released.set()
    n = len(server.log)
    assert len(journalled(out)) == kept
    assert main(argv(server, out, seeds)) == 0
    with server.lock:
        later = [key for key, _ in server.log[n:]]
    assert not set(before) & set(later) and len(set(later)) == len(later)
    assert (out / "controls.yaml").read_bytes() == reference[0]
    assert len(journalled(out)) == kept + len(later) == reference[1]["calls"]


@pytest.mark.parametrize("moment", ["the seeds", "the middle", "the end"])
def test_a_killed_run_goes_on_without_repeating_an_answered_call(author, seeds, tmp_path, reference, moment):
    server = author()
    total = reference[1]["calls"]
    server.hold_from = {"the seeds": 2, "the middle": total // 2, "the end": total}[moment]  # this and all later ones get no answer
    process = start(server, tmp_path, seeds)
    server.await_requests(server.hold_from)
    deadline = time.monotonic() + 60
    while len(journalled(tmp_path)) < server.hold_from - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = server.answered
    assert len(before) == server.hold_from - 1 and not (tmp_path / "controls.yaml").exists()
    finish(server, tmp_path, seeds, reference, before, len(before))


def test_killed_again_and_again_at_random_moments(author, seeds, tmp_path, reference):
    """No waiting for the journal here: only calls that it has not got may be repeated, at most as many as were under way."""
    server = author(lambda body, tries: time.sleep(0.005))
    total, draw, seen = reference[1]["calls"], random.Random(3), 0
    for i in range(3):
        seen = draw.randint(seen + 1, seen + total // 3)
        process = start(server, tmp_path, seeds)
        server.await_requests(len(server.log) + seen - len(journalled(tmp_path)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen = len(journalled(tmp_path))
        assert seen < total and not (tmp_path / "controls.yaml").exists(), i
    time.sleep(0.1)
    assert main(argv(server, tmp_path, seeds)) == 0
    assert (tmp_path / "controls.yaml").read_bytes() == reference[0] and len(journalled(tmp_path)) == total
    assert len(server.log) - total <= 3 * 4 and max(server.tries.values()) <= 4


def test_ctrl_c_waits_for_the_calls_under_way(author, seeds, tmp_path, reference):
    server = author()
    server.hold_from = 10
    process = start(server, tmp_path, seeds)
    server.await_requests(10)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    server.released.set()
    out, err = process.communicate(timeout=60)
    n = len(server.log)
    assert process.returncode == 2 and out == "" and len(err.strip().splitlines()) == 1
    assert err.startswith("Interrupted; the ") and f"the {n} finished calls are kept" in err
    finish(server, tmp_path, seeds, reference, server.answered, n)


def test_two_runs_do_not_share_a_folder(capsys, author, seeds, tmp_path):
    with Journal(tmp_path / "calls.jsonl", {}):
        assert "Another process" in fails(capsys, "http://127.0.0.1:9/v1", tmp_path, seeds)


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.fixture
def closed() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/v1"


def test_an_endpoint_that_is_down(capsys, closed, seeds, tmp_path):
    message = fails(capsys, closed, tmp_path, seeds)
    assert closed in message and "cannot be reached" in message and "--endpoint" in message and "kept" not in message


def test_an_endpoint_that_goes_down_loses_nothing(capsys, author, seeds, tmp_path, reference):
    server = author(lambda body, tries: (503, {"Retry-After": "0"}, b"") if len(server.log) > 30 else None)
    message = fails(capsys, server, tmp_path, seeds, "--retries", "1")
    n = len(server.answered)
    assert "failed 2 times in a row (503 2" in message and f"the {n} finished calls are kept in {tmp_path}" in message
    before, server.twist = server.answered, lambda body, tries: None
    finish(server, tmp_path, seeds, reference, before, n)


def test_keys(capsys, author, seeds, tmp_path, monkeypatch):
    server = author()
    monkeypatch.setenv("OTHER_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert "check the key in OPENAI_API_KEY" in fails(capsys, server, tmp_path, seeds)
    monkeypatch.delenv("OPENAI_API_KEY")
    message = fails(capsys, server, tmp_path, seeds)
    assert "401: no such key" in message and "put a key into the environment variable OPENAI_API_KEY" in message
    assert "LOST_KEY" in fails(capsys, server, tmp_path, seeds, "--key-env", "LOST_KEY")
    assert main(argv(server, tmp_path, seeds, "--key-env", "OTHER_KEY", "--controls", "4")) == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, {}, b'{"error": {"message": "The model `author` does not exist"}}'), "knows no such model or path (404: The model `author`"),
        ((400, {}, b'{"error": {"message": "temperature too high"}}'), "rejected a request (400: temperature too high)"),
        ((422, {}, b'{"detail": "Unsupported fields"}'), "422: Unsupported fields"),
        ((429, {}, b'{"error": {"code": "insufficient_quota", "message": "You exceeded your quota"}}'), "no quota left"),
        ((429, {"Retry-After": "7200"}, b"{}"), "asks to wait 120 minutes"),
    ],
)
def test_what_no_retry_mends_is_one_sentence_at_once(capsys, author, seeds, tmp_path, answer, words):
    server = author(lambda body, tries: answer)
    assert words in fails(capsys, server, tmp_path, seeds)
    assert max(server.tries.values()) == 1


def test_a_provider_s_content_filter_is_a_refusal(capsys, author, seeds, tmp_path):
    reply = (400, {}, b'{"error": {"code": "content_filter", "message": "filtered"}}')
    out = run(capsys, author(lambda body, tries: None if tries else reply), tmp_path, seeds, "--controls", "4", "--category", "goal-towns")
    assert out["replies"]["seed"]["refused"] == out["replies"]["seed"]["accepted"] >= 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- [", "not readable as YAML"),
        ("a: 1", "expected a YAML list"),
        ("- {id: goal-towns-first}", "'qa' is missing"),
        ("- {id: goal-towns-first, qa: 7}", "cannot be used"),
        ("[]", "hold no control"),
        (yaml.safe_dump([{**seed_entries("goal-towns")[0], "short": "far too many words for a short"}]), "short has 7 words"),
        (yaml.safe_dump([{**seed_entries("goal-towns")[0], "id": "mood-towns-first"}]), "kind one of goal"),
    ],
)
def test_malformed_seeds(capsys, closed, tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    message = fails(capsys, closed, tmp_path / "out", str(file))
    assert words in message and ("mine.yaml" in message or text == "[]") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seeds", "not-there.yaml"], "not-there.yaml"),
        (["--category", "goal-villages"], "no category 'goal-villages'; they have goal-towns, scenario-towns"),
        (["--controls", "0"], "--controls must be at least 1, not 0"),
        (["--concurrency", "0"], "--concurrency must be at least 1"),
        (["--attempts", "0"], "--attempts must be at least 1"),
        (["--rpm", "0"], "--rpm must be greater than 0"),
        (["--timeout", "-1"], "--timeout must be greater than 0"),
        (["--request", "{temperature: 1}"], "--request is not JSON"),
        (["--request", '{"model": "x"}'], "without model"),
        (["--endpoint", "localhost:8000/v1"], "https://host/v1"),
        (["--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_bad_flags(capsys, closed, seeds, tmp_path, flags, words):
    assert words in fails(capsys, closed, tmp_path, seeds, *flags)


def test_other_settings_are_refused_in_the_same_folder(capsys, author, seeds, tmp_path):
    server = author()
    run(capsys, server, tmp_path, seeds, "--controls", "4")
    n = len(server.log)
    flags = ["--model", "poet", "--judge-model", "author"]
    assert "was begun with model 'author', not 'poet'" in fails(capsys, server, tmp_path, seeds, *flags)
    assert "was begun with request {}" in fails(capsys, server, tmp_path, seeds, "--request", '{"temperature": 0}')
    assert len(server.log) == n


# --- the disk ---------------------------------------------------------------------------------------------------


def small_disk(folder: Path, size: int) -> str:
    """The command that puts a file system of `size` bytes on `folder`, in a shell with mounts of its own; without that, a skip."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs {folder}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    return mount


def test_a_full_disk_loses_no_paid_call(author, seeds, tmp_path, reference):
    """On a small file system of its own: what is under way when the disk is full goes into the reserve, and the run goes on elsewhere."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    mount = small_disk(disk, RESERVE * 4 + 40 * 1024)
    server = author()
    command = " ".join(f"'{w}'" for w in [sys.executable, "-m", "lqa", *argv(server, disk, seeds)])
    script = f"{mount} && {command}; code=$?; cp -r {disk} {kept}; exit $code"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    n = len(server.answered)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "No space left on device" in done.stderr and "free some space" in done.stderr
    assert f"the {n} finished calls are kept" in done.stderr and 10 < n < reference[1]["calls"]
    finish(server, kept, seeds, reference, server.answered, n)


def test_a_disk_that_is_full_from_the_start_costs_nothing(author, seeds, tmp_path):
    disk = tmp_path / "disk"
    mount = small_disk(disk, RESERVE)
    server = author()
    command = " ".join(f"'{w}'" for w in [sys.executable, "-m", "lqa", *argv(server, disk, seeds)])
    done = subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount} && {command}"], capture_output=True, text=True)
    assert done.returncode == 2 and "No space left on device" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert server.log == []


def test_a_journal_drops_the_line_that_it_was_killed_in_and_nothing_else(tmp_path):
    path = tmp_path / "calls.jsonl"
    with Journal(path, {"model": "é"}) as journal:
        for i in range(3):
            journal.add({"key": str(i), "text": "naïve\n" * i})
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last + 1, len(whole), 7):
        path.write_bytes(whole[:cut])
        with Journal(path, {"model": "é"}) as journal:
            assert set(journal.records) == {"0", "1"}
            journal.add({"key": "2", "text": "naïve\n" * 2})
        assert path.read_bytes() == whole
    path.write_bytes(whole[: whole.find(b"\n") - 2])  # killed in the first line
    with Journal(path, {"model": "other"}) as journal:
        assert journal.records == {}


def test_a_damaged_journal_is_named_with_its_line(tmp_path):
    path = tmp_path / "calls.jsonl"
    path.write_text('{"settings": {}}\n{"key": "a"}\nrubbish\n')
    with pytest.raises(LqaError, match="calls.jsonl, line 3"), Journal(path, {}):
        pass
    assert path.read_text().endswith("rubbish\n")


# --- the pure parts ---------------------------------------------------------------------------------------------


def seed_reply(**changes) -> dict:
    ideas = [{"detail": f"town-{i}", "idea": "It praises a small town."} for i in range(4)]
    ideas[0] |= changes
    return {"controls": ideas}


EXPANDED = {k: v for k, v in entry("goal-towns-x").items() if k not in ("id", "qa", "contrast")}
PARTNERS = ["goal-towns-y", "goal-towns-z"]


@pytest.mark.parametrize(
    ("call", "name", "words"),
    [
        (lambda: read_reply("Here: {broken", "stop"), "malformed", "no complete JSON"),
        (lambda: read_reply('{"controls": [1, 2', "length"), "malformed", "cut off"),
        (lambda: read_reply("[1, 2]", "stop"), "malformed", "no complete JSON"),
        (lambda: read_reply('{"a": "\\ud83d"}', "stop"), "malformed", "no complete JSON"),
        (lambda: read_reply("{}", "content_filter"), "refused", "refused"),
        (lambda: read_reply("As an AI, I must decline.", "stop"), "refused", "refused"),
        (lambda: read_seed({"ideas": []}, "goal-towns", []), "malformed", "exactly the keys controls, not ideas"),
        (lambda: read_seed({"controls": seed_reply()["controls"][:3]}, "goal-towns", []), "malformed", "exactly 4"),
        (lambda: read_seed(seed_reply(detail=7), "goal-towns", []), "malformed", "the texts 'detail' and 'idea'"),
        (lambda: read_seed(seed_reply(detail="Old Town"), "goal-towns", []), "malformed", "lower-case words"),
        (lambda: read_seed(seed_reply(detail="town-1"), "goal-towns", []), "repeated", "town-1"),
        (lambda: read_seed(seed_reply(), "goal-towns", ["town-2"]), "repeated", "town-2"),
        (lambda: read_expansion({**EXPANDED, "short": "a b c d e f"}, "goal-towns-x", PARTNERS), "malformed", "short has 6 words"),
        (lambda: read_expansion({**EXPANDED, "stimuli": 3}, "goal-towns-x", PARTNERS), "malformed", "not iterable"),
        (lambda: read_expansion({**EXPANDED, "stimuli": STIMULI[:1] * 2}, "goal-towns-x", PARTNERS), "repeated", "stimulus"),
        (lambda: read_expansion({**EXPANDED, "stimuli": [EXPANDED["control"]] * 2}, "goal-towns-x", PARTNERS), "leaking", "stimulus"),
        (lambda: read_probe({"qa": QA[:3]}, entry("goal-towns-x") | {"contrast": PARTNERS}), "malformed", "two of type reasoning"),
        (lambda: read_probe({"qa": [{**QA[0], "type": []}]}, entry("goal-towns-x") | {"contrast": PARTNERS}), "malformed", "unhashable"),
        (lambda: read_probe({"qa": [*QA, QA[0]]}, entry("goal-towns-x") | {"contrast": PARTNERS}), "repeated", "question"),
        (lambda: read_verdict({"faithful": True, "reason": ""}), "malformed", "exactly the keys"),
        (lambda: read_verdict({**dict.fromkeys(generate.VERDICTS, "yes"), "reason": ""}), "malformed", "true or false"),
    ],
)
def test_every_fault_has_its_name_and_says_what_is_wrong(call, name, words):
    with pytest.raises(Fault, match=words) as found:
        call()
    assert found.value.name == name


def test_replies_are_found_in_prose_fences_and_behind_thoughts():
    assert read_reply('```json\n{"a": {"b": "line\nbreak"}}\n```', "stop") == {"a": {"b": "line\nbreak"}}
    assert read_reply('<think>{"a": 1}</think>Sure {so}: {"a": 2} {"a": 3}', "stop") == {"a": 2}
    assert read_reply('I cannot stress it enough: {"a": 2}', "stop") == {"a": 2}  # no refusal


def test_verdicts():
    assert read_verdict({**dict.fromkeys(generate.VERDICTS, True), "reason": "Good."}) == ""
    assert read_verdict({**dict.fromkeys(generate.VERDICTS, True), "blind": False, "reason": "It\ntells."}) == "not blind: It tells."


def test_repeated_controls_are_left_out_and_partners_always_exist():
    ids = [f"goal-towns-{c}" for c in "abcdefgh"]
    first, second = partnered([entry(i) for i in ids[:4]]), partnered([entry(i) for i in ids[4:]])
    assert first[0]["contrast"] == ids[1:4] and partnered(first[:2]) == []
    again = [{**e, "control": first[0]["control"].upper()} if e["id"] in (ids[4], ids[5]) else e for e in second]
    entries, repeated = assemble([first, second], [])
    assert repeated == 0 and [e["id"] for e in entries] == ids
    entries, repeated = assemble([first, again], [])
    assert repeated == 2 and [e["id"] for e in entries] == ids[:4]  # two are no set
    seeds = [parse_control(first[3], "here")]
    entries, repeated = assemble([first, second], seeds)
    assert repeated == 1 and entries[0]["contrast"] == ids[1:3] and len(entries) == 7


def test_shares_grow_with_the_controls():
    names = ["a", "b", "c"]
    assert shares(names, 1) == {"a": 1, "b": 0, "c": 0} and shares(names, 17) == {"a": 2, "b": 2, "c": 1}
    tables = [shares(names, n) for n in range(1, 60)]
    assert all(small[k] <= large[k] for small, large in zip(tables, tables[1:], strict=False) for k in names)


def test_cost_is_computed_reported_or_unknown():
    usage = {"prompt_tokens": 1000, "completion_tokens": 500}
    records = [{"usage": usage}, {"usage": usage | {"cost": 0.25}}, {"usage": {}}]
    assert spent(records, (1, 2)) == {"tokens": {"prompt": 2000, "completion": 1000}, "calls_without_usage": 1, "cost_usd": 0.004}
    assert spent(records, None)["cost_usd"] is None
    assert spent(records[1:2] * 2, None)["cost_usd"] == 0.5


def test_the_prompts_can_be_filled_and_name_what_the_readers_want():
    prompts, version = generate._prompts()
    assert len(version) == 12 and set(prompts["kinds"]) == {"goal", "persona", "scenario", "user"}
    for name in ("control", "acknowledgement", "stimuli", "descriptions", "short"):
        assert f'"{name}"' in prompts["expand"]
    assert all(f'"{name}"' in prompts["judge"] for name in (*generate.VERDICTS, "reason"))
    assert all(set(kind) == {"meaning", "says"} for kind in prompts["kinds"].values())


# --- the embedded model -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_behind_transformers_serve(capsys, seeds, tmp_path):
    """Too small to write good controls: what counts is that each of its replies is judged, counted and written down."""
    pytest.importorskip("openai")
    from lqa.models import embedded_folder

    folder = embedded_folder()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            deadline = time.monotonic() + 240
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                    time.sleep(0.2)
            flags = ["--controls", "4", "--category", "goal-towns", "--attempts", "1", "--request", '{"max_tokens": 8, "temperature": 0}']
            url, out = f"http://127.0.0.1:{port}/v1", tmp_path / "out"
            message = fails(capsys, url, out, seeds, *flags, "--model", str(folder), "--concurrency", "1", "--timeout", "300")
        finally:
            server.terminate()
            server.wait(30)
    lines, provenance = journalled(out), json.loads((out / "provenance.json").read_text())
    assert "No control passed" in message and provenance["calls"] == len(lines) == 4  # twice the one set and two more
    assert sum(provenance["replies"]["seed"].values()) == 4 and provenance["replies"]["seed"]["accepted"] == 0
    assert all(line["text"] and line["usage"]["completion_tokens"] <= 8 for line in lines)
    assert provenance["tokens"]["completion"] == sum(line["usage"]["completion_tokens"] for line in lines) > 0
    n = len(lines)  # the server is gone: going on needs no call, and comes to the same end
    assert "No control passed" in fails(capsys, url, out, seeds, *flags, "--model", str(folder)) and len(journalled(out)) == n
