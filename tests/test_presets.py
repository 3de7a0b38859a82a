"""The presets agree with slow implementations of the published formulas, written here from the papers and their released code.

These know nothing of lqa: two copies of the weights, the whole text rendered and tokenized at once, a full forward pass for every token,
writes in a loop.  Only the tiny random models and the adapter are shared.
"""

import dataclasses
import json

import peft
import pytest
import torch
from conftest import STYLE, make_model, make_tokenizer

from lqa import LatentDecoder, LqaError
from lqa.config import preset_config
from lqa.models import Base

SYSTEM = [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "What of the sea?"}]
CONTROL = [{"role": "user", "content": "Speak like a pirate."}]
STIMULUS = [*CONTROL, {"role": "assistant", "content": "Aye."}, {"role": "user", "content": "Who is it?"}]
QUESTION, ANSWER = "How will the assistant speak?", "Like a pirate."
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tokenizer_for(family: str):
    """As the published decoders' tokenizers do it, ` ?` is one token."""
    tokenizer = make_tokenizer(STYLE[family])
    tokenizer.add_tokens([" ?"])
    if family == "qwen3":
        tokenizer.chat_template = THINKING
    return tokenizer


def base_for(family: str, **overrides) -> Base:
    tokenizer = tokenizer_for(family)
    return Base(make_model(family, len(tokenizer), **overrides), tokenizer, f"tiny/{family}")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """adapter(family, subfolder): a folder with a random LoRA that names its base and has no sidecar."""

    def build(family: str, subfolder: str = "", **overrides):
        folder = tmp_path_factory.mktemp("foreign")
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = make_model(family, len(tokenizer_for(family)), **overrides)
        model.config._name_or_path = f"tiny/{family}"
        peft.get_peft_model(model, lora).save_pretrained(folder / subfolder)
        return folder

    return build


def residual(model, k: int, ids: list[int]) -> torch.Tensor:
    """(S, D): what block k of a bare model puts out."""
    seen = []
    keep = lambda m, a, output: seen.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handle = model.model.layers[k].register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def patched_logits(family: str, folder, write: int, ids: list[int], patch, positions=None) -> torch.Tensor:
    """(S, V): the decoder, a second copy of the weights with the adapter on, over `ids`; patch(z) changes a block's output z (S, D)."""
    model = make_model(family, len(tokenizer_for(family)))
    decoder = peft.PeftModel.from_pretrained(model, folder, torch_device="cpu").eval()

    def hook(module, args, output):
        z = (output[0] if isinstance(output, tuple) else output).clone()
        patch(z[0])
        return (z, *output[1:]) if isinstance(output, tuple) else z

    blocks = model.model.layers
    handle = blocks[write].register_forward_hook(hook)
    with torch.no_grad():
        logits = decoder(input_ids=torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0]
    handle.remove()
    return logits


def mean_logprob(logits, ids, answer: int) -> float:
    """Of the last `answer` tokens of `ids`."""
    targets = torch.tensor(ids[-answer:]).unsqueeze(1)
    return logits[-answer - 1 : -1].log_softmax(-1).gather(1, targets).mean().item()


# --- LatentQA: replacement after block 0, in a prompt with the renamed role, at shifted positions -------------------


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def find(ids: list[int], wanted: list[int]) -> list[int]:
    return [i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted]


def published_latentqa(folder, chat, question, answer, k=1, acknowledgement="Sure, I've analyzed the assistant.", write=0):
    """Mean log-probability of the answer, the decoder's token ids, and its position ids (Pan et al. 2024; lit/ of their code)."""
    tokenizer = tokenizer_for("llama")
    target = make_model("llama", len(tokenizer))
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    read = encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    users = find(read, encode(header("user")))
    # The hidden tokens: the system turn; or the first user turn with the acknowledgement behind it; or none.
    hidden = users[0] - 1 if chat[0]["role"] == "system" else users[1] - users[0] if len(users) > 1 else 0
    visible = list(range(1 + hidden, len(read)))  # BOS is never read
    h = residual(target, k, read)
    user, reflect, end = header("user"), header("reflect"), "<|eot_id|>"
    before = f"<|begin_of_text|>{user}"
    prompt = f"{before}{('? ' * len(visible)).strip()}{end}{reflect}{acknowledgement}{end}{user}{question}{end}{reflect}"
    prompt, whole = encode(prompt), encode(f"{prompt}{answer}{end}")
    assert whole[: len(prompt)] == prompt
    first = len(encode(before))  # the released code's constant: BOS and the user's header
    positions = torch.arange(len(whole)).unsqueeze(0) + hidden

    def patch(z):
        for i, s in enumerate(visible):
            z[first + i] = h[s]

    logits = patched_logits("llama", folder, write, whole, patch, positions)
    return mean_logprob(logits, whole, len(whole) - len(prompt)), prompt, positions[0, : len(prompt)].tolist(), logits


