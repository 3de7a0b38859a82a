"""Whether a reply shows a behaviour: rules on its words and its form, and sentence embeddings.  No scorer knows of any decoder.

A scorer is a mapping with the `kind` and the settings of one of these functions, as it stands in steer_persona.yaml.  Each reply is worth
1 or 0; an empty one shows nothing.  Replies are cut after so many tokens: a rule on sentences looks at the full ones alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import py3langid

from lqa.errors import LqaError
from lqa.evals.embedding import similarities


def score(scorer: dict, replies: Sequence[str]) -> list[float]:
    """What each reply is worth.  Raises LqaError for a scorer that there is not."""
    settings = {key: value for key, value in scorer.items() if key != "kind"}
    if scorer["kind"] == "nearer":
        return nearer(replies, **settings)
    rules = {rule.__name__: rule for rule in (words, capitals, sentences, last, lines, brief, language)}
    if (rule := rules.get(scorer["kind"])) is None:
        raise LqaError(f"The scorer {scorer['kind']!r} is unknown; use {', '.join([*rules, 'nearer'])}.")
    return [float(bool(reply.strip()) and rule(reply, **settings)) for reply in replies]


def words(reply: str, patterns: Sequence[str]) -> bool:
    """One of the patterns (regular expressions, case aside) is there as a whole word."""
    return any(re.search(rf"(?<!\w)(?:{pattern})(?!\w)", reply, re.IGNORECASE) for pattern in patterns)


def capitals(reply: str, share: float) -> bool:
    """At least `share` of the letters are upper case."""
    letters = [c for c in reply if c.isalpha()]
    return bool(letters) and sum(map(str.isupper, letters)) >= share * len(letters)


def full_sentences(reply: str) -> list[str]:
    """The sentences that have come to their end; a number with a full stop is none."""
    return re.findall(r"[^.!?\n]*[^\W\d_][^.!?\n]*[.!?]+", reply)


def sentences(reply: str, end: str, share: float) -> bool:
    """At least `share` of the full sentences end with `end`."""
    found = full_sentences(reply)
    return bool(found) and sum(s.endswith(end) for s in found) >= share * len(found)


def last(reply: str, end: str) -> bool:
    """The last full sentence ends with `end`."""
    found = full_sentences(reply)
    return bool(found) and found[-1].endswith(end)


def lines(reply: str, form: str, share: float) -> bool:
    """At least two lines begin as the regular expression `form` says, and these are at least `share` of all that are not empty."""
    found = [line.strip() for line in reply.splitlines() if line.strip()]
    fit = sum(bool(re.match(form, line)) for line in found)
    return fit >= 2 and fit >= share * len(found)


def brief(reply: str, most: int) -> bool:
    """At most so many words."""
    return len(reply.split()) <= most


def language(reply: str, code: str) -> bool:
    """Written in the language with this ISO 639-1 code, as py3langid identifies it among 97."""
    return py3langid.classify(reply)[0] == code


def nearer(replies: Sequence[str], pairs: Sequence[tuple[str, str]], margin: float) -> list[float]:
    """In meaning nearer to texts that show the behaviour than to plain ones: by at least `margin` in the mean cosine similarity.

    The two texts of a pair are about the same matter, so that a reply's own subject cancels.
    """
    shown, plain = (similarities(replies, texts).mean(1) for texts in zip(*pairs, strict=True))
    return [float(bool(reply.strip()) and s - p >= margin) for reply, s, p in zip(replies, shown.tolist(), plain.tolist(), strict=True)]


def distinct(reply: str, n: int = 2) -> float:
    """distinct-n (Li et al. 2016, arXiv:1510.03055) of one reply: different runs of `n` words as a share of all; 1 for a shorter reply."""
    found = reply.lower().split()
    runs = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0
