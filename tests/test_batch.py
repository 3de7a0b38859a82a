"""Batches: the answers and scores of many prompts are those of each alone, whatever shares a batch."""

import pytest
import torch

from lqa import LqaError
from lqa.activations import output_tensor
from lqa.config import default_prompt
from lqa.evals import batch
from lqa.grounding import donor_activations, map_linearly, text_only, text_only_scores

CHATS = [("Speak like a pirate.", "What of the city?"), ("Be a doctor.", "What of the city?"), ("Cook.", "Tell me about the weather!")]
BOTH = {"layers_per_reading": 2, "default_layer": [0, 1]}  # a decoder that reads two layers at once
QUESTIONS = ["Who is it?", "How will the assistant speak?"]
ANSWERS = ["Like a pirate.", "It is a doctor from France who likes to cook.", "Formally."]


def readings(decoder):
    """Of two spans, one of them with two hidden contexts."""
    return [decoder.read([{"role": "system", "content": s}, {"role": "user", "content": u}], "from:1") for s, u in CHATS]


@pytest.mark.parametrize("width", [1, 3, 32])
@pytest.mark.parametrize("changes", [{}, BOTH | {"conditioning": "projected"}, {"positions": "shifted"}, {"family": "gemma3"}])
def test_batched_answers_are_those_of_one_reading(tiny_decoder, width, changes):
    decoder = tiny_decoder(**changes)
    found = readings(decoder)
    asked = [(r, q) for r in found for q in QUESTIONS]
    prompts = [batch.ask(r, q, source) for source in ("true", "none", "shuffled") for r, q in asked]
    said = batch.say(batch.adapted(decoder), prompts, 6, width=width)
    alone = [r._decode([q], (source,), 6)[0] for source in ("true", "none", "shuffled") for r, q in asked]
    assert [s.text for s in said] == [s.text for s in alone] == batch.texts(batch.adapted(decoder), prompts, 6)
    assert [s.probability for s in said] == pytest.approx([s.probability for s in alone], abs=1e-5)
    assert len({s.text for s in said}) > 2  # the tiny decoder does answer differently


@pytest.mark.parametrize("changes", [{}, BOTH | {"conditioning": "projected"}, {"family": "gemma3"}])
def test_a_guided_decoder_answers_alone_and_in_a_batch_alike_and_otherwise_than_unguided(tiny_decoder, changes):
    plain, decoder = (tiny_decoder(**changes, guidance=weight) for weight in (0.0, 2.0))
    said, by = {}, {}
    for name, own in (("plain", plain), ("guided", decoder)):
        asked = [(r, q, source) for source in ("true", "none", "shuffled") for r in readings(own) for q in QUESTIONS]
        by[name] = [r._decode([q], (source,), 6)[0].text for r, q, source in asked]
        said[name] = batch.texts(batch.adapted(own), [batch.ask(*entry) for entry in asked], 6)
    n = len(by["plain"]) // 3
    assert said == by and said["guided"][:n] != said["plain"][:n]
    assert said["guided"][n : 2 * n] == said["plain"][n : 2 * n]  # held against itself
    reading = readings(decoder)[0]
    *_, last = reading.answers(QUESTIONS, max_new_tokens=6)
    assert [a.text for a in last] == [a.text for a in reading.ask(QUESTIONS, max_new_tokens=6)] == by["guided"][: len(QUESTIONS)]
    assert reading.references(QUESTIONS, max_new_tokens=6)[0].none == by["plain"][n]


@pytest.mark.parametrize("changes", [BOTH, {"positions": "shifted"}, {"family": "gemma3"}])
def test_batched_scores_are_those_of_one_reading(tiny_decoder, changes):
    decoder = tiny_decoder(**changes)
    found = readings(decoder)
    pairs = [(r, a) for a in ANSWERS for r in found]  # not in the order of the batches
    for source in ("true", "none", "shuffled"):
        prompts = [batch.ask(r, QUESTIONS[0], source) for r, _ in pairs]
        scores = batch.score(batch.adapted(decoder), prompts, [a for _, a in pairs], width=4)
        assert scores == pytest.approx([r.logprobs(QUESTIONS[0], [a], source)[0] for r, a in pairs], abs=1e-5)
    matrix = batch.matrix(batch.adapted(decoder), prompts[:3], ANSWERS)
    assert [row[n] for n in range(3) for row in matrix] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, BOTH | {"conditioning": "projected"}, {"family": "gemma3"}])
