"""The suite `open`: its scores by cases made by hand, the suite on a tiny decoder, and the judge at a loopback endpoint."""

import json
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from lqa import LqaError
from lqa.cli import main
from lqa.evals import data, judge, runner, steer_persona
from lqa.evals import open as suite
from lqa.evals.data import Item
from lqa.evals.steer_persona import Behaviour
from lqa.evals.suite import Job, Result
from lqa.journal import Journal


def item(i: int, kind: str = "goal", **more) -> Item:
    own = ((f"What of city {i}?", f"It likes city {i}."),)
    return Item(f"{kind}-test-{i}", kind, f"Speak of {i} cities." + "!" * i, f"What of {i}?", f"It speaks of {i} cities.", own=own, **more)


@pytest.fixture
def job(tiny_decoder, monkeypatch, tmp_path):
    """job(items, **more): the suite's job on a tiny decoder, over these items; the same folder goes on with its journal."""
    decoder = tiny_decoder()
    monkeypatch.setattr(suite, "MAX_NEW_TOKENS", 5)
    journals = []

    def make(items, **more):
        monkeypatch.setattr(data, "items_of", lambda folder=None, form="system": (items, {"name": "by hand", "sha256": "0"}))
        journals.append(Journal(tmp_path / "journal.jsonl", {}))
        journals[-1].__enter__()
        return Job("open", decoder, journals[-1], data=None, limit=None, **more)

    yield make
    for journal in journals:
        journal.__exit__()


def test_an_answer_is_generic_if_it_fits_another_at_least_as_well():
    similarity = torch.tensor([0.5, 0.7, 0.2, 0.5])
    assert suite.is_generic(similarity, 1, [0, 2, 3]) == 0
    assert suite.is_generic(similarity, 0, [2]) == 0
    assert suite.is_generic(similarity, 0, [2, 3]) == 1  # as similar is enough
    assert suite.is_generic(similarity, 0, [1]) == 1
    assert suite.is_generic(similarity, 0, []) is None


def test_key_words_are_those_with_content_by_their_stems():
    assert suite.key_words("It writes in stiff, official language.", "stiff officialese") == 0.5
    assert suite.key_words("Pirates! Many pirates at sea.", "a pirate at sea") == 1
    assert suite.key_words("It is kind.", "the one it is") is None  # nothing to find


def test_donors_and_others_are_of_the_same_kind_and_not_oneself():
    items = [item(i) for i in range(5)] + [item(i, "persona") for i in range(3)] + [item(0, "user")]
    donor = suite.ring(items, 0)
    assert all(i != j for i, j in enumerate(donor)) and all(items[i].kind == items[j].kind for i, j in enumerate(donor[:8]))
    assert sorted(donor[:8]) == list(range(8)) and donor != suite.ring(items, 1)  # each is a donor once
    references = [i.answer for i in items]
    references[1] = references[0]
    rivals = suite.others(items, references, 0, n=3)
    assert [len(r) for r in rivals] == [3, 3, 3, 3, 3, 2, 2, 2, 0]
    assert 1 not in rivals[0] and 0 not in rivals[1]  # the same reference is no rival
    assert all(items[j].kind == items[i].kind and j != i for i, r in enumerate(rivals) for j in r)


def test_scores_and_tables_are_those_of_the_similarities(monkeypatch):
    cases = [suite.Case(item(i), "Q", f"R{i}", "M") for i in range(3)]
    close = {"ours": [[0.9, 0.1, 0.2], [0.8, 0.6, 0.1], [0.0, 0.0, 0.3]], "none": [[0.5] * 3] * 3}
    monkeypatch.setattr(suite, "similarities", lambda texts, references: torch.tensor(close[texts[0]]))
    entries = suite.scored("own-generic", cases, {row: [row] * 3 for row in close}, seed=0)
    assert [e["scores"]["ours"] for e in entries] == [{"similarity": s, "generic": g} for s, g in ((0.9, 0.0), (0.6, 1.0), (0.3, 0.0))]
    table = suite.tables(entries)["own-generic"]
    assert list(table.columns) == ["similarity", "generic"] and [c.n for c in table.rows["ours"]] == [3, 3]
    assert [c.mean for c in table.rows["ours"]] == pytest.approx([0.6, 1 / 3])
    assert [c.mean for c in table.rows["none"]] == pytest.approx([0.5, 1.0])  # all the same to it: generic
    assert table.note == "Generic by chance: 66.7%."  # two others each


