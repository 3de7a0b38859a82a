"""The published form of the corpus: `python -m lqa data build` writes `dataset/`, the same bytes for the same corpus.

    dataset/README.md, taxonomy.png, {latentqa,context,facts}/{split}-00000-of-00001.parquet

Splits of `latentqa`: train, validation, test (each control with its own messages) and test_pool (the same controls under messages that
know of no control, so that only the model's state can tell).
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from lqa import corpus
from lqa.corpus import checks, schema
from lqa.corpus.completions import FOLDER, load_completions
from lqa.corpus.readings import readings_of
from lqa.corpus.schema import Control, read_controls
from lqa.corpus.stats import load_readings, statistics, table
from lqa.errors import LqaError

CARD, PLOT = "README.md", "taxonomy.png"
MAX_BYTES = 40 * 2**20
ROWS_PER_GROUP = 1000  # the viewer and streaming read one group at a time
PRIORITY = ("test", "validation", "train")  # of two near-duplicate messages on different sides, the one further left stays


def features(config: str):
    """The typed features of a config: what all have in common, then its own columns."""
    from datasets import Features, List, Value

    text = Value("string")
    message = {"role": text, "content": text}
    pair = {"question": text, "answer": text, "alternatives": List(text), "type": text, "generic": Value("bool")}
    reading = {"chat": List(message), "span": text, "qa": List(pair)}
    own = {
        "latentqa": ["label", "kind", "category", "form", "chat", "span", "message", "model", "qa", "contrast"],
        "context": ["label", "target", "direction", "activations", "chat", "span", "qa"],
        "facts": ["entity", "entity_kind", "attribute", "chat", "span", "qa", "source"],
    }[config]
    typed = reading | {"contrast": List(text), "activations": Value("int32")}
    return Features({"id": text} | {name: typed.get(name, text) for name in own})


def build_readings(controls: Sequence[Control], messages: Sequence[str], completions: dict[str, list[dict]], seed: int = 0) -> dict:
    """{split: rows} of the config `latentqa`.

    Messages are kept apart like controls: those of the pool have a side of their own, and where two sides have near-duplicates, only one
    keeps its message (PRIORITY).
    """
    sides = corpus.split_of(controls)
    entries = [(sides[c.id], text) for c in controls for text in c.stimuli] + [(corpus.message_side(m), m) for m in messages]
    dropped: set[int] = set()
    for i, j, _ in checks.near_duplicates([text for _, text in entries]):
        if entries[i][0] != entries[j][0]:
            dropped.add(max(i, j, key=lambda k: PRIORITY.index(entries[k][0])))
    lost = {entries[k] for k in dropped}
    pools = {side: [m for m in messages if corpus.message_side(m) == side and (side, m) not in lost] for side in PRIORITY}
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": [], "test_pool": []}
    questions = corpus.load_questions()
    for control in controls:
        side = sides[control.id]
        stimuli = [s for s in control.stimuli if (side, s) not in lost]
        replies = [c for c in completions.get(control.id, []) if c["message"] in pools[side]]
        for row in readings_of(control, stimuli, pools[side], replies, questions, seed):
            splits["test_pool" if side == "test" and row["message"] == "pool" else side].append(row)
    return splits


def _tokenizer(base: str | None):
    from transformers import AutoTokenizer

    from lqa.chat import ensure_template
    from lqa.models import EMBEDDED_BASE, embedded_folder

    name = base or EMBEDDED_BASE
    try:
        tokenizer = AutoTokenizer.from_pretrained(embedded_folder() if name == EMBEDDED_BASE else name)
    except (OSError, ValueError) as error:
        raise LqaError(f"The tokenizer of {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    ensure_template(tokenizer)
    return tokenizer, name


def build(
    out: str | Path,
    *,
    extra: Sequence[str | Path] = (),
    against: str | Path | None = None,
    base: str | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, dict[str, list[dict]]]:
    """Builds, checks and writes the dataset; returns {config: {split: rows}}.

    extra     further files of controls (YAML in the schema of lqa/corpus/controls)
    against   a corpus folder whose items must not be in this one, not even in other words
    base      the target whose tokens the context predictions are counted in (default: the embedded one)
    Raises LqaError, with every problem reported through `progress` before, if a check fails; what `out` held then stays as it is.
    """
    from lqa.corpus.context import build_context
    from lqa.corpus.facts import build_facts

    try:
        controls = [*corpus.load_controls(), *read_controls(extra)]
    except ValueError as error:
        raise LqaError(f"{error}; mend the file and build again.") from error
    messages = corpus.load_messages()
    progress(f"checking {len(controls)} controls and {len(messages)} messages")
    problems = schema.check(controls) + checks.check_controls(controls, messages)
    if not problems:
        completions, stale = load_completions(controls)
        if stale:
            progress(f"{stale} completions answer to controls that were reworded or removed; they are left out")
        readings = build_readings(controls, messages, completions, seed)
        progress(f"checking {sum(map(len, readings.values()))} readings")
        problems = checks.check_splits(readings)
        if against is not None:
            other = [row for part in load_readings(against).values() for row in part]
            problems += checks.contamination([row for part in readings.values() for row in part], other)
    if problems:
        for problem in problems:
            progress(problem)
        raise LqaError(f"The corpus has {len(problems)} problem(s), listed above, and was not written; the first: {problems[0]}")
    progress("building the context predictions and the facts")
    tokenizer, name = _tokenizer(base)
    configs = {"latentqa": readings, "context": build_context(readings, tokenizer, name, seed=seed), "facts": build_facts(seed)}
    write_dataset(
        out, configs, lambda info: _card(info, configs, controls, messages), lambda folder: plot_taxonomy(readings, folder / PLOT)
    )
    return configs


def write_dataset(
    out: str | Path,
    configs: dict[str, dict[str, list[dict]]],
    card: Callable[[str], str],
    more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes {config: {split: rows}} as a folder for `datasets.load_dataset`, in one go: `out` is replaced when all of it is there.

    card   from the front matter (YAML, without its fences) to the text of README.md;  more(folder) adds further files
    Raises LqaError if `out` holds other things than a dataset, cannot be written, or has become too large for git.
    """
    import pyarrow
    import pyarrow.parquet

    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(p.name not in {CARD, PLOT, "latentqa", "context", "facts"} for p in out.iterdir())):
        raise LqaError(f"{out} exists and is not a dataset of lqa; name another folder with --out.")
    part, old = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.old")
    try:
        shutil.rmtree(part, ignore_errors=True)
        described = []
        for config, splits in configs.items():
            (part / config).mkdir(parents=True)
            typed, sizes = features(config), {}
            for split, rows in splits.items():
                if not rows:
                    continue
                data = pyarrow.Table.from_pylist(rows, schema=typed.arrow_schema)
                path = part / config / f"{split}-00000-of-00001.parquet"
                pyarrow.parquet.write_table(data, path, compression="zstd", compression_level=19, row_group_size=ROWS_PER_GROUP)
                sizes[split] = (path, len(rows), data.nbytes)
            described.append((config, typed, sizes))
        more(part)
        (part / CARD).write_text(card(_front_matter(described)), encoding="utf-8")
        size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise LqaError(f"The dataset has {size / 2**20:.0f} MiB, more than the {MAX_BYTES >> 20} that git should hold; sample less.")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise LqaError(f"{out} cannot be written ({error.strerror}); what it held is as it was.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _front_matter(described: list[tuple]) -> str:
    """The card's metadata, generated from what was written."""
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from huggingface_hub import DatasetCardData

    info, total = [], 0
    for config, typed, sizes in described:
        splits = SplitDict({name: SplitInfo(name=name, num_bytes=n_bytes, num_examples=n) for name, (_, n, n_bytes) in sizes.items()})
        download = sum(path.stat().st_size for path, *_ in sizes.values())
        size = sum(n_bytes for *_, n_bytes in sizes.values())
        entry = DatasetInfo(features=typed, config_name=config, splits=splits, download_size=download, dataset_size=size)
        info.append({"config_name": config, **entry._to_yaml_dict()})
        total += sum(n for _, n, _ in sizes.values())
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    data = DatasetCardData(
        language=["en"],
        license="apache-2.0",
        pretty_name="LatentQA corpus of lqa" if len(described) > 1 else "LatentQA",
        task_categories=["question-answering", "text-generation"],
        size_categories=[next(name for bound, name in bounds if total < bound)],
        annotations_creators=["machine-generated"],
        language_creators=["machine-generated"],
        multilinguality=["monolingual"],
        source_datasets=["original"],
        tags=["latentqa", "interpretability", "activations", "question-answering", "arxiv:2412.08686"],
        configs=[
            {
                "config_name": config,
                **({"default": True} if config == "latentqa" else {}),
                "data_files": [{"split": name, "path": f"{config}/{name}-*"} for name in sizes],
            }
            for config, _, sizes in described
        ],
        dataset_info=info,
    )
    return data.to_yaml() + "\n"


def _card(info: str, configs: dict, controls: Sequence[Control], messages: Sequence[str]) -> str:
    from lqa.cards import render_card

    readings = configs["latentqa"]
    rows = [row for part in readings.values() for row in part]
    models = sorted({row["model"] for row in rows if row["model"]})
    examples = [next(row for row in rows if row["form"] == form and row["kind"] == kind) for form, kind in _EXAMPLES]
    return render_card(
        "dataset.md",
        front_matter=info.rstrip(),
        revision=corpus.revision(),
        plot=PLOT,
        counts={config: {name: len(part) for name, part in splits.items()} for config, splits in configs.items()},
        features={config: list(features(config)) for config in configs},
        figures=table({"this corpus": statistics(readings)}),
        messages=len(messages),
        controls=len(controls),
        pool_share=sum(row["message"] == "pool" for row in readings["train"]) / len(readings["train"]),
        models=models,
        completions=sum(row["model"] is not None for row in rows),
        completions_folder=FOLDER.name,
        attributes=Counter((row["entity_kind"], row["attribute"]) for part in configs["facts"].values() for row in part),
        entities=len({(row["entity_kind"], row["entity"]) for part in configs["facts"].values() for row in part}),
        targets=sorted({row["target"] for part in configs["context"].values() for row in part}),
        examples=[*examples, configs["context"]["train"][0], configs["facts"]["train"][0]],
        checks=checks,
    )


_EXAMPLES = (("system", "persona"), ("stimulus", "goal"))


def plot_taxonomy(splits: dict[str, list[dict]], path: Path) -> None:
    """Controls per category and side, and the lengths of questions and answers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    controls = {row["label"]: (f"{row['kind']}-{row['category']}", checks.side_of(name)) for name, part in splits.items() for row in part}
    counts = Counter(controls.values())
    names = sorted({name for name, _ in counts}, reverse=True)
    pairs = {
        (p["question"], text) for part in splits.values() for row in part for p in row["qa"] for text in (p["answer"], *p["alternatives"])
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.22 * len(names) + 1.2), dpi=110, width_ratios=(3, 2))
    start = [0] * len(names)
    for side, colour in (("train", "#0b6e4f"), ("validation", "#e3b23c"), ("test", "#c1440e")):
        width = [counts[name, side] for name in names]
        left.barh(names, width, left=start, color=colour, label=side)
        start = [a + b for a, b in zip(start, width, strict=True)]
    left.set(xlabel="controls", title="Taxonomy")
    left.tick_params(axis="y", labelsize=8)
    left.legend(frameon=False, fontsize=8)
    words = [[len(q.split()) for q in {q for q, _ in pairs}], [len(a.split()) for _, a in pairs]]
    right.hist(words, bins=range(0, 41, 2), label=["questions", "answers"], color=["#7d98a1", "#0b6e4f"])
    right.set(xlabel="words", title="Lengths")
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
