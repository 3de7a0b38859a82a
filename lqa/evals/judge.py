"""The judge of the suite `open`: a language model behind an endpoint compares answers with references by the rubric in rubric.yaml.

It judges the answers that a results folder holds; nothing is decoded again.  Every judgement is filed as it came, in judgements.jsonl
beside them, so that it can be read, and costs nothing a second time.  A reply without a score is asked for once more, then left out.
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
from lqa.evals import data, report
from lqa.evals import open as suite
from lqa.journal import Journal, write_whole

KEY_NAME = "OPENAI_API_KEY"
TRIES = 2  # requests for one judgement, when its reply holds no score
FILE = "judgements.jsonl"


class Asked(NamedTuple):
    """An answer to judge."""

    question: str
    reference: str
    answer: str


@cache
def rubric() -> tuple[Template, int, str]:
    """(prompt, highest score, version) of rubric.yaml."""
    text = (Path(__file__).parent / "rubric.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    return Template(content["prompt"]), content["highest"], hashlib.sha256(text.encode()).hexdigest()[:12]


def read_score(text: str, finish: str) -> float | None:
    """The score of a judge's reply, as a share of the highest in [0, 1]; None if it holds no score of the rubric."""
    highest = rubric()[1]
    try:
        score = read_reply(text, finish).get("score")
    except Fault:
        return None
    return score / highest if isinstance(score, int) and not isinstance(score, bool) and 0 <= score <= highest else None


def judge(journal: Journal, asked: Sequence[Asked], *, url: str, model: str, concurrency: int = 8) -> list[float | None]:
    """The score in [0, 1] of every answer, None where the judge gave none.  Raises LqaError if the endpoint cannot be used."""
    prompt, _, version = rubric()

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
            if (score := read_score(filed["text"], filed["finish"])) is not None:
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


def judge_folder(folder: str | Path, source: str | Path | None, *, url: str, model: str) -> dict:
    """Judges the answers of `open` in a results folder; writes judgements, scores and tables there and returns the suite's document.

    source  the outside data that the answers are about, None for the package's own: references are not kept in results

    Raises LqaError if the folder holds no answers, they are about other data, or the endpoint cannot be used.
    """
    folder, path = Path(folder), Path(folder, "open.json")
    if not path.is_file():
        raise LqaError(f"{folder} holds no answers of the suite open; run `python -m lqa eval open --out {folder}` first.")
    document = json.loads(path.read_text(encoding="utf-8"))
    items, about = data.items_of(source)
    if about["sha256"] != document["data"]["sha256"]:
        raise LqaError(f"The answers in {folder} are about {document['data']['name']}, not {about['name']}; name its folder with --data.")
    cases = {(part, case.item.label): case for part, own in suite.cases_of(items).items() for case in own}
    entries = document["items"]
    asked = [
        Asked(case.question, case.reference, answer)
        for entry in entries
        for case in [cases[entry["part"], entry["id"]]]
        for answer in entry["answers"].values()
    ]
    with Journal(folder / FILE, {"suite": "open"}, width=8) as journal:
        scores = iter(judge(journal, asked, url=url, model=model))
    for entry in entries:
        for row in entry["answers"]:
            entry["scores"][row]["judge"] = next(scores)
    without = sum(s["judge"] is None for entry in entries for s in entry["scores"].values())
    print(f"{len(asked)} answers judged by {model}, {without} of them without a usable score", file=sys.stderr)
    document["tables"] = {name: asdict(table) for name, table in suite.tables(entries).items()}
    document["settings"]["judge"] = {"model": model, "rubric": rubric()[2], "answers": len(asked), "without_score": without}
    write_whole(path, report.dump(document))
    write_whole(folder / "README.md", report.report({folder.name: report.load(folder)}, plots=True))
    return document
