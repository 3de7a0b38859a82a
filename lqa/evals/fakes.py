"""Decoders that must not pass for readers: a suite that lets one pass measures nothing.

    random      the decoder, its LoRA random; its interval must include chance on the fixed message
    untrained   the decoder, its LoRA untrained.  Where the conditioning is `projected`, the injected difference is mapped to
                what the base model can read by itself, so this one may well be above chance: it is what training starts from

A third, trained on another control's activations, is a training run of its own (`mixture.shuffled_activations=true`, train.data).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lqa.decoder import LatentDecoder
from lqa.errors import LqaError

FAKES = ("random", "untrained")
STRENGTH = 1.0  # a random update's Frobenius norm, in units of that of the weight it is added to


def fake(decoder: LatentDecoder, kind: str, seed: int = 0) -> LatentDecoder:
    """A decoder on the same base, with the same sidecar and projection, whose LoRA is random or untrained.

    random: A and B have normal entries, B scaled so that the update's Frobenius norm is STRENGTH times that of the weight.
    """
    twin = LatentDecoder.from_pretrained(decoder.folder, base=decoder.base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in decoder.base.tuners(twin.adapter):
            a, b = module.lora_A[twin.adapter].weight, module.lora_B[twin.adapter].weight
            a.copy_(torch.randn(a.shape, generator=generator) / math.sqrt(a.shape[1]))
            b.zero_()
            if kind == "random":
                b.copy_(torch.randn(b.shape, generator=generator))
                norm = (b.float() @ a.float()).norm() * module.scaling[twin.adapter]
                b.mul_(STRENGTH * module.get_base_layer().weight.float().norm() / norm)
    twin.name = kind
    return twin


def add_row(rows: dict[str, LatentDecoder], decoder: LatentDecoder, row: str, seed: int) -> None:
    """Adds what `row` names, a fake or a decoder's folder, under its name.  Raises LqaError if it is neither."""
    if row in FAKES:
        rows[row] = fake(decoder, row, seed)
    elif Path(row).is_dir():
        rows[Path(row).resolve().name] = LatentDecoder.from_pretrained(row, base=decoder.base)
    else:
        raise LqaError(f"--rows names {row!r}, which is no decoder's folder; use {', '.join(FAKES)}, or a folder.")
