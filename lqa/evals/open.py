"""The suite `open`: free answers to held-out questions, held against the reference answer.

    fixed   every control read under the same message, so that nothing visible tells them apart
    own     every control read under the message written for it

each with one generic question for all controls of a kind, and with each control's own question, whose words may give the answer away: what
the question alone achieves is the row `none`.

    similarity  cosine of the sentence embeddings of answer and reference
    generic     share of answers that fit another control as well: of (up to) 7 others of the kind, drawn with the seed, at least one has a
                reference that the answer is at least as similar to as to its own.  A blind guess is generic in 7 of 8 cases.
    key words   of the short answer that was written for a control, the share of content words that the answer to a generic short question
                has (the package's own data only)
    judge       the mean score of a language model by rubric.yaml, as a share of the highest; only where an endpoint was configured
                (lqa.evals.judge)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lqa.corpus import load_questions
from lqa.corpus.schema import content_words
from lqa.errors import LqaError
from lqa.evals import batch, data, embedding
from lqa.evals.data import QUESTIONS, Item
from lqa.evals.embedding import PACKAGE, similarities
from lqa.evals.identify import FIXED_MESSAGE
from lqa.evals.suite import Cell, Job, Result, Table, cell

OTHERS = 7  # controls that an answer is compared with
MAX_NEW_TOKENS = 32
CHUNK = 32  # items answered as one piece of work
SHORT = {kind: questions["short"][0] for kind, questions in load_questions().items()}


class Case(NamedTuple):
    """An item with what it is asked, the reference answer, and the message that is visible."""

    item: Item
    question: str
    reference: str
    message: str


TITLES = {
    "fixed-generic": "Every control under the same message, one generic question",
    "fixed-own": "Every control under the same message, its own question",
    "fixed-short": "Every control under the same message, a generic question for a few words",
    "own-generic": "Each control under its own message, one generic question",
    "own-own": "Each control under its own message, its own question",
}


def cases_of(items: Sequence[Item]) -> dict[str, list[Case]]:
    """The cases of every table, the fixed message first; a table holds the items that have what it asks for."""

    def generic(message: str | None) -> list[Case]:
        return [Case(i, QUESTIONS[i.kind], i.answer, message or i.message) for i in items]

    def own(message: str | None) -> list[Case]:
        return [Case(i, *i.own[0], message or i.message) for i in items if i.own]

    short = [Case(i, SHORT[i.kind], i.short, FIXED_MESSAGE) for i in items if i.short]
    found = zip(TITLES, (generic(FIXED_MESSAGE), own(FIXED_MESSAGE), short, generic(None), own(None)), strict=True)
    return {name: cases for name, cases in found if cases}


def ring(items: Sequence[Item], seed: int) -> list[int]:
    """For every item the index of its donor: the next of its kind in a seeded order; of all items where it is alone in its kind."""
    rng, donor = random.Random(seed), [0] * len(items)
    for kind in sorted({item.kind for item in items}):
        own = [i for i, item in enumerate(items) if item.kind == kind]
        rng.shuffle(own)
        for i, j in zip(own, [*own[1:], own[0]], strict=True):
            donor[i] = j if i != j else (i + 1) % len(items)
    return donor


def others(items: Sequence[Item], references: Sequence[str], seed: int, n: int = OTHERS) -> list[list[int]]:
    """For every item the indices of up to n others of its kind, seeded, whose references differ from its own and from each other."""
    rng, found = random.Random(seed), []
    for item, reference in zip(items, references, strict=True):
        pool = [j for j, other in enumerate(items) if other.kind == item.kind]
        chosen, seen = [], {reference}
        for j in rng.sample(pool, len(pool)):
            if len(chosen) < n and references[j] not in seen:
                chosen.append(j)
                seen.add(references[j])
        found.append(chosen)
    return found


def is_generic(similarity: Tensor, own: int, rivals: Sequence[int]) -> float | None:
    """1 if the answer with these similarities to all references is at least as similar to a rival's as to its own; None without rivals."""
    return float(max(similarity[j].item() for j in rivals) >= similarity[own].item() - 1e-6) if rivals else None


def key_words(answer: str, short: str) -> float | None:
    """The share of the content words of `short` that `answer` has; None if it has none."""
    wanted = content_words(short)
    return len(wanted & content_words(answer)) / len(wanted) if wanted else None


def answer(job: Job, part: str, cases: Sequence[Case]) -> dict[str, list[str]]:
    """{row: answers} to the cases of a table."""
    donor = ring([case.item for case in cases], job.seed)
    rows: dict[str, list[str]] = {}
    # Spans of one length are decoded together, so that cases of similar length make a piece of work.
    order = sorted(range(len(cases)), key=lambda i: (len(cases[i].message), i))
    chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
    for number, chunk in enumerate(chunks):
        for row, said in _answer(job, part, cases, donor, chunk).items():
            for i, text in zip(chunk, said, strict=True):
                rows.setdefault(row, [""] * len(cases))[i] = text
        job.progress(number + 1, len(chunks), part)
    return rows


