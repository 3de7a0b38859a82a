"""Ablations and learning curves:  python -m train.sweep GRID.yaml

A grid names a training config, overrides for all cells, and the cells, each with overrides of its own (written as for `train.decoder`):

    config: train/configs/smollm2-135m-instruct.yaml
    out: results/ablations/corpus-size
    about: Does a larger corpus make a better reader?
    set: {training_args.max_steps: 250}
    cells:
      a quarter: {mixture.controls: 0.25}
      all: {}
    curve: [50, 100]    # steps at which a cell is evaluated besides its end, for accuracy against examples seen (default: none)
    target: 0.65        # of a curve: the accuracy whose price in examples is wanted
    limit: 100          # at most so many validation items (default: all)
    runs: runs/sweeps   # where the training runs are kept

Each cell is trained, then evaluated on the validation split: `identify` under the fixed message, and the loss with one's own and with
another control's activations.  Its figures are lines of OUT/cells.jsonl.  Started again, the sweep goes on behind the last line, inside
a cell behind its last checkpoint, and inside an evaluation behind its last draw.  What is wrong with any cell is said before the first is
trained.  At the end OUT/README.md has the table, with intervals, and OUT/sweep.png the plot.

A curve is fitted with  accuracy = a + b log10(examples)  (least squares); the table says how many examples the target would take by it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import yaml

from lqa.errors import LqaError
from lqa.journal import Journal, write_whole

KEYS = {"config", "out", "about", "set", "cells", "curve", "target", "runs", "limit"}
SEED = 0  # of the draws of every evaluation


def load_grid(path: str | Path) -> dict:
    """The grid at `path`, checked.  Raises LqaError naming what is wrong."""
    try:
        grid = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise LqaError(f"The grid {path} cannot be read: {error}") from error
    if not isinstance(grid, dict) or not {"config", "out", "cells"} <= set(grid):
        raise LqaError(f"The grid {path} must be a mapping with config, out and cells.")
    if unknown := sorted(set(grid) - KEYS):
        raise LqaError(f"{path}: unknown key(s) {', '.join(unknown)}; known are {', '.join(sorted(KEYS))}.")
    grid = {"about": "", "set": {}, "curve": [], "target": None, "runs": "runs/sweeps", "limit": None} | grid
    cells, curve, target = grid["cells"], grid["curve"], grid["target"]
    if not isinstance(cells, dict) or not cells or not all(isinstance(c, dict) for c in [*cells.values(), grid["set"]]):
        raise LqaError(f"{path}: cells must be a mapping of names to overrides (`{{}}` for none), and set a mapping.")
    if not isinstance(curve, list) or not all(isinstance(step, int) and step > 0 for step in curve):
        raise LqaError(f"{path}: curve must be a list of steps, not {curve!r}.")
    if target is not None and not (isinstance(target, float) and 0 < target < 1):
        raise LqaError(f"{path}: target must be an accuracy between 0 and 1, not {target!r}.")
    return grid


def cell_config(grid: dict, name: str):
    """The training config of a cell."""
    from train.decoder import load_config

    folder = Path(grid["runs"], Path(grid["out"]).name, name.replace(" ", "-").replace("/", "_"))
    changes = {**grid["set"], **grid["cells"][name], "training_args.output_dir": str(folder)}
    config = load_config(grid["config"], [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    steps = config.training_args.get("max_steps")
    if not isinstance(steps, int) or steps < max([1, *grid["curve"]]):
        raise LqaError(f"The cell {name!r} has training_args.max_steps {steps!r}; set it, to the curve's last step at least.")
    # Evaluated at the end here, and where the curve says.
    config.training_args |= {"eval_strategy": "steps", "eval_steps": steps, "eval_on_start": False}
    return config


def check(grid: dict) -> None:
    """Raises LqaError for whatever is wrong with a cell, naming it."""
    from lqa.models import load_base
    from train.decoder import make_sidecar, parse_config

    bases = {}
    for name in grid["cells"]:
        try:
            config = cell_config(grid, name)
            parts = parse_config(config)
            if config.base not in bases:
                bases[config.base] = load_base(config.base)
            make_sidecar(config, parts, bases[config.base])
        except LqaError as error:
            raise LqaError(f"The cell {name!r}: {error}") from error


def _keeper(steps: Sequence[int], losses: dict[int, dict[str, float]]):
    """A callback that keeps the decoder as it is after each of `steps` in OUT/step-N, and its validation losses."""
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        trainer = None

        def on_step_end(self, args, state, control, **_):
            if state.global_step in steps:
                control.should_evaluate = True
                self.trainer.save_model(str(Path(args.output_dir, f"step-{state.global_step}")), _internal_call=True)

        def on_train_end(self, args, state, control, **_):
            for entry in state.log_history:  # that of a resumed run has the earlier entries too
                for name in ("true", "shuffled"):
                    if f"eval_{name}_loss" in entry:
                        losses.setdefault(entry["step"], {})[name] = entry[f"eval_{name}_loss"]

    return Keeper()


def run_cell(grid: dict, name: str) -> list[dict]:
    """Trains and evaluates one cell; its lines: one for every step of the curve and one for the end of training."""
    from transformers.trainer_utils import get_last_checkpoint

    from lqa.config import DecoderConfig
    from lqa.models import load_base
    from train.decoder import build_trainer

    config = cell_config(grid, name)
    folder, end = Path(config.training_args["output_dir"]), config.training_args["max_steps"]
    steps, losses = sorted({*grid["curve"], end}), {}
    _same_run(folder, asdict(config) | {"curve": grid["curve"]})
    keeper = _keeper(steps, losses)
    keeper.trainer = build_trainer(config, [keeper])
    keeper.trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    keeper.trainer = None
    base, lines = load_base(config.base), []
    for step in steps:
        place = folder / f"step-{step}"
        training = DecoderConfig.load(place).training
        line = {"cell": name, "set": grid["cells"][name], "code": training["code"], "steps": step, "pairs": training["qa_pairs"]}
        lines.append(line | {"loss": losses.get(step, {}), **evaluate(place, base, grid["limit"])})
    return lines


def _same_run(folder: Path, settings: dict) -> None:
    """Notes what is trained in `folder`.  Raises LqaError if something else was."""
    from train.decoder import TrainConfig

    file, unchanged = folder / "cell.json", asdict(TrainConfig())  # what an older version did not note yet is at its default
    if file.is_file() and unchanged | json.loads(file.read_text(encoding="utf-8")) != settings:
        raise LqaError(f"{folder} holds a run with other settings; remove it, or name another folder with runs.")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(settings, indent=1) + "\n")


def evaluate(folder: Path, base, limit: int | None) -> dict:
    """`identify` under the fixed message on the validation split: every reader's accuracy and gap with intervals."""
    from lqa.decoder import LatentDecoder
    from lqa.evals.data import corpus_items
    from lqa.evals.identify import M, fixed
    from lqa.evals.runner import decoder_digest
    from lqa.evals.suite import Job

    decoder = LatentDecoder.from_pretrained(folder, base=base)
    items, data = corpus_items("validation")
    settings = {"decoder": decoder_digest(decoder), "limit": limit, "seed": SEED, **data}
    with Journal(folder / "journal.jsonl", settings) as journal:
        job = Job("identify", decoder, journal, data=None, limit=limit, seed=SEED)
        table = fixed(job, job.limited(items))
        found = {reader: {"accuracy": asdict(row[0]), "gap": asdict(row[1])} for reader, row in table.rows.items()}
        return {"m": M, "data": data, "seconds": round(job.seconds), "identify": found}


