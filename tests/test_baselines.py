"""Each baseline against its paper's own toy case, or what must hold by its definition."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lqa import LqaError
from lqa.activations import capture
from lqa.conditioning import write_layer_means
from lqa.config import default_prompt
from lqa.evals import batch
from lqa.evals.baselines.logit_lens import logit_lens
from lqa.evals.baselines.nearest import nearest
from lqa.evals.baselines.patchscopes import IDENTITY, patchscope
from lqa.evals.baselines.probe import cross_validated, learnable
from lqa.evals.baselines.selfie import OPENING, PLACEHOLDERS, WRITE_LAYER, selfie
from lqa.models import load_base


def state(base, ids: list[int], layer: int) -> torch.Tensor:
    """The residual stream of the last token after a block (D,)."""
    with base.decoding() as model:
        ids = torch.tensor([ids])
        return capture(model, base.blocks, ids, torch.ones_like(ids), [layer])[layer][0, -1].clone()


def runner(base, write_layer: int = 0) -> batch.Runner:
    """The bare model."""
    return batch.Runner(base, base.decoding, default_prompt(base.tokenizer), write_layer)


def test_logit_lens_at_the_last_layer_is_the_model(base):
    ids = base.tokenizer("What will the weather be", add_special_tokens=False)["input_ids"]
    with base.decoding() as model:
        own = model(input_ids=torch.tensor([ids])).logits[0].float()
    last = torch.stack([state(base, ids[: n + 1], len(base.blocks) - 1) for n in range(len(ids))])
    torch.testing.assert_close(logit_lens(base, last), own, rtol=1e-4, atol=1e-4)


def test_a_patchscope_of_a_prompt_into_itself_changes_nothing(base):
    """Section 3: with S = T, i = i*, l = l* and f the identity, the model goes on as ever; another token's state changes that."""
    prompt = "Speak like a pirate about the weather x"
    ids = base.tokenizer(prompt)["input_ids"]
    own = batch.texts(runner(base), [batch.Prompt(tuple(ids))], 6)
    for layer in range(len(base.blocks)):
        h = torch.stack([state(base, ids, layer), state(base, base.tokenizer("the doctor from France")["input_ids"], layer)])
        same, other = batch.texts(runner(base, layer), patchscope(base, h, prompt, "x"), 6)
        assert [same] == own and other != same


def test_a_placeholder_must_be_one_token_of_its_own(tiny):
    base = tiny("llama")
    h = torch.ones(1, base.hidden_size)
    for prompt in ("The city of the person", "He speaks of xylophones"):
        with pytest.raises(LqaError, match="as one token"):
            patchscope(base, h, prompt, "x")


def test_selfie_of_an_embedding_is_the_prompt_with_that_word(base):
    """At the embeddings, five copies of a word's embedding are five times the word: the model reads it as text."""
    word = base.tokenizer(" pirate", add_special_tokens=False)["input_ids"][0]
    found = batch.texts(runner(base, -1), selfie(base, base.embeddings(torch.tensor([word])).detach()), 6)
    filler = base.tokenizer(" _", add_special_tokens=False)["input_ids"][-1]
    opening = base.tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    text = base.tokenizer.apply_chat_template([{"role": "user", "content": "LQAMARK"}], tokenize=False, add_generation_prompt=True)
    head, tail = (base.tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split("LQAMARK"))
    written = [*head, *[word] * PLACEHOLDERS, *tail, *opening]
    unwritten = [*head, *[filler] * PLACEHOLDERS, *tail, *opening]
    assert found == batch.texts(runner(base), [batch.Prompt(tuple(written))], 6)
    assert found != batch.texts(runner(base), [batch.Prompt(tuple(unwritten))], 6)


WORDS = ["Paris", "music", "Monday", "doctor", "winter", "river"]


