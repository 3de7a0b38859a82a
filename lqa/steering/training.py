"""Training a steering: the decoder's loss on what shall be true of the target, backpropagated through the injection into a LoRA on it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lqa.activations import Layer, layer_name
from lqa.chat import check_text
from lqa.errors import LqaError
from lqa.provenance import code_version
from lqa.steering.loss import ControlLoss, divergence
from lqa.steering.neutral import Neutral, load_neutral
from lqa.steering.pairs import check_pairs, write_pairs
from lqa.steering.steering import Steering

METHODS = ("joint", "per-layer")


@dataclass(frozen=True)
class Settings:
    """How a steering is trained.

    method         joint: the mean of the losses of all readings, gradient into the LoRA of blocks 0 to the deepest layer that is read;
                   per-layer: the gradient at a read layer trains the blocks after the read layer before it (where a decoder reads every
                   layer, block j alone from h_j, which is the paper's)
    layers         readings of the loss, each a layer, or a list where the decoder reads several at once; None: its default one for joint,
                   all that it supports for per-layer
    span           the tokens of a neutral chat that are read
    hidden         the decoder reads the steering as a hidden context (against the unsteered target), or as a visible one; None: hidden
                   for a decoder that reads nothing else (conditioning "contrast")
    steps, batch   optimizer steps, neutral chats per step
    learning_rate  of AdamW, behind five steps of warm-up
    kl             lambda, the weight of the KL to the unsteered model; 0 is the paper's
    chats          how many of the packaged neutral chats are visited
    rank           of the LoRA, on all linear layers of its blocks; alpha is twice that
    evaluate       every so many steps the loss of `held_out` other neutral chats is taken; the best state is kept, and training ends
                   after `patience` times without a better one
    certainty      training also ends where the decoder is sure enough: its held-out loss is this part of the way down from the unsteered
                   target's to that of the control itself, read as text (or of the answers, where pairs were given).  Beyond that a lower
                   loss means less behaviour: see the README.  None: no such end
    autocast       bfloat16 matrix products in the decoder's pass
    """

    method: str = "joint"
    layers: tuple[Layer, ...] | None = None
    span: str = "all"
    hidden: bool | None = None
    steps: int = 40
    batch: int = 2
    learning_rate: float = 1e-3
    kl: float = 0.02
    chats: int = 80
    rank: int = 8
    evaluate: int = 3
    held_out: int = 3
    patience: int = 3
    certainty: float | None = 1.2
    autocast: bool = True
    seed: int = 0

    @classmethod
    def of(cls, decoder, **values) -> Settings:
        """Settings for `decoder`.  Raises LqaError for one that is unknown or not possible."""
        try:
            return cls(**values).check(decoder)
        except TypeError as error:
            raise LqaError(f"Unknown setting: {error}; the settings are {', '.join(cls.__dataclass_fields__)}.") from error

    def check(self, decoder) -> Settings:
        if self.method not in METHODS:
            raise LqaError(f"The method {self.method!r} is unknown; supported are {', '.join(METHODS)}.")
        for name in ("steps", "batch", "chats", "rank", "evaluate", "held_out", "patience"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise LqaError(f"{name} must be an integer of at least 1, not {value!r}.")
        for name in ("learning_rate", "kl"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise LqaError(f"{name} must be a number of at least 0, not {getattr(self, name)!r}.")
        for name, part in (("chats", "train"), ("held_out", "held_out")):
            if getattr(self, name) > (there := len(load_neutral()[part])):
                raise LqaError(f"{name} is {getattr(self, name)}, but there are {there} such neutral chats.")
        if self.certainty is not None and not 0 < self.certainty < float("inf"):
            raise LqaError(f"certainty must be a number above 0, not {self.certainty!r}.")
        self.readings(decoder)
        return self

    def readings(self, decoder) -> list[tuple[int, ...]]:
        """The layers of every reading.  Raises LqaError for what the decoder does not read."""
        config = decoder.config
        single = [layers for layers in config.readings if not (config.merged and len(layers) > 1)]
        # Merged layers tell of what is hidden; of what is visible their block holds the middle one alone.
        default = [config.check_layers(None)] if not config.merged or self.hidden else [single[len(single) // 2]]
        return sorted(map(config.check_layers, self.layers or (single if self.method == "per-layer" else default)))

    def read_layers(self, decoder) -> list[int]:
        """All layers that are read, ascending."""
        return sorted({k for layers in self.readings(decoder) for k in layers})


@dataclass(frozen=True)
class Progress:
    """Where a training stands.  `loss` = `control` + kl weight * `kl` of this step, in nats; `held_out` the same on held-out chats, where
    it was just taken; `seconds_left` is an estimate from the steps so far."""

    step: int
    steps: int
    loss: float
    control: float
    kl: float
    held_out: float | None
    seconds: float
    seconds_left: float


class Cancelled(LqaError):
    """The training was cancelled; the model is as it was before."""


def steer(
    decoder,
    control: str | None = None,
    qa: Sequence[tuple[str, str]] | None = None,
    *,
    progress: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    **settings,
) -> Steering:
    """Trains a LoRA on the target so that the decoder, reading it, gives the wanted answers (METHOD section 1, "Control").

    control   how the target shall behave, in words: the decoder writes the pairs (lqa.steering.pairs)
    qa        or the pairs themselves
    progress  called after every step with a Progress
    cancel    asked before every step; True ends the training with Cancelled
    settings  the fields of `Settings`

    Raises LqaError for bad input, and when memory runs out.  Whatever is raised, here or in a callback, the model is as it was before.
    """
    if (control is None) == (qa is None):
        raise LqaError("Give either a control text or question-answer pairs, and not both.")
    if decoder.config.reads_text:
        raise LqaError("This decoder reads the visible text and no activations, so nothing is steered through it; name another decoder.")
    config = Settings.of(decoder, **settings)
    begun = time.perf_counter()
    try:
        pairs = check_pairs(qa) if control is None else write_pairs(decoder, control)
        for text in (text for pair in pairs for text in pair):
            check_text(decoder.base.tokenizer, text, "A question or answer")
        training = Training(decoder, pairs, config, control)
    except (MemoryError, RuntimeError) as error:
        raise _short_of_memory(error) from error
    history = training.train(progress, cancel)
    record = {
        "control": control,
        "qa": [list(pair) for pair in pairs],
        "decoder": Path(decoder.name).name if Path(decoder.name).is_dir() else decoder.name,  # no path of this machine
        "settings": asdict(config) | {"layers": list(map(layer_name, training.readings)), "hidden": training.loss.hidden},
        "steps": history[-1].step,
        "seconds": time.perf_counter() - begun,
        "loss": training.best,
        "enough": training.enough if training.enough > float("-inf") else None,
        "history": [asdict(p) for p in history],
        "code": code_version(),
    }
    return Steering(decoder, training.name, record)


def _short_of_memory(error: BaseException) -> BaseException:
    """What to raise for `error`: a sentence if memory ran out, else itself."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return LqaError("Memory ran out while training; the model is as it was. Use fewer or shorter pairs, or free memory.")
    return error


class Loop:
    """The loop of a LoRA's training on the target; a kind of training says in `backward` and `evaluate` what is learnt.

    `name` of the adapter on the `base`; `chats` that are visited and `held_out` ones; held-out loss of the `best` state so far, and the
    held-out loss that is `enough`.
    """

    best, enough = float("inf"), float("-inf")

    def backward(self, chat, weight: float) -> tuple[float, float]:
        """Adds the gradient of `weight` times the loss of one of `chats`; returns the loss and, where there is one, the KL, in nats."""
        raise NotImplementedError

    def evaluate(self) -> tuple[float, float]:
        """The mean of both over the held-out chats, in nats."""
        raise NotImplementedError

    def train(self, progress=None, cancel=None) -> list[Progress]:
        """`run`, the result rounded to what is saved.  Whatever is raised, the adapter is gone then."""
        try:
            history = self.run(progress, cancel)
            self.round()
        except BaseException as error:
            self.base.remove_adapter(self.name)
            if isinstance(error, MemoryError | RuntimeError):
                raise _short_of_memory(error) from error
            raise
        return history

    def run(self, progress=None, cancel=None) -> list[Progress]:
        """Trains to the end, or to where held-out chats stop improving, and leaves the best state in the adapter."""
        settings, history, since = self.settings, [], 0
        order = random.Random(settings.seed)
        queue: list = []
        begun = time.perf_counter()
        with self.base.training(self.name) as parameters:
            optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
            best = None
            for step in range(1, settings.steps + 1):
                if cancel is not None and cancel():
                    raise Cancelled("Steering was cancelled; the model is as it was.")
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * min(1.0, step / 5)
                optimizer.zero_grad()
                control = kl = 0.0
                for _ in range(settings.batch):
                    if not queue:
                        queue = order.sample(self.chats, len(self.chats))
                    with self.base.lock:  # through backward: where another thread loads an adapter, PEFT changes who takes gradients
                        parts = self.backward(queue.pop(), 1 / settings.batch)
                    control, kl = control + parts[0] / settings.batch, kl + parts[1] / settings.batch
                torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                held_out = None
                if step % settings.evaluate == 0 or step == settings.steps:
                    of_control, of_kl = self.evaluate()
                    held_out = of_control + settings.kl * of_kl
                    since += 1
                    if held_out < self.best or of_control <= self.enough:
                        self.best, since = held_out, 0
                        best = {key: p.detach().clone() for key, p in parameters.items()}
                    if of_control <= self.enough:
                        since = settings.patience
                seconds = time.perf_counter() - begun
                left = seconds / step * (settings.steps - step)
                history.append(Progress(step, settings.steps, control + settings.kl * kl, control, kl, held_out, seconds, left))
                if progress is not None:
                    progress(history[-1])
                if since >= settings.patience:
                    break
            with torch.no_grad():
                for key, p in parameters.items():
                    p.copy_(best[key])
        return history

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the weights to what is saved, so that a steering is the same before and after."""
        for p in self.base.adapter_parameters(self.name).values():
            p.copy_(p.half())


class Training(Loop):
    """The training of a steering; `readings` are the layers of each, `layers` all of them."""

    def __init__(self, decoder, qa: Sequence[tuple[str, str]], settings: Settings, control: str | None = None):
        self.decoder, self.base, self.settings = decoder, decoder.base, settings
        self.readings, self.layers = settings.readings(decoder), settings.read_layers(decoder)
        hidden = decoder.config.conditioning == "contrast" if settings.hidden is None else settings.hidden
        self.loss = ControlLoss(decoder, qa, hidden, settings.autocast)
        neutral, draw = load_neutral(), random.Random(settings.seed)
        self.chats = [Neutral.of(self.base, request, settings.span) for request in draw.sample(neutral["train"], settings.chats)]
        self.held_out = [Neutral.of(self.base, request, settings.span) for request in neutral["held_out"][: settings.held_out]]
        if settings.certainty is not None:
            self.enough = self._enough(control or " ".join(answer for _, answer in qa))
        self.name = new_lora(self.base, max(self.layers), settings)
        self.groups = self._groups(self.base.adapter_parameters(self.name))

    def backward(self, chat: Neutral, weight: float) -> tuple[float, float]:
        """Adds the gradient of `weight` times the loss of one chat; returns its control loss and KL in nats.

        The decoder's gradient is taken down to the activations, then from there into the LoRA: each read layer's into all blocks below
        it (joint), or into the blocks after the read layer before it (per-layer).
        """
        settings = self.settings
        chat.reference(self.base, self.layers, settings.kl > 0)
        h, logprobs = chat.run(self.base, self.layers, settings.kl > 0, self.name)
        control, share = 0.0, weight / len(self.readings)
        leaves = {k: acts.detach().requires_grad_() for k, acts in h.items()}
        gradients = {k: torch.zeros_like(acts) for k, acts in leaves.items()}
        for layers in self.readings:
            loss = self.loss.of_reading(leaves, chat, layers)
            for k, gradient in zip(layers, torch.autograd.grad(loss * share, [leaves[k] for k in layers]), strict=True):
                gradients[k] += gradient
            control += loss.item() / len(self.readings)
        kl = divergence(chat, logprobs) if settings.kl > 0 else None
        if settings.method == "joint":
            ends = [*h.values(), *([kl] if kl is not None else [])]
            starts = [*gradients.values(), *([torch.tensor(weight * settings.kl, device=kl.device)] if kl is not None else [])]
            torch.autograd.backward(ends, starts)
        else:
            for k in self.layers:
                torch.autograd.backward(h[k], gradients[k], retain_graph=True, inputs=self.groups[k])
            if kl is not None:
                (kl * weight * settings.kl).backward()
        return control, kl.item() if kl is not None else 0.0

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Control loss and KL on the held-out chats, in nats."""
        control = kl = 0.0
        for chat in self.held_out:
            chat.reference(self.base, self.layers, self.settings.kl > 0)
            h, logprobs = chat.run(self.base, self.layers, self.settings.kl > 0, self.name)
            control += sum(self.loss.of_reading(h, chat, layers).item() for layers in self.readings) / len(self.readings)
            kl += divergence(chat, logprobs).item() if self.settings.kl > 0 else 0.0
        return control / len(self.held_out), kl / len(self.held_out)

    @torch.no_grad()
    def _enough(self, text: str) -> float:
        """The held-out control loss at which training ends; minus infinity if reading `text` makes the decoder no surer."""
        start = loss = 0.0
        if self.decoder.config.conditioning == "contrast":  # it does not read text
            return float("-inf")
        for layers in self.readings:
            reading = self.decoder._read([{"role": "user", "content": text}], "all", layers)
            loss += self.loss(reading.activations, layers).item() / len(self.readings)
            for chat in self.held_out:
                chat.reference(self.base, self.layers, self.settings.kl > 0)
                start += self.loss.of_reading(chat.h0, chat, layers).item() / len(self.readings) / len(self.held_out)
        return start - self.settings.certainty * (start - loss) if loss < start else float("-inf")

    def _groups(self, parameters: dict[str, Tensor]) -> dict[int, list[Tensor]]:
        """{read layer: the adapter's parameters of the blocks after the read layer before it}."""
        trained = {id(p) for p in parameters.values()}
        groups, first = {}, 0
        for k in self.layers:
            groups[k] = [p for block in self.base.blocks[first : k + 1] for p in block.parameters() if id(p) in trained]
            first = k + 1
        return groups


def new_lora(base, deepest: int, settings: Settings) -> str:
    """A fresh LoRA on the blocks 0 to `deepest`, drawn with the settings' seed; the name of the adapter."""
    name = base.new_adapter(lora_config(base, deepest, settings.rank))
    generator = torch.Generator().manual_seed(settings.seed)  # PEFT draws from torch's, which other threads use too
    with torch.no_grad():
        for key, p in base.adapter_parameters(name).items():
            if "lora_A" in key:
                p.copy_(torch.nn.init.kaiming_uniform_(torch.empty(p.shape), a=5**0.5, generator=generator))
    return name


def lora_config(base, deepest: int, rank: int):
    """A LoRA on all linear layers of the blocks 0 to `deepest`."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = set()
    for block in base.blocks[: deepest + 1]:
        for name, module in block.named_modules():
            linear = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if isinstance(linear, torch.nn.Linear) and not name.endswith("base_layer") and "lora_" not in name:
                names.add(name.rsplit(".", 1)[-1])
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted(names),
        layers_to_transform=list(range(deepest + 1)),
        task_type="CAUSAL_LM",
    )
