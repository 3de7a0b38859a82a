"""Training examples: a control's chat, the span that is read, and questions with answers about it.

An example is a plain mapping, so that a `datasets.Dataset` of examples is all the trainer needs:

    {"id", "form", "chat": [{"role", "content"}], "span", "layers": [k], "qa": [{"question", "answer"}], "patched": bool}
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from datasets import Dataset

from lqa.corpus import Control, load_messages, load_questions
from lqa.corpus.readings import control_chat

FORMS = ("system", "stimulus", "control")  # the read forms that training mixes


@dataclass
class MixtureConfig:
    """What the examples are made of; shares are probabilities."""

    forms: dict[str, float] = field(default_factory=lambda: {"system": 0.7, "stimulus": 0.2, "control": 0.1})
    pool: float = 0.7  # share of messages drawn from the shared pool instead of the control's own stimuli
    spans: dict[str, float] = field(default_factory=lambda: {"turn:-1": 0.8, "last": 0.1, "all": 0.1})
    none: float = 0.05  # share of examples whose slots are not patched
    qa_per_reading: int = 2  # branches: questions answered from one reading in one pass
    specific: float = 0.4  # share of the pairs after the first whose question is asked of one control only, so that it tells much itself
    default_layer_share: float = 0.6  # the rest is spread evenly over the other read layers
    shuffled_activations: bool = False  # a fake: what is read is a chat under another control than the questions are about


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


def build_examples(
    controls: tuple[Control, ...], n: int, mixture: MixtureConfig, read_layers: list[int], default_layer: int, seed: int
) -> Dataset:
    """n examples over `controls`, each control equally often; the same arguments give the same examples."""
    rng, strangers = random.Random(seed), random.Random(f"{seed}/strangers")  # apart: all else is as without them
    messages = load_messages()
    others = [k for k in read_layers if k != default_layer]
    order, rows = [], []
    for _ in range(n):
        if not order:
            order = rng.sample(controls, len(controls))
        control = order.pop()
        form = _pick(rng, mixture.forms)
        read = control
        if mixture.shuffled_activations:
            read = strangers.choice([c for c in controls if c.kind == control.kind and c.id != control.id] or controls)
        message = rng.choice(messages) if rng.random() < mixture.pool else rng.choice(read.stimuli)
        span = "all" if form == "control" else _pick(rng, mixture.spans)
        rows.append(
            {
                "id": control.id,
                "form": form,
                "chat": control_chat(read, form, message),
                "span": f"last:{rng.randint(1, 12)}" if span == "last" else span,
                "layers": [default_layer if not others or rng.random() < mixture.default_layer_share else rng.choice(others)],
                "qa": question_pairs(control, mixture.qa_per_reading, mixture.specific, rng),
                "patched": rng.random() >= mixture.none,
            }
        )
    return Dataset.from_list(rows)


def build_validation(controls: tuple[Control, ...], n: int, mixture: MixtureConfig, layer: int, seed: int) -> dict[str, Dataset]:
    """{"true": ..., "shuffled": ...}: the same questions, messages and spans, with the control's own and with a stranger's activations.

    The difference of the two losses is what answers owe to the activations.
    """
    rng = random.Random(seed)
    messages = load_messages()
    true, shuffled = [], []
    for i in range(n):
        control = controls[i % len(controls)]
        donor = rng.choice([c for c in controls if c.kind == control.kind and c.id != control.id] or controls)
        message = rng.choice(messages)
        row = {"id": control.id, "form": "system", "span": "turn:-1", "layers": [layer], "patched": True}
        row["qa"] = question_pairs(control, mixture.qa_per_reading, mixture.specific, rng)
        true.append(row | {"chat": control_chat(control, "system", message)})
        shuffled.append(row | {"chat": control_chat(donor, "system", message)})
    return {"true": Dataset.from_list(true), "shuffled": Dataset.from_list(shuffled)}
