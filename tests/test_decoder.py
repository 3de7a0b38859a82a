"""The facade: what a reading holds, that answers are those of the naive way, that threads and streams do not disturb each other."""

import json
import threading

import pytest
import torch

from lqa import LatentDecoder, LqaError
from lqa.injection import Injection

CHAT = [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "Who is it in the city?"}]
QUESTIONS = ["How will the assistant speak?", "Who is it?", "What does the person want to cook in France?"]
BOTH = {"layers_per_reading": 2, "default_layer": [0, 1]}
MERGED = {"conditioning": "projected", "merged": True, "default_layer": [0, 1]}
FAMILIES = ["smol", "llama", "qwen3", "gemma3", "mistral", "gptoss"]


def naive_answer(decoder, reading, question, n):
    """A full forward pass per token over prompt, question and answer so far, patched every time; no cache, no batch."""
    tokenizer, config = decoder.base.tokenizer, decoder.config
    ids, slots = config.prompt.prefix(tokenizer, config.slot_token_id, len(reading.span), reading.blocks)
    ids, out = ids + config.prompt.question(tokenizer, question), []
    for _ in range(n):
        batch = torch.tensor([ids + out])
        mask = torch.tensor([slots + [False] * (batch.shape[1] - len(slots))])
        with decoder.session() as model, Injection(decoder.base, config.write_layer, config.operation) as injection:
            with injection.armed(mask, reading.injected):
                token = int(model(input_ids=batch, use_cache=False).logits[0, -1].argmax())
        if token in config.prompt.stop_ids(tokenizer):
            break
        out.append(token)
    return tokenizer.decode(out, skip_special_tokens=True).strip()


def hooks(base) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.model.modules())


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in FAMILIES), ("smol", BOTH), ("smol", MERGED)])
def test_answers_are_those_of_the_naive_way(tiny_decoder, family, changes):
    decoder = tiny_decoder(family, **changes)
    reading = decoder.read(CHAT, "turn:-1")
    answers = reading.ask(QUESTIONS, max_new_tokens=8)
    assert [a.text for a in answers] == [naive_answer(decoder, reading, q, 8) for q in QUESTIONS]
    assert all(0 <= a.confidence <= 1 and a.grounding is None for a in answers)
    assert "".join(reading.stream(QUESTIONS[2], max_new_tokens=8)).strip() == answers[2].text


def test_a_reading_holds_the_targets_activations(tiny_decoder, tiny):
    reading = tiny_decoder().read(CHAT, "user", layer=0)
    bare = tiny("smol").model  # no LoRA anywhere near it
    with torch.no_grad():
        states = bare(input_ids=torch.tensor([reading.rendered.ids]), output_hidden_states=True).hidden_states[1][0]
    assert torch.equal(reading.activations, states[list(reading.span)])
    assert reading.hidden == {0} and reading.layer == 0
    assert "".join(reading.tokens) == reading.rendered.text


@pytest.mark.parametrize("conditioning", ["raw", "projected", "centred"])
def test_a_reading_of_several_layers_is_the_blocks_of_each(tiny_decoder, conditioning):
    both, single = (tiny_decoder(conditioning=conditioning, **changes) for changes in (BOTH, {}))
    reading, parts = both.read(CHAT, "turn:-1"), [single.read(CHAT, "turn:-1", k) for k in (0, 1)]
    assert reading.layer == reading.layers == (0, 1) and [part.layer for part in parts] == [0, 1]
    for what in ("activations", "injected"):
        assert torch.equal(getattr(reading, what), torch.cat([getattr(part, what) for part in parts]))
    ids, slots = reading._prompt_ids()
    text = both.base.tokenizer.decode(ids)
    assert sum(slots) == 2 * len(reading.span) and text.index("Layer 0:") < text.index("Layer 1:")
    answers = ["Formally.", "Like a pirate."]
    scores = reading.score(QUESTIONS[0], answers)
    assert both.read(CHAT, "turn:-1", [1, 0]).score(QUESTIONS[0], answers) == scores
    assert all(part.score(QUESTIONS[0], answers)[0].logprob != scores[0].logprob for part in parts)
    with pytest.raises(LqaError, match="cannot read layer 1; it supports the layers 0, 1 \\(2 a reading\\)"):
        both.read(CHAT, "turn:-1", 1)