def test_up_to_the_write_layer_prompts_that_differ_in_what_is_injected_run_as_one(tiny_decoder, changes):
    decoder = tiny_decoder(**{"write_layer": 0} | changes)
    first = readings(decoder)[0]
    prompts = [batch.ask(first, QUESTIONS[0], source) for source in ("true", "none", "shuffled")]
    rows, blocks = {0: [], 1: []}, decoder.base.blocks
    handles = [blocks[k].register_forward_pre_hook(lambda _, args, k=k: rows[k].append(len(args[0]))) for k in rows]
    found = batch.matrix(batch.adapted(decoder), prompts, ANSWERS)
    said = batch.texts(batch.adapted(decoder), prompts, 1)
    for handle in handles:
        handle.remove()
    assert rows[1] == [3 * n for n in rows[0]] and sum(rows[0]) == 1 + len(ANSWERS) + 2  # prompt, answers; prompt, question
    alone = [first.logprobs(QUESTIONS[0], ANSWERS, source) for source in ("true", "none", "shuffled")]
    assert [x for row in found for x in row] == pytest.approx([x for row in alone for x in row], abs=1e-5)
    assert said == [first._decode(QUESTIONS[:1], (source,), 1)[0].text for source in ("true", "none", "shuffled")]


def test_a_decoder_of_text_is_asked_the_same_way(tiny_decoder):
    decoder = tiny_decoder(injection="visible_text", injection_constant=None)
    found = readings(decoder)
    for source in ("true", "none"):
        prompts = [batch.ask(r, QUESTIONS[0], source) for r in found]
        alone = [r._decode(QUESTIONS[:1], (source,), 6)[0].text for r in found]
        assert batch.texts(batch.adapted(decoder), prompts, 6) == alone


def test_shuffled_is_the_donor_mapped_onto_the_slots(tiny_decoder):
    first, second, third = readings(tiny_decoder(**BOTH))
    assert batch.ask(first, "Who is it?", "shuffled", second).injected is second.injected  # equal spans share a decode
    prompt = batch.ask(first, "Who is it?", "shuffled", third)
    assert torch.equal(prompt.injected, map_linearly(third.injected, len(first.span), 2))
    assert prompt._replace(injected=None).name == batch.ask(first, "Who is it?", "none").name
    assert torch.equal(batch.ask(first, "?", "shuffled").injected, donor_activations(first))


def test_text_only_in_batches_is_that_of_one_reading(tiny_decoder):
    decoder = tiny_decoder()
    found, bare = readings(decoder), batch.bare(decoder)
    prompts = [batch.text_only(reading, QUESTIONS[0]) for reading in found]
    assert batch.texts(bare, prompts, 5) == [text_only(r, QUESTIONS[:1], 5)[0] for r in found]
    scores = batch.score(bare, prompts, ["Formally."] * 3)
    assert scores == pytest.approx([text_only_scores(r, QUESTIONS[0], ["Formally."])[0] for r in found], abs=1e-5)
    assert scores[0] == scores[1]  # the same visible text


def test_samples_are_seeded_and_differ(tiny_decoder):
    decoder = tiny_decoder()
    prompts = [batch.ask(readings(decoder)[0], QUESTIONS[0])] * 4

    def said(seed):
        return batch.say(batch.adapted(decoder), prompts, 6, temperature=1.0, seed=seed)

    assert said(3) == said(3) != said(4)
    assert len({s.text for s in said(3)}) > 1