@pytest.mark.slow
def test_the_papers_prompts_read_words_off_the_embedded_model():
    """Patchscopes' token identity (section 4.1) and SelfIE's summary name the word that the state belongs to; the logit lens, which
    says what comes next, does not."""
    base = load_base()
    h = {
        layer: torch.stack([state(base, base.tokenizer(f"In the story there is a lot about {word}")["input_ids"], layer) for word in WORDS])
        for layer in (3, 7)
    }
    for layer, states in h.items():
        said = batch.texts(runner(base, layer), patchscope(base, states, IDENTITY, "?"), 3)
        assert sum(word in text for word, text in zip(WORDS, said, strict=True)) >= 5
    summaries = batch.texts(runner(base, WRITE_LAYER), selfie(base, h[7]), 10)
    assert sum(word.lower() in text.lower() for word, text in zip(WORDS, summaries, strict=True)) >= 4
    nexts = base.tokenizer.batch_decode(logit_lens(base, h[7]).argmax(-1).unsqueeze(1))
    assert not any(word in text for word, text in zip(WORDS, nexts, strict=True))


def blobs(labels: int, groups: int, each: int, seed: int = 0) -> tuple[torch.Tensor, list[str], list[str]]:
    """Linearly separable points: a direction for each label, an offset for each group, features of very different scales."""
    rng = np.random.default_rng(seed)
    directions, offsets = rng.normal(size=(labels, 12)), rng.normal(size=(groups, 12))
    y = [label for label in range(labels) for _ in range(groups * each)]
    g = [group for _ in range(labels) for group in range(groups) for _ in range(each)]
    x = 3 * directions[y] + 0.3 * offsets[g] + 0.3 * rng.normal(size=(len(y), 12))
    return torch.tensor(x * np.logspace(-2, 3, 12)), [f"label {n}" for n in y], [f"group {n}" for n in g]


def accuracy(x, y, g) -> float:
    logprobs, names = cross_validated(x, y, g)
    return float(np.mean([names[row.argmax()] == label for row, label in zip(logprobs, y, strict=True)]))


def test_the_probe_finds_what_is_linear_and_nothing_in_noise():
    x, y, g = blobs(4, 6, 5)
    assert accuracy(x, y, g) > 0.95
    shuffled = [y[i] for i in np.random.default_rng(1).permutation(len(y))]
    assert abs(accuracy(x, shuffled, g) - 0.25) < 0.15


def test_the_probe_never_sees_its_test_group():
    """A label that one group alone has cannot be learnt: remembering the group would name it."""
    x, y, g = blobs(3, 4, 5)
    y = ["alone" if group == "group 3" else label for label, group in zip(y, g, strict=True)]
    logprobs, names = cross_validated(x, y, g)
    alone = [i for i, label in enumerate(y) if label == "alone"]
    assert np.isneginf(logprobs[alone, names.index("alone")]).all()
    assert learnable(y, g) == {"label 0", "label 1", "label 2"}
    with pytest.raises(LqaError, match="two groups"):
        cross_validated(x, y, ["one"] * len(y))
    first, second = cross_validated(x, y, g)[0], cross_validated(x, y, g)[0]
    assert np.array_equal(first, second)


def test_the_nearest_text_is_found_where_the_slots_hold_it_and_lengths_do_not_count(tiny_decoder):
    decoder, texts = tiny_decoder("smol", conditioning="projected"), ["a pirate", "a nurse on a night shift", "one who counts sheep"]
    wanted = write_layer_means(decoder.base, decoder.config, texts).float()
    readings = [SimpleNamespace(decoder=decoder, injected=w.expand(n, -1)) for w, n in zip(wanted, (2, 5, 3), strict=True)]
    scores = torch.tensor(nearest(readings, texts))
    torch.testing.assert_close(scores.diagonal(), torch.ones(3, dtype=scores.dtype), rtol=1e-4, atol=1e-4)
    assert scores.argmax(-1).tolist() == [0, 1, 2]
    assert torch.tensor(nearest(readings[1:] + readings[:1], texts)).argmax(-1).tolist() == [1, 2, 0]
