"""The suite `calibration`: is the decoder surer where it is right?

Every control of a draw of 8 of one kind is read under the same message and asked the kind's generic question.

    answers   the free answer is right if it is more similar (sentence embeddings) to its own reference than to those of the other seven;
              chance 1/8.  Signals of confidence: mean token probability; exp of the mean log-probability; agreement, the mean similarity of
              SAMPLES sampled answers to the greedy one (after arXiv:2605.26045); grounded, the answer's log-probability minus that without
              activations; and `all`, what one decode and two scoring passes tell together.
    identify  of the eight descriptions, the one with the highest centred score is right or not (the suite `identify`); the signal is
              its softmax over the centred scores.

    AUROC     how often a right answer has more confidence than a wrong one; 50% is blind
    ECE       expected calibration error (Naeini et al. 2015): 10 bins of equal width, |share right - mean confidence|, weighted by size.
              `raw`: of the signal as it is, where it lies in [0, 1]; `fitted`: through a logistic map fitted on the package's own
              validation split (lqa.calibration), never on the data that is measured
    surer half   the share of right answers among those half that the signal is surest of
    abstain      (plot) the share of wrong answers against the share that is answered, when the least sure ones are left out

`shipped` is `Answer.confidence` of a decoder whose sidecar holds a calibration.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lqa.activations import layer_name
from lqa.calibration import Calibration, fit
from lqa.decoder import LatentDecoder
from lqa.errors import LqaError
from lqa.evals import batch, data, embedding
from lqa.evals.data import QUESTIONS, Item
from lqa.evals.embedding import PACKAGE, similarities
from lqa.evals.identify import FIXED_MESSAGE, Draw, M, Scores, Setting, centred, filed, hits, make_draws
from lqa.evals.suite import Cell, Job, Plot, Result, Table, cell

SAMPLES = 5
TEMPERATURE = 1.0
MAX_NEW_TOKENS = 32
SAMPLE_TOKENS = 24
BINS = 10
CHUNK = 4  # draws of one piece of work
RESAMPLES = 2000
THRESHOLD = 2 / M  # of the confidence: an answer with less is hardly better than a guess among M
RIGHT = f"the answer is nearer to its own reference than to those of {M - 1} other controls of the kind"
SIGNALS = {  # name: (its feature, whether it is a share in [0, 1] as it is)
    "token probability": ("probability", True),
    "log-probability": ("exp_logprob", True),
    "agreement": ("agreement", True),
    "grounded": ("grounded", False),
}
ALL = ("logprob", "grounded")  # of `all`, and of the calibration that is shipped
COLUMNS = {"AUROC": "%", "ECE raw": "%", "ECE fitted": "%", "surer half": "%"}


# --- metrics ----------------------------------------------------------------------------------------------------


def ece(confidence: Sequence[float], right: Sequence[float], bins: int = BINS) -> float:
    """Expected calibration error in [0, 1]."""
    return sum(n * abs(r - c) for n, c, r in reliability(confidence, right, bins)) / len(confidence)


def reliability(confidence: Sequence[float], right: Sequence[float], bins: int = BINS) -> list[tuple[int, float, float]]:
    """(n, mean confidence, share right) of every bin of equal width that is not empty."""
    found: dict[int, list[tuple[float, float]]] = {}
    for c, r in zip(confidence, right, strict=True):
        found.setdefault(min(int(c * bins), bins - 1), []).append((c, r))
    return [(len(v), sum(c for c, _ in v) / len(v), sum(r for _, r in v) / len(v)) for _, v in sorted(found.items())]


def auroc(confidence: Sequence[float], right: Sequence[float]) -> float | None:
    """The share of (right, wrong) pairs in which the right one has more confidence, equal ones half; None if there is no such pair."""
    c, r = torch.tensor(confidence, dtype=torch.float64), torch.tensor(right) > 0.5
    if r.all() or not r.any():
        return None
    difference = c[r].unsqueeze(1) - c[~r].unsqueeze(0)
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def risk_coverage(confidence: Sequence[float], right: Sequence[float]) -> list[tuple[float, float]]:
    """(coverage, share wrong) when only the surest are answered, from the surest one to all; equal confidence is answered together."""
    pairs = sorted(zip(confidence, right, strict=True), key=lambda pair: -pair[0])
    curve, wrong = [], 0.0
    for n, (c, r) in enumerate(pairs, 1):
        wrong += 1 - r
        if n == len(pairs) or pairs[n][0] != c:
            curve.append((n / len(pairs), wrong / n))
    return curve


def surer_half(confidence: Sequence[float], right: Sequence[float]) -> float:
    """The share of right answers among the surer half (rounded up); of equal confidence at its edge, their mean counts."""
    n = math.ceil(len(confidence) / 2)
    edge = sorted(confidence, reverse=True)[n - 1]
    above = [r for c, r in zip(confidence, right, strict=True) if c > edge]
    at = [r for c, r in zip(confidence, right, strict=True) if c == edge]
    return (sum(above) + (n - len(above)) * sum(at) / len(at)) / n


def interval(metric: Callable, clusters: Sequence[Sequence[int]], *columns: Sequence[float], seed: int = 0) -> Cell | None:
    """`metric(*columns)` with a percentile-bootstrap interval over clusters of indices; None where the metric does not apply."""
    rng = random.Random(seed)

    def of(chosen) -> float | None:
        indices = [i for cluster in chosen for i in cluster]
        return metric(*([column[i] for i in indices] for column in columns))

    mean = of(clusters)
    if mean is None:
        return None
    draws = (of(rng.choices(clusters, k=len(clusters))) for _ in range(RESAMPLES))
    values = sorted(v for v in draws if v is not None)
    low, high = values[int(0.025 * len(values))], values[min(len(values) - 1, int(0.975 * len(values)))]
    return Cell(mean, low, high, sum(map(len, clusters)))


# --- what is measured -------------------------------------------------------------------------------------------


def measure(job: Job, draws: Sequence[Draw], name: str, *, everything: bool = True) -> list[dict]:
    """For every counted item of `draws`, an entry with its answer, features and whether it is right, one list after the other.

    everything  also the samples, the references and the identification; False: what the shipped calibration needs
    """
    entries: list[dict] = []
    chunks = [draws[start : start + CHUNK] for start in range(0, len(draws), CHUNK)]
    for number, chunk in enumerate(chunks):
        found = _answers(job, chunk, name)
        if everything:
            for more in (_samples(job, chunk, name, found), _references(job, chunk, name), _identified(job, chunk, name)):
                found = [e | o | {"features": e["features"] | o.get("features", {})} for e, o in zip(found, more, strict=True)]
        entries += found
        job.progress(number + 1, len(chunks), name)
    return entries


def _where(part: str, name: str, chunk: Sequence[Draw]) -> str:
    return f"{part}/{name}/{','.join(label for draw in chunk for label in draw.labels)}"


def _counted(chunk: Sequence[Draw]) -> list[Item]:
    return [item for draw in chunk for item in draw.items[: draw.counted]]


def _asked(job: Job, items: Sequence[Item], source: str = "true", decoder: LatentDecoder | None = None) -> list[batch.Prompt]:
    """The generic question to each item (`batch.ask`), of the suite's decoder or another one."""
    return [batch.ask(job.read_under(item.control, FIXED_MESSAGE, decoder), QUESTIONS[item.kind], source) for item in items]


