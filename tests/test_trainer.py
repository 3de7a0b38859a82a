"""Training a decoder: the loss is the plain one, only the LoRA learns, and how a batch is made up changes nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import train.trainer
from lqa import LatentDecoder, corpus
from lqa.activations import layer_list
from lqa.conditioning import Projection
from lqa.config import SIDECAR, DecoderConfig
from lqa.errors import LqaError
from train.decoder import TrainConfig, build_trainer, load_config, main
from train.export import export
from train.projection import ProjectionConfig, fit_projection


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    grads = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if self.grads is None:
            self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def run(tiny, config_for, trainer_for, examples, tmp_path):
    """run(steps, rows=..., family=..., **trainer_for's): trains a fresh tiny model; returns the trainer with the first gradients."""
    count = [0]

    def go(steps=3, rows=None, family="llama", **kwargs):
        count[0] += 1
        base = tiny(family)
        callback = Gradients()
        out = kwargs.pop("out", tmp_path / f"run{count[0]}")
        resume = kwargs.pop("resume", None)
        callbacks = [callback, *kwargs.pop("callbacks", [])]
        trainer = trainer_for(base, config_for(base), out, rows or examples(8), callbacks=callbacks, max_steps=steps, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        trainer.grads = callback.grads
        return trainer

    return go


# --- the loss ---------------------------------------------------------------------------------------------------


def test_the_first_loss_is_that_of_plain_separate_rows(base, config_for, trainer_for, examples, separate, tmp_path):
    rows, config = examples(4), config_for(base)
    expected = -separate(base, config, rows).mean().item()
    trainer = trainer_for(base, config, tmp_path, rows, max_steps=1)  # a new LoRA changes nothing yet
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected, abs=1e-4)]


def test_so_it_is_where_several_layers_are_read(tiny, config_for, trainer_for, examples, separate, tmp_path):
    base, rows = tiny("llama"), examples(4, layers=[0, 1])
    config = config_for(base, layers_per_reading=2, default_layer=[0, 1])
    expected = -separate(base, config, rows).mean().item()
    trainer = trainer_for(base, config, tmp_path / "out", rows, max_steps=2, cache=tmp_path / "cache", num_train_epochs=2)
    trainer.train()  # the second step reads the disk
    assert losses(trainer)[0] == pytest.approx(expected, abs=1e-4)
    assert losses(trainer)[1] < losses(trainer)[0]


def test_a_short_run_reduces_the_loss_and_counts_what_it_did(run, examples):
    trainer = run(10, examples(4, qa=2))
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    training = trainer.current_config().training
    assert training["code"] == "test" and training["seed"] == 0 and training["learning_rate"] == 1e-2
    assert (training["steps"], training["readings"], training["qa_pairs"]) == (10, 40, 80)
    assert training["last_loss"] == losses(trainer)[-1]


def test_only_the_lora_learns_and_the_base_stays_the_same_bits(tiny, config_for, trainer_for, examples, tmp_path):
    base = tiny("llama")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        bare = base.model(input_ids=ids).logits
    before = [(p, p.detach().clone()) for p in base.model.parameters()]
    trainer = trainer_for(base, config_for(base), tmp_path, examples(4), max_steps=2)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert start and all(".lora_" in name for name in start)
    assert all(torch.equal(p, old) for p, old in before) and len(before) > 20
    assert {n for n, p in trainer.model.named_parameters() if n in start and not torch.equal(p, start[n])} == set(start)
    base.model.eval()
    with base.decoding():
        assert torch.equal(base.model(input_ids=ids).logits, bare)


def test_the_target_is_read_without_the_adapter_and_without_dropout(run, monkeypatch):
    """With a trained adapter, the activations that are injected are still those of the bare model."""
    seen = []
    real = train.trainer.capture

    def spy(model, blocks, ids, mask, layers):
        acts = real(model, blocks, ids, mask, layers)
        seen.append((ids, mask, acts, model.training, any(a.requires_grad for a in acts.values())))
        return acts

    monkeypatch.setattr(train.trainer, "capture", spy)
    trainer = run(3, dropout=0.5)
    assert len(seen) == 3
    base = trainer.base
    base.model.eval()
    for ids, mask, acts, training, grad in seen:
        assert not training and not grad
        with base.using():
            plain = real(base.model, base.blocks, ids, mask, acts)
        assert all(torch.equal(acts[k], plain[k].detach()) for k in acts)


