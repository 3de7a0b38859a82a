"""Neutral chats: everyday requests that ask for no particular behaviour, and what the unsteered model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import yaml
from torch import Tensor

from lqa.activations import Capture
from lqa.chat import render, resolve_span
from lqa.errors import LqaError
from lqa.models import Base


@cache
def load_neutral() -> dict[str, tuple[str, ...]]:
    """{"train", "held_out"}: the packaged requests; the second part is for early stopping and for finding a strength."""
    parts = yaml.safe_load(Path(__file__).with_name("neutral.yaml").read_text(encoding="utf-8"))
    return {name: tuple(requests) for name, requests in parts.items()}


@dataclass
class Neutral:
    """A neutral chat as tokens, with what the unsteered model computes for it (filled on the first visit).

    ids       the rendered chat
    span      the tokens that are read (N)
    places    the tokens where the KL is taken (M): those whose next one is the user's own words.  What comes behind the generation header
              is not among them: it is the reply, which shall change
    h0        {read layer: (N, D)}
    logprobs  (M, V) in float16, of the next token; None where no KL is asked for
    """

    ids: list[int]
    span: list[int]
    places: list[int]
    h0: dict[int, Tensor] | None = None
    logprobs: Tensor | None = None

    @classmethod
    def of(cls, base: Base, request: str, span: str) -> Neutral:
        rendered = render(base.tokenizer, [{"role": "user", "content": request}])
        if len(rendered) > base.context:
            raise LqaError(f"A neutral chat has {len(rendered)} tokens, more than the model's context of {base.context}.")
        places = [i - 1 for i, token in enumerate(rendered.tokens) if i and token.turn == 0 and token.content]
        return cls(rendered.ids, resolve_span(span, rendered), places)

    def run(self, base: Base, layers: Sequence[int], logits: bool, *adapters) -> tuple[dict[int, Tensor], Tensor | None]:
        """A pass of the target with `adapters` on: activations {layer: (N, D)} and log-probabilities (M, V), both in the graph.

        Without `logits` it ends after the deepest of `layers`.
        """
        ids = torch.tensor([self.ids], device=base.device)
        span, places = (torch.tensor(indices, device=base.device) for indices in (self.span, self.places))
        found = None
        with base.using(*adapters) as model, Capture(base.blocks, layers, stop=not logits) as captured:
            found = model(input_ids=ids, use_cache=False, logits_to_keep=places if logits else 1).logits
        return {k: captured[k][0, span] for k in layers}, found[0].float().log_softmax(-1) if logits else None

    def reference(self, base: Base, layers: Sequence[int], logits: bool) -> None:
        """Fills `h0` and `logprobs`."""
        if self.h0 is None:
            with torch.no_grad():
                self.h0, logprobs = self.run(base, layers, logits)
            self.logprobs = logprobs.half() if logits else None
