"""What suites found, as files for people: Markdown tables, plots, README sections between markers, and a decoder's card.

A results folder holds SUITE.json for each suite, their plots as SUITE-PLOT.png, and a README.md with all of it.  In another file, what
stands between the lines `<!-- results/NAME [SUITE[/TABLE] ...] -->` and `<!-- end -->` is made from that folder by `eval tables`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from lqa.errors import LqaError
from lqa.evals.suite import Cell, Plot, Table

MARKED = re.compile(r"(<!-- (results/\S+)((?: [\w/-]+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
SWEEP = "sweep"  # tables with this prefix are ablations, and stay out of cards

WORDS = {  # what the references are called in every suite
    "ours": "the decoder, from the activations",
    "none": "the decoder, slots not patched",
    "shuffled": "the decoder, another chat's activations",
    "text_only": "the bare model, from the visible text",
    "text_only_trained": "a decoder of the same budget, trained on the visible text",
    "random": "the decoder, its LoRA random",
    "untrained": "the decoder, its LoRA untrained",
    "unsteered": "the target as it is",
    "system_prompt": "the control as system prompt",
    "caa": "contrastive activation addition",
    "sft": "a LoRA of the same size, trained on replies under the control",
    "dpo": "the same, preferring them to replies without it",
    "steering": "a LoRA trained through the decoder",
}


# --- results folders --------------------------------------------------------------------------------------------


def dump(document: dict) -> str:
    """A suite's document as JSON, with one line for each item."""
    items = ",\n".join("  " + json.dumps(item, ensure_ascii=False) for item in document["items"])
    text = json.dumps(document | {"items": []}, indent=1, ensure_ascii=False)
    return text.replace('\n "items": []', f'\n "items": [\n{items}\n ]' if items else '\n "items": []') + "\n"


def load(folder: str | Path) -> dict[str, dict]:
    """{suite: document} of a results folder.  Raises LqaError if there is none, or one cannot be read."""
    from lqa.evals.runner import SUITES

    found = {}
    for suite in SUITES:
        path = Path(folder, f"{suite}.json")
        try:
            if path.is_file():
                document = json.loads(path.read_text(encoding="utf-8"))
                document["tables"] = {key: _table(entry) for key, entry in document["tables"].items()}
                document["plots"] = [Plot(**entry) for entry in document["plots"]]
                _source(document)
                found[suite] = document
        except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
            raise LqaError(f"The results in {path} cannot be read ({type(error).__name__}: {error}); evaluate again.") from error
    if not found:
        raise LqaError(f"{folder} holds no results of a suite; run `python -m lqa eval SUITE --out {folder}` first.")
    return found


def _table(entry: dict) -> Table:
    rows = {name: [c and Cell(**c) for c in cells] for name, cells in entry["rows"].items()}
    return Table(**entry | {"rows": rows})


# --- Markdown ---------------------------------------------------------------------------------------------------


def _cell(cell: Cell | None, unit: str, n: bool) -> str:
    if cell is None:
        return "-"
    mean, low, high = (f"{x:.1%}"[:-1] if unit == "%" else f"{x:.3f}" for x in (cell.mean, cell.low, cell.high))
    return f"{mean}{unit} ({low} to {high}{f'; n {cell.n}' if n else ''})"