def _judged(chunk: Sequence[Draw], texts: Sequence[str]) -> list[float]:
    """1 for every text that is nearest to its own reference among those of its draw."""
    right, texts = [], iter(texts)
    for draw in chunk:
        close = similarities([next(texts) for _ in range(draw.counted)], [item.answer for item in draw.items])
        for i, row in enumerate(close.tolist()):
            right.append(float(row[i] > max(s for j, s in enumerate(row) if j != i) + 1e-6))
    return right


def _answers(job: Job, chunk: Sequence[Draw], name: str) -> list[dict]:
    def make() -> dict:
        runner, items = batch.adapted(job.decoder), _counted(chunk)
        asked = _asked(job, items)
        said = batch.say(runner, asked, MAX_NEW_TOKENS)
        texts = [s.text or "." for s in said]  # nothing cannot be scored
        own, none = batch.score(runner, asked, texts), batch.score(runner, _asked(job, items, "none"), texts)
        numbers = [{"probability": s.probability, "logprob": s.logprob, "grounded": a - b} for s, a, b in zip(said, own, none, strict=True)]
        return {"answers": [s.text for s in said], "features": numbers}

    found = job.once(_where("answers", name, chunk), make)
    labels = [item.label for item in _counted(chunk)]
    rows = zip(labels, found["answers"], found["features"], _judged(chunk, found["answers"]), strict=True)
    return [
        {"id": label, "answer": text, "features": numbers | {"exp_logprob": math.exp(numbers["logprob"])}, "right": right}
        for label, text, numbers, right in rows
    ]


