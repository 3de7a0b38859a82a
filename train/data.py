"""Training examples: a control's chat, the span that is read, and questions with answers about it.

An example is a plain mapping, so that a `datasets.Dataset` of examples is all the trainer needs:

    {"id", "form", "chat": [{"role", "content"}], "span", "layers": [int], "qa": [{"question", "answer"}], "patched": bool, "length": int}

A pair may have `after`, a list of earlier questions with their answers: it is a follow-up, asked in the same branch behind them.

`length`, about that of the decoder's row in characters, lets the sampler put examples of one size together
(`train_sampling_strategy: group_by_length`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from lqa.activations import Layer, layer_list
from lqa.chat import render, resolve_span
from lqa.conditioning import reference
from lqa.corpus import Control, load_messages, load_questions
from lqa.corpus.completions import load_completions
from lqa.corpus.readings import FORMS, control_chat
from lqa.errors import LqaError

SOURCES = ("latentqa", "context", "facts")  # of examples: readings of the controls, or the rows of a config of the published dataset
DRAWN = ("part", "token")  # spans that are drawn among a chat's tokens
# Asked after a question that the control's description answers; "short" is answered by the control's short answer, "again" by another
# description.  A specific question follows as it is.
FOLLOW_UPS = {
    "short": ("In a few words?", "Say that more briefly.", "And in short?", "Can you put that in two or three words?"),
    "again": ("Can you put that in other words?", "Say that differently.", "How else would you describe that?", "Explain that once more."),
}
DATASET = Path(__file__).parent.parent / "dataset"


@dataclass
class MixtureConfig:
    """What the examples are made of; shares are probabilities."""

    sources: dict[str, float] = field(default_factory=lambda: {"latentqa": 1.0})
    forms: dict[str, float] = field(default_factory=lambda: {"system": 0.7, "stimulus": 0.2, "control": 0.1})
    controls: float = 1.0  # share of the training controls; contrast partners stay together
    dataset: str | None = None  # where the rows of the other sources are read; None: the repository's dataset/
    pool: float = 0.7  # share of messages drawn from the shared pool instead of the control's own stimuli
    # Also from:T, and of the tokens that come after the control: "part", a random stretch; "token", a single one; "last", the last 1 to 12.
    spans: dict[str, float] = field(default_factory=lambda: {"turn:-1": 0.8, "last": 0.1, "all": 0.1})
    none: float = 0.05  # share of examples whose slots are not patched
    qa_per_reading: int = 2  # branches: questions answered from one reading in one pass
    specific: float = 0.4  # share of the pairs after the first whose question is asked of one control only, so that it tells much itself
    follow_up: float = 0.0  # share of readings whose second question is asked after the first, in its branch, and refers to its answer
    default_layer_share: float = 0.6  # the rest is spread evenly over the other read layers, or choices of several
    shuffled_activations: bool = False  # a fake: what is read is the chat of another example


def _pick(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def question_pairs(control: Control, n: int, specific: float, rng: random.Random) -> list[dict[str, str]]:
    """n questions about `control`: first a generic one with a description, then specific ones or further generic ones.

    Few specific ones: seen again and again, such a question is answered from memory, and nothing is learnt of reading.
    """
    generic = load_questions()[control.kind]
    first, *others = rng.sample(control.descriptions, len(control.descriptions))
    further = [(rng.choice(generic["short"]), control.short), *((rng.choice(generic["description"]), d) for d in others)]
    own = rng.sample([(pair.question, pair.answer) for pair in control.qa], len(control.qa))
    pairs = [(rng.choice(generic["description"]), first)]
    while len(pairs) < n and (own or further):
        source = own if own and (not further or rng.random() < specific) else further
        pairs.append(source.pop(0))
    return [{"question": q, "answer": a} for q, a in pairs]


def follow_up(control: Control, pairs: list[dict], rng: random.Random) -> list[dict]:
    """`pairs` (of question_pairs) with the second asked after the first, in words that refer to its answer where it can."""
    first, second, *others = pairs
    if second["answer"] == control.short or second["answer"] in control.descriptions:
        second = second | {"question": rng.choice(FOLLOW_UPS["short" if second["answer"] == control.short else "again"])}
    return [second | {"after": [first]}, *others]


def draw_span(tokenizer, chat: list[dict[str, str]], region: str, how: str, rng: random.Random) -> str:
    """A span A:B of `chat` within the span `region`: a "token" or a "part", drawn among the tokens that also occur where the hidden turns
    are left out, so that every conditioning can read it."""
    rendered = render(tokenizer, chat)
    indices = resolve_span(region, rendered)
    found = reference(tokenizer, rendered, indices)
    places = [indices[n] for n in found.which] if found else indices
    first, last = (rng.randrange(len(places)),) * 2 if how == "token" else sorted(rng.choices(range(len(places)), k=2))
    return f"{places[first]}:{places[last] + 1}"


def build_examples(
    controls: tuple[Control, ...],
    n: int,
    mixture: MixtureConfig,
    readings: Sequence[Sequence[int]],
    default_layer: Layer,
    seed: int,
    target: str = "",
    tokenizer=None,
) -> Dataset:
    """n examples of the mixture's sources, each control equally often; the same arguments give the same examples.

    readings       what can be read (DecoderConfig.readings)
    default_layer  a list where several layers are read at once
    target     name of the target, whose tokens the rows of "context" must be counted in
    tokenizer  the target's; for the spans "part" and "token"
    Raises LqaError for a mixture that cannot be had.
    """
    rng = random.Random(seed)

    def streams(of: str) -> dict[str, Iterator[dict]]:
        # Every source draws from its own stream: another share of one does not change the items of the others.
        return {
            name: _readings(controls, mixture, random.Random(f"{of}/{name}"), tokenizer)
            if name == "latentqa"
            else _published(name, mixture, target, random.Random(f"{of}/{name}"))
            for name, share in mixture.sources.items()
            if share > 0
        }

    own, strangers = streams(f"{seed}"), streams(f"{seed}/strangers")
    if mixture.shuffled_activations and len(controls) < 2:
        raise LqaError("mixture.shuffled_activations needs at least two controls.")
    default = layer_list(default_layer)
    others = [list(choice) for choice in readings if set(choice) != set(default)]
    rows = []
    for _ in range(n):
        source = _pick(rng, mixture.sources)
        row = next(own[source])
        if mixture.shuffled_activations:
            other = next(other for other in strangers[source] if other["id"] != row["id"])
            row |= {key: other[key] for key in ("form", "chat", "span")}
        layers = default if not others or rng.random() < mixture.default_layer_share else rng.choice(others)
        rows.append(row | {"layers": layers, "patched": rng.random() >= mixture.none, "length": _length(row)})
    return Dataset.from_list(rows)


def _readings(controls: tuple[Control, ...], mixture: MixtureConfig, rng: random.Random, tokenizer=None) -> Iterator[dict]:
    """Readings of the controls, without end."""
    messages = load_messages("train")
    completions = load_completions(controls)[0] if mixture.forms.get("stimulus_completion") else {}
    order: list[Control] = []
    while True:
        if not order:
            order = rng.sample(controls, len(controls))
        control = order.pop()
        form = _pick(rng, mixture.forms)
        message = rng.choice(messages) if rng.random() < mixture.pool else rng.choice(control.stimuli)
        reply, span = None, _pick(rng, mixture.spans)
        if form == "stimulus_completion":
            if replies := completions.get(control.id):
                chosen = rng.choice(replies)
                message, reply = chosen["message"], chosen["reply"]
                span = "from:2" if span == "turn:-1" else span  # the reply with the message that it answers
            else:
                form = "stimulus"  # the target's reply to this control was dropped
        if form == "control":
            span = "all"  # of the control itself a part may not tell
        chat = control_chat(control, form, message, reply)
        if span == "last":
            span = f"last:{rng.randint(1, 12)}"
        elif span in DRAWN:
            span = draw_span(tokenizer, chat, FORMS[form], span, rng)
        qa = question_pairs(control, mixture.qa_per_reading, mixture.specific, rng)
        if mixture.follow_up and len(qa) > 1 and rng.random() < mixture.follow_up:
            qa = follow_up(control, qa, rng)
        yield {"id": control.id, "form": form, "chat": chat, "span": span, "qa": qa}


def _published(name: str, mixture: MixtureConfig, target: str, rng: random.Random) -> Iterator[dict]:
    """The training rows of a config of the published dataset in seeded order, again and again."""
    from datasets import load_dataset

    folder = mixture.dataset or str(DATASET)
    try:
        rows = load_dataset(folder, name, split="train").to_list()
    except (OSError, ValueError) as error:
        raise LqaError(f"The source {name!r} cannot be read from {folder} ({error}); build it with `python -m lqa data build`.") from error
    if name == "context" and (others := {row["target"] for row in rows} - {target}):
        raise LqaError(
            f"The context predictions in {folder} are counted in tokens of {', '.join(sorted(others))}, not of {target}; "
            "build them with `python -m lqa data build --base` and name that folder as mixture.dataset."
        )
    while True:
        for row in rng.sample(rows, len(rows)):
            qa = [{"question": pair["question"], "answer": pair["answer"]} for pair in row["qa"]]
            yield {"id": row["id"], "form": name, "chat": row["chat"], "span": row["span"], "qa": qa}


def _length(row: dict) -> int:
    """About how long the decoder's row is: what the span covers, and the questions and answers, in characters."""
    lengths = [len(m["content"]) for m in row["chat"]]
    match row["span"].split(":"):
        case ["turn", turn]:
            visible = lengths[int(turn)]
        case ["from", turn]:
            visible = sum(lengths[int(turn) :])
        case ["last", n]:
            visible = 4 * int(n)
        case [first, end]:
            visible = 4 * (int(end) - int(first))
        case _:
            visible = sum(lengths)
    return visible + sum(len(turn["question"]) + len(turn["answer"]) for pair in row["qa"] for turn in [*pair.get("after", ()), pair])


def build_validation(controls: tuple[Control, ...], n: int, mixture: MixtureConfig, layer: Layer, seed: int) -> dict[str, Dataset]:
    """{"true": ..., "shuffled": ...}: the same questions, messages and spans, with the control's own and with a stranger's activations.

    The difference of the two losses is what answers owe to the activations.
    """
    rng = random.Random(seed)
    messages = load_messages("validation")
    true, shuffled = [], []
    for i in range(n):
        control = controls[i % len(controls)]
        donor = rng.choice([c for c in controls if c.kind == control.kind and c.id != control.id] or controls)
        message = rng.choice(messages)
        row = {"id": control.id, "form": "system", "span": "turn:-1", "layers": layer_list(layer), "patched": True}
        row["qa"] = question_pairs(control, mixture.qa_per_reading, mixture.specific, rng)
        for rows, read in ((true, control), (shuffled, donor)):
            row["chat"] = control_chat(read, "system", message)
            rows.append(row | {"length": _length(row)})
    return {"true": Dataset.from_list(true), "shuffled": Dataset.from_list(shuffled)}
