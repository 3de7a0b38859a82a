"""Figures of a corpus, side by side with those of another one, and a random draw of its items.

A corpus is a folder: one that `data build`, `data import-latentqa` or `data generate` wrote (Parquet), or LatentQA's JSON files.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lqa.corpus.checks import NEAR, duplicates_across, leaks, question_only
from lqa.errors import LqaError

Splits = dict[str, list[dict]]


def load_readings(folder: str | Path) -> Splits:
    """{split: rows} of a corpus folder (lqa.corpus.readings).  Raises LqaError if it holds none."""
    folder = Path(folder)
    for place in (folder / "latentqa", folder):
        if files := sorted(place.glob("*.parquet")):
            return {path.name.split("-")[0]: _read(path) for path in files}
    from lqa.corpus.latentqa import FILES, read_latentqa

    if any(True for name in FILES for _ in folder.rglob(name)):
        return read_latentqa(folder)
    raise LqaError(f"{folder} holds no corpus (no latentqa/*.parquet, and none of LatentQA's JSON files); name the folder of one.")


def _read(path: Path) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise LqaError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]}); build or download it again.") from error


def statistics(splits: Splits) -> dict:
    """The figures of a corpus.  QA pairs are counted once per control, however many of its readings carry them."""
    rows = [row for part in splits.values() for row in part]
    pairs = {(row["label"], p["question"], p["answer"]): p for row in rows for p in row["qa"]}
    questions = [question for _, question, _ in pairs]
    specific = [question for (_, question, _), p in pairs.items() if not p["generic"]]
    answers = [text for (*_, answer), p in pairs.items() for text in (answer, *p["alternatives"])]
    controls = {row["label"]: row["chat"][0]["content"] for row in rows}
    lengths = [len(a.split()) for a in answers]
    messages = [row["message"] for row in rows]

    def share(part: Sequence, whole: Sequence) -> float | None:
        return len(part) / len(whole) if whole else None

    return {
        "splits": {name: len(part) for name, part in splits.items()},
        "readings": len(rows),
        "forms": dict(sorted(Counter(row["form"] for row in rows).items())),
        "readings with a message of the pool": share([m for m in messages if m == "pool"], messages),
        "controls": len(controls),
        "kinds": dict(Counter(label.split("-")[0] for label in controls).most_common()),
        "categories": dict(sorted(Counter("-".join(label.split("-")[:2]) for label in controls).items())),
        "QA pairs": len(pairs),
        "QA pairs per control": len(pairs) / len(controls) if controls else None,
        "types": dict(Counter(p["type"] for p in pairs.values()).most_common()),
        "distinct questions": share(set(questions), questions),
        "distinct among specific questions": share(set(specific), specific),
        "question words, mean": _mean(questions),
        "answer words, mean": _mean(answers),
        "answer words, shortest": min(lengths, default=None),
        "answer words, longest": max(lengths, default=None),
        "control words, mean": _mean(list(controls.values())),
        "type-token ratio, questions": type_token_ratio(questions),
        "type-token ratio, answers": type_token_ratio(answers),
        "type-token ratio, controls": type_token_ratio(list(controls.values())),
        "question-only picker, 8 of the same kind": question_only(rows),
        "question-only picker, 8 of any kind": question_only(rows, same_kind=False),
        f"near-duplicates across splits (Jaccard {NEAR})": len(duplicates_across(splits)),
        "leaks": len(leaks(rows)),
    }


def _mean(texts: Sequence[str]) -> float | None:
    return sum(len(t.split()) for t in texts) / len(texts) if texts else None


def type_token_ratio(texts: Sequence[str], n: int = 10_000, seed: int = 0) -> float | None:
    """Distinct words among the first n words of the texts in a seeded order: a ratio over all words falls with a corpus's size."""
    texts = sorted(texts)
    random.Random(seed).shuffle(texts)
    words = [w for text in texts for w in re.findall(r"[a-z']+", text.lower())][:n]
    return len(set(words)) / len(words) if words else None


def _shown(name: str, value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        share = name.startswith(("distinct", "readings with", "question-only"))
        return f"{value:.1%}" if share else f"{value:.3f}" if name.startswith("type-token") else f"{value:.1f}"
    return f"{value:,}"


def table(columns: dict[str, dict]) -> str:
    """{title: statistics} side by side, as Markdown."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    first = next(iter(columns.values()))
    for name, value in first.items():
        values = [column[name] for column in columns.values()]
        if isinstance(value, dict):
            keys = list(dict.fromkeys(key for v in values for key in v))
            lines += [f"| {name}: {key} | " + " | ".join(_shown(name, v.get(key)) for v in values) + " |" for key in keys]
        else:
            lines.append(f"| {name} | " + " | ".join(_shown(name, v) for v in values) + " |")
    return "\n".join(lines)


def sample(splits: Splits, n: int, seed: int = 0) -> str:
    """n readings drawn at random, each with its chat and one question of each type, as text to be read by people."""
    rows = [(name, row) for name, part in splits.items() for row in part]
    if n < 1:
        raise LqaError(f"--sample must be at least 1, not {n}.")
    rng, blocks = random.Random(seed), []
    for name, row in rng.sample(rows, min(n, len(rows))):
        lines = [f"--- {row['id']}  ({name}, {row['form']}, span {row['span']})"]
        lines += [f"{m['role']}: {m['content']}" for m in row["chat"]]
        of_type: dict[str, list[dict]] = {}
        for p in row["qa"]:
            of_type.setdefault(p["type"], []).append(p)
        for pairs in of_type.values():
            p = rng.choice(pairs)
            lines += [f"  Q: {p['question']}", *(f"  A: {text}" for text in (p["answer"], *p["alternatives"]))]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
