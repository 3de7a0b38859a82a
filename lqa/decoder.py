"""LatentDecoder and Reading: the facade that users hold.  Strings and chats go in, frozen dataclasses come out."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lqa import engine
from lqa.activations import Layer, Passes, capture, gather_spans, layer_name
from lqa.calibration import Calibration
from lqa.chat import Chat, Rendered, Span, check_text, hidden_turns, render, resolve_span, visible_text
from lqa.conditioning import MAPPED, REFERENCED, Projection, condition
from lqa.conditioning import reference as find_reference
from lqa.config import SIDECAR, DecoderConfig, preset_config
from lqa.errors import LqaError
from lqa.injection import Injection
from lqa.models import Base, load_base

if TYPE_CHECKING:
    from lqa.steering import Steering

EMBEDDED_DECODER = Path(__file__).parent.parent / "decoders" / "smollm2-135m-instruct"
MAX_NEW_TOKENS = 48
LEAST = 1e-30  # a token's probability below it is rounding

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
    """A decoder's answer; `grounding` is None unless it was asked for.

    confidence   in [0, 1]: the probability that it is right, by the sidecar's calibration; without one, the mean probability of its tokens
    cannot_tell  the confidence is below the calibration's threshold: the text is a guess
    """

    question: str
    text: str
    confidence: float
    grounding: Grounding | None = None
    cannot_tell: bool = False


class Said(NamedTuple):
    """A decoded text; `probability`: mean over its tokens; `logprob`: mean log-probability (nats).  0 and log(LEAST) for no tokens."""

    text: str
    probability: float
    logprob: float


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


def collect(tokenizer, steps: Iterable[list[engine.Step]], rows: int) -> list[Said]:
    """What each of `rows` says in these steps of a decode."""
    ids, probabilities = [[] for _ in range(rows)], [[] for _ in range(rows)]
    for step in steps:
        for row, token, probability in step:
            ids[row].append(token)
            probabilities[row].append(probability)
    found = []
    for text, p in zip(tokenizer.batch_decode(ids, skip_special_tokens=True), probabilities, strict=True):
        n = max(1, len(p))
        found.append(Said(text.strip(), sum(p) / n, sum(math.log(max(x, LEAST)) for x in p or [0.0]) / n))
    return found


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


class LatentDecoder:
    """A decoder over one base model: the adapter switched off is the target, switched on the decoder.  Safe to use from many threads."""

    def __init__(self, base: Base, config: DecoderConfig, name: str, projection: Projection | None = None):
        config.check().check_base(base)
        self.base, self.config, self.name, self.projection = base, config, name, projection
        self.calibration = None if config.calibration is None else Calibration.load(config.calibration)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        base: Base | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        preset: str | None = None,
        read_layers: Sequence[int] | None = None,
        write_layer: int | None = None,
        device=None,
        dtype=None,
    ) -> LatentDecoder:
        """Loads a decoder: the embedded one (None), a folder, or a Hub id (safetensors and JSON only; from the cache when offline).

        base         the base model, if it is already loaded; else the sidecar's is (float32 on CPU, bfloat16 on GPU)
        revision     a branch, tag or commit on the Hub (default: main)
        subfolder    where in the folder or repository the adapter lies
        preset       for a decoder of another project, which ships no sidecar: latentqa, activation-oracle (lqa.config.preset_config)
        read_layers, write_layer   in place of the preset's; a subfolder `readN` says by its name that layer N is read

        Raises LqaError if it cannot be had, the sidecar is missing or malformed or does not match the base, or the adapter is damaged.
        """
        name = str(source or EMBEDDED_DECODER)
        folder = Path(name)
        if source is None and not folder.is_dir():
            raise LqaError(f"The embedded decoder is not at {folder}; run lqa from a clone of its repository, or name a folder or Hub id.")
        if not folder.is_dir():
            folder = _download(name, revision, subfolder)
        elif revision is not None:
            raise LqaError(f"{name} is a folder here and has no revisions; leave the revision {revision!r} out.")
        folder = folder / (subfolder or "")
        if preset is None:
            if read_layers is not None or write_layer is not None:
                raise LqaError("read_layers and write_layer go with a preset; a sidecar says itself what its decoder reads and writes.")
            config = DecoderConfig.load(folder)
            weights = config.base.get("weights", {})
            pinned = weights.get("revision") if weights.get("repo") == config.base["name"] else None
            base = base or load_base(config.base["name"], revision=pinned, device=device, dtype=dtype)
        else:
            trained, lora = _foreign(folder)
            if read_layers is None and (named := re.fullmatch(r"read(\d+)", Path(subfolder or "").name)):
                read_layers = [int(named[1])]
            base = base or load_base(trained, device=device, dtype=dtype)
            config = preset_config(preset, base, read_layers, write_layer, lora)
        projection = None
        if config.conditioning in MAPPED:
            projection = Projection.load(folder, config.maps, base.hidden_size, config.conditioning, config.projection)
        decoder = cls(base, config, name, projection)
        decoder.adapter, decoder.folder = base.add_adapter(folder), folder
        return decoder

    # --- the target --------------------------------------------------------------------------------------------

    def read(
        self, chat: Chat, span: Span = "all", layer: Layer | None = None, *, reference: Chat | None = None, passes: Passes | None = None
    ) -> Reading:
        """Runs the target over `chat` up to `layer` (None: the decoder's default) and keeps the activations of `span`.

        layer      a list, for a decoder that reads several layers at once
        reference  for a decoder that reads differences: a chat with the same visible turns to compare with (None: these turns alone)
        passes     where target passes are kept, at all read layers, so that further spans and layers of a chat need none

        Inside `with steering.apply()` the target is the steered one.  A steering that was trained as a hidden context is read as one: a
        conditioned decoder compares with the unsteered target.  Any other counts as visible: it is in the reference of hidden turns too.

        Raises LqaError for a malformed chat, one longer than the context, a span that selects nothing, a layer that is not supported, or
        a reference that lacks a visible turn or is of no use to this decoder.
        """
        return self._read(chat, span, layer, self.base.steered, self.base.steered_hidden, passes, reference)

    def _read(
        self,
        chat: Chat,
        span: Span,
        layer: Layer | None,
        steered: tuple[tuple[str, float], ...] = (),
        hidden: bool = False,
        passes: Passes | None = None,
        reference: Chat | None = None,
    ) -> Reading:
        layers = self.config.check_layers(layer)
        rendered = self._render(chat)
        indices = resolve_span(span, rendered)
        activations = self._capture(rendered, indices, layers, steered, passes)
        config, found = self.config, None
        if config.conditioning in REFERENCED:
            found = find_reference(self.base.tokenizer, rendered, indices, hidden, reference)
        elif reference is not None:
            raise LqaError(f"This decoder's conditioning {config.conditioning!r} compares with nothing; leave the reference chat out.")
        h0 = self._capture(found.rendered, found.places, layers, () if hidden else steered, passes) if found else None
        how = (config.conditioning, config.conditioning_constant, self.projection)
        injected = condition(activations, h0, found and found.which, config.blocks(layers), *how, found and found.opening)
        return Reading(self, rendered, tuple(indices), layers, activations, injected, conditioned=found is not None)

    def _capture(
        self,
        rendered: Rendered,
        indices: list[int],
        layers: Sequence[int],
        steered: tuple[tuple[str, float], ...] = (),
        passes: Passes | None = None,
    ) -> Tensor:
        if passes is None or steered:  # what is kept are passes of the unsteered target
            acts = self._pass(rendered.ids, layers, steered)
        else:
            acts = passes.get(rendered.ids, layers, lambda: self._pass(rendered.ids, self.config.read_layers))
        return gather_spans(acts, [indices], [layers]).clone()  # outside of inference mode, so that autograd may use it

    def _pass(self, token_ids: list[int], layers: Sequence[int], steered: tuple[tuple[str, float], ...] = ()) -> dict[int, Tensor]:
        ids = torch.tensor([token_ids], device=self.base.device)
        with self.base.decoding(*steered) as model:
            return capture(model, self.base.blocks, ids, torch.ones_like(ids), layers)

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

    def load_steering(self, source: str | Path, *, revision: str | None = None) -> Steering:
        """A steering from the folder that `Steering.save` wrote, or from a Hub id; see `lqa.steering.Steering.load`."""
        from lqa.steering import Steering

        return Steering.load(self, source, revision=revision)

    # --- shared with Reading and scan -------------------------------------------------------------------------------------

    def session(self):
        """The model as decoder, for one forward pass."""
        return self.base.decoding(self.adapter)

    def prefill_slots(
        self, layers: Sequence[int], n_slots: int, activations: Tensor | None, count: int = 1, start: int = 0
    ) -> engine.Prefix:
        """The decoder's pass over `count` prompts, each with `n_slots` slots for each of the L `layers`, patched with `activations`
        (count * L * n_slots, D), or not at all.

        start   the position of their first token (DecoderConfig.first_position)
        """
        config = self.config
        ids, slots = config.prompt.prefix(self.base.tokenizer, config.slot_token_id, n_slots, config.blocks(layers))
        if activations is None:
            with self.session() as model:
                return engine.prefill(model, [ids] * count, start)
        mask = torch.tensor([slots] * count, device=self.base.device)
        with self.session() as model, Injection(self.base, config.write_layer, config.operation) as injection:
            with injection.armed(mask, activations):
                return engine.prefill(model, [ids] * count, start)

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


def _download(name: str, revision: str | None, subfolder: str | None) -> Path:
    from lqa.download import DECODER_FILES, download

    return download(name, DECODER_FILES, revision=revision, subfolder=subfolder)


def _foreign(folder: Path) -> tuple[str, dict]:
    """The base and the LoRA summary of an adapter that has no sidecar.  Raises LqaError if it has one, or its config cannot be read."""
    if (folder / SIDECAR).is_file():
        raise LqaError(f"{folder} has an {SIDECAR}, which says what the preset would; leave the preset out.")
    try:
        data = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        summary = {k: data[k] for k in ("r", "lora_alpha", "lora_dropout", "target_modules") if k in data}
        return data["base_model_name_or_path"], summary
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LqaError(f"{folder} has no adapter_config.json that names a base model ({error!r}); it is not an adapter.") from error


class Reading:
    """A target forward pass, captured: `tokens`, `span` (N indices), `layers` (L), `activations` (L * N, D), a layer's block after the
    other's.  Questions are asked of it.

    `injected` (L * N, D) is what the decoder gets: the activations, conditioned as the sidecar says.  `conditioned` says whether there was
    a hidden context to condition on.

    The target runs once, in `LatentDecoder.read`; the prompt with its slots runs once per reading, however many questions follow.
    """

    def __init__(
        self,
        decoder: LatentDecoder,
        rendered: Rendered,
        span: tuple[int, ...],
        layers: tuple[int, ...],
        activations: Tensor,
        injected: Tensor,
        conditioned: bool,
    ):
        self.decoder, self.rendered, self.span, self.layers = decoder, rendered, span, layers
        self.activations, self.injected, self.conditioned = activations, injected, conditioned
        self._prefixes: dict[str, engine.Prefix] = {}
        self._lock = threading.Lock()

    @property
    def tokens(self) -> list[str]:
        return [token.text for token in self.rendered.tokens]

    @property
    def layer(self) -> int | tuple[int, ...]:
        """What was read, as `read` takes it: the layer, or all of several."""
        return layer_name(self.layers)

    @property
    def blocks(self) -> list[Layer]:
        """What each block of slots holds: a layer, or several that are merged."""
        return self.decoder.config.blocks(self.layers)

    @property
    def hidden(self) -> set[int]:
        """The hidden context: the turns wholly outside the span."""
        return hidden_turns(self.rendered, list(self.span))

    def ask(
        self, questions: Questions, *, grounding: bool = False, after: QA = (), max_new_tokens: int = MAX_NEW_TOKENS
    ) -> list[Answer]:
        """Greedy answers to all questions, guided as the sidecar says (engine.guided), decoded as one batch; with `grounding`, each with
        its references.

        after   earlier questions about this reading with their answers, oldest first; the decoder sees them, so that a question may
                refer to them (one that was trained without follow-ups does so less well)

        Raises LqaError for an empty question or one that does not fit the context.
        """
        questions = _listed(questions)
        said = self._decode(questions, ("true",), max_new_tokens, after)
        references = self.references(questions, after=after, max_new_tokens=max_new_tokens) if grounding else [None] * len(questions)
        return self._judged(questions, said, after, references)

    def answers(self, questions: Questions, *, after: QA = (), max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[list[Answer]]:
        """`ask` as it goes: the answers so far, after every token, with the mean probability of their tokens as confidence; the last
        are those of `ask`."""
        questions, steps = _listed(questions), []
        for step in self._steps(questions, ("true",), max_new_tokens, after):
            steps.append(step)
            said = self._said(steps, len(questions))
            yield [Answer(q, s.text.rstrip("\ufffd"), s.probability) for q, s in zip(questions, said, strict=True)]
        yield self._judged(questions, self._said(steps, len(questions)), after, [None] * len(questions))

    def _judged(self, questions: list[str], said: list[Said], after: QA, references: list[Grounding | None]) -> list[Answer]:
        calibration = self.decoder.calibration
        return [
            Answer(q, s.text, c, g, calibration is not None and c < calibration.threshold)
            for q, s, c, g in zip(questions, said, self._confidence(questions, said, after), references, strict=True)
        ]

    def references(self, questions: Questions, *, after: QA = (), max_new_tokens: int = MAX_NEW_TOKENS) -> list[Grounding]:
        """What is answered to each question without these activations; `after` is told to the references too."""
        from lqa.grounding import text_only

        questions, n = _listed(questions), len(_listed(questions))
        texts = [said.text for said in self._decode(questions, ("none", "shuffled"), max_new_tokens, after)]
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

    def _confidence(self, questions: Sequence[str], said: Sequence[Said], after: QA = ()) -> list[float]:
        calibration = self.decoder.calibration
        if calibration is None:
            return [s.probability for s in said]
        features = [{"probability": s.probability, "logprob": s.logprob} for s in said]
        if "grounded" in calibration.weights:
            tokenizer, prompt = self.decoder.base.tokenizer, self.decoder.config.prompt
            ids = [prompt.answer(tokenizer, s.text or ".") for s in said]  # nothing cannot be scored

            def score(source: str) -> list[float]:
                return engine.score(self.decoder.session, self._prefix((source,)), self._rows(questions, (source,), 1, after), ids)

            for entry, own, none in zip(features, score("true"), score("none"), strict=True):
                entry["grounded"] = own - none
        return [calibration.confidence(entry) for entry in features]

    def _decode(self, questions: list[str], sources: tuple[str, ...], max_new_tokens: int, after: QA = ()) -> list[Said]:
        return self._said(self._steps(questions, sources, max_new_tokens, after), len(sources) * len(questions))

    def _said(self, steps: Iterable[list[engine.Step]], rows: int) -> list[Said]:
        return collect(self.decoder.base.tokenizer, steps, rows)

    def _steps(self, questions: list[str], sources: tuple[str, ...], max_new_tokens: int, after: QA) -> Iterator[list[engine.Step]]:
        rows, guidance = self._rows(questions, sources, max_new_tokens, after), self.decoder.config.guidance
        if guidance:  # every row is held against its question without activations
            rows = rows + [row._replace(prefix=len(sources)) for row in rows]
            sources = (*sources, "none")
        stop = self.decoder.config.prompt.stop_ids(self.decoder.base.tokenizer)
        return engine.decode(self.decoder.session, self._prefix(sources), rows, max_new_tokens, stop, guidance=guidance)

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
        room = self.decoder.base.context - self._start - len(self._prompt_ids()[0]) - new
        if max(map(len, suffixes)) > room:
            raise LqaError(
                f"The question with {len(self.injected)} activations and {new} new tokens exceeds the model's context of "
                f"{self.decoder.base.context}; select fewer tokens or ask more briefly."
            )
        return [engine.Row(i, suffix) for i in range(len(sources)) for suffix in suffixes]

    def _prompt_ids(self, text: bool = True) -> tuple[list[int], list[bool]]:
        """The prompt and which of it are slots; a decoder that reads text has the visible turns there, or nothing, and no slots."""
        config = self.decoder.config
        if config.reads_text:
            shown = visible_text(self.rendered, list(self.span)) if text else ""
            ids = config.prompt.text_prefix(self.decoder.base.tokenizer, shown, self.blocks)
            return ids, [False] * len(ids)
        return config.prompt.prefix(self.decoder.base.tokenizer, config.slot_token_id, len(self.span), self.blocks)

    @property
    def _start(self) -> int:
        return self.decoder.config.first_position(self.span)

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
        if self.decoder.config.reads_text and source == "shuffled":
            raise LqaError("This decoder reads text, no activations; it has no other chat's to be given.")
        if self.decoder.config.reads_text:
            with self.decoder.session() as model:
                return engine.prefill(model, [self._prompt_ids(text=source != "none")[0]], self._start)
        if source == "none":
            return self.decoder.prefill_slots(self.layers, len(self.span), None, start=self._start)
        if source == "shuffled":
            from lqa.grounding import donor_activations

            activations = donor_activations(self)
        elif source == "true":
            activations = self.injected
        else:
            raise LqaError(f"The source {source!r} is unknown; use true, none or shuffled.")
        return self.decoder.prefill_slots(self.layers, len(self.span), activations, start=self._start)
