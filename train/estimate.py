"""What a training would take on a card, before there is one:  python -m train.estimate --config train/configs/NAME.yaml [key=value ...]

Estimates, no measurements.  The base is never loaded: its parameters are counted on no device, from the recipe's `sizes` (or the
config.json of its `base`), and its tokens are counted with the embedded model's tokenizer, over examples of the recipe.

    work of a reading     2 P [t (k + 1) / L + d (2 + c)] + 4 V D a      FLOP, a multiplication and an addition each
        P  parameters of the blocks that a token meets (of experts, those chosen);  L  blocks;  k  the default read layer, or the deepest
        t  tokens that the target reads, the reference's included;  d  tokens of the decoder's row;  a  tokens of answers
        c  1 with gradient checkpointing, else 0: forward, again, and backward (frozen weights take no gradient)
        V, D  vocabulary and width, of the head.  Attention scores and the adapter are left out: short rows, small ranks.
    hours                 readings * work / (speed * cards)
    memory of a card      weights 2 n  +  adapter 16 m  +  activations  +  logits 10 V a b, and a tenth more for what is fragmented
        n  all parameters, in 16 bit;  m  those of the adapter, in 32 bit with gradient and two moments;  b  readings of a card's batch
        activations  2 b d (L D + W), the inputs of all blocks and the inside of one (W = 16 D + 6 F; without checkpointing L W)

`--speed` in TFLOP/s a card; by default SHARE of an H100's dense bf16 peak, an assumption.  `--bench FILE` takes it from what
`python -m lqa bench train --json` printed on the card: a small model's speed, that a larger one exceeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lqa.activations import layer_list
from lqa.errors import LqaError
from train.decoder import TrainConfig, load_config, make_sidecar, parse_config

PEAK, SHARE = 989e12, 0.3  # FLOP/s: NVIDIA's data sheet of the H100 SXM, dense bf16; what trainings of this size usually reach of it
EXAMPLES = 200  # over which tokens are counted
RECIPE = Path(__file__).parent / "configs" / "smollm2-135m-instruct.yaml"  # what `bench train` runs


@dataclass(frozen=True)
class Sizes:
    """Of a base: all parameters, those of its blocks that a token meets, those of the adapter; blocks, width, inner width, vocabulary."""

    parameters: int
    active: int
    adapter: int
    layers: int
    width: int
    inner: int
    vocabulary: int


@dataclass(frozen=True)
class Estimate:
    """`work` in FLOP a reading, `speed` in FLOP/s a card, `memory` in bytes a card by what takes it; `tokens` (t, d, a) a reading."""

    sizes: Sizes
    tokens: tuple[float, float, float]
    readings: int
    work: float
    speed: float
    cards: int
    memory: dict[str, float]

    @property
    def hours(self) -> float:
        return self.readings * self.work / (self.speed * self.cards) / 3600

    def __str__(self) -> str:
        s, (t, d, a) = self.sizes, self.tokens
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.memory.items())
        return (
            f"base: {s.parameters / 1e9:.2f} B parameters, {s.active / 1e9:.2f} B in its blocks for a token; "
            f"adapter {s.adapter / 1e6:.0f} M\n"
            f"a reading: {t:.0f} target tokens, {d:.0f} decoder tokens, {a:.0f} of them answers: {self.work / 1e12:.2g} TFLOP\n"
            f"estimate: {self.hours:.1f} h for {self.readings:,} readings on {self.cards} card(s) of {self.speed / 1e12:.3g} TFLOP/s, "
            f"{sum(self.memory.values()) / 1e9:.0f} GB a card ({parts})"
        )


def sizes_of(config: TrainConfig, lora) -> Sizes:
    """Counted on a model of the config's `sizes`, on no device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lqa.models import find_blocks

    about = dict(config.sizes)
    try:
        if about:
            architecture = AutoConfig.for_model(about.pop("model_type"), **about)
        else:
            architecture = AutoConfig.from_pretrained(config.base, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture)
    except (KeyError, OSError, ValueError, TypeError) as error:
        raise LqaError(f"The sizes of {config.base} cannot be had ({error}); give them as `sizes`, as in its config.json.") from error
    text, blocks = architecture.get_text_config(), find_blocks(model)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    chosen = (getattr(text, "num_experts_per_tok", None) or 1) / experts if experts > 1 else 1
    active = sum(p.numel() * (chosen if ".experts." in f".{name}." else 1) for name, p in blocks.named_parameters())
    only, adapter = lora.layers_to_transform, 0
    for k, block in enumerate(blocks):
        if only is not None and k not in ([only] if isinstance(only, int) else only):
            continue
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and ("all-linear" in lora.target_modules or name.split(".")[-1] in lora.target_modules):
                adapter += lora.r * (module.in_features + module.out_features)
    inner = text.intermediate_size * (text.num_experts_per_tok if experts > 1 else 1)
    total = sum(p.numel() for p in model.parameters())
    return Sizes(total, round(active), adapter, len(blocks), text.hidden_size, inner, text.vocab_size)


