"""Steering: the gradient is the formula's, everything else stays bit for bit as it was, and what is applied is exactly the LoRA."""

import json
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lqa import LqaError, steering
from lqa.activations import Capture
from lqa.chat import render, resolve_span
from lqa.conditioning import condition
from lqa.corpus import load_messages
from lqa.grounding import donor_activations
from lqa.injection import Injection
from lqa.steering import pairs as pairs_module
from lqa.steering.loss import ControlLoss
from lqa.steering.neutral import Neutral
from lqa.steering.strength import perplexity, write_replies
from lqa.steering.training import Training

QA = [("How will the assistant speak?", "Like a pirate."), ("Who is it?", "A doctor from France who likes to cook."), ("What?", "The sea.")]
CHAT = [{"role": "user", "content": "What will the weather be like in the city?"}]
SYSTEM = [{"role": "system", "content": "Speak like a pirate."}, *CHAT]
FAST = {"steps": 4, "batch": 1, "chats": 3, "held_out": 1, "evaluate": 2, "rank": 2, "learning_rate": 0.05, "autocast": False}
BOTH = {"layers_per_reading": 2, "default_layer": [0, 1]}
MERGED = {"conditioning": "projected", "merged": True, "default_layer": [0, 1]}
FAST |= {"patience": 2, "certainty": None, "kl": 1.0}


def logits(base, chat, *adapters):
    ids = torch.tensor([render(base.tokenizer, chat).ids])
    with base.decoding(*adapters) as model:
        return model(input_ids=ids).logits[0].clone()


def hooks(base) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.model.modules())


def state(base) -> dict:
    """Every tensor of the model, who takes gradients, how many hooks there are, and what the bare model says."""
    model = base.model
    return {
        "tensors": {key: t.clone() for key, t in model.state_dict().items()},
        "gradients": {key for key, p in model.named_parameters() if p.requires_grad or p.grad is not None},
        "forwards": [name for name, m in model.named_modules() if "forward" in vars(m)],
        "hooks": hooks(base),
        "logits": logits(base, CHAT),
    }


def same(a: dict, b: dict) -> bool:
    assert list(a["tensors"]) == list(b["tensors"])
    assert all(torch.equal(t, b["tensors"][key]) for key, t in a["tensors"].items())
    assert a["gradients"] == b["gradients"] and a["hooks"] == b["hooks"] and a["forwards"] == b["forwards"] == []
    assert torch.equal(a["logits"], b["logits"])
    return True


# --- the loss ---------------------------------------------------------------------------------------------------


