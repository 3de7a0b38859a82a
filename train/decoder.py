"""Train a decoder:  python -m train.decoder --config train/configs/NAME.yaml [key=value ...]

Any field of the config can be overridden, nested ones with dots: `default_layer=15 training_args.max_steps=100 lora.r=8`.
`training_args` are TRL's SFTConfig, so everything a TRL user knows is there.  Started again with the same output folder, a run goes
on from its last checkpoint (`resume=false` starts over).  Prints one JSON document with the result; logs go to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from lqa.errors import LqaError
from train.data import DRAWN, MixtureConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import SFTConfig

    from lqa.config import DecoderConfig
    from lqa.models import Base
    from train.projection import ProjectionConfig


SPAN = re.compile(rf"all|turn:-?\d+|from:-?\d+|last:\d+|last|{'|'.join(DRAWN)}")  # of a mixture


@dataclass
class TrainConfig:
    """A training run.  Unknown keys are errors; `training_args` goes to trl.SFTConfig, `lora` to peft.LoraConfig."""

    base: str | None = None  # None: the embedded model; else a folder or Hub id
    read_layers: list[int] = field(default_factory=list)  # 0-based blocks whose output is read
    layers_per_reading: int = 1  # several: a block of slots for each, so as many times the span's tokens in the decoder's row
    merged: bool = False  # also all read layers at once in one block of slots, through one map of what changed at all of them
    default_layer: int | list[int] = 0  # where most examples are read, and answers by default; a list where several are read at once
    write_layer: int = 0  # block whose output is patched; -1 = the embeddings
    injection: str = "replace"
    injection_constant: float | None = None
    conditioning: str = "raw"  # what is done to activations first: raw, centred, contrast, amplified, projected (lqa.conditioning)
    conditioning_constant: float | None = None
    projection: dict = field(default_factory=dict)  # train.projection.ProjectionConfig; for "projected" and "centred"
    visible_text: bool = False  # the reference text_only_trained: the visible turns as text in place of the slots, nothing injected
    slot_token: str = " ?"  # its first token marks the slots
    mixture: dict = field(default_factory=dict)  # train.data.MixtureConfig
    lora: dict = field(default_factory=dict)
    warm_start: str | None = None  # a decoder folder whose adapter is trained on
    cache: str | None = None  # folder for activations that later epochs reuse; None reads live
    examples: int | None = None  # readings in an epoch; None: as many as max_steps consumes
    validation_readings: int = 48
    resume: bool = True
    training_args: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)  # the base's, as in its config.json, for train.estimate; training does not look at them


class Parts(NamedTuple):
    """A config's sections as the objects that they describe."""

    args: SFTConfig
    mixture: MixtureConfig
    projection: ProjectionConfig
    lora: LoraConfig


