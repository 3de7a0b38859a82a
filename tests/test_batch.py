"""Batches: the answers and scores of many prompts are those of each alone."""

import pytest
import torch

from lqa import LqaError, engine
from lqa.activations import output_tensor
from lqa.evals import batch
from lqa.injection import Operation

QUESTION = "How will the assistant speak?"
ANSWERS = ["Like a pirate.", "Formally, with many words."]


def chats(n: int, vary: bool) -> list[list[dict[str, str]]]:
    words = ["pirate", "doctor", "cook", "sea"]
    systems = [{"role": "system", "content": f"Speak like a {words[i % 4]}."} for i in range(n)]
    return [[system, {"role": "user", "content": "What of it?" + " Please." * (i * vary)}] for i, system in enumerate(systems)]


@pytest.mark.parametrize("family", ["smol", "gemma3"])
@pytest.mark.parametrize("vary", [False, True])
def test_asked_is_what_each_reading_answers(tiny_decoder, family, vary):
    decoder = tiny_decoder(family)
    readings = [decoder.read(chat, "turn:-1", 1) for chat in chats(4, vary)]
    stop = decoder.config.prompt.stop_ids(decoder.base.tokenizer)
    injected = [reading.injected for reading in readings]
    found = batch.texts(decoder.base, batch.asked(decoder, 1, injected, QUESTION), 6, stop)
    assert found == [reading.ask(QUESTION, max_new_tokens=6)[0].text for reading in readings]
    assert len(set(found)) > 1
    ids = [decoder.config.prompt.answer(decoder.base.tokenizer, answer) for answer in ANSWERS]
    none = batch.scores(batch.asked(decoder, 1, injected, QUESTION, patched=False), ids)
    torch.testing.assert_close(torch.tensor(none), torch.tensor([r.logprobs(QUESTION, ANSWERS, "none") for r in readings]))
    if vary:
        with pytest.raises(LqaError, match="one by one"):
            batch.scores(batch.asked(decoder, 1, injected, QUESTION), ids)
    else:
        scores = batch.scores(batch.asked(decoder, 1, injected, QUESTION), ids)
        torch.testing.assert_close(torch.tensor(scores), torch.tensor([r.logprobs(QUESTION, ANSWERS) for r in readings]))


def slow_greedy(base, ids, slots, values, write_layer, n):
    """Greedy decoding without a cache: at every step the whole text, its slots written by a hook of its own."""
    ids = list(ids)
    module = base.embeddings if write_layer < 0 else base.blocks[write_layer]

    def hook(_, args, output):
        h = output_tensor(output).clone()
        h[0, [i for i, slot in enumerate(slots) if slot]] = values
        return (h, *output[1:]) if isinstance(output, tuple) else h

    out = []
    for _ in range(n):
        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([ids])).logits[0, -1]
        handle.remove()
        out.append(int(logits.argmax()))
        ids.append(out[-1])
    return out


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("write_layer", [-1, 1])
def test_patched_prompts_go_on_as_without_cache(tiny, ends, write_layer):
    base = tiny("llama")
    tail = [] if ends else [9, 10]
    prompts = [batch.Prompt([5, 6, 7, *[8] * n, *tail], [False] * 3 + [True] * n + [False] * len(tail)) for n in (1, 3, 2)]
    values = [torch.randn(n, base.hidden_size, generator=torch.Generator().manual_seed(n)) for n in (1, 3, 2)]
    run = batch.patch(base, base.decoding, prompts, values, write_layer, Operation("replace"))
    found = [[], [], []]
    for steps in engine.decode(run.session, run.prefix, run.rows, 5, []):
        for step in steps:
            found[step.row].append(step.token)
    assert found == [slow_greedy(base, *p, v, write_layer, 5) for p, v in zip(prompts, values, strict=True)]
    assert len({tuple(f) for f in found}) > 1


def test_plain_and_ragged_prompts_are_what_the_model_says(tiny_decoder):
    decoder = tiny_decoder()
    asked = [[{"role": "user", "content": "What of it?" + " Please." * n}] for n in (0, 2, 1, 2)]
    ids = batch.chat_ids(decoder.base, asked)
    stop = decoder.config.prompt.stop_ids(decoder.base.tokenizer)
    expected = [decoder.generate(chat, max_new_tokens=6) for chat in asked]
    assert batch.texts(decoder.base, batch.plain(decoder.base, ids), 6, stop) == expected
    assert batch.texts(decoder.base, batch.ragged(decoder.base, ids), 6, stop) == expected


def test_prompts_without_a_common_beginning_are_refused(tiny):
    base = tiny("llama")
    prompts = [batch.Prompt([5, 8], [False, True]), batch.Prompt([6, 8], [False, True])]
    with pytest.raises(LqaError, match="nothing in common"):
        batch.patch(base, base.decoding, prompts, [torch.ones(1, base.hidden_size)] * 2, 0, Operation("replace"))


def test_states_are_those_of_single_passes(tiny_decoder):
    decoder = tiny_decoder()
    readings = [decoder.read(chat, "all", 1) for chat in chats(3, True)]
    states = batch.states(decoder.base, [r.rendered for r in readings], [0, 1])
    for reading, found in zip(readings, states, strict=True):
        torch.testing.assert_close(found[1][list(reading.span)], reading.activations)


def test_groups_and_donors():
    assert batch.by_length([3, 1, 3, 2]) == [[1], [3], [0, 2]]
    assert [len(group) for group in batch.by_length([7] * (batch.ROWS + 1))] == [batch.ROWS, 1]
    a, b = torch.zeros(2, 4), torch.arange(3.0).unsqueeze(1).expand(3, 4)
    given = batch.donated([a, b])
    assert given[0][:, 0].tolist() == [0, 2] and given[1][:, 0].tolist() == [0, 0, 0]
