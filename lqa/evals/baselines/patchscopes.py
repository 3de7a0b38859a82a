"""Patchscopes (Ghandeharioun et al. 2024, arXiv 2401.06102): the target goes on with another prompt, one of whose words was replaced.

Section 3: h = the source token's residual stream after block l; in the pass over the target prompt the residual stream after block l* at
the placeholder's position becomes h, and the model generates.  The placeholder's own computation up to l* is lost, everything before it
is as usual.
"""

from __future__ import annotations

import re

from torch import Tensor

from lqa.errors import LqaError
from lqa.evals.batch import Prompt
from lqa.models import Base

# Section 4.1, token identity: few-shot repetition; the model is to name the token that h belongs to.
IDENTITY = "cat -> cat; 135 -> 135; hello -> hello; ?"
# Section 4.3, entity description: few-shot, the model is to say what h is about.
DESCRIPTION = "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean multinational company, x"


def patchscope(base: Base, activations: Tensor, prompt: str, placeholder: str) -> list[Prompt]:
    """`prompt` with the last occurrence of `placeholder` as a slot, once for each of the activations (R, D); the write layer is l*.

    Raises LqaError if the placeholder is not in the prompt, or is not there as tokens of its own.
    """
    encoded = base.tokenizer(prompt, return_offsets_mapping=True)
    start, end = ([m.span() for m in re.finditer(rf"(?<!\w){re.escape(placeholder)}(?!\w)", prompt)][-1:] or [(-1, -1)])[0]
    slots = [start < b and a < end for a, b in encoded["offset_mapping"]]
    covered = "".join(prompt[a:b] for (a, b), slot in zip(encoded["offset_mapping"], slots, strict=True) if slot)
    if sum(slots) != 1 or covered.strip() != placeholder:
        raise LqaError(f"The prompt {prompt!r} does not hold {placeholder!r} as one token; choose another placeholder.")
    return [Prompt(tuple(encoded["input_ids"]), tuple(slots), h) for h in activations.unsqueeze(1)]