def test_the_suite_answers_every_table_and_goes_on_where_it_was_killed(job, monkeypatch):
    items = [item(i, short="many cities") for i in range(4)] + [item(9, "persona", short="a doctor")]
    first = job(items)
    result = suite.run(first)
    assert list(result.tables) == list(suite.TITLES) and len(result.items) == 25
    for name, table in result.tables.items():
        assert list(table.rows) == ["ours", "none", "shuffled", "text_only"]
        assert ("key words" in table.columns) == (name == "fixed-short")
    entries = {(e["part"], e["id"]): e for e in result.items}
    fixed = [entries["fixed-generic", f"goal-test-{i}"]["answers"] for i in range(4)]
    assert len({a["none"] for a in fixed}) == 1 and len({a["text_only"] for a in fixed}) == 1  # all that differs is hidden
    assert sorted(a["shuffled"] for a in fixed) == sorted(a["ours"] for a in fixed)  # another's, each once
    reading = first.read([{"role": "system", "content": items[0].control}, {"role": "user", "content": items[0].message}], "from:1")
    alone = reading.ask(items[0].own[0][0], max_new_tokens=5)[0].text
    assert entries["own-own", "goal-test-0"]["answers"]["ours"] == alone
    text = str(result.items)
    assert all(i.control not in text and i.answer not in text and i.message not in text for i in items)  # of data, ids alone

    made = list(first.journal.records)
    first.journal.__exit__()
    path = first.journal.path
    path.write_text("".join(path.read_text().splitlines(True)[:3]))  # killed after two pieces
    again = job(items)
    assert len(again.journal.records) == 2
    assert suite.run(again) == result and list(again.journal.records) == made


def test_one_item_has_nothing_to_be_held_against(job):
    with pytest.raises(LqaError, match="at least 2 items"):
        suite.run(job([item(0)]))


def test_further_decoders_get_a_row(job, tiny_decoder):
    other = job([item(i) for i in range(3)], rows={"twin": tiny_decoder()})
    table = suite.run(other).tables["fixed-generic"]
    assert list(table.rows)[-1] == "twin" and table.rows["twin"] == table.rows["ours"]


