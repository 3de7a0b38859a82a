"""Evaluation items from the package's own test split, or from outside data that is read in place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lqa.corpus import load_controls, revision
from lqa.errors import LqaError
from lqa.evals.identify import QUESTIONS, Item

LATENTQA_HOME = "https://github.com/aypan17/latentqa (folder data/eval)"


def corpus_items(split: str = "test") -> tuple[list[Item], dict]:
    """The authored controls of a split, each with its first stimulus as its own message; and what they are: name, sha256."""
    items = [Item(c.id, c.kind, c.control, c.stimuli[0], c.descriptions[0]) for c in load_controls(split)]
    return items, {"name": f"own {split} split", "sha256": revision()}


def latentqa_items(folder: str | Path) -> tuple[list[Item], dict]:
    """The system items of LatentQA's evaluation labels that have QA, and what they are: name, sha256 of the two files.

    They are looked for in `folder`, its latentqa/eval_dev, and its latentqa.

    Raises LqaError that names the data's public home.
    """
    for place in (Path(folder), Path(folder, "latentqa", "eval_dev"), Path(folder, "latentqa")):
        if (place / "system.json").is_file() and (place / "qa.json").is_file():
            break
    else:
        raise LqaError(f"{folder} holds no system.json and qa.json of LatentQA; get them from {LATENTQA_HOME}.")
    digest = hashlib.sha256(b"".join((place / name).read_bytes() for name in ("system.json", "qa.json"))).hexdigest()
    try:
        qa = json.loads((place / "qa.json").read_text(encoding="utf-8"))
        items = [
            Item(entry["label"], entry["label"].split("-")[0], entry["system"], entry["stimulus_user"], qa[entry["label"]][0][1])
            for entry in json.loads((place / "system.json").read_text(encoding="utf-8"))
            if entry["label"] in qa
        ]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LqaError(f"{place} is not in LatentQA's format ({type(error).__name__}: {error}); get it from {LATENTQA_HOME}.") from error
    items = [item for item in items if item.kind in QUESTIONS]
    if not items:
        raise LqaError(f"{place} holds no item with a question; get the data from {LATENTQA_HOME}.")
    return items, {"name": "LatentQA evaluation labels, system items", "sha256": digest}
