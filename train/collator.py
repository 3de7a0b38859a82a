"""From examples to batches: the target's tokens, the decoder's prompt with its slots, and one branch per question.

A row of a batch is a prefix (the prompt with its slots) followed by branches (a question with its answer each).  A block mask lets a
branch see the prefix and itself, and its positions continue the prefix, so that n questions of one reading cost one prefix.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqa.chat import render, resolve_span, visible_text
from lqa.conditioning import REFERENCED, reference
from lqa.config import IGNORE, DecoderConfig
from lqa.errors import LqaError
from lqa.masks import PAD


class ActivationCache:
    """Activations on disk, one safetensors file per reading, so that later epochs need no target pass."""

    def __init__(self, folder: str | Path, base_fingerprint: dict[str, str]):
        self.folder, self.fingerprint = Path(folder), base_fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, *reading) -> Path:
        """Where a reading is kept; `reading` is everything that decides its activations, as JSON values."""
        key = json.dumps([self.fingerprint, *reading], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def load(self, path: str | Path) -> Tensor | None:
        return load_file(path)["activations"] if Path(path).exists() else None

    def save(self, path: str | Path, activations: Tensor) -> None:
        # Beside its place and renamed: a reader (or a killed run) never meets half a file.
        handle, part = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        save_file({"activations": activations.detach().cpu().contiguous()}, part)
        os.replace(part, path)


@dataclass
class LatentQACollator:
    """Turns examples (train.data) into a batch of tensors:

    input_ids, position_ids, branch, labels  (B, S)   the decoder's rows; `labels` -100 but for answers and their end
    slots                                    (B, S)   bool, True where an activation is injected (none in unpatched rows)
    read_ids, read_mask                      (R, T)   the target's tokens of the patched rows, right-padded; after them the references of
                                                      those that have one (if the conditioning compares)
    read_spans, read_layers                  lists    the token indices and the layers that are read, for each row of read_ids
    read_references                          list     for each patched row its reference, or None: the row of read_ids, and which of the
                                                      span's tokens have a counterpart there, and which of those are of the opening
    read_names                               list     for each patched row the id of its example
    activations                              (N, D)   in place of the six above, if `cache` holds all readings of the batch
    cache_paths                              list     where to store what is read now, if `cache` is given but lacks some

    The source of activations is thereby a choice: live (no cache) or the disk.  Raises LqaError if a chat or row exceeds the context.
    """

    tokenizer: object
    config: DecoderConfig
    context: int
    cache: ActivationCache | None = None
    pad_id: int = field(init=False)

    def __post_init__(self):
        self.pad_id = next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)

    def row(self, example: dict) -> tuple[dict[str, list], list[tuple[list[int], list[int]]]]:
        """One example as lists: the decoder's row, and the target passes it needs: the reading (ids, span), and its reference if any
        (ids, places, which of the span these are, which of those are of the opening); none for a decoder that reads text."""
        rendered = render(self.tokenizer, example["chat"])
        span = resolve_span(example["span"], rendered)
        prompt = self.config.prompt
        pairs = [(*_turn(pair), [_turn(earlier) for earlier in pair.get("after") or ()]) for pair in example["qa"]]
        text = None
        if self.config.reads_text:  # nothing to inject: the visible turns themselves, or nothing where a slot would not be patched
            text = visible_text(rendered, span) if example["patched"] else ""
        first = self.config.first_position(span)
        row = prompt.row(self.tokenizer, self.config.slot_token_id, len(span), self.config.blocks(example["layers"]), pairs, first, text)
        row["slots"] = [s and example["patched"] for s in row["slots"]]
        if max(len(rendered), max(row["position_ids"]) + 1) > self.context:
            raise LqaError(f"The example {example['id']!r} is longer than the model's context of {self.context} tokens; shorten it.")
        passes = [] if self.config.reads_text else [(rendered.ids, span)]
        if self.config.conditioning in REFERENCED:
            found = reference(self.tokenizer, rendered, span)
            passes += [(found.rendered.ids, found.places, found.which, found.opening)] if found else []
        return row, passes

    def __call__(self, examples: list[dict]) -> dict[str, object]:
        rows, reads, names = [], [], []
        for example in examples:
            row, passes = self.row(example)
            rows.append(row)
            if passes and example["patched"]:
                reads.append((passes, example["layers"]))
                names.append(example["id"])
        padding = {"input_ids": self.pad_id, "position_ids": 0, "branch": PAD, "labels": IGNORE, "slots": False}
        batch: dict[str, object] = {key: _pad([row[key] for row in rows], value) for key, value in padding.items()}
        if not reads:
            return batch
        if self.cache is not None:
            how = (self.config.conditioning, self.config.conditioning_constant)
            paths = [str(self.cache.path(*read, *how)) for read in reads]
            stored = [self.cache.load(path) for path in paths]
            if all(s is not None for s in stored):
                return batch | {"activations": torch.cat(stored)}
            batch["cache_paths"] = paths
        passes = [(*read[0], layers) for read, layers in reads]
        references = []
        for read, layers in reads:
            references.append((len(passes), *read[1][2:]) if len(read) > 1 else None)
            passes += [(*other[:2], layers) for other in read[1:]]
        return batch | {
            "read_ids": _pad([ids for ids, _, _ in passes], self.pad_id),
            "read_mask": _pad([[1] * len(ids) for ids, _, _ in passes], 0),
            "read_spans": [span for _, span, _ in passes],
            "read_layers": [layers for _, _, layers in passes],
            "read_references": references,
            "read_names": names,
        }


def _turn(pair: dict) -> tuple[str, str]:
    return pair["question"], pair["answer"]


def _pad(rows: list[list], value) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