def test_chats_get_the_models_reply(tiny_decoder):
    decoder = tiny_decoder()
    chats = [[{"role": "user", "content": "What of it?" + " Please." * n}] for n in (0, 2, 1, 2)]
    prompts = [batch.plain(decoder.base, chat) for chat in chats]
    assert batch.texts(batch.bare(decoder), prompts, 6) == [decoder.generate(chat, max_new_tokens=6) for chat in chats]


def slow_greedy(base, prompt, write_layer, n):
    """Greedy decoding without a cache: at every step the whole text, its slots written by a hook of its own."""
    ids = list(prompt.ids)
    module = base.embeddings if write_layer < 0 else base.blocks[write_layer]

    def hook(_, args, output):
        h = output_tensor(output).clone()
        if prompt.injected is not None:
            h[0, [i for i, slot in enumerate(prompt.slots) if slot]] = prompt.injected
        return (h, *output[1:]) if isinstance(output, tuple) else h

    for _ in range(n):
        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([ids])).logits[0, -1]
        handle.remove()
        ids.append(int(logits.argmax()))
    return base.tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("write_layer", [-1, 1])
def test_patched_prompts_go_on_as_without_cache(tiny, monkeypatch, ends, write_layer):
    """Slots of many lengths, at the end of a prompt or not, one prompt not patched, one with another beginning."""
    base = tiny("llama")
    template = default_prompt(base.tokenizer)
    monkeypatch.setattr(type(template), "stop_ids", lambda self, tokenizer: [])
    tail, prompts = [] if ends else [9, 10], []
    for n, first in ((1, 5), (3, 5), (2, 5), (2, 11)):
        h = torch.randn(n, base.hidden_size, generator=torch.Generator().manual_seed(n))
        slots = (*[False] * 3, *[True] * n, *[False] * len(tail))
        prompts.append(batch.Prompt((first, 6, 7, *[8] * n, *tail), slots, h))
    prompts.append(prompts[1]._replace(injected=None))
    runner = batch.Runner(base, base.decoding, template, write_layer)
    found = batch.texts(runner, prompts, 5)
    assert found == [slow_greedy(base, prompt, write_layer, 5) for prompt in prompts] and len(set(found)) > 2
    if ends:
        with pytest.raises(LqaError, match="ends in a slot"):
            batch.score(runner, prompts, ["It."] * len(prompts))


def test_prompts_that_cannot_be_run_are_refused(tiny):
    base = tiny("llama")
    runner = batch.Runner(base, base.decoding, default_prompt(base.tokenizer))
    h = torch.ones(2, 1, base.hidden_size)
    with pytest.raises(LqaError, match="begins with its slots"):
        batch.say(runner, [batch.Prompt((8, *[7] * n), (True, *[False] * n), h[n]) for n in (0, 1)], 3)
    with pytest.raises(LqaError, match="a single token"):
        batch.score(runner, [batch.Prompt((5,))], ["It."])
    long = batch.Prompt(tuple([5] * (base.context - 2)))
    with pytest.raises(LqaError, match=f"context is {base.context}"):
        batch.say(runner, [long], 3)
    assert len(batch.say(runner, [long], 2)) == 1 and batch.say(runner, [], 3) == []


def test_states_are_those_of_single_passes(tiny_decoder):
    decoder = tiny_decoder()
    found = readings(decoder)
    states = batch.states(decoder.base, [r.rendered for r in found], [0, 1])
    for reading, own in zip(found, states, strict=True):
        torch.testing.assert_close(own[1][list(reading.span)], reading.activations)


def test_batches_hold_one_group_and_the_same_runs_once():
    ran = []

    def run(index, number):
        ran.append(index)
        return [f"{i} in {number}" for i in index]

    found = batch._batched(["a", "b", "c", "a", "d", "e"], [(1, 0), (0, 0), (1, 0), (1, 0), (0, -1), (1, 0)], 2, run)
    assert ran == [[4, 1], [0, 2], [5]]
    assert found == ["0 in 1", "1 in 0", "2 in 1", "0 in 1", "4 in 0", "5 in 2"]
