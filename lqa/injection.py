"""Injection: the operation that writes activations into the slots of a decoder's residual stream.

`inject` is the whole of it, a pure function on tensors.  `Injection` is the hook that applies it to one block's output (or to the
embeddings) for as long as it is armed, and that refuses to be a no-op in silence.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lqa.activations import output_tensor
from lqa.errors import LqaError

OPERATIONS = ("replace", "replace_scaled", "add_normed")


class Operation(NamedTuple):
    """How an activation h meets the residual z of its slot; see `inject`.  `constant` is c or a; `replace` has none."""

    name: str
    constant: float | None = None

    def check(self) -> Operation:
        if self.name not in OPERATIONS:
            raise LqaError(f"The injection {self.name!r} is unknown; supported are {', '.join(OPERATIONS)}.")
        if (self.constant is None) != (self.name == "replace"):
            wants = "takes no constant" if self.name == "replace" else "needs a constant"
            raise LqaError(f"The injection {self.name!r} {wants}, but the constant is {self.constant!r}.")
        return self


def inject(residual: Tensor, slots: Tensor, activations: Tensor, operation: Operation) -> Tensor:
    """Returns `residual` with `activations` written into its slots; everything else is passed through unchanged.

    residual     (B, S, D)  the decoder's residual stream after the write layer
    slots        (B, S)     bool, True at slot positions
    activations  (N, D)     one per slot, in row-major order of `slots`
    operation    replace         z <- h                       LatentQA (Pan et al. 2024, section 3)
                 replace_scaled  z <- c h / |h|
                 add_normed      z <- z + a |z| h / |h|       Activation Oracles (Karvonen et al. 2025)

    Out of place and differentiable in `activations` and `residual`.  Raises LqaError if the number of slots differs from the number
    of activations, if widths differ, or if an activation is not finite.
    """
    count = int(slots.sum())
    if slots.shape != residual.shape[:2] or activations.dim() != 2 or activations.shape[1] != residual.shape[2]:
        raise LqaError(
            f"Shapes do not fit: residual {tuple(residual.shape)}, slots {tuple(slots.shape)}, activations {tuple(activations.shape)}; "
            "the activations are probably those of another model."
        )
    if count != activations.shape[0]:
        raise LqaError(
            f"{count} slots but {activations.shape[0]} activations: slots were merged by the tokenizer, or the span is not the prompt's."
        )
    if not torch.isfinite(activations).all():
        raise LqaError("An activation to inject is not finite (NaN or infinite); the target's forward pass has overflowed.")
    h = activations.to(residual.dtype)
    if operation.name != "replace":
        norm = h.norm(dim=-1, keepdim=True)
        direction = h / norm.masked_fill(norm == 0, 1)  # nothing to point at stays nothing, in the gradient too
        if operation.name == "replace_scaled":
            h = operation.constant * direction
        else:
            z = residual[slots]
            h = z + operation.constant * z.norm(dim=-1, keepdim=True) * direction
    # masked_scatter copies; an in-place write would break autograd and the caller's tensor
    return residual.masked_scatter(slots.unsqueeze(-1), h)


class Injection:
    """The hook.  Registered on the write layer (block l, or the embeddings for l = -1) while the context manager is open.

        with Injection(base, write_layer=0, operation=Operation("replace")) as injection:
            with injection.armed(slots, activations):
                model(input_ids)                         # the prefill: patched
            model(next_ids)                              # not armed: untouched

    `armed` raises LqaError if the pass it encloses did not run the hook (a hook on the wrong module injects nothing and nobody
    would notice).  Gradient checkpointing may run it again during backward with the same result, so long as it stays armed.
    """

    def __init__(self, base, write_layer: int, operation: Operation):
        self.module = base.embeddings if write_layer < 0 else base.blocks[write_layer]
        self.operation = operation.check()
        self._handle, self._values, self._fired = None, None, 0

    def __enter__(self) -> Injection:
        self._handle = self.module.register_forward_hook(self._hook)
        return self

    def __exit__(self, *_) -> None:
        self._handle.remove()
        self._handle, self._values = None, None

    def arm(self, slots: Tensor, activations: Tensor) -> None:
        """From here until `disarm`, every pass through the module is patched."""
        self._values, self._fired = (slots, activations), 0

    def disarm(self) -> None:
        self._values = None

    @property
    def fired(self) -> int:
        """How often it has run since it was armed."""
        return self._fired

    def check_fired(self) -> None:
        if not self._fired:
            raise LqaError("The injection did not run: the decoder's forward pass never went through the write layer.")

    @contextmanager
    def armed(self, slots: Tensor, activations: Tensor):
        self.arm(slots, activations)
        try:
            yield
            self.check_fired()
        finally:
            self.disarm()

    def _hook(self, module: nn.Module, args, output):
        if self._values is None:
            return None
        patched = inject(output_tensor(output), *self._values, self.operation)
        self._fired += 1
        return (patched, *output[1:]) if isinstance(output, tuple) else patched