def test_merged_layers_are_one_block_that_one_map_fills_from_all_of_them(tiny_decoder):
    decoder = tiny_decoder(**MERGED)
    reading, parts = decoder.read(CHAT, "turn:-1"), [decoder.read(CHAT, "turn:-1", k) for k in (0, 1)]
    assert reading.layer == (0, 1) and [part.layer for part in parts] == [0, 1]
    assert torch.equal(reading.activations, torch.cat([part.activations for part in parts]))
    changes = []
    for part in parts:
        weight, bias = decoder.projection.maps[part.layer]
        changes.append((part.injected.double() - bias) @ torch.linalg.inv(weight.double()).T)
    weight, bias = decoder.projection.maps[0, 1]
    expected = torch.cat(changes, 1) @ weight.double().T + bias
    torch.testing.assert_close(reading.injected.double(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    ids, slots = reading._prompt_ids()
    assert sum(slots) == len(reading.span) == len(reading.injected) and "Layer 0, 1:" in decoder.base.tokenizer.decode(ids)
    assert "Layer 1:" in decoder.base.tokenizer.decode(parts[1]._prompt_ids()[0])
    visible = decoder.read(CHAT)  # nothing is hidden
    assert torch.equal(visible.injected, decoder.read(CHAT, layer=1).activations)
    assert reading.score(QUESTIONS[0], ["Formally."]) != parts[1].score(QUESTIONS[0], ["Formally."])
    with pytest.raises(LqaError, match="cannot read layer 7; it supports the layers 0, 1 \\(1 or all a reading\\)"):
        decoder.read(CHAT, layer=7)


def test_a_list_of_one_layer_is_that_layer(tiny_decoder):
    decoder = tiny_decoder(conditioning="projected")
    one, same = (decoder.read(CHAT, "turn:-1", layer) for layer in (0, [0]))
    assert one.layer == same.layer == 0 and one._prompt_ids() == same._prompt_ids() and torch.equal(one.injected, same.injected)
    assert one.score(QUESTIONS[0], ["Formally."]) == same.score(QUESTIONS[0], ["Formally."])


def test_answers_owe_to_the_activations(tiny_decoder):
    decoder = tiny_decoder()
    one, other = (decoder.read([{"role": "system", "content": s}, CHAT[1]], "turn:-1") for s in ("Speak like a pirate.", "It is a doctor."))
    scores = [r.score(QUESTIONS[0], ["Formally.", "Like a pirate."]) for r in (one, other)]
    assert [s.logprob for s in scores[0]] != [s.logprob for s in scores[1]]
    assert [s.logprob_none for s in scores[0]] == [s.logprob_none for s in scores[1]]


def test_target_is_the_bare_model(tiny_decoder, tiny):
    decoder, bare = tiny_decoder(), tiny("smol")
    ids = decoder.read(CHAT).rendered.ids
    with torch.no_grad():
        out = bare.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=bare.tokenizer.eos_token_id,
        )
    expected = bare.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
    assert decoder.generate(CHAT, max_new_tokens=6) == expected
    sampled = [decoder.generate(CHAT, max_new_tokens=6, temperature=2.0, seed=s) for s in (0, 0, 1, 2, 3)]
    assert sampled[0] == sampled[1] and len(set(sampled)) > 1


def test_score_is_the_mean_log_probability(tiny_decoder):
    decoder = tiny_decoder()
    reading = decoder.read(CHAT, "turn:-1")
    (score,) = reading.score(QUESTIONS[0], ["Like a pirate."])
    tokenizer, config = decoder.base.tokenizer, decoder.config
    ids, slots = config.prompt.prefix(tokenizer, config.slot_token_id, len(reading.span), reading.layers)
    ids = ids + config.prompt.question(tokenizer, QUESTIONS[0])
    answer = config.prompt.answer(tokenizer, "Like a pirate.")
    assert answer[-1] in config.prompt.stop_ids(tokenizer)
    batch, mask = torch.tensor([ids + answer]), torch.tensor([slots + [False] * (len(ids) + len(answer) - len(slots))])
    for patched, value in ((True, score.logprob), (False, score.logprob_none)):
        with decoder.session() as model, Injection(decoder.base, config.write_layer, config.operation) as injection:
            if patched:
                injection.arm(mask, reading.injected)
            logits = model(input_ids=batch).logits[0].float().log_softmax(-1)
        mean = sum(float(logits[len(ids) - 1 + i, t]) for i, t in enumerate(answer)) / len(answer)
        assert value == pytest.approx(mean, abs=1e-4)


def test_target_and_prefix_run_once_per_reading(tiny_decoder):
    decoder = tiny_decoder()
    lengths = []
    handle = decoder.base.blocks[0].register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    reading = decoder.read(CHAT, "turn:-1")
    assert lengths == [len(reading.rendered)]
    prompt = len(reading._prompt_ids()[0])
    reading.ask(QUESTIONS, max_new_tokens=3)
    reading.ask(QUESTIONS[0], max_new_tokens=3)
    handle.remove()
    assert lengths[1:].count(prompt) == 1  # one prefill of the prompt for all four questions
    assert lengths[1:].count(1) <= 4  # and at most two batched steps behind each of the two question prefills


def test_eight_threads_get_the_serial_answers(tiny_decoder):
    decoder = tiny_decoder()
    chats = [[{"role": "user", "content": f"What is the weather in city {i}?" + " Please." * i}] for i in range(8)]

    def work(chat):
        answers = [a.text for a in decoder.read(chat, "user").ask(QUESTIONS[:2], max_new_tokens=6)]
        return [answers, decoder.generate(chat, max_new_tokens=6), decoder.read(chat, "user").score(QUESTIONS[0], ["Formally."])]

    serial, results = [work(c) for c in chats], [None] * 8
    threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, work(chats[i]))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == serial


