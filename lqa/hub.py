"""Publishing: a decoder, steering, dataset or Space becomes one commit of its repository on the Hub.

Built on huggingface_hub's own client.  Large files go first and one commit makes all of them visible, so that a reader sees the old state
or the new one and nothing between; what has arrived is not sent again, so that a push that broke off is simply repeated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from lqa import cards
from lqa.config import SIDECAR, DecoderConfig
from lqa.decoder import EMBEDDED_DECODER
from lqa.download import ADAPTER_FILES, DECODER_FILES, PICKLE, STEERING_FILES, causes, explain
from lqa.errors import LqaError

README = "README.md"
STEERING_SIDECAR = STEERING_FILES[-1]
HARDWARE = "zero-a10g"  # the API's name for ZeroGPU; asked for when a Space is created
# What the package consists of (package-data of pyproject.toml).
SOURCE_TYPES = {".py", ".yaml", ".json", ".jsonl", ".md", ".js", ".css", ".svg"}
RESULTS = "results"


@dataclass(frozen=True)
class Kind:
    """What one kind of thing publishes: files of its folder by pattern (those in `required` must be there), and a card.

    make   (folder, repo_id, options) -> {path in the repository: content}, README.md among them; what it gives replaces files of the folder
    """

    repo_type: str
    required: tuple[str, ...]
    patterns: tuple[str, ...]
    make: Callable[[Path, str, dict], dict[str, str]]


def _decoder(folder: Path, repo_id: str, options: dict) -> dict[str, str]:
    config = DecoderConfig.load(folder)
    _check_adapter(folder, config.base["name"])
    made = {}
    if results := options.get("results"):
        config = cards.with_results(config, results)
        made |= {f"{RESULTS}/{path.name}": path.read_text(encoding="utf-8") for path in sorted(Path(results).glob("*.json"))}
    made[SIDECAR] = json.dumps(asdict(config), indent=2, ensure_ascii=False) + "\n"
    about = {"dataset": options.get("dataset"), "results": f"{RESULTS}/" if results else None}
    return made | {README: cards.decoder_card(folder, config, repo_id=repo_id, **about)}


def _steering(folder: Path, repo_id: str, options: dict) -> dict[str, str]:
    try:
        sidecar = json.loads((folder / STEERING_SIDECAR).read_text(encoding="utf-8"))
        base = sidecar["base"]["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise LqaError(f"{folder / STEERING_SIDECAR} is malformed ({error!r}); make the steering again.") from error
    _check_adapter(folder, base)
    text = json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n"
    return {STEERING_SIDECAR: text, README: cards.steering_card(folder, sidecar, STEERING_SIDECAR, repo_id)}


def _dataset(folder: Path, repo_id: str, options: dict) -> dict[str, str]:
    return {README: cards.dataset_card(folder, repo_id)}


def _space(folder: Path, repo_id: str, options: dict) -> dict[str, str]:
    return {README: cards.space_card(folder, repo_id)}


KINDS = {
    "decoder": Kind("model", (*ADAPTER_FILES, SIDECAR), (*DECODER_FILES, cards.TRAINING_LOG, cards.LOSS_PLOT, "LICENSE"), _decoder),
    "steering": Kind("model", STEERING_FILES, (*STEERING_FILES, "LICENSE"), _steering),
    "dataset": Kind("dataset", (README,), ("*.png", "*/*.parquet", "LICENSE"), _dataset),
    "space": Kind(
        "space",
        (README, "app.py", "requirements.txt", "lqa/__init__.py", f"decoders/{EMBEDDED_DECODER.name}/{SIDECAR}"),
        ("app.py", "requirements.txt", "LICENSE", "lqa/*", f"decoders/{EMBEDDED_DECODER.name}/*", "steerings/*"),
        _space,
    ),
}


def _check_adapter(folder: Path, base: str | None = None) -> None:
    """Raises LqaError for weights that a reader would be refused: a pickle beside them, damaged ones, another base than the sidecar's."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / PICKLE).exists():
        raise LqaError(f"{folder} holds a pickle ({PICKLE}) beside the safetensors; delete it, or nobody could load the repository.")
    try:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        tensors = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise LqaError(f"The adapter in {folder} is damaged ({error}); download or train it again.") from error
    if base is not None and named != base:
        raise LqaError(f"adapter_config.json names the base {named!r}, the sidecar {base!r}; write the right one into both.")
    if bad := next((name for name, t in tensors.items() if not torch.isfinite(t).all()), None):
        raise LqaError(f"The adapter in {folder} is damaged: the tensor {bad} is not finite; train it again.")


@dataclass(frozen=True)
class Push:
    """What is published, or would be: `files` {path in the repository: its content, or the local file}, the `card`; then where it is."""

    kind: str
    repo_id: str
    files: dict[str, Path | bytes]
    url: str | None = None  # None: nothing was sent
    commit: str | None = None
    changed: bool = False

    @property
    def card(self) -> str:
        return self.files[README].decode()

    def sizes(self) -> dict[str, int]:
        return {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in sorted(self.files.items())}


