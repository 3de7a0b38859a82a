"""Conditioning by exact tensors; the reference is the visible turns alone; decoder and trainer agree on what is injected."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lqa import LqaError
from lqa.chat import render, resolve_span
from lqa.conditioning import PROJECTION, Projection, check_conditioning, condition, reference
from train.collator import LatentQACollator

CHAT = [
    {"role": "user", "content": "Speak like a pirate."},
    {"role": "assistant", "content": "Formally."},
    {"role": "user", "content": "Who is it in the city?"},
]
SYSTEM = [{"role": "system", "content": "Speak like a pirate."}, CHAT[2]]


def test_condition_by_hand():
    h, h0 = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 5.0]])
    projection = Projection({7: (torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([10.0, 20.0]))})
    assert condition(h, h0, None, [7], "raw").tolist() == [[3, 4]]
    assert condition(h, h0, None, [7], "contrast").tolist() == [[2, -1]]
    assert condition(h, h0, None, [7], "amplified", 2.0).tolist() == [[7, 2]]
    assert condition(h, h0, None, [7], "projected", None, projection).tolist() == [[10, 17]]
    centre = Projection({7: (None, torch.tensor([-1.0, 2.0]))})
    for other in (h0, None):  # whatever is hidden
        assert condition(h, other, None, [7], "centred", None, centre).tolist() == [[2, 6]]
    two = torch.cat([h0, h])
    assert condition(two, h0, [1], [7], "projected", None, projection).tolist() == [[1, 5], [10, 17]]  # the first has no reference
    projection.opening = {7: (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.0, 100.0]))}
    for opening, first in ((None, [10, 17]), ([False, False], [10, 17]), ([True, False], [2, 99])):
        assert condition(h.repeat(2, 1), h0.repeat(2, 1), None, [7], "projected", None, projection, opening).tolist() == [first, [10, 17]]
    for name in ("raw", "amplified", "projected"):  # nothing hidden
        assert torch.equal(condition(h, None, None, [7], name, 8.0, projection), h)
    with pytest.raises(LqaError, match="hides none"):
        condition(h, None, None, [7], "contrast")
    for other in (h0, None):
        with pytest.raises(LqaError, match="'magic' is unknown"):
            condition(h, other, None, [7], "magic")


def test_the_projection_passes_gradients_and_comes_back_from_disk(tmp_path):
    torch.manual_seed(0)
    projection = Projection({k: (torch.randn(4, 4), torch.randn(4)) for k in (0, 2)})
    h, h0 = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    condition(h, h0, None, [2], "projected", None, projection).sum().backward()
    assert torch.allclose(h.grad, projection.maps[2][0].sum(0).expand(3, 4))
    projection.save(tmp_path)
    loaded = Projection.load(tmp_path, [0, 2], 4)
    assert all(torch.equal(a, b) for k in (0, 2) for a, b in zip(projection.maps[k], loaded.maps[k], strict=True))
    for layers, width in (([0], 4), ([0, 2, 3], 4), ([0, 2], 5)):
        with pytest.raises(LqaError, match="another decoder's"):
            Projection.load(tmp_path, layers, width)
    assert Projection.load(tmp_path, [0, 2], 4, digest=projection.digest()).digest() == projection.digest()
    with pytest.raises(LqaError, match=f"the digest {projection.digest()}, but the sidecar names 0123"):
        Projection.load(tmp_path, [0, 2], 4, digest="0123")
    with pytest.raises(LqaError, match="the conditioning 'centred'"):
        Projection.load(tmp_path, [0, 2], 4, "centred")
    both = Projection(projection.maps, {k: (torch.randn(4, 4), torch.randn(4)) for k in (0, 2)})
    assert both.digest() != projection.digest()
    both.save(tmp_path)
    loaded = Projection.load(tmp_path, [0, 2], 4)
    assert loaded.digest() == both.digest() and all(torch.equal(both.opening[k][0], loaded.opening[k][0]) for k in (0, 2))
    assert len(loaded.trainable("cpu")) == 8 and all(t.requires_grad for m in loaded.opening.values() for t in m)
    centre = Projection({k: (None, torch.randn(4)) for k in (0, 2)})
    (other := tmp_path / "centre").mkdir()
    centre.save(other)
    loaded = Projection.load(other, [0, 2], 4, "centred")
    assert loaded.digest() == centre.digest() and all(m[0] is None for m in loaded.maps.values())
    with pytest.raises(LqaError, match="the conditioning 'projected'"):
        Projection.load(other, [0, 2], 4)
    Projection({k: (None, torch.full((4,), float("nan"))) for k in (0, 2)}).save(other)
    with pytest.raises(LqaError, match="not finite"):
        Projection.load(other, [0, 2], 4, "centred")
    file = tmp_path / PROJECTION
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(LqaError, match="damaged"):
        Projection.load(tmp_path, [0, 2], 4)
    file.unlink()
    with pytest.raises(LqaError, match=f"has no {PROJECTION}"):
        Projection.load(tmp_path, [0, 2], 4)


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
    indices = resolve_span("turn:-1", rendered)
    alone, places, which, _ = reference(tokenizer, rendered, indices)
    assert alone.text == render(tokenizer, visible).text
    assert [alone.ids[p] for p in places] == [rendered.ids[indices[n]] for n in which]
    assert places[-1] == len(alone) - 1
    # Where a template joins the system prompt and the user's turn, the first tokens differ from those of the turn alone.
    left = [i for n, i in enumerate(indices) if n not in which]
    assert left == indices[: len(left)] and len(left) <= (3 if chat is SYSTEM and style in ("gemma", "mistral") else 0)


@pytest.mark.parametrize(("style", "header"), [("chatml", 3), ("llama3", 5), ("gemma", 1)])
def test_the_opening_is_the_header_between_what_is_hidden_and_the_first_visible_word(tokenizer_of, style, header):
    """Gemma's template puts the system prompt into the user's turn, behind its header: a line break is left between them."""
    tokenizer = tokenizer_of(style)
    for chat in (SYSTEM, [*SYSTEM, {"role": "assistant", "content": "Ahoy."}]):
        rendered = render(tokenizer, chat)
        for span in ("user", "from:1"):
            indices = resolve_span(span, rendered)
            found = reference(tokenizer, rendered, indices)
            opening = [rendered.tokens[indices[n]] for n, own in zip(found.which, found.opening, strict=True) if own]
            assert len(opening) == header and not any(token.content for token in opening)
            assert found.opening == [True] * header + [False] * (len(found.which) - header)
        if chat is SYSTEM:
            assert not any(reference(tokenizer, rendered, resolve_span("last:2", rendered)).opening)
    # A visible turn before the hidden one: its words are there already.
    rendered = render(tokenizer, [*CHAT, {"role": "assistant", "content": "A doctor."}, CHAT[2]])
    indices = [i for i, token in enumerate(rendered.tokens) if token.turn in (0, 1, 4)]
    assert not any(reference(tokenizer, rendered, indices).opening)


def test_only_what_comes_after_a_hidden_turn_has_a_reference(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    rendered = render(tokenizer, CHAT)
    indices = resolve_span("user", rendered)
    assert {rendered.tokens[i].turn for i in indices} == {0, 2}
    _, _, which, _ = reference(tokenizer, rendered, indices)
    assert {rendered.tokens[indices[n]].turn for n in which} == {2}


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "mistral"])
def test_a_turn_that_was_answered_has_the_reference_that_it_had_before(tokenizer_of, style):
    """The template ends a last user turn otherwise (with a header for the reply)."""
    tokenizer = tokenizer_of(style)
    chats = [CHAT, [*CHAT, {"role": "assistant", "content": "It is a doctor."}]]
    found = []
    for chat in chats:
        rendered = render(tokenizer, chat)
        words = [i for i in resolve_span("turn:2", rendered) if rendered.tokens[i].content]
        alone, places, which, _ = reference(tokenizer, rendered, words)
        assert [alone.ids[p] for p in places] == [rendered.ids[words[n]] for n in which]
        found.append((places, which))
    assert found[0] == found[1] and len(found[0][1]) > 3


def test_where_the_target_is_steered_by_something_hidden_every_token_has_a_reference(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    rendered = render(tokenizer, CHAT)
    for span in ("user", "all"):
        indices = resolve_span(span, rendered)
        alone, places, which, _ = reference(tokenizer, rendered, indices, steered=True)
        assert which == list(range(len(indices)))
        assert [alone.ids[p] for p in places] == [rendered.ids[i] for i in indices]
        assert (alone.ids == rendered.ids and places == indices) == (span == "all")


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


def test_later_turns_do_not_count_as_hidden(tokenizer_of):
    """Attention is causal: what follows the span has not changed it."""
    tokenizer = tokenizer_of("chatml")
    rendered = render(tokenizer, SYSTEM)
    assert reference(tokenizer, rendered, resolve_span("turn:0", rendered)) is None
    assert reference(tokenizer, rendered, resolve_span("last:1", rendered)) is not None


def test_another_chat_may_be_the_reference(tiny_decoder, tiny):
    """The difference between two hidden contexts, or where nothing is hidden, to a chat that hides something."""
    decoder, bare = tiny_decoder(conditioning="contrast"), tiny("smol")
    other = [{"role": "system", "content": "Answer in one sentence."}, SYSTEM[1]]

    def hidden_states(chat):
        rendered = render(bare.tokenizer, chat)
        with torch.no_grad():
            return bare.model(input_ids=torch.tensor([rendered.ids]), output_hidden_states=True).hidden_states[2][0]

    for chat in (SYSTEM, SYSTEM[1:]):
        reading = decoder.read(chat, "user", reference=other)
        n = len(reading.span)
        assert torch.allclose(reading.injected, hidden_states(chat)[-n:] - hidden_states(other)[-n:], atol=1e-5) and reading.conditioned
        assert reading.injected.abs().sum() > 1
    assert not torch.equal(decoder.read(SYSTEM, "user").injected, decoder.read(SYSTEM, "user", reference=other).injected)
    assert decoder.read(SYSTEM, "user", reference=SYSTEM).injected.abs().max() == 0
    # The template's own preamble has no turn, and no counterpart.
    assert decoder.read(SYSTEM[1:], "all", reference=other).injected.abs().sum() > 1


def test_a_reference_without_the_visible_turns_or_without_use_is_refused(tiny_decoder, tokenizer_of):
    decoder = tiny_decoder(conditioning="contrast")
    stranger = [{"role": "user", "content": "Who cooks?"}]
    with pytest.raises(LqaError, match=r"lacks the selected turn 1 \(user: 'Who is it in the city\?'\)"):
        decoder.read(SYSTEM, "user", reference=stranger)
    with pytest.raises(LqaError, match="lacks the selected turn 1"):  # the same turns in another order
        decoder.read(CHAT, "all", reference=[CHAT[2], CHAT[1], CHAT[0]])
    tokenizer = tokenizer_of("chatml")
    rendered = render(tokenizer, SYSTEM)
    found = reference(tokenizer, rendered, resolve_span("user", rendered), [*SYSTEM[1:], *CHAT[1:]])
    assert found.rendered.chat[found.rendered.tokens[found.places[0]].turn] == ("user", SYSTEM[1]["content"])
    assert max(found.places) == len(found.rendered) - 1  # the last turn of these words, header included
    for how in ({}, {"conditioning": "centred"}):
        with pytest.raises(LqaError, match="compares with nothing; leave the reference chat out"):
            tiny_decoder(**how).read(SYSTEM, "user", reference=SYSTEM[1:])


HOW = [{"conditioning": "amplified", "conditioning_constant": 3.0}, {"conditioning": "projected"}, {"conditioning": "centred"}]
HOW += [{"conditioning": "projected", "layers_per_reading": 2, "default_layer": [0, 1]}]
HOW += [{"conditioning": "projected", "merged": True, "default_layer": [0, 1]}]


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
def test_trainer_and_decoder_inject_the_same(tiny, config_for, tiny_decoder, examples, how):
    from train.trainer import LatentQATrainer

    base = tiny("smol")
    collator = LatentQACollator(base.tokenizer, config_for(base, **how), base.context)
    rows = examples(5, patched=True, **({"layers": [0, 1]} if "default_layer" in how else {}))
    rows[0] |= {"span": "all"}  # nothing hidden
    batch = collator(rows)
    trainer = LatentQATrainer.__new__(LatentQATrainer)  # only its reading is wanted
    decoder = tiny_decoder(**how)
    trainer.args = SimpleNamespace(bf16=False)
    trainer.base, trainer.decoder_config, trainer.projection = base, collator.config, decoder.projection
    injected = trainer.read(batch)
    if how["conditioning"] == "projected":
        shared, decoder.projection.opening = injected, {k: (-weight, bias + 1) for k, (weight, bias) in decoder.projection.maps.items()}
        injected = trainer.read(batch)
        assert 0 < (injected != shared).any(1).sum() < len(injected)
    readings = [decoder.read(r["chat"], r["span"], r["layers"]) for r in rows]
    assert torch.allclose(injected, torch.cat([r.injected for r in readings]), atol=1e-4)
    for row, reading in zip(rows, readings, strict=True):
        as_they_are = reading.activations[-len(reading.injected) :]  # of merged layers (0, 1), the upper one
        assert torch.equal(reading.injected, as_they_are) == (row["span"] == "all" and how["conditioning"] != "centred")
    assert injected.shape[0] == int(batch["slots"].sum())


def test_the_fit_predicts_what_the_write_layer_holds_for_the_control(tiny, config_for):
    """Against the same regression, written slowly over all tokens at once with numpy."""
    import numpy as np

    from lqa.corpus import load_controls, load_messages
    from train.data import control_chat
    from train.projection import ProjectionConfig, fit_projection

    base = tiny("smol")
    config = config_for(base, conditioning="projected", write_layer=0)
    controls, how = load_controls("train")[:12], ProjectionConfig(messages=2, ridge=0.3, scale=2.0)
    projection = fit_projection(base, config, controls, how, seed=3)
    rng, x, y = random.Random(3), [], []

    def states(ids, layer):
        with torch.no_grad():
            return base.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0].double()

    start = base.tokenizer(config.prompt.start, add_special_tokens=False)["input_ids"]
    targets = [
        states(start + base.tokenizer(c.control, add_special_tokens=False)["input_ids"], 0)[len(start) :].mean(0) for c in controls
    ]
    centre = torch.stack(targets).mean(0)
    for control, target in zip(controls, targets, strict=True):
        for message in rng.sample(load_messages("train"), 2):
            chat = control_chat(control, "system", message)
            rendered, alone = render(base.tokenizer, chat), render(base.tokenizer, chat[1:])
            span = resolve_span("turn:-1", rendered)
            h, h0 = states(rendered.ids, 1)[span], states(alone.ids, 1)[-len(span) :]
            x.append(h - h0)
            y.append((target - centre).expand(len(span), -1))
    x, y = torch.cat(x).numpy(), torch.cat(y).numpy()
    mean, spread = x.mean(0), x.std(0)
    z = (x - mean) / spread
    weight = 2.0 * (np.linalg.solve(z.T @ z / len(z) + 0.3 * np.eye(z.shape[1]), z.T @ (y - y.mean(0)) / len(z)) / spread[:, None]).T
    assert np.allclose(projection.maps[1][0].double().numpy(), weight, atol=1e-3 * np.abs(weight).max())
    assert np.allclose(projection.maps[1][1].double().numpy(), centre.numpy() - weight @ mean, atol=1e-3 * np.abs(weight).max())
    again = fit_projection(base, config, controls, how, seed=3)
    assert torch.equal(again.maps[1][0], projection.maps[1][0])


def test_the_opening_s_maps_are_fitted_to_more_texts_and_the_others_to_all_else(tiny, config_for):
    """Against the same regressions, over all tokens at once."""
    from lqa.corpus import load_controls, load_messages
    from train.data import control_chat
    from train.projection import ProjectionConfig, fit_projection

    base = tiny("smol")
    config = config_for(base, conditioning="projected", write_layer=0)
    controls = load_controls("train")[:12]
    projection = fit_projection(base, config, controls, ProjectionConfig(messages=2, ridge=0.3, scale=2.0, texts=99), seed=3)

    def states(ids, layer):
        with torch.no_grad():
            return base.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0].double()

    start = base.tokenizer(config.prompt.start, add_special_tokens=False)["input_ids"]

    def target(text):
        return states(start + base.tokenizer(text, add_special_tokens=False)["input_ids"], 0)[len(start) :].mean(0)

    def change(control, message):
        chat = control_chat(control, "system", message)
        rendered, alone = render(base.tokenizer, chat), render(base.tokenizer, chat[1:])
        span = resolve_span("turn:-1", rendered)
        words = next(n for n, i in enumerate(span) if rendered.tokens[i].content)
        return (states(rendered.ids, 1)[span] - states(alone.ids, 1)[-len(span) :]).split([words, len(span) - words])

    centre, rng = torch.stack([target(c.control) for c in controls]).mean(0), random.Random(3)
    x, y = ([], []), ([], [])
    for control in controls:
        for message in rng.sample(load_messages("train"), 2):
            for n, rows in enumerate(change(control, message)):
                x[n].append(rows)
                y[n].append((target(control.control) - centre).expand(len(rows), -1))
    for control in controls:
        for text in {*control.descriptions, *(pair.answer for pair in control.qa)}:
            x[0].append(change(replace(control, control=text), load_messages("train")[0])[0])
            y[0].append((target(text) - centre).expand(len(x[0][-1]), -1))
    for maps, xs, ys in zip((projection.opening, projection.maps), map(torch.cat, x), map(torch.cat, y), strict=True):
        mean, spread = xs.mean(0), xs.std(0, unbiased=False)
        z = (xs - mean) / spread
        solved = torch.linalg.solve(z.T @ z / len(z) + 0.3 * torch.eye(z.shape[1]), z.T @ (ys - ys.mean(0)) / len(z))
        weight = 2.0 * (solved / spread[:, None]).T
        assert torch.allclose(maps[1][0].double(), weight, atol=2e-3 * weight.abs().max())
        assert torch.allclose(maps[1][1].double(), centre - weight @ mean, atol=2e-3 * weight.abs().max())


def test_cross_fitted_maps_have_not_seen_their_controls(tiny, config_for):
    """Each fold's maps are those of a fit to the other controls alone, but for the common centre."""
    from lqa.corpus import cluster_of, load_controls, share_of
    from train.projection import CrossFitted, ProjectionConfig, assign_folds, fit_projection

    base = tiny("smol")
    config = config_for(base, conditioning="projected", write_layer=0)
    controls = share_of(load_controls("train"), 0.03)
    how = dict(messages=1, ridge=0.3, scale=2.0)
    crossed = fit_projection(base, config, controls, ProjectionConfig(**how, folds=3), seed=3)
    assert isinstance(crossed, CrossFitted) and len(crossed.folds) == 3
    assert crossed.digest() == fit_projection(base, config, controls, ProjectionConfig(**how), seed=3).digest()  # what the decoder keeps
    clusters, fold_of = cluster_of(controls), assign_folds(controls, 3)
    assert crossed.fold_of == fold_of and sorted(set(fold_of.values())) == [0, 1, 2]
    assert all(fold_of[a] == fold_of[b] for a in clusters for b in clusters if clusters[a] == clusters[b])

    changed = [c if fold_of[c.id] else replace(c, control="You like green tea.") for c in controls]  # fold 0 says something else
    again = fit_projection(base, config, changed, ProjectionConfig(**how, folds=3), seed=3)
    for k in config.maps:
        assert torch.allclose(again.folds[0].maps[k][0], crossed.folds[0].maps[k][0], atol=1e-4)
        assert not torch.allclose(again.folds[1].maps[k][0], crossed.folds[1].maps[k][0], atol=1e-2)
    own = next(c.id for c in controls if fold_of[c.id] == 2)
    assert crossed.without(own) is crossed.folds[2] and crossed.without("of no control") is crossed


def test_the_centre_is_the_mean_of_what_training_reads(tiny, config_for, examples):
    from train.projection import fit_centre

    base = tiny("smol")
    rows = examples(9)
    centre = fit_centre(base, config_for(base, conditioning="centred"), rows)
    for layer in (0, 1):
        seen = []
        for row in rows:
            rendered = render(base.tokenizer, row["chat"])
            with torch.no_grad():
                states = base.model(input_ids=torch.tensor([rendered.ids]), output_hidden_states=True).hidden_states[layer + 1][0]
            seen.append(states[resolve_span(row["span"], rendered)])
        weight, bias = centre.maps[layer]
        assert weight is None and torch.allclose(-bias, torch.cat(seen).mean(0), atol=1e-4)


def test_too_few_controls_for_a_fit_are_refused(tiny, config_for):
    from lqa.corpus import load_controls
    from train.projection import ProjectionConfig, fit_projection

    base = tiny("smol")
    with pytest.raises(LqaError, match="too few"):
        fit_projection(base, config_for(base), load_controls("train")[:0], ProjectionConfig(), seed=0)