def _samples(job: Job, chunk: Sequence[Draw], name: str, found: Sequence[dict]) -> list[dict]:
    def make() -> dict:
        prompts = [prompt for prompt in _asked(job, _counted(chunk)) for _ in range(SAMPLES)]
        said = batch.say(batch.adapted(job.decoder), prompts, SAMPLE_TOKENS, temperature=TEMPERATURE, seed=job.seed)
        return {"samples": [[s.text for s in said[n : n + SAMPLES]] for n in range(0, len(said), SAMPLES)]}

    samples = job.once(_where("samples", name, chunk), make)["samples"]
    close = [similarities([entry["answer"]], texts)[0].clamp_min(0).mean().item() for entry, texts in zip(found, samples, strict=True)]
    return [{"features": {"agreement": value}} for value in close]


def _references(job: Job, chunk: Sequence[Draw], name: str) -> list[dict]:
    """Whether the answers of the references are right: no activations, the visible text, and the suite's further decoders."""
    items = _counted(chunk)

    def make() -> dict:
        said = batch.say(batch.adapted(job.decoder), _asked(job, items, "none"), MAX_NEW_TOKENS)
        shown = [batch.text_only(job.read_under(item.control, FIXED_MESSAGE), QUESTIONS[item.kind]) for item in items]
        text_only = batch.texts(batch.bare(job.decoder), shown, MAX_NEW_TOKENS)
        return {"none": [s.text for s in said], "logprob": [s.logprob for s in said], "text_only": text_only}

    found = job.once(_where("references", name, chunk), make)
    texts = {row: found[row] for row in ("none", "text_only")}
    for row, decoder in job.further.items():

        def more(decoder=decoder) -> dict:
            return {"said": batch.texts(batch.adapted(decoder), _asked(job, items, decoder=decoder), MAX_NEW_TOKENS)}

        texts[row] = job.once(_where(f"references/{row}", name, chunk), more)["said"]
    right = {row: _judged(chunk, said) for row, said in texts.items()}
    # Without activations there is nothing that an answer could owe to them.
    return [
        {"references": {row: right[row][i] for row in right}, "none": {"logprob": logprob, "grounded": 0.0}}
        for i, logprob in enumerate(found["logprob"])
    ]


def _identified(job: Job, chunk: Sequence[Draw], name: str) -> list[dict]:
    """Of each draw's descriptions, whether the one with the highest centred score is the true one, and how sure its softmax is."""

    def scores(draw: Draw) -> Scores:
        known = job.filed("identify", filed(draw, Setting(layer_name(job.decoder.config.check_layers(None)))))
        if known is not None:
            return known["ours"]
        return batch.matrix(batch.adapted(job.decoder), _asked(job, draw.items), [item.answer for item in draw.items])

    def make() -> dict:
        return {"scores": [scores(draw) for draw in chunk]}

    entries = []
    for draw, scores in zip(chunk, job.once(_where("identify", name, chunk), make)["scores"], strict=True):
        sure = centred(scores).softmax(1).max(1).values.tolist()
        entries += [{"identified": hit, "features": {"softmax": sure[i]}} for i, hit in enumerate(hits(scores, draw.counted))]
    return entries


