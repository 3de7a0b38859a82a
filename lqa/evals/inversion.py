"""The suite `inversion`: when a model's state contradicts the visible text, does the decoder report the model or the text?

A model is made to do A (lqa.evals.methods), and the user's message asks for B; another is made to do B, and the message asks for A.  Of
both, the decoder reads the message, and is asked one question that no steering was trained on.  Either answer, "it does A" and "it does B",
is scored.  A pair is a hit if the answer A is worth more, against B, when the model that does A is read: the decoder follows the state.  It
is none if the decoder follows the text (as in `sensitivity`, how likely an answer is by itself cancels).  A reader that sees no difference
gets 50 %, one that goes by the text 0 %.

    contradicted  the message asks for the other behaviour, then for something neutral
    silent        the message is the neutral request alone: only the state can tell, and 50 % is chance
    compared      the same, where the decoder is given the difference to the unsteered model on the same text (a decoder whose conditioning
                  compares; a hidden system prompt is always read so)

Rows are the methods that made the models.  `steering` was trained through this very decoder, to please it: that it is read back says less
than that a model is which never met the decoder (system_prompt, sft, dpo).  An activation addition changes replies alone, not the message's
activations, and has no row.  `unsteered` is the effect of the text by itself; none, shuffled and text_only are references on its readings.

The behaviours are those of `steer-persona`, paired by the seed.  An item, for --limit, is a message under a pair.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

from lqa.conditioning import REFERENCED
from lqa.evals import batch, methods, sensitivity
from lqa.evals.steer_persona import FILE, Behaviour, load
from lqa.evals.suite import Job, Result, Table, cell

QUESTION = "How does the assistant express itself here, and what does it dwell on?"
MESSAGES = 4
SPAN = "turn:-1"
REFERENCES = ("none", "shuffled", "text_only")


def pairs_of(job: Job) -> tuple[list[tuple[Behaviour, Behaviour]], tuple[str, ...]]:
    """Pairs of behaviours, each in one of them at most, and the neutral messages: what the job's limit leaves."""
    behaviours = load("steer-persona")
    random.Random(job.seed).shuffle(behaviours)
    pairs = list(zip(behaviours[::2], behaviours[1::2], strict=False))
    messages = next(b.requests for b in behaviours if b.id != "no-food")[:MESSAGES]
    if job.limit is not None:
        pairs, messages = pairs[: max(1, job.limit // MESSAGES)], messages[: job.limit]
    return pairs, messages


def run(job: Job) -> Result:
    names = [name for name in job.methods if name != "caa"]
    pairs, messages = pairs_of(job)
    conditions = ["contradicted", "silent"]
    if job.decoder.config.conditioning in REFERENCED:
        conditions += [f"{c}, compared" for c in conditions]
    entries = []
    for n, pair in enumerate(pairs):
        found: dict[str, dict[str, list]] = {}
        for m, name in enumerate(names):
            where = "/".join([",".join(b.id for b in pair), name, str(len(messages))])
            found |= job.once(where, partial(_measure, job, pair, messages, name, conditions))
            job.progress(n * len(names) + m + 1, len(pairs) * len(names))
        for i, message in enumerate(messages):
            scores = {row: {c: made[c][i] for c in made} for row, made in found.items()}
            follows = {row: {c: sensitivity.swaps(s)[0] for c, s in own.items()} for row, own in scores.items()}
            entries.append({"ids": [b.id for b in pair], "message": message, "scores": scores, "follows": follows})

    def over_pairs(row: str, condition: str):
        own = [[e["follows"][row].get(condition) for e in entries if e["ids"] == [b.id for b in pair]] for pair in pairs]
        return cell(own) if None not in own[0] else None

    rows = {row: [over_pairs(row, c) for c in conditions] for row in [*names, *REFERENCES]}
    note = "0% reports the text, 50% tells nothing apart, 100% reports the model. Intervals by pair of behaviours."
    return Result(
        data={"name": f"{2 * len(pairs)} behaviours of steer-persona", "sha256": hashlib.sha256(FILE.read_bytes()).hexdigest()},
        tables={"follows": Table("The decoder reports the model, not the text", dict.fromkeys(conditions, "%"), rows, note)},
        items=entries,
        settings={"question": QUESTION, "messages": list(messages), "span": SPAN, "examples": job.examples},
    )


def _measure(job: Job, pair: Sequence[Behaviour], messages: Sequence[str], name: str, conditions: Sequence[str]) -> dict[str, dict]:
    """{row: {condition: for every message the matrix of log-probabilities, model by answer}}; the references beside the unsteered model."""
    decoder, answers = job.decoder, [b.answer for b in pair]
    rows = [name, *(REFERENCES if name == "unsteered" else ())]
    found = {row: {c: [[] for _ in messages] for c in conditions if row == name or "compared" not in c} for row in rows}
    for own, other in (pair, pair[::-1]):
        method = methods.make(name, decoder, own.control, seed=job.seed, folder=job.made(own.control), examples=job.examples)
        try:
            for condition in conditions:
                for i, message in enumerate(messages):
                    text = f"{other.control} {message}" if condition.startswith("contradicted") else message
                    reading = _read(job, method, text, hidden="compared" in condition)
                    found[name][condition][i].append(_scores(reading, answers, "true"))
                    for row in rows[1:] if "compared" not in condition else ():
                        found[row][condition][i].append(_scores(reading, answers, row))
        finally:
            method.remove()
    return found


def _read(job: Job, method: methods.Method, text: str, hidden: bool):
    """The reading of the user's message by the model that `method` has made."""
    system = [] if method.system is None else [{"role": "system", "content": method.system}]
    chat = [*system, {"role": "user", "content": text}]
    steered = nullcontext() if method.adapter is None else job.decoder.base.steering(method.adapter, method.record["strength"], hidden)
    with steered:
        return job.read(chat, SPAN)


def _scores(reading, answers: Sequence[str], source: str) -> list[float]:
    if source == "text_only":
        (values,) = batch.matrix(batch.bare(reading.decoder), [batch.text_only(reading, QUESTION)], answers)
    else:
        values = reading.logprobs(QUESTION, answers, source)
    return [round(value, 5) for value in values]