def tokens_of(config: TrainConfig, base) -> tuple[float, float, float]:
    """Tokens of a reading on average: target passes, decoder row, answers; counted with the tokenizer of `base`."""
    from lqa import corpus
    from train.collator import IGNORE, LatentQACollator
    from train.data import build_examples

    layers = list(range(config.layers_per_reading))  # whatever is counted, there are these blocks
    config = replace(config, base=None, read_layers=layers, default_layer=layers, write_layer=0, merged=False)
    parts = parse_config(config)
    collator = LatentQACollator(base.tokenizer, make_sidecar(config, parts, base), base.context)
    controls = corpus.share_of(corpus.load_controls("train"), parts.mixture.controls)
    mixture = replace(parts.mixture, sources={"latentqa": 1.0})  # the others are of about the same length, and counted in a target's tokens
    sums = [0, 0, 0]
    for example in build_examples(controls, EXAMPLES, mixture, [layers], layers, parts.args.seed, base.name, base.tokenizer):
        row, passes = collator.row(example)
        found = (sum(len(ids) for ids, *_ in passes), len(row["input_ids"]), sum(label != IGNORE for label in row["labels"]))
        sums = [x + y for x, y in zip(sums, found, strict=True)]
    return tuple(x / EXAMPLES for x in sums)


def work_of(config: TrainConfig, sizes: Sizes, tokens: tuple[float, float, float], checkpointing: bool) -> float:
    """FLOP a reading."""
    t, d, a = tokens
    blocks = t * (max(layer_list(config.default_layer)) + 1) / sizes.layers + d * (2 + checkpointing)
    return 2 * sizes.active * blocks + 4 * sizes.vocabulary * sizes.width * a


def measured_speed(bench: str | Path, base) -> float:
    """FLOP/s of the schedule `packed` in a file that `python -m lqa bench train --json` wrote."""
    try:
        examples = json.loads(Path(bench).read_text(encoding="utf-8"))["packed"]["examples_per_second"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LqaError(f"{bench} is nothing that `python -m lqa bench train --json` printed ({error!r}).") from error
    config = load_config(RECIPE, [])
    parts = parse_config(config)
    about = base.model.config.to_dict()
    sizes = sizes_of(replace(config, sizes=about), parts.lora)
    work = work_of(config, sizes, tokens_of(config, base), parts.args.gradient_checkpointing)
    return examples / parts.mixture.qa_per_reading * work


def estimate(config: TrainConfig, base, *, speed: float = PEAK * SHARE, cards: int = 1) -> Estimate:
    """What `config` takes; `base` (lqa.models.Base) is the one whose tokenizer counts, whatever base the config names."""
    parts = parse_config(config)
    args = parts.args
    sizes, tokens = sizes_of(config, parts.lora), tokens_of(config, base)
    _, d, a = tokens
    b = args.per_device_train_batch_size
    inside = 16 * sizes.width + 6 * sizes.inner
    inside = sizes.layers * sizes.width + inside if args.gradient_checkpointing else sizes.layers * inside
    memory = {
        "weights": 2 * sizes.parameters,
        "adapter": 16 * sizes.adapter,
        "activations": 2 * b * d * inside,
        "logits": 10 * sizes.vocabulary * a * b,
    }
    memory["fragments"] = 0.1 * sum(memory.values())
    readings = config.examples or args.max_steps * b * args.gradient_accumulation_steps * cards
    return Estimate(sizes, tokens, readings, work_of(config, sizes, tokens, args.gradient_checkpointing), speed, cards, memory)


def main(argv: list[str] | None = None) -> int:
    from lqa.models import load_base

    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m train.estimate", description=__doc__, formatter_class=plain)
    parser.add_argument("--config", required=True, help="a YAML file, see train/configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config to change")
    parser.add_argument("--cards", type=int, default=1, metavar="N", help="cards, each with the whole model (default: 1)")
    parser.add_argument("--speed", type=float, metavar="TFLOPS", help=f"TFLOP/s a card (default: {PEAK * SHARE / 1e12:.0f}, assumed)")
    parser.add_argument("--bench", metavar="FILE.json", help="instead: what `python -m lqa bench train --json` printed there")
    options = parser.parse_args(argv)
    try:
        if options.cards < 1 or (options.speed is not None and options.speed <= 0):
            raise LqaError("--cards and --speed must be above 0.")
        if options.speed is not None and options.bench is not None:
            raise LqaError("Give either --speed or --bench.")
        base = load_base(None)
        speed = measured_speed(options.bench, base) if options.bench else (options.speed * 1e12 if options.speed else PEAK * SHARE)
        print(estimate(load_config(options.config, options.overrides), base, speed=speed, cards=options.cards))
    except LqaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
