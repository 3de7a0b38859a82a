"""Conditioning by exact tensors; the reference is the visible turns alone; decoder and trainer agree on what is injected."""

import pytest
import torch

from lqa import LqaError
from lqa.chat import render, resolve_span
from lqa.conditioning import check_conditioning, condition, reference
from train.collator import LatentQACollator

CHAT = [
    {"role": "user", "content": "Speak like a pirate."},
    {"role": "assistant", "content": "Formally."},
    {"role": "user", "content": "Who is it in the city?"},
]
SYSTEM = [{"role": "system", "content": "Speak like a pirate."}, CHAT[2]]


def test_condition_by_hand():
    h, h0 = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 5.0]])
    assert condition(h, h0, "raw", None).tolist() == [[3, 4]]
    assert condition(h, h0, "contrast", None).tolist() == [[2, -1]]
    assert condition(h, h0, "amplified", 2.0).tolist() == [[7, 2]]
    assert torch.equal(condition(h, h, "amplified", 8.0), h)  # nothing hidden: raw
    with pytest.raises(LqaError, match="'magic' is unknown"):
        condition(h, h0, "magic", None)


BAD = [("magic", None, "unknown"), ("amplified", None, "needs"), ("raw", 1.0, "takes no")]


@pytest.mark.parametrize(("name", "constant", "message"), BAD)
def test_bad_conditionings_are_refused(name, constant, message):
    with pytest.raises(LqaError, match=message):
        check_conditioning(name, constant)


@pytest.mark.parametrize("style", ["chatml", "llama3", "qwen3", "gemma", "harmony", "mistral"])
@pytest.mark.parametrize(("chat", "visible"), [(CHAT, CHAT[2:]), (SYSTEM, SYSTEM[1:])], ids=["earlier turns", "system"])
def test_reference_is_the_visible_turns_alone(tokenizer_of, style, chat, visible):
    tokenizer = tokenizer_of(style)
    rendered = render(tokenizer, chat)
    # In a template that joins the system prompt and the user's turn the header is not the user's own: its content and what follows are.
    content = [i for i, t in enumerate(rendered.tokens) if t.turn == len(chat) - 1 and t.content]
    indices = list(range(content[1], len(rendered)))
    alone, places = reference(tokenizer, rendered, indices)
    assert alone.text == render(tokenizer, visible).text
    assert [alone.ids[p] for p in places] == [rendered.ids[i] for i in indices]
    assert places[-1] == len(alone) - 1


def test_no_reference_where_nothing_or_everything_is_hidden(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    rendered = render(tokenizer, CHAT)
    assert reference(tokenizer, rendered, resolve_span("all", rendered)) is None
    preamble = [i for i, t in enumerate(rendered.tokens) if t.turn == -1][1:]
    assert preamble and reference(tokenizer, rendered, preamble) is None


def test_a_reading_injects_what_the_hidden_turn_changed(tiny_decoder, tiny):
    decoder = tiny_decoder(conditioning="amplified", conditioning_constant=3.0)
    reading = decoder.read(SYSTEM, "turn:-1")
    bare = tiny("smol")

    def hidden_states(chat):
        rendered = render(bare.tokenizer, chat)
        with torch.no_grad():
            return bare.model(input_ids=torch.tensor([rendered.ids]), output_hidden_states=True).hidden_states[2][0]

    n = len(reading.span)
    h, h0 = hidden_states(SYSTEM)[-n:], hidden_states(SYSTEM[1:])[-n:]
    assert torch.equal(reading.activations, h) and not torch.equal(h, h0)
    assert torch.allclose(reading.injected, 4 * h - 3 * h0, atol=1e-4)
    everything = decoder.read(SYSTEM, "all")
    assert torch.equal(everything.injected, everything.activations)


def test_contrast_needs_something_hidden(tiny_decoder):
    decoder = tiny_decoder(conditioning="contrast")
    assert decoder.read(SYSTEM, "user").injected.shape[0] > 0
    with pytest.raises(LqaError, match="the span hides none"):
        decoder.read(SYSTEM, "all")


def test_trainer_and_decoder_inject_the_same(tiny, config_for, tiny_decoder, examples):
    from train.trainer import LatentQATrainer

    how = {"conditioning": "amplified", "conditioning_constant": 3.0}
    base = tiny("smol")
    collator = LatentQACollator(base.tokenizer, config_for(base, **how), base.context)
    rows = examples(5, patched=True)
    batch = collator(rows)
    trainer = LatentQATrainer.__new__(LatentQATrainer)  # only its reading is wanted
    trainer.base, trainer.decoder_config = base, collator.config
    injected = trainer.read(batch)
    decoder = tiny_decoder(**how)
    expected = torch.cat([decoder.read(r["chat"], r["span"], r["layers"][0]).injected for r in rows])
    assert torch.allclose(injected, expected, atol=1e-4)
    assert injected.shape[0] == int(batch["slots"].sum())
