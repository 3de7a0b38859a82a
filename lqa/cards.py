"""Cards: README.md of what goes to the Hub, rendered from the templates in hub_cards/ and from files, never by hand; checked offline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from lqa.config import DecoderConfig
from lqa.decoder import EMBEDDED_DECODER
from lqa.errors import LqaError

CARDS = Path(__file__).parent.parent / "hub_cards"  # in a clone and beside the installed package alike
TRAINING_LOG = "training_log.json"
LOSS_PLOT = "loss.png"
DATASET_PLACE = "PATH_OR_ID"  # in a dataset's card, until it is known where the dataset will be
LEFTOVERS = ("[More Information Needed]", DATASET_PLACE, "<built-in", " object at 0x")


def render_card(template: str, **values) -> str:
    """A template of hub_cards/ filled in.  A value that it names and is not given is an error, not an empty place."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(CARDS), undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(template).render(values)


def with_results(config: DecoderConfig, results: str | Path) -> DecoderConfig:
    """The sidecar with the metrics of a results folder.  Raises LqaError if the folder is another decoder's."""
    from lqa.evals.report import load, metrics

    for document in load(results).values():
        about = document["provenance"]
        measured = about.get("model", {}).get("fingerprint"), about["decoder"].get("training")
        if measured != (config.base["fingerprint"], config.training):
            raise LqaError(f"{results} holds the results of another decoder; evaluate this one: `python -m lqa eval identify --out DIR`.")
    return replace(config, metrics=metrics(results))


def decoder_card(
    folder: str | Path,
    config: DecoderConfig | None = None,
    *,
    repo_id: str | None = None,
    name: str | None = None,
    dataset: str | None = None,
    results: str | None = None,
) -> str:
    """The card of a decoder folder, from its sidecar (metrics included), training log and plot.

    config    the sidecar, if not the one in the folder;  repo_id: where it will be, for the snippet, which else loads the embedded decoder
              or the folder;  name: its title;  dataset: the corpus's id on the Hub;  results: a file beside the card with all the figures
    """
    from huggingface_hub import EvalResult, ModelCardData

    from lqa.evals.identify import M
    from lqa.evals.report import card_tables

    folder = Path(folder)
    config = config or DecoderConfig.load(folder)
    name, base = name or (folder.resolve().name if repo_id is None else repo_id.split("/")[-1]), config.base["name"]
    embedded = folder.resolve() == EMBEDDED_DECODER.resolve()
    source = repo_id or ("" if embedded else f"decoders/{name}")
    evaluations = None
    if identify := config.metrics.get("identify"):
        evaluations = [
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
    data = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="peft",
        base_model=base,
        base_model_relation="adapter",
        pipeline_tag="text-generation",
        datasets=[dataset] if dataset else None,
        metrics=["accuracy"] if evaluations else None,
        tags=["latentqa", "lora", "interpretability", "activation-patching", "trl", "sft", "arxiv:2412.08686"],
        model_name=name if evaluations else None,
        eval_results=evaluations,
    )
    log = folder / TRAINING_LOG
    return render_card(
        "decoder.md",
        card_data=data.to_yaml(),
        name=name,
        source=f'"{source}"' if source else "",
        base=base,
        weights=config.base.get("weights", {}),
        config=config,
        training=config.training,
        log=_validation_rows(json.loads(log.read_text(encoding="utf-8"))) if log.is_file() else [],
        plot=LOSS_PLOT if (folder / LOSS_PLOT).is_file() else None,
        metrics=card_tables(config.metrics),
        dataset=dataset,
        results=results,
    )


def write_decoder_card(folder: str | Path, repo_id: str | None = None, name: str | None = None) -> Path:
    """Writes the card of a decoder folder into it; `repo_id` and `name` as in `decoder_card`."""
    path = Path(folder, "README.md")
    path.write_text(decoder_card(folder, repo_id=repo_id, name=name), encoding="utf-8")
    return path


