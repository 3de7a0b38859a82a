"""The suite `sensitivity`: does the answer follow the model's state, where the visible text does not tell, or tells otherwise?

*Swaps*: the system prompt is swapped between two controls A and B of one kind; the user's text, its tokens and the question are the same.

    score   the answer follows the state if log p(A's answer) - log p(B's answer) is larger when A is read than when B is read; how likely
            either sentence is by itself cancels.  Every such pair is one swap.  Equal is half a hit, so `none` has exactly 50 %.
    answer  the same of the free answers: sim(answer, A's reference) - sim(answer, B's reference) is larger for A's answer than for B's
    differ  share of swaps in which the two free answers are different texts at all

`text_only` sees the same text under both and cannot tell them either.

*Inversion* (inversion.yaml): a hidden system prompt states one thing, the user takes the opposite for granted.  Each item has two values x
and y, and is read both ways round: hidden x with y in the text, and hidden y with x in the text.  `score` and `answer` as above with the
answers "x" and "y": a hit follows the state, a miss reports the text, and a reader who always says "x" gets 50 %.  `text_only` knows the
text alone.  *Silent* is the same with a text that says nothing of the matter: what the state alone can tell this reader.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from lqa.errors import LqaError
from lqa.evals import batch, data, embedding
from lqa.evals.data import QUESTIONS, Item
from lqa.evals.embedding import PACKAGE, similarities
from lqa.evals.identify import FIXED_MESSAGE
from lqa.evals.suite import Job, Result, Table, cell

GROUP = 4  # controls whose readings are swapped with each other: 6 swaps
MAX_NEW_TOKENS = 24
COLUMNS = {"score": "%", "answer": "%", "differ": "%"}
CHUNK = 10  # inversion items of one piece of work


class Side(NamedTuple):
    """One reading of a swap: what is hidden, what is visible, the question, and the answer that reports the hidden side."""

    system: str
    message: str
    question: str
    answer: str


class Fact(NamedTuple):
    """An inversion item; `system`, `user` and `answer` have {} where one of the two `values` goes."""

    id: str
    system: str
    user: str
    question: str
    answer: str
    values: tuple[str, str]

    def sides(self, message: str | None = None) -> list[Side]:
        """The item both ways round: each value hidden, the other one in the text (or `message`, which says nothing of it)."""
        return [
            Side(self.system.format(hidden), message or self.user.format(told), self.question, self.answer.format(hidden))
            for hidden, told in (self.values, self.values[::-1])
        ]


@cache
def load_facts() -> tuple[Fact, ...]:
    """The items of inversion.yaml."""
    entries = yaml.safe_load((Path(__file__).parent / "inversion.yaml").read_text(encoding="utf-8"))
    return tuple(Fact(**entry | {"values": tuple(entry["values"])}) for entry in entries)


def groups(items: Sequence[Item], seed: int, size: int = GROUP) -> list[list[Item]]:
    """Seeded groups of `size` items of one kind with different answers; a kind's last group may be smaller, down to 2."""
    rng, found = random.Random(seed), []
    for kind in sorted({item.kind for item in items}):
        pool = list({item.answer: item for item in items if item.kind == kind}.values())
        rng.shuffle(pool)
        found += [pool[start : start + size] for start in range(0, len(pool), size)]
    return [group for group in found if len(group) > 1]


def follows(own_a: float, other_a: float, own_b: float, other_b: float) -> float:
    """1 if reading A prefers A's answer more than reading B does, 0 if less, 1/2 if equal up to rounding.

    own_a, other_a  what A's and B's answer are worth under reading A
    own_b, other_b  what B's and A's answer are worth under reading B
    """
    difference = (own_a - other_a) - (other_b - own_b)
    return 0.5 if abs(difference) < 1e-5 else float(difference > 0)


def swaps(scores: Sequence[Sequence[float]]) -> list[float]:
    """`follows` of every pair of readings: `scores[i][j]` is what answer j is worth under reading i."""
    n = len(scores)
    return [follows(scores[i][i], scores[i][j], scores[j][j], scores[j][i]) for i in range(n) for j in range(i + 1, n)]


def check(folder: Path | None) -> None:
    """Raises LqaError if the data, or the embeddings' package, cannot be had."""
    data.items_of(folder)
    embedding.find()


