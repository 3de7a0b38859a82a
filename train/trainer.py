"""LatentQATrainer: TRL's SFTTrainer whose decoder reads activations of the same weights.

What it adds to SFTTrainer: the target pass (adapter off, stopped at the deepest read layer), the injection into the decoder's pass,
and a loss with logits at answer positions only.  Everything else (schedules, resuming, accumulation, distribution, reporting) is TRL's.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress
from trl import SFTConfig, SFTTrainer

from lqa.activations import capture, gather_spans
from lqa.cards import CARDS
from lqa.conditioning import PROJECTION, Projection, condition
from lqa.config import IGNORE, SIDECAR, DecoderConfig
from lqa.errors import LqaError
from lqa.injection import Injection
from lqa.masks import block_mask
from lqa.models import Base
from train.collator import LatentQACollator
from train.projection import CrossFitted

# What a decoder on the Hub consists of; checkpoints also hold optimizer states, which are pickles.
PUBLISHED = ("adapter_model.safetensors", "adapter_config.json", SIDECAR, PROJECTION, "README.md")


class LatentQATrainer(SFTTrainer):
    """Trains a decoder LoRA on examples of `train.data`.

    base       lqa.models.Base; its weights are target and decoder, and stay frozen
    config     the sidecar; written with every checkpoint, with the training's figures filled in
    collator   LatentQACollator; its cache decides where activations come from
    model      a PeftModel around the base's weights, to train an adapter on; None with `peft_config` for a new one
    projection the maps of the conditioning (train.projection), if it has any; saved with every checkpoint
    train_projection   whether the maps are trained too, with the adapter's learning rate
    args       SFTConfig; the few fields that injection needs otherwise (no column removal, no preparation, no truncation) are set here
    """

    def __init__(
        self,
        base: Base,
        config: DecoderConfig,
        collator: LatentQACollator,
        args: SFTConfig,
        model=None,
        projection: Projection | None = None,
        train_projection: bool = False,
        **kwargs,
    ):
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise LqaError(f"hub_strategy {args.hub_strategy.value!r} would publish optimizer states, which are pickles; use every_save.")
        if not (CARDS / "decoder.md").is_file():  # found out now, not when the first checkpoint is due
            raise LqaError(f"The card templates are not at {CARDS}; train from a clone of lqa's repository.")
        self.base, self.decoder_config, self.projection = base, config, projection
        args.remove_unused_columns = False
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.max_length = None
        args.router_aux_loss_coef = 0.0  # routers are not trained, and their loss cannot read the block mask
        base.model.config.use_cache = False
        super().__init__(model=model or base.model, args=args, data_collator=collator, processing_class=base.tokenizer, **kwargs)
        base.find_adapters()
        for adapter in self.model.peft_config.values():  # PEFT has written the folder that the base was loaded from
            adapter.base_model_name_or_path = base.name
        if train_projection:
            if collator.cache is not None:
                raise LqaError("What a trained projection gives changes with every step; leave out the cache, or projection.train.")
            # A part of the model for optimizer, gradient clipping and distribution; PEFT saves the adapter's parameters alone.
            self.model.projection = projection.trainable(self.args.device)
        self._injection = nullcontext() if config.reads_text else Injection(base, config.write_layer, config.operation)
        rows = self.train_dataset["qa"] if self.train_dataset is not None else ()
        self._pairs = sum(1 + len(pair.get("after") or ()) for qa in rows for pair in qa)

    # --- one step -----------------------------------------------------------------------------------------------

    @contextmanager
    def _step(self):
        """The hooks of one step; they live through backward, because gradient checkpointing may run blocks again."""
        head = self.base.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(self._answer_positions)
        try:
            with self._injection:
                yield
        finally:
            handle.remove()
            self._labels = None

    def _answer_positions(self, head, args):
        # (B, S, D) -> (n, D): the head is by far the widest matrix, and only answers are scored.
        return (args[0][:, :-1][self._labels[:, 1:] != IGNORE], *args[1:])

    def training_step(self, *args, **kwargs):
        with self._step():
            return super().training_step(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with self._step(), torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def read(self, inputs: dict) -> torch.Tensor | None:
        """What is injected in a batch, (N, D): from the disk if the collator found them, else by a target pass."""
        if "activations" in inputs or "read_ids" not in inputs:
            return inputs.get("activations")
        # References apart: they are short, and would be padded to the readings' length.
        n = len(inputs["read_references"])
        rows = [row for part in (slice(0, n), slice(n, None)) for row in self._read(inputs, part)]
        config = self.decoder_config
        how = (config.conditioning, config.conditioning_constant)
        crossed = isinstance(self.projection, CrossFitted)
        rows = [
            condition(
                rows[i],
                other and rows[other[0]],
                other and other[1],
                config.blocks(inputs["read_layers"][i]),
                *how,
                self.projection.without(inputs["read_names"][i]) if crossed else self.projection,
                other and other[2],
            )
            for i, other in enumerate(inputs["read_references"])
        ]
        if "cache_paths" in inputs:
            for path, stored in zip(inputs["cache_paths"], rows, strict=True):
                self.data_collator.cache.save(path, stored)
        return torch.cat(rows)

    def _read(self, inputs: dict, part: slice) -> tuple[torch.Tensor, ...]:
        """The activations of a part of the target's rows, each (layers * len(span), D)."""
        spans, layers = inputs["read_spans"][part], inputs["read_layers"][part]
        if not spans:
            return ()
        longest = inputs["read_mask"][part].sum(1).max()
        ids, mask = inputs["read_ids"][part, :longest], inputs["read_mask"][part, :longest]
        training = self.base.model.training
        self.base.model.eval()  # dropout or checkpointing in the target would read another model
        try:
            # In the precision of the decoder's pass, which the accelerator sees to only there.
            with torch.no_grad(), self.base.using(), torch.autocast(self.base.device.type, torch.bfloat16, enabled=self.args.bf16):
                acts = capture(self.base.model, self.base.blocks, ids, mask, {k for own in layers for k in own})
        finally:
            self.base.model.train(training)
        return gather_spans(acts, spans, layers).split([len(span) * len(own) for span, own in zip(spans, layers, strict=True)])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy in nats over answer tokens and their end, averaged as TRL does (over the whole accumulated batch)."""
        self._labels = inputs["labels"]
        activations = self.read(inputs)
        arm = self._injection.arm if activations is not None else lambda *_: None
        arm(inputs["slots"], activations)
        logits = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            attention_mask=block_mask(self.base.model.config, inputs["branch"], inputs["position_ids"], self.base.dtype),
            use_cache=False,
        ).logits
        if activations is not None:
            self._injection.check_fired()
        targets = inputs["labels"][:, 1:]
        targets = targets[targets != IGNORE]
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        loss = loss / (targets.numel() if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append((logits.argmax(-1) == targets).float().mean().item())
        return (loss, {"logits": logits}) if return_outputs else loss

    # --- what is saved and published ------------------------------------------------------------------------------

    def current_config(self) -> DecoderConfig:
        """The sidecar with the figures of the training so far."""
        state, args = self.state, self.args
        rows = state.global_step * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        pairs = self._pairs / len(self.train_dataset) if self.train_dataset is not None else 0
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        training = self.decoder_config.training | {
            "steps": state.global_step,
            "readings": rows,
            "qa_pairs": round(rows * pairs),  # on average: the order is the sampler's
            "learning_rate": args.learning_rate,
            "seed": args.seed,
            "last_loss": losses[-1] if losses else None,
        }
        return replace(self.decoder_config, training=training, projection=self.projection and self.projection.digest())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter in safetensors with projection, sidecar and our card; no pickle."""
        super().save_model(output_dir, _internal_call=True)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)
            if self.projection is not None:
                self.projection.save(folder)
            self.create_model_card(folder=folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def push_to_hub(self, commit_message: str = "End of training", blocking: bool = True, token=None, revision=None, **_):
        """Uploads adapter, sidecar and card as one commit, and nothing else of the output folder."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            return self._upload(self.args.output_dir, commit_message, not blocking, token=token, revision=revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            if self.args.hub_always_push or self.push_in_progress is None or self.push_in_progress.is_done():
                message = f"Training in progress, step {self.state.global_step}"
                self.push_in_progress = PushInProgress([self._upload(checkpoint_folder, message, True)])

    def _upload(self, folder: str, message: str, as_future: bool, token=None, revision=None):
        from huggingface_hub import HfApi

        return HfApi(token=token or self.args.hub_token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            allow_patterns=list(PUBLISHED),
            run_as_future=as_future,
            revision=revision or self.args.hub_revision,
        )

    def create_model_card(self, *_, folder: str | Path | None = None, **__) -> None:
        """Our card (hub_cards/decoder.md) in place of TRL's generic one."""
        from lqa.cards import write_decoder_card

        if self.accelerator.is_main_process:
            folder = Path(folder or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.current_config().save(folder)
            write_decoder_card(folder, self.hub_model_id, name=Path(self.args.output_dir).name)
