"""LatentDecoder and Reading: the facade that users hold.  Strings and chats go in, frozen dataclasses come out."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lqa import engine
from lqa.activations import capture, gather_spans
from lqa.chat import Chat, Rendered, Span, check_text, hidden_turns, render, resolve_span
from lqa.conditioning import Projection, condition, reference
from lqa.config import DecoderConfig
from lqa.errors import LqaError
from lqa.injection import Injection
from lqa.models import Base, load_base

if TYPE_CHECKING:
    from lqa.steering import Steering

EMBEDDED_DECODER = Path(__file__).parent.parent / "decoders" / "smollm2-135m-instruct"
MAX_NEW_TOKENS = 48

Questions = str | Sequence[str]
QA = Sequence[tuple[str, str]]  # questions with answers


@dataclass(frozen=True)
class Grounding:
    """The references of an answer: what is said when nothing, or another chat's activations, or only the visible text is given."""

    none: str
    shuffled: str
    text_only: str


@dataclass(frozen=True)
class Answer:
    """A decoder's answer.  `confidence`: mean probability of its tokens, in [0, 1]; `grounding` is None unless it was asked for."""

    question: str
    text: str
    confidence: float
    grounding: Grounding | None = None


@dataclass(frozen=True)
class Score:
    """Mean log-probability per token (nats, end of turn included) of an answer, with the activations and with unpatched slots."""

    text: str
    logprob: float
    logprob_none: float


@dataclass(frozen=True)
class TokenScore:
    """Log-probability (nats) of one token of an answer, with the activations and with unpatched slots; `text` is its piece of it."""

    text: str
    logprob: float
    logprob_none: float


def evidence(gains: Sequence[float]) -> list[float]:
    """softmax of `gains`: log-probabilities (nats) less those of a reference."""
    weights = [math.exp(gain - max(gains)) for gain in gains]
    return [w / sum(weights) for w in weights]


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


