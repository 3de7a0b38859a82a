"""How strong a steering may be: the perplexity of what the steered model writes, by the unsteered one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from lqa import engine
from lqa.chat import render
from lqa.errors import LqaError
from lqa.steering.neutral import load_neutral

REQUESTS, NEW_TOKENS = 8, 32
RATIO = 1.5
ROWS = 16  # replies of one batch


def write_replies(
    decoder,
    requests: Sequence[str],
    session: Callable | None = None,
    new_tokens: int = NEW_TOKENS,
    *,
    system: str | None = None,
    choose: Callable | None = None,
) -> list[list[int]]:
    """Replies of the target to `requests`, as token ids without the end of turn; shorter than `new_tokens` where it ended by itself.

    session  of the model that replies (see lqa.engine); None: the bare model
    system   a system prompt in front of every request
    choose   see engine.decode; greedy if None

    Raises LqaError if a request with its reply exceeds the context.
    """
    session, tokenizer = session or decoder.base.decoding, decoder.base.tokenizer
    stop = [i for i in [tokenizer.eos_token_id, *decoder.config.prompt.stop_ids(tokenizer)] if i is not None]
    replies: list[list[int]] = [[] for _ in requests]
    for first in range(0, len(requests), ROWS):
        prefix, rows = _prompts(decoder, requests[first : first + ROWS], session, system, new_tokens)
        for steps in engine.decode(session, prefix, rows, new_tokens, stop, choose):
            for row, token, _ in steps:
                replies[first + row].append(token)
    return replies


def logprobs(
    decoder,
    requests: Sequence[str],
    replies: Sequence[Sequence[int]],
    session: Callable | None = None,
    *,
    system: str | None = None,
) -> list[float]:
    """The mean log-probability per token (nats) of each reply (token ids, none empty) to its request.

    session  of the model that is asked; None: the bare model
    system   a system prompt in front of every request
    """
    session = session or decoder.base.decoding
    prefix, rows = _prompts(decoder, requests, session, system)
    return engine.score(session, prefix, rows, replies)


def perplexity(decoder, requests: Sequence[str], replies: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-probability (nats per token, over all replies) that the unsteered target gives the replies.

    Raises LqaError if all of them are empty.
    """
    kept = [i for i, reply in enumerate(replies) if reply]
    if not kept:
        raise LqaError("All replies are empty; there is no perplexity to take.")
    means = logprobs(decoder, [requests[i] for i in kept], [replies[i] for i in kept])
    lengths = [len(replies[i]) for i in kept]
    return math.exp(-sum(m * n for m, n in zip(means, lengths, strict=True)) / sum(lengths))


def strongest(
    decoder,
    session: Callable[[float], Callable],
    ratio: float = RATIO,
    *,
    most: float = 4.0,
    step: float = 0.5,
    requests: int = REQUESTS,
) -> tuple[float, dict[str, float]]:
    """The largest strength at which the perplexity of the steered replies to neutral chats, under the unsteered model, stays below
    `ratio` times that of the unsteered replies; found to a quarter of `step`, at most `most`, 0 if there is none.

    session  strength -> the session (see lqa.engine) of the model so steered, by whatever means

    The first strength that goes too far ends the search: far beyond it a model repeats itself, which any model finds likely.  Returned
    with the ratios that were found, {strength: ratio}.  Raises LqaError for a ratio that is not above 1.
    """
    if not ratio > 1:
        raise LqaError(f"The perplexity ratio must be above 1, not {ratio!r}.")
    asked = load_neutral()["held_out"][-requests:]  # early stopping takes the first
    plain = perplexity(decoder, asked, write_replies(decoder, asked))
    found: dict[float, float] = {}

    def fits(strength: float) -> bool:
        replies = write_replies(decoder, asked, session(strength))
        found[strength] = perplexity(decoder, asked, replies) / plain if any(replies) else math.inf
        return found[strength] < ratio

    low = 0.0
    while low < most and fits(min(low + step, most)):
        low = min(low + step, most)
    if low < most:
        high = low + step
        for _ in range(2):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    return low, {str(x): r for x, r in sorted(found.items())}


def auto_strength(steering, ratio: float = RATIO, **search) -> float:
    """`strongest` for a Steering; the ratios that were found are in `steering.record["strengths"]`, {strength: ratio}."""
    base = steering.decoder.base
    strength, found = strongest(steering.decoder, lambda x: partial(base.decoding, (steering.adapter, x)), ratio, **search)
    steering.record["strengths"] = found
    return strength


def _prompts(decoder, requests: Sequence[str], session, system: str | None = None, new: int = 0) -> tuple[engine.Prefix, list[engine.Row]]:
    front = [] if system is None else [{"role": "system", "content": system}]
    ids = [render(decoder.base.tokenizer, [*front, {"role": "user", "content": request}]).ids for request in requests]
    decoder.check_room(max(map(len, ids)), new)
    common, suffixes = engine.common_prefix(ids)
    with session() as model:
        prefix = engine.prefill(model, [common])
    return prefix, [engine.Row(0, suffix) for suffix in suffixes]
