"""Ablations and learning curves:  python -m train.sweep GRID.yaml

A grid names a training config, overrides for all cells, and the cells, each with overrides of its own (written as for `train.decoder`):

    config: train/configs/smollm2-135m-instruct.yaml
    out: results/ablations/corpus-size
    about: Does a larger corpus make a better reader?
    set: {training_args.max_steps: 250}
    cells:
      a quarter: {mixture.controls: 0.25}
      all: {}
    curve: false        # true: every checkpoint is evaluated, for accuracy against examples seen

Each cell is trained, then evaluated on the validation split: `identify` under the fixed message, and the loss with one's own and with
another control's activations.  Its figures are one line of OUT/cells.jsonl.  Started again, the sweep goes on behind the last line, and
inside a cell behind its last checkpoint.  At the end OUT/README.md has the table, with intervals, and OUT/sweep.png the plot.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import yaml

from lqa.errors import LqaError

KEYS = {"config", "out", "about", "set", "cells", "curve", "runs", "limit"}


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
    cells = grid["cells"]
    if not isinstance(cells, dict) or not cells or not all(isinstance(c, dict) for c in [*cells.values(), grid.get("set", {})]):
        raise LqaError(f"{path}: cells must be a mapping of names to overrides (`{{}}` for none), and set a mapping.")
    return {"about": "", "set": {}, "curve": False, "runs": "runs/sweeps", "limit": None} | grid


def cell_config(grid: dict, name: str, folder: Path):
    """The training config of a cell that trains in `folder`."""
    from train.decoder import load_config

    changes = {**grid["set"], **grid["cells"][name], "training_args.output_dir": str(folder), "training_args.eval_strategy": "no"}
    return load_config(grid["config"], [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def run_cell(grid: dict, name: str) -> list[dict]:
    """Trains and evaluates one cell; its lines: one for the end of training, with `curve` one for every checkpoint."""
    from transformers.trainer_utils import get_last_checkpoint

    from train.decoder import build_trainer

    folder = Path(grid["runs"], Path(grid["out"]).name, name.replace(" ", "-").replace("/", "_"))
    config = cell_config(grid, name, folder)
    start = time.monotonic()
    trainer = build_trainer(config)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    trainer.save_model()
    training = trainer.current_config().training
    log = {key: entry[key] for entry in trainer.state.log_history for key in ("eval_true_loss", "eval_shuffled_loss") if key in entry}
    seconds = trainer.state.log_history[-1].get("train_runtime", time.monotonic() - start)
    base = trainer.base
    base.model.eval()
    del trainer
    folders = [folder]
    if grid["curve"]:
        folders = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    lines = []
    for place in folders:
        line = {"cell": name, "set": grid["cells"][name], "code": training["code"], "pairs": training["qa_pairs"]}
        if place != folder:
            line["pairs"] = round(training["qa_pairs"] * int(place.name.split("-")[1]) / training["steps"])
        lines.append(line | {"steps": training["steps"], "train_seconds": round(seconds), **log, **evaluate(place, grid["limit"])})
    return lines


def evaluate(folder: Path, limit: int | None) -> dict:
    """`identify` under the fixed message on the validation split, every row of its table."""
    from lqa.decoder import LatentDecoder
    from lqa.evals.data import corpus_items
    from lqa.evals.identify import identify

    items, _ = corpus_items("validation")
    result = identify(LatentDecoder.from_pretrained(folder), items[:limit], progress=lambda _: None)
    return {"m": result["m"], "identify": result["table"]}


def table(grid: dict, lines: list[dict]) -> str:
    """The sweep as Markdown."""
    first = lines[0]
    text = [f"# {Path(grid['out']).name}", "", grid["about"], ""]
    text += [f"`identify` on the validation split, fixed message, {first['m']} candidates, n = {first['identify']['ours']['n']}, with"]
    text += ["95 % bootstrap intervals. Loss gap: with another control's activations less with one's own, nats a token.", ""]
    text += ["| cell | pairs seen | accuracy | interval | none | shuffled | loss gap | training |", "|---|---|---|---|---|---|---|---|"]
    for line in lines:
        rows = line["identify"]
        gap = f"{line['eval_shuffled_loss'] - line['eval_true_loss']:.3f}" if "eval_true_loss" in line else ""
        ours = rows["ours"]
        text.append(
            f"| {line['cell']} | {line['pairs']:,} | {ours['accuracy']:.1%} | {ours['low']:.1%} to {ours['high']:.1%} | "
            f"{rows['none']['accuracy']:.1%} | {rows['shuffled']['accuracy']:.1%} | {gap} | {line['train_seconds'] / 60:.0f} min |"
        )
    return "\n".join([*text, ""])


def plot(grid: dict, lines: list[dict], path: Path) -> None:
    """Accuracy with intervals by cell; for a curve, against examples seen on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    for name in dict.fromkeys(line["cell"] for line in lines):
        own = [line for line in lines if line["cell"] == name]
        y = [line["identify"]["ours"] for line in own]
        error = [[r["accuracy"] - r["low"] for r in y], [r["high"] - r["accuracy"] for r in y]]
        x = [line["pairs"] for line in own] if grid["curve"] else [name]
        style = "o-" if grid["curve"] else "o"
        axes.errorbar(x, [r["accuracy"] for r in y], error, fmt=style, capsize=3, linewidth=1, label=name)
    axes.axhline(1 / lines[0]["m"], color="#888888", linestyle=":", label="chance")
    if grid["curve"]:
        axes.set(xscale="log", xlabel="question-answer pairs seen")
        axes.legend(frameon=False)
    axes.set(ylabel="identification accuracy", ylim=(0, 1))
    axes.grid(alpha=0.25)
    figure.autofmt_xdate(rotation=20)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def sweep(path: str | Path) -> list[dict]:
    """Runs the grid at `path` as far as it is not done; returns all its lines."""
    grid = load_grid(path)
    for name in grid["cells"]:
        cell_config(grid, name, Path("unused"))  # what is wrong with the last cell is said before the first is trained
    out = Path(grid["out"])
    out.mkdir(parents=True, exist_ok=True)
    file = out / "cells.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    for name in grid["cells"]:
        done = [line for line in lines if line["cell"] == name]
        if done and done[0]["set"] != grid["cells"][name]:
            raise LqaError(f"{file} has a cell {name!r} with other overrides; rename the cell, or remove its lines.")
        if done:
            continue
        print(f"sweep: {name}", file=sys.stderr)
        found = run_cell(grid, name)
        with file.open("a", encoding="utf-8") as journal:
            journal.write("".join(json.dumps(line) + "\n" for line in found))
        lines += found
    order = list(grid["cells"])
    lines = sorted((line for line in lines if line["cell"] in order), key=lambda line: order.index(line["cell"]))
    shutil.copyfile(path, out / "grid.yaml")
    (out / "README.md").write_text(table(grid, lines), encoding="utf-8")
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