def latentqa(adapter, **options):
    return LatentDecoder.from_pretrained(adapter, base=base_for("llama"), preset="latentqa", **{"read_layers": [1]} | options)


@pytest.mark.parametrize(("chat", "span"), [(CONTROL, "all"), (SYSTEM, "from:1"), (STIMULUS, "from:2")])
def test_latentqa_agrees_with_the_published_formula(chat, span, adapter):
    folder = adapter("llama")
    decoder = latentqa(folder)
    expected, prompt, positions, _ = published_latentqa(folder, chat, QUESTION, ANSWER)
    reading = decoder.read(chat, span)
    assert reading.logprobs(QUESTION, [ANSWER])[0] == pytest.approx(expected, abs=1e-5)
    ids, slots = reading._prompt_ids()
    assert ids + decoder.config.prompt.question(decoder.base.tokenizer, QUESTION) == prompt
    assert sum(slots) == len(reading.span) and decoder.config.answer_role == "reflect"

    seen, fresh = [], decoder.read(chat, span)
    keep = lambda module, args, kwargs: seen.extend(kwargs["position_ids"][0].tolist())  # noqa: E731
    handle = decoder.base.model.register_forward_pre_hook(keep, with_kwargs=True)
    fresh.ask(QUESTION, max_new_tokens=1)
    handle.remove()
    assert seen == positions  # the prefix with its slots, then the question


def test_latentqa_agreement_is_no_accident(adapter):
    """What the preset fixes decides the figure: another write layer, acknowledgement, or read layer is seen at once."""
    folder = adapter("llama")
    expected = published_latentqa(folder, STIMULUS, QUESTION, ANSWER)[0]
    for change in ({"write": 1}, {"acknowledgement": "Sure."}, {"k": 0}):
        assert abs(published_latentqa(folder, STIMULUS, QUESTION, ANSWER, **change)[0] - expected) > 1e-3, change
    moved = latentqa(folder, write_layer=1)
    other = published_latentqa(folder, STIMULUS, QUESTION, ANSWER, write=1)[0]
    assert moved.read(STIMULUS, "from:2").logprobs(QUESTION, [ANSWER])[0] == pytest.approx(other, abs=1e-5)


def test_latentqa_answers_are_the_published_greedy_ones(adapter):
    folder = adapter("llama")
    decoder = latentqa(folder)
    reading, tokenizer = decoder.read(STIMULUS, "from:2"), decoder.base.tokenizer
    text, ids = "", []
    for _ in range(5):  # the whole text anew for every token: ids that decode and encode to themselves only
        logits = published_latentqa(folder, STIMULUS, QUESTION, text)[3]
        token = int(logits[-2].argmax())  # before the end of turn
        if token in decoder.config.prompt.stop_ids(tokenizer):
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            break
    answer = reading.ask(QUESTION, max_new_tokens=len(ids))[0].text
    assert ids and answer == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_latentqa_reads_and_writes_the_published_layers():
    config = preset_config("latentqa", base_for("llama", num_hidden_layers=17))
    assert (config.read_layers, config.default_layer, config.write_layer) == ([15], 15, 0)
    assert (config.injection, config.injection_constant, config.positions) == ("replace", None, "shifted")
    with pytest.raises(LqaError, match="layer 15.*blocks 0 to 2"):
        preset_config("latentqa", base_for("llama")).check_base(base_for("llama"))


def test_a_decoder_in_a_subfolder_reads_the_layer_of_its_name(adapter):
    folder = adapter("llama", "read2")
    decoder = LatentDecoder.from_pretrained(folder, base=base_for("llama"), preset="latentqa", subfolder="read2")
    assert decoder.config.read_layers == [2] and decoder.config.write_layer == 0  # its authors' layer_to_write
    expected = published_latentqa(folder / "read2", SYSTEM, QUESTION, ANSWER, k=2)[0]
    assert decoder.read(SYSTEM, "from:1").logprobs(QUESTION, [ANSWER])[0] == pytest.approx(expected, abs=1e-5)


def test_a_template_that_does_not_name_the_role_keeps_it():
    base = base_for("mistral")
    base.tokenizer.chat_template = base.tokenizer.chat_template.replace("[INST] ", "[INST]")  # as their prompts are
    config = preset_config("latentqa", base, [1])
    assert config.answer_role == "assistant" and config.prompt.block_tail == "[/INST] Sure, I've analyzed the assistant.</s>[INST]"


