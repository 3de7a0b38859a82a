"""Checks of the corpus as a whole, which fail a build; what concerns a single control is in `lqa.corpus.schema`.

Near-duplicates are found by MinHash over three-word shingles and confirmed by the exact Jaccard similarity, so that none is a false
alarm.  Contamination is looked for by wording (the same) and by meaning (sentence embeddings that the package wordllama carries).
"""

from __future__ import annotations

import logging
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lqa.corpus.schema import MAX_SHARED_QUESTION, MAX_SHARED_STIMULUS, WORDS, Control, content_words

NEAR = 0.7  # Jaccard similarity of shingles from which on two texts are near-duplicates
CLOSE = 0.8  # cosine of sentence embeddings; paraphrases of one control lie at 0.8 to 0.95, neighbours of one category below 0.7
SHINGLE = 3  # words
PERMUTATIONS, BANDS = 128, 32  # finds a pair at NEAR with a probability of 99.98 %
BALANCE = 3.0  # no category may be more than this many times larger or smaller than their mean
MAX_PICKER = 0.25  # of the question-only picker among eight; chance is 0.125
MESSAGE_WORDS = (2, 45)  # of the pool

_PRIVATE = {
    "an e-mail address": r"[\w.+-]+@[\w-]+\.\w{2,}",
    "a web address": r"(?:https?://|www\.)\S+",
    "a telephone number": r"(?<![\w.])(?:\+\d|\(?0\d)[\d ()/-]{7,}\d(?!\w)|\b\d{3}[ .-]\d{3}[ .-]\d{4}\b",
    "an account number": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b",
}
# A safety net for generated personas and no proof: people whom models like to imitate, and who can be hurt by it.
_LIVING = (
    "Adele|Angela Merkel|Arnold Schwarzenegger|Barack Obama|Bernie Sanders|Beyonc.|Bill Gates|Billie Eilish|Boris Johnson|"
    "Cristiano Ronaldo|Dalai Lama|David Attenborough|David Beckham|Donald Trump|Dwayne Johnson|Elon Musk|Emma Watson|Eminem|"
    r"Emmanuel Macron|Geoffrey Hinton|George Clooney|Gordon Ramsay|Greta Thunberg|Hillary Clinton|J\.? ?K\.? Rowling|Jackie Chan|"
    "Jamie Oliver|Jeff Bezos|Joe Biden|Jordan Peterson|Kamala Harris|Kanye West|Keanu Reeves|Keir Starmer|Kim Jong[ -]un|"
    "Kim Kardashian|King Charles III|LeBron James|Lionel Messi|Linus Torvalds|Margaret Atwood|Mark Zuckerberg|Michelle Obama|"
    "Morgan Freeman|Narendra Modi|Neil deGrasse Tyson|Noam Chomsky|Oprah Winfrey|Paul McCartney|Pope Leo|Richard Dawkins|Rihanna|"
    "Roger Federer|Sam Altman|Serena Williams|Snoop Dogg|Stephen Fry|Stephen King|Taylor Swift|Tim Cook|Tom Cruise|Tom Hanks|"
    "Usain Bolt|Vladimir Putin|Volodymyr Zelensky?y|Warren Buffett|Xi Jinping|Yuval Noah Harari"
)
_LIVING_NAMES = re.compile(rf"\b(?:{_LIVING})\b")


class Pair(NamedTuple):
    """Two texts, by their indices, that are too similar."""

    first: int
    second: int
    similarity: float


