"""The engine against the plainest code there is: a full forward pass per token, per row, without cache, batch or padding."""

from contextlib import contextmanager

import pytest
import torch

from lqa import engine
from lqa.engine import Row, decode, prefill, sampler, score
from lqa.errors import LqaError

# Two prefixes of equal length; rows that share them, with suffixes of different lengths, in mixed order.
PREFIXES = [[5, 17, 101, 33, 250, 9], [5, 18, 77, 300, 21, 42]]
ROWS = [Row(0, [61, 62, 63]), Row(1, [64]), Row(0, [65, 66, 67, 68, 69, 70, 71]), Row(1, [61, 62, 63]), Row(0, [72, 73])]
NEW = 8


def session_of(base):
    @contextmanager
    def session():
        with torch.inference_mode():
            yield base.model

    return session


@torch.no_grad()
def logits_of(base, ids):
    return base.model(input_ids=torch.tensor([ids])).logits[0].float()


def naive(base, row, stop_ids=(), n=NEW, prefixes=PREFIXES):
    """[(token, probability)] of a greedy row."""
    ids, out = prefixes[row.prefix] + row.suffix, []
    for _ in range(n):
        probabilities = logits_of(base, ids)[-1].softmax(-1)
        token = int(probabilities.argmax())
        if token in stop_ids:
            break
        out.append((token, float(probabilities[token])))
        ids = ids + [token]
    return out


def plain_score(base, row, answer, prefixes=PREFIXES):
    before = prefixes[row.prefix] + row.suffix
    logprobs = logits_of(base, before + answer).log_softmax(-1)
    return sum(float(logprobs[len(before) - 1 + i, token]) for i, token in enumerate(answer)) / len(answer)


def fast(base, rows=ROWS, stop_ids=(), n=NEW, **kwargs):
    with torch.inference_mode():
        prefix = prefill(base.model, PREFIXES)
    out = [[] for _ in rows]
    for steps in decode(session_of(base), prefix, rows, n, stop_ids, **kwargs):
        for step in steps:
            out[step.row].append((step.token, step.probability))
    return out


def assert_same(got, expected):
    for row, plain in zip(got, expected, strict=True):
        assert [t for t, _ in row] == [t for t, _ in plain]
        assert [p for _, p in row] == pytest.approx([p for _, p in plain], abs=1e-4)


def test_batched_cached_decoding_is_naive_decoding_token_for_token(base):
    expected = [naive(base, row) for row in ROWS]
    assert len({tuple(t for t, _ in row) for row in expected}) >= 4  # the rows do say different things
    assert_same(fast(base), expected)


def guided_by_hand(base, row, other, weight, stop_ids=()):
    """[(token, probability)] of a row whose tokens are chosen for what tells it from another."""
    ids, against, out = PREFIXES[row.prefix] + row.suffix, PREFIXES[other.prefix] + other.suffix, []
    for _ in range(NEW):
        p, q = (logits_of(base, i)[-1].softmax(-1) for i in (ids, against))
        allowed = [t for t in range(len(p)) if p[t] >= 0.1 * p.max()]
        token = max(allowed, key=lambda t: float(p[t]) * (float(p[t]) / float(q[t])) ** weight)
        if token in stop_ids:
            break
        out.append((token, float(p[token])))
        ids, against = ids + [token], against + [token]
    return out


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_guided_rows_choose_what_tells_them_from_those_they_are_held_against(base, weight):
    others = [Row(1 - row.prefix, row.suffix) for row in ROWS]
    free = [guided_by_hand(base, row, other, weight) for row, other in zip(ROWS, others, strict=True)]
    assert free != [naive(base, row) for row in ROWS]
    assert_same(fast(base, ROWS + others, guidance=weight)[: len(ROWS)], free)
    stop_ids = [free[0][2][0], free[2][5][0]]
    stopped = [guided_by_hand(base, row, other, weight, stop_ids) for row, other in zip(ROWS, others, strict=True)]
    assert_same(fast(base, ROWS + others, stop_ids, guidance=weight)[: len(ROWS)], stopped)
    assert fast(base, ROWS + others, guidance=weight)[len(ROWS) :] == [[]] * len(ROWS)  # what they are held against says nothing


