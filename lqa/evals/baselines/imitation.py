"""SFT and DPO: a LoRA as large as a steering's, trained on the target's own replies under the control, which it then gives without it.

    sft  the replies themselves: -log p(y | x), mean per token.  Context distillation (Askell et al. 2021, arXiv 2112.00861) by samples
    dpo  the replies against those that the target gives without the control (Rafailov et al. 2023, arXiv 2305.18290, equation 7)

The requests x are those of a steering with the same settings, and so are blocks, rank, optimizer, early stopping and the number of replies
whose gradient is taken (a pair of dpo is two of them).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lqa import engine
from lqa.chat import render
from lqa.steering import Settings, load_neutral
from lqa.steering.strength import write_replies
from lqa.steering.training import Loop, new_lora

NEW_TOKENS, TEMPERATURE, TOP_P = 48, 0.8, 0.95  # of the replies
BETA = 0.1


class Example(NamedTuple):
    """A request with a reply: its tokens, the last `n` of which are the reply (its end included, unless it was cut off)."""

    ids: list[int]
    n: int


@dataclass
class Pair:
    """Two replies to one request; `margin`: log p(chosen) - log p(rejected) of the bare target, in nats (None: not yet taken)."""

    chosen: Example
    rejected: Example
    margin: float | None = None


def draw(settings: Settings) -> tuple[list[str], list[str]]:
    """The neutral requests that a steering with these settings visits, and those that it holds out."""
    neutral = load_neutral()
    return random.Random(settings.seed).sample(neutral["train"], settings.chats), list(neutral["held_out"][: settings.held_out])


def sample(decoder, requests: Sequence[str], system: str | None, seed: int) -> list[Example]:
    """One sampled reply of the bare target to each request, given behind the system prompt `system`; the examples are without it."""
    tokenizer = decoder.base.tokenizer
    choose = engine.sampler(TEMPERATURE, TOP_P, seed)
    replies = write_replies(decoder, requests, new_tokens=NEW_TOKENS, system=system, choose=choose)
    end = decoder.config.prompt.stop_ids(tokenizer)[:1]
    replies = [reply + end if len(reply) < NEW_TOKENS else reply for reply in replies]
    prompts = [render(tokenizer, [{"role": "user", "content": request}]).ids for request in requests]
    return [Example(prompt + reply, len(reply)) for prompt, reply in zip(prompts, replies, strict=True)]


class Imitation(Loop):
    """The training of a LoRA on `chats`, which are what `loss` takes."""

    def __init__(self, decoder, chats: Sequence, held_out: Sequence, settings: Settings):
        self.base, self.settings, self.chats, self.held_out = decoder.base, settings, chats, held_out
        self.name = new_lora(self.base, max(settings.read_layers(decoder)), settings)

    def logprobs(self, example: Example, *adapters: str) -> Tensor:
        """(n,) of the reply's tokens, in nats, with `adapters` on."""
        ids = torch.tensor([example.ids], device=self.base.device)
        with self.base.using(*adapters) as model:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=example.n + 1).logits[0, :-1]
        return logits.float().log_softmax(-1).gather(1, ids[0, -example.n :].unsqueeze(1)).squeeze(1)

    def backward(self, chat, weight: float) -> tuple[float, float]:
        loss = self.loss(chat)
        (loss * weight).backward()
        return loss.item(), 0.0

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        return sum(self.loss(chat).item() for chat in self.held_out) / len(self.held_out), 0.0


class Sft(Imitation):
    def loss(self, example: Example) -> Tensor:
        return -self.logprobs(example, self.name).mean()


class Dpo(Imitation):
    def loss(self, pair: Pair) -> Tensor:
        """-log sigmoid(beta (margin of the trained model - margin of the bare one))."""
        if pair.margin is None:
            with torch.no_grad():
                pair.margin = self.margin(pair).item()
        return -F.logsigmoid(BETA * (self.margin(pair, self.name) - pair.margin))

    def margin(self, pair: Pair, *adapters: str) -> Tensor:
        return self.logprobs(pair.chosen, *adapters).sum() - self.logprobs(pair.rejected, *adapters).sum()


def train(decoder, control: str, method: str, settings: Settings) -> tuple[str, dict]:
    """Trains by `method` (sft, dpo) and returns the adapter with {"examples", "loss" (held out, nats), "sampling" (seconds), "history"}.

    What it raises is what `lqa.steering.steer` does, and leaves the model as it was.
    """
    begun, (requests, held_out) = time.perf_counter(), draw(settings)
    replies = {"sft": 1, "dpo": 2}[method]  # of one example
    batch = max(1, settings.batch // replies)
    settings = replace(settings, batch=batch, steps=max(1, settings.steps * settings.batch // (batch * replies)))
    requests = requests[: settings.steps * batch]
    chats = sample(decoder, [*requests, *held_out], control, settings.seed)
    if method == "dpo":
        chats = [Pair(*pair) for pair in zip(chats, sample(decoder, [*requests, *held_out], None, settings.seed), strict=True)]
    sampling = time.perf_counter() - begun
    kind = {"sft": Sft, "dpo": Dpo}[method]
    training = kind(decoder, chats[: len(requests)], chats[len(requests) :], settings)
    history = training.train()
    examples = history[-1].step * batch * replies
    return training.name, {"examples": examples, "loss": training.best, "sampling": sampling, "history": [asdict(p) for p in history]}
