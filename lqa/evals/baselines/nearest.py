"""The nearest of a few known texts: what is injected, compared with what the write layer holds for each text, and no decoder.

The maps of "projected" are fitted to write-layer means; so this tells what is lost on the way to the slots from what the decoder's LoRA
makes of the slots.  It is told the candidates, as a probe is, but trained on none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lqa.conditioning import write_layer_means
from lqa.decoder import Reading


def nearest(readings: Sequence[Reading], texts: Sequence[str]) -> list[list[float]]:
    """For every reading, its cosine with each text; both are centred on their means over all readings and over all texts."""
    decoder = readings[0].decoder
    found = torch.stack([reading.injected.double().mean(0).cpu() for reading in readings])
    wanted = write_layer_means(decoder.base, decoder.config, texts)
    return (F.normalize(found - found.mean(0), dim=-1) @ F.normalize(wanted - wanted.mean(0), dim=-1).T).tolist()
