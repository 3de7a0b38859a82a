"""SelfIE (Chen, Vondrick and Mao 2024, arXiv 2403.10949): the target summarises a message whose words are its own activations.

Section 3: five placeholders in the user's turn, in the chat format of the model, and the reply begun; after an early block (block 0 is
what the released code's k = 1 means: the input of block 1) all five become the one activation to be read, and the model goes on.
"""

from __future__ import annotations

from torch import Tensor

from lqa.chat import render
from lqa.evals.batch import Prompt
from lqa.models import Base

PLACEHOLDERS = 5
OPENING = "Sure, I'll summarize your message:"
WRITE_LAYER = 0


def selfie(base: Base, activations: Tensor) -> list[Prompt]:
    """The interpretation prompt with five slots, once for each of the activations (R, D); the write layer is WRITE_LAYER."""
    rendered = render(base.tokenizer, [{"role": "user", "content": " _" * PLACEHOLDERS}])
    slots = [token.content for token in rendered.tokens]
    # A template may trim, and a tokenizer merge: five slots of the placeholder's token, whatever its text has become.
    first, last = slots.index(True), len(slots) - slots[::-1].index(True)
    filler = base.tokenizer(" _", add_special_tokens=False)["input_ids"][-1]
    opening = base.tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    ids = (*rendered.ids[:first], *[filler] * PLACEHOLDERS, *rendered.ids[last:], *opening)
    mask = tuple(first <= i < first + PLACEHOLDERS for i in range(len(ids)))
    return [Prompt(ids, mask, h.expand(PLACEHOLDERS, -1)) for h in activations.unsqueeze(1)]
