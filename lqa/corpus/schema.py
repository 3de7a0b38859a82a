"""The authored part of the QA corpus: what a control is, how it is read from YAML, and the checks that fail a build.

A *control* is a text that makes a model behave in some way (LatentQA, Pan et al. 2024, section 3).  Each one carries its
acknowledgement, stimuli that do not betray it, and question-answer pairs about the state it puts the model into.
The generic questions of `questions.yaml` are asked of every control of a kind: they give nothing away.

    python -m lqa.corpus.schema            # checks every file of the package
    python -m lqa.corpus.schema FILE ...   # checks these alone (contrast partners must lie among them)
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).parent
KINDS = ("goal", "persona", "scenario", "user")

WORDS = {  # bounds in words, both included
    "control": (4, 75),
    "acknowledgement": (4, 40),
    "stimulus": (4, 45),
    "description": (6, 40),
    "short": (1, 5),
    "question": (3, 30),
    "answer": (1, 60),
}
# More shared content words than this between a control and its stimulus or question is a leak.
MAX_SHARED_STIMULUS = 1
MAX_SHARED_QUESTION = 1

_STOP = frozenset(
    """a about above after again all also always am an and any anything are around as ask asked asks assistant at be because been before
    being between both but by came can come could day did do does doing done down each either else even ever every everything few
    find first for from get gets give given gives go goes going good got had has have he help her here hers him his how i if in into
    is it its just keep kind know let like little long look made make makes making many may me might model more most much must my
    need needs never new next no not nothing now of off often on once one only or other our out over own people person put rather
    really replies reply respond response responds responses right said same say saying says see she should since so some someone
    something still such take takes talk talks tell tells than that the their them then there these they thing things think this those
    through time to too try two under until up upon us use used user users using very want wants was way we well were what whatever when
    where whether which while who whole whom whose why will with without word words work would write writes you your yours yourself
    answer answers question questions message messages conversation chat topic today""".split()
)


@dataclass(frozen=True)
class QA:
    """One question about a control's state with its answer; `type` is "description", "reasoning" or "short"."""

    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class Control:
    """A control with all that was written for it.  `id` is kind-category-detail; `contrast` are ids of near-neighbours."""

    id: str
    control: str
    acknowledgement: str
    stimuli: tuple[str, ...]
    descriptions: tuple[str, ...]  # each answers a generic description question of the kind
    short: str  # answers a generic short question of the kind
    qa: tuple[QA, ...]  # specific questions: descriptions and "what would it do if"
    contrast: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.id.split("-")[0]

    @property
    def category(self) -> str:
        return self.id.split("-")[1]


def content_words(text: str) -> set[str]:
    """The lower-case words of `text` that carry content, cut to a crude stem so that 'pirates' meets 'pirate'."""
    words = re.findall(r"[a-z]+", text.lower().replace("'s", ""))
    return {re.sub(r"(ing|ed|es|s|ly|e)$", "", w) if len(w) > 5 else w for w in words if w not in _STOP and len(w) > 2}


def _field(entry: dict, name: str, where: str):
    if name not in entry:
        raise ValueError(f"{where}: the field '{name}' is missing")
    return entry[name]


