"""What training is fed: the mixture's sources and forms, shares of the corpus, and one seed for all of it."""

from collections import Counter

import pytest

from lqa import LqaError, corpus
from lqa.chat import render, resolve_span
from lqa.conditioning import reference
from lqa.models import EMBEDDED_BASE
from train.data import FOLLOW_UPS, MixtureConfig, build_examples, build_validation, follow_up, question_pairs

TRAIN = corpus.load_controls("train")


def examples(n=200, seed=0, target=EMBEDDED_BASE, **mixture):
    return build_examples(TRAIN, n, MixtureConfig(**mixture), [[7], [14], [21]], 14, seed, target)


def test_a_smaller_share_is_part_of_a_larger_one_and_cuts_no_cluster():
    clusters = corpus.cluster_of(corpus.load_controls())
    smaller, larger = (corpus.share_of(TRAIN, share) for share in (0.125, 0.5))
    assert set(smaller) < set(larger) < set(TRAIN) == set(corpus.share_of(TRAIN, 1.0))
    assert not {clusters[c.id] for c in larger} & {clusters[c.id] for c in set(TRAIN) - set(larger)}
    assert len(larger) / len(TRAIN) == pytest.approx(0.5, abs=0.05)
    for share in (0, 1.5, -1):
        with pytest.raises(ValueError, match=str(share)):
            corpus.share_of(TRAIN, share)


def test_sources_are_mixed_by_share_and_each_has_its_own_stream():
    mixed = examples(sources={"latentqa": 0.6, "context": 0.2, "facts": 0.2})
    counts = Counter("latentqa" if row["form"] in ("system", "stimulus", "control") else row["form"] for row in mixed)
    assert set(counts) == {"latentqa", "context", "facts"} and counts["latentqa"] > 90
    assert mixed.to_list() == examples(sources={"latentqa": 0.6, "context": 0.2, "facts": 0.2}).to_list()
    # The readings of the controls are the same ones, however much is mixed in between.
    alone = [(row["id"], row["chat"]) for row in examples()]
    own = [(row["id"], row["chat"]) for row in mixed if row["form"] not in ("context", "facts")]
    assert own == alone[: len(own)]
    assert examples(seed=1).to_list() != examples().to_list()


def test_only_training_rows_of_the_published_configs_are_used():
    from datasets import load_dataset

    for name in ("context", "facts"):
        held = {row["id"] for part in ("validation", "test") for row in load_dataset("dataset", name, split=part)}
        assert not held & {row["id"] for row in examples(sources={name: 1.0})}


def test_context_rows_of_another_target_are_refused():
    with pytest.raises(LqaError, match=r"not of other/model.*data build --base"):
        examples(sources={"context": 1.0}, target="other/model")
    with pytest.raises(LqaError, match="cannot be read from nowhere"):
        examples(sources={"facts": 1.0}, dataset="nowhere")


def test_completions_are_read_with_the_message_that_they_answer():
    rows = [row for row in examples(forms={"stimulus_completion": 1.0}) if row["form"] == "stimulus_completion"]
    assert rows, "the package ships completions"
    for row in rows:
        assert [m["role"] for m in row["chat"]] == ["user", "assistant", "user", "assistant"]
        assert row["span"] in ("from:2", "all") or row["span"].startswith("last:")


def test_the_first_question_is_generic_and_pool_messages_are_independent():
    generic = corpus.load_questions()
    rows = examples(qa_per_reading=3)
    by_id = {c.id: c for c in TRAIN}
    for row in rows:
        assert row["qa"][0]["question"] in generic[by_id[row["id"]].kind]["description"] and len(row["qa"]) == 3
    pool = set(corpus.load_messages())
    assert 0.55 < sum(row["chat"][-1]["content"] in pool for row in rows if row["form"] != "control") / len(rows) < 0.85