def test_an_abandoned_stream_holds_nothing(tiny_decoder):
    decoder = tiny_decoder()
    reading = decoder.read(CHAT, "turn:-1")
    before, expected = hooks(decoder.base), decoder.generate(CHAT, max_new_tokens=6)
    stream = reading.stream(QUESTIONS[0], max_new_tokens=20)
    next(stream)
    # In the middle of a stream: no hook, adapter off, and another thread gets the model.
    assert hooks(decoder.base) == before
    got = []
    thread = threading.Thread(target=lambda: got.append(decoder.generate(CHAT, max_new_tokens=6)))
    thread.start()
    thread.join(timeout=30)
    assert got == [expected]
    stream.close()
    assert hooks(decoder.base) == before


def test_no_hook_survives_an_error(tiny_decoder, monkeypatch):
    decoder = tiny_decoder()
    reading = decoder.read(CHAT, "turn:-1")
    before = hooks(decoder.base)
    reading.injected = reading.injected[:-1]
    with pytest.raises(LqaError, match="slots but"):
        reading.ask(QUESTIONS[0])
    reading.injected = torch.full((len(reading.span), 32), float("nan"))
    with pytest.raises(LqaError, match="not finite"):
        reading.ask(QUESTIONS[0])
    assert hooks(decoder.base) == before


def test_grounding_carries_the_references(tiny_decoder):
    reading = tiny_decoder().read(CHAT, "turn:-1")
    plain = reading.ask(QUESTIONS, max_new_tokens=6)
    grounded = reading.ask(QUESTIONS, grounding=True, max_new_tokens=6)
    assert [a.text for a in grounded] == [a.text for a in plain]
    for answer in grounded:
        for source in ("none", "shuffled"):
            assert getattr(answer.grounding, source) == "".join(reading.stream(answer.question, source=source, max_new_tokens=6)).strip()
        assert isinstance(answer.grounding.text_only, str)


def test_answers_grow_into_what_ask_gives(tiny_decoder):
    reading = tiny_decoder().read(CHAT, "turn:-1")
    states = list(reading.answers(QUESTIONS, max_new_tokens=8))
    assert states[-1] == reading.ask(QUESTIONS, max_new_tokens=8) and len(states) > 4
    for earlier, later in zip(states, states[1:], strict=False):
        assert all(b.text.startswith(a.text) for a, b in zip(earlier, later, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_follow_up_comes_after_the_earlier_answer(tiny_decoder, family):
    """The decoder is told what a chat of its own template would tell it: the earlier question and answer as turns of their own."""
    decoder = tiny_decoder(family)
    reading, after = decoder.read(CHAT, "turn:-1"), [(QUESTIONS[0], "Like a pirate.")]
    prompt, tokenizer = decoder.config.prompt, decoder.base.tokenizer
    told = tokenizer.decode(prompt.question(tokenizer, QUESTIONS[1], after))
    turns = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "Like a pirate."}]
    whole = tokenizer.apply_chat_template([*turns, {"role": "user", "content": QUESTIONS[1]}], tokenize=False, add_generation_prompt=True)
    reopened = told.split("Like a pirate.")[1].split(QUESTIONS[1])[0].removeprefix(prompt.end)
    assert reopened.strip() and reopened + QUESTIONS[1] in whole
    (answer,) = reading.ask(QUESTIONS[1], after=after, max_new_tokens=6, grounding=True)
    assert list(reading.answers(QUESTIONS[1], after=after, max_new_tokens=6))[-1][0].text == answer.text
    assert answer.grounding.none == "".join(reading.stream(QUESTIONS[1], source="none", after=after, max_new_tokens=6)).strip()
    joined = QUESTIONS[0] + prompt.question_tail + "Like a pirate." + prompt.end + reopened + prompt.question_head + QUESTIONS[1]
    if prompt.question_head == "":  # one long question, cut elsewhere, has the same text
        assert told == joined + prompt.question_tail
    others = [reading.score(QUESTIONS[1], ["Formally."])[0].logprob, reading.token_scores([(QUESTIONS[1], "Formally.")], after=after)]
    assert others[0] != pytest.approx(sum(t.logprob for t in others[1][0]) / len(others[1][0]))