# --- the suite --------------------------------------------------------------------------------------------------


def fit_answers(entries: Sequence[dict], names: Sequence[str] = ALL, **about) -> Calibration:
    """The calibration of `entries` of `measure` by the features `names`."""
    rows = [entry["features"] for entry in entries]
    right = [entry["right"] for entry in entries]
    about = {"n": len(right), "share right": round(sum(right) / len(right), 4), **about}
    return fit(rows, right, names, threshold=THRESHOLD, right=RIGHT, fitted=about)


def check(folder: Path | None) -> None:
    """Raises LqaError if the data, or a package that is needed, cannot be had."""
    data.items_of(folder)
    embedding.find()
    if importlib.util.find_spec("sklearn") is None:
        raise LqaError("The suite calibration needs the package scikit-learn; run `pip install 'lqa[train]'`.")


def _fitted(held: Sequence[dict], label: str, features: Sequence[str], found: Sequence[dict]) -> list[float] | None:
    """The confidence in every entry of `found`, fitted on `held`; None if all of those are right, or all wrong."""
    rows, right = [entry["features"] for entry in held], [entry[label] for entry in held]
    if len({r > 0.5 for r in right}) < 2:
        return None
    calibration = fit(rows, right, features, threshold=THRESHOLD, right=RIGHT)
    return [calibration.confidence(entry["features"]) for entry in found]


def run(job: Job) -> Result:
    items, source = data.items_of(job.data)
    draws = make_draws(job.limited(items), M, job.seed)
    validation, _ = data.corpus_items("validation")
    held = measure(job, make_draws(job.limited(validation), M, job.seed), "validation")
    found = measure(job, draws, "test")
    places = iter(range(len(found)))
    clusters = [[next(places) for _ in range(draw.counted)] for draw in draws]

    def row(right: list[float], raw: list[float] | None, fitted: list[float] | None) -> list[Cell | None]:
        sure = raw if raw is not None else fitted
        return [
            interval(metric, clusters, values, right) if values is not None else None
            for metric, values in ((auroc, sure), (ece, raw), (ece, fitted), (surer_half, sure))
        ]

    right = [entry["right"] for entry in found]
    raw: dict[str, list[float] | None] = {
        name: [e["features"][feature] for e in found] if share else None for name, (feature, share) in SIGNALS.items()
    }
    features = {name: (feature,) for name, (feature, _) in SIGNALS.items()} | {"all": ALL}
    fitted = {name: _fitted(held, "right", some, found) for name, some in features.items()}
    raw["all"] = None
    if job.decoder.calibration is not None:
        raw["shipped"], fitted["shipped"] = [job.decoder.calibration.confidence(e["features"]) for e in found], None
    measured = [name for name in raw if raw[name] or fitted[name]]
    rows = {name: row(right, raw[name], fitted[name]) for name in measured}

    identified, sure = [e["identified"] for e in found], [e["features"]["softmax"] for e in found]
    sure_fitted = _fitted(held, "identified", ("softmax",), found)
    chance = f"chance {_share([1 / len(d.items) for d in draws for _ in range(d.counted)]):.1%}"
    note = f"Fitted on {len(held)} items of the own validation split, of which {_share([e['right'] for e in held]):.1%} are right."
    tables = {
        "answers": Table("Confidence in free answers", COLUMNS, rows, f"{_share(right):.1%} are right, {chance}.  {note}"),
        "identify": Table(
            "Confidence in the description that scores highest",
            COLUMNS,
            {"softmax of centred scores": row(identified, sure, sure_fitted)},
            f"{_share(identified):.1%} are right, {chance}.",
        ),
        "references": _reference_table(draws, found, clusters, held, fitted["all"], chance),
    }
    shown = {f"{name}, raw": (right, values) for name, values in raw.items() if values is not None}
    shown |= {"all, fitted": (right, fitted["all"])} if fitted["all"] else {}
    shown |= {"identify, fitted": (identified, sure_fitted)} if sure_fitted else {}
    ordered = {name: (right, raw[name] or fitted[name]) for name in measured} | {"identify": (identified, sure)}
    plots = [_reliability(shown), _abstention(ordered)]
    entries = [
        {
            "id": e["id"],
            "answer": e["answer"],
            "right": e["right"],
            "identified": e["identified"],
            "confidence": fitted["all"] and round(fitted["all"][i], 4),
            **{name: round(value, 4) for name, value in e["features"].items()},
        }
        for i, e in enumerate(found)
    ]
    settings = {"m": M, "message": FIXED_MESSAGE, "layer": job.decoder.config.default_layer, "questions": QUESTIONS, "bins": BINS}
    settings |= {"samples": SAMPLES, "temperature": TEMPERATURE, "max_new_tokens": MAX_NEW_TOKENS, "embedding": PACKAGE, "all": ALL}
    return Result(source, tables, entries, plots, settings)