def plain_loss(decoder, h, h0, layers, hidden):
    """-log p_D(a | q, injection(h_k for k of layers)) pair by pair, each by one whole forward pass of its own."""
    base, config, losses = decoder.base, decoder.config, []
    how = (config.conditioning, config.conditioning_constant, decoder.projection)
    if config.merged:
        values = decoder.projection(torch.cat([h[k] - h0[k] for k in layers], 1), layers)
    else:
        values = torch.cat([condition(h[k], h0[k], None, [k], *how) if hidden else h[k] for k in layers])
    for question, answer in QA:
        ids, slots = config.prompt.prefix(base.tokenizer, config.slot_token_id, len(h[layers[0]]), config.blocks(layers))
        answer = config.prompt.answer(base.tokenizer, answer)
        ids = ids + config.prompt.question(base.tokenizer, question) + answer
        slots = torch.tensor([slots + [False] * (len(ids) - len(slots))])
        with base.using(decoder.adapter) as model, Injection(base, config.write_layer, config.operation) as injection:
            with injection.armed(slots, values):
                logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses.append(F.nll_loss(logprobs[-len(answer) - 1 : -1], torch.tensor(answer)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", ["smol", "gemma3", "gptoss"])
@pytest.mark.parametrize(
    ("changes", "hidden", "method"),
    [
        ({}, False, "joint"),
        ({"conditioning": "projected"}, True, "joint"),
        ({"conditioning": "contrast", "write_layer": 1}, True, "per-layer"),
        ({"write_layer": -1}, False, "per-layer"),
        (BOTH | {"conditioning": "projected"}, True, "joint"),
        (BOTH, False, "per-layer"),
        (MERGED, True, "joint"),
    ],
)
def test_gradient_is_that_of_the_formula(tiny_decoder, family, changes, hidden, method):
    decoder = tiny_decoder(family, **changes)
    base, weight = decoder.base, 0.7
    layers = ([0, 1],) if "default_layer" in changes else (0, 1)
    changed = {"method": method, "layers": layers, "hidden": hidden, "kl": weight, "span": "turn:-1"}
    settings = steering.Settings(**FAST | changed)
    training = Training(decoder, QA, settings)
    chat = training.chats[0]
    generator = torch.Generator().manual_seed(5)
    with base.training(training.name) as parameters:
        with torch.no_grad():
            for p in parameters.values():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        training.groups = training._groups(parameters)
        control, kl = training.backward(chat, 1.0)
        found = {key: p.grad.clone() for key, p in parameters.items()}

        ids = torch.tensor([chat.ids])
        with torch.no_grad(), base.using() as model, Capture(base.blocks, [0, 1], stop=False) as bare:
            p0 = model(input_ids=ids).logits[0, chat.places].log_softmax(-1)
        with base.using(training.name) as model, Capture(base.blocks, [0, 1], stop=False) as captured:
            steered = model(input_ids=ids).logits[0, chat.places].log_softmax(-1)
        expected_kl = F.kl_div(steered, p0, log_target=True, reduction="none").sum(-1).mean()
        h, h0 = ({k: acts[k][0, chat.span] for k in (0, 1)} for acts in (captured, bare))

        def mean(h):
            return sum(plain_loss(decoder, h, h0, own, hidden) for own in training.readings) / len(training.readings)

        loss, leaves = mean(h), {k: acts.detach().requires_grad_() for k, acts in h.items()}
        assert control == pytest.approx(loss.item(), rel=1e-4) and len(training.readings) == len(layers)
        assert kl == pytest.approx(expected_kl.item(), rel=1e-2) and kl > 1e-4  # the unsteered distribution is kept in 16 bits
        values = list(parameters.values())
        take = lambda loss: torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True, materialize_grads=True)  # noqa: E731
        joint, of_kl = take(loss), take(weight * expected_kl)
        at_layers = torch.autograd.grad(mean(leaves), list(leaves.values()))
        assert all(gradient.abs().sum() > 0 for gradient in at_layers)
        by_layer = [take((h[k] * gradient).sum()) for k, gradient in enumerate(at_layers)]  # what flows through h_k alone
        for i, (key, p) in enumerate(parameters.items()):
            block = next(j for j, b in enumerate(base.blocks) if any(p is q for q in b.parameters()))
            of_control = joint[i] if method == "joint" else by_layer[block][i]
            torch.testing.assert_close(found[key], of_control + of_kl[i], rtol=1e-2, atol=2e-4)
        assert sum(g.abs().sum() for g in found.values()) > 0.1
    base.remove_adapter(training.name)


def test_what_the_decoder_computes_before_its_write_layer_is_kept(tiny_decoder):
    decoder = tiny_decoder(write_layer=1)
    loss = ControlLoss(decoder, QA, hidden=False)
    h = decoder.read(CHAT, "turn:-1").activations
    first, runs = loss(h, [1]), []
    handle = decoder.base.model.get_input_embeddings().register_forward_hook(lambda *_: runs.append(1))
    assert torch.equal(loss(h, [1]), first)
    handle.remove()
    assert not runs and not any("forward" in vars(b) for b in decoder.base.blocks)


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["joint", "per-layer"])
def test_steering_lowers_the_loss_and_leaves_everything_else_alone(tiny_decoder, method):
    decoder = tiny_decoder()
    before, seen = state(decoder.base), []
    steered = decoder.steer(qa=QA, progress=seen.append, **FAST | {"steps": 12, "kl": 0.01, "method": method})
    after = state(decoder.base)
    assert torch.equal(after["logits"], before["logits"]) and not after["gradients"] and after["hooks"] == before["hooks"]
    kept = {key.replace("base_layer.", ""): t for key, t in after["tensors"].items() if f".{steered.adapter}." not in key}
    for key, t in before["tensors"].items():  # the decoder's LoRA among them
        assert torch.equal(kept[key.replace("base_layer.", "")], t), key
    assert len(kept) == len(before["tensors"])
    assert [p.step for p in seen] == list(range(1, len(seen) + 1)) and seen[0].seconds_left > seen[-1].seconds_left == 0
    held_out = [p.held_out for p in seen if p.held_out is not None]
    assert steered.record["loss"] == min(held_out) < seen[0].loss
    assert all(p.loss == pytest.approx(p.control + 0.01 * p.kl) for p in seen)
    assert not torch.equal(logits(decoder.base, CHAT, steered.adapter), before["logits"])
    steered.remove()
    assert same(before, state(decoder.base))
    with pytest.raises(LqaError, match="was removed"), steered.apply():
        pass