def _answer(job: Job, part: str, cases: Sequence[Case], donor: Sequence[int], chunk: Sequence[int]) -> dict[str, list[str]]:
    questions = [cases[i].question for i in chunk]
    # Named by its items: another limit or order is another piece of work.
    where = f"{part}/{','.join(cases[i].item.label for i in chunk)}"

    def read(i: int, decoder=None):
        return job.read_under(cases[i].item.control, cases[i].message, decoder)

    def references() -> dict[str, list[str]]:
        readings = {i: read(i) for i in sorted({*chunk, *(donor[i] for i in chunk)})}
        asked = list(zip([readings[i] for i in chunk], questions, [readings[donor[i]] for i in chunk], strict=True))
        prompts = [batch.ask(reading, q, source, other) for source in ("true", "none", "shuffled") for reading, q, other in asked]
        said, n = batch.texts(batch.adapted(job.decoder), prompts, MAX_NEW_TOKENS), len(chunk)
        text_only = batch.texts(batch.bare(job.decoder), [batch.text_only(reading, q) for reading, q, _ in asked], MAX_NEW_TOKENS)
        return {"ours": said[:n], "none": said[n : 2 * n], "shuffled": said[2 * n :], "text_only": text_only}

    rows = job.once(where, references)
    for name, decoder in job.further.items():

        def more(decoder=decoder) -> dict[str, list[str]]:
            prompts = [batch.ask(read(i, decoder), q) for i, q in zip(chunk, questions, strict=True)]
            return {"said": batch.texts(batch.adapted(decoder), prompts, MAX_NEW_TOKENS)}

        rows = rows | {name: job.once(f"{where}/{name}", more)["said"]}
    return rows


def check(folder: Path | None) -> None:
    """Raises LqaError if the data, or the embeddings' package, cannot be had."""
    data.items_of(folder)
    embedding.find()


def run(job: Job) -> Result:
    everything, source = data.items_of(job.data)
    items, entries = job.limited(everything), []
    if len(items) < 2:
        raise LqaError("An answer is held against those to other controls: open needs at least 2 items; raise --limit or give more data.")
    for part, cases in cases_of(items).items():
        entries += scored(part, cases, answer(job, part, cases), job.seed)
    settings = {"message": FIXED_MESSAGE, "layer": job.decoder.config.default_layer, "questions": QUESTIONS}
    settings |= {"others": OTHERS, "max_new_tokens": MAX_NEW_TOKENS, "embedding": PACKAGE}
    return Result(source, tables(entries), entries, settings=settings)


def scored(part: str, cases: Sequence[Case], rows: dict[str, list[str]], seed: int) -> list[dict]:
    """An entry per case: id, part, the others it is compared with, and for every row the answer and its scores."""
    references = [case.reference for case in cases]
    rivals = others([case.item for case in cases], references, seed)
    entries = [
        {"id": case.item.label, "part": part, "others": [cases[j].item.label for j in rivals[i]], "answers": {}, "scores": {}}
        for i, case in enumerate(cases)
    ]
    for row, texts in rows.items():
        close = similarities(texts, references)
        for i, entry in enumerate(entries):
            scores = {"similarity": round(close[i, i].item(), 4), "generic": is_generic(close[i], i, rivals[i])}
            if part == "fixed-short":
                scores["key words"] = key_words(texts[i], references[i])
            entry["answers"][row], entry["scores"][row] = texts[i], scores
    return entries


def tables(entries: Sequence[dict]) -> dict[str, Table]:
    """The tables of `scored` entries, whatever scores they have: means over the entries that have one."""
    found = {}
    for part in TITLES:
        own = [entry for entry in entries if entry["part"] == part]
        if not own:
            continue
        names = list(next(iter(own[0]["scores"].values())))
        rows: dict[str, list[Cell | None]] = {}
        for row in own[0]["scores"]:
            values = [[entry["scores"][row][name] for entry in own] for name in names]
            rows[row] = [cell([[v] for v in column if v is not None]) if any(v is not None for v in column) else None for column in values]
        sizes = [len(entry["others"]) for entry in own if entry["others"]]
        note = f"Generic by chance: {sum(n / (n + 1) for n in sizes) / len(sizes):.1%}." if sizes else ""
        found[part] = Table(TITLES[part], {name: "" if name == "similarity" else "%" for name in names}, rows, note)
    return found