@pytest.mark.parametrize("style", ["chatml", "gemma", "llama3"])
def test_spans_are_drawn_among_the_visible_tokens(tokenizer_of, style):
    """Every span dropout can be read, by a decoder that compares too, and shows no token of the control or before it."""
    tokenizer, forms = tokenizer_of(style), {"system": 0.5, "stimulus": 0.5}
    shares = {"part": 0.5, "token": 0.3, "last": 0.2}

    def build(**more):
        return build_examples(TRAIN, 60, MixtureConfig(spans=shares, forms=forms, **more), [[7]], 7, 0, tokenizer=tokenizer)

    rows, sizes = build(), []
    for row in rows:
        rendered = render(tokenizer, row["chat"])
        span = resolve_span(row["span"], rendered)
        if row["span"].startswith("last:"):
            assert 1 <= len(span) <= 12
            continue
        first = {"system": 1, "stimulus": 2}[row["form"]]
        assert span == list(range(span[0], span[-1] + 1)) and all(rendered.tokens[i].turn >= first for i in span)
        assert len(reference(tokenizer, rendered, span).which) == len(span)
        sizes.append(len(span))
    assert sizes.count(1) > 10 and max(sizes) > 15 and len(set(sizes)) > 8
    assert rows.to_list() == build().to_list()


def test_other_spans_draw_nothing_more():
    """A mixture without `part` and `token` needs no tokenizer, and its readings are those of one that gives them no share."""
    spans = {"turn:-1": 0.7, "last": 0.2, "all": 0.1}
    assert examples(40, spans=spans).to_list() == examples(40, spans=spans | {"part": 0.0, "token": 0.0}).to_list()


def test_several_layers_are_drawn_at_once_and_one_is_drawn_as_ever():
    def build(readings, default, share=0.5):
        return build_examples(TRAIN, 90, MixtureConfig(default_layer_share=share), readings, default, 0)["layers"]

    pairs = [tuple(layers) for layers in build([(7, 14), (7, 21), (14, 21)], [7, 14])]
    assert set(pairs) == {(7, 14), (7, 21), (14, 21)} and 30 < pairs.count((7, 14)) < 60
    assert set(map(tuple, build([(7, 14, 21)], [7, 14, 21], 0.0))) == {(7, 14, 21)}  # there is no other choice
    single = [(7,), (14,), (21,)]
    assert build(single, 14) == build(single, [14]) and {layer for (layer,) in build(single, 14)} == {7, 14, 21}
    assert set(map(tuple, build([*single, (7, 14, 21)], [7, 14, 21]))) == {(7,), (14,), (21,), (7, 14, 21)}


def test_follow_ups_come_after_the_question_whose_answer_they_refer_to():
    import random

    rows = examples(80, qa_per_reading=3, follow_up=0.5)
    plain = {c.id: c for c in TRAIN}
    followed = [row for row in rows if row["qa"][0].get("after")]
    assert 20 < len(followed) < 60
    asked = {q for group in FOLLOW_UPS.values() for q in group}
    for row in followed:
        pair, control = row["qa"][0], plain[row["id"]]
        (first,) = pair["after"]
        assert first["answer"] in control.descriptions and first["answer"] != pair["answer"] and len(row["qa"]) == 2
        own = pair["question"] in {p.question for p in control.qa}
        assert own != (pair["question"] in asked)
        if pair["question"] in FOLLOW_UPS["short"]:
            assert pair["answer"] == control.short
    assert {row["qa"][0]["question"] in asked for row in followed} == {True, False}
    one = question_pairs(TRAIN[0], 2, 0.0, random.Random(0))
    assert follow_up(TRAIN[0], one, random.Random(1))[0]["after"] == one[:1]
    assert [row["qa"] for row in examples(20)] == [row["qa"] for row in examples(20, follow_up=0.0)]


def test_no_pair_is_asked_twice_of_one_reading():
    import random

    for control in TRAIN[:40]:
        pairs = question_pairs(control, 6, 0.5, random.Random(0))
        assert len({(p["question"], p["answer"]) for p in pairs}) == len(pairs)


def test_validation_pairs_a_reading_with_a_stranger_s_of_its_kind():
    held = corpus.load_controls("validation")
    sets = build_validation(held, 30, MixtureConfig(), 14, 0)
    kinds = {c.control: c.kind for c in corpus.load_controls()}
    for own, other in zip(sets["true"], sets["shuffled"], strict=True):
        assert own["qa"] == other["qa"] and own["chat"][-1] == other["chat"][-1] and own["chat"][0] != other["chat"][0]
        assert kinds[own["chat"][0]["content"]] == kinds[other["chat"][0]["content"]]
