"""The judge: a language model behind an endpoint scores what a results folder holds, by a rubric.  Nothing is decoded again.

    open                       answers, compared with references (rubric.yaml)
    steer-persona, generalise  replies: do they show the behaviour? (rubric_behaviour.yaml)

Every judgement is filed as it came, in judgements.jsonl beside them, so that it can be read, and costs nothing a second time.  A reply
without a score is asked for once more, then left out.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from string import Template
from typing import NamedTuple

import yaml

from lqa.corpus.generate import Fault, read_reply
from lqa.endpoint import Endpoint
from lqa.errors import LqaError
from lqa.evals import data, report, steer_persona
from lqa.evals import open as suite
from lqa.journal import Journal, write_whole

KEY_NAME = "OPENAI_API_KEY"
TRIES = 2  # requests for one judgement, when its reply holds no score
FILE = "judgements.jsonl"
JUDGED = {"open": "rubric.yaml", "steer-persona": "rubric_behaviour.yaml", "generalise": "rubric_behaviour.yaml"}


class Asked(NamedTuple):
    """An answer to judge; for a reply, the request, the control and the reply."""

    question: str
    reference: str
    answer: str


@cache
def rubric(file: str = JUDGED["open"]) -> tuple[Template, int, str]:
    """(prompt, highest score, version) of a rubric."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    return Template(content["prompt"]), content["highest"], hashlib.sha256(text.encode()).hexdigest()[:12]


def read_score(text: str, finish: str, highest: int = 3) -> float | None:
    """The score of a judge's reply, as a share of the `highest`; None if it holds no score of the rubric."""
    try:
        score = read_reply(text, finish).get("score")
    except Fault:
        return None
    return score / highest if isinstance(score, int) and not isinstance(score, bool) and 0 <= score <= highest else None


def judge(
    journal: Journal, asked: Sequence[Asked], *, url: str, model: str, file: str = JUDGED["open"], concurrency: int = 8
) -> list[float | None]:
    """The score in [0, 1] of every answer, None where the judge gave none.  Raises LqaError if the endpoint cannot be used."""
    prompt, highest, version = rubric(file)

    async def one(endpoint: Endpoint, case: Asked) -> float | None:
        text = prompt.substitute(question=case.question, reference=case.reference, answer=case.answer or "(no answer)")
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]  # the texts themselves may be outside data
        for number in range(TRIES):
            key = f"{model}/{version}/{digest}/{number}"
            if key not in journal.records:
                body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
                reply = await endpoint.complete(body)
                journal.add({"key": key, "text": reply.text, "finish": reply.finish, "model": reply.model})
            filed = journal.records[key]
            if (score := read_score(filed["text"], filed["finish"], highest)) is not None:
                return score
        return None

    async def everything() -> dict[Asked, float | None]:
        distinct = list(dict.fromkeys(asked))  # the same answer is judged once
        key = os.environ.get(KEY_NAME, "").strip() or None
        async with Endpoint(url, key, key_name=KEY_NAME, concurrency=concurrency) as endpoint:
            # Those under way when one fails are paid for, and waited for.
            scores = await asyncio.gather(*(one(endpoint, case) for case in distinct), return_exceptions=True)
        if failed := [score for score in scores if isinstance(score, BaseException)]:
            raise failed[0]
        return dict(zip(distinct, scores, strict=True))

    scores = asyncio.run(everything())
    return [scores[case] for case in asked]


def judge_folder(folder: str | Path, source: str | Path | None, *, url: str, model: str) -> None:
    """Judges what a results folder holds of the suites JUDGED; writes judgements, scores and tables there.

    source  the outside data that the answers of open are about, None for the package's own: references are not kept in results

    Raises LqaError if the folder holds nothing to judge, the answers are about other data, or the endpoint cannot be used.
    """
    folder = Path(folder)
    documents = {name: json.loads(path.read_text(encoding="utf-8")) for name in JUDGED if (path := folder / f"{name}.json").is_file()}
    if not documents:
        raise LqaError(f"{folder} holds no answers of {', '.join(JUDGED)}; run `python -m lqa eval open --out {folder}` first.")
    cases = {name: _of_open(folder, d, source) if name == "open" else _of_steering(d) for name, d in documents.items()}
    for name, document in documents.items():
        asked, places = zip(*cases[name], strict=True)
        with Journal(folder / FILE, {}, width=8) as journal:
            for place, score in zip(places, judge(journal, asked, url=url, model=model, file=JUDGED[name]), strict=True):
                place["judge"] = score
        without = sum(place["judge"] is None for place in places)
        print(f"{name}: {len(asked)} judged by {model}, {without} of them without a usable score", file=sys.stderr)
        tables = suite.tables(document["items"]) if name == "open" else steer_persona.tables(document["items"])
        document["tables"] = {key: asdict(table) for key, table in tables.items()}
        about = {"model": model, "rubric": rubric(JUDGED[name])[2], "answers": len(asked), "without_score": without}
        document["settings"]["judge"] = about
        write_whole(folder / f"{name}.json", report.dump(document))
    write_whole(folder / "README.md", report.report({folder.name: report.load(folder)}, plots=True))


def _of_open(folder: Path, document: dict, source: str | Path | None) -> list[tuple[Asked, dict]]:
    """The answers of open, each with where its score goes.  Raises LqaError if `source` is not what they are about."""
    items, about = data.items_of(source)
    if about["sha256"] != document["data"]["sha256"]:
        raise LqaError(f"The answers in {folder} are about {document['data']['name']}, not {about['name']}; name its folder with --data.")
    cases = {(part, case.item.label): case for part, own in suite.cases_of(items).items() for case in own}
    found = []
    for entry in document["items"]:
        case = cases[entry["part"], entry["id"]]
        found += [(Asked(case.question, case.reference, answer), entry["scores"][row]) for row, answer in entry["answers"].items()]
    return found


def _of_steering(document: dict) -> list[tuple[Asked, dict]]:
    """The sampled replies of a suite of steering, each with where its score goes."""
    replies = [(entry["control"], reply) for entry in document["items"] for reply in entry["replies"] if not reply["greedy"]]
    return [(Asked(reply["request"], control, reply["text"]), reply) for control, reply in replies]
