"""The QA corpus: authored controls, the shared pool of everyday messages, generic questions, and the split by label."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import yaml

from lqa.corpus.schema import KINDS, QA, Control, read_controls

HERE = Path(__file__).parent
SPLITS = ("train", "validation", "test")


@cache
def load_controls(split: str | None = None) -> tuple[Control, ...]:
    """The authored controls, all or those of one split ("train", "validation", "test")."""
    controls = read_controls(sorted((HERE / "controls").glob("*.yaml")))
    if split is None:
        return tuple(controls)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    sides = split_of(controls)
    return tuple(c for c in controls if sides[c.id] == split)


@cache
def load_messages() -> tuple[str, ...]:
    """Everyday user messages that know nothing of any control."""
    return tuple(yaml.safe_load((HERE / "messages.yaml").read_text(encoding="utf-8")))


@cache
def load_questions() -> dict[str, dict[str, list[str]]]:
    """{kind: {"description": [...], "short": [...]}}: questions asked of every control of a kind; the first is the kind's standard one."""
    return yaml.safe_load((HERE / "questions.yaml").read_text(encoding="utf-8"))


def split_of(controls) -> dict[str, str]:
    """{control id: split}.  Contrast partners, and partners of partners, stay on one side; the side hangs on their ids alone."""
    cluster = {c.id: c.id for c in controls}

    def find(i: str) -> str:
        while cluster[i] != i:
            i = cluster[i]
        return i

    for control in controls:
        for partner in control.contrast:
            a, b = sorted((find(control.id), find(partner)))
            cluster[b] = a
    sides = {}
    for i in cluster:
        share = int(hashlib.sha256(find(i).encode()).hexdigest()[:8], 16) / 16**8
        sides[i] = "test" if share < 0.06 else "validation" if share < 0.12 else "train"
    return sides


def revision() -> str:
    """A hash of the corpus files, for sidecars and results."""
    files = [*sorted((HERE / "controls").glob("*.yaml")), HERE / "messages.yaml", HERE / "questions.yaml"]
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in files)).hexdigest()[:16]


__all__ = ["KINDS", "QA", "SPLITS", "Control", "load_controls", "load_messages", "load_questions", "revision", "split_of"]
