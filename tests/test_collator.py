"""Batches: rows of a prefix and its branches, by small exact cases and against separate plain rows."""

import dataclasses

import pytest
import torch

from lqa.activations import capture, gather_spans
from lqa.chat import render, resolve_span
from lqa.config import IGNORE
from lqa.errors import LqaError
from lqa.injection import Injection
from lqa.masks import PAD, block_mask
from train.collator import ActivationCache, LatentQACollator

QA = [{"question": "Who?", "answer": "A pirate."}, {"question": "How will it speak?", "answer": "Formally, at sea."}]
CHAT = [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "Hi there."}]


def row_of(**changes):
    return {"id": "x", "form": "system", "chat": CHAT, "span": "turn:-1", "layers": [1], "qa": QA, "patched": True} | changes


def read(base, batch):
    with torch.no_grad():
        deepest = {k for layers in batch["read_layers"] for k in layers}
        acts = capture(base.model, base.blocks, batch["read_ids"], batch["read_mask"], deepest)
        return gather_spans(acts, batch["read_spans"], batch["read_layers"])


@pytest.fixture
def llama(tiny, config_for):
    base = tiny("llama")
    return base, LatentQACollator(base.tokenizer, config_for(base), base.context)


# --- rows -------------------------------------------------------------------------------------------------------