def test_the_best_state_is_kept_and_training_stops_early(tiny_decoder):
    settings = FAST | {"steps": 60, "learning_rate": 3.0, "evaluate": 1, "patience": 3, "kl": 1.0}
    decoder, seen = tiny_decoder(), []
    steered = decoder.steer(qa=QA, progress=seen.append, **settings)
    best = min(seen, key=lambda p: p.held_out)
    assert seen[-1].step == best.step + 3 < 60 and steered.record["steps"] == seen[-1].step
    again = Training(decoder, QA, steering.Settings(**settings))
    source, target = (decoder.base.adapter_parameters(name) for name in (steered.adapter, again.name))
    with torch.no_grad():
        for p, q in zip(target.values(), source.values(), strict=True):
            p.copy_(q)
    control, kl = again.evaluate()
    assert control + kl == pytest.approx(best.held_out, rel=1e-2)  # but for the rounding to 16 bits


def test_training_ends_where_the_decoder_is_sure_enough(tiny_decoder):
    decoder = tiny_decoder()
    text = "Speak like a pirate."
    settings = FAST | {"evaluate": 1, "kl": 0.0, "patience": 9}

    def mean(qa, span, chats):
        losses = [ControlLoss(decoder, qa, hidden=False)(decoder.read(chat, span).activations, [1]) for chat in chats]
        return (sum(losses) / len(losses)).item()

    neutral = [[{"role": "user", "content": steering.load_neutral()["held_out"][0]}]]
    # A random decoder: an answer that it holds more probable when it reads the control
    words = "pirate doctor cook sea city weather France one sentence answer".split()
    control = [[{"role": "user", "content": text}]]
    surer = [[("Who?", w)] for w in words if mean([("Who?", w)], "all", control) < mean([("Who?", w)], "all", neutral)]
    qa = surer[0]
    start, level = mean(qa, "all", neutral), mean(qa, "all", control)
    training = Training(decoder, qa, steering.Settings(**settings | {"certainty": 1.5}), text)
    assert training.enough == pytest.approx(start - 1.5 * (start - level), rel=1e-4)
    history = training.run()
    assert history[-1].held_out <= training.enough and all(p.held_out > training.enough for p in history[:-1])
    other = next([("Who?", w)] for w in words if [("Who?", w)] not in surer)  # reading the control makes it less sure: no such end
    assert Training(decoder, other, steering.Settings(**settings | {"certainty": 1.5}), text).enough == float("-inf")