def run(job: Job) -> Result:
    items, source = data.items_of(job.data)
    found = groups(job.limited(items), job.seed)
    if not found:
        raise LqaError("There are too few items of one kind to swap; raise --limit or give more data.")
    facts = list(load_facts()) if job.limit is None else list(load_facts())[: job.limit]
    sides = [[Side(i.control, FIXED_MESSAGE, QUESTIONS[i.kind], i.answer) for i in group] for group in found]
    names = [[i.label for i in group] for group in found]
    parts = {
        "swaps": (names, sides, 4),
        "inversion": ([[f.id] * 2 for f in facts], [f.sides() for f in facts], CHUNK),
        "silent": ([[f.id] * 2 for f in facts], [f.sides(FIXED_MESSAGE) for f in facts], CHUNK),
    }
    titles = {
        "swaps": ("The system prompt swapped, the text equal: the answer follows the state", "Chance 50%."),
        "inversion": ("The text contradicts the hidden state: the answer follows the state", "Below 50% it reports the text."),
        "silent": ("The same hidden facts under a text that is silent on them", "Chance 50%."),
    }
    tables, entries = {}, []
    total = sum(-(-len(sides) // chunk) for _, sides, chunk in parts.values())
    done = 0
    for part, (labels, sides, chunk) in parts.items():
        rows: dict[str, list[dict]] = {}
        for start in range(0, len(sides), chunk):
            some = slice(start, start + chunk)
            where = f"{part}/{','.join(name for group in labels[some] for name in dict.fromkeys(group))}"
            # The donors come from the next group, so that theirs is not the other side's state.
            donors = [sides[g % len(sides)] for g in range(start + 1, start + 1 + len(sides[some]))]
            for row, results in _measure(job, where, sides[some], donors).items():
                rows.setdefault(row, []).extend(results)
            done += 1
            job.progress(done, total, part)
        hits = {row: [_hits(result, group) for result, group in zip(results, sides, strict=True)] for row, results in rows.items()}
        title, note = titles[part]
        table = {row: [cell([one[name] for one in found]) for name in COLUMNS] for row, found in hits.items()}
        tables[part] = Table(title, COLUMNS, table, note)
        for n, group in enumerate(labels):
            entries.append(
                {
                    "ids": list(dict.fromkeys(group)),
                    "part": part,
                    "answers": {row: results[n]["answers"] for row, results in rows.items()},
                    "scores": {row: [[round(x, 4) for x in line] for line in results[n]["scores"]] for row, results in rows.items()},
                    "follows": {row: found[n] for row, found in hits.items()},
                }
            )
    settings = {"message": FIXED_MESSAGE, "layer": job.decoder.config.default_layer, "questions": QUESTIONS}
    return Result(source, tables, entries, settings=settings | {"max_new_tokens": MAX_NEW_TOKENS, "embedding": PACKAGE})


def _hits(result: dict, group: Sequence[Side]) -> dict[str, list[float]]:
    said, references = result["answers"], [side.answer for side in group]
    n = len(group)
    return {
        "score": swaps(result["scores"]),
        "answer": swaps(similarities(said, references).tolist()),
        "differ": [float(said[i] != said[j]) for i in range(n) for j in range(i + 1, n)],
    }


def _measure(job: Job, where: str, sides: Sequence[Sequence[Side]], donors: Sequence[Sequence[Side]]) -> dict[str, list[dict]]:
    """{row: for every group {"scores": its matrix, "answers": the free ones}}."""
    flat = [side for group in sides for side in group]
    starts = [sum(map(len, sides[:g])) for g in range(len(sides))]
    spans = [range(start, start + len(group)) for start, group in zip(starts, sides, strict=True)]
    pairs = [(i, j) for span in spans for i in span for j in span]  # every reading with every answer of its group

    def read(side: Side, decoder=None):
        return job.read_under(side.system, side.message, decoder)

    def measure(runner: batch.Runner, prompts: dict[str, list[batch.Prompt]]) -> dict[str, list[dict]]:
        asked = [own[i] for own in prompts.values() for i, _ in pairs]
        scores = iter(batch.score(runner, asked, [flat[j].answer for _, j in pairs] * len(prompts)))
        said = iter(batch.texts(runner, [prompt for own in prompts.values() for prompt in own], MAX_NEW_TOKENS))
        return {
            row: [{"scores": [[next(scores) for _ in span] for _ in span], "answers": [next(said) for _ in span]} for span in spans]
            for row in prompts
        }

    def references() -> dict[str, list[dict]]:
        readings = [read(side) for side in flat]
        strangers = [read(donor[k % len(donor)]) for donor, group in zip(donors, sides, strict=True) for k in range(len(group))]
        questions = [side.question for side in flat]
        asked = list(zip(readings, questions, strangers, strict=True))
        sources = {"ours": "true", "none": "none", "shuffled": "shuffled"}
        prompts = {row: [batch.ask(reading, q, source, other) for reading, q, other in asked] for row, source in sources.items()}
        text_only = {"text_only": [batch.text_only(reading, q) for reading, q, _ in asked]}
        return measure(batch.adapted(job.decoder), prompts) | measure(batch.bare(job.decoder), text_only)

    rows = job.once(where, references)
    for name, decoder in job.further.items():

        def more(decoder=decoder) -> dict[str, list[dict]]:
            return measure(batch.adapted(decoder), {"results": [batch.ask(read(side, decoder), side.question) for side in flat]})

        rows = rows | {name: job.once(f"{where}/{name}", more)["results"]}
    return rows