def _validation_rows(log: list[dict]) -> list[dict]:
    """[{"step", "true", "shuffled"}] of a training log, where both losses were taken."""
    rows: dict[int, dict] = {}
    for entry in log:
        for source in ("true", "shuffled"):
            if (loss := entry.get(f"eval_{source}_loss")) is not None:
                rows.setdefault(entry["step"], {"step": entry["step"]})[source] = loss
    return [row for row in rows.values() if {"true", "shuffled"} <= set(row)]


def steering_card(folder: str | Path, sidecar: dict, sidecar_file: str, repo_id: str) -> str:
    """The card of a steering folder, from its sidecar (the JSON in `sidecar_file`) and its adapter config."""
    from huggingface_hub import ModelCardData

    adapter = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    data = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="peft",
        base_model=adapter["base_model_name_or_path"],
        base_model_relation="adapter",
        pipeline_tag="text-generation",
        tags=["latentqa", "steering", "lora", "interpretability", "arxiv:2412.08686"],
    )
    plain = {k: v for k, v in (sidecar | sidecar.get("settings", {})).items() if isinstance(v, str | int | float)}
    figures = {k: v for k, v in plain.items() if k not in ("control", "schema_version")}
    about = {"name": repo_id.split("/")[-1], "repo_id": repo_id, "adapter": adapter, "sidecar": sidecar, "sidecar_file": sidecar_file}
    embedded = sidecar["decoder"] == EMBEDDED_DECODER.name
    about |= {"effect": sidecar.get("effect"), "figures": figures, "source": "" if embedded else f'"{sidecar["decoder"]}"'}
    return render_card("steering.md", card_data=data.to_yaml(), **about)


def dataset_card(folder: str | Path, repo_id: str) -> str:
    """The card that `python -m lqa data build` has written into a dataset folder, with its snippet loading from `repo_id`."""
    return Path(folder, "README.md").read_text(encoding="utf-8").replace(DATASET_PLACE, repo_id)


def space_card(folder: str | Path, repo_id: str) -> str:
    """The Space's README: the front matter of the repository's over a short text of its own."""
    data = check_card(Path(folder, "README.md").read_text(encoding="utf-8"), "space").data
    return render_card("space.md", card_data=data.to_yaml(), title=data.get("title"), repo_id=repo_id)


def check_card(text: str, repo_type: str):
    """The card as the client's object.  Raises LqaError for one that is not finished or that the Hub would refuse; needs no network (the
    object's `validate` asks the Hub itself)."""
    from huggingface_hub import DatasetCard, ModelCard, SpaceCard, constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        card = {"model": ModelCard, "dataset": DatasetCard, "space": SpaceCard}[repo_type](text)
    except Exception as error:  # YAML's errors and the client's own ValueErrors
        raise LqaError(f"The card's front matter is not valid: {str(error).splitlines()[0]}") from error
    data = card.data.to_dict()
    needed = {
        "model": ("license", "base_model", "library_name", "pipeline_tag", "tags"),
        "dataset": ("license", "language", "task_categories", "size_categories", "configs", "tags"),
        "space": ("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "app_file", "license"),
    }[repo_type]
    if missing := [key for key in needed if not data.get(key)]:
        raise LqaError(f"The card of this {repo_type} lacks {', '.join(missing)} in its front matter; write them, or render it again.")
    if found := next((mark for mark in LEFTOVERS if mark in text), None):
        raise LqaError(f"The card of this {repo_type} still holds {found!r}; render it again.")
    for repo in filter(None, [data.get("base_model"), *data.get("datasets", []), *data.get("models", [])]):
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise LqaError(f"The card names {repo!r}, which is no Hub id (owner/name).") from error
    if (base := data.get("base_model")) and Path(base).exists():
        raise LqaError(f"The card names the base model {base!r}, a folder of this machine; train from a Hub id, or mend the sidecar.")
    if repo_type == "space" and data["sdk"] not in constants.SPACES_SDK_TYPES:
        raise LqaError(f"The card names the sdk {data['sdk']!r}; a Space has one of {', '.join(constants.SPACES_SDK_TYPES)}.")
    return card