# --- the curve --------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """accuracy = a + b log10(examples)."""

    a: float
    b: float

    def __call__(self, examples: float) -> float:
        return self.a + self.b * math.log10(examples)

    def needed(self, accuracy: float) -> float | None:
        """How many examples an accuracy takes; None if it does not grow with examples, or takes more than can be said (10^15)."""
        exponent = (accuracy - self.a) / self.b if self.b > 0 else math.inf
        return 10**exponent if exponent < 15 else None


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """The least squares fit of (examples, accuracy); None for fewer than three numbers of examples, which say nothing of a law."""
    if len({n for n, _ in points}) < 3:
        return None
    x, y = [math.log10(n) for n, _ in points], [accuracy for _, accuracy in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    b = sum((u - mean_x) * (v - mean_y) for u, v in zip(x, y, strict=True)) / sum((u - mean_x) ** 2 for u in x)
    return Fit(mean_y - b * mean_x, b)


def _curves(lines: list[dict]) -> dict[str, list[dict]]:
    return {name: [line for line in lines if line["cell"] == name] for name in dict.fromkeys(line["cell"] for line in lines)}


def _points(own: list[dict]) -> list[tuple[float, float]]:
    return [(line["pairs"], line["identify"]["ours"]["accuracy"]["mean"]) for line in own]


def _fit_notes(grid: dict, lines: list[dict]) -> list[str]:
    """A sentence for every curve: its fit, and the price of the target."""
    notes = []
    for name, own in _curves(lines).items():
        found = fit(_points(own))
        if found is None:
            notes.append(f"{name}: too few points for a fit; a curve needs three.")
            continue
        text = f"{name}: accuracy = {found.a:.3f} + {found.b:.3f} log10(examples), {found.b * math.log10(2):+.1%} a doubling."
        if grid["target"] is not None:
            needed, seen = found.needed(grid["target"]), max(line["pairs"] for line in own)
            if needed is None:
                text += f" By it {grid['target']:.0%} is out of reach."
            else:
                how = "seen" if needed <= seen else f"an extrapolation to {needed / seen:.1f} times what was seen"
                text += f" By it {grid['target']:.0%} takes {needed:,.0f} examples ({how})."
        notes.append(text)
    return notes


# --- the report -------------------------------------------------------------------------------------------------


def table(grid: dict, lines: list[dict]) -> str:
    """The sweep as Markdown."""
    first = lines[0]
    text = [f"# {Path(grid['out']).name}", "", grid["about"].strip(), ""]
    text += [f"`identify` on the validation split, fixed message, {first['m']} candidates (chance {1 / first['m']:.1%}), n = "]
    text[-1] += f"{first['identify']['ours']['accuracy']['n']}, with"
    text += ["95 % bootstrap intervals. Loss gap: with another control's activations less with one's own, nats a token."]
    text += ["`grid.yaml` is what was run; `python -m train.sweep` runs it again.", ""]
    text += ["| cell | examples seen | accuracy | interval | none | shuffled | loss gap |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        rows, loss = line["identify"], line["loss"]
        gap = f"{loss['shuffled'] - loss['true']:.3f}" if len(loss) == 2 else ""
        ours, none, shuffled = (rows[reader]["accuracy"] for reader in ("ours", "none", "shuffled"))
        text.append(
            f"| {line['cell']} | {line['pairs']:,} | {ours['mean']:.1%} | {ours['low']:.1%} to {ours['high']:.1%} | "
            f"{none['mean']:.1%} | {shuffled['mean']:.1%} | {gap} |"
        )
    text += ["", "![Accuracy](sweep.png)", ""]
    if grid["curve"]:
        text += [f"- {note}" for note in _fit_notes(grid, lines)] + [""]
    return "\n".join(text)


def plot(grid: dict, lines: list[dict], path: Path) -> None:
    """Accuracy with intervals by cell; of a curve, against examples seen on a log axis, with its fit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    for name, own in _curves(lines).items():
        y = [line["identify"]["ours"]["accuracy"] for line in own]
        error = [[r["mean"] - r["low"] for r in y], [r["high"] - r["mean"] for r in y]]
        x = [line["pairs"] for line in own] if grid["curve"] else [name]
        drawn = axes.errorbar(x, [r["mean"] for r in y], error, fmt="o", capsize=3, linewidth=1, label=name)
        if grid["curve"] and (found := fit(_points(own))):
            reach = [min(x), max(x)]
            if grid["target"] is not None and (needed := found.needed(grid["target"])) is not None:
                reach[1] = min(max(reach[1], needed), 100 * reach[1])
            axes.plot(reach, [found(n) for n in reach], linestyle="--", linewidth=1, color=drawn[0].get_color())
    axes.axhline(1 / lines[0]["m"], color="#888888", linestyle=":", label="chance")
    if grid["curve"]:
        axes.set(xscale="log", xlabel="examples seen")
        if grid["target"] is not None:
            axes.axhline(grid["target"], color="#888888", linestyle="-.", linewidth=1, label="target")
        axes.legend(frameon=False)
    axes.set(ylabel="identification accuracy", ylim=(0, 1))
    axes.grid(alpha=0.25)
    figure.autofmt_xdate(rotation=20)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _load_lines(file: Path) -> list[dict]:
    """The lines of whole cells: a kill may have cut the last line short."""
    data = file.read_text(encoding="utf-8") if file.is_file() else ""
    try:
        return [json.loads(line) for line in data[: data.rfind("\n") + 1].splitlines()]
    except json.JSONDecodeError as error:
        raise LqaError(f"{file} is damaged ({error}); remove that line.") from error


def sweep(path: str | Path) -> list[dict]:
    """Runs the grid at `path` as far as it is not done; returns all its lines."""
    grid = load_grid(path)
    out = Path(grid["out"])
    file = out / "cells.jsonl"
    lines = _load_lines(file)
    for line in lines:
        if line["cell"] in grid["cells"] and line["set"] != grid["cells"][line["cell"]]:
            raise LqaError(f"{file} has a cell {line['cell']!r} with other overrides; rename the cell, or remove its lines.")
    missing = [name for name in grid["cells"] if name not in {line["cell"] for line in lines}]
    if missing:
        check(grid)
    out.mkdir(parents=True, exist_ok=True)
    for name in missing:
        print(f"sweep: {name}", file=sys.stderr, flush=True)
        lines += run_cell(grid, name)
        write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))  # a cell's lines are there all or none
    order = list(grid["cells"])
    lines = sorted((line for line in lines if line["cell"] in order), key=lambda line: order.index(line["cell"]))
    if Path(path).resolve() != (out / "grid.yaml").resolve():
        shutil.copyfile(path, out / "grid.yaml")
    write_whole(out / "README.md", table(grid, lines))
    plot(grid, lines, out / "sweep.png")
    return lines


def main(argv: list[str] | None = None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m train.sweep", description=__doc__, formatter_class=plain)
    parser.add_argument("grid", metavar="GRID.yaml", help="see train/sweeps/")
    options = parser.parse_args(argv)
    try:
        lines = sweep(options.grid)
    except LqaError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(load_grid(options.grid), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
