"""Attention masks for rows whose tokens are not as far apart as their columns: padding in the middle, branches side by side.

transformers takes a mask of four dimensions as it is, and counts a sliding window in columns otherwise; so models with a window are given
masks in which the window is counted in positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
