"""The sidecar `lqa_config.json`: everything besides the weights that decides what a decoder's answers mean.

It is a contract, checked at load against the live model and tokenizer.  No key that changes results has a silent default.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from lqa.chat import _common_prefix, _header, _skeleton
from lqa.conditioning import check_conditioning
from lqa.errors import LqaError
from lqa.injection import Operation

SIDECAR = "lqa_config.json"
SCHEMA_VERSION = 1
POSITIONS = ("sequential",)
VISIBLE_TEXT = "visible_text"  # an "injection" that injects nothing: the visible turns stand in the prompt as text


@dataclass(frozen=True)
class Prompt:
    """The decoder's prompt as text, cut where token ids are joined.  Parts are tokenized one by one, so no merge crosses a cut.

        start  (block_head  SLOTS  block_tail)*  question_head QUESTION question_tail  ANSWER end

    One block of slots per read layer; `{layer}` in `block_head` is its number.  `end` begins with the end-of-turn token.
    """

    start: str
    block_head: str
    block_tail: str
    question_head: str
    question_tail: str
    end: str

    def prefix(self, tokenizer, slot_token_id: int, n_slots: int, layers: list[int]) -> tuple[list[int], list[bool]]:
        """Token ids up to the question, and which of them are slots (n_slots for each of `layers`)."""
        ids = _ids(tokenizer, self.start)
        slots = [False] * len(ids)
        for layer in layers:
            head, tail = _ids(tokenizer, self.block_head.format(layer=layer)), _ids(tokenizer, self.block_tail)
            ids += head + [slot_token_id] * n_slots + tail
            slots += [False] * len(head) + [True] * n_slots + [False] * len(tail)
        return ids, slots

    def text_prefix(self, tokenizer, text: str, layers: list[int]) -> list[int]:
        """`prefix` with a text in place of the slots."""
        ids = _ids(tokenizer, self.start)
        for layer in layers:
            ids += _ids(tokenizer, self.block_head.format(layer=layer)) + _ids(tokenizer, text) + _ids(tokenizer, self.block_tail)
        return ids

    def question(self, tokenizer, question: str) -> list[int]:
        return _ids(tokenizer, self.question_head + question.strip() + self.question_tail)

    def answer(self, tokenizer, answer: str) -> list[int]:
        """The answer with its end, as the decoder is trained to write it and `score` counts it."""
        return _ids(tokenizer, answer.strip() + self.end)

    def stop_ids(self, tokenizer) -> list[int]:
        ids = _ids(tokenizer, self.end)[:1]
        return ids + ([tokenizer.eos_token_id] if tokenizer.eos_token_id not in (None, *ids) else [])


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def default_prompt(tokenizer) -> Prompt:
    """A prompt in the tokenizer's own chat format: one user turn with the slots and the question, the assistant's turn the answer.

    A system prompt that the template would insert by itself is left out.
    """
    chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    before, between, behind = _skeleton(tokenizer, chat, False)
    header = _header(tokenizer, "user")
    if header is None or not before.endswith(header):
        header = before
    bos = tokenizer.bos_token or ""
    if bos and before.startswith(bos) and not header.startswith(bos):
        header = bos + header
    # What generation will append, rather than what a finished chat shows: reasoning templates differ there.
    generation = _skeleton(tokenizer, chat[:1], True)[-1]
    tail = generation if _common_prefix(generation, between) else between
    end = behind.rstrip() or (tokenizer.eos_token or behind)
    return Prompt(header, "Layer {layer}:", "\n", "", tail, end)


@dataclass(frozen=True)
class DecoderConfig:
    """The sidecar.  `base`: name, weights, fingerprint.  `lora`, `corpus`, `training`, `metrics` describe; the rest decides results."""

    base: dict
    read_layers: list[int]  # supported read layers (0-based blocks)
    layers_per_reading: int
    default_layer: int
    write_layer: int  # 0-based block; -1 = the embeddings
    injection: str
    injection_constant: float | None
    conditioning: str  # what is done to activations before they are injected (lqa.conditioning)
    conditioning_constant: float | None
    slot_token_id: int
    prompt: Prompt
    positions: str  # "sequential": decoder positions count 0, 1, 2, ...
    answer_role: str  # the role that answers in the prompt
    lora: dict = field(default_factory=dict)
    corpus: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def reads_text(self) -> bool:
        """True for the reference text_only_trained, which gets the visible turns as text and no activations."""
        return self.injection == VISIBLE_TEXT

    @property
    def operation(self) -> Operation:
        return Operation(self.injection, self.injection_constant)

    def check(self) -> DecoderConfig:
        """Raises LqaError for values that this version cannot honour."""
        if self.schema_version != SCHEMA_VERSION:
            raise LqaError(f"{SIDECAR} has the schema version {self.schema_version!r}, this lqa reads {SCHEMA_VERSION}; update lqa.")
        if self.reads_text:
            if (self.injection_constant, self.conditioning) != (None, "raw"):
                raise LqaError(f"{SIDECAR}: a decoder that reads visible text has no injection constant and the conditioning 'raw'.")
        else:
            self.operation.check()
        check_conditioning(self.conditioning, self.conditioning_constant)
        if self.positions not in POSITIONS:
            raise LqaError(f"{SIDECAR}: the position policy {self.positions!r} is unknown; supported are {', '.join(POSITIONS)}.")
        if self.write_layer < -1:
            raise LqaError(f"{SIDECAR}: write_layer is {self.write_layer}; name a block (0, 1, ...), or -1 for the embeddings.")
        if self.layers_per_reading != 1:
            raise LqaError(f"{SIDECAR}: layers_per_reading is {self.layers_per_reading!r}; this version reads 1 layer at a time.")
        if self.default_layer not in self.read_layers:
            raise LqaError(f"{SIDECAR}: default_layer {self.default_layer} is not among read_layers {self.read_layers}.")
        return self

    def check_base(self, base) -> None:
        """Raises LqaError if `base` (lqa.models.Base) is not the one that the decoder was trained on; the message names both values."""
        live = base.fingerprint()
        for part in ("config", "tokenizer"):
            if (mine := self.base["fingerprint"][part]) != live[part]:
                raise LqaError(
                    f"The decoder was trained on {self.base['name']} with the {part} fingerprint {mine}, but {base.name} has {live[part]}; "
                    "load it with its own base model."
                )
        if not 0 <= self.slot_token_id < base.model.config.get_text_config().vocab_size:
            raise LqaError(f"{SIDECAR} names the slot token {self.slot_token_id}, which {base.name} does not have.")
        if deepest := [k for k in [*self.read_layers, self.write_layer] if k >= len(base.blocks)]:
            raise LqaError(f"{SIDECAR} names layer {deepest[0]}, but {base.name} has the blocks 0 to {len(base.blocks) - 1}.")

    def check_layer(self, layer: int | None) -> int:
        """The layer to read: `layer`, or the default one for None.  Raises LqaError that lists the supported ones."""
        layer = self.default_layer if layer is None else layer
        if layer not in self.read_layers:
            raise LqaError(f"This decoder cannot read layer {layer}; it supports the layers {', '.join(map(str, self.read_layers))}.")
        return layer

    def save(self, folder: str | Path) -> None:
        Path(folder, SIDECAR).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> DecoderConfig:
        """Reads and checks a sidecar.  Raises LqaError if it is absent, malformed, or lacks a key."""
        path = Path(folder, SIDECAR)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data["prompt"] = Prompt(**data["prompt"])
            assert {"name", "fingerprint"} <= set(data["base"]) and {"config", "tokenizer"} <= set(data["base"]["fingerprint"])
        except FileNotFoundError as error:
            raise LqaError(f"{folder} has no {SIDECAR}; it is not an lqa decoder (or an incomplete download).") from error
        except (json.JSONDecodeError, UnicodeDecodeError, AssertionError, TypeError, KeyError) as error:
            raise LqaError(f"{path} is malformed ({type(error).__name__}: {error}); download or train the decoder again.") from error
        if missing := [f.name for f in fields(cls) if f.name not in data]:
            raise LqaError(f"{path} lacks the key(s) {', '.join(missing)}; it was written by another version of lqa.")
        if unknown := sorted(set(data) - {f.name for f in fields(cls)}):
            raise LqaError(f"{path} has the unknown key(s) {', '.join(unknown)}; it was written by another version of lqa.")
        try:
            return cls(**data).check()
        except TypeError as error:
            raise LqaError(f"{path} has a value of the wrong type ({error}); download or train the decoder again.") from error
