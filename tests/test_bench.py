"""The benchmarks: that every schedule does the work it is named for, and that results follow from the seconds.  No speed is judged."""

import json
import statistics

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.cache_utils import DynamicLayer

from lqa import LqaError, bench, engine

CONFIG = """
read_layers: [0, 1]
default_layer: 1
injection: replace_scaled
injection_constant: 4.5
lora: {r: 4, lora_alpha: 8, lora_dropout: 0.0, target_modules: all-linear}
mixture: {forms: {system: 1.0}, pool: 1.0, none: 0.2, qa_per_reading: 3}
training_args: {per_device_train_batch_size: 2, learning_rate: 1.0e-3, eval_strategy: steps, save_steps: 1, seed: 0, use_cpu: true}
"""


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """(a training config, overrides that name a tiny base); the corpus is long in a tokenizer of 400 tokens."""
    folder = tmp_path_factory.mktemp("bench")
    base = tiny("smol", max_position_embeddings=8192)
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return str(folder / "config.yaml"), [f"base={folder / 'base'}", f"training_args.output_dir={folder / 'out'}"]


# --- reading ----------------------------------------------------------------------------------------------------


def test_read_measures_three_schedules(tiny_decoder):
    result = bench.bench_read(tiny_decoder(), questions=3, new_tokens=5, repeats=2)
    assert list(result) == ["ours", "generate", "paper"]
    assert [len(result[name]["seconds"]) for name in result] == [2, 2, 1]
    assert result["paper"]["same_tokens"] is True and result["paper"]["ties"] == 0
    ours, generate, paper = (statistics.median(entry["seconds"]) for entry in result.values())
    assert result["ours"]["ratio"] == 1
    assert result["generate"]["ratio"] == pytest.approx(ours / generate)
    assert result["paper"]["ratio"] == pytest.approx(paper / ours)
    assert result["generate"]["met"] == (ours <= generate) and result["paper"]["met"] == (paper >= 10 * ours)
    for entry in result.values():
        assert entry["tokens"] == 15
        assert entry["tokens_per_second"] == pytest.approx(15 / statistics.median(entry["seconds"]))
    json.dumps(result)


def test_the_paper_can_be_left_out_and_nothing_is_printed_on_stdout(tiny_decoder, capsys):
    result = bench.bench_read(tiny_decoder(), questions=2, new_tokens=2, repeats=1, skip_paper=True)
    assert list(result) == ["ours", "generate"]
    assert capsys.readouterr().out == ""


def test_another_token_than_the_papers_is_an_error(tiny_decoder):
    decoder = tiny_decoder()
    asked = bench._questions(2)
    tokens = bench._read_ours(decoder, asked, 4)
    assert tokens.shape == (2, 4)
    same, ties = bench._read_paper(decoder, bench._twin(decoder.base), asked, 4, tokens)
    assert torch.equal(same, tokens) and ties == 0
    tokens[1, 2] += 1
    with pytest.raises(LqaError, match="Question 1, token 2"):
        bench._read_paper(decoder, bench._twin(decoder.base), asked, 4, tokens)


