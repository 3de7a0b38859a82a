"""The importer: LatentQA's JSON files (Pan et al. 2024; github.com/aypan17/latentqa, folder data) in this corpus's schema."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from lqa.corpus.readings import FORMS
from lqa.errors import LqaError

HOME = "https://github.com/aypan17/latentqa"
QA_FILE = "qa.json"
FILES = {f"{form}.json": form for form in FORMS}
# The turns of each form: (role, key of the entry).
TURNS = {
    "control": [("user", "control_user")],
    "stimulus": [("user", "control_user"), ("assistant", "control_model"), ("user", "stimulus_user")],
    "system": [("system", "system"), ("user", "stimulus_user")],
}
TURNS["stimulus_completion"] = [*TURNS["stimulus"], ("assistant", "stimulus_model")]


def _load(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LqaError(f"{path} cannot be read as JSON ({str(error).splitlines()[0]}); get it again from {HOME}.") from error


def _pairs(path: Path) -> dict[str, list[dict]]:
    """{label: pairs}; the first pair of a label is its description, the others ask what the model would do."""
    found = _load(path) if path.is_file() else {}
    try:
        return {
            label: [
                {"question": q, "answer": a, "alternatives": [], "type": "reasoning" if i else "description", "generic": False}
                for i, (q, a) in enumerate(pairs)
                if q + a  # both are text, or this raises
            ]
            for label, pairs in found.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise LqaError(f"{path} is not in LatentQA's format, {{label: [[question, answer], ...]}}; get it again from {HOME}.") from error


def _rows(folder: Path) -> list[dict]:
    pairs, rows, seen = _pairs(folder / QA_FILE), [], Counter()
    for name, form in FILES.items():
        if not (folder / name).is_file():
            continue
        entries = _load(folder / name)
        for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            keys = ["label", *(key for _, key in TURNS[form])]
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) and entry[key].strip() for key in keys):
                raise LqaError(f"{folder / name}: entry {i} needs the text fields {', '.join(keys)}; get the file again from {HOME}.")
            label = entry["label"]
            kind, category, *_ = [*label.split("-"), "", ""]
            rows.append(
                {
                    "id": f"{label}/{seen[label]}",
                    "label": label,
                    "kind": kind,
                    "category": category,
                    "form": form,
                    "chat": [{"role": role, "content": entry[key]} for role, key in TURNS[form]],
                    "span": FORMS[form],
                    "message": "none" if form == "control" else "own",
                    "model": None,
                    "qa": pairs.get(label, []),
                    "contrast": [],
                }
            )
            seen[label] += 1
    return rows


def _split(folder: Path) -> str:
    name = folder.name.lower()
    return next((split for split in ("train", "validation") if name.startswith(split[:5])), "test")


def read_latentqa(folder: str | Path) -> dict[str, list[dict]]:
    """{split: rows} of the JSON files in `folder` and its sub-folders, any subset of them; the folder's name says the split.

    "train..." and "valid..." are those splits, anything else ("eval", "eval_dev") is "test".  Labels without QA keep their chats.
    Raises LqaError, naming file and entry, for what is not in LatentQA's format.
    """
    folder = Path(folder)
    splits: dict[str, list[dict]] = {}
    for place in sorted({path.parent for name in FILES for path in folder.rglob(name)}):
        splits.setdefault(_split(place.resolve()), []).extend(_rows(place))
    if not any(splits.values()):
        raise LqaError(f"{folder} holds none of {', '.join(FILES)} with entries in them; get LatentQA's data from {HOME}.")
    return dict(sorted(splits.items(), key=lambda item: ("train", "validation", "test").index(item[0])))


def import_latentqa(folder: str | Path, out: str | Path) -> dict[str, list[dict]]:
    """Writes the dataset folder `out` with the config `latentqa` from LatentQA's JSON files; returns its {split: rows}."""
    from lqa.corpus.build import write_dataset

    splits = read_latentqa(folder)
    without = len({row["label"] for part in splits.values() for row in part if not row["qa"]})
    if without:
        print(f"{without} labels have no question in {QA_FILE}; their chats are kept.", file=sys.stderr)
    write_dataset(
        out,
        {"latentqa": splits},
        lambda info: (
            "---\n" + info + "---\n\n# LatentQA, imported\n\n"
            f"The data of LatentQA (Pan, Chen and Steinhardt, arXiv:2412.08686; {HOME}, Apache-2.0) in the schema of the `lqa` corpus.\n"
        ),
    )
    return splits