def test_token_scores_are_the_parts_of_the_score(tiny_decoder):
    decoder = tiny_decoder()
    reading = decoder.read(CHAT, "turn:-1")
    answers = ["Like a pirate.", "Naïve 日本 city", "Formally."]
    tokens = reading.token_scores([(QUESTIONS[0], a) for a in answers])
    assert ["".join(t.text for t in row) for row in tokens] == answers
    end = len(decoder.config.prompt.answer(decoder.base.tokenizer, answers[0])) - len(tokens[0])
    assert end >= 1
    for row, answer in zip(tokens, answers, strict=True):
        ids = decoder.config.prompt.answer(decoder.base.tokenizer, answer)
        per_token = reading._token_logprobs([(QUESTIONS[0], answer)], "true")[0]
        assert [t.logprob for t in row] == pytest.approx(per_token[: len(row)], abs=1e-4) and len(per_token) == len(ids)
        score = reading.score(QUESTIONS[0], [answer])[0]
        assert score.logprob == pytest.approx(sum(per_token) / len(ids), abs=1e-5)


def test_probabilities_take_the_prior_away(tiny_decoder):
    reading = tiny_decoder().read(CHAT, "turn:-1")
    answers = ["Formally.", "Like a pirate.", "It is a doctor."]
    found = reading.probabilities(QUESTIONS[0], answers)
    assert sum(found) == pytest.approx(1)
    count = [len(reading.decoder.config.prompt.answer(reading.decoder.base.tokenizer, a)) for a in answers]
    gains = [n * (s.logprob - s.logprob_none) for n, s in zip(count, reading.score(QUESTIONS[0], answers), strict=True)]
    expected = torch.tensor(gains).softmax(0).tolist()
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chat": []}, "non-empty list"),
        ({"chat": [{"role": "user", "content": " "}]}, "empty"),
        ({"span": "assistant"}, "selects no token"),
        ({"span": "0:1"}, "selects no token"),
        ({"span": "everything"}, "not understood"),
        ({"layer": 2}, "supports the layers 0, 1"),
        ({"chat": [{"role": "user", "content": "city " * 600}]}, "context is 512"),
    ],
)
def test_bad_readings_say_what_is_wrong(tiny_decoder, arguments, message):
    with pytest.raises(LqaError, match=message):
        tiny_decoder().read(**{"chat": CHAT, "span": "user"} | arguments)


def test_bad_questions_say_what_is_wrong(tiny_decoder):
    decoder = tiny_decoder()
    reading = decoder.read(CHAT, "user")
    for call, message in (
        (lambda: reading.ask([]), "at least one question"),
        (lambda: reading.ask(["Who?", " "]), "no empty one"),
        (lambda: reading.ask("Who <|im_end|>?"), "special token"),
        (lambda: reading.ask("Who?", max_new_tokens=0), "at least 1"),
        (lambda: reading.ask("Who " * 600), "exceeds the model's context"),
        (lambda: reading.score("Who?", []), "at least one answer"),
        (lambda: reading.score("Who?", ["A.", ""]), "no empty one"),
        (lambda: list(reading.stream("Who?", source="magic")), "magic"),
        (lambda: reading.ask("Who \ud800?"), "half a character"),
        (lambda: reading.ask("Who?", after=[("What?", "<|im_end|>")]), "special token"),
        (lambda: reading.ask("Who?", after=[("", "A.")]), "no empty one"),
        (lambda: decoder.generate([*CHAT, {"role": "assistant", "content": "Aye."}]), "ends with the assistant"),
    ):
        with pytest.raises(LqaError, match=message):
            call()