@pytest.mark.parametrize(("family", "more"), [("llama", {}), ("gemma3", {"sliding_window": 8})])
def test_a_shift_moves_the_whole_prompt_and_changes_no_answer(family, more, adapter):
    """Rotary positions are relative, and a window counts distances: batched and cached, the shift must be the same for every token."""
    folder = adapter(family, **more)
    options = {"base": base_for(family, **more), "preset": "latentqa", "read_layers": [1]}
    shifted, plain = (LatentDecoder.from_pretrained(folder, **options) for _ in range(2))
    plain.config = dataclasses.replace(plain.config, positions="sequential")
    questions = [QUESTION, "Who is it? What does the person want to cook in France?"]
    readings = [decoder.read(SYSTEM, "from:1") for decoder in (shifted, plain)]
    assert shifted.config.first_position(readings[0].span) > 0
    ours, theirs = ([r.ask(questions, max_new_tokens=6, grounding=True) for r in readings])
    assert [(a.text, a.grounding) for a in ours] == [(a.text, a.grounding) for a in theirs]
    for question in questions:
        one, other = (r.logprobs(question, [ANSWER, "Formally, and with many words of the sea."]) for r in readings)
        assert one == pytest.approx(other, abs=1e-4)


# --- Activation Oracles: norm-matched addition after block 1, `Layer: L` and the slots in one user turn -------------


def published_oracle(family, folder, chat, span, question, answer, k=1, write=1, coefficient=1.0):
    """Mean log-probability of the answer and the oracle's prompt (Karvonen et al. 2025; nl_probes/utils of their code)."""
    tokenizer = tokenizer_for(family)
    target = make_model(family, len(tokenizer))
    text = lambda messages, generation: tokenizer.apply_chat_template(  # noqa: E731
        messages, tokenize=False, add_generation_prompt=generation, enable_thinking=False
    )
    encode = lambda string: tokenizer(string, add_special_tokens=False)["input_ids"]  # noqa: E731
    h = residual(target, k, encode(text(chat, True)))[span]
    asked = [{"role": "user", "content": f"Layer: {k}\n" + " ?" * len(span) + " \n" + question}]
    prompt = text(asked, True)
    end = {"llama": "<|eot_id|>", "qwen3": "<|im_end|>", "gemma3": "<end_of_turn>"}[family]
    prompt, whole = encode(prompt), encode(f"{prompt}{answer}{end}")
    slot = encode(" ?")
    assert len(slot) == 1
    places = [i for i, token in enumerate(prompt) if token == slot[0]][: len(span)]

    def patch(z):
        for vector, place in zip(h, places, strict=True):
            direction = torch.nn.functional.normalize(vector, dim=-1)
            z[place] = direction * z[place].norm() * coefficient + z[place]

    return mean_logprob(patched_logits(family, folder, write, whole, patch), whole, len(whole) - len(prompt)), prompt


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_activation_oracle_agrees_with_the_published_formula(family, adapter):
    folder = adapter(family)
    decoder = LatentDecoder.from_pretrained(folder, base=base_for(family), preset="activation-oracle")
    for span in ("all", "last:1", "from:1"):
        reading = decoder.read(SYSTEM, span)
        expected, prompt = published_oracle(family, folder, SYSTEM, list(reading.span), QUESTION, ANSWER)
        assert reading.logprobs(QUESTION, [ANSWER])[0] == pytest.approx(expected, abs=1e-5)
        assert reading._prompt_ids()[0] + decoder.config.prompt.question(decoder.base.tokenizer, QUESTION) == prompt
    for change in ({"write": 0}, {"coefficient": 2.0}):
        other = published_oracle(family, folder, SYSTEM, list(reading.span), QUESTION, ANSWER, **change)[0]
        assert abs(other - expected) > 1e-3, change


def test_activation_oracle_reads_and_writes_the_published_layers():
    config = preset_config("activation-oracle", base_for("llama", num_hidden_layers=36))
    assert (config.read_layers, config.default_layer, config.write_layer) == ([9, 18, 27], 18, 1)
    assert (config.injection, config.injection_constant, config.positions) == ("add_normed", 1.0, "sequential")


# --- what cannot be ----------------------------------------------------------------------------------------------


def test_presets_that_cannot_be_used_say_why(adapter, decoder_folder, tiny):
    folder = adapter("llama")
    load = lambda *a, **kw: LatentDecoder.from_pretrained(*a, **{"base": base_for("llama")} | kw)  # noqa: E731
    with pytest.raises(LqaError, match="no lqa_config.json.*preset .latentqa, activation-oracle"):
        load(folder)
    with pytest.raises(LqaError, match="'magic' is unknown; there are latentqa"):
        load(folder, preset="magic")
    with pytest.raises(LqaError, match="has an lqa_config.json.*leave the preset out"):
        load(decoder_folder("llama"), preset="latentqa")
    with pytest.raises(LqaError, match="go with a preset"):
        load(decoder_folder("llama"), read_layers=[1])
    with pytest.raises(LqaError, match="one token per slot"):
        load(folder, base=tiny("llama"), preset="activation-oracle")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4}))
    with pytest.raises(LqaError, match="names a base model.*base_model_name_or_path"):
        load(folder, preset="latentqa")


def test_an_adapter_of_another_base_is_refused(adapter):
    with pytest.raises(LqaError, match="does not fit tiny/llama: .*tensors are in one and not in the other"):
        LatentDecoder.from_pretrained(adapter("llama", num_hidden_layers=4), base=base_for("llama"), preset="latentqa", read_layers=[1])
