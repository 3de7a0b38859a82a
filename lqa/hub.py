"""The Hub: downloading decoders, and the cards that go with them (templates in hub_cards/, filled from files and never by hand)."""

from __future__ import annotations

import json
from pathlib import Path

from lqa.conditioning import PROJECTION
from lqa.config import SIDECAR, DecoderConfig
from lqa.decoder import EMBEDDED_DECODER
from lqa.errors import LqaError

CARDS = Path(__file__).parent.parent / "hub_cards"
DECODER_FILES = ("adapter_model.safetensors", "adapter_config.json", SIDECAR, PROJECTION)
TRAINING_LOG = "training_log.json"
LOSS_PLOT = "loss.png"


def download_decoder(repo_id: str, revision: str | None = None) -> Path:
    """The local folder of a decoder on the Hub (only what loading needs; the cache when offline).  Raises LqaError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(DECODER_FILES)))
    except HFValidationError as error:
        raise LqaError(f"{repo_id!r} is neither a folder here nor a Hub id (owner/name).") from error
    except Exception as error:  # offline, no such repository or revision, gated: the client's messages say which
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LqaError(f"The decoder {repo_id!r} is not a folder here and cannot be had from the Hub: {reason}") from error


def write_decoder_card(folder: str | Path, repo_id: str | None = None, name: str | None = None) -> Path:
    """Renders README.md of a decoder folder from its sidecar (metrics included), training log and plot.

    `repo_id`: where it will be on the Hub, for the snippet, which else loads the embedded decoder or the folder; `name`: its title.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from lqa.evals.identify import M
    from lqa.evals.report import card_tables

    folder = Path(folder)
    config = DecoderConfig.load(folder)
    name, base = name or (folder.resolve().name if repo_id is None else repo_id.split("/")[-1]), config.base["name"]
    embedded = folder.resolve() == EMBEDDED_DECODER.resolve()
    source = repo_id or ("" if embedded else f"decoders/{name}")
    metrics, results = config.metrics, None
    if identify := metrics.get("identify"):
        results = [
            EvalResult(
                task_type="question-answering",
                task_name="LatentQA identify",
                dataset_type="latentqa",
                dataset_name=f"{identify['data']}, {part} message",
                dataset_config=f"{part} message",  # results of one dataset and config would be merged
                metric_type="accuracy",
                metric_name=f"accuracy among {M}",
                metric_value=round(identify["tables"][part]["rows"]["ours"][0]["mean"], 4),
            )
            for part in ("fixed", "own")
        ]
    card_data = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="peft",
        base_model=base,
        base_model_relation="adapter",
        pipeline_tag="text-generation",
        tags=["latentqa", "lora", "interpretability", "activation-patching", "trl", "sft", "arxiv:2412.08686"],
        model_name=name if results else None,
        eval_results=results,
    )
    log = folder / TRAINING_LOG
    validation = _validation_rows(json.loads(log.read_text(encoding="utf-8"))) if log.is_file() else []
    card = ModelCard.from_template(
        card_data,
        template_path=str(CARDS / "decoder.md"),
        name=name,
        source=f'"{source}"' if source else "",
        base=base,
        weights=config.base.get("weights", {}),
        config=config,
        training=config.training,
        log=validation,
        plot=LOSS_PLOT if (folder / LOSS_PLOT).is_file() else None,
        metrics=card_tables(metrics),
    )
    path = folder / "README.md"
    path.write_text(str(card), encoding="utf-8")
    return path


def _validation_rows(log: list[dict]) -> list[dict]:
    """[{"step", "true", "shuffled"}] of a training log, where both losses were taken."""
    rows: dict[int, dict] = {}
    for entry in log:
        for source in ("true", "shuffled"):
            if (loss := entry.get(f"eval_{source}_loss")) is not None:
                rows.setdefault(entry["step"], {"step": entry["step"]})[source] = loss
    return [row for row in rows.values() if {"true", "shuffled"} <= set(row)]