def _share(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _reference_table(draws: Sequence[Draw], found: Sequence[dict], clusters: list, held: Sequence[dict], sure, chance: str) -> Table:
    """How many answers are right, and the mean fitted confidence in them.  `shuffled`: the answer to the next reading of the kind."""
    kinds = [draw.items[i].kind for draw in draws for i in range(draw.counted)]
    of_kind = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in kinds}
    donor = {i: own[(n + 1) % len(own)] for own in of_kind.values() for n, i in enumerate(own)}
    right = {
        "ours": [e["right"] for e in found],
        "shuffled": _judged(draws, [found[donor[i]]["answer"] for i in range(len(found))]),
        **{row: [e["references"][row] for e in found] for row in found[0]["references"]},
    }
    confidence = {}
    if sure is not None:
        none = _fitted(held, "right", ALL, [{"features": e["none"]} for e in found])
        confidence = {"ours": sure, "none": none, "shuffled": [sure[donor[i]] for i in range(len(found))]}

    def mean(values: Sequence[float]) -> Cell:
        return cell([[values[i] for i in cluster] for cluster in clusters])

    order = sorted(right, key=lambda row: ["ours", "none", "shuffled", "text_only", row].index(row))
    rows = {row: [mean(right[row]), mean(confidence[row]) if row in confidence else None] for row in order}
    note = f"{chance[0].upper()}{chance[1:]}; confidence: `all`, fitted."
    return Table("Free answers that are right, and the confidence in them", {"right": "%", "confidence": "%"}, rows, note)


def _reliability(shown: dict[str, tuple[list[float], list[float]]]) -> Plot:
    series = {"perfect": {"x": [0.0, 1.0], "y": [0.0, 1.0]}}
    for name, (right, confidence) in shown.items():
        bins = reliability(confidence, right)
        series[name] = {"x": [round(c, 4) for _, c, _ in bins], "y": [round(r, 4) for *_, r in bins]}
    return Plot("reliability", "Reliability: how often it is right when it is so sure", "lines", series, "confidence", "share right")


def _abstention(ordered: dict[str, tuple[list[float], list[float]]]) -> Plot:
    series = {}
    for name, (right, confidence) in ordered.items():
        curve = risk_coverage(confidence, right)
        series[name] = {"x": [round(c, 4) for c, _ in curve], "y": [round(r, 4) for _, r in curve]}
    return Plot("abstention", "Abstention: the surest answered, the others left out", "lines", series, "share answered", "share wrong")