def test_a_row_that_is_held_against_itself_says_what_it_says_alone(base):
    assert_same(fast(base, ROWS + ROWS, guidance=2.0)[: len(ROWS)], [naive(base, row) for row in ROWS])


def test_rows_that_stop_early_leave_the_others_as_they_are(base):
    free = [naive(base, row) for row in ROWS]
    stop_ids = [free[0][2][0], free[2][5][0]]
    expected = [naive(base, row, stop_ids) for row in ROWS]
    assert len({len(row) for row in expected}) > 1
    assert_same(fast(base, stop_ids=stop_ids), expected)


def test_one_row_alone_and_a_row_that_stops_at_once(base):
    row = ROWS[2]
    assert_same(fast(base, [row]), [naive(base, row)])
    first = naive(base, row)[0][0]
    assert fast(base, [row], [first]) == [[]]


@pytest.mark.parametrize("name", ["gemma3", "mistral", "gptoss"])
def test_a_sliding_window_shorter_than_the_rows_is_honoured(name, tiny):
    base = tiny(name, sliding_window=4)
    expected = [naive(base, row) for row in ROWS]
    assert expected != [naive(tiny(name, sliding_window=64), row) for row in ROWS]  # the window matters here
    assert_same(fast(base), expected)
    answers = [[11], [12, 13], [14, 15, 16, 17], [18], [19, 20, 21]]
    with torch.inference_mode():
        got = score(session_of(base), prefill(base.model, PREFIXES), ROWS, answers)
    assert got == pytest.approx([plain_score(base, row, answer) for row, answer in zip(ROWS, answers, strict=True)], abs=1e-4)


def test_one_forward_pass_per_step_for_all_rows(tiny):
    base = tiny("llama")
    calls = []
    handle = base.model.register_forward_pre_hook(lambda m, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    fast(base)
    handle.remove()
    assert calls == [(2, 6), (5, 7)] + [(5, 1)] * (NEW - 1)


def test_a_prefix_is_not_changed_by_those_who_use_it(tiny):
    base = tiny("llama")
    with torch.inference_mode():
        prefix = prefill(base.model, PREFIXES)
    before = [layer.keys.clone() for layer in prefix.cache.layers]
    runs = [[s for steps in decode(session_of(base), prefix, ROWS, NEW, []) for s in steps] for _ in range(2)]
    score(session_of(base), prefix, ROWS, [[9, 8]] * 5)
    assert runs[0] == runs[1]
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, prefix.cache.layers, strict=True))


