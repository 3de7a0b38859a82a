"""Evaluation items from the package's own test split, or from outside data that is read in place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from lqa.corpus import load_controls, load_questions, revision
from lqa.corpus.completions import load_completions
from lqa.corpus.readings import FORMS
from lqa.errors import LqaError

LATENTQA_HOME = "https://github.com/aypan17/latentqa (folder data/eval)"
RELATIONS_HOME = "https://github.com/PAIR-code/interpretability (folder patchscopes/code/preprocessed_data/factual)"
CROWS_PAIRS_HOME = "https://github.com/nyu-mll/crows-pairs (file data/crows_pairs_anonymized.csv)"
QUESTIONS = {kind: questions["description"][0] for kind, questions in load_questions().items()}  # one generic question per kind
DATA_FILES = (".json", ".jsonl", ".tsv", ".csv")

# LatentQA's names for the parts of a chat, by read form: control, acknowledgement, message, reply.
LATENTQA_FIELDS = {
    "system": ("system", None, "stimulus_user", None),
    "control": ("control_user", None, None, None),
    "stimulus": ("control_user", "control_model", "stimulus_user", None),
    "stimulus_completion": ("control_user", "control_model", "stimulus_user", "stimulus_model"),
}


class Item(NamedTuple):
    """A control to identify: its label, kind, text, own message, and the first (descriptive) answer about it.

    Further what read forms other than `system` need, and, where they are known, the labels of its near-neighbours, questions about this
    control alone with their answers (`own`), and a label of a few words (`short`).
    """

    label: str
    kind: str
    control: str
    message: str
    answer: str
    acknowledgement: str = ""
    reply: str = ""
    contrast: tuple[str, ...] = ()
    own: tuple[tuple[str, str], ...] = ()
    short: str = ""

    @property
    def category(self) -> str:
        return "-".join(self.label.split("-")[:2])


def check_folder(folder: str | Path | None) -> None:
    """Raises LqaError, which names the data's public homes, if there is no such folder (None: the package's own data)."""
    if folder is not None and not Path(folder).is_dir():
        homes = f"LatentQA's from {LATENTQA_HOME}, the relations from {RELATIONS_HOME}"
        raise LqaError(f"There is no folder {folder} with evaluation data; leave --data out, or get {homes}.")


def digest(folder: Path | None) -> str:
    """A sha256 of the names and contents of all data files in `folder`; of the corpus for None."""
    if folder is None:
        return revision()
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in DATA_FILES and p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def items_of(folder: str | Path | None, form: str = "system") -> tuple[list[Item], dict[str, str]]:
    """The items of a read form from outside data, or from the package's own test split for None, and what they are: name, sha256."""
    return latentqa_items(folder, form) if folder is not None else corpus_items(form=form)


def forms_of(folder: str | Path | None) -> list[str]:
    """The read forms that there are items of."""
    if folder is not None:
        return [form for form in FORMS if _latentqa_place(folder, form)]
    return [form for form in FORMS if corpus_items(form=form)[0]]


def _latentqa_place(folder: str | Path, form: str) -> Path | None:
    places = (Path(folder), Path(folder, "latentqa", "eval_dev"), Path(folder, "latentqa"))
    return next((p for p in places if (p / f"{form}.json").is_file() and (p / "qa.json").is_file()), None)


def corpus_items(split: str = "test", form: str = "system") -> tuple[list[Item], dict[str, str]]:
    """The authored controls of a split, each with its first stimulus as its own message; and what they are: name, sha256.

    Of the form "stimulus_completion" there are as many as have a sampled reply (`python -m lqa data complete`).
    """
    controls = load_controls(split)
    messages = {c.id: (c.stimuli[0], "") for c in controls}
    if form == "stimulus_completion":
        messages = {label: (found[0]["message"], found[0]["reply"]) for label, found in load_completions(controls)[0].items()}
    items = []
    for c in controls:
        if c.id in messages:
            message, reply = messages[c.id]
            own = tuple((pair.question, pair.answer) for pair in c.qa)
            items.append(Item(c.id, c.kind, c.control, message, c.descriptions[0], c.acknowledgement, reply, c.contrast, own, c.short))
    return items, {"name": f"own {split} split", "sha256": revision()}


def latentqa_items(folder: str | Path, form: str = "system") -> tuple[list[Item], dict[str, str]]:
    """The items of a read form of LatentQA's evaluation labels that have QA, and what they are: name, sha256 of the two files.

    They are looked for in `folder`, its latentqa/eval_dev, and its latentqa.

    Raises LqaError that names the data's public home.
    """
    place = _latentqa_place(folder, form)
    if place is None:
        raise LqaError(f"{folder} holds no {form}.json and qa.json of LatentQA; get them from {LATENTQA_HOME}.")
    sha256 = hashlib.sha256(b"".join((place / name).read_bytes() for name in (f"{form}.json", "qa.json"))).hexdigest()
    try:
        qa = json.loads((place / "qa.json").read_text(encoding="utf-8"))
        items = []
        for entry in json.loads((place / f"{form}.json").read_text(encoding="utf-8")):
            if entry["label"] in qa:
                control, acknowledgement, message, reply = (entry[name] if name else "" for name in LATENTQA_FIELDS[form])
                label, own = entry["label"], tuple((q, a) for q, a in qa[entry["label"]])
                items.append(Item(label, label.split("-")[0], control, message, own[0][1], acknowledgement, reply, own=own))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LqaError(f"{place} is not in LatentQA's format ({type(error).__name__}: {error}); get it from {LATENTQA_HOME}.") from error
    items = [item for item in items if item.kind in QUESTIONS]
    if not items:
        raise LqaError(f"{place} holds no item with a question; get the data from {LATENTQA_HOME}.")
    return items, {"name": f"LatentQA evaluation labels, {form} items", "sha256": sha256}