def test_the_same_seed_gives_the_same_steering(tiny_decoder):
    one, two, other = (tiny_decoder().steer(qa=QA, **FAST, seed=seed) for seed in (0, 0, 1))
    tensors = [list(s.decoder.base.adapter_parameters(s.adapter).values()) for s in (one, two, other)]
    assert all(torch.equal(a, b) for a, b in zip(tensors[0], tensors[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors[0], tensors[2], strict=True))


def stop_by(error):
    def progress(p):
        if p.step == 2:
            raise error

    return {"progress": progress}


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({"cancel": iter([False, False, True]).__next__}, steering.Cancelled, "cancelled"),
        (stop_by(KeyError("page closed")), KeyError, "page closed"),
        (stop_by(KeyboardInterrupt("^C")), KeyboardInterrupt, "C"),
        (stop_by(torch.OutOfMemoryError("CUDA out of memory")), LqaError, "Memory ran out"),
        (stop_by(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")), LqaError, "Memory ran out"),
        (stop_by(RuntimeError("other")), RuntimeError, "other"),
    ],
    ids=["cancel", "error", "interrupt", "gpu memory", "cpu memory", "other"],
)
def test_whatever_ends_a_training_leaves_the_model_as_it_was(tiny_decoder, how, kind, message):
    decoder = tiny_decoder()
    before = state(decoder.base)
    reading = decoder.read(SYSTEM, "turn:-1").score(*QA[0][:1], ["Formally."])
    with pytest.raises(kind, match=message):
        decoder.steer(qa=QA, **FAST, **how)
    assert same(before, state(decoder.base))
    assert decoder.read(SYSTEM, "turn:-1").score(*QA[0][:1], ["Formally."]) == reading


def test_other_threads_read_and_load_while_one_steers(tiny_decoder, decoder_folder):
    decoder = tiny_decoder()
    expected = decoder.read(SYSTEM, "turn:-1").score("Who is it?", ["A doctor."])
    alone = tiny_decoder().steer(qa=QA, **FAST)
    got, done = [], threading.Event()

    def read():
        decoder.base.remove_adapter(decoder.base.add_adapter(decoder_folder()))  # PEFT changes who takes gradients
        while not done.is_set():
            got.append(decoder.read(SYSTEM, "turn:-1").score("Who is it?", ["A doctor."]))

    thread = threading.Thread(target=read)
    thread.start()
    steered = decoder.steer(qa=QA, **FAST)
    done.set()
    thread.join()
    assert got and all(scores == expected for scores in got)
    assert steered.record["loss"] == pytest.approx(alone.record["loss"])


# --- applying ---------------------------------------------------------------------------------------------------


@pytest.fixture
def steered(tiny_decoder):
    """A decoder with two random steerings, strong enough to change every reply."""
    decoder = tiny_decoder(conditioning="projected")
    found = [decoder.steer(qa=QA, **FAST, seed=seed) for seed in (0, 1)]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for s in found:
            for p in decoder.base.adapter_parameters(s.adapter).values():
                p.copy_((torch.randn(p.shape, generator=generator) * 0.2).half())
    return decoder, *found


def target_logits(decoder, chat=CHAT):
    ids = torch.tensor([render(decoder.base.tokenizer, chat).ids])
    with decoder.base.target()() as model:
        return model(input_ids=ids).logits[0].clone()


def merged(decoder, strengths):
    """The logits of a copy of the bare model whose weights have the LoRAs added by hand."""
    from copy import deepcopy

    from lqa.bench import _without_lora

    plain = deepcopy(_without_lora(decoder.base))
    for s, x in strengths:
        for name, module in decoder.base.model.named_modules():
            if s.adapter in getattr(module, "lora_A", {}):
                delta = module.lora_B[s.adapter].weight @ module.lora_A[s.adapter].weight * (2 * x)  # alpha / r = 2
                plain.get_submodule(name).weight.data += delta
    with torch.no_grad():
        return plain(input_ids=torch.tensor([render(decoder.base.tokenizer, CHAT).ids])).logits[0]


def test_strengths_are_factors_and_steerings_add_up(steered):
    decoder, one, two = steered
    before = state(decoder.base)
    for strengths in ([(one, 1.0)], [(one, -0.5)], [(one, 1.0), (two, 0.3)], [(one, 0.5), (one, 0.7)]):
        with strengths[0][0].apply(strengths[0][1]):
            if len(strengths) == 1:
                got = target_logits(decoder)
            else:
                with strengths[1][0].apply(strengths[1][1]):
                    got = target_logits(decoder)
        torch.testing.assert_close(got, merged(decoder, strengths), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(got, before["logits"], atol=0.1)
    with one.apply(0):
        assert torch.equal(target_logits(decoder), before["logits"])
    with one.apply(1), one.apply(-1):
        assert torch.equal(target_logits(decoder), before["logits"])
    with pytest.raises(ZeroDivisionError), one.apply(2.0):
        assert not torch.equal(target_logits(decoder), before["logits"])
        raise ZeroDivisionError
    assert decoder.base.steered == () and same(before, state(decoder.base))


@pytest.mark.parametrize("strength", ["much", None, float("nan"), float("inf"), "1e400"])
def test_a_strength_is_a_number(steered, strength):
    decoder, one, _ = steered
    with pytest.raises(LqaError, match="must be a number"), one.apply(strength):
        pass
    assert decoder.base.steered == ()


def test_replies_are_steered_and_the_decoder_is_not(steered):
    decoder, one, _ = steered
    plain = decoder.generate(CHAT, max_new_tokens=8)
    reading = decoder.read(SYSTEM, "turn:-1")
    answers = reading.ask(["Who is it?"], grounding=True, max_new_tokens=6)
    with one.apply():
        assert decoder.generate(CHAT, max_new_tokens=8) != plain
        fresh = decoder._read(SYSTEM, "turn:-1", None)
        assert torch.equal(fresh.injected, reading.injected)
        assert fresh.ask(["Who is it?"], grounding=True, max_new_tokens=6) == answers  # nor are the references
    assert decoder.generate(CHAT, max_new_tokens=8) == plain


def test_a_stream_stays_steered_wherever_it_is_read(steered):
    decoder, one, _ = steered
    plain = decoder.generate(CHAT, max_new_tokens=8)
    with one.apply():
        expected = decoder.generate(CHAT, max_new_tokens=8)
        stream, other = (decoder.stream_reply(CHAT, max_new_tokens=8) for _ in range(2))
    assert "".join(stream).strip() == expected != plain
    got = []
    thread = threading.Thread(target=lambda: got.append("".join(other).strip()))
    thread.start()
    thread.join()
    assert got == [expected] and decoder.generate(CHAT, max_new_tokens=8) == plain


def test_threads_steer_for_themselves(steered):
    decoder, one, two = steered
    plain = decoder.generate(CHAT, max_new_tokens=6)
    expected = []
    for s, x in ((one, 1.0), (two, 1.0), (one, -1.0)):
        with s.apply(x):
            expected.append(decoder.generate(CHAT, max_new_tokens=6))
    assert len({plain, *expected}) >= 3
    results, barrier = {}, threading.Barrier(4)

    def work(i):
        if i == 3:
            barrier.wait()
            results[i] = [decoder.generate(CHAT, max_new_tokens=6) for _ in range(3)]
            return
        s, x = ((one, 1.0), (two, 1.0), (one, -1.0))[i]
        with s.apply(x):
            barrier.wait()  # all are inside apply at once
            results[i] = [decoder.generate(CHAT, max_new_tokens=6) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [text] * 3 for i, text in enumerate([*expected, plain])}


def test_a_block_that_another_thread_closes_leaves_nothing_behind(steered):
    """A web server may run the steps of a generator in different threads."""
    decoder, one, _ = steered
    plain = decoder.generate(CHAT, max_new_tokens=6)

    def handler():
        with one.apply():
            yield decoder.generate(CHAT, max_new_tokens=6)

    generator = handler()
    assert next(generator) != plain
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert decoder.base.steered == () and decoder.generate(CHAT, max_new_tokens=6) == plain


# --- reading a steered target -------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts_as", ["hidden", "visible"])
def test_a_steered_reading_and_what_it_is_compared_with(steered, counts_as):
    decoder, one, _ = steered
    one.record["settings"]["hidden"] = counts_as == "hidden"

    def h(chat, *adapters):
        rendered = render(decoder.base.tokenizer, chat)
        with decoder.base.decoding(*adapters) as model, Capture(decoder.base.blocks, [1]) as captured:
            model(input_ids=torch.tensor([rendered.ids]))
        return captured[1][0]

    with one.apply():
        whole, hidden = decoder.read(CHAT, "all"), decoder.read(SYSTEM, "turn:-1")
    on, off = h(CHAT, one.adapter), h(CHAT)
    assert torch.equal(whole.activations, on[1:]) and whole.conditioned == (counts_as == "hidden")
    torch.testing.assert_close(whole.injected, decoder.projection(on[1:] - off[1:], 1) if whole.conditioned else on[1:])
    n = len(hidden.span)
    both = h(SYSTEM, one.adapter)[-n:]  # a hidden turn and a steering together: a hidden one is missing in the reference too
    torch.testing.assert_close(hidden.injected, decoder.projection(both - (off if counts_as == "hidden" else on)[-n:], 1))
    unsteered = decoder._read([{"role": "user", "content": "x"}], "all", None)
    assert not unsteered.conditioned  # outside the block nothing is hidden again
    donor = donor_activations(whole)
    with one.apply():
        assert torch.equal(donor_activations(whole), donor)  # the donor is never steered


def test_without_conditioning_the_activations_go_in_as_they_are(tiny_decoder):
    decoder = tiny_decoder()
    steered = decoder.steer(qa=QA, **FAST)
    plain = decoder.read(CHAT).injected
    with steered.apply():
        reading = decoder.read(CHAT)
    assert torch.equal(reading.injected, reading.activations) and not torch.equal(reading.injected, plain)


# --- on disk ------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tiny_decoder, tiny, tmp_path):
    import peft
    from safetensors.torch import load_file

    decoder = tiny_decoder()
    one = decoder.steer(qa=QA, **FAST)
    one.save(tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "lqa_steering.json"]
    assert {t.dtype for t in load_file(tmp_path / "one" / "adapter_model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["base_model_name_or_path"] == decoder.base.name
    two = tiny_decoder().load_steering(tmp_path / "one")
    assert {k: v for k, v in two.record.items()} == json.loads(json.dumps(one.record))
    with one.apply(), two.apply():
        expected = target_logits(one.decoder)
        assert torch.equal(target_logits(two.decoder), expected)
    plain = peft.PeftModel.from_pretrained(tiny("smol").model, tmp_path / "one").eval()
    with torch.no_grad():
        theirs = plain(input_ids=torch.tensor([render(decoder.base.tokenizer, CHAT).ids])).logits[0]
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_loaded_says_why(tiny_decoder, tmp_path):
    folder = tmp_path / "s"
    decoder = tiny_decoder()
    decoder.steer(qa=QA, **FAST).save(folder)
    before = state(decoder.base)
    with pytest.raises(LqaError, match="fingerprint"):
        tiny_decoder("llama").load_steering(folder)
    sidecar, adapter = folder / "lqa_steering.json", folder / "adapter_model.safetensors"
    good, whole = sidecar.read_text(), adapter.read_bytes()
    for text, message in (
        ("{", "malformed"),
        ("[]", "malformed"),
        (json.dumps({k: v for k, v in json.loads(good).items() if k != "qa"}), "qa"),
        (json.dumps(json.loads(good) | {"schema_version": 99}), "schema version 99"),
    ):
        sidecar.write_text(text)
        with pytest.raises(LqaError, match=message):
            decoder.load_steering(folder)
    sidecar.unlink()
    with pytest.raises(LqaError, match="no lqa_steering.json"):
        decoder.load_steering(folder)
    sidecar.write_text(good)
    adapter.write_bytes(whole[:-20])
    with pytest.raises(LqaError, match="truncated or damaged"):
        decoder.load_steering(folder)
    assert same(before, state(decoder.base))
    adapter.write_bytes(whole)
    assert decoder.load_steering(folder).record["qa"] == [list(pair) for pair in QA]


# --- pairs and neutral chats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a control text or"),
        ({"control": "x", "qa": QA}, "not both"),
        ({"control": "  "}, "control is empty"),
        ({"control": 3}, "control is empty"),
        ({"control": "Say <|im_end|>."}, "special token"),
        ({"qa": []}, "non-empty list"),
        ({"qa": "Who?"}, "non-empty list"),
        ({"qa": [{"question": "Who?"}]}, "lacks the field 'answer'"),
        ({"qa": [("Who?",)]}, "Pair 0 is not"),
        ({"qa": ["ab"]}, "Pair 0 is not"),
        ({"qa": [*QA, ("Who?", " ")]}, "answer of pair 3 is empty"),
        ({"qa": [("Who?", 3)]}, "answer of pair 0"),
        ({"qa": [("Who?", "<|im_end|>")]}, "special token"),
        ({"qa": QA, "method": "magic"}, "'magic' is unknown"),
        ({"qa": QA, "steps": 0}, "steps must be"),
        ({"qa": QA, "certainty": 0}, "certainty must be"),
        ({"qa": QA, "kl": -1}, "kl must be"),
        ({"qa": QA, "chats": 10**6}, "there are 200"),
        ({"qa": QA, "layers": (2,)}, "supports the layers 0, 1"),
        ({"qa": QA, "magic": 1}, "Unknown setting"),
        ({"qa": [("Who?", "sea " * 600)], **FAST}, "context is 512"),
    ],
)
def test_bad_input_is_a_sentence(tiny_decoder, arguments, message):
    decoder = tiny_decoder()
    before = state(decoder.base)
    with pytest.raises(LqaError, match=message):
        decoder.steer(**arguments)
    assert same(before, state(decoder.base))


def test_a_decoder_of_visible_text_steers_nothing(tiny_decoder):
    decoder = tiny_decoder(injection="visible_text", injection_constant=None)
    with pytest.raises(LqaError, match="no activations"):
        decoder.steer(control="Speak like a pirate.")


def test_the_decoder_writes_pairs_that_beat_their_references(tiny_decoder, monkeypatch):
    decoder = tiny_decoder()
    control = "Speak like a pirate."
    monkeypatch.setattr(pairs_module, "MARGIN", 1e-3)  # nothing that a random decoder says is well grounded
    found = steering.write_pairs(decoder, control, 5)
    assert found[0] == (pairs_module.TOLD, control) and 2 <= len(found) <= 5
    assert len({answer for _, answer in found}) == len(found)
    reading = decoder.read([{"role": "user", "content": control}])
    margins = []
    for question, answer in found[1:]:
        true, *references = (reading.logprobs(question, [answer], source)[0] for source in ("true", "none", "shuffled"))
        margins.append(true - max(references))
    assert min(margins) > pairs_module.MARGIN and margins == sorted(margins, reverse=True)
    monkeypatch.setattr(pairs_module, "MARGIN", margins[0] + 1)
    assert steering.write_pairs(decoder, control) == found[:1]  # nothing else is grounded


def test_neutral_chats_are_many_and_nobody_elses(tiny):
    parts = steering.load_neutral()
    every = [request for part in parts.values() for request in part]
    assert len(parts["train"]) >= 200 and len(parts["held_out"]) >= 16
    assert len({request.casefold().strip(" ?.!") for request in every}) == len(every)
    assert not set(every) & set(load_messages())
    base = tiny("smol")
    rendered = render(base.tokenizer, [{"role": "user", "content": every[0]}])
    chat = Neutral.of(base, every[0], "turn:-1")
    assert chat.span == resolve_span("turn:-1", rendered)
    assert "".join(rendered.tokens[i + 1].text for i in chat.places) == every[0]


# --- strength -----------------------------------------------------------------------------------------------------


def test_perplexity_is_of_the_replies_under_the_unsteered_model(steered):
    decoder, one, _ = steered
    asked = steering.load_neutral()["held_out"][:3]
    replies = write_replies(decoder, asked, partial(decoder.base.decoding, one.adapter), 6)
    for request, reply in zip(asked, replies, strict=True):
        with one.apply():
            assert decoder.base.tokenizer.decode(reply, skip_special_tokens=True).strip() == decoder.generate(
                [{"role": "user", "content": request}], max_new_tokens=6
            )
    total = count = 0
    for request, reply in zip(asked, replies, strict=True):
        ids = render(decoder.base.tokenizer, [{"role": "user", "content": request}]).ids
        with decoder.base.decoding() as model:
            logprobs = model(input_ids=torch.tensor([ids + reply])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[len(ids) - 1 + i, t]) for i, t in enumerate(reply))
        count += len(reply)
    assert perplexity(decoder, asked, replies) == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-3)


