"""Ready-made steerings with their measured effect:  python -m train.steerings RESULTS ID ... [--out steerings]

RESULTS is a folder that `python -m lqa eval steer-persona` (or `generalise`) wrote.  The steering of each control ID, as that run made and
kept it, goes to OUT/ID with its card; `effect` in its sidecar is what the run measured, so that no figure of a card comes from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from lqa.cards import steering_card
from lqa.download import STEERING_FILES
from lqa.errors import LqaError
from lqa.evals.methods import RECORD
from lqa.evals.report import load
from lqa.evals.runner import MADE
from lqa.evals.suite import made_name
from lqa.steering import SIDECAR, read_sidecar

SUITES = ("steer-persona", "generalise")
METHOD = "steering"


def export(results: Path, name: str, out: Path) -> Path:
    """Makes the steering folder `out`/`name` of the control `name` in `results`.

    Raises LqaError if the results have no such control or no steering of it, or what the run made is gone or was made otherwise.
    """
    for suite, document in load(results).items():
        items = {e["method"]: e for e in document["items"] if e["id"] == name} if suite in SUITES else {}
        if METHOD in items:
            break
    else:
        known = sorted({e["id"] for s, d in load(results).items() if s in SUITES for e in d["items"] if e["method"] == METHOD})
        raise LqaError(f"{results} has no steering of the control {name!r}; it has {'those of ' + ', '.join(known) if known else 'none'}.")
    item = items[METHOD]
    made = next((path.parent for path in _records(results, item["control"]) if _is_of(path, item["made"])), None)
    if made is None:
        raise LqaError(f"The steering of {name!r} that was measured is not in {results}/{MADE} any more; evaluate again in another folder.")
    sidecar = read_sidecar(made)
    figures = {method: items[method]["figures"] for method in (METHOD, "unsteered")}
    sidecar["effect"] = {
        "suite": suite,
        "strength": item["made"]["strength"],
        "replies": sum(not reply["greedy"] for reply in item["replies"]),
        "behaviour": figures[METHOD]["behaviour"],
        "unsteered": figures["unsteered"]["behaviour"],
        "ratio": figures[METHOD]["ratio"],
        "code": document["provenance"]["code"],
    }
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in STEERING_FILES:
        if file != SIDECAR:
            shutil.copy(made / file, folder / file)
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(steering_card(folder, sidecar, SIDECAR, f"{out.name}/{name}"), encoding="utf-8")
    return folder


def _records(results: Path, control: str) -> list[Path]:
    """Of what runs into `results` have made of `control`: other decoders, seeds and budgets among it."""
    return sorted(results.glob(f"{MADE}/*/{made_name(control)}/{METHOD}/{RECORD}"))


def _is_of(path: Path, made: dict) -> bool:
    record = json.loads(path.read_text(encoding="utf-8"))
    return all(record.get(key) == made.get(key) for key in ("seconds", "strength", "code"))


def main(argv: list[str] | None = None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m train.steerings", description=__doc__, formatter_class=plain)
    parser.add_argument("results", type=Path, help="a results folder of steer-persona or generalise, with what it made")
    parser.add_argument("ids", nargs="+", metavar="ID", help="controls of the suite")
    parser.add_argument("--out", type=Path, default=Path("steerings"), help="default: steerings")
    options = parser.parse_args(argv)
    try:
        print(json.dumps([str(export(options.results, name, options.out)) for name in options.ids]))
    except (LqaError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
