"""Downloads from the Hub: the files that a loader needs and no others, from the cache when offline; every failure one sentence."""

from __future__ import annotations

from pathlib import Path

from lqa.errors import LqaError

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
DECODER_FILES = (*ADAPTER_FILES, "lqa_config.json", "projection.safetensors")
STEERING_FILES = (*ADAPTER_FILES, "lqa_steering.json")
PICKLE = "adapter_model.bin"  # PEFT's older format of an adapter; never downloaded


def download(
    repo_id: str, files: tuple[str, ...], *, revision: str | None = None, subfolder: str | None = None, what: str = "decoder"
) -> Path:
    """The local folder of a model repository's snapshot, with those of `files` that it has (in `subfolder`, if given).

    Raises LqaError if there is no such repository or revision, it may not be read, or neither network nor cache has it; also if it holds
    an adapter as a pickle, whose loading may run code.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    names = {f"{subfolder}/{name}" if subfolder else name: name for name in (*files, PICKLE)}
    wanted = [path for path, name in names.items() if name != PICKLE]
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client, its transport and the file system each have their own classes
        raise LqaError(explain(error, f"{what} {repo_id!r}", repo_id, revision) or _first_line(error, f"{what} {repo_id!r}")) from error
    try:  # what the client has just noted down; no further request
        held = {file.path for file in get_cached_repo_tree(repo_id, revision=folder.name)}
    except CachedRepoTreeNotFoundError:
        held = set()
    if pickles := [path for path, name in names.items() if name == PICKLE and path in held]:
        raise LqaError(
            f"The {what} {repo_id!r} holds a pickle ({pickles[0]}), which may run code and may be another adapter; only safetensors load, "
            "name a revision without it."
        )
    return folder


def causes(error: BaseException) -> list[BaseException]:
    """The error and what led to it, nearest first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def explain(error: BaseException, what: str, repo_id: str, revision: str | None = None) -> str | None:
    """A sentence for what the Hub's client raised, looked for along the chain of causes; None if it is nothing of the Hub's."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = causes(error)

    def found(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if found(HFValidationError):
        return f"The {what} is neither a folder here nor a Hub id (owner/name)."
    if found(GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        return f"The {what} is gated: accept its terms at {page}, then log in with `hf auth login` (or set HF_TOKEN) and try again."
    if found(RevisionNotFoundError):
        return f"The {what} has no revision {revision!r}; name a branch, tag or commit that {constants.ENDPOINT}/{repo_id} shows."
    if found(RepositoryNotFoundError):
        return (
            f"The {what} is neither a folder here nor a repository on the Hub that you may read; check its name, and log in with "
            "`hf auth login` if it is private."
        )
    if found(IncompleteSnapshotError):
        return f"The {what} is only partly in the cache and the Hub cannot be reached; load it once with a network."
    if found(LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.TransportError):
        at = f" at the revision {revision!r}" if revision else ""
        return f"The {what}{at} is not a folder here, not in the cache, and the Hub cannot be reached; load it once with a network."
    return None


def _first_line(error: BaseException, what: str) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"The {what} cannot be had from the Hub: {lines[0]}"