def test_rows_without_patches_train_alone_and_among_others(run, examples):
    bare = run(3, examples(4, patched=False))
    assert losses(bare)[-1] < losses(bare)[0]
    patched = run(1, examples(4, patched=True))
    assert abs(losses(patched)[0] - losses(bare)[0]) > 1e-3


def test_no_hook_and_no_armed_values_are_left_after_training_or_a_failed_step(tiny, config_for, trainer_for, examples, tmp_path):
    def hooks():
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in [*base.blocks, base.embeddings, base.model.get_output_embeddings()]
        )

    base = tiny("llama")
    trainer = trainer_for(base, config_for(base), tmp_path, examples(4), max_steps=1)
    own = hooks()
    trainer.train()
    assert hooks() == own and trainer._injection._values is None
    batch = trainer.data_collator(examples(4))
    batch["activations"] = torch.full((int(batch["slots"].sum()), base.hidden_size), float("nan"))
    with pytest.raises(LqaError, match="not finite"):
        trainer.training_step(trainer.model, batch)
    assert hooks() == own and trainer._injection._values is None


# --- how a batch is made up changes nothing ---------------------------------------------------------------------


def same_gradients(a, b, tolerance=1e-5):
    assert a.keys() == b.keys() and sum(float(g.abs().sum()) for g in a.values()) > 0
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=tolerance)


