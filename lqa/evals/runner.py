"""Runs suites and writes a results folder: one JSON a suite, with provenance, and a README.md with the tables."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lqa import corpus
from lqa.decoder import LatentDecoder
from lqa.errors import LqaError
from lqa.evals import data
from lqa.evals.identify import FIXED_MESSAGE, identify
from lqa.provenance import code_version

SUITES = ("identify",)
ROWS = {
    "ours": "the decoder",
    "none": "none (slots not patched)",
    "shuffled": "shuffled (the next reading's activations)",
    "text_only": "text_only (bare model, visible text)",
}


def run(suites: Sequence[str], out: str | Path, *, folder: str | None, decoder_source: str | None, limit: int | None) -> dict[str, dict]:
    """Runs `suites` on a decoder and writes `out`.  `folder`: outside data, None for the package's own test split.

    Raises LqaError for an unknown suite, missing data, or a limit below 1; nothing is computed before all of that is checked.
    """
    if unknown := [s for s in suites if s not in SUITES]:
        raise LqaError(f"The suite {unknown[0]!r} is unknown; the suites are {', '.join(SUITES)}.")
    if limit is not None and limit < 1:
        raise LqaError(f"--limit must be at least 1, not {limit}.")
    items, source = data.latentqa_items(folder) if folder else data.corpus_items()
    if limit is not None:
        items = random.Random(0).sample(items, min(limit, len(items)))
    decoder = LatentDecoder.from_pretrained(decoder_source)
    given = {"--data": folder and "DATA", "--decoder": decoder_source and Path(decoder_source).name, "--limit": limit, "--out": "OUT"}
    command = " ".join(["python -m lqa eval", *suites, *(f"{flag} {value}" for flag, value in given.items() if value)])
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for suite in suites:
        start = time.perf_counter()
        results[suite] = {
            "provenance": {
                "base": decoder.config.base,
                "decoder": {"source": Path(decoder.name).name, "training": decoder.config.training},
                "data": source["name"],
                "sha256": source["sha256"],
                "items": len(items),
                "corpus_revision": corpus.revision(),
                "code": code_version(),
                "command": command,
            },
            **{name: identify(decoder, items, message=message) for name, message in (("fixed", FIXED_MESSAGE), ("own", None))},
        }
        results[suite]["provenance"]["seconds"] = round(time.perf_counter() - start)
        (out / f"{suite}.json").write_text(json.dumps(results[suite], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "README.md").write_text(report(results), encoding="utf-8")
    return results


def report(results: dict[str, dict]) -> str:
    """The results as Markdown: every row with its references, n and 95 % bootstrap interval."""
    lines = []
    for suite, result in results.items():
        about = result["provenance"]
        lines += [f"## {suite}", ""]
        for name, title in (("fixed", "Every control under the same message"), ("own", "Each control under its own message")):
            part = result[name]
            lines += [f"{title}: {part['m']} candidates of one kind, layer {part['layer']}, chance {part['chance']:.1%}.", ""]
            lines += ["| read from | accuracy | 95 % interval | n |", "|---|---|---|---|"]
            for row, numbers in part["table"].items():
                interval = f"{numbers['low']:.1%} to {numbers['high']:.1%}"
                lines.append(f"| {ROWS[row]} | {numbers['accuracy']:.1%} | {interval} | {numbers['n']} |")
            lines.append("")
        left = ", ".join(f"{n} of kind {kind}" for kind, n in result["fixed"]["left_out"].items())
        lines += [f"Left out, being fewer than {result['fixed']['m']}: {left}.", ""] if left else []
        lines += [f"{about['items']} items ({about['data']}); code {about['code']}; `{about['command']}`, {about['seconds']} s.", ""]
    return "\n".join(lines)


def print_report(folders: Sequence[str]) -> None:
    """Prints the tables of results folders, one after the other.  Raises LqaError for a folder without (readable) results."""
    for folder in folders:
        try:
            paths = [path for suite in SUITES if (path := Path(folder, f"{suite}.json")).is_file()]
            text = report({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths})
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise LqaError(f"The results in {folder} cannot be read ({type(error).__name__}: {error}); evaluate again.") from error
        if not paths:
            raise LqaError(f"{folder} holds no results of a suite; run `python -m lqa eval SUITE --out {folder}` first.")
        print(f"# {folder}\n\n{text}", file=sys.stdout)