def test_generate_runs_the_bare_model_with_no_lora_in_it(tiny_decoder, tiny):
    decoder = tiny_decoder()
    plain = bench._without_lora(decoder.base)
    assert not any(isinstance(m, BaseTunerLayer) for m in plain.modules())
    assert any(isinstance(m, BaseTunerLayer) for m in decoder.base.model.modules())  # the decoder's own copy is as it was
    prompts = [[5, 6, 7, 8], [9, 10]]
    got = bench._read_generate(decoder, plain, prompts, 4)
    bare = tiny("smol").model
    for prompt, row in zip(prompts, got.tolist(), strict=True):
        ids = list(prompt)
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(bare(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert row == ids[len(prompt) :]


def test_questions_are_the_corpus_own_and_begin_again_where_they_end():
    assert len(set(bench._questions(16))) == 16
    many = bench._questions(100)
    assert len(many) == 100 and many[0] in many[1:]


def test_a_cache_with_room_holds_what_a_cache_without_holds(monkeypatch):
    monkeypatch.setattr(engine.RoomyLayer, "ROOM", 3)
    roomy, plain = engine.RoomyLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    rows = 4
    for step in range(14):
        new = [torch.randn(rows, 2, 5 if step == 0 else 1, 8, generator=generator) for _ in range(2)]
        held = roomy.update(*new)
        assert all(torch.equal(a, b) for a, b in zip(held, plain.update(*new), strict=True))
        if step == 6:
            for layer in (roomy, plain):
                layer.batch_select_indices(torch.tensor([0, 2]))
            rows = 2
        if step == 9:
            for layer in (roomy, plain):
                layer.crop(-2)


# --- training ---------------------------------------------------------------------------------------------------


def losses_and_gradients(trainer):
    generator = torch.Generator().manual_seed(3)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.training_step(trainer.model, batch, (batch["labels"] != -100).sum())
    return loss.item(), [p.grad.clone() for p in trained]


def test_the_schedules_are_the_same_training(config, capsys):
    ours, packed, paper, sft = (bench.make_trainer(name, *config, 4) for name in bench.TRAIN_SCHEDULES)
    assert [len(row["qa"]) for row in packed.train_dataset] == [3] * 8
    assert ours.train_dataset[:] == paper.train_dataset[:]
    for i, (one, many) in enumerate(zip(ours.train_dataset, packed.train_dataset, strict=True)):
        assert one == many | {"qa": [many["qa"][i % 3]]}
    assert type(sft).__name__ == "SFTTrainer" and type(paper).__name__ == "PaperTrainer"
    rows = [ours.data_collator.row(example)[0] for example in ours.train_dataset]
    assert sft.train_dataset["input_ids"][:] == [row["input_ids"] for row in rows]
    assert sft.train_dataset["labels"][:] == [row["labels"] for row in rows]
    widths = []
    paper.base.model.get_output_embeddings().register_forward_hook(lambda m, a, out: widths.append(tuple(out.shape[:-1])))
    loss, gradients = losses_and_gradients(ours)
    theirs, their_gradients = losses_and_gradients(paper)
    assert theirs == pytest.approx(loss, rel=1e-5)
    for a, b in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert [len(shape) for shape in widths] == [2, 2]  # logits at every position, of target and decoder


@pytest.mark.slow
def test_train_measures_every_schedule_in_its_own_process(config):
    path, overrides = config
    result = bench.bench_train(path, steps=2, warmup=1, repeats=1, overrides=overrides)
    assert list(result) == list(bench.TRAIN_SCHEDULES)
    per_example = {}
    for name, entry in result.items():
        assert len(entry["seconds"]) == 1 and entry["peak_mb"] > 50
        assert entry["examples"] == (12 if name == "packed" else 4)
        per_example[name] = statistics.median(entry["seconds"]) / entry["examples"]
        assert entry["examples_per_second"] == pytest.approx(1 / per_example[name])
    assert result["ours"]["ratio"] == 1
    assert result["paper"]["ratio"] == pytest.approx(per_example["paper"] / per_example["packed"])
    assert result["paper"]["unpacked_ratio"] == pytest.approx(per_example["paper"] / per_example["ours"])
    assert result["packed"]["ratio"] == pytest.approx(per_example["ours"] / per_example["packed"])
    assert result["sft"]["ratio"] == pytest.approx(per_example["ours"] / per_example["sft"])
    assert result["sft"]["memory_ratio"] == pytest.approx(result["ours"]["peak_mb"] / result["sft"]["peak_mb"])
    json.dumps(result)
    text = bench.format_bench(result)
    assert all(name in text for name in result) and "peak_mb(ours) / peak_mb(sft)" in text


def test_train_says_what_is_wrong(config, capfd):
    with pytest.raises(LqaError, match="fast"):
        bench.bench_train(config[0], schedules=["fast"])
    with pytest.raises(LqaError, match="step"):
        bench.bench_train(config[0], steps=0)
    with pytest.raises(LqaError, match="'ours' failed with the exit code 2"):
        bench.bench_train(config[0], overrides=["no_such_key=1"], schedules=["ours"], steps=1)
    captured = capfd.readouterr()
    assert "no_such_key" in captured.err and captured.out == ""


# --- steering ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["raw", "projected"])
def test_both_ways_of_steering_take_the_same_gradient(tiny_decoder, conditioning):
    from lqa.steering.training import Settings

    decoder = tiny_decoder(conditioning=conditioning)
    settings = Settings(chats=3, kl=0.0, autocast=False, certainty=None, rank=2, hidden=conditioning != "raw")
    qa = [("How will the assistant speak?", "Like a pirate."), ("Who is it?", "A doctor from France who likes to cook.")]
    runs = []
    for base in (decoder.base, twin := bench._twin(decoder.base)):
        base.model.get_output_embeddings().register_forward_hook(lambda m, a, out: runs.append(out.shape[-2]))
    ours = bench._steer_once(decoder, None, qa, settings)[1]
    passes = len(runs)
    paper = bench._steer_once(decoder, twin, qa, settings)[1]
    assert passes == 3 and len(runs) - passes == 2 * 3 * len(qa)  # once a chat, against target and decoder for each example
    assert sum(g.abs().sum() for g in ours) > 0
    for a, b in zip(ours, paper, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_steer_measures_three_schedules(tiny_decoder, tiny):
    decoder = tiny_decoder()
    names = [name for name, _ in decoder.base.model.named_parameters()]
    result = bench.bench_steer(decoder, chats=2, pairs=2, repeats=1, rank=2, span="last:2")
    assert list(result) == ["ours", "kl", "paper"]
    ours, kl, paper = (statistics.median(entry["seconds"]) for entry in result.values())
    assert result["paper"]["ratio"] == pytest.approx(paper / ours) and result["kl"]["ratio"] == pytest.approx(kl / ours)
    assert result["paper"]["met"] == (paper >= 2 * ours)
    for entry in result.values():
        assert entry["examples"] == 4 and entry["examples_per_second"] == pytest.approx(4 / statistics.median(entry["seconds"]))
    assert "paper: ratio = seconds(paper) / seconds(ours)" in bench.format_bench(result)
    assert [name for name, _ in decoder.base.model.named_parameters()] == names
    with pytest.raises(LqaError, match="at least 1"):
        bench.bench_steer(decoder, chats=0)


# --- printing ---------------------------------------------------------------------------------------------------


def test_a_result_as_a_table():
    result = {
        "ours": {"seconds": [1.0, 3.0, 2.0], "ratio": 1.0, "ratio_is": "ours itself", "tokens_per_second": 384.0},
        "paper": {"seconds": [30.0], "ratio": 15.0, "ratio_is": "seconds(paper) / seconds(ours)", "target": ">= 10.0", "met": True}
        | {"same_tokens": True, "ties": 0, "tokens_per_second": 25.6},
    }
    header, ours, paper, *notes = bench.format_bench(result).splitlines()
    assert header.split() == ["schedule", "seconds", "range", "ratio", "target", "tokens/s"]
    assert ours.split() == ["ours", "2.00", "1.00-3.00", "1.00", "384.0"]
    assert paper.split() == ["paper", "30.00", "30.00-30.00", "15.00", ">=", "10.0", "met", "25.6"]
    assert notes == ["paper: ratio = seconds(paper) / seconds(ours)", "paper: the same tokens as ours"]
