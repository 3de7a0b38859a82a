"""The suites `steer-persona` and `generalise`: does a model that was told how to behave do so, and does it stay fluent?

Each control of steer_persona.yaml is followed in every way of lqa.evals.methods; the model so made replies to neutral requests, DRAWS
replies sampled with the seed to each, and a greedy one.  For every control and method:

    behaviour         share of the sampled replies that show it, by a scorer that is no decoder (lqa.evals.behaviour); clustered by request
    difference        to the unsteered model's, request by request
    greedy            the same share of the greedy replies
    perplexity        of the sampled replies under the unsteered model, per token
    ratio             the same over that of the unsteered model's own replies
    distinct-2        share of a reply's pairs of words that are no repetition
    tokens            length of a reply, of at most NEW_TOKENS
    judge             what a language model says of the sampled replies, where one was asked (lqa.evals.judge)
    seconds, examples what making the method took (0: nothing is made)
    apart             the interval of the behaviour lies above the unsteered model's, at a ratio of at most RATIO

`steer-persona` has controls whose wording is far from any of the training corpus, of kinds that it knows; `generalise` has behaviours of
which no QA of the corpus tells.

An item, for --limit, is a request under a control: as many controls are drawn as the limit pays for with all their requests, and at least
one, with so many requests.  With --sweep the steerings are also applied at the strengths STRENGTHS, whatever was found to be fluent.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lqa import engine
from lqa.evals import behaviour, embedding, methods
from lqa.evals.statistics import bootstrap, bootstrap_of
from lqa.evals.suite import Cell, Job, Plot, Result, Table, cell
from lqa.steering.strength import RATIO, logprobs, write_replies

FILE = Path(__file__).parent / "steer_persona.yaml"
NEW_TOKENS = 48
TEMPERATURE = 0.7
DRAWS = 2
STRENGTHS = (0.5, 1.0, 1.5, 2.0)
COLUMNS = {"apart": "%", "behaviour": "%", "difference": "%", "greedy": "%", "judge": "%"}
COLUMNS |= {"perplexity": "", "ratio": "", "distinct-2": "%", "tokens": "", "seconds": "", "examples": ""}


@dataclass(frozen=True)
class Behaviour:
    """Something that a model shall do: the control, what may be said of a model that does it, the scorer, and the neutral requests."""

    id: str
    control: str
    answer: str
    scorer: dict
    requests: tuple[str, ...]


def load(suite: str) -> list[Behaviour]:
    """The behaviours of "steer-persona" or "generalise"."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return [Behaviour(**entry | {"requests": tuple(entry.get("requests", data["requests"]))}) for entry in data[suite]]