@pytest.mark.parametrize("answers", [[[11], [12, 13], [14, 15, 16, 17], [18], [19, 20, 21]]])
def test_scores_are_those_of_a_plain_forward_pass(base, answers):
    with torch.inference_mode():
        got = score(session_of(base), prefill(base.model, PREFIXES), ROWS, answers)
    assert got == pytest.approx([plain_score(base, row, answer) for row, answer in zip(ROWS, answers, strict=True)], abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gptoss"])
def test_the_answers_to_one_question_share_its_pass(name, tiny):
    base = tiny(name) if name in ("llama", "qwen3") else tiny(name, sliding_window=4)
    answers, passes = [[11], [12, 13], [14, 15, 16, 17]], []
    with torch.inference_mode():
        prefix = prefill(base.model, PREFIXES)
    handle = base.model.register_forward_pre_hook(lambda m, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    got = score(session_of(base), prefix, [Row(1, [61, 62, 63])] * 3, answers)
    handle.remove()
    assert passes == [(1, 2), (3, 4)]  # the question but its last token, then that and the answers but theirs
    assert got == pytest.approx([plain_score(base, Row(1, [61, 62, 63]), answer) for answer in answers], abs=1e-4)


def test_scores_do_not_depend_on_how_the_rows_are_cut_into_passes(tiny, monkeypatch):
    base = tiny("llama")
    answers = [[11], [12, 13], [14, 15, 16, 17], [18], [19, 20, 21]]
    with torch.inference_mode():
        prefix = prefill(base.model, PREFIXES)
    whole = score(session_of(base), prefix, ROWS, answers)
    passes = []
    handle = base.model.register_forward_pre_hook(lambda m, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(engine, "MAX_LOGITS", 2 * 3 * 400)
    assert score(session_of(base), prefix, ROWS, answers) == pytest.approx(whole, abs=1e-5)
    handle.remove()
    assert len(passes) > 1 and sum(passes) == 5
    monkeypatch.setattr(engine, "MAX_LOGITS", 1)
    assert score(session_of(base), prefix, ROWS, answers) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prefixes_of_several_lengths_are_joined(name, tiny):
    base = tiny(name) if name == "llama" else tiny(name, sliding_window=4)
    three, answers = [*PREFIXES, [5, 18, 77]], [[11], [12, 13], [14, 15, 16]]
    rows = [Row(2, [61, 62]), Row(1, [64]), Row(2, [65, 66, 67])]
    with torch.inference_mode():
        prefix = engine.join([prefill(base.model, PREFIXES), prefill(base.model, three[2:])])
    got = score(session_of(base), prefix, rows, answers)
    assert got == pytest.approx([plain_score(base, *pair, three) for pair in zip(rows, answers, strict=True)], abs=1e-4)
    steps = [step for (step,) in decode(session_of(base), prefix, rows[:1], 4, ())]
    assert_same([[(step.token, step.probability) for step in steps]], [naive(base, rows[0], n=4, prefixes=three)])


@pytest.mark.parametrize("answers", [[[1]], [[1], [2], [], [4], [5]]])
def test_rows_without_an_answer_are_errors(answers, tiny):
    base = tiny("llama")
    with torch.inference_mode():
        prefix = prefill(base.model, PREFIXES)
    with pytest.raises(LqaError, match="one answer with at least one token"):
        score(session_of(base), prefix, ROWS, answers)


def test_nothing_is_held_between_the_steps_of_a_stream_nor_after_it_is_abandoned(tiny):
    base = tiny("llama")
    held, entered = [0], [0]

    @contextmanager
    def session():
        held[0] += 1
        entered[0] += 1
        try:
            with torch.inference_mode(), base.using():
                yield base.model
        finally:
            held[0] -= 1

    with session():
        prefix = prefill(base.model, PREFIXES)
    stream = decode(session, prefix, ROWS, NEW, [])
    for _ in range(3):
        assert next(stream)
        assert held[0] == 0 and not torch.is_inference_mode_enabled()
        assert base.lock.acquire(blocking=False)  # somebody else can use the model meanwhile
        base.lock.release()
    stream.close()
    before = entered[0]
    assert held[0] == 0 and entered[0] == before and not torch.is_inference_mode_enabled()


def test_an_exception_of_a_step_leaves_nothing_held(tiny):
    base = tiny("llama")

    def fail(logits):
        raise ZeroDivisionError

    with base.decoding():
        prefix = prefill(base.model, PREFIXES)
    with pytest.raises(ZeroDivisionError):
        list(decode(base.decoding, prefix, ROWS, NEW, [], fail))
    assert not torch.is_inference_mode_enabled() and base.lock.acquire(blocking=False)


# --- sampling ---------------------------------------------------------------------------------------------------


def tokens(rows):
    return [[t for t, _ in row] for row in rows]


def test_the_sampler_gives_the_same_tokens_for_the_same_seed_only(tiny):
    base = tiny("llama")
    first, again, other = (tokens(fast(base, choose=sampler(1.5, 0.95, seed))) for seed in (3, 3, 4))
    assert first == again and first != other and first != tokens(fast(base))


def test_temperature_0_is_greedy_and_the_probability_is_the_model_s(tiny):
    base = tiny("llama")
    assert sampler(0) is None
    cold = fast(base, choose=sampler(1e-4, 1.0, 0))
    assert_same(cold, [naive(base, row) for row in ROWS])


def test_nucleus_sampling_draws_from_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log().repeat(500, 1)
    for top_p, allowed in [(0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]:
        drawn = sampler(1.0, top_p, 0)(logits)
        assert set(drawn[::2].tolist()) == allowed and {3 - t for t in drawn[1::2].tolist()} == allowed
    share = (sampler(1.0, 1.0, 0)(logits)[::2] == 0).float().mean()
    assert 0.43 < share < 0.57


@pytest.mark.parametrize(("temperature", "top_p"), [(-1, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_values_without_meaning_are_errors(temperature, top_p):
    with pytest.raises(LqaError, match="temperature"):
        sampler(temperature, top_p)
