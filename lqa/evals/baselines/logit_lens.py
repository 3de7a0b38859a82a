"""The logit lens (nostalgebraist 2020): what the model would say next if it stopped at this layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lqa.injection import Injection, Operation
from lqa.models import Base


def logit_lens(base: Base, activations: Tensor) -> Tensor:
    """(R, D) -> (R, V): the model's final norm and unembedding of each activation.

    They are put behind the last block, where the model's own forward pass does the rest (Patchscopes, section 3: the logit lens is
    the Patchscope with l* = L), so that nothing needs to know what this architecture calls its norm.
    """
    slots = torch.ones(1, len(activations), dtype=torch.bool, device=base.device)
    with base.decoding() as model, Injection(base, len(base.blocks) - 1, Operation("replace")) as injection:
        with injection.armed(slots, activations):
            return model(input_ids=torch.zeros_like(slots, dtype=torch.long)).logits[0].float()
