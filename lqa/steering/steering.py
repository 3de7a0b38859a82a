"""Steering: a LoRA on the target that makes it behave, with a strength."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path

import torch

from lqa.download import STEERING_FILES, download
from lqa.errors import LqaError

SIDECAR = STEERING_FILES[-1]
SCHEMA_VERSION = 1
KEYS = ("control", "qa", "decoder", "settings", "steps", "seconds", "loss", "enough", "history", "code")


def check_strength(strength) -> float:
    """`strength` as a float.  Raises LqaError if it is no finite number."""
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise LqaError(f"The strength must be a number (0 is the unsteered model, 1 the steering as trained), not {strength!r}.")
    return value


class Steering:
    """A LoRA on the target of `decoder`, switched on by `apply`.

    `record` says how it came to be: control, qa, decoder, settings, steps, seconds, loss (of held-out chats, nats), enough (the
    held-out control loss at which training would end), history, code.
    """

    def __init__(self, decoder, adapter: str, record: dict):
        self.decoder, self.adapter, self.record = decoder, adapter, record

    @contextmanager
    def apply(self, strength: float = 1.0):
        """Inside the block this thread's target is steered: `decoder.read`, `generate` and `stream_reply` of any decoder over this base.

        0 is the base model exactly; negative strengths go the other way; several steerings may be open at once, and add up.  Other
        threads go on with the unsteered target (or the one that they steer themselves).  What was begun inside the block, a reading or
        a stream, stays as it is.  Raises LqaError if the strength is no finite number, or the steering was removed.
        """
        strength = check_strength(strength)
        if self.adapter is None:
            raise LqaError("This steering was removed from its model; load it again.")
        with self.decoder.base.steering(self.adapter, strength, self.record["settings"]["hidden"]):
            yield self

    def remove(self) -> None:
        """Takes the LoRA out of the model, which then holds no trace of it."""
        if self.adapter is not None:
            self.decoder.base.remove_adapter(self.adapter)
            self.adapter = None

    def save(self, folder: str | Path) -> None:
        """Writes adapter_model.safetensors (16 bit), adapter_config.json (both as PEFT reads them) and the sidecar lqa_steering.json."""
        if self.adapter is None:
            raise LqaError("This steering was removed from its model; load it again.")
        folder, base = Path(folder), self.decoder.base
        try:
            folder.mkdir(parents=True, exist_ok=True)
            base.save_adapter(self.adapter, folder, torch.float16)
            made_for = {"name": base.name, "weights": base.weights, "fingerprint": base.fingerprint()}
            text = json.dumps({"schema_version": SCHEMA_VERSION, "base": made_for} | self.record, indent=1, ensure_ascii=False)
            (folder / SIDECAR).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise LqaError(f"The steering cannot be written to {folder}: {error}.") from error

    @classmethod
    def load(cls, decoder, source: str | Path, *, revision: str | None = None) -> Steering:
        """A steering from its folder, or from a Hub id.

        Raises LqaError if it cannot be had, is incomplete or damaged, or made for another base than the decoder's.
        """
        folder, base = Path(source), decoder.base
        if not folder.is_dir():
            folder = download(str(source), STEERING_FILES, revision=revision, what="steering")
        data, live = read_sidecar(folder), base.fingerprint()
        made_for = data["base"]
        for part in ("config", "tokenizer"):
            if (mine := made_for["fingerprint"][part]) != live[part]:
                raise LqaError(
                    f"The steering was made for {made_for['name']} with the {part} fingerprint {mine}, but {base.name} has {live[part]}; "
                    "use it with its own base model."
                )
        return cls(decoder, base.add_adapter(folder), {key: data[key] for key in KEYS})


def read_sidecar(folder: str | Path) -> dict:
    """What a steering's sidecar says: `base` ("name", "weights", "fingerprint") and the fields of `Steering.record`.

    Raises LqaError if it is absent, malformed, or of another version.
    """
    path = Path(folder, SIDECAR)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, _ = data["schema_version"], [data[key] for key in KEYS]
        _ = data["base"]["name"], data["base"]["fingerprint"]["config"], data["base"]["fingerprint"]["tokenizer"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LqaError(f"{folder} has no {SIDECAR}; it is not an lqa steering (or an incomplete download).") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise LqaError(f"{path} is malformed ({type(error).__name__}: {error}); make the steering again.") from error
    if version != SCHEMA_VERSION:
        raise LqaError(f"{path} has the schema version {version!r}, this lqa reads {SCHEMA_VERSION}; update lqa.")
    return data