def limited(job: Job, behaviours: Sequence[Behaviour]) -> list[Behaviour]:
    """What the job's limit leaves of `behaviours` and their requests: see the module."""
    if job.limit is None:
        return list(behaviours)
    count = max(1, job.limit // len(behaviours[0].requests))
    few = random.Random(job.seed).sample(behaviours, min(count, len(behaviours)))
    return [replace(b, requests=b.requests[: job.limit]) for b in few]


def check(folder: Path | None) -> None:
    """Raises LqaError if the embeddings' package is missing."""
    embedding.find()


def run(job: Job) -> Result:
    behaviours = limited(job, load(job.suite))
    entries, total = [], len(behaviours) * len(job.methods)
    for n, b in enumerate(behaviours):
        for m, name in enumerate(job.methods):
            key = f"{b.id}/{name}" + "/strengths" * (job.sweep and name == "steering")
            if name == "unsteered":  # the same for all controls with the same requests
                key = f"{name}/{hashlib.sha256(repr(b.requests).encode()).hexdigest()[:12]}"
            made = job.once(key, partial(_measure, job, b, name))
            entries += [entry(b, row, found) for row, found in made.items()]
            job.progress(n * len(job.methods) + m + 1, total)
    found = all_figures(entries)
    for e in entries:
        cells = found[e["id"]][e["method"]]
        e["figures"] = {name: [round(x, 4) for x in (c.mean, c.low, c.high)] for name, c in cells.items()}
    codes = sorted({e["made"]["code"] for e in entries if e["made"].get("code")})
    settings = {"new_tokens": NEW_TOKENS, "temperature": TEMPERATURE, "draws": DRAWS, "ratio": RATIO, "embedding": embedding.PACKAGE}
    return Result(
        data={"name": f"controls written for this suite ({len(behaviours)})", "sha256": hashlib.sha256(FILE.read_bytes()).hexdigest()},
        tables=tables(entries, found),
        items=entries,
        plots=plots(found),
        settings=settings | {"examples": job.examples, "methods_made_by": codes},
    )


# --- what is computed ----------------------------------------------------------------------------------------------


def _measure(job: Job, b: Behaviour, name: str) -> dict[str, dict]:
    """{row: what `replies` gives, and how the method was made}: the method, and with --sweep the steering at other strengths."""
    method = methods.make(name, job.decoder, b.control, seed=job.seed, folder=job.made(b.control), examples=job.examples)
    made = {"seconds": method.seconds, "examples": method.examples}
    made |= {key: method.record[key] for key in ("strength", "code") if key in method.record}
    sessions = {name: (method.session, made)}
    if job.sweep and name == "steering":
        for x in STRENGTHS:
            sessions[f"steering x {x}"] = partial(job.decoder.base.decoding, (method.adapter, x)), made | {"strength": x}
    try:
        found = {}
        for row, (session, how) in sessions.items():
            found[row] = {"replies": replies(job.decoder, session, b.requests, job.seed, method.system), "made": how}
        return found
    finally:
        method.remove()


def replies(decoder, session: Callable, requests: Sequence[str], seed: int, system: str | None = None) -> list[dict]:
    """The replies of the model that `session` yields: request, greedy or not, text, and tokens with their mean log-probability (nats) under
    the unsteered model, which knows of no system prompt.  An empty reply counts as one token, the end of its turn."""
    tokenizer = decoder.base.tokenizer
    found = []
    for greedy, times in ((False, DRAWS), (True, 1)):
        asked = [request for request in requests for _ in range(times)]
        choose = None if greedy else engine.sampler(TEMPERATURE, seed=seed)
        ids = write_replies(decoder, asked, session, NEW_TOKENS, system=system, choose=choose)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        ids = [reply or decoder.config.prompt.stop_ids(tokenizer)[:1] for reply in ids]
        means = logprobs(decoder, asked, ids)
        for request, text, reply, mean in zip(asked, texts, ids, means, strict=True):
            found.append({"request": request, "greedy": greedy, "text": text.strip(), "tokens": len(reply), "logprob": round(mean, 5)})
    return found


def entry(b: Behaviour, row: str, found: dict) -> dict:
    """The item of a control and a method: the replies with their scores."""
    scores = behaviour.score(b.scorer, [reply["text"] for reply in found["replies"]])
    scored = [reply | {"score": score} for reply, score in zip(found["replies"], scores, strict=True)]
    return {"id": b.id, "method": row, "control": b.control, "made": found["made"], "replies": scored}


# --- what is reported ----------------------------------------------------------------------------------------------


def by_request(replies: Sequence[dict], value: Callable[[dict], Any], greedy: bool = False) -> list[list]:
    """The values of the sampled (or greedy) replies, a list for every request."""
    found: dict[str, list] = {}
    for reply in replies:
        if reply["greedy"] == greedy:
            found.setdefault(reply["request"], []).append(value(reply))
    return list(found.values())


def perplexity(replies: Sequence[dict]) -> Cell:
    """exp of the mean negative log-probability of the sampled replies' tokens."""
    losses = by_request(replies, lambda r: [-r["logprob"]] * r["tokens"])
    over = bootstrap([[loss for reply in request for loss in reply] for request in losses], resamples=2000)
    return Cell(*map(math.exp, over), n=sum(map(len, losses)))


def perplexity_ratio(own: Sequence[dict], plain: Sequence[dict]) -> Cell:
    """Perplexity per token of the sampled replies over that of the unsteered ones; requests are drawn again for both together."""

    def sums(replies: Sequence[dict]) -> list[tuple[float, int]]:
        losses = by_request(replies, lambda r: -r["logprob"] * r["tokens"])
        return [(sum(loss), sum(n)) for loss, n in zip(losses, by_request(replies, lambda r: r["tokens"]), strict=True)]

    def ratio(chosen) -> float:
        (a, n), (b, m) = ([sum(values) for values in zip(*side, strict=True)] for side in zip(*chosen, strict=True))
        return math.exp(min(a / n - b / m, 100.0))

    pairs = list(zip(sums(own), sums(plain), strict=True))
    return Cell(*bootstrap_of(ratio, pairs, resamples=2000), n=sum(not r["greedy"] for r in own))


def figures(own: Sequence[dict], plain: Sequence[dict]) -> dict[str, Cell]:
    """The cells for the replies of a method, against the unsteered model's to the same requests."""
    score = partial(by_request, value=lambda r: r["score"])
    ratio = perplexity_ratio(own, plain)
    shown, unsteered = cell(score(own)), cell(score(plain))
    apart = float(shown.low > unsteered.high and ratio.mean <= RATIO)
    differences = [[x - y for x, y in zip(a, b, strict=True)] for a, b in zip(score(own), score(plain), strict=True)]
    return {
        "apart": Cell(apart, apart, apart, 1),
        "behaviour": shown,
        "difference": cell(differences),
        "greedy": cell(score(own, greedy=True)),
        "perplexity": perplexity(own),
        "ratio": ratio,
        "distinct-2": cell(by_request(own, lambda r: behaviour.distinct(r["text"]))),
        "tokens": cell(by_request(own, lambda r: float(r["tokens"]))),
    }


def all_figures(entries: Sequence[dict]) -> dict[str, dict[str, dict[str, Cell]]]:
    """{control id: {method: its cells, named as in COLUMNS}}."""
    plain = {e["id"]: e["replies"] for e in entries if e["method"] == "unsteered"}
    found: dict[str, dict[str, dict[str, Cell]]] = {}
    for e in entries:
        cells = figures(e["replies"], plain[e["id"]])
        if judged := [r for r in e["replies"] if r.get("judge") is not None]:
            cells["judge"] = cell(by_request(judged, lambda r: r["judge"]))
        cells |= {cost: Cell(*[e["made"][cost]] * 3, n=1) for cost in ("seconds", "examples")}
        found.setdefault(e["id"], {})[e["method"]] = cells
    return found


def tables(entries: Sequence[dict], found: dict | None = None) -> dict[str, Table]:
    """`summary`: every method over the controls; `behaviour` and `ratio`: every control by method."""
    found = found or all_figures(entries)
    rows = list(dict.fromkeys(e["method"] for e in entries))
    columns = {name: unit for name, unit in COLUMNS.items() if any(name in cells for own in found.values() for cells in own.values())}
    summary: dict[str, list[Cell | None]] = {}
    for row in rows:
        means = {name: [own[row][name].mean for own in found.values() if name in own[row]] for name in columns}
        over = {name: cell([[v] for v in values]) if values else None for name, values in means.items()}
        for name in ("perplexity", "ratio"):  # geometric means
            logs = cell([[math.log(v)] for v in means[name]])
            over[name] = Cell(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.n)
        summary[row] = list(over.values())
    some = next(iter(found.values()))["unsteered"]["behaviour"].n
    note = (
        f"apart: the interval lies above the unsteered model's, at a perplexity ratio of at most {RATIO}. "
        f"{some} sampled replies to each control; n counts controls, and intervals are over them. `unsteered` is each control's own chance."
    )
    by_control = f"{some} sampled replies each, clustered by request."
    result = {"summary": Table("Behaviour and fluency, mean over the controls", columns, summary, note)}
    for name, unit, title in (("behaviour", "%", "Share of replies that show the behaviour"), ("ratio", "", "Perplexity ratio")):
        lines = {i: [own[row][name] for row in rows] for i, own in found.items()}
        result[name] = Table(f"{title}, by control", {row: unit for row in rows}, lines, by_control)
    return result


def plots(found: dict[str, dict[str, dict[str, Cell]]]) -> list[Plot]:
    """Behaviour by control and method; behaviour against perplexity ratio."""
    rows = list(next(iter(found.values())))
    values = [[round(own[row]["behaviour"].mean, 4) for row in rows] for own in found.values()]
    points = {
        row: {
            "x": [round(own[row]["ratio"].mean, 4) for own in found.values()],
            "y": [round(own[row]["behaviour"].mean, 4) for own in found.values()],
        }
        for row in rows
    }
    return [
        Plot("behaviour", "Share of replies that show the behaviour", "matrix", {"": {"x": rows, "y": list(found), "values": values}}),
        Plot("fluency", "Behaviour against fluency, a point for each control", "points", points, "perplexity ratio", "behaviour"),
    ]
