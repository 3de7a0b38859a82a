"""The recipes for real models: each trains its tiny random twin, as many blocks deep; what they say they take is what the estimate says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lqa import LatentDecoder
from lqa.errors import LqaError
from train import decoder
from train.estimate import Sizes, estimate, main, measured_speed, sizes_of, tokens_of, work_of

CONFIGS = Path(__file__).parent.parent / "train" / "configs"
TWINS = {  # recipe: (family, blocks, parameters in billions as published)
    "llama-3.1-8b-instruct": ("llama", 32, 8.03),
    "qwen3-8b": ("qwen3", 36, 8.19),
    "gemma-3-4b-it": ("gemma3", 34, 3.88),
    "gpt-oss-20b": ("gptoss", 24, 20.91),
}


def recipe(name: str, *overrides: str):
    return decoder.load_config(CONFIGS / f"{name}.yaml", list(overrides))


def test_every_recipe_has_a_twin():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"smollm2-135m-instruct", *TWINS}


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_a_recipe_trains_its_twin(name, tiny, tmp_path, monkeypatch):
    """All of it but the number and the size of its steps."""
    family, blocks, _ = TWINS[name]
    sizes = {"num_hidden_layers": blocks, "max_position_embeddings": 4096}
    if family == "gemma3":
        sizes["layer_types"] = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(blocks)]
    monkeypatch.setattr("lqa.models.load_base", lambda source: tiny(family, **sizes))
    out = tmp_path / "out"
    small = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "eval_steps": 3, "bf16": "false", "disable_tqdm": "true"}
    overrides = [f"training_args.{key}={value}" for key, value in small.items()]
    overrides += [f"training_args.output_dir={out}", "mixture.controls=0.05", "validation_readings=2"]
    assert decoder.main(["--config", str(CONFIGS / f"{name}.yaml"), *overrides]) == 0
    reader = LatentDecoder.from_pretrained(out, base=tiny(family, **sizes))
    config = reader.config
    assert config.read_layers == recipe(name).read_layers and config.write_layer == config.default_layer == blocks // 2
    adapter = {n: p for n, p in reader.base.model.named_parameters() if "lora_" in n}
    assert {int(re.search(r"layers\.(\d+)\.", n)[1]) for n in adapter} == set(range(blocks // 2 + 1, blocks))
    assert all(p.abs().sum() > 0 for n, p in adapter.items() if "lora_B" in n)  # every adapter was in use
    assert torch.isfinite(torch.tensor(config.training["last_loss"]))
    (answer,) = reader.read([{"role": "system", "content": "Be a cook."}, {"role": "user", "content": "Hello!"}], "user").ask("Who?")
    assert 0 <= answer.confidence <= 1


@pytest.mark.parametrize("name", TWINS)
def test_parameters_are_those_of_the_published_model(name):
    config = recipe(name)
    sizes = sizes_of(config, decoder.parse_config(replace(config, training_args={"max_steps": 1, "bf16": False})).lora)
    assert sizes.parameters / 1e9 == pytest.approx(TWINS[name][2], abs=0.01) and sizes.layers == TWINS[name][1]
    assert (sizes.active < 0.2 * sizes.parameters) == (name == "gpt-oss-20b")


def test_sizes_are_those_of_a_model_that_is_there(tiny):
    """Parameters of an adapter too, against PEFT's own."""
    import peft

    for family in ("llama", "gptoss"):
        base = tiny(family)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 2], task_type="CAUSAL_LM")
        about = base.model.config.to_dict()
        sizes = sizes_of(decoder.TrainConfig(sizes=about), lora)
        assert sizes.parameters == sum(p.numel() for p in base.model.parameters())
        inside = sum(p.numel() for p in base.blocks.parameters())
        experts = sum(p.numel() for n, p in base.blocks.named_parameters() if ".experts." in n)
        assert sizes.active == inside - experts / 2  # two experts of four
        model = peft.get_peft_model(base.model, lora)
        assert sizes.adapter == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_formula_by_hand():
    config = decoder.TrainConfig(read_layers=[1], default_layer=1)
    sizes = Sizes(parameters=1000, active=500, adapter=10, layers=4, width=8, inner=16, vocabulary=100)
    assert work_of(config, sizes, (20, 30, 5), False) == 2 * 500 * (20 * 2 / 4 + 30 * 2) + 4 * 100 * 8 * 5
    several = replace(config, read_layers=[0, 1], layers_per_reading=2, default_layer=[0, 1])
    assert work_of(several, sizes, (20, 30, 5), False) == work_of(config, sizes, (20, 30, 5), False)  # the deepest decides
    assert work_of(config, sizes, (20, 30, 5), True) - work_of(config, sizes, (20, 30, 5), False) == 2 * 500 * 30


def test_more_cards_or_speed_take_less_time_and_tokens_are_the_collator_s(tiny, tmp_path):
    base = tiny("smol", max_position_embeddings=4096)
    config = recipe("qwen3-8b", "training_args.bf16=false", "mixture.controls=0.1")
    found = estimate(config, base, speed=1e14, cards=4)
    t, d, a = tokens_of(config, base)
    assert found.tokens == (t, d, a) and d > a > 3 and t > 10
    several = tokens_of(replace(config, layers_per_reading=3), base)
    assert several[0] == t and several[2] == a and several[1] > d + 2 * 5  # slots and a header for each further layer
    assert found.readings == 4000 * 16 * 4 and found.hours == pytest.approx(found.readings * found.work / 4e14 / 3600)
    plain = estimate(replace(config, training_args=config.training_args | {"gradient_checkpointing": False}), base)
    assert plain.memory["activations"] > 5 * found.memory["activations"] and plain.work < found.work
    assert "B parameters" in str(found)
    bench = tmp_path / "train.json"
    bench.write_text('{"packed": {"examples_per_second": 6.0}}')
    slow = measured_speed(bench, base)
    bench.write_text('{"packed": {"examples_per_second": 12.0}}')
    assert measured_speed(bench, base) == pytest.approx(2 * slow) and slow > 0
    bench.write_text("{}")
    with pytest.raises(LqaError, match="bench train --json"):
        measured_speed(bench, base)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_the_figures_in_a_recipe_are_the_estimate_s(name, capsys):
    """Within a tenth: the corpus may grow, and its examples with it."""
    assert main(["--config", str(CONFIGS / f"{name}.yaml"), "training_args.bf16=false"]) == 0
    now = capsys.readouterr().out.splitlines()[-1]
    written = re.search(r"#   (estimate: .*)", (CONFIGS / f"{name}.yaml").read_text())[1]
    pattern = r"([\d.]+) h .* ([\d.]+) GB a card"
    for a, b in zip(*(map(float, re.search(pattern, text).groups()) for text in (now, written)), strict=True):
        assert a == pytest.approx(b, rel=0.1, abs=0.1)


def test_bad_flags_are_one_sentence(capsys):
    for flags, words in ((["--cards", "0"], "above 0"), (["--speed", "1", "--bench", "x"], "either --speed or --bench")):
        assert main(["--config", str(CONFIGS / "qwen3-8b.yaml"), *flags]) == 2
        assert words in capsys.readouterr().err
