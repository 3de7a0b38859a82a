"""Attention masks for rows whose tokens are not as far apart as their columns: padding in the middle, branches side by side.

transformers takes a mask of four dimensions as it is, and counts a sliding window in columns otherwise; so models with a window are given
masks in which the window is counted in positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAD, PREFIX = -1, 0  # values of `branch`; branches count from 1


def window(config) -> int | None:
    """The length of the model's sliding window; None if all its layers see everything."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    return getattr(text, "sliding_window", None) if not types or "sliding_attention" in types else None


def layer_masks(config, seen: Tensor, distance: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """What to give the model as `attention_mask`: one additive mask (B, 1, Q, K), or one per type of layer where types differ.

    seen      (B, Q, K)  bool, which keys a query may attend to, windows aside
    distance  (B, Q, K)  the query's position less the key's

    Additive, because eager attention takes a boolean 4-D mask for numbers without complaint.
    """

    def additive(allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)

    length = window(config)
    if length is None:
        return additive(seen)
    near = additive(seen & (distance < length))
    if getattr(config.get_text_config(), "layer_types", None):
        return {"full_attention": additive(seen), "sliding_attention": near}
    return near


def block_mask(config, branch: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The attention mask for rows of `branch` (B, S), as the model of `config` takes it: causal, within the prefix and one's own branch.

    Padding sees itself only (no empty rows).
    """
    size = branch.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=branch.device).tril()
    query, key = branch.unsqueeze(2), branch.unsqueeze(1)
    seen = causal & ((key == query) | (key == PREFIX)) & (key != PAD) & (query != PAD)
    seen |= torch.eye(size, dtype=torch.bool, device=branch.device)
    return layer_masks(config, seen, positions.unsqueeze(2) - positions.unsqueeze(1), dtype)