def prepare(kind: str, path: str | Path, repo_id: str, *, results: str | None = None, dataset: str | None = None) -> Push:
    """All that `push` would send, made and checked without a network.

    results  for a decoder: a folder that `python -m lqa eval identify` wrote, whose figures go into sidecar and card
    dataset  for a decoder: the id of the corpus on the Hub

    Raises LqaError for an id that is none, a folder that lacks a file, weights or results that are not right, or a card that is not valid.
    """
    if kind not in KINDS:
        raise LqaError(f"{kind!r} cannot be pushed; name one of {', '.join(KINDS)}.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise LqaError(f"{repo_id!r} is not a Hub id; write it as owner/name.")
    if kind != "decoder" and (results or dataset):
        raise LqaError(f"--results and --dataset go into a decoder's card, not a {kind}'s; leave them out.")
    what, folder = KINDS[kind], Path(path)
    if missing := [name for name in what.required if not (folder / name).is_file()]:
        raise LqaError(f"{folder} is not a {kind}: it has no {missing[0]}.")
    files: dict[str, Path | bytes] = {name: folder / name for name in _own(what, folder)}
    files |= {name: text.encode() for name, text in what.make(folder, repo_id, {"results": results, "dataset": dataset}).items()}
    plan = Push(kind, repo_id, files)
    cards.check_card(plan.card, what.repo_type)
    return plan


def _own(kind: Kind, folder: Path) -> list[str]:
    """The files of `folder` that this kind publishes."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] if kind.repo_type != "space" else _sources(folder)
    return sorted(name for name in names if _published(kind, name))


def _sources(folder: Path) -> list[str]:
    """A clone's files, without walking through its virtual environment and runs; of the package its sources alone."""
    names = [p.name for p in folder.iterdir() if p.is_file()]
    for part in ("lqa", "decoders", "steerings"):
        names += [p.relative_to(folder).as_posix() for p in (folder / part).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return [name for name in names if not name.startswith("lqa/") or Path(name).suffix in SOURCE_TYPES]


def _published(kind: Kind, name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in kind.patterns)


def push(
    kind: str, path: str | Path, repo_id: str, *, private: bool = False, results: str | None = None, dataset: str | None = None
) -> Push:
    """Publishes a folder as one commit; nothing if the repository holds just that already.  Files of an earlier push that are no longer
    among them go away with the same commit; what others have put there stays.

    private   a new repository is made private; an existing one must be

    Raises LqaError as `prepare` does, and for no token or one that may not write, a Hub that cannot be reached, an upload that broke off.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    plan = prepare(kind, path, repo_id, results=results, dataset=dataset)
    what, api = KINDS[kind], HfApi()
    space = {"space_sdk": "gradio", "space_hardware": HARDWARE} if what.repo_type == "space" else {}
    where = {"repo_id": repo_id, "repo_type": what.repo_type}
    try:
        token = api.whoami().get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise LqaError("The token in use may only read; make one that may write, and log in with it: `hf auth login --force`.")
        _validate(plan.card, what.repo_type)
        api.create_repo(**where, private=private or None, exist_ok=True, **space)
        before = api.repo_info(**where)
        if private and not before.private:
            raise LqaError(f"{repo_id} exists and is public; make it private on the Hub, or push without --private.")
        stale = [f.rfilename for f in before.siblings if f.rfilename not in plan.files and _stale(what, f.rfilename)]
        operations = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in sorted(plan.files.items())]
        operations += [CommitOperationDelete(name) for name in stale]
        # On top of what was looked at just now, or not at all: two pushes at once do not mix.
        commit = api.create_commit(**where, operations=operations, commit_message=f"Push {kind}", parent_commit=before.sha)
    except LqaError:
        raise
    except Exception as error:  # the client, its transport and its upload threads each have their own classes
        raise LqaError(_reason(error, kind, repo_id)) from error
    prefix = "" if what.repo_type == "model" else f"{what.repo_type}s/"
    return Push(kind, repo_id, plan.files, f"{api.endpoint}/{prefix}{repo_id}", commit.oid, commit.oid != before.sha)


def _validate(card: str, repo_type: str) -> None:
    """By the Hub's own rules, before it holds anything."""
    try:
        cards.check_card(card, repo_type).validate(repo_type)
    except ValueError as error:  # its answer as JSON
        if isinstance(error, LqaError):
            raise
        found = re.findall(r'"message":\s*("(?:[^"\\]|\\.)*")', str(error))
        raise LqaError(f"The Hub does not accept the card: {'; '.join(map(json.loads, found)) or error}") from error


def _stale(kind: Kind, name: str) -> bool:
    """Whether a file in the repository is one that a push of this kind put there; a pickle of the adapter counts, as readers refuse it."""
    return _published(kind, name) or (kind.repo_type == "model" and (name == PICKLE or name.startswith(f"{RESULTS}/")))


def _reason(error: Exception, kind: str, repo_id: str) -> str:
    """Why a push failed, and what to do."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    chain = causes(error)
    status = next((e.response.status_code for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None), None)
    if any(isinstance(e, LocalTokenNotFoundError) for e in chain):
        return "There is no Hub token on this machine; log in with `hf auth login`, or set HF_TOKEN."
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or look at what would be sent with --dry-run."
    if status == 401:
        return "The Hub does not accept the token in use; log in again with `hf auth login --force` (a set HF_TOKEN takes precedence)."
    if status in (402, 403):
        gpu = f" (or may not use the hardware {HARDWARE}: create the Space by hand, then push again)" if kind == "space" else ""
        return f"The token in use may not write to {repo_id}{gpu}; use one that may, or another owner."
    if status == 412:
        return f"{repo_id} was changed by somebody else in the meantime and is as they left it; push again."
    if any(isinstance(e, httpx2.TransportError) for e in chain) or (status or 0) >= 500:
        return f"The connection to the Hub broke off and {repo_id} is as it was; push again, what has arrived is not sent twice."
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return explain(error, f"{kind} {repo_id!r}", repo_id) or f"{repo_id} could not be pushed and is as it was: {' '.join(lines)}"
