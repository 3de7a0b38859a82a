"""The QA corpus: authored controls, the shared pool of everyday messages, generic questions, and the split by label."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
def load_messages(split: str | None = None) -> tuple[str, ...]:
    """Everyday user messages that know nothing of any control, all or those of one split."""
    messages = yaml.safe_load((HERE / "messages.yaml").read_text(encoding="utf-8"))
    return tuple(m for m in messages if split is None or message_side(m) == split)


def message_side(message: str) -> str:
    """The split that a message of the pool belongs to: a tenth each for validation and test, by its text alone."""
    place = _place(message)
    return "test" if place < 0.1 else "validation" if place < 0.2 else "train"


@cache
def load_questions() -> dict[str, dict[str, list[str]]]:
    """{kind: {"description": [...], "short": [...]}}: questions asked of every control of a kind; the first is the kind's standard one."""
    return yaml.safe_load((HERE / "questions.yaml").read_text(encoding="utf-8"))


def cluster_of(controls) -> dict[str, str]:
    """{control id: id that stands for its cluster}: contrast partners, and partners of partners, hang together."""
    cluster = {c.id: c.id for c in controls}

    def find(i: str) -> str:
        while cluster[i] != i:
            i = cluster[i]
        return i

    for control in controls:
        for partner in control.contrast:
            a, b = sorted((find(control.id), find(partner)))
            cluster[b] = a
    return {i: find(i) for i in cluster}


def _place(name: str) -> float:
    """Where in [0, 1) a cluster or a message stands, by its name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8


def split_of(controls) -> dict[str, str]:
    """{control id: split}; a cluster is never divided."""
    sides = {}
    for i, cluster in cluster_of(controls).items():
        place = _place(cluster)
        sides[i] = "test" if place < 0.06 else "validation" if place < 0.12 else "train"
    return sides


def share_of(controls: Sequence[Control], share: float) -> tuple[Control, ...]:
    """About `share` of `controls` in whole clusters; a smaller share is part of a larger one.  ValueError unless 0 < share <= 1."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of the controls must be above 0 and at most 1, not {share}")
    clusters = cluster_of(controls)
    first = set(sorted(set(clusters.values()), key=lambda c: _place(f"share/{c}"))[: max(1, round(share * len(set(clusters.values()))))])
    return tuple(c for c in controls if clusters[c.id] in first)


def revision() -> str:
    """A hash of the corpus files, for sidecars and results."""
    files = [*sorted((HERE / "controls").glob("*.yaml")), HERE / "messages.yaml", HERE / "questions.yaml"]
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in files)).hexdigest()[:16]


__all__ = [
    "KINDS",
    "QA",
    "SPLITS",
    "Control",
    "cluster_of",
    "load_controls",
    "load_messages",
    "load_questions",
    "message_side",
    "revision",
    "share_of",
    "split_of",
]