def parse_control(entry: dict, where: str) -> Control:
    """Turns one YAML mapping into a Control.  Raises ValueError naming `where` and the field that is wrong."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: a control must be a mapping, not {type(entry).__name__}")
    where = f"{where}: {entry.get('id', '(no id)')}"
    known = {"id", "control", "acknowledgement", "stimuli", "descriptions", "short", "qa", "contrast"}
    if unknown := set(entry) - known:
        raise ValueError(f"{where}: unknown field(s) {sorted(unknown)}")
    qa = []
    for i, pair in enumerate(_field(entry, "qa", where)):
        if not isinstance(pair, dict) or set(pair) != {"q", "a", "type"}:
            raise ValueError(f"{where}: qa[{i}] must have exactly the keys q, a, type")
        qa.append(QA(pair["q"], pair["a"], pair["type"]))
    control = Control(
        id=_field(entry, "id", where),
        control=_field(entry, "control", where),
        acknowledgement=_field(entry, "acknowledgement", where),
        stimuli=tuple(_field(entry, "stimuli", where)),
        descriptions=tuple(_field(entry, "descriptions", where)),
        short=_field(entry, "short", where),
        qa=tuple(qa),
        contrast=tuple(_field(entry, "contrast", where)),
    )
    texts = [control.id, control.control, control.acknowledgement, control.short, *control.stimuli, *control.descriptions]
    for text in [*texts, *control.contrast, *(t for pair in qa for t in (pair.question, pair.answer))]:
        if not isinstance(text, str) or not text.strip() or text != text.strip():
            raise ValueError(f"{where}: {text!r} must be a non-empty string without spaces at its ends (quote it in YAML)")
    return control


def problems(control: Control) -> list[str]:
    """Every rule that `control` breaks, as sentences that start with its id."""
    found = []

    def bound(name: str, text: str):
        low, high = WORDS[name]
        if not low <= len(text.split()) <= high:
            found.append(f"{control.id}: {name} has {len(text.split())} words, allowed are {low} to {high}: {text!r}")

    if not re.fullmatch(r"[a-z]+-[a-z]+-[a-z0-9]+(-[a-z0-9]+)*", control.id) or control.kind not in KINDS:
        found.append(f"{control.id}: an id is kind-category-detail in lower case, kind one of {', '.join(KINDS)}")
    bound("control", control.control)
    bound("acknowledgement", control.acknowledgement)
    bound("short", control.short)
    if len(control.stimuli) < 2:
        found.append(f"{control.id}: at least two stimuli")
    if len(control.descriptions) < 2:
        found.append(f"{control.id}: at least two descriptions")
    if len(control.contrast) < 2 or control.id in control.contrast:
        found.append(f"{control.id}: at least two contrast partners, none of them itself")
    types = Counter(pair.type for pair in control.qa)
    if set(types) - {"description", "reasoning"} or types["description"] < 2 or types["reasoning"] < 2:
        found.append(f"{control.id}: qa needs at least two of type description and two of type reasoning, has {dict(types)}")
    words = content_words(control.control)
    for text in control.stimuli:
        bound("stimulus", text)
        if len(shared := words & content_words(text)) > MAX_SHARED_STIMULUS:
            found.append(f"{control.id}: the stimulus {text!r} shares {sorted(shared)} with the control")
    for text in control.descriptions:
        bound("description", text)
    for pair in control.qa:
        bound("question", pair.question)
        bound("answer", pair.answer)
        # An extractive question has to name what it asks about; elsewhere the control's words give the answer away.
        limit = MAX_SHARED_QUESTION + 2 * (control.kind == "scenario")
        if len(shared := words & content_words(pair.question)) > limit:
            found.append(f"{control.id}: the question {pair.question!r} shares {sorted(shared)} with the control")
        if not pair.question.endswith("?"):
            found.append(f"{control.id}: the question {pair.question!r} does not end with a question mark")
    return found


def read_controls(paths) -> list[Control]:
    """Reads YAML lists of controls.  Raises ValueError (file and field named) for a file that is not in the schema."""
    controls = []
    for path in map(Path, paths):
        try:
            entries = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{path}: not readable as YAML: {error}") from error
        if not isinstance(entries, list):
            raise ValueError(f"{path}: expected a YAML list of controls")
        controls += [parse_control(entry, f"{path.name}[{i}]") for i, entry in enumerate(entries)]
    return controls


def check(controls: list[Control]) -> list[str]:
    """Every problem of the set: those of the single controls, repeated ids and texts, contrast partners that do not exist."""
    found = [p for control in controls for p in problems(control)]
    ids = Counter(control.id for control in controls)
    found += [f"{i}: the id occurs {n} times" for i, n in ids.items() if n > 1]
    texts = Counter(" ".join(sorted(content_words(control.control))) for control in controls)
    for control in controls:
        if texts[" ".join(sorted(content_words(control.control)))] > 1:
            found.append(f"{control.id}: its control text repeats another's: {control.control!r}")
        found += [f"{control.id}: contrast partner {c!r} does not exist" for c in control.contrast if c not in ids]
    return found


def main(argv: list[str]) -> int:
    try:
        controls = read_controls(argv or sorted((HERE / "controls").glob("*.yaml")))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    found = check(controls)
    print("\n".join(found) or "no problems", file=sys.stderr)
    pairs = sum(len(c.descriptions) + 1 + len(c.qa) for c in controls)
    print(f"{len(controls)} controls, {pairs} QA pairs; {dict(Counter(f'{c.kind}-{c.category}' for c in controls))}")
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
