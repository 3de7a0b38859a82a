"""The sidecar `lqa_config.json`: everything besides the weights that decides what a decoder's answers mean.

It is a contract, checked at load against the live model and tokenizer.  No key that changes results has a silent default.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path

from lqa.activations import Layer, layer_list
from lqa.calibration import Calibration
from lqa.chat import _closing, _common_prefix, _header, _skeleton
from lqa.conditioning import MAPPED, check_conditioning
from lqa.errors import LqaError
from lqa.injection import Operation
from lqa.masks import PREFIX

SIDECAR = "lqa_config.json"
SCHEMA_VERSION = 1
POSITIONS = ("sequential", "shifted")
PRESETS = ("latentqa", "activation-oracle")
VISIBLE_TEXT = "visible_text"  # an "injection" that injects nothing: the visible turns stand in the prompt as text
ADDED = ("calibration", "guidance", "merged", "projection")  # keys that older sidecars lack
IGNORE = -100  # the label of a token that is not scored

@dataclass(frozen=True)
class Prompt:
    """The decoder's prompt as text, cut where token ids are joined.  Parts are tokenized one by one, so no merge crosses a cut.

        start  (block_head  SLOTS  block_tail)*  question_head QUESTION question_tail  ANSWER end

    One block of slots per read layer, or for several that are merged; `{layer}` in `block_head` is its number, or theirs ("7, 14, 21").
    `end` begins with the end-of-turn token.
    """

    start: str
    block_head: str
    block_tail: str
    question_head: str
    question_tail: str
    end: str

    def prefix(
        self, tokenizer, slot_token_id: int | list[int], n_slots: int, blocks: Sequence[Layer]
    ) -> tuple[list[int], list[bool]]:
        """Token ids up to the question, and which of them are slots (n_slots for each of `blocks`, see DecoderConfig.blocks)."""
        first, other = slot_token_id if isinstance(slot_token_id, list) else (slot_token_id, slot_token_id)
        ids = _ids(tokenizer, self.start)
        slots = [False] * len(ids)
        for block in blocks:
            head, tail = _ids(tokenizer, self._head(block)), _ids(tokenizer, self.block_tail)
            ids += head + [first] + [other] * (n_slots - 1) + tail
            slots += [False] * len(head) + [True] * n_slots + [False] * len(tail)
        return ids, slots

    def text_prefix(self, tokenizer, text: str, blocks: Sequence[Layer]) -> list[int]:
        """`prefix` with a text in place of the slots."""
        ids = _ids(tokenizer, self.start)
        for block in blocks:
            ids += _ids(tokenizer, self._head(block)) + _ids(tokenizer, text) + _ids(tokenizer, self.block_tail)
        return ids

    def _head(self, block: Layer) -> str:
        return self.block_head.format(layer=", ".join(map(str, layer_list(block))))

    def question(self, tokenizer, question: str, after: Sequence[tuple[str, str]] = ()) -> list[int]:
        """A question; `after` are earlier ones about the same slots with their answers, oldest first, as turns in front of it."""
        ids = []
        for asked, answered in after:
            ids += self.question(tokenizer, asked) + self.answer(tokenizer, answered) + _ids(tokenizer, self._reopening(tokenizer))
        return ids + _ids(tokenizer, self.question_head + question.strip() + self.question_tail)

    def answer(self, tokenizer, answer: str) -> list[int]:
        """The answer with its end, as the decoder is trained to write it and `score` counts it."""
        return _ids(tokenizer, answer.strip() + self.end)

    def answer_pieces(self, tokenizer, answer: str) -> list[str]:
        """The piece of the answer's text that each of its tokens covers; what several tokens share is given to the last of them."""
        answer = answer.strip()
        spans = tokenizer(answer + self.end, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        pieces, shown = [], 0
        for i, (start, end) in enumerate(spans):
            if start >= len(answer):
                break
            end = min(end, len(answer))
            shared = i + 1 < len(spans) and spans[i + 1][0] < end
            pieces.append("" if shared else answer[shown:end])
            shown = shown if shared else end
        return pieces

    def _reopening(self, tokenizer) -> str:
        """What stands between an answer with its `end` and the next question: the template's opening of another user turn."""
        between = _skeleton(tokenizer, [{"role": role, "content": ""} for role in ("user", "assistant", "user")], False)[2]
        return between[_closing(tokenizer, between, self.end) :]

    def row(
        self,
        tokenizer,
        slot_token_id: int | list[int],
        n_slots: int,
        blocks: Sequence[Layer],
        qa: Sequence[tuple],
        first: int = 0,
        text: str | None = None,
    ) -> dict[str, list]:
        """Several questions with their answers as branches behind one prefix, in one row (the mask: lqa.masks.block_mask).

        {"input_ids", "position_ids", "branch", "labels", "slots"}, equally long; `labels` are IGNORE but for answers and their end.
        qa      (question, answer), or (question, answer, after) for a follow-up in the branch of earlier questions, whose answers count too
        first   the position of the first token (DecoderConfig.first_position)
        text    in place of the slots, for a decoder that reads text
        """
        if text is None:
            ids, slots = self.prefix(tokenizer, slot_token_id, n_slots, blocks)
        else:
            ids = self.text_prefix(tokenizer, text, blocks)
            slots = [False] * len(ids)
        start = len(ids)
        positions, branch, labels = list(range(first, first + start)), [PREFIX] * start, [IGNORE] * start
        for b, (question, answer, *after) in enumerate(qa, start=1):
            turns, own = [*(after[0] if after else ()), (question, answer)], []
            for t, (asked, said) in enumerate(turns):
                asked, given = self.question(tokenizer, asked, turns[:t])[len(own) :], self.answer(tokenizer, said)
                own += asked + given
                labels += [IGNORE] * len(asked) + given
            ids = ids + own
            positions += range(first + start, first + start + len(own))
            branch += [b] * len(own)
        slots += [False] * (len(ids) - start)
        return {"input_ids": ids, "position_ids": positions, "branch": branch, "labels": labels, "slots": slots}

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
    layers_per_reading: int  # how many are read at once, each with a block of slots of its own in the prompt
    default_layer: Layer  # a list if several are read at once
    write_layer: int  # 0-based block; -1 = the embeddings
    injection: str
    injection_constant: float | None
    conditioning: str  # what is done to activations before they are injected (lqa.conditioning)
    conditioning_constant: float | None
    slot_token_id: int | list[int]  # a list: of the first slot of a block, and of the others (text that merges differently there)
    prompt: Prompt
    positions: str  # of the decoder's tokens; see first_position
    answer_role: str  # the role that answers in the prompt
    lora: dict = field(default_factory=dict)
    corpus: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    projection: str | None = None  # the digest of the map beside the adapter (lqa.conditioning.Projection); None: there is none to compare
    merged: bool = False  # whether all read layers can also be read at once in one block of slots (conditioning "projected")
    calibration: dict | None = None  # of Answer.confidence (lqa.calibration); None: it is the mean token probability
    guidance: float = 0.0  # how much an answer's tokens are chosen for what tells them from those without activations (engine.guided)
    schema_version: int = SCHEMA_VERSION

    @property
    def reads_text(self) -> bool:
        """True for the reference text_only_trained, which gets the visible turns as text and no activations."""
        return self.injection == VISIBLE_TEXT

    @property
    def operation(self) -> Operation:
        return Operation(self.injection, self.injection_constant)

    def first_position(self, span: Sequence[int]) -> int:
        """The position of the prompt's first token, for a reading of `span`; the others count on from it.

        sequential   0
        shifted      span[0] - 1, the number of tokens hidden before the span (position 0 is never read): a slot's position is that of the
                     token it stands for, plus a constant (Pan et al. 2024, released training code)
        """
        return span[0] - 1 if self.positions == "shifted" else 0

    def check(self) -> DecoderConfig:
        """Raises LqaError for values that this version cannot honour."""
        if self.schema_version != SCHEMA_VERSION:
            raise LqaError(f"{SIDECAR} has the schema version {self.schema_version!r}, this lqa reads {SCHEMA_VERSION}; update lqa.")
        if self.reads_text:
            if (self.injection_constant, self.conditioning, self.guidance) != (None, "raw", 0):
                text = "a decoder that reads visible text has no injection constant, the conditioning 'raw', and no guidance"
                raise LqaError(f"{SIDECAR}: {text}.")
        else:
            self.operation.check()
        check_conditioning(self.conditioning, self.conditioning_constant)
        if self.projection is not None and self.conditioning not in MAPPED:
            raise LqaError(f"{SIDECAR} names the projection {self.projection}, but the conditioning {self.conditioning!r} has none.")
        if self.calibration is not None:
            Calibration.load(self.calibration)
        if isinstance(self.guidance, bool) or not isinstance(self.guidance, int | float) or not 0 <= self.guidance < float("inf"):
            raise LqaError(f"{SIDECAR}: guidance is {self.guidance!r}; give a number of at least 0.")
        if self.positions not in POSITIONS:
            raise LqaError(f"{SIDECAR}: the position policy {self.positions!r} is unknown; supported are {', '.join(POSITIONS)}.")
        if isinstance(self.slot_token_id, list) and len(self.slot_token_id) != 2:
            raise LqaError(f"{SIDECAR}: slot_token_id is {self.slot_token_id}; give one id, or the first slot's and the others'.")
        if self.write_layer < -1:
            raise LqaError(f"{SIDECAR}: write_layer is {self.write_layer}; name a block (0, 1, ...), or -1 for the embeddings.")
        n = self.layers_per_reading
        if not isinstance(n, int) or n < 1:
            raise LqaError(f"{SIDECAR}: layers_per_reading is {n!r}; give the number of layers that are read at once, usually 1.")
        if not isinstance(self.merged, bool) or (self.merged and (self.conditioning, n) != ("projected", 1)):
            raise LqaError(f"{SIDECAR}: merged is {self.merged!r}; true goes with the conditioning 'projected' and one layer per reading.")
        if not self.reads(self.default_layer):
            raise LqaError(f"{SIDECAR}: default_layer {self.default_layer} must name {n} of read_layers {self.read_layers}.")
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
        for token in self.slot_token_id if isinstance(self.slot_token_id, list) else [self.slot_token_id]:
            if not 0 <= token < base.model.config.get_text_config().vocab_size:
                raise LqaError(f"{SIDECAR} names the slot token {token}, which {base.name} does not have.")
        if deepest := [k for k in [*self.read_layers, self.write_layer] if k >= len(base.blocks)]:
            raise LqaError(f"{SIDECAR} names layer {deepest[0]}, but {base.name} has the blocks 0 to {len(base.blocks) - 1}.")

    @property
    def readings(self) -> list[tuple[int, ...]]:
        """All that can be read: every choice of `layers_per_reading` of the read layers, and all of them where they can be merged."""
        whole = [tuple(self.read_layers)] if self.merged and len(self.read_layers) > 1 else []
        return [*combinations(self.read_layers, self.layers_per_reading), *whole]

    def blocks(self, layers: Sequence[int]) -> list[Layer]:
        """The blocks of slots of a reading of `layers`: one for each of them, or one for all where they are merged."""
        return [tuple(layers)] if self.merged and len(layers) > 1 else list(layers)

    @property
    def maps(self) -> list[Layer]:
        """The blocks that a map beside the adapter has an entry for."""
        return [*self.read_layers, *(layers for layers in self.readings if self.merged and len(layers) > 1)]

    def reads(self, layer: Layer) -> bool:
        """Whether `layer` names, in any order, layers that are read at once."""
        return len(layer_list(layer)) == len(named := self._named(layer)) and named in self.readings

    def check_layers(self, layer: Layer | None) -> tuple[int, ...]:
        """The layers to read, in the order of their blocks: those of `layer`, or the default for None.  Raises LqaError that lists the
        supported ones."""
        layer = self.default_layer if layer is None else layer
        if not self.reads(layer):
            asked, known = (", ".join(map(repr, layers)) for layers in (layer_list(layer), self.read_layers))
            raise LqaError(f"This decoder cannot read layer {asked}; it supports the layers {known} ({self._number} a reading).")
        return self._named(layer)

    @property
    def _number(self) -> str:
        return f"{self.layers_per_reading}{' or all' if self.merged else ''}"

    def _named(self, layer: Layer) -> tuple[int, ...]:
        return tuple(k for k in self.read_layers if k in layer_list(layer))

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
            raise LqaError(
                f"{folder} has no {SIDECAR}, so it is no decoder of lqa (or an incomplete one); a public decoder of another project loads "
                f"with a preset ({', '.join(PRESETS)})."
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, AssertionError, TypeError, KeyError) as error:
            raise LqaError(f"{path} is malformed ({type(error).__name__}: {error}); download or train the decoder again.") from error
        if missing := [f.name for f in fields(cls) if f.name not in data and f.name not in ADDED]:
            raise LqaError(f"{path} lacks the key(s) {', '.join(missing)}; it was written by another version of lqa.")
        if unknown := sorted(set(data) - {f.name for f in fields(cls)}):
            raise LqaError(f"{path} has the unknown key(s) {', '.join(unknown)}; it was written by another version of lqa.")
        try:
            return cls(**data).check()
        except TypeError as error:
            raise LqaError(f"{path} has a value of the wrong type ({error}); download or train the decoder again.") from error


# --- presets: sidecars for public decoders that ship none -----------------------------------------------------------

LATENTQA_ROLE = "reflect"  # the decoder's answers are not to be taken for the target's assistant
LATENTQA_ACKNOWLEDGEMENT = "Sure, I've analyzed the assistant."


def preset_config(
    name: str, base, read_layers: Sequence[int] | None = None, write_layer: int | None = None, lora: dict | None = None
) -> DecoderConfig:
    """The sidecar that a decoder of another project would have, over `base` (lqa.models.Base).

    latentqa            z <- h after block 0, h read after block 15 (Pan, Chen and Steinhardt 2024, sections 2 and 3; released code).  One
                        user turn of slots `? ? ?`, a constant answer, the question; the assistant's role is called "reflect" where the
                        template names it; positions as in training (the released reading script forgets the shift).  Not taken over: in
                        training, the first visible token of a reading with a hidden turn was given another token's activation.
    activation-oracle   z <- z + |z| h/|h| after block 1, h read at 25, 50 (default) or 75 % of the depth (Karvonen et al. 2025, section 3;
                        released code).  One user turn `Layer: L`, the slots ` ? ? ?`, the question; the template without thinking.

    `read_layers` (the first is the default) and `write_layer` override the published ones.  Raises LqaError for an unknown preset, or a
    tokenizer that does not keep the slots apart, on which the published prompt cannot be built.
    """
    if name not in PRESETS:
        raise LqaError(f"The preset {name!r} is unknown; there are {', '.join(PRESETS)}.")
    n, tokenizer = len(base.blocks), base.tokenizer
    if name == "latentqa":
        published, write, operation, positions = [15], 0, Operation("replace"), "shifted"
        prompt, role = _latentqa_prompt(tokenizer)
        slots = _slot_ids(tokenizer, prompt.start, "? ? ?")
    else:
        published, write, operation, positions = [n // 2, n // 4, int(n * 0.75)], 1, Operation("add_normed", 1.0), "sequential"
        prompt, role = _oracle_prompt(tokenizer), "assistant"
        slots = _slot_ids(tokenizer, "Layer: 0\n", " ? ? ?")
        if slots[0] != slots[1]:
            raise LqaError(f"The tokenizer of {base.name} writes the first slot as another token than the others; it cannot be used so.")
    layers = list(read_layers) if read_layers else published
    config = DecoderConfig(
        base={"name": base.name, "weights": base.weights, "fingerprint": base.fingerprint()},
        read_layers=sorted(set(layers)),
        layers_per_reading=1,
        default_layer=layers[0],
        write_layer=write if write_layer is None else write_layer,
        injection=operation.name,
        injection_constant=operation.constant,
        conditioning="raw",
        conditioning_constant=None,
        slot_token_id=slots if slots[0] != slots[1] else slots[0],
        prompt=prompt,
        positions=positions,
        answer_role=role,
        lora=lora or {},
        training={"preset": name},
    )
    return config.check()


def _latentqa_prompt(tokenizer) -> tuple[Prompt, str]:
    """The prompt, and the role that answers in it."""
    user, assistant = {"role": "user", "content": ""}, {"role": "assistant", "content": ""}
    plain = default_prompt(tokenizer)
    _, opening, closing, generation = _skeleton(tokenizer, [user, assistant, user], True)
    role = LATENTQA_ROLE if "assistant" in opening and "assistant" in generation else "assistant"
    opening, generation = (piece.replace("assistant", role) for piece in (opening, generation))
    return Prompt(plain.start, "", opening + LATENTQA_ACKNOWLEDGEMENT + closing, "", generation, plain.end), role


def _oracle_prompt(tokenizer) -> Prompt:
    """Whatever the template puts before a first user turn stays, a default system prompt too.  What follows the slots is tokenized together
    with the question, since ` \\n` merges with nothing at the end of a text."""
    before, generation = _skeleton(tokenizer, [{"role": "user", "content": ""}], True, enable_thinking=False)
    return Prompt(before, "Layer: {layer}\n", "", " \n", generation, default_prompt(tokenizer).end)


def _slot_ids(tokenizer, before: str, slots: str) -> list[int]:
    """The ids of the first slot and of the others in `before` + `slots` (three of them).  Raises LqaError unless each slot is one token."""
    head, ids = _ids(tokenizer, before), _ids(tokenizer, before + slots)
    if ids[: len(head)] != head or len(ids) != len(head) + 3 or ids[-1] != ids[-2]:
        raise LqaError(f"This model's tokenizer does not write {slots!r} as one token per slot; the preset cannot be used with it.")
    return ids[-3:-1]