# --- the judge ----------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch):
    """endpoint(reply): the URL of a server that answers a prompt with reply(prompt), and the prompts that it was sent."""
    servers = []
    monkeypatch.setenv("OPENAI_API_KEY", "k")

    def start(reply):
        prompts = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompts.append(body["messages"][0]["content"])
                choice = {"finish_reason": "stop", "message": {"content": reply(prompts[-1])}}
                answer = json.dumps({"model": "served", "choices": [choice]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/v1", prompts

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_scores_are_read_from_prose_and_fences():
    assert judge.read_score('Well: ```json\n{"reason": "vague", "score": 1}\n```', "stop") == pytest.approx(1 / 3)
    assert judge.read_score('{"score": 3}', "stop") == 1 and judge.read_score('{"score": 0}', "stop") == 0
    for text in ("no", '{"score": 4}', '{"score": -1}', '{"score": "2"}', '{"score": true}', '{"score": 1.5}', '{"reason": "x"}'):
        assert judge.read_score(text, "stop") is None, text
    assert judge.read_score('{"score": 3}', "refusal") is None


def test_saved_answers_are_judged_and_judged_again_without_decoding(endpoint, job, tmp_path, monkeypatch, capsys):
    items = [item(i) for i in range(3)]
    result = suite.run(job(items))
    folder = tmp_path / "out"
    folder.mkdir()
    about = {"decoder": {"name": "tiny"}, "code": "test", "command": "python -m lqa eval open --out OUT", "seconds": 1}
    document = json.loads(json.dumps({"provenance": about} | runner.asdict(result)))
    (folder / "open.json").write_text(runner.report.dump(document))
    url, prompts = endpoint(lambda prompt: "I cannot say." if "city 1" in prompt else '{"reason": "r", "score": 2}')
    monkeypatch.setattr(runner.LatentDecoder, "from_pretrained", lambda *a, **k: pytest.fail("nothing is decoded"))

    assert main(["eval", "judge", str(folder), "--endpoint", url, "--judge", "m"]) == 0
    assert "judge" in capsys.readouterr().out
    written = json.loads((folder / "open.json").read_text())
    own = {e["id"]: e["scores"]["ours"]["judge"] for e in written["items"] if e["part"] == "fixed-own"}
    assert own == {"goal-test-0": pytest.approx(2 / 3), "goal-test-1": None, "goal-test-2": pytest.approx(2 / 3)}
    cells = written["tables"]["fixed-own"]["rows"]["ours"]
    assert cells[2]["mean"] == pytest.approx(2 / 3) and cells[2]["n"] == 2 and cells[0]["n"] == 3
    assert written["settings"]["judge"]["without_score"] == 8  # two tables, four rows
    assert all(item(0).own[0][1] in p for p in prompts if "city 0" in p)  # the judge sees the reference
    raw = [json.loads(line) for line in (folder / judge.FILE).read_text().splitlines()[1:]]
    assert {r["text"] for r in raw} == {"I cannot say.", '{"reason": "r", "score": 2}'} and len(raw) == len(prompts)

    sent = len(prompts)
    assert main(["eval", "judge", str(folder), "--endpoint", url, "--judge", "m"]) == 0
    assert len(prompts) == sent and json.loads((folder / "open.json").read_text()) == written  # judged before: free
    assert main(["eval", "judge", str(folder), "--endpoint", url, "--judge", "other"]) == 0
    assert len(prompts) == 2 * sent


def test_saved_replies_are_judged_for_their_control(endpoint, tmp_path, capsys):
    behaviour = Behaviour("cats", "Mention cats.", "It mentions cats.", {"kind": "words", "patterns": ["cats"]}, ("How?", "Why?"))
    said = {"unsteered": "So.", "steering": "Cats say so."}
    replies = {
        row: [
            {"request": request, "greedy": greedy, "text": text, "tokens": 3, "logprob": -1.0}
            for greedy in (False, True)
            for request in behaviour.requests
        ]
        for row, text in said.items()
    }
    made = {"seconds": 0.0, "examples": 0}
    entries = [steer_persona.entry(behaviour, row, {"replies": own, "made": made}) for row, own in replies.items()]
    result = asdict(Result({"name": "test", "sha256": "0"}, steer_persona.tables(entries), entries))
    about = {"decoder": {"name": "tiny"}, "code": "test", "command": "python -m lqa eval steer-persona --out OUT", "seconds": 1}
    (tmp_path / "steer-persona.json").write_text(runner.report.dump({"provenance": about} | result))
    url, prompts = endpoint(lambda prompt: json.dumps({"reason": "r", "score": 2 if "Cats say" in prompt else 0}))
    assert main(["eval", "judge", str(tmp_path), "--endpoint", url, "--judge", "m"]) == 0
    assert "| judge |" in capsys.readouterr().out and len(prompts) == 4 and all("Mention cats." in p for p in prompts)
    written = json.loads((tmp_path / "steer-persona.json").read_text())
    assert {e["method"]: [r.get("judge") for r in e["replies"]] for e in written["items"]} == {
        "unsteered": [0, 0, None, None],
        "steering": [1, 1, None, None],
    }
    summary = written["tables"]["summary"]
    assert summary["rows"]["steering"][list(summary["columns"]).index("judge")]["mean"] == 1


def test_a_judge_without_endpoint_answers_or_data_is_one_sentence(job, tmp_path, capsys):
    for argv, words in (
        (["eval", "open", "--judge", "m", "--out", "x"], "--endpoint URL and --judge MODEL together"),
        (["eval", "identify", "--judge", "m", "--endpoint", "http://127.0.0.1:1/v1", "--out", "x"], "name it among the suites"),
        (["eval", "judge", "--judge", "m", "--endpoint", "http://127.0.0.1:1/v1"], "Name one results folder"),
        (["eval", "judge", str(tmp_path), "--judge", "m", "--endpoint", "http://127.0.0.1:1/v1"], "holds no answers"),
    ):
        assert main(argv) == 2
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said
    job([item(0)])
    (tmp_path / "open.json").write_text(json.dumps({"data": {"name": "elsewhere", "sha256": "1"}, "items": []}))
    with pytest.raises(LqaError, match="elsewhere, not by hand"):
        judge.judge_folder(tmp_path, None, url="http://127.0.0.1:1/v1", model="m")
