"""The sidecar: written and read back exactly, every disagreement an error that names both values; the default prompt of every template."""

import dataclasses
import json

import pytest

from lqa.config import SIDECAR, DecoderConfig, Prompt, default_prompt
from lqa.errors import LqaError
from lqa.injection import Operation

STYLES = ["chatml", "llama3", "qwen3", "gemma", "mistral", "harmony", "none"]


@pytest.fixture
def saved(tiny, tmp_path, config_for):
    """A base, and a function that writes its sidecar with a change in the JSON and returns the folder."""
    base = tiny("llama")

    def write(change=lambda data: None):
        config_for(base).save(tmp_path)
        data = json.loads((tmp_path / SIDECAR).read_text())
        change(data)
        (tmp_path / SIDECAR).write_text(json.dumps(data))
        return tmp_path

    return base, write


def test_a_sidecar_is_read_back_as_it_was_written(saved, config_for):
    base, write = saved
    config = DecoderConfig.load(write())
    assert config == config_for(base)
    assert config.operation == Operation("replace_scaled", 4.5) and isinstance(config.prompt, Prompt)
    config.check_base(base)
    json.loads((write() / SIDECAR).read_text())


def test_it_is_frozen(saved, config_for):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_for(saved[0]).write_layer = 3


MAY_BE_ABSENT = ("calibration", "guidance", "merged", "projection")  # sidecars before them


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(DecoderConfig) if f.name not in MAY_BE_ABSENT])
def test_every_missing_key_is_an_error_that_names_it(key, saved):
    with pytest.raises(LqaError, match=key):
        DecoderConfig.load(saved[1](lambda data: data.pop(key)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(novelty=1), "unknown key.*novelty"),
        (lambda d: d["prompt"].update(novelty=1), "novelty"),
        (lambda d: d["prompt"].pop("end"), "end"),
        (lambda d: d["base"].pop("name"), "malformed"),
        (lambda d: d["base"].pop("fingerprint"), "malformed"),
        (lambda d: d["base"]["fingerprint"].pop("tokenizer"), "malformed"),
        (lambda d: d.update(base="llama"), "malformed"),
        (lambda d: d.update(schema_version=99), "99.*reads 1"),
        (lambda d: d.update(injection="overwrite"), "overwrite.*replace, replace_scaled, add_normed"),
        (lambda d: d.update(injection_constant=None), "replace_scaled.*needs a constant"),
        (lambda d: d.update(injection="replace"), "takes no constant.*4.5"),
        (lambda d: d.update(conditioning="whitened"), "whitened.*raw"),
        (lambda d: d.update(positions="random"), "random.*sequential"),
        (lambda d: d.update(layers_per_reading=0), "layers_per_reading is 0"),
        (lambda d: d.update(merged=True), "merged is True; true goes with the conditioning 'projected'"),
        (lambda d: d.update(layers_per_reading=2), r"default_layer 1 must name 2 of read_layers \[0, 1\]"),
        (lambda d: d.update(guidance=-1), "guidance is -1; give a number of at least 0"),
        (lambda d: d.update(guidance=True), "guidance is True"),
        (lambda d: d.update(layers_per_reading=2, default_layer=[1, 1]), r"default_layer \[1, 1\] must name 2"),
        (lambda d: d.update(default_layer=2), r"default_layer 2.*\[0, 1\]"),
    ],
)
def test_every_value_that_cannot_be_honoured_is_an_error_that_says_so(change, words, saved):
    with pytest.raises(LqaError, match=words):
        DecoderConfig.load(saved[1](change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', b"\xff\xfe\x00"])
def test_a_file_that_is_no_sidecar_is_an_error(text, tmp_path):
    (tmp_path / SIDECAR).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LqaError, match="malformed"):
        DecoderConfig.load(tmp_path)


def test_a_folder_without_sidecar_is_an_error(tmp_path):
    with pytest.raises(LqaError, match=f"no {SIDECAR}"):
        DecoderConfig.load(tmp_path)


def test_another_base_is_an_error_that_names_both(tiny, config_for):
    mine, other = tiny("llama"), tiny("llama", num_hidden_layers=4)
    with pytest.raises(LqaError) as error:
        config_for(mine).check_base(other)
    for value in ("config", mine.fingerprint()["config"], other.fingerprint()["config"], mine.name, other.name):
        assert value in str(error.value)


def test_another_tokenizer_is_an_error_that_names_both(tiny, config_for):
    mine, other = tiny("llama"), tiny("llama")
    other.tokenizer.chat_template += " "
    with pytest.raises(LqaError) as error:
        config_for(mine).check_base(other)
    for value in ("tokenizer", mine.fingerprint()["tokenizer"], other.fingerprint()["tokenizer"]):
        assert value in str(error.value)


@pytest.mark.parametrize("change", [{"read_layers": [0, 3], "default_layer": 0}, {"write_layer": 3}])
def test_a_layer_that_the_base_lacks_is_an_error_that_names_both(change, tiny, config_for):
    base = tiny("llama")
    with pytest.raises(LqaError, match="layer 3.*blocks 0 to 2"):
        config_for(base, **change).check_base(base)


def test_a_layer_that_the_decoder_cannot_read_is_an_error_that_lists_those_it_can(tiny, config_for):
    config = config_for(tiny("llama"))
    assert config.check_layers(None) == (1,) and config.check_layers(0) == config.check_layers([0]) == (0,)
    for wrong, said in ((2, "2"), ([0, 1], "0, 1"), ([], ""), ("0", "'0'"), (0.5, "0.5"), ([[0]], r"\[0\]")):
        with pytest.raises(LqaError, match=f"cannot read layer {said}; it supports the layers 0, 1 \\(1 a reading\\)"):
            config.check_layers(wrong)


def test_several_layers_are_read_in_the_order_of_their_blocks_and_in_no_other_number(tiny, config_for):
    config = config_for(tiny("llama"), read_layers=[0, 1, 2], layers_per_reading=2, default_layer=[1, 2]).check()
    assert config.check_layers(None) == (1, 2) and config.check_layers([2, 0]) == config.check_layers((0, 2)) == (0, 2)
    assert config.readings == [(0, 1), (0, 2), (1, 2)]
    for wrong in (1, [1], [1, 1], [0, 1, 2], [0, 3]):
        with pytest.raises(LqaError, match="supports the layers 0, 1, 2 \\(2 a reading\\)"):
            config.check_layers(wrong)


# --- the prompt -------------------------------------------------------------------------------------------------


EXPECTED = {  # start, tail, end
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "qwen3": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "gemma": ("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
    "mistral": ("<s>[INST] ", "[/INST]", "</s>"),
    "harmony": ("<|start|>user<|message|>", "<|end|><|start|>assistant", "<|return|>"),
    "none": ("<s>User: ", "</s>\nAssistant:", "</s>"),
}


def prompt_of(tokenizer):
    from lqa.chat import ensure_template

    ensure_template(tokenizer)
    return default_prompt(tokenizer)


@pytest.mark.parametrize("style", STYLES)
def test_the_default_prompt_is_one_user_turn_in_the_model_s_own_format(style, tokenizer_of):
    prompt = prompt_of(tokenizer_of(style))
    assert (prompt.start, prompt.question_tail, prompt.end) == EXPECTED[style]
    assert "{layer}" in prompt.block_head


@pytest.mark.parametrize("style", STYLES)
def test_its_parts_as_tokens_are_the_text_they_stand_for(style, tokenizer_of):
    tokenizer = tokenizer_of(style)
    prompt = prompt_of(tokenizer)
    slot = tokenizer(" ?", add_special_tokens=False)["input_ids"][0]
    ids, slots = prompt.prefix(tokenizer, slot, 4, [7, 12])
    assert [i for i, s in zip(ids, slots, strict=True) if s] == [slot] * 8
    blocks = "".join(ids_text(tokenizer, ids, slots))
    assert blocks == f"{prompt.start}Layer 7:[slots: 4]\nLayer 12:[slots: 4]\n"
    whole = prompt.question(tokenizer, " Who is it? ") + prompt.answer(tokenizer, " A pirate.\n")
    text = tokenizer.decode(whole, clean_up_tokenization_spaces=False)
    assert text == f"Who is it?{prompt.question_tail}A pirate.{prompt.end}"


def ids_text(tokenizer, ids, slots):
    run = 0
    for i, s in [*zip(ids, slots, strict=True), (None, False)]:
        if s:
            run += 1
            continue
        if run:
            yield f"[slots: {run}]"
            run = 0
        if i is not None:
            yield tokenizer.decode([i], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("style", STYLES)
def test_bos_stands_once_at_the_start_and_nowhere_else(style, tokenizer_of):
    tokenizer = tokenizer_of(style)
    prompt = prompt_of(tokenizer)
    ids = prompt.prefix(tokenizer, 300, 2, [1])[0] + prompt.question(tokenizer, "Who?") + prompt.answer(tokenizer, "A pirate.")
    if style in ("llama3", "gemma", "mistral", "none"):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_ends_with_a_stop_token_and_has_no_other(style, tokenizer_of):
    tokenizer = tokenizer_of(style)
    prompt = prompt_of(tokenizer)
    stops = prompt.stop_ids(tokenizer)
    answer = prompt.answer(tokenizer, "A pirate.")
    assert answer[-1] == stops[0] and not set(answer[:-1]) & set(stops)
    assert tokenizer.eos_token_id in stops and len(stops) == len(set(stops))


@pytest.mark.parametrize("style", STYLES)
def test_the_prompt_is_what_the_chat_template_renders(style, tokenizer_of):
    """Joined, the parts are the template's own rendering of that chat, up to a preamble in front and a channel before the answer."""
    tokenizer = tokenizer_of(style)
    prompt = prompt_of(tokenizer)
    question = "Who is it?"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token if prompt.start.startswith(tokenizer.bos_token or "\0") else ""
    assert rendered.endswith(prompt.start.removeprefix(bos) + question + prompt.question_tail)
