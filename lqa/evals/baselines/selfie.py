"""SelfIE (Chen, Vondrick and Mao 2024, arXiv 2403.10949): the target summarises a message whose words are its own activations.

Section 3: five placeholders in the user's turn, in the chat format of the model, and the reply begun; after an early block (block 0 is
what the released code's k = 1 means: the input of block 1) all five become the one activation to be read, and the model goes on.
"""

from __future__ import annotations

from torch import Tensor

from lqa.chat import render
from lqa.evals.batch import Prompt, Run, patch
from lqa.injection import Operation
from lqa.models import Base

PLACEHOLDERS = 5
OPENING = "Sure, I'll summarize your message:"
WRITE_LAYER = 0


def selfie(base: Base, activations: Tensor, write_layer: int = WRITE_LAYER) -> Run:
    """The interpretation prompt, once for each of the activations (R, D)."""
    rendered = render(base.tokenizer, [{"role": "user", "content": " _" * PLACEHOLDERS}])
    slots = [token.content for token in rendered.tokens]
    # A template may trim, and a tokenizer merge: five slots of the placeholder's token, whatever its text has become.
    first, last = slots.index(True), len(slots) - slots[::-1].index(True)
    filler = base.tokenizer(" _", add_special_tokens=False)["input_ids"][-1]
    opening = base.tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    ids = [*rendered.ids[:first], *[filler] * PLACEHOLDERS, *rendered.ids[last:], *opening]
    mask = [False] * first + [True] * PLACEHOLDERS + [False] * (len(ids) - first - PLACEHOLDERS)
    values = list(activations.unsqueeze(1).expand(-1, PLACEHOLDERS, -1))
    return patch(base, base.decoding, [Prompt(ids, mask)] * len(values), values, write_layer, Operation("replace"))