def _clean(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def table(tables: dict[str, Table]) -> str:
    """Tables of several runs that belong together, side by side: {run: table}, a group of columns for each run, a row for each name."""
    many = len(tables) > 1
    columns = [(run, i, name, unit) for run, t in tables.items() for i, (name, unit) in enumerate(t.columns.items())]
    rows = list(dict.fromkeys(name for t in tables.values() for name in t.rows))
    found = {name: [tables[run].rows[name][i] if name in tables[run].rows else None for run, i, *_ in columns] for name in rows}
    counts = {name: {c.n for c in cells if c} for name, cells in found.items()}
    own_n = all(len(n) <= 1 for n in counts.values())  # a column for n, where every row has one
    titles = [f"{name}, {run}" if many else name for run, _, name, _ in columns]
    lines = [f"| | {' | '.join(map(_clean, titles))} |" + (" n |" if own_n else ""), "|---" * (len(titles) + 1 + own_n) + "|"]
    for name, cells in found.items():
        texts = [_cell(c, unit, not own_n) for c, (*_, unit) in zip(cells, columns, strict=True)]
        lines.append(" | ".join([f"| {_clean(name)}", *texts, *([str(*counts[name]) if counts[name] else "-"] if own_n else [])]) + " |")
    return "\n".join(lines)


def _titled(tables: dict[str, Table]) -> str:
    first = next(iter(tables.values()))
    notes = list(dict.fromkeys(t.note for t in tables.values() if t.note))
    return f"**{first.title}.** {' '.join(notes)}".strip() + "\n\n" + table(tables)


def _source(document: dict) -> str:
    about = document["provenance"]
    return f"{document['data']['name']}; {about['decoder']['name']}, code {about['code']}; `{about['command']}`, {about['seconds']} s."


def _legend(documents: Sequence[dict]) -> str:
    used = {name for d in documents for t in d["tables"].values() for name in [*t.rows, *t.columns]}
    return "; ".join(f"*{name}*: {text}" for name, text in WORDS.items() if name in used) + ". " * any(name in used for name in WORDS)


def report(runs: dict[str, dict[str, dict]], *, plots: bool = False) -> str:
    """The results of one folder as Markdown, or of several side by side: {run: {suite: document}}.  `plots`: with pictures, for a folder's
    own README.md."""
    lines = []
    for suite in dict.fromkeys(suite for run in runs.values() for suite in run):
        documents = {name: run[suite] for name, run in runs.items() if suite in run}
        lines += [f"## {suite}", ""]
        for key in dict.fromkeys(key for d in documents.values() for key in d["tables"]):
            lines += [_titled({name: d["tables"][key] for name, d in documents.items() if key in d["tables"]}), ""]
        for plot in next(iter(documents.values()))["plots"] if plots else ():
            lines += [f"![{plot.title}]({picture(suite, plot)})", ""]
        lines += [f"{_legend(list(documents.values()))}Means with 95 % bootstrap intervals.", ""]
        many = len(documents) > 1
        lines += [line for name, d in documents.items() for line in (f"{f'{name}: ' if many else ''}{_source(d)}", "")]
    return "\n".join(lines)


def names(folders: Sequence[str]) -> dict[str, str]:
    """{short name: folder}: the last part of each path, or all of it where two would be the same."""
    short = [Path(f).resolve().name for f in folders]
    return {s if short.count(s) == 1 else f: f for s, f in zip(short, folders, strict=True)}


def section(folder: Path, which: Sequence[str]) -> str:
    """What stands between markers: the tables of a results folder (all, or those of `which`: SUITE or SUITE/TABLE), or its benchmarks."""
    benchmarks = sorted(p for p in folder.glob("*.json") if p.stem in ("read", "train", "steer"))
    if benchmarks:
        from lqa.bench import format_bench

        texts = (format_bench(json.loads(p.read_text(encoding="utf-8"))).strip() for p in benchmarks)
        return "\n\n".join(f"```\n{text}\n```" for text in texts) + "\n"
    documents = load(folder)
    parts = []
    for suite, document in documents.items():
        wanted = [w.partition("/")[2] for w in which if w.partition("/")[0] == suite]
        tables = {k: t for k, t in document["tables"].items() if not which or "" in wanted or k in wanted}
        if tables:
            parts += [_titled({"": t}) for t in tables.values()]
            parts += [f"{_legend([document | {'tables': tables}])}Means with 95 % bootstrap intervals.", _source(document)]
    if missing := [w for w in which if w.partition("/")[0] not in documents]:
        raise LqaError(f"{folder} holds no results of {missing[0]}; the marker that names it can name {', '.join(documents)}.")
    return "\n\n".join(parts) + "\n"


def fill(text: str, root: str | Path) -> str:
    """`text` with all that stands between its markers made anew from the results folders under `root`."""
    return MARKED.sub(lambda m: m[1] + section(Path(root, m[2]), m[3].split()) + m[4], text)


# --- plots ------------------------------------------------------------------------------------------------------

COLOURS = ["#0b6e4f", "#c1440e", "#9db4c0", "#5c4b99", "#d4a017", "#333333", "#7fb069", "#b56576"]
LINE = {"lines": "-", "points": "none"}


def picture(suite: str, plot: Plot) -> str:
    return f"{suite}-{plot.name}.png"


def draw(plot: Plot, path: Path) -> None:
    """Draws a plot from its numbers; the same numbers give the same bytes.  Raises LqaError for an unknown kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if plot.kind in ("lines", "points"):
        figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
        names = list(dict.fromkeys(x for line in plot.series.values() for x in line["x"]))
        named = any(isinstance(x, str) for x in names)  # then all are: layers beside several at once, say, have no common axis
        for (label, line), colour in zip(plot.series.items(), COLOURS * (1 + len(plot.series) // len(COLOURS)), strict=False):
            at = [names.index(x) for x in line["x"]] if named else line["x"]
            axes.plot(at, line["y"], color=colour, marker="o", markersize=3, linestyle=LINE[plot.kind], label=label)
            if "low" in line:
                axes.fill_between(at, line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
            if all(isinstance(x, int) for x in line["x"]):
                axes.set_xticks(line["x"])
        if named:
            axes.set_xticks(range(len(names)), [str(x).strip("()") for x in names])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    elif plot.kind == "matrix":
        (matrix,) = plot.series.values()
        across, down = len(matrix["x"]), len(matrix["y"])
        figure, axes = plt.subplots(figsize=(2.5 + 0.22 * across, 1.5 + 0.22 * down), dpi=110)
        image = axes.imshow(matrix["values"], cmap="Greens", vmin=0, aspect="auto")
        axes.set_xticks(range(across), matrix["x"], rotation=90, fontsize=7)
        axes.set_yticks(range(down), matrix["y"], fontsize=7)
        figure.colorbar(image)
    else:
        raise LqaError(f"The plot {plot.name!r} is of the unknown kind {plot.kind!r}; use lines, points or matrix.")
    axes.set(xlabel=plot.x, ylabel=plot.y, title=plot.title)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


# --- a decoder's figures ----------------------------------------------------------------------------------------


def metrics(folder: str | Path) -> dict:
    """What a sidecar says of a results folder: {"results": its name, suite: {"data", "command", "tables"}}, without sweeps."""
    found: dict = {"results": Path(folder).resolve().name}
    for suite in load(folder):
        document = json.loads(Path(folder, f"{suite}.json").read_text(encoding="utf-8"))
        tables = {key: entry for key, entry in document["tables"].items() if not key.startswith(SWEEP)}
        found[suite] = {"data": document["data"]["name"], "command": document["provenance"]["command"], "tables": tables}
    return found


def card_tables(found: dict) -> str:
    """The Markdown of `metrics`, for a card."""
    parts = []
    for suite, entry in found.items():
        if suite != "results":
            tables = {key: _table(t) for key, t in entry["tables"].items()}
            parts += [f"### {suite}", *(_titled({"": t}) for t in tables.values())]
            parts += [f"{_legend([{'tables': tables}])}Means with 95 % bootstrap intervals. {entry['data']}; `{entry['command']}`."]
    return "\n\n".join(parts)


def write_metrics(decoder: str | Path, folder: str | Path) -> None:
    """Puts the figures of a results folder into a decoder's sidecar, and renders its card again.  Raises LqaError if they are another's."""
    from lqa.cards import with_results, write_decoder_card
    from lqa.config import DecoderConfig

    with_results(DecoderConfig.load(decoder), folder).save(decoder)
    write_decoder_card(decoder)
