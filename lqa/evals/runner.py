"""Runs suites and writes a results folder (lqa.evals.report says what is in it).

While it runs, finished work stands in OUT/journal.jsonl; killed and started again, the same command goes on there and gives the numbers
of an unbroken run.  When all suites are done the journal is removed: SUITE.json then holds every item.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lqa import corpus
from lqa.activations import Passes
from lqa.conditioning import PROJECTION
from lqa.config import SIDECAR
from lqa.decoder import LatentDecoder
from lqa.errors import LqaError
from lqa.evals import data, report
from lqa.evals.suite import Job
from lqa.journal import Journal, write_whole
from lqa.provenance import code_version

READING = ("identify", "open", "system-prompts", "relations", "sensitivity", "calibration")
STEERING = ("steer-persona", "generalise", "crows-pairs", "inversion", "steer-curve")
SUITES = (*READING, *STEERING)
MADE = "made"  # where in OUT the suites of steering keep what their methods trained


def suite_module(name: str):
    """The module of a suite: `run(job) -> Result`, and `check(folder)` where data can be found wanting before anything is computed."""
    if name not in SUITES:
        raise LqaError(f"The suite {name!r} is unknown; the suites are {', '.join(SUITES)}.")
    path = f"lqa.evals.{name.replace('-', '_')}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name == path:
            raise LqaError(f"The suite {name!r} is not part of this version of lqa.") from error
        if error.name is None or error.name.split(".")[0] == "lqa":
            raise
        raise LqaError(f"The suite {name!r} needs the package {error.name}; run `pip install 'lqa[train]'`.") from error


def decoder_digest(decoder: LatentDecoder) -> str:
    """A sha256 of what decides a decoder's answers: the adapter, the projection, the sidecar without its metrics."""
    total = hashlib.sha256()
    for name in ("adapter_model.safetensors", PROJECTION):
        path = Path(decoder.folder, name)
        total.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"-")
    sidecar = json.loads(Path(decoder.folder, SIDECAR).read_text(encoding="utf-8"))
    total.update(json.dumps(sidecar | {"metrics": {}}, sort_keys=True).encode())
    return total.hexdigest()