def shingles(text: str) -> frozenset[str]:
    """The runs of SHINGLE words of `text`, lower-cased; all of it where it is shorter."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def near_duplicates(texts: Sequence[str], threshold: float = NEAR) -> list[Pair]:
    """The pairs (first < second) of `texts` whose shingles have a Jaccard similarity of at least `threshold`."""
    from rensa import RMinHash, RMinHashLSH

    sets = [shingles(text) for text in texts]
    index = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
    found = []
    for i, words in enumerate(sets):
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=0)
        sketch.update(sorted(words))
        for j in sorted(index.query(sketch)):
            similarity = len(words & sets[j]) / len(words | sets[j])
            if similarity >= threshold:
                found.append(Pair(j, i, similarity))
        index.insert(i, sketch)
    return found


def embed(texts: Sequence[str]):
    """Sentence embeddings (len(texts), 256) of length 1, from a model that lies in a package: no download."""
    level = logging.getLogger().level
    import wordllama  # sets up the root logger, which is ours to set

    logging.getLogger().setLevel(level)
    model = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    return model.embed(list(texts), norm=True)


def contamination(own: Sequence[dict], other: Sequence[dict]) -> list[str]:
    """A sentence for every control and QA pair of the rows `own` that is close, by wording or meaning, to one of the rows `other`."""
    found = []
    for what, parts in (("control", _controls), ("pair", _pairs)):
        mine, theirs = parts(own), parts(other)
        if not mine or not theirs:
            continue
        texts = [text for _, text in mine] + [text for _, text in theirs]
        close = {(i, j - len(mine)): s for i, j, s in near_duplicates(texts) if i < len(mine) <= j}
        alike = embed(texts[: len(mine)]) @ embed(texts[len(mine) :]).T
        close |= {(int(i), int(j)): float(alike[i, j]) for i, j in zip(*(alike >= CLOSE).nonzero(), strict=True)}
        for (i, j), similarity in sorted(close.items()):
            found.append(f"{mine[i][0]}: the {what} {mine[i][1]!r} is close ({similarity:.2f}) to {theirs[j][1]!r} of {theirs[j][0]}")
    return found


def _controls(rows: Sequence[dict]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["label"], row["chat"][0]["content"]) for row in rows))


def _pairs(rows: Sequence[dict]) -> list[tuple[str, str]]:
    """Specific questions with their answers, and the descriptions alone; generic questions and short labels are shared by design."""
    found = {}
    for row in rows:
        for p in row["qa"]:
            texts = [p["answer"], *p["alternatives"]] if p["generic"] else [f"{p['question']} {p['answer']}"]
            if not (p["generic"] and p["type"] == "short"):
                found |= {(row["label"], text): None for text in texts}
    return list(found)


def _messages(rows: Sequence[dict]) -> list[tuple[str, str]]:
    texts = {row["chat"][1 if row["form"] == "system" else 2]["content"]: row["label"] for row in rows if row["form"] != "control"}
    return [(label, text) for text, label in texts.items()]


def side_of(split: str) -> str:
    """The side that a split belongs to: "test" for "test" and "test_pool"."""
    return split.split("_")[0]


def duplicates_across(splits: dict[str, list[dict]], threshold: float = NEAR) -> list[str]:
    """A sentence for every control, message and QA pair of one side that has a near-duplicate on another."""
    found = []
    for what, parts in (("control", _controls), ("message", _messages), ("pair", _pairs)):
        entries = [(name, *entry) for name, rows in splits.items() for entry in parts(rows)]
        for i, j, similarity in near_duplicates([text for *_, text in entries], threshold):
            (a, label, text), (b, other_label, other) = entries[i], entries[j]
            if side_of(a) != side_of(b):
                found.append(f"{label} ({a}): the {what} {text!r} is close ({similarity:.2f}) to {other!r} of {other_label} ({b})")
    return found


def leaks(rows: Sequence[dict]) -> list[str]:
    """A sentence for every message or specific question that shares more content words with its control than the schema allows."""
    found = {}
    for row in rows:
        words = content_words(row["chat"][0]["content"])
        checked = [("message", text, MAX_SHARED_STIMULUS) for _, text in _messages([row])]
        limit = MAX_SHARED_QUESTION + 2 * (row["kind"] == "scenario")  # an extractive question has to name what it asks about
        checked += [("question", p["question"], limit) for p in row["qa"] if not p["generic"]]
        for what, text, most in checked:
            if len(shared := words & content_words(text)) > most:
                found[f"{row['label']}: the {what} {text!r} shares {sorted(shared)} with the control"] = None
    return list(found)


def question_only(rows: Sequence[dict], m: int = 8, same_kind: bool = True, seed: int = 0) -> float | None:
    """How often the question alone finds the right answer among `m`: the candidate that shares most words with it (ties are blind picks).

    Candidates are answers about other controls, of the same kind unless told otherwise; chance is 1/m.  None for too few pairs.
    """
    rng = random.Random(seed)
    pairs = sorted({(row["kind"] if same_kind else "", row["label"], p["question"], p["answer"]) for row in rows for p in row["qa"]})
    pools: dict[str, list[tuple[str, set[str]]]] = {}
    for kind, label, _, answer in pairs:
        pools.setdefault(kind, []).append((label, _words(answer)))
    hits = []
    for kind, label, question, answer in pairs:
        others = [entry for entry in rng.sample(pools[kind], min(len(pools[kind]), 10 * m)) if entry[0] != label][: m - 1]
        if len(others) == m - 1:
            asked = _words(question)
            scores = [len(asked & words) for words in (_words(answer), *(words for _, words in others))]
            hits.append((scores[0] == max(scores)) / scores.count(max(scores)))
    return sum(hits) / len(hits) if hits else None


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _texts(control: Control) -> list[str]:
    pairs = [text for pair in control.qa for text in (pair.question, pair.answer)]
    return [control.control, control.acknowledgement, control.short, *control.stimuli, *control.descriptions, *pairs]


def text_problems(where: str, texts: Sequence[str]) -> list[str]:
    """Encoding, private data and language: every sentence starts with `where`."""
    import py3langid

    found = []
    for text in texts:
        if bad := sorted({f"U+{ord(c):04X}" for c in text if unicodedata.category(c)[0] == "C" or c in "\ufffd\u2018\u2019\u201c\u201d"}):
            found.append(f"{where}: the text {text!r} holds {', '.join(bad)}; write plain quotes and printable characters")
        if text != unicodedata.normalize("NFC", text):
            found.append(f"{where}: the text {text!r} is not in Unicode's composed form (NFC)")
        found += [f"{where}: the text {text!r} holds {what}" for what, form in _PRIVATE.items() if re.search(form, text)]
    language = py3langid.classify(" ".join(texts))[0]
    if language != "en":
        found.append(f"{where}: its texts read as the language {language!r}, not English")
    return found


def balance_problems(controls: Sequence[Control]) -> list[str]:
    """Categories whose size differs by more than BALANCE from the mean."""
    sizes = Counter(f"{c.kind}-{c.category}" for c in controls)
    mean = len(controls) / len(sizes)
    return [
        f"{name}: the category has {n} controls; between {mean / BALANCE:.0f} and {mean * BALANCE:.0f} are balanced"
        for name, n in sorted(sizes.items())
        if not mean / BALANCE <= n <= mean * BALANCE
    ]


def check_controls(controls: Sequence[Control], messages: Sequence[str]) -> list[str]:
    """Every problem of the authored set that only shows over the whole: texts, living persons, near-duplicates, balance, the pool."""
    found = [p for c in controls for p in text_problems(c.id, _texts(c))] + text_problems("messages", messages)
    for c in controls:
        if name := _LIVING_NAMES.search(c.control):
            found.append(f"{c.id}: the control names {name[0]}, a living person")
    parts = {
        "control": [(c.id, c.control) for c in controls],
        "description": [(c.id, d) for c in controls for d in c.descriptions],
        "pair": [(c.id, f"{p.question} {p.answer}") for c in controls for p in c.qa],
        "message": [("messages", m) for m in messages],
    }
    for what, entries in parts.items():
        for i, j, similarity in near_duplicates([text for _, text in entries]):
            (label, text), (other_label, other) = entries[i], entries[j]
            found.append(f"{label}: the {what} {text!r} is close ({similarity:.2f}) to {other!r} of {other_label}")
    low, high = MESSAGE_WORDS
    found += [f"messages: {m!r} has {n} words, allowed are {low} to {high}" for m in messages if not low <= (n := len(m.split())) <= high]
    return found + balance_problems(controls)


def check_splits(splits: dict[str, list[dict]]) -> list[str]:
    """Every problem of the built readings: labels on two sides, near-duplicates across sides, leaks, answers' lengths, the picker."""
    rows = [row for part in splits.values() for row in part]
    sides: dict[str, set[str]] = {}
    for name, part in splits.items():
        for row in part:
            sides.setdefault(row["label"], set()).add(side_of(name))
    found = [f"{label}: it lies in the splits {', '.join(sorted(names))}" for label, names in sides.items() if len(names) > 1]
    low, high = WORDS["answer"]
    for row in {row["label"]: row for row in rows}.values():
        found += [
            f"{row['label']}: its contrast partner {other} lies in another split"
            for other in row["contrast"]
            if sides.get(other, sides[row["label"]]) != sides[row["label"]]
        ]
        for p in row["qa"]:
            if not low <= len(p["answer"].split()) <= high:
                found.append(f"{row['label']}: the answer {p['answer']!r} is not of {low} to {high} words")
    found += duplicates_across(splits) + leaks(rows)
    picker = question_only(rows)
    if picker is not None and picker > MAX_PICKER:
        found.append(f"the question alone picks the right answer of 8 in {picker:.1%} of draws, allowed are {MAX_PICKER:.0%}")
    return found
