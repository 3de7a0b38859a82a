"""Sweeps: a grid on a tiny model from end to end, resumed after kills; the fit of a curve; the committed grids."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from lqa.corpus import load_controls
from lqa.errors import LqaError
from train.decoder import TrainConfig, make_sidecar, parse_config
from train.sweep import Fit, _same_run, cell_config, fit, load_grid, main, sweep
from train.trainer import LatentQATrainer

ROOT = Path(__file__).parent.parent

CONFIG = """
read_layers: [0, 1]
default_layer: 1
lora: {r: 2, lora_alpha: 4}
validation_readings: 2
mixture: {controls: 0.1}
training_args: {max_steps: 4, per_device_train_batch_size: 2, learning_rate: 1.0e-2, logging_steps: 1, report_to: none, save_steps: 1,
                save_total_limit: 1, use_cpu: true, disable_tqdm: true}
"""

GRID = """
config: DIR/config.yaml
out: DIR/out
runs: DIR/runs
about: Two of a kind.
limit: 16
curve: [1, 2]
target: 0.65
cells:
  first one: {}
  smaller: {lora.r: 1, mixture.pool: 0.5}
"""


@pytest.fixture
def grid(tiny, tmp_path, monkeypatch):
    """grid(NAME, **replacements): a grid file of its own folder, on a tiny model."""
    monkeypatch.setattr("lqa.models.load_base", lambda source: tiny("llama", max_position_embeddings=4096))

    def write(name: str, old: str = "", new: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(CONFIG)
        text = GRID.replace("DIR", str(folder))
        assert old in text
        (folder / "grid.yaml").write_text(text.replace(old, new) if old else text)
        return folder / "grid.yaml"

    return write


@pytest.fixture
def kill(monkeypatch):
    """kill(n): a KeyboardInterrupt at the n-th training step from now on; kill(None): no more."""
    real, left = LatentQATrainer.training_step, [None]

    def step(self, *args, **kwargs):
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LatentQATrainer, "training_step", step)
    return lambda n: left.__setitem__(0, n)


def figures(lines):
    """What must be the same in every run."""
    return [{key: value for key, value in line.items() if key not in ("seconds", "code")} for line in lines]


def test_a_killed_sweep_goes_on_and_gives_the_figures_of_an_unbroken_one(grid, kill, capsys):
    whole = sweep(grid("whole"))
    path = grid("broken")
    kill(5)  # between the first cell and the first step of the second, in effect: nothing of it is saved
    with pytest.raises(KeyboardInterrupt):
        sweep(path)
    cells = path.parent / "out" / "cells.jsonl"
    assert [json.loads(line)["cell"] for line in cells.read_text().splitlines()] == ["first one"] * 3
    cells.write_text(cells.read_text() + '{"cell": "smaller", "se')  # a line that a kill cut short
    kill(2)
    with pytest.raises(KeyboardInterrupt):
        sweep(path)  # inside the second cell, behind two saved steps
    assert sorted(p.name for p in (path.parent / "runs" / "out" / "smaller").glob("checkpoint-*")) == ["checkpoint-3"]
    kill(None)
    assert main([str(path)]) == 0
    lines = [json.loads(line) for line in cells.read_text().splitlines()]
    assert figures(lines) == figures(whole) and len(lines) == 6
    assert [(line["steps"], line["pairs"]) for line in lines] == [(1, 4), (2, 8), (4, 16)] * 2
    for line in lines:
        rows = line["identify"]
        assert rows["none"]["accuracy"]["mean"] == pytest.approx(1 / 8) and 8 <= rows["ours"]["accuracy"]["n"] <= 16
        assert set(rows) == {"ours", "none", "shuffled", "text_only"} and line["data"]["name"] == "own validation split"
        assert line["loss"]["true"] > 0 and line["loss"]["shuffled"] > 0
    # A finished one only prints.
    capsys.readouterr()
    kill(0)
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (path.parent / "out" / "README.md").read_text().strip()
    assert printed.count("| first one |") == 3 and "log10(examples)" in printed and "65%" in printed
    assert (path.parent / "out" / "sweep.png").stat().st_size > 5000 and (path.parent / "out" / "grid.yaml").is_file()


def test_every_split_but_the_validation_one_is_left_alone(grid):
    line = sweep(grid("split", "curve: [1, 2]", "curve: []"))[0]
    held = {c.id for c in load_controls("validation")}
    journal = Path(grid("split").parent / "runs" / "out" / "first-one" / "step-4" / "journal.jsonl").read_text().splitlines()
    asked = {label for entry in journal[1:] for label in json.loads(entry)["key"].split("/")[-1].split()}
    assert asked <= held and len(asked) >= line["identify"]["ours"]["accuracy"]["n"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("lora.rank: 1", r"'smaller'.*rank"),
        ("mixture.novelty: 1", r"'smaller'.*novelty"),
        ("conditioning: magic", r"'smaller'.*'magic'"),
        ("default_layer: 9", r"'smaller'.*default_layer 9"),
        ("read_layers: [0, 9], default_layer: 0", r"'smaller'.*layer 9"),
        ("novelty: 1", r"'smaller'.*unknown key.*novelty"),
        ("training_args.max_steps: 1", r"'smaller' has training_args.max_steps 1"),
    ],
)
def test_what_is_wrong_with_the_last_cell_is_said_before_the_first_is_trained(grid, kill, capsys, wrong, words):
    import re

    kill(0)  # whoever trains dies
    path = grid("wrong", "lora.r: 1, mixture.pool: 0.5", wrong)
    assert main([str(path)]) == 2
    assert re.search(words, capsys.readouterr().err) and not (path.parent / "runs").exists() and not (path.parent / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("cells:", "cell:", "config, out and cells"),
        ("about:", "abuot:", "unknown key.*abuot"),
        ("curve: [1, 2]", "curve: true", "list of steps"),
        ("target: 0.65", "target: 65", "between 0 and 1"),
        ("{}", "none", "mapping of names"),
    ],
)
def test_what_is_wrong_with_a_grid_is_one_sentence(grid, old, new, words):
    with pytest.raises(LqaError, match=words):
        load_grid(grid("form", old, new))


def test_a_cell_whose_overrides_have_changed_is_refused(grid, kill):
    path = grid("changed", "curve: [1, 2]", "curve: []")
    kill(2)
    with pytest.raises(KeyboardInterrupt):
        sweep(path)
    kill(None)
    text = path.read_text()
    path.write_text(text.replace("first one: {}", "first one: {lora.r: 3}"))
    with pytest.raises(LqaError, match="run with other settings"):
        sweep(path)


def test_a_run_goes_on_though_there_are_new_keys_since(tmp_path):
    settings = asdict(TrainConfig()) | {"curve": []}
    (tmp_path / "cell.json").write_text(json.dumps({key: value for key, value in settings.items() if key != "layers_per_reading"}))
    _same_run(tmp_path, settings)
    with pytest.raises(LqaError, match="other settings"):
        _same_run(tmp_path, settings | {"layers_per_reading": 2})


def test_the_fit_is_a_line_in_the_logarithm():
    law = Fit(0.1, 0.12)
    points = [(n, law(n)) for n in (100, 1000, 3000, 20000)]
    found = fit(points)
    assert found == pytest.approx(law) and found.needed(0.65) == pytest.approx(10 ** (0.55 / 0.12))
    assert law(found.needed(0.4)) == pytest.approx(0.4)
    # Least squares, against the normal equations of a noisy curve.
    noisy = [(100, 0.2), (1000, 0.5), (10000, 0.4)]
    assert fit(noisy) == pytest.approx((1.1 / 3 - 3 * 0.1, 0.1))
    assert fit(points[:2]) is None and fit([points[0]] * 5) is None
    assert Fit(0.3, -0.01).needed(0.65) is None and Fit(0.1, 1e-3).needed(0.65) is None
    assert math.log10(Fit(0.0, 0.05).needed(0.7)) == pytest.approx(14)


def test_the_committed_grids_are_whole(tiny):
    """Every cell of every grid parses, goes with a model of as many blocks as the embedded one, and trains otherwise than all others."""
    grids = sorted((ROOT / "train" / "sweeps").glob("*.yaml"))
    assert {"corpus-size", "ablations-cpu", "ablations-gpu", "curve"} <= {path.stem for path in grids}
    base = tiny("smol", num_hidden_layers=30)
    for path in grids:
        grid = load_grid(path)
        grid["config"] = ROOT / grid["config"]
        assert grid["out"] == f"results/ablations/{path.stem}" and grid["about"]
        seen = set()
        for name in grid["cells"]:
            config = cell_config(grid, name)
            config.training_args["bf16"] = False
            config.training_args["output_dir"] = "out"  # each cell has one of its own
            parts = parse_config(config)
            sidecar = make_sidecar(config, parts, base)
            seen.add(repr((config.training_args, parts.mixture, parts.projection, parts.lora, sidecar)))
        assert len(seen) == len(grid["cells"])
    assert len(load_grid(ROOT / "train" / "sweeps" / "ablations-cpu.yaml")["cells"]) <= 10