def test_auto_strength_is_the_largest_that_stays_below_the_ratio(steered):
    decoder, one, _ = steered
    with torch.no_grad():
        decoder.base.model.get_output_embeddings().weight.mul_(20)  # else a random model finds everything equally likely
        for p in decoder.base.adapter_parameters(one.adapter).values():
            p.mul_(0.5)
    strength = steering.auto_strength(one, 1.5, most=2.0, requests=2)
    ratios = {float(x): r for x, r in one.record["strengths"].items()}
    assert max(ratios.values()) >= 1.5  # strong enough to go too far
    too_far = min(x for x, r in ratios.items() if r >= 1.5)
    assert strength == max([x for x, r in ratios.items() if r < 1.5 and x < too_far], default=0.0) and too_far - strength <= 0.125 + 1e-9
    assert steering.auto_strength(one, 1e9, most=2.0, requests=2) == 2.0
    with pytest.raises(LqaError, match="above 1"):
        steering.auto_strength(one, 1.0)


def test_the_sidecar_names_no_path_of_this_machine(tiny_decoder, tmp_path):
    decoder = tiny_decoder()
    decoder.steer(qa=QA, **FAST).save(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text() + (tmp_path / "lqa_steering.json").read_text()
    assert Path(decoder.name).is_dir() and decoder.name not in text and str(Path.home()) not in text
