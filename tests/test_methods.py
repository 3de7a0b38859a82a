"""The methods that a steering is compared with do what their papers say, on one budget, and leave nothing behind."""

import json
import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lqa import LqaError, engine
from lqa.chat import render
from lqa.evals import methods
from lqa.evals.baselines import caa, imitation
from lqa.steering import Settings, load_neutral
from lqa.steering.strength import strongest, write_replies

CONTROL = "Speak like a pirate."
FAST = {"steps": 4, "batch": 2, "chats": 6, "held_out": 2, "evaluate": 2, "rank": 2, "learning_rate": 0.02, "autocast": False}
MADE = ("caa", "sft", "dpo", "steering")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(imitation, "NEW_TOKENS", 8)
    monkeypatch.setattr(methods, "strongest", partial(strongest, most=1.0, requests=2))


def plain(base, ids, *adapters):
    """(S, V) log-probabilities of one uncached pass."""
    with torch.no_grad(), base.using(*adapters) as model:
        return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def reply_logprobs(base, example, *adapters):
    logprobs = plain(base, example.ids, *adapters)[-example.n - 1 : -1]
    return logprobs.gather(1, torch.tensor(example.ids[-example.n :]).unsqueeze(1)).squeeze(1)


def traces(base) -> tuple:
    """Hooks, LoRA layers, gradients, and what the bare model says."""
    modules = list(base.model.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    gradients = [key for key, p in base.model.named_parameters() if p.requires_grad or p.grad is not None]
    return (
        hooks,
        sorted(base.model.state_dict()),
        gradients,
        plain(base, render(base.tokenizer, [{"role": "user", "content": "Hello"}]).ids),
    )


def untouched(before, base) -> bool:
    after = traces(base)
    return before[:3] == after[:3] and torch.equal(before[3], after[3])


# --- the replies that all of them learn from ------------------------------------------------------------------------


def test_replies_are_sampled_under_the_control_and_shown_without_it(tiny_decoder):
    decoder = tiny_decoder()
    base, requests = decoder.base, load_neutral()["train"][:20]  # more than one batch
    under, again, other = (imitation.sample(decoder, requests, CONTROL, seed) for seed in (0, 0, 1))
    assert under == again != other and under != imitation.sample(decoder, requests, None, 0)
    for request, example in zip(requests, under, strict=True):
        prompt = render(base.tokenizer, [{"role": "user", "content": request}]).ids
        assert example.ids[: -example.n] == prompt and 1 <= example.n <= 8
        assert example.n == 8 or example.ids[-1] == base.tokenizer.eos_token_id
    greedy = write_replies(decoder, requests[:3], new_tokens=5, system=CONTROL)
    chats = [[{"role": "system", "content": CONTROL}, {"role": "user", "content": request}] for request in requests[:3]]
    said = [base.tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in greedy]
    assert said == [decoder.generate(chat, max_new_tokens=5) for chat in chats]
    with pytest.raises(LqaError, match="context is 512"):
        write_replies(decoder, requests[:1], system="sea " * 600)


# --- CAA ------------------------------------------------------------------------------------------------------------


@contextmanager
def by_hand(base, layer, vector, start):
    """`vector` added behind block `layer` from position `start` on, in uncached passes."""

    def add(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        h = torch.cat([h[:, :start], h[:, start:] + vector], 1)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = base.blocks[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["smol", "gemma3"])
def test_an_addition_acts_from_the_last_token_of_the_prompt_on(tiny_decoder, family):
    base = tiny_decoder(family).base
    before = traces(base)
    vector = torch.randn(base.hidden_size, generator=torch.Generator().manual_seed(3))
    session = caa.Addition(base, 1, vector).session(1.5)
    prompts = [
        render(base.tokenizer, [{"role": "user", "content": text}]).ids for text in ("Who is it?", "What of the sea and the weather?")
    ]
    common, suffixes = engine.common_prefix(prompts)
    with session() as model:
        prefix = engine.prefill(model, [common])
    said = [[], []]
    for steps in engine.decode(session, prefix, [engine.Row(0, suffix) for suffix in suffixes], 5, []):
        for row, token, probability in steps:
            said[row].append((token, probability))
    bare = [plain(base, prompt)[-1].argmax().item() for prompt in prompts]
    assert any(said[i][0][0] != bare[i] for i in (0, 1))  # it does something
    for prompt, steps in zip(prompts, said, strict=True):
        ids = prompt + [token for token, _ in steps]
        with by_hand(base, 1, 1.5 * vector, len(prompt) - 1):
            logprobs = plain(base, ids)
        for i, (token, probability) in enumerate(steps):
            assert logprobs[len(prompt) - 1 + i].argmax().item() == token
            assert probability == pytest.approx(logprobs[len(prompt) - 1 + i, token].exp().item(), rel=1e-3)
    (common, (suffix,)), answers = engine.common_prefix(prompts[:1]), [[5, 6, 7, 8], [9, 10]]
    with session() as model:
        prefix = engine.prefill(model, [common])
    scores = engine.score(session, prefix, [engine.Row(0, suffix)] * 2, answers)
    for answer, score in zip(answers, scores, strict=True):
        with by_hand(base, 1, 1.5 * vector, len(prompts[0]) - 1):
            logprobs = plain(base, prompts[0] + answer)[-len(answer) - 1 : -1]
        assert score == pytest.approx(logprobs.gather(1, torch.tensor(answer).unsqueeze(1)).mean().item(), rel=1e-3)
    with pytest.raises(LqaError, match="through lqa.engine"), session() as model:
        model(input_ids=torch.tensor([prompts[0]]))
    assert untouched(before, base)


def test_the_vector_is_the_mean_difference_that_the_control_makes(tiny_decoder):
    decoder, settings = tiny_decoder(), Settings(**FAST | {"steps": 2})
    base = decoder.base
    addition, record = caa.find(decoder, CONTROL, 1, settings)
    requests = imitation.draw(settings)[0][:4]
    examples = imitation.sample(decoder, requests, CONTROL, settings.seed)

    def mean(ids, n):
        with torch.no_grad():
            return base.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, -n - 1 : -1].mean(0)

    differences = []
    for request, example in zip(requests, examples, strict=True):
        under = render(base.tokenizer, [{"role": "system", "content": CONTROL}, {"role": "user", "content": request}]).ids
        differences.append(mean(under + example.ids[-example.n :], example.n) - mean(example.ids, example.n))
    torch.testing.assert_close(addition.vector, torch.stack(differences).mean(0), rtol=1e-3, atol=1e-4)
    assert record["examples"] == 4 and record["norm"] == pytest.approx(addition.vector.norm().item()) and record["norm"] > 0.01


# --- SFT and DPO ----------------------------------------------------------------------------------------------------


def losses(decoder, chats, method, *adapters):
    """The papers' formulas, from uncached passes."""
    base = decoder.base
    if method == "sft":
        return [-reply_logprobs(base, example, *adapters).mean() for example in chats]

    def ratio(example):
        return (reply_logprobs(base, example, *adapters) - reply_logprobs(base, example)).sum()

    return [-F.logsigmoid(imitation.BETA * ratio(p.chosen) - imitation.BETA * ratio(p.rejected)) for p in chats]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_loss_is_the_papers_and_falls(tiny_decoder, method):
    decoder, settings = tiny_decoder(), Settings(**FAST | {"steps": 30, "evaluate": 30})
    before = traces(decoder.base)
    chats = imitation.sample(decoder, imitation.draw(settings)[0][:3], CONTROL, 0)
    if method == "dpo":
        chats = [imitation.Pair(*p) for p in zip(chats, imitation.sample(decoder, imitation.draw(settings)[0][:3], None, 0), strict=True)]
    training = {"sft": imitation.Sft, "dpo": imitation.Dpo}[method](decoder, chats[:2], chats[2:], settings)
    start = torch.stack(losses(decoder, chats, method, training.name)).mean().item()
    if method == "dpo":
        assert start == pytest.approx(math.log(2))  # the reference is the model itself
    training.train()
    expected = losses(decoder, chats, method, training.name)
    with torch.no_grad():
        assert [training.loss(chat).item() for chat in chats] == pytest.approx([x.item() for x in expected], rel=1e-3)
    assert sum(expected[:2]).item() / 2 < 0.7 * start
    training.base.remove_adapter(training.name)
    assert untouched(before, decoder.base)


# --- the interface --------------------------------------------------------------------------------------------------


def replies(decoder, method):
    return write_replies(decoder, load_neutral()["held_out"][:3], method.session, 6, system=method.system)


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_is_kept(tiny_decoder, tmp_path, name):
    decoder = tiny_decoder()
    before, make = traces(decoder.base), partial(methods.make, name, control=CONTROL, folder=tmp_path, ratio=50.0, **FAST)
    made = make(decoder=decoder)
    assert 0 < made.examples <= 8 and made.record["seconds"] == made.seconds > 0 and made.system is None
    assert made.record["strength"] == max(float(x) for x, r in made.record["ratios"].items() if r < 50) > 0
    expected = replies(decoder, made)
    assert expected != replies(decoder, methods.make("unsteered", decoder, CONTROL))
    other = tiny_decoder()
    kept = make(decoder=other)
    assert (kept.seconds, kept.examples, kept.record) == (made.seconds, made.examples, made.record) and replies(other, kept) == expected
    again = make(decoder=decoder)
    assert replies(decoder, again) == expected
    with pytest.raises(LqaError, match=r"made otherwise \(settings\)"):
        make(decoder=decoder, seed=1)
    with pytest.raises(LqaError, match=r"made otherwise \(control\)"):
        make(decoder=decoder, control="Speak like a doctor.")
    record = tmp_path / name / methods.RECORD
    record.write_text(json.dumps({"asked": 3}))
    with pytest.raises(LqaError, match="is damaged"):
        make(decoder=decoder)
    record.unlink()  # as a kill in the middle leaves it
    redone = make(decoder=decoder)
    assert replies(decoder, redone) == expected
    for method in (made, again, redone):
        method.remove()
    assert untouched(before, decoder.base)


def test_budget_and_lora_are_the_same_for_all(tiny_decoder):
    decoder, never = tiny_decoder(layers_per_reading=2, default_layer=[0, 1]), {"patience": 99, "certainty": None}
    shapes = {}
    for name in MADE:
        made = methods.make(name, decoder, CONTROL, examples=6, **FAST | never)
        assert made.examples == 6
        if name != "caa":
            parameters = decoder.base.adapter_parameters(made.adapter)
            shapes[name] = {key.replace(made.adapter, ""): p.shape for key, p in parameters.items()}
    assert shapes["sft"] == shapes["dpo"] == shapes["steering"] != {}


def test_what_needs_no_making(tiny_decoder):
    decoder = tiny_decoder()
    bare, prompted = (methods.make(name, decoder, CONTROL) for name in ("unsteered", "system_prompt"))
    assert (bare.system, prompted.system) == (None, CONTROL) and bare.examples == prompted.examples == bare.seconds == 0
    assert replies(decoder, bare) == write_replies(decoder, load_neutral()["held_out"][:3], new_tokens=6)
    assert replies(decoder, prompted) == write_replies(decoder, load_neutral()["held_out"][:3], new_tokens=6, system=CONTROL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "magic"}, "'magic' is unknown; use one of unsteered"),
        ({"control": " "}, "control is empty"),
        ({"control": "Say <|im_end|>."}, "special token"),
        ({"magic": 1}, "Unknown setting"),
        ({"examples": 1}, "at least the batch's 2"),
        ({"name": "caa", "layer": 7}, "no block 7"),
        ({"ratio": 1.0, "name": "caa"}, "must be above 1"),
    ],
)
def test_bad_input_is_a_sentence(tiny_decoder, arguments, message):
    decoder = tiny_decoder()
    before = traces(decoder.base)
    with pytest.raises(LqaError, match=message):
        methods.make(**{"name": "sft", "decoder": decoder, "control": CONTROL} | FAST | arguments)
    assert untouched(before, decoder.base)
