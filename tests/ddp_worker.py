"""Run by test_trainer under torchrun: trains a tiny Llama for a few steps and writes its losses.  python ddp_worker.py OUT BATCH"""

import json
import os
import sys
from pathlib import Path

from conftest import example, make_config, make_trainer, tiny_base


def main(out: str, batch: int) -> None:
    base = tiny_base("llama")
    rows = [example(i, ["turn:-1", "all", "last:3"][i % 3], i % 2, qa=1 + i % 3, patched=i % 4 != 3) for i in range(16)]
    trainer = make_trainer(base, make_config(base), out, rows, per_device_train_batch_size=batch, max_steps=3)
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = {n: p.double().sum().item() for n, p in trainer.model.named_parameters() if "lora_B" in n}
        Path(out, "losses.json").write_text(json.dumps([int(os.environ.get("WORLD_SIZE", "1")), losses, weights]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
