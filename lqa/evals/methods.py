"""Ways to make a target behave: a steering, and what people would otherwise do, with the same inputs on the same budget.

    unsteered      the target as it is
    system_prompt  the control as system prompt
    caa            a contrastive activation addition (lqa.evals.baselines.caa)
    sft, dpo       a LoRA as large as the steering's, trained on the target's own replies under the control (lqa.evals.baselines.imitation)
    steering       decoder.steer(control=control)

The four that are made see the same neutral requests, and have the same rule for their strength: the largest that stays fluent
(lqa.steering.strength).  What they cost is beside each, in seconds and in examples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from lqa.chat import check_text
from lqa.errors import LqaError
from lqa.evals.baselines import caa, imitation
from lqa.evals.runner import decoder_digest
from lqa.journal import write_whole
from lqa.models import Base
from lqa.provenance import code_version
from lqa.steering import Settings, Steering
from lqa.steering.strength import RATIO, strongest

NAMES = ("unsteered", "system_prompt", "caa", "sft", "dpo", "steering")
RECORD = "method.json"


@dataclass(frozen=True)
class Method:
    """A target made to behave in some way.

    seconds   what making it took: sampling, training, finding the strength
    examples  chats or replies whose gradient was taken; for caa the pairs of passes
    system    a system prompt to put in front of every chat, or None
    session   as Base.decoding: yields the model as it behaves, for engine.prefill, decode and score
    record    how it was made: what was asked for, strength, ratios ({strength: perplexity ratio}), parts of the seconds
    adapter   its LoRA on the base, to be applied at other strengths or read (Base.decoding, Base.steering); None: it has none
    remove    takes what it put into the model, if anything, out again; the session is of no use after that
    """

    name: str
    seconds: float
    examples: int
    system: str | None
    session: Callable[[], AbstractContextManager]
    record: dict = field(default_factory=dict)
    adapter: str | None = None
    remove: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Lora:
    """A LoRA on the target as `session(strength)`."""

    base: Base
    adapter: str

    def session(self, strength: float) -> Callable[[], AbstractContextManager]:
        return partial(self.base.decoding, (self.adapter, strength)) if strength else self.base.decoding

    def save(self, folder: Path) -> None:
        self.base.save_adapter(self.adapter, folder, torch.float16)

    def remove(self) -> None:
        self.base.remove_adapter(self.adapter)


@dataclass(frozen=True)
class Steered(Lora):
    """A steering, kept so that `decoder.load_steering` takes it too."""

    steering: Steering

    def save(self, folder: Path) -> None:
        self.steering.save(folder)


def make(
    name: str,
    decoder,
    control: str,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    examples: int | None = None,
    ratio: float = RATIO,
    layer: int | None = None,
    **settings,
) -> Method:
    """Makes the target of `decoder` follow `control` by the method `name` (see NAMES).

    folder    what is made is kept in folder/NAME, and loaded from there when the call is repeated, with its seconds and examples
    examples  the budget; None: that of the settings, steps * batch
    ratio     see lqa.steering.strength.strongest
    layer     of caa; None: the middle one
    settings  the fields of lqa.steering.Settings, for whatever is trained

    Raises LqaError for an unknown method or setting, an empty control, or a folder in which something else was kept.
    """
    if name not in NAMES:
        raise LqaError(f"The method {name!r} is unknown; use one of {', '.join(NAMES)}.")
    if not isinstance(control, str) or not control.strip():
        raise LqaError("The control is empty; write how the model shall behave.")
    base, control = decoder.base, check_text(decoder.base.tokenizer, control.strip(), "The control")
    if name in ("unsteered", "system_prompt"):
        return Method(name, 0.0, 0, control if name == "system_prompt" else None, base.decoding)
    settings["seed"] = seed
    given = Settings.of(decoder, **settings)
    if examples is not None:
        if not isinstance(examples, int) or examples < given.batch:
            raise LqaError(f"The examples must be an integer of at least the batch's {given.batch}, not {examples!r}.")
        given = Settings.of(decoder, **settings | {"steps": examples // given.batch})
    asked = {
        "name": name,
        "control": control,
        "base": {"name": base.name, "fingerprint": base.fingerprint()},
        "decoder": decoder_digest(decoder) if name == "steering" else None,
        "settings": asdict(given),
        "ratio": ratio,
        "layer": caa.check_layer(base, layer) if name == "caa" else None,
    }
    asked = json.loads(json.dumps(asked))  # as it will be read again
    folder = None if folder is None else Path(folder, name)
    if folder is not None and (folder / RECORD).is_file():
        record = _record(folder / RECORD, asked)
        made = caa.Addition.load(base, asked["layer"], folder) if name == "caa" else Lora(base, base.add_adapter(folder))
    else:
        made, record = _made(name, decoder, control, given, asked)
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                made.save(folder)
            except OSError as error:
                made.remove()
                raise LqaError(f"The method {name} cannot be written to {folder}: {error}.") from error
            write_whole(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")  # last: it says that the rest is there
    session, adapter = made.session(record["strength"]), getattr(made, "adapter", None)
    return Method(name, record["seconds"], record["examples"], None, session, record, adapter, made.remove)


def _made(name: str, decoder, control: str, settings: Settings, asked: dict):
    """What the method `name` makes, with `session(strength)` and `save(folder)`, and its record."""
    base, begun = decoder.base, time.perf_counter()
    if name == "caa":
        made, parts = caa.find(decoder, control, asked["layer"], settings)
    elif name == "steering":
        steering = decoder.steer(control=control, **asdict(settings))
        made = Steered(base, steering.adapter, steering)
        parts = {"examples": steering.record["steps"] * settings.batch, "loss": steering.record["loss"], "qa": steering.record["qa"]}
    else:
        adapter, parts = imitation.train(decoder, control, name, settings)
        made = Lora(base, adapter)
    trained = time.perf_counter() - begun
    try:
        strength, ratios = strongest(decoder, made.session, asked["ratio"])
    except BaseException:
        made.remove()
        raise
    seconds = time.perf_counter() - begun
    record = {"asked": asked, **parts, "strength": strength, "ratios": ratios, "seconds": seconds, "making": trained}
    return made, record | {"code": code_version()}


def _record(path: Path, asked: dict) -> dict:
    """The record in `path`.  Raises LqaError if it is damaged, or of something else than what is asked for."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        was = dict(record["asked"])
        record["strength"], record["seconds"], record["examples"]  # noqa: B018
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LqaError(f"{path} is damaged ({type(error).__name__}: {error}); remove its folder, and it is made again.") from error
    if was != asked:
        other = ", ".join(key for key in asked if was.get(key) != asked[key])
        raise LqaError(f"What is kept in {path.parent} was made otherwise ({other}); name another folder or remove this one.")
    return record
