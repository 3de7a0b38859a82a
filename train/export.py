"""From a training run to a decoder folder:  python -m train.export RUN OUT [--results DIR]

Writes the adapter in 16 bit, the sidecar, the training log, the loss plot and the card.  With `--results`, a folder that
`python -m lqa eval` wrote, its figures go into sidecar and card; `python -m lqa eval tables DIR --decoder OUT` does that alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lqa.cards import LOSS_PLOT, TRAINING_LOG, with_results, write_decoder_card
from lqa.conditioning import MAPPED, PROJECTION, Projection
from lqa.config import DecoderConfig
from lqa.errors import LqaError


def plot_losses(log: list[dict], path: Path) -> None:
    """Training loss over steps, and the validation losses with one's own and with another control's activations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    train = [(e["step"], e["loss"]) for e in log if "loss" in e]
    axes.plot(*zip(*train, strict=True), color="#9db4c0", linewidth=1, label="training")
    for source, colour, label in (
        ("true", "#0b6e4f", "validation, own activations"),
        ("shuffled", "#c1440e", "validation, another control's"),
    ):
        points = [(e["step"], e[f"eval_{source}_loss"]) for e in log if f"eval_{source}_loss" in e]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def export(run: Path, out: Path, results: Path | None = None) -> None:
    """Makes the decoder folder `out` from `run`.  Raises LqaError if `run` is not a finished run."""
    adapter, state = run / "adapter_model.safetensors", run / "trainer_state.json"
    if not adapter.is_file() or not state.is_file():
        raise LqaError(f"{run} is not a finished training run (no adapter_model.safetensors or trainer_state.json).")
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: t.to(torch.float16) for k, t in load_file(adapter).items()}, out / adapter.name, metadata={"format": "pt"})
    shutil.copy(run / "adapter_config.json", out / "adapter_config.json")
    config = DecoderConfig.load(run)
    if config.conditioning in MAPPED:
        width = next(iter(load_file(run / PROJECTION).values())).shape[0]
        Projection.load(run, config.maps, width, config.conditioning, config.projection).save(out, torch.float16)
        config = replace(config, projection=Projection.load(out, config.maps, width, config.conditioning).digest())
    if results is not None:
        config = with_results(config, results)
    config.save(out)
    log = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    lines = ",\n".join(" " + json.dumps({k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}) for entry in log)
    (out / TRAINING_LOG).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    plot_losses(log, out / LOSS_PLOT)
    write_decoder_card(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.export", description="Make a decoder folder from a training run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--results", type=Path, help="a folder that `python -m lqa eval` wrote")
    options = parser.parse_args(argv)
    try:
        export(options.run, options.out, options.results)
    except (LqaError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