def load_config(path: str | Path, overrides: list[str]) -> TrainConfig:
    """The YAML file at `path` with `key=value` overrides (values in YAML).  Raises LqaError naming what is wrong."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise LqaError(f"The config {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise LqaError(f"The config {path} must be a mapping of names to values.")
    known = {f.name for f in fields(TrainConfig)}
    for override in overrides:
        key, found, value = override.partition("=")
        *parents, last = key.split(".")
        if not found or not all([*parents, last]):
            raise LqaError(f"The override {override!r} is not of the form key=value.")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise LqaError(f"The override {override!r}: {parent!r} holds a value, not a section.")
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise LqaError(f"The override {override!r} is not YAML: {str(error).splitlines()[0]}") from error
        place[last] = float(value) if isinstance(value, str) and _is_number(value) else value
    if unknown := sorted(set(data) - known):
        raise LqaError(f"{path}: unknown key(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
    return TrainConfig(**data)


def _is_number(text: str) -> bool:  # YAML 1.1 reads 1e-4 as text
    try:
        float(text)
    except ValueError:
        return False
    return True


def _earlier(folder: str | None) -> dict | None:
    """The training that a warm start builds on, for the sidecar."""
    from lqa.config import DecoderConfig

    return DecoderConfig.load(folder).training if folder else None


def _effective(config: TrainConfig) -> TrainConfig:
    """`config` without what a decoder that reads text has no use for."""
    from lqa.config import VISIBLE_TEXT

    if not config.visible_text:
        return config
    unused = {"injection": VISIBLE_TEXT, "injection_constant": None, "conditioning": "raw", "conditioning_constant": None, "projection": {}}
    if config.merged:  # nothing is read: any one layer stands for those that would be
        layers = sorted(config.read_layers)
        unused |= {"merged": False, "default_layer": layers[len(layers) // 2]}
    return replace(config, **unused)


def parse_config(config: TrainConfig) -> Parts:
    """The sections of `config`.  Raises LqaError for what is wrong with them, as far as it can be told without the base."""
    import peft
    import torch
    from trl import SFTConfig

    from lqa import corpus
    from lqa.corpus.readings import FORMS
    from train.data import SOURCES
    from train.projection import ProjectionConfig

    config = _effective(config)
    cuda = torch.cuda.is_available()
    defaults = {"bf16": cuda, "use_cpu": not cuda, "gradient_checkpointing": False, "disable_tqdm": None}
    try:
        # YAML reads a bare `no` as false, which is what the strategies call "no".
        given = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in config.training_args.items()}
        args = SFTConfig(**defaults | given)
        mixture = MixtureConfig(**config.mixture)
        messages = len(corpus.load_messages("train"))
        projection = ProjectionConfig(**config.projection).check(config.conditioning, messages)
        lora = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear"} | config.lora)
        [int(k) for k in config.read_layers]
        corpus.share_of(corpus.load_controls("train"), mixture.controls)
        if unknown := set(mixture.forms) - set(FORMS):
            raise ValueError(f"mixture.forms has {sorted(unknown)[0]!r}; the forms are {', '.join(FORMS)}")
        if unknown := set(mixture.sources) - set(SOURCES):
            raise ValueError(f"mixture.sources has {sorted(unknown)[0]!r}; the sources are {', '.join(SOURCES)}")
        if unknown := [name for name in mixture.spans if not SPAN.fullmatch(name)]:
            raise ValueError(f"mixture.spans has {unknown[0]!r}; the spans are all, turn:T, from:T, last:N, last, {', '.join(DRAWN)}")
        if not config.slot_token:
            raise ValueError("slot_token is empty")
    except (TypeError, ValueError, AttributeError) as error:
        raise LqaError(f"The training config is wrong: {error}") from error
    if not (config.examples or args.max_steps) > 0:
        raise LqaError("Set training_args.max_steps or examples, so that the number of training examples is known.")
    return Parts(args, mixture, projection, lora)


def make_sidecar(config: TrainConfig, parts: Parts, base: Base) -> DecoderConfig:
    """The sidecar of a run as it starts.  Raises LqaError for what does not go together, or not with `base`."""
    from lqa import corpus
    from lqa.conditioning import MAPPED
    from lqa.config import DecoderConfig, default_prompt
    from lqa.provenance import code_version

    config, layers = _effective(config), [int(k) for k in config.read_layers]
    if outside := [k for k in layers if not 0 <= k < len(base.blocks)]:
        raise LqaError(f"read_layers names layer {outside[0]}; {base.name} has the blocks 0 to {len(base.blocks) - 1}.")
    sidecar = DecoderConfig(
        base={"name": base.name, "weights": base.weights, "fingerprint": base.fingerprint()},
        read_layers=layers,
        layers_per_reading=config.layers_per_reading,
        merged=config.merged,
        default_layer=config.default_layer,
        write_layer=config.write_layer,
        injection=config.injection,
        injection_constant=config.injection_constant,
        conditioning=config.conditioning,
        conditioning_constant=config.conditioning_constant,
        slot_token_id=base.tokenizer(config.slot_token, add_special_tokens=False)["input_ids"][0],
        prompt=default_prompt(base.tokenizer),
        positions="sequential",
        answer_role="assistant",
        lora={k: config.lora[k] for k in sorted(config.lora)},
        corpus={"name": "lqa authored controls", "revision": corpus.revision(), "mixture": vars(parts.mixture)},
        training={"code": code_version(), "warm_start": _earlier(config.warm_start)}
        | ({"projection": vars(parts.projection)} if config.conditioning in MAPPED else {}),
    )
    sidecar.check().check_base(base)
    return sidecar


def build_trainer(config: TrainConfig, callbacks=(), projection=None):
    """The trainer for `config`, with data and adapter in place.

    projection  the maps of the conditioning; None takes those of the run that is resumed, else of the warm start, else makes them
    """
    import peft

    from lqa import corpus
    from lqa.conditioning import MAPPED
    from lqa.models import load_base
    from train.collator import ActivationCache, LatentQACollator
    from train.data import build_examples, build_validation
    from train.trainer import LatentQATrainer

    parts = parse_config(config)
    args, mixture, fitting, lora = parts
    base = load_base(config.base)
    sidecar = make_sidecar(config, parts, base)
    train, validation = corpus.share_of(corpus.load_controls("train"), mixture.controls), corpus.load_controls("validation")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    n = config.examples or args.max_steps * batch
    default = sidecar.check_layers(None)
    data = build_examples(train, n, mixture, sidecar.readings, default, args.seed, base.name, base.tokenizer)
    evaluation = None
    if args.eval_strategy != "no":
        evaluation = build_validation(validation, config.validation_readings, mixture, default, args.seed)
    if sidecar.conditioning in MAPPED and projection is None:
        projection = _projection(base, sidecar, train, data, fitting, args, config)
    source = base.fingerprint() | {"precision": "bf16" if args.bf16 else str(base.dtype)}
    source |= {"projection": projection.digest(), "folds": fitting.folds} if projection else {}
    cache = ActivationCache(config.cache, source) if config.cache else None
    collator = LatentQACollator(base.tokenizer, sidecar, base.context, cache)
    # PEFT writes the base's id into the adapter and its card: never a path of this machine.
    base.model.config._name_or_path = lora.base_model_name_or_path = base.name
    model = None
    if config.warm_start:
        model, lora = peft.PeftModel.from_pretrained(base.model, config.warm_start, is_trainable=True, torch_device="cpu"), None
    return LatentQATrainer(
        base,
        sidecar,
        collator,
        args,
        model,
        projection,
        fitting.train,
        train_dataset=data,
        eval_dataset=evaluation,
        peft_config=lora,
        callbacks=list(callbacks),
    )


def _projection(base, sidecar, controls, data, fitting, args, config: TrainConfig):
    """The maps for a run: those of the checkpoint that it goes on from, of the warm start, or made now; cross-fitted ones of a warm start
    are not kept with it, and all are made again."""
    import torch
    from transformers.trainer_utils import get_last_checkpoint

    from lqa.conditioning import PROJECTION, Projection
    from train.projection import CrossFitted, assign_folds, fit_centre, fit_projection, identity

    # A resumed run goes on with the maps of its checkpoint; without a checkpoint nothing has been trained on any.
    last = get_last_checkpoint(args.output_dir) if config.resume and Path(args.output_dir).is_dir() else None
    folds = CrossFitted.load_folds(args.output_dir, sidecar, base.hidden_size, fitting.folds) if last else None
    for folder in (last, config.warm_start):
        if folder and Path(folder, PROJECTION).is_file() and bool(fitting.folds) == bool(folds):
            kept = Projection.load(folder, sidecar.maps, base.hidden_size, sidecar.conditioning)
            return CrossFitted(kept, folds, assign_folds(controls, fitting.folds)) if folds else kept
    if sidecar.conditioning == "projected" and fitting.start == "identity":
        return identity(sidecar.maps, base.hidden_size)
    centred = sidecar.conditioning == "centred"
    print(f"Fitting the projection on {f'{fitting.readings} readings' if centred else f'{len(controls)} controls'}.", file=sys.stderr)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=args.bf16):
        if centred:
            return fit_centre(base, sidecar, data.select(range(min(fitting.readings, len(data)))))
        made = fit_projection(base, sidecar, controls, fitting, args.seed, config.mixture.get("shuffled_activations", False))
    if isinstance(made, CrossFitted):
        made.save_folds(args.output_dir)
    return made


def main(argv: list[str] | None = None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m train.decoder", description=__doc__, formatter_class=plain)
    parser.add_argument("--config", required=True, help="a YAML file, see train/configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config to change")
    options = parser.parse_args(argv)
    try:
        config = load_config(options.config, options.overrides)
        trainer = build_trainer(config)
        from transformers.trainer_utils import get_last_checkpoint

        out = Path(trainer.args.output_dir)
        last = get_last_checkpoint(str(out)) if config.resume and out.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model()
        trainer.save_state()
    except LqaError as error:
        print(error, file=sys.stderr)
        return 2
    if trainer.accelerator.is_main_process:
        print(json.dumps({"out": str(out), **trainer.current_config().training}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
