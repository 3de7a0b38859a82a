"""The control loss (DESIGN section 3), of LatentQA's control (Pan et al. 2024, section 3.3 of arXiv 2412.08686) with a KL term:

    L(theta) = E_x E_(q,a) [ -log p_D(a | q, injection(h_k(x; theta))) ]  +  lambda KL( p_0(.|x) || p_theta(.|x) )
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lqa.activations import Capture
from lqa.conditioning import condition
from lqa.config import IGNORE
from lqa.injection import Injection
from lqa.masks import block_mask
from lqa.steering.neutral import Neutral


@contextmanager
def bypassed(blocks):
    """The blocks pass their input through (hooks still run): the model computes what lies behind them.  Hold the base's lock."""
    for block in blocks:
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class ControlLoss:
    """-log p_D(a | q, injection(h)): mean over the pairs of the mean per token (nats, end of turn included); the decoder is frozen.

    All pairs are branches behind one prefix with slots (one decoder pass, logits at answer tokens only).  What the decoder computes up to
    its write layer does not depend on the activations: it is kept for every number of slots and choice of layers.
    """

    def __init__(self, decoder, qa: Sequence[tuple[str, str]], hidden: bool, autocast: bool = False):
        self.decoder, self.qa, self.hidden, self.autocast = decoder, list(qa), hidden, autocast
        self._rows: dict[tuple[int, tuple[int, ...]], dict] = {}

    def __call__(self, injected: Tensor, layers: Sequence[int]) -> Tensor:
        """A scalar for what is injected (B * N, D) for `layers`; differentiable in it.

        Raises LqaError if the pairs do not fit the context.
        """
        decoder, base, config = self.decoder, self.decoder.base, self.decoder.config
        row = self._row(len(injected) // len(config.blocks(layers)), tuple(layers))
        with torch.autocast(base.device.type, torch.bfloat16, enabled=self.autocast):
            with base.using(decoder.adapter) as model, Injection(base, config.write_layer, config.operation) as injection:
                with injection.armed(row["slots"], injected), bypassed(base.blocks[: config.write_layer + 1]):
                    logits = model(**row["inputs"], use_cache=False, logits_to_keep=row["places"]).logits[0]
        losses = F.cross_entropy(logits.float(), row["targets"], reduction="none")
        return (losses * row["weights"]).sum()

    def of_reading(self, h: dict[int, Tensor], chat: Neutral, layers: Sequence[int]) -> Tensor:
        """The loss for a steered target's activations h, {read layer: (N, D)}, of a neutral chat, of which the decoder reads `layers`."""
        return self(self.injected(h, chat, layers), layers)

    def injected(self, h: dict[int, Tensor], chat: Neutral, layers: Sequence[int]) -> Tensor:
        """What the decoder gets of h: (B * N, D).

        With `hidden` they are conditioned as the sidecar says, the unsteered target's activations of the same chat being the reference:
        to the decoder, the steering is a context that is hidden.  Without, they go in as those of a chat that hides nothing.
        """
        config = self.decoder.config
        how = (config.conditioning, config.conditioning_constant, self.decoder.projection)
        own, h0 = (torch.cat([acts[k] for k in layers]) if acts else None for acts in (h, chat.h0 if self.hidden else None))
        return condition(own, h0, None, config.blocks(layers), *how)

    def _row(self, slots: int, layers: tuple[int, ...]) -> dict:
        if (slots, layers) not in self._rows:
            self._rows[slots, layers] = self._build(slots, layers)
        return self._rows[slots, layers]

    def _build(self, slots: int, layers: Sequence[int]) -> dict:
        decoder, base, config = self.decoder, self.decoder.base, self.decoder.config
        lists = config.prompt.row(base.tokenizer, config.slot_token_id, slots, config.blocks(layers), self.qa)
        decoder.check_room(max(lists["position_ids"]) + 1, 0)
        row = {key: torch.tensor([values], device=base.device) for key, values in lists.items()}
        places = (row["labels"][0, 1:] != IGNORE).nonzero().squeeze(1)
        branches = row["branch"][0, places + 1]
        mask = block_mask(base.model.config, row["branch"], row["position_ids"], base.dtype)
        inputs = {"input_ids": row["input_ids"], "position_ids": row["position_ids"], "attention_mask": mask}
        if (write := config.write_layer) >= 0:
            with torch.no_grad(), torch.autocast(base.device.type, torch.bfloat16, enabled=self.autocast):
                with base.using(decoder.adapter) as model, Capture(base.blocks, [write]) as captured:
                    model(**inputs, use_cache=False)
            inputs["inputs_embeds"] = captured[write].to(base.dtype)
            del inputs["input_ids"]
        return {
            "inputs": inputs,
            "slots": row["slots"],
            "places": places,
            "targets": row["labels"][0, places + 1],
            "weights": 1 / (branches.bincount()[branches] * len(self.qa)),
        }


def divergence(chat: Neutral, logprobs: Tensor) -> Tensor:
    """KL( p_0 || p_theta ) in nats, mean over the chat's `places`; log-probabilities (M, V) of the steered model."""
    p0 = chat.logprobs.float()
    return (p0.exp() * (p0 - logprobs)).sum(-1).mean()