def test_from_pretrained_refuses_what_does_not_fit(tiny, decoder_folder, tmp_path):
    load = lambda folder, family="smol": LatentDecoder.from_pretrained(folder, base=tiny(family))  # noqa: E731
    folder = decoder_folder("smol")
    with pytest.raises(LqaError, match="fingerprint"):
        load(folder, "llama")
    sidecar = folder / "lqa_config.json"
    good = sidecar.read_text()
    other_tokenizer = json.loads(good)["base"]
    other_tokenizer["fingerprint"]["tokenizer"] = "f00"
    for change, message in (
        ({"injection": "magic"}, "'magic' is unknown"),
        ({"read_layers": [0, 1, 9]}, "layer 9"),
        (
            {
                "base": json.loads(good)["base"]
                | {"fingerprint": {"config": json.loads(good)["base"]["fingerprint"]["config"], "tokenizer": "f00"}}
            },
            "tokenizer fingerprint f00",
        ),
    ):
        sidecar.write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(LqaError, match=message):
            load(folder)
    sidecar.unlink()
    with pytest.raises(LqaError, match="no lqa_config.json"):
        load(folder)
    sidecar.write_text(good)
    adapter = folder / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LqaError, match="truncated or damaged"):
        load(folder)
    adapter.unlink()
    with pytest.raises(LqaError, match="lacks adapter_model.safetensors"):
        load(folder)
    adapter.write_bytes(whole)
    assert load(folder).read(CHAT, "user").ask("Who?", max_new_tokens=2)
    with pytest.raises(LqaError, match="neither a folder here nor a Hub id"):
        load(tmp_path / "not" / "there" / "at all")
    with pytest.raises(LqaError, match="not in the cache, and the Hub cannot be reached"):
        load("nobody/nothing")


def test_an_adapter_of_other_shapes_or_with_nan_is_refused(tiny, decoder_folder):
    from safetensors.torch import load_file, save_file

    folder = decoder_folder("smol")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    for change, message in ((tensors[key] * float("nan"), "not finite"), (torch.zeros(3, 3), "does not fit")):
        save_file(tensors | {key: change}, path)
        with pytest.raises(LqaError, match=message):
            LatentDecoder.from_pretrained(folder, base=tiny("smol"))


def test_two_decoders_over_one_base_stay_themselves(tiny, tiny_decoder, decoder_folder):
    import peft

    base, folder = tiny("smol"), decoder_folder()
    first = LatentDecoder.from_pretrained(folder, base=base)
    before = first.read(CHAT, "turn:-1").score(QUESTIONS[0], ["Formally."])
    torch.manual_seed(9)
    other = decoder_folder()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(tiny("smol").model, lora).save_pretrained(other)
    second = LatentDecoder.from_pretrained(other, base=base)
    assert second.read(CHAT, "turn:-1").score(QUESTIONS[0], ["Formally."]) != before
    assert first.read(CHAT, "turn:-1").score(QUESTIONS[0], ["Formally."]) == before


def test_a_folder_that_does_not_fit_leaves_the_base_as_it_was(tiny, decoder_folder, tmp_path):
    import peft

    chat = [{"role": "user", "content": "Who is it?"}]
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    # Half of it fits: q_proj reads the same width.
    peft.get_peft_model(tiny("smol", num_attention_heads=8, num_key_value_heads=4).model, lora).save_pretrained(tmp_path)
    before = LatentDecoder.from_pretrained(decoder_folder(), base=tiny("smol")).generate(chat, max_new_tokens=5)
    base = tiny("smol")
    with pytest.raises(LqaError, match="does not fit"):
        base.add_adapter(tmp_path)
    assert LatentDecoder.from_pretrained(decoder_folder(), base=base).generate(chat, max_new_tokens=5) == before


def test_references_differ_in_content_and_not_in_kind(tiny_decoder):
    """Where a reading hides nothing, neither does the donor."""
    from lqa.grounding import DONOR_CHAT, donor_activations, map_linearly

    for changes in ({}, BOTH, MERGED):
        decoder = tiny_decoder(**{"conditioning": "projected"} | changes)
        for span, theirs in (("turn:-1", "turn:-1"), ("all", "all")):
            reading = decoder.read(CHAT, span)
            donor = decoder.read(DONOR_CHAT, theirs)
            assert reading.conditioned == donor.conditioned == (span != "all")
            blocks = [map_linearly(block, len(reading.span)) for block in donor.injected.chunk(len(reading.blocks))]
            assert torch.equal(donor_activations(reading), torch.cat(blocks)) and len(blocks[0]) == len(reading.span)
        assert reading.ask(QUESTIONS[0], grounding=True, max_new_tokens=2)[0].grounding.shuffled is not None