class LatentDecoder:
    """A decoder over one base model: the adapter switched off is the target, switched on the decoder.  Safe to use from many threads."""

    def __init__(self, base: Base, config: DecoderConfig, name: str, projection: Projection | None = None):
        config.check().check_base(base)
        self.base, self.config, self.name, self.projection = base, config, name, projection

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None = None, *, base: Base | None = None, revision: str | None = None, device=None, dtype=None
    ) -> LatentDecoder:
        """Loads a decoder: the embedded one (None), a folder, or a Hub id.

        base    the base model, if it is already loaded; else the sidecar's is (float32 on CPU, bfloat16 on GPU)

        Raises LqaError if the sidecar is missing or malformed, does not match the base, or the adapter file is damaged.
        """
        name = str(source or EMBEDDED_DECODER)
        folder = Path(name)
        if source is None and not folder.is_dir():
            raise LqaError(f"The embedded decoder is not at {folder}; run lqa from a clone of its repository, or name a folder or Hub id.")
        if not folder.is_dir():
            folder = _download(name, revision)
        config = DecoderConfig.load(folder)
        base = base or load_base(config.base["name"], device=device, dtype=dtype)
        projected = config.conditioning == "projected"
        decoder = cls(base, config, name, Projection.load(folder, config.read_layers, base.hidden_size) if projected else None)
        decoder.adapter = base.add_adapter(folder)
        return decoder

    # --- the target --------------------------------------------------------------------------------------------

    def read(self, chat: Chat, span: Span = "all", layer: int | None = None) -> Reading:
        """Runs the target over `chat` up to `layer` (None: the decoder's default) and keeps the activations of `span`.

        Inside `with steering.apply()` the target is the steered one.  A steering that was trained as a hidden context is read as one: a
        conditioned decoder compares with the unsteered target.  Any other counts as visible: it is in the reference of hidden turns too.

        Raises LqaError for a malformed chat, one longer than the context, a span that selects nothing, or a layer that is not supported.
        """
        return self._read(chat, span, layer, self.base.steered, self.base.steered_hidden)

    def _read(
        self, chat: Chat, span: Span, layer: int | None, steered: tuple[tuple[str, float], ...] = (), hidden: bool = False
    ) -> Reading:
        layer = self.config.check_layer(layer)
        rendered = self._render(chat)
        indices = resolve_span(span, rendered)
        activations = self._capture(rendered, indices, layer, steered)
        config = self.config
        found = None if config.conditioning == "raw" else reference(self.base.tokenizer, rendered, indices, hidden)
        h0 = self._capture(found.rendered, found.places, layer, () if hidden else steered) if found else None
        how = (config.conditioning, config.conditioning_constant, self.projection)
        injected = condition(activations, h0, found and found.which, layer, *how)
        return Reading(self, rendered, tuple(indices), layer, activations, injected, conditioned=found is not None)

    def _capture(self, rendered: Rendered, indices: list[int], layer: int, steered: tuple[tuple[str, float], ...] = ()) -> Tensor:
        ids = torch.tensor([rendered.ids], device=self.base.device)
        with self.base.decoding(*steered) as model:
            acts = capture(model, self.base.blocks, ids, torch.ones_like(ids), [layer])
            activations = gather_spans(acts, [indices], [[layer]])
        return activations.clone()  # outside of inference mode, so that autograd may use it

    def generate(self, chat: Chat, *, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> str:
        """The target's own reply to `chat`; greedy unless a temperature is given."""
        return "".join(self.stream_reply(chat, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)).strip()

    def stream_reply(
        self, chat: Chat, *, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[str]:
        """`generate` as pieces of text.  The target is steered as it was when this was called, whoever takes the pieces."""
        if max_new_tokens < 1:
            raise LqaError(f"The number of new tokens must be at least 1, not {max_new_tokens}.")
        rendered = self._render(chat)
        if rendered.chat[-1][0] == "assistant":
            raise LqaError("The chat ends with the assistant's turn; it needs a user's message to reply to.")
        self.check_room(len(rendered), max_new_tokens)
        prefix_ids, suffixes = engine.common_prefix([rendered.ids])
        session = self.base.target()
        with session() as model:
            prefix = engine.prefill(model, [prefix_ids])
        stop = [i for i in [self.base.tokenizer.eos_token_id, *self.config.prompt.stop_ids(self.base.tokenizer)] if i is not None]
        choose = engine.sampler(temperature, top_p, seed)
        return self._pieces(engine.decode(session, prefix, [engine.Row(0, suffixes[0])], max_new_tokens, stop, choose))

    # --- steering ------------------------------------------------------------------------------------------------

    def steer(self, control: str | None = None, qa: Sequence[tuple[str, str]] | None = None, **settings) -> Steering:
        """Trains a steering towards a control text, or towards question-answer pairs; see `lqa.steering.steer` for all settings."""
        from lqa.steering import steer

        return steer(self, control=control, qa=qa, **settings)

    def load_steering(self, source: str | Path) -> Steering:
        """A steering from the folder that `Steering.save` wrote.  Raises LqaError if it is damaged, or made for another base."""
        from lqa.steering import Steering

        return Steering.load(self, source)

    # --- shared with Reading and scan -------------------------------------------------------------------------------------

    def session(self):
        """The model as decoder, for one forward pass."""
        return self.base.decoding(self.adapter)

    def prefill_slots(self, layers: list[int], n_slots: int, activations: Tensor | None, count: int = 1) -> engine.Prefix:
        """The decoder's pass over `count` prompts, their slots patched with `activations` (count * n_slots, D), or not at all."""
        config = self.config
        ids, slots = config.prompt.prefix(self.base.tokenizer, config.slot_token_id, n_slots, layers)
        if activations is None:
            with self.session() as model:
                return engine.prefill(model, [ids] * count)
        mask = torch.tensor([slots] * count, device=self.base.device)
        with self.session() as model, Injection(self.base, config.write_layer, config.operation) as injection:
            with injection.armed(mask, activations):
                return engine.prefill(model, [ids] * count)

    def _render(self, chat: Chat) -> Rendered:
        rendered = render(self.base.tokenizer, chat)
        self.check_room(len(rendered), 0)
        return rendered

    def check_room(self, tokens: int, new: int) -> None:
        """Raises LqaError if `tokens` and `new` more do not fit the model's context."""
        if tokens + new > self.base.context:
            text = f"The chat has {tokens} tokens" + (f" and {new} more are asked for" if new else "")
            raise LqaError(f"{text}, but the model's context is {self.base.context}; shorten it.")

    def _pieces(self, steps: Iterator[list[engine.Step]]) -> Iterator[str]:
        """The text of a one-row decode as it grows; a piece ends only where a character does."""
        ids, shown, text = [], "", ""
        for step in steps:
            ids.append(step[0].token)
            text = self.base.tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("\ufffd") and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
        if text != shown:  # it ended inside a character
            yield text[len(shown) :]

    def collect(self, steps: Iterator[list[engine.Step]], rows: int) -> list[tuple[str, float]]:
        """Text and mean token probability of every row of a decode."""
        ids, probabilities = [[] for _ in range(rows)], [[] for _ in range(rows)]
        for step in steps:
            for row, token, probability in step:
                ids[row].append(token)
                probabilities[row].append(probability)
        return self._texts(ids, probabilities)

    def grow(self, steps: Iterator[list[engine.Step]], rows: int) -> Iterator[list[tuple[str, float]]]:
        """`collect` after every step; the last is the whole."""
        ids, probabilities = [[] for _ in range(rows)], [[] for _ in range(rows)]
        for step in steps:
            for row, token, probability in step:
                ids[row].append(token)
                probabilities[row].append(probability)
            yield [(text.rstrip("\ufffd"), p) for text, p in self._texts(ids, probabilities)]
        yield self._texts(ids, probabilities)

    def _texts(self, ids: list[list[int]], probabilities: list[list[float]]) -> list[tuple[str, float]]:
        texts = self.base.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [(text.strip(), sum(p) / len(p) if p else 0.0) for text, p in zip(texts, probabilities, strict=True)]


def _download(name: str, revision: str | None) -> Path:
    from lqa.hub import download_decoder

    return download_decoder(name, revision)


class Reading:
    """A target forward pass, captured: `tokens`, `span` (indices), `layer`, `activations` (N, D).  Questions are asked of it.

    `injected` (N, D) is what the decoder gets: the activations, conditioned as the sidecar says.  `conditioned` says whether there was
    a hidden context to condition on.

    The target runs once, in `LatentDecoder.read`; the prompt with its slots runs once per reading, however many questions follow.
    """

    def __init__(
        self,
        decoder: LatentDecoder,
        rendered: Rendered,
        span: tuple[int, ...],
        layer: int,
        activations: Tensor,
        injected: Tensor,
        conditioned: bool,
    ):
        self.decoder, self.rendered, self.span, self.layer = decoder, rendered, span, layer
        self.activations, self.injected, self.conditioned = activations, injected, conditioned
        self._prefixes: dict[str, engine.Prefix] = {}
        self._lock = threading.Lock()

    @property
    def tokens(self) -> list[str]:
        return [token.text for token in self.rendered.tokens]

    @property
    def hidden(self) -> set[int]:
        """The hidden context: the turns wholly outside the span."""
        return hidden_turns(self.rendered, list(self.span))

    def ask(
        self, questions: Questions, *, grounding: bool = False, after: QA = (), max_new_tokens: int = MAX_NEW_TOKENS
    ) -> list[Answer]:
        """Greedy answers to all questions, decoded as one batch; with `grounding`, each with its references.

        after   earlier questions about this reading with their answers, oldest first; the decoder sees them, so that a question may
                refer to them.  (It was trained on single questions.)

        Raises LqaError for an empty question or one that does not fit the context.
        """
        questions = _listed(questions)
        answers = self._decode(questions, ("true",), max_new_tokens, after)
        references = self.references(questions, after=after, max_new_tokens=max_new_tokens) if grounding else [None] * len(questions)
        return [Answer(q, *a, g) for q, a, g in zip(questions, answers, references, strict=True)]

    def answers(self, questions: Questions, *, after: QA = (), max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[list[Answer]]:
        """`ask` as it goes: the answers so far, after every token; the last are the whole answers."""
        questions = _listed(questions)
        steps = self._steps(questions, ("true",), max_new_tokens, after)
        for so_far in self.decoder.grow(steps, len(questions)):
            yield [Answer(q, *a) for q, a in zip(questions, so_far, strict=True)]

    def references(self, questions: Questions, *, after: QA = (), max_new_tokens: int = MAX_NEW_TOKENS) -> list[Grounding]:
        """What is answered to each question without these activations; `after` is told to the references too."""
        from lqa.grounding import text_only

        questions, n = _listed(questions), len(_listed(questions))
        texts = [text for text, _ in self._decode(questions, ("none", "shuffled"), max_new_tokens, after)]
        only = text_only(self, questions, max_new_tokens, after)
        return [Grounding(*r) for r in zip(texts[:n], texts[n:], only, strict=True)]

    def stream(self, question: str, *, source: str = "true", after: QA = (), max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[str]:
        """The answer in pieces of text.  `source`: "true", or the references "none" and "shuffled"."""
        yield from self.decoder._pieces(self._steps([question], (source,), max_new_tokens, after))

    def score(self, question: str, answers: Sequence[str]) -> list[Score]:
        """How probable each of `answers` is, with the activations and with unpatched slots.

        Raises LqaError for an empty question, no answers, or an empty one.
        """
        answers = _listed(answers)
        logprobs = [self.logprobs(question, answers, source) for source in ("true", "none")]
        return [Score(*row) for row in zip(answers, *logprobs, strict=True)]

    def logprobs(self, question: str, answers: Sequence[str], source: str = "true") -> list[float]:
        """Mean log-probability per token (nats) of each answer; `source` as in `stream`."""
        return [sum(tokens) / len(tokens) for tokens in self._token_logprobs([(question, a) for a in _listed(answers)], source)]

    def probabilities(self, question: str, answers: Sequence[str]) -> list[float]:
        """How probable each of `answers` is among them, by the activations: what they would be if, without activations, all of them were
        equally probable.

            softmax over a of  log p(a | activations) - log p(a | unpatched slots)          (sums over the answer's tokens)
        """
        pairs = [(question, a) for a in _listed(answers)]
        true, none = (self._token_logprobs(pairs, source) for source in ("true", "none"))
        return evidence([sum(t) - sum(n) for t, n in zip(true, none, strict=True)])

    def token_scores(self, qa: QA, *, after: QA = ()) -> list[list[TokenScore]]:
        """How probable every token of each answer is, with the activations and with unpatched slots; the answer's end is left out.

        Raises LqaError for an empty question or answer.
        """
        qa = list(qa)
        logprobs = [self._token_logprobs(qa, source, after) for source in ("true", "none")]
        pieces = [self.decoder.config.prompt.answer_pieces(self.decoder.base.tokenizer, answer) for _, answer in qa]
        return [[TokenScore(*t) for t in zip(p, *both, strict=False)] for p, *both in zip(pieces, *logprobs, strict=True)]

    # --- how -------------------------------------------------------------------------------------------------------

    def _decode(self, questions: list[str], sources: tuple[str, ...], max_new_tokens: int, after: QA = ()) -> list[tuple[str, float]]:
        return self.decoder.collect(self._steps(questions, sources, max_new_tokens, after), len(sources) * len(questions))

    def _steps(self, questions: list[str], sources: tuple[str, ...], max_new_tokens: int, after: QA) -> Iterator[list[engine.Step]]:
        rows = self._rows(questions, sources, max_new_tokens, after)
        stop = self.decoder.config.prompt.stop_ids(self.decoder.base.tokenizer)
        return engine.decode(self.decoder.session, self._prefix(sources), rows, max_new_tokens, stop)

    def _token_logprobs(self, qa: QA, source: str, after: QA = ()) -> list[list[float]]:
        """Log-probabilities (nats) of the tokens of every answer, its end included."""
        if not qa or not all(isinstance(a, str) and a.strip() for _, a in qa):
            raise LqaError("Give at least one answer to score, and no empty one.")
        tokenizer, prompt = self.decoder.base.tokenizer, self.decoder.config.prompt
        ids = [prompt.answer(tokenizer, check_text(tokenizer, a, "The answer")) for _, a in qa]
        rows = self._rows([q for q, _ in qa], (source,), max(map(len, ids)), after)
        return engine.token_logprobs(self.decoder.session, self._prefix((source,)), rows, ids)

    def _rows(self, questions: Sequence[str], sources: tuple[str, ...], new: int, after: QA = ()) -> list[engine.Row]:
        """One row per source and question, source by source."""
        if not questions or not all(isinstance(q, str) and q.strip() for q in [*questions, *(q for q, _ in after)]):
            raise LqaError("Ask at least one question, and no empty one.")
        if new < 1:
            raise LqaError(f"The number of new tokens must be at least 1, not {new}.")
        tokenizer, prompt = self.decoder.base.tokenizer, self.decoder.config.prompt
        for text in (text for pair in after for text in pair):
            check_text(tokenizer, text, "An earlier question or answer")
        suffixes = [prompt.question(tokenizer, check_text(tokenizer, q, "The question"), after) for q in questions]
        room = self.decoder.base.context - len(self._prompt_ids()[0]) - new
        if max(map(len, suffixes)) > room:
            raise LqaError(
                f"The question with {len(self.span)} activations and {new} new tokens exceeds the model's context of "
                f"{self.decoder.base.context}; select fewer tokens or ask more briefly."
            )
        return [engine.Row(i, suffix) for i in range(len(sources)) for suffix in suffixes]

    def _prompt_ids(self) -> tuple[list[int], list[bool]]:
        config = self.decoder.config
        return config.prompt.prefix(self.decoder.base.tokenizer, config.slot_token_id, len(self.span), [self.layer])

    def _prefix(self, sources: tuple[str, ...]) -> engine.Prefix:
        with self._lock:
            for source in sources:
                if source not in self._prefixes:
                    self._prefixes[source] = self._prefill(source)
            prefixes = [self._prefixes[source] for source in sources]
        with torch.inference_mode():
            return engine.join(prefixes) if len(prefixes) > 1 else prefixes[0]

    def _prefill(self, source: str) -> engine.Prefix:
        """The decoder's pass over prompt and slots: patched with these activations, with a donor's, or not at all."""
        if source == "none":
            return self.decoder.prefill_slots([self.layer], len(self.span), None)
        if source == "shuffled":
            from lqa.grounding import donor_activations

            activations = donor_activations(self)
        elif source == "true":
            activations = self.injected
        else:
            raise LqaError(f"The source {source!r} is unknown; use true, none or shuffled.")
        return self.decoder.prefill_slots([self.layer], len(self.span), activations)