def test_a_row_is_prefix_then_a_branch_per_question_whose_positions_start_anew(llama):
    base, collator = llama
    prompt, tokenizer = collator.config.prompt, base.tokenizer
    row, [(read_ids, span)] = collator.row(row_of())
    rendered = render(tokenizer, CHAT)
    assert read_ids == rendered.ids and span == resolve_span("turn:-1", rendered)
    prefix, slots = prompt.prefix(tokenizer, collator.config.slot_token_id, len(span), [1])
    branches = [(prompt.question(tokenizer, p["question"]), prompt.answer(tokenizer, p["answer"])) for p in QA]
    n = len(prefix)
    lengths = [len(q) + len(a) for q, a in branches]
    assert row["input_ids"] == prefix + sum((q + a for q, a in branches), [])
    assert row["position_ids"] == [*range(n), *range(n, n + lengths[0]), *range(n, n + lengths[1])]
    assert row["branch"] == [0] * n + [1] * lengths[0] + [2] * lengths[1]
    assert row["labels"] == [IGNORE] * n + sum(([IGNORE] * len(q) + a for q, a in branches), [])
    assert row["slots"] == slots + [False] * sum(lengths) and sum(row["slots"]) == len(span)
    for _, answer in branches:  # the end of the turn is learned too
        assert answer[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_a_follow_up_is_asked_in_the_branch_of_the_question_before_it(llama):
    """As at reading time: earlier turns with their answers in front of it; the loss counts all answers."""
    base, collator = llama
    prompt, (first, second) = collator.config.prompt, QA
    plain, _ = collator.row(row_of(qa=[first]))
    row, _ = collator.row(row_of(qa=[second | {"after": [first]}, first | {"after": None}]))
    start, end = plain["branch"].index(1), row["branch"].index(2)
    asked = prompt.question(base.tokenizer, second["question"], [(first["question"], first["answer"])])
    answers = [prompt.answer(base.tokenizer, pair["answer"]) for pair in (first, second)]
    assert row["input_ids"][start:end] == asked + answers[1] and row["input_ids"][:start] == plain["input_ids"][:start]
    assert asked[: len(plain["input_ids"]) - start] == plain["input_ids"][start:]
    reopened = base.tokenizer.decode(asked[len(plain["input_ids"]) - start :])
    assert reopened == "<|start_header_id|>user<|end_header_id|>\n\n" + second["question"] + prompt.question_tail
    assert [i for i in row["labels"][:end] if i != IGNORE] == answers[0] + answers[1]
    assert row["position_ids"][:end] == list(range(end)) and row["position_ids"][end] == start
    assert row["input_ids"][end:] == plain["input_ids"][start:]


def test_shifted_positions_start_at_what_is_hidden_before_the_span(llama):
    base, collator = llama
    plain, [(_, span)] = collator.row(row_of())
    config = dataclasses.replace(collator.config, positions="shifted")
    shifted, _ = LatentQACollator(base.tokenizer, config, base.context).row(row_of())
    assert span[0] > 1 and shifted == plain | {"position_ids": [p + span[0] - 1 for p in plain["position_ids"]]}


def test_an_unpatched_row_has_its_slots_as_tokens_but_nothing_is_written_there(llama):
    _, collator = llama
    patched, bare = collator.row(row_of())[0], collator.row(row_of(patched=False))[0]
    assert not any(bare["slots"])
    assert {k: v for k, v in bare.items() if k != "slots"} == {k: v for k, v in patched.items() if k != "slots"}


def test_several_layers_get_a_block_of_slots_each(llama):
    base, collator = llama
    row, [(_, span)] = collator.row(row_of(layers=[0, 1]))
    assert sum(row["slots"]) == 2 * len(span)
    text = base.tokenizer.decode(row["input_ids"])
    assert text.index("Layer 0:") < text.index("Layer 1:")


def test_a_batch_is_padded_on_the_right_and_reads_patched_rows_only(llama, examples):
    base, collator = llama
    rows = examples(4)
    batch = collator(rows)
    singles = [collator.row(row) for row in rows]
    size = max(len(s[0]["input_ids"]) for s in singles)
    padding = {"input_ids": collator.pad_id, "position_ids": 0, "branch": PAD, "labels": IGNORE, "slots": False}
    for key, value in padding.items():
        assert batch[key].tolist() == [s[0][key] + [value] * (size - len(s[0][key])) for s in singles]
    assert [r["patched"] for r in rows] == [True, True, True, False] and not batch["slots"][3].any()
    assert batch["read_spans"] == [s[1][0][1] for s in singles[:3]] and batch["read_layers"] == [[0], [1], [0]]
    for ids, mask, single in zip(batch["read_ids"].tolist(), batch["read_mask"].tolist(), singles[:3], strict=True):
        own = single[1][0][0]
        n = len(own)
        assert ids[:n] == own and mask == [1] * n + [0] * (len(ids) - n)
    assert int(batch["slots"].sum()) == len(read(base, batch))
    assert batch["slots"].dtype == torch.bool and batch["labels"].dtype == torch.long


def test_a_batch_of_unpatched_rows_reads_nothing(llama):
    batch = llama[1]([row_of(patched=False)] * 2)
    assert set(batch) == {"input_ids", "position_ids", "branch", "labels", "slots"}


@pytest.mark.parametrize(
    "changes", [{"qa": [{"question": "Who?", "answer": "x" * 999}]}, {"chat": [{"role": "user", "content": "x" * 999}]}]
)
def test_what_is_longer_than_the_context_is_an_error_that_names_the_example(changes, llama):
    with pytest.raises(LqaError, match="'goal-long'.*context of 512"):
        llama[1]([row_of(id="goal-long", span="last:2", **changes)])


def test_many_branches_may_exceed_the_context_together(llama):
    base, collator = llama
    row, _ = collator.row(row_of(qa=QA * 20))
    assert len(row["input_ids"]) > base.context > max(row["position_ids"])


# --- the mask ---------------------------------------------------------------------------------------------------


BRANCH = torch.tensor([[0, 0, 1, 1, 2, -1], [0, 1, 2, 2, -1, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 2, 0], [0, 1, 1, 2, 0, 0]])


def test_the_mask_by_hand(tiny):
    mask = block_mask(tiny("llama").model.config, BRANCH, POSITIONS, torch.float32)
    assert mask.shape == (2, 1, 6, 6) and set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    seen = (mask == 0).int().squeeze(1).tolist()
    assert seen[0] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],  # a branch sees the prefix and itself, causally
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # and not its neighbour
        [0, 0, 0, 0, 0, 1],  # padding sees itself, so that no row is empty
    ]
    assert seen[1] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_a_sliding_window_counts_positions_not_columns(tiny):
    masks = block_mask(tiny("gemma3", sliding_window=2).model.config, BRANCH, POSITIONS, torch.float32)
    assert torch.equal(masks["full_attention"], block_mask(tiny("llama").model.config, BRANCH, POSITIONS, torch.float32))
    seen = (masks["sliding_attention"] == 0).int().squeeze(1).tolist()
    assert seen[0] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],  # the second branch is as near to the prefix as the first
        [0, 0, 0, 0, 0, 1],
    ]
    single = block_mask(tiny("mistral", sliding_window=2).model.config, BRANCH, POSITIONS, torch.float32)
    assert torch.equal(single, masks["sliding_attention"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mask_is_finite_in_every_dtype(dtype, tiny):
    mask = block_mask(tiny("llama").model.config, BRANCH, POSITIONS, dtype)
    assert mask.dtype == dtype and torch.isfinite(mask).all()


# --- packed = separate ------------------------------------------------------------------------------------------


def packed(base, config, rows):
    """The log-probabilities of all answers' tokens, row after row and branch after branch, from one packed batch."""
    batch = LatentQACollator(base.tokenizer, config, base.context)(rows)
    with (
        torch.no_grad(),
        Injection(base, config.write_layer, config.operation) as injection,
        injection.armed(batch["slots"], read(base, batch)),
    ):
        logits = base.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=block_mask(base.model.config, batch["branch"], batch["position_ids"], base.dtype),
        ).logits
    targets = batch["labels"][:, 1:]
    keep = targets != IGNORE
    return logits[:, :-1][keep].log_softmax(-1).gather(1, targets[keep].unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize(("write_layer", "layers"), [(-1, {}), (0, {}), (0, {"layers": [0, 1]})])
def test_packed_rows_give_the_answers_of_separate_rows(base, config_for, examples, separate, write_layer, layers):
    config = config_for(base, write_layer=write_layer)
    rows = examples(5, **layers)
    torch.testing.assert_close(packed(base, config, rows), separate(base, config, rows), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "mistral", "gptoss"])
def test_packed_rows_longer_than_a_sliding_window_give_the_answers_of_separate_rows(name, tiny, config_for, examples, separate):
    base = tiny(name, sliding_window=16)
    config = config_for(base)
    rows = examples(3, patched=True)
    torch.testing.assert_close(packed(base, config, rows), separate(base, config, rows), rtol=0, atol=1e-4)


def test_what_is_read_decides_the_answers(base, config_for, examples, separate):
    """The comparison above means something only if activations reach the answers at all."""
    config, rows = config_for(base), examples(1, qa=1)
    bare = [row | {"patched": False} for row in rows]
    assert (separate(base, config, rows) - separate(base, config, bare)).abs().max() > 1e-3


# --- the disk as source -----------------------------------------------------------------------------------------


def test_the_disk_gives_the_activations_that_were_read_live(base, config_for, examples, tmp_path):
    config, rows = config_for(base), examples(5)
    live = read(base, LatentQACollator(base.tokenizer, config, base.context)(rows))
    cache = ActivationCache(tmp_path / "cache", base.fingerprint())
    collator = LatentQACollator(base.tokenizer, config, base.context, cache)
    batch = collator(rows)
    assert "activations" not in batch and len(batch["cache_paths"]) == len(batch["read_spans"]) == 4
    sizes = [len(span) for span in batch["read_spans"]]
    for path, values in zip(batch["cache_paths"], live.split(sizes), strict=True):
        cache.save(path, values)
    stored = collator(rows)
    assert set(stored) == {"input_ids", "position_ids", "branch", "labels", "slots", "activations"}
    assert torch.equal(stored["activations"], live)
    other = collator(rows[::-1])
    assert torch.equal(other["activations"], torch.cat(live.split(sizes)[::-1]))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_batch_of_which_the_disk_lacks_one_is_read_again(llama, tmp_path):
    base, _ = llama
    cache = ActivationCache(tmp_path, base.fingerprint())
    collator = LatentQACollator(base.tokenizer, llama[1].config, base.context, cache)
    first, second = row_of(), row_of(span="all")
    path = collator([first])["cache_paths"][0]
    cache.save(path, torch.zeros(len(collator.row(first)[1][0][1]), base.hidden_size))
    batch = collator([first, second])
    assert len(batch["read_spans"]) == 2 and batch["cache_paths"][0] == path


def test_another_chat_span_layer_or_model_is_another_file(tmp_path):
    cache, other = ActivationCache(tmp_path, {"config": "a"}), ActivationCache(tmp_path, {"config": "b"})
    paths = [
        c.path(*key) for c in (cache, other) for key in [([1, 2], [1], [0]), ([1, 3], [1], [0]), ([1, 2], [0], [0]), ([1, 2], [1], [1])]
    ]
    assert len(set(paths)) == 8 and cache.path([1, 2], [1], [0]) == paths[0]
    assert cache.load(paths[0]) is None


def test_a_decoder_of_visible_text_gets_the_turns_as_text_and_no_slots(tiny, config_for, examples):
    base = tiny("smol")
    config = config_for(base, injection="visible_text", injection_constant=None)
    collator = LatentQACollator(base.tokenizer, config, base.context)
    rows = examples(4, span="turn:-1")
    batch = collator(rows)
    assert not batch["slots"].any() and "read_ids" not in batch
    patched, unpatched = (base.tokenizer.decode(collator.row(rows[i])[0]["input_ids"]) for i in (2, 3))
    assert "User: What of 2?\n" in patched and "Speak like" not in patched and "What of" not in unpatched
    plain = LatentQACollator(base.tokenizer, config_for(base), base.context)
    same = [[t for t in collator_.row(rows[0])[0]["labels"] if t != IGNORE] for collator_ in (collator, plain)]
    assert same[0] == same[1]  # the same answers are learnt