def test_accumulating_two_batches_of_two_is_a_batch_of_four(run):
    whole = run(3, max_grad_norm=1e9)
    halves = run(3, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=1e9)
    assert losses(halves) == pytest.approx(losses(whole), abs=1e-4)
    same_gradients(whole.grads, halves.grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(run, reentrant):
    plain = run(2, max_grad_norm=1e9)
    again = run(2, max_grad_norm=1e9, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert losses(again) == pytest.approx(losses(plain), abs=1e-5)
    same_gradients(plain.grads, again.grads)


def test_the_disk_gives_the_losses_of_live_reading_and_spares_the_target_s_pass(run, examples, tmp_path, monkeypatch):
    rows = examples(4)
    live = run(4, rows)
    passes = []
    real = train.trainer.capture
    monkeypatch.setattr(train.trainer, "capture", lambda *args: passes.append(1) or real(*args))
    cached = run(4, rows, cache=tmp_path / "cache")  # four epochs of one batch
    assert losses(cached) == pytest.approx(losses(live), abs=1e-6) and len(passes) == 1
    again = run(4, rows, cache=tmp_path / "cache")
    assert losses(again) == pytest.approx(losses(live), abs=1e-6) and len(passes) == 1


def test_workers_of_the_data_loader_change_nothing(run):
    assert losses(run(2, dataloader_num_workers=1)) == pytest.approx(losses(run(2)), abs=1e-6)


# --- evaluation and resuming ------------------------------------------------------------------------------------


def test_evaluation_during_training_is_the_plain_loss_and_disturbs_nothing(run, examples, config_for, tiny, separate):
    rows, other = examples(4), examples(4, span="all")
    evaluation = {"true": Dataset.from_list(rows), "shuffled": Dataset.from_list(other)}
    quiet = run(4)
    trainer = run(4, evaluation=evaluation, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    assert losses(trainer) == pytest.approx(losses(quiet), abs=1e-6)
    for name, data in [("true", rows), ("shuffled", other)]:
        values = [e[f"eval_{name}_loss"] for e in trainer.state.log_history if f"eval_{name}_loss" in e]
        assert len(values) == 3 and len(set(values)) == 3
        base = tiny("llama")
        assert values[0] == pytest.approx(-separate(base, config_for(base), data).mean().item(), abs=1e-4)


class StopAt(TrainerCallback):
    """Ends the process's training from outside, once `step` is done and saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Stop(TrainerCallback):
    """Ends the process's training from outside, in the middle of step 4."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_from_a_checkpoint_has_the_losses_of_the_unbroken_one(run, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = run(5, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(5, out=tmp_path / "broken", callbacks=[Stop()], **settings)
    assert sorted(p.name for p in (tmp_path / "broken").glob("checkpoint-*")) == ["checkpoint-2"]
    resumed = run(5, out=tmp_path / "broken", resume=str(tmp_path / "broken" / "checkpoint-2"), **settings)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6) and len(losses(resumed)) == 5
    for (name, p), (_, q) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(tmp_path):
    worker = Path(__file__).with_name("ddp_worker.py")
    environment = os.environ | {"PYTHONPATH": str(worker.parent.parent), "OMP_NUM_THREADS": "1"}

    def start(out, batch, *launcher):
        out.mkdir()
        command = [sys.executable, *launcher, str(worker), str(out), str(batch)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((out / "losses.json").read_text())

    world, one, weights = start(tmp_path / "one", 4)
    two_world, two, two_weights = start(tmp_path / "two", 2, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert (world, two_world) == (1, 2)
    assert two == pytest.approx(one, abs=1e-4) and two_weights == pytest.approx(weights, abs=1e-3)


# --- what is saved ----------------------------------------------------------------------------------------------


def test_what_is_saved_is_the_adapter_with_its_sidecar_and_no_pickle(run, tiny):
    trainer = run(2)
    out = Path(trainer.args.output_dir)
    trainer.save_model()
    names = {p.name for p in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", SIDECAR} <= names
    assert not [n for n in names if Path(n).suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")]
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "tiny/llama" and adapter["task_type"] == "CAUSAL_LM"
    fresh = tiny("llama")
    config = DecoderConfig.load(out)
    config.check_base(fresh)
    assert config.training["steps"] == 2 and config == trainer.current_config()
    loaded = peft.PeftModel.from_pretrained(fresh.model, out, torch_device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
        assert not torch.equal(loaded(input_ids=ids).logits, tiny("llama").model(input_ids=ids).logits)


def test_a_checkpoint_is_a_decoder_too(run):
    trainer = run(2, save_strategy="steps", save_steps=1)
    folder = Path(trainer.args.output_dir) / "checkpoint-1"
    assert DecoderConfig.load(folder).training["steps"] == 1
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "training_args.bin").exists()


# --- the entry point --------------------------------------------------------------------------------------------

YAML = """
read_layers: [0, 1]
default_layer: 1
lora: {r: 2, lora_alpha: 4}
validation_readings: 2
mixture: {qa_per_reading: 2}
training_args: {output_dir: OUT, max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-2, logging_steps: 1, report_to: none,
                save_steps: 1, use_cpu: true, disable_tqdm: true, eval_strategy: steps, eval_steps: 2,
                train_sampling_strategy: group_by_length}
"""


@pytest.fixture
def entry(tiny, tmp_path, monkeypatch):
    """A config file, with a tiny model in place of the embedded one."""
    monkeypatch.setattr("lqa.models.load_base", lambda source: tiny("llama", max_position_embeddings=4096))
    path = tmp_path / "config.yaml"
    path.write_text(YAML.replace("OUT", str(tmp_path / "out")))
    return path, tmp_path / "out"


def test_the_entry_point_trains_saves_and_prints_one_json_document(entry, capsys):
    path, out = entry
    assert main(["--config", str(path)]) == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed["out"] == str(out) and printed["steps"] == 2 and printed["readings"] == 4 and printed["qa_pairs"] == 8
    config = DecoderConfig.load(out)
    assert config.base["name"] == "tiny/llama" and config.injection == "replace" and config.corpus["revision"]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny/llama"
    assert str(out.parent) not in (out / SIDECAR).read_text() + (out / "adapter_config.json").read_text()
    # Started again, with more to do, it goes on where it was.
    assert main(["--config", str(path), "training_args.max_steps=3", "examples=6"]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["steps"] == 3


def test_several_layers_are_read_at_once_from_training_to_answers(entry, tiny):
    path, out = entry
    flags = ["layers_per_reading=2", "default_layer=[0, 1]", "conditioning=projected", "projection.messages=1", "mixture.controls=0.1"]
    assert main(["--config", str(path), *flags]) == 0
    export(out, out.parent / "decoder")
    decoder = LatentDecoder.from_pretrained(out.parent / "decoder", base=tiny("llama", max_position_embeddings=4096))
    assert (decoder.config.layers_per_reading, decoder.config.default_layer) == (2, [0, 1])
    assert "0, 1 (default 0, 1)" in (out.parent / "decoder" / "README.md").read_text()
    reading = decoder.read([{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "Who?"}], "user")
    assert len(reading.injected) == 2 * len(reading.span) and reading.ask("Who is it?", max_new_tokens=2)[0].question


def test_merged_layers_are_read_from_training_to_answers(entry, tiny):
    path, out = entry
    flags = ["merged=true", "default_layer=[0, 1]", "conditioning=projected", "projection.messages=1", "mixture.controls=0.1"]
    assert main(["--config", str(path), *flags]) == 0
    export(out, out.parent / "decoder")
    decoder = LatentDecoder.from_pretrained(out.parent / "decoder", base=tiny("llama", max_position_embeddings=4096))
    assert decoder.config.merged and decoder.config.readings == [(0,), (1,), (0, 1)]
    assert decoder.projection.maps[0, 1][0].shape == (32, 64)
    reading = decoder.read([{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "Who?"}], "user")
    assert reading.layer == (0, 1) and len(reading.injected) == len(reading.span)


def test_a_projection_is_fitted_once_and_goes_along(entry, capsys, tiny):
    path, out = entry
    first = ["conditioning=projected", "projection.messages=1"]
    assert main(["--config", str(path), *first]) == 0
    maps = Projection.load(out, [0, 1], 32)
    fitted = {"start": "fitted", "train": False, "readings": 256, "messages": 1, "ridge": 0.1, "scale": 6.0, "folds": 0, "texts": 0}
    assert DecoderConfig.load(out).training["projection"] == fitted and DecoderConfig.load(out).projection == maps.digest()
    assert Projection.load(out / "checkpoint-1", [0, 1], 32).digest() == maps.digest()
    assert "Fitting" in capsys.readouterr().err
    assert main(["--config", str(path), *first, "training_args.max_steps=3", "examples=6"]) == 0
    assert Projection.load(out, [0, 1], 32).digest() == maps.digest()
    assert "Fitting" not in capsys.readouterr().err  # gone on with
    export(out, out.parent / "decoder")
    decoder = LatentDecoder.from_pretrained(out.parent / "decoder", base=tiny("llama", max_position_embeddings=4096))
    assert torch.allclose(decoder.projection.maps[1][0], maps.maps[1][0], rtol=2e-3, atol=1e-4)


def test_cross_fitted_maps_are_trained_on_and_gone_on_with_and_are_no_part_of_the_decoder(entry, capsys):
    path, out = entry
    how = ["conditioning=projected", "projection={messages: 1, folds: 2, texts: 1}", "mixture.none=0", "training_args.eval_strategy='no'"]
    assert main(["--config", str(path), *how]) == 0
    capsys.readouterr()
    trainer = build_trainer(load_config(path, [*how, "training_args.max_steps=3", "examples=6"]))
    assert "Fitting" not in capsys.readouterr().err and trainer.projection.digest() == DecoderConfig.load(out).projection
    batch = trainer.data_collator(list(trainer.train_dataset)[:2])
    fold, other = (trainer.projection.folds[i] for i in (0, 1))
    assert fold.digest() != other.digest() != trainer.projection.digest()
    found = {}
    for place in (0, 1, None):
        trainer.projection.fold_of = {name: place for name in batch["read_names"] if place is not None}
        found[place] = trainer.read(batch)
    for maps, place in ((fold, 0), (other, 1), (Projection.load(out, [0, 1], 32), None)):
        trainer.projection = maps
        assert torch.equal(trainer.read(batch), found[place])
    export(out, out.parent / "decoder")
    assert not (out.parent / "decoder" / "folds").exists() and (out / "folds").is_dir()


@pytest.mark.parametrize(
    "how", ["folds: 1", "folds: true", "{folds: 2, train: true}", "{folds: 2, start: identity}"]
)
def test_folds_that_cannot_be_are_refused(entry, capsys, how):
    section = how if how.startswith("{") else "{" + how + "}"
    assert main(["--config", str(entry[0]), "conditioning=projected", f"projection={section}"]) == 2
    assert "projection.folds" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["{texts: -1}", "{texts: true}", "{texts: 2, start: identity}"])
def test_texts_that_cannot_be_are_refused(entry, capsys, how):
    assert main(["--config", str(entry[0]), "conditioning=projected", f"projection={how}"]) == 2
    assert "projection.texts" in capsys.readouterr().err


def test_a_projection_may_start_at_the_identity_and_be_trained_with_the_adapter(entry, tiny, capsys):
    path, out = entry
    how = ["conditioning=projected", "projection={start: identity, train: true}", "training_args.eval_strategy='no'"]
    assert main(["--config", str(path), *how, "training_args.max_steps=4", f"training_args.output_dir={out}-whole"]) == 0
    assert "Fitting" not in capsys.readouterr().err
    whole = Projection.load(f"{out}-whole", [0, 1], 32)
    for weight, bias in whole.maps.values():
        assert not torch.equal(weight, torch.eye(32)) and (weight - torch.eye(32)).abs().max() < 0.1 and bias.abs().sum() > 0
    # Stopped after two steps and gone on with: optimizer and maps are where they were.
    broken = build_trainer(load_config(path, [*how, "training_args.max_steps=4"]), [StopAt(2)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert main(["--config", str(path), *how, "training_args.max_steps=4"]) == 0
    resumed = Projection.load(out, [0, 1], 32)
    for own, other in zip(whole.maps.values(), resumed.maps.values(), strict=True):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(own, other, strict=True))
    decoder = LatentDecoder.from_pretrained(out, base=tiny("llama", max_position_embeddings=4096))
    assert decoder.config.projection == resumed.digest() == decoder.projection.digest()
    reading = decoder.read([{"role": "system", "content": "Be a cook."}, {"role": "user", "content": "Hello!"}], "user")
    reading.injected.sum().backward() if reading.injected.requires_grad else None
    assert not any(t.requires_grad for m in decoder.projection.maps.values() for t in m)
    export(out, out.parent / "decoder")
    assert DecoderConfig.load(out.parent / "decoder").projection != resumed.digest()  # rounded to 16 bit, and named so
    LatentDecoder.from_pretrained(out.parent / "decoder", base=tiny("llama", max_position_embeddings=4096))


def test_a_trained_projection_gets_the_gradient_of_the_loss(entry):
    """Against finite differences, with and without gradient checkpointing."""
    path, _ = entry
    how = ["conditioning=projected", "projection={start: identity, train: true}", "mixture.none=0", "training_args.eval_strategy='no'"]
    found = []
    for checkpointing in (False, True):
        trainer = build_trainer(load_config(path, [*how, f"training_args.gradient_checkpointing={checkpointing}"]))
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
        with trainer._step():
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
        found.append(trainer)
    plain, checkpointed = ({n: p.grad for n, p in t.model.projection.items()} for t in found)
    used = f"{trainer.train_dataset[0]['layers'][0]}_bias"
    for name in plain:
        assert (plain[name] is None) == (checkpointed[name] is None)
        if plain[name] is not None:
            torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-3, atol=1e-6)
    bias, step = found[0].model.projection[used], torch.zeros(32)
    step[3] = 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            bias += sign * step
            with found[0]._step():
                values.append(found[0].compute_loss(found[0].model, batch).item())
            bias -= sign * step
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(plain[used][3].item(), rel=0.05, abs=2e-4)
    assert abs(plain[used][3].item()) > 1e-4


def test_centred_training_stores_the_means(entry, tiny):
    path, out = entry
    assert main(["--config", str(path), "conditioning=centred", "projection.readings=3"]) == 0
    decoder = LatentDecoder.from_pretrained(out, base=tiny("llama", max_position_embeddings=4096))
    assert decoder.projection.maps[1][0] is None and decoder.config.projection == decoder.projection.digest()
    reading = decoder.read([{"role": "user", "content": "Hello!"}])
    assert torch.allclose(reading.injected, reading.activations + decoder.projection.maps[1][1])


def test_visible_text_trains_a_reference_of_the_same_budget(entry, capsys, tiny):
    """text_only_trained: the same LoRA, steps and data; nothing is fitted, read or injected, whatever the config says of that."""
    path, out = entry
    assert main(["--config", str(path), "conditioning=projected", "merged=true", "default_layer=[0, 1]", "visible_text=true"]) == 0
    assert "Fitting" not in capsys.readouterr().err and not (out / "projection.safetensors").exists()
    config = DecoderConfig.load(out)
    assert (config.injection, config.conditioning, config.training["steps"], config.lora["r"]) == ("visible_text", "raw", 2, 2)
    reader = LatentDecoder.from_pretrained(out, base=tiny("llama", max_position_embeddings=4096))
    chats = [[{"role": "system", "content": f"Be a {who}."}, {"role": "user", "content": "Hello!"}] for who in ("pirate", "cook")]
    scores = [reader.read(chat, "user").logprobs("Who is it?", ["A pirate."]) for chat in chats]
    assert scores[0] == scores[1] and scores[0][0] < 0


def test_shuffled_activations_are_those_of_another_control_and_the_questions_stay(entry):
    path, _ = entry
    rows = [
        build_trainer(load_config(path, [f"mixture.shuffled_activations={value}", "training_args.max_steps=8"])).train_dataset
        for value in ("false", "true")
    ]
    from lqa.corpus import load_controls

    text = {c.id: c.control for c in load_controls("train")}
    for own, fake in zip(*rows, strict=True):
        assert text[own["id"]] == own["chat"][0]["content"] and text[fake["id"]] != fake["chat"][0]["content"]
        for key in ("id", "layers", "qa", "patched"):
            assert own[key] == fake[key]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("read_layers=[0, 7]", "layer 7.*blocks 0 to 2"),
        ("default_layer=2", "default_layer 2"),
        ("layers_per_reading=2", "default_layer 1 must name 2"),
        ("injection=overwrite", "overwrite"),
        ("injection=add_normed", "needs a constant"),
        ("training_args.learning_speed=1", "learning_speed"),
        ("mixture.novelty=1", "novelty"),
        ("lora.novelty=1", "novelty"),
        ("training_args.max_steps=-1", "max_steps or examples"),
        ("novelty=1", "unknown key.*novelty"),
        ("default_layer", "key=value"),
        ("read_layers.x=1", "holds a value"),
        ("read_layers=[0,", "not YAML"),
        ("read_layers=1", "config is wrong"),
        ("write_layer=9", "layer 9"),
        ("write_layer=-5", "write_layer is -5"),
        ("slot_token=''", "slot_token is empty"),
        ("training_args=", "config is wrong"),
        ("mixture.forms={secret: 1.0}", "'secret'"),
        ("projection.messages=9999", "between 1 and"),
        ("projection.start=zero", "'zero'; use fitted or identity"),
        ("projection.train=true", "go with the conditioning 'projected', not 'raw'"),
        ("mixture.spans={parts: 1.0}", "'parts'; the spans are"),
    ],
)
def test_what_is_wrong_with_a_config_is_one_sentence_and_exit_code_2(entry, capsys, override, words):
    import re

    assert main(["--config", str(entry[0]), override]) == 2
    captured = capsys.readouterr()
    assert re.search(words, captured.err) and captured.out == "" and "Traceback" not in captured.err


def test_overrides_are_yaml_and_reach_nested_fields(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("read_layers: [1]\nlora: {r: 4}\n")
    config = load_config(path, ["lora.r=8", "training_args.learning_rate=1e-4", "read_layers=[0, 2]", "base=some/model", "resume=false"])
    assert config == TrainConfig(base="some/model", read_layers=[0, 2], lora={"r": 8}, training_args={"learning_rate": 1e-4}, resume=False)
    with pytest.raises(LqaError, match="none.yaml cannot be read"):
        load_config(tmp_path / "none.yaml", [])


def test_the_committed_configs_are_of_the_known_form():
    configs = sorted((Path(__file__).parent.parent / "train" / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        config = load_config(path, [])
        assert set(layer_list(config.default_layer)) <= set(config.read_layers)


def test_the_seed_decides_everything(entry):
    path, _ = entry

    def first_losses(*overrides):
        torch.manual_seed(torch.seed() % 1000)  # whatever happened before
        trainer = build_trainer(load_config(path, ["training_args.eval_strategy='no'", "training_args.save_strategy='no'", *overrides]))
        trainer.train()
        return losses(trainer)

    assert first_losses() == first_losses() != first_losses("training_args.seed=1")


def test_a_fake_s_projection_predicts_strangers(tiny, config_for):
    base = tiny("llama", max_position_embeddings=4096)
    config = replace(config_for(base), conditioning="projected")
    controls = corpus.load_controls("train")[:60]
    maps = [fit_projection(base, config, controls, ProjectionConfig(messages=1), 0, shuffled).maps for shuffled in (False, True)]
    for k in config.read_layers:
        (weight, _), (other, other_bias) = maps[0][k], maps[1][k]
        assert weight.shape == other.shape and not torch.allclose(weight, other, atol=1e-3)
        assert torch.isfinite(other).all() and torch.isfinite(other_bias).all()