def run(
    suites: Sequence[str],
    out: str | Path,
    *,
    folder: str | Path | None = None,
    decoder_source: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    sweep: bool = False,
    text_only_trained: str | None = None,
    rows: Sequence[str] = (),
    methods: Sequence[str] = (),
    examples: int | None = None,
) -> dict[str, dict]:
    """Runs `suites` on a decoder and writes `out`; returns {suite: document}.

    folder  outside data, None for the package's own
    rows    fakes that get a row of their own: "random" and "untrained" (lqa.evals.fakes), or a decoder's folder
    methods   of lqa.evals.methods, for the suites of steering; none: all.  "unsteered" is always among them
    examples  the budget of each method that is trained; None: the steering's own

    Raises LqaError for an unknown suite, missing data, a limit below 1, or an `out` begun with other settings; nothing is computed before
    all of that is checked.
    """
    from lqa.evals.fakes import add_row

    modules = {suite: suite_module(suite) for suite in dict.fromkeys(suites)}
    if limit is not None and limit < 1:
        raise LqaError(f"--limit must be at least 1, not {limit}; it counts items of the evaluation data ({data.LATENTQA_HOME}).")
    compared = _compared(methods)
    if examples is not None and examples < 1:
        raise LqaError(f"--examples must be at least 1, not {examples}; it counts the gradient examples of each trained method.")
    data.check_folder(folder)
    folder = None if folder is None else Path(folder)
    for module in modules.values():
        if hasattr(module, "check"):
            module.check(folder)
    try:
        import matplotlib  # noqa: F401  found out now, not when the first plot is due
    except ModuleNotFoundError as error:
        raise LqaError("The plots need the package matplotlib; run `pip install 'lqa[train]'`.") from error
    decoder = LatentDecoder.from_pretrained(decoder_source)
    trained = None
    if text_only_trained is not None:
        trained = LatentDecoder.from_pretrained(text_only_trained, base=decoder.base)
        if not trained.config.reads_text:
            raise LqaError(f"{text_only_trained} reads activations; train the decoder for --text-only-trained with visible_text=true.")
    others: dict[str, LatentDecoder] = {}
    for row in rows:
        add_row(others, decoder, row, seed)

    out, version = Path(out), code_version()
    settings = {
        "decoder": decoder_digest(decoder)[:16],
        "data": data.digest(folder)[:16],
        "limit": limit,
        "seed": seed,
        "code": version,
        "text_only_trained": trained and decoder_digest(trained)[:16],
        "rows": {name: decoder_digest(other)[:16] for name, other in others.items()},
        "methods": compared,
        "examples": examples,
    }
    given = {
        "--data": folder and "DATA",
        "--decoder": decoder_source and Path(decoder_source).name,
        "--limit": limit,
        "--seed": seed,
        "--text-only-trained": text_only_trained and Path(text_only_trained).name,
        "--rows": ",".join(others),
        "--methods": ",".join(methods),
        "--examples": examples,
        "--out": "OUT",
    }
    flags = [*(["--sweep"] if sweep else []), *(f"{flag} {value}" for flag, value in given.items() if value)]
    command = " ".join(["python -m lqa eval", *modules, *flags])
    passes = Passes()
    with Journal(out / "journal.jsonl", settings) as journal:
        for suite, module in modules.items():
            job = Job(
                suite,
                decoder,
                journal,
                data=folder,
                limit=limit,
                seed=seed,
                sweep=sweep,
                passes=passes,
                text_only_trained=trained,
                rows=others,
                methods=compared,
                examples=examples,
                kept=out / MADE / f"{settings['decoder']}-{seed}-{examples or 'default'}",
            )
            result = module.run(job)
            provenance = {
                "model": decoder.config.base,
                "decoder": {"name": Path(decoder.name).name, "sha256": decoder_digest(decoder), "training": decoder.config.training},
                "corpus_revision": corpus.revision(),
                "code": version,
                "command": command,
                "seconds": round(job.seconds),
            }
            document = {"provenance": provenance, **asdict(result)}
            for stale in out.glob(f"{suite}-*.png"):
                stale.unlink()
            for plot in result.plots:
                report.draw(plot, out / report.picture(suite, plot))
            write_whole(out / f"{suite}.json", report.dump(document))
        write_whole(out / "README.md", report.report({out.name: report.load(out)}, plots=True))
        journal.remove()
    return {suite: document for suite, document in report.load(out).items() if suite in modules}


def _compared(names: Sequence[str]) -> list[str]:
    """The methods that are compared, in their own order.  Raises LqaError for one that there is not."""
    from lqa.evals.methods import NAMES

    if unknown := [name for name in names if name not in NAMES]:
        raise LqaError(f"--methods names {unknown[0]!r}; the methods are {', '.join(NAMES)}.")
    return [name for name in NAMES if not names or name in names or name == "unsteered"]


def judge(folder: str | Path, data_folder: str | None, url: str, model: str) -> None:
    """Has a model judge the answers and replies in a results folder (lqa.evals.judge)."""
    from lqa.evals.judge import judge_folder

    judge_folder(folder, data_folder, url=url, model=model)


def print_report(folders: Sequence[str]) -> None:
    """Prints the tables of a results folder, or of several side by side.  Raises LqaError for one without (readable) results."""
    print(report.report({name: report.load(folder) for name, folder in report.names(folders).items()}))


def write_tables(folders: Sequence[str], decoder: str | None, page: str) -> list[str]:
    """Makes the marked tables of `page` anew; with `decoder`, puts the figures of the one folder named into its sidecar and card.

    Returns what was written.
    """
    path = Path(page)
    if decoder is None:
        if folders:
            raise LqaError(f"The tables of {path} are those that its markers name; name a results folder together with --decoder only.")
        if not path.is_file():
            raise LqaError(f"There is no {path} with markers for tables; name another page with --out.")
        path.write_text(report.fill(path.read_text(encoding="utf-8"), path.parent), encoding="utf-8")
        return [str(path)]
    if len(folders) != 1:
        raise LqaError("Name the one results folder whose figures the card gets: `eval tables DIR --decoder FOLDER`.")
    report.write_metrics(decoder, folders[0])
    return [str(Path(decoder, SIDECAR)), str(Path(decoder, "README.md"))]
