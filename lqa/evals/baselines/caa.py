"""Contrastive activation addition (Panickssery et al. 2024, arXiv 2312.06681): a vector, added to the residual stream behind one block.

Section 3: the vector is the mean, over pairs, of the difference between the residual streams of two texts that differ in the behaviour,
taken at the answer; it is added, times a multiplier, at all positions behind the user's prompt.  The paper's pairs are one question with
two given answers.  A control has none, so here a pair is one reply, sampled under the control, behind the control as system prompt and
behind none; the residual stream is averaged over the positions from which the reply is predicted, the prompt's last token to the reply's
last but one, and that is where the vector is added.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqa.activations import capture, output_tensor
from lqa.chat import render
from lqa.errors import LqaError
from lqa.evals.baselines.imitation import draw, sample
from lqa.models import Base
from lqa.steering import Settings

FILE = "vector.safetensors"


@dataclass(frozen=True)
class Addition:
    """`vector` (D) to be added behind block `layer` of `base`."""

    base: Base
    layer: int
    vector: Tensor

    def session(self, multiplier: float) -> Callable[[], AbstractContextManager]:
        """As Base.decoding, for lqa.engine: the vector acts where the logits are asked for of passes that continue a prefix.

        That is from the prompt's last token on: in `decode` always, in `score` where a row's suffix is that token, as
        engine.common_prefix leaves it of one prompt (else also at some tokens before it, where answers of one batch differ in length).
        """
        return partial(self._added, multiplier) if multiplier else self.base.decoding

    @contextmanager
    def _added(self, multiplier: float):
        shift, columns = multiplier * self.vector, 0

        def begin(module, args, kwargs) -> None:
            nonlocal columns
            cache, keep = kwargs.get("past_key_values"), kwargs.get("logits_to_keep")
            if cache is None or not isinstance(keep, int):
                raise LqaError("An activation addition acts on replies behind a prefilled prompt; run the model through lqa.engine.")
            columns = keep if cache.get_seq_length() else 0

        def add(module, args, output):
            if not columns:
                return None
            h = output_tensor(output)
            h = torch.cat([h[:, :-columns], h[:, -columns:] + shift.to(h)], 1)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        with self.base.decoding() as model:
            hooks = [model.register_forward_pre_hook(begin, with_kwargs=True), self.base.blocks[self.layer].register_forward_hook(add)]
            try:
                yield model
            finally:
                for hook in hooks:
                    hook.remove()

    def save(self, folder: Path) -> None:
        save_file({"vector": self.vector.cpu().contiguous()}, folder / FILE)

    def remove(self) -> None:
        """There is nothing to take out: outside of a session no trace of it is in the model."""

    @classmethod
    def load(cls, base: Base, layer: int, folder: Path) -> Addition:
        """Raises LqaError if the file in `folder` is absent, damaged, or made for another width."""
        try:
            vector = load_file(folder / FILE)["vector"]
        except (OSError, SafetensorError, KeyError) as error:
            raise LqaError(f"{folder / FILE} cannot be read ({error}); remove its folder, and it is made again.") from error
        if vector.shape != (base.hidden_size,):
            raise LqaError(f"{folder / FILE} has the shape {tuple(vector.shape)}, but {base.name} is {base.hidden_size} wide.")
        return cls(base, layer, vector.to(base.device))


def check_layer(base: Base, layer: int | None) -> int:
    """`layer`, or the middle block for None.  Raises LqaError if there is no such block."""
    layer = (len(base.blocks) - 1) // 2 if layer is None else layer
    if not isinstance(layer, int) or not 0 <= layer < len(base.blocks):
        raise LqaError(f"There is no block {layer!r}; this model has the blocks 0 to {len(base.blocks) - 1}.")
    return layer


def find(decoder, control: str, layer: int, settings: Settings) -> tuple[Addition, dict]:
    """The vector of `control` behind block `layer`, from as many pairs as the settings have examples (at most one for each of their chats),
    and {"examples", "sampling" (seconds), "norm" (of the vector)}."""
    base, begun = decoder.base, time.perf_counter()
    requests = draw(settings)[0][: settings.steps * settings.batch]
    examples = sample(decoder, requests, control, settings.seed)
    sampling = time.perf_counter() - begun
    total = torch.zeros(base.hidden_size, device=base.device)
    for request, example in zip(requests, examples, strict=True):
        chat = [{"role": "system", "content": control}, {"role": "user", "content": request}]
        under = render(base.tokenizer, chat).ids + example.ids[-example.n :]
        total += _mean(base, under, example.n, layer) - _mean(base, example.ids, example.n, layer)
    vector = total / len(examples)
    return Addition(base, layer, vector), {"examples": len(examples), "sampling": sampling, "norm": vector.norm().item()}


def _mean(base: Base, ids: list[int], n: int, layer: int) -> Tensor:
    """The residual stream behind block `layer`, averaged over the positions from which the last `n` tokens are predicted: (D)."""
    tokens = torch.tensor([ids], device=base.device)
    with base.decoding() as model:
        return capture(model, base.blocks, tokens, torch.ones_like(tokens), [layer])[layer][0, -n - 1 : -1].float().mean(0)
