"""The suite `steer-curve`: does a lower control loss mean more behaviour?  The degenerate solution, looked for.

A steering is trained to please the decoder, and activations that please it need not change what the model says.  So one is trained on
long after it would have been called enough, with the default KL weight and with none (the paper's), and every EVERY steps three things
are taken at strength 1: the control loss on held-out chats (what is trained for), the behaviour of the replies (what is wanted), and
their perplexity ratio (what it costs).  Controls, replies and scorers are those of `steer-persona`, the ones named in CONTROLS.

A piece of work is one training: killed in the middle, it begins anew.  An item, for --limit, is a request under a control, as there.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from lqa.evals import embedding, steer_persona
from lqa.evals.statistics import bootstrap
from lqa.evals.steer_persona import DRAWS, FILE, Behaviour, entry, figures, replies
from lqa.evals.suite import Job, Plot, Result, Table, cell
from lqa.steering import Settings, write_pairs
from lqa.steering.training import Training

CONTROLS = ("shakespeare", "cats", "santa")
STEPS, EVERY = 60, 6  # optimizer steps, and steps between two states
COLUMNS = {"control loss": "", "behaviour": "%", "greedy": "%", "ratio": "", "distinct-2": "%", "tokens": ""}


def check(folder: Path | None) -> None:
    """Raises LqaError if the embeddings' package is missing."""
    embedding.find()


def run(job: Job) -> Result:
    chosen = [b for b in steer_persona.load("steer-persona") if b.id in CONTROLS]
    behaviours = steer_persona.limited(job, chosen)
    default = Settings().kl
    weights = {f"KL weight {default}": default, "no KL": 0.0}
    entries: list[dict] = []
    for n, b in enumerate(behaviours):
        for m, (label, weight) in enumerate(weights.items()):
            states = job.once(f"{b.id}/{weight}", partial(train, job, b, weight))["states"]
            for state in states:
                scored = entry(b, label, {"replies": state["replies"], "made": {}})
                entries.append({"step": state["step"], "control loss": state["loss"], "kl": state["kl"]} | scored)
            job.progress(n * len(weights) + m + 1, len(behaviours) * len(weights))
    plain = {(e["id"], e["method"]): e["replies"] for e in entries if e["step"] == 0}
    for e in entries:
        cells = figures(e["replies"], plain[e["id"], e["method"]])
        e["figures"] = {name: [round(x, 4) for x in (c.mean, c.low, c.high)] for name, c in cells.items() if name in COLUMNS}
    steps = sorted({e["step"] for e in entries})
    rows, series = {}, {label: {"steps": [], "loss": [], "behaviour": [], "low": [], "high": [], "ratio": []} for label in weights}
    for label, line in series.items():
        for step in steps:
            own = [e for e in entries if e["method"] == label and e["step"] == step]
            values = {c: [e["figures"][c][0] if c in e["figures"] else e[c] for e in own] for c in COLUMNS}
            rows[f"{label}, step {step}"] = [cell([[v] for v in values[c]]) for c in COLUMNS]
            mean, low, high = bootstrap([[v] for v in values["behaviour"]])
            line["steps"].append(step)
            line["loss"].append(round(sum(values["control loss"]) / len(own), 4))
            line["ratio"].append(round(sum(values["ratio"]) / len(own), 4))
            for key, value in (("behaviour", mean), ("low", low), ("high", high)):
                line[key].append(round(value, 4))
    note = f"Means over {len(behaviours)} controls at strength 1, {DRAWS} sampled replies to each request; step 0 is the unsteered model."
    band = {label: {"low": line["low"], "high": line["high"]} for label, line in series.items()}
    titles = [
        ("steps", "Behaviour over the steps of a training", "steps", "behaviour", "step"),
        ("loss", "Behaviour against the loss that is trained for, step by step", "loss", "behaviour", "held-out control loss (nats)"),
        ("fluency", "What it costs: perplexity ratio over the steps", "steps", "ratio", "step"),
    ]
    plots = []
    for name, title, x, y, unit in titles:
        lines = {k: {"x": v[x], "y": v[y]} | (band[k] if y == "behaviour" and x == "steps" else {}) for k, v in series.items()}
        plots.append(Plot(name, title, "lines", lines, unit, "perplexity ratio" if y == "ratio" else y))
    return Result(
        data={"name": ", ".join(b.id for b in behaviours), "sha256": hashlib.sha256(FILE.read_bytes()).hexdigest()},
        tables={"curve": Table("Control loss, behaviour and fluency over the steps of a training", COLUMNS, rows, note)},
        items=entries,
        plots=plots,
        settings={"steps": STEPS, "every": EVERY, "seed": job.seed},
    )


def train(job: Job, b: Behaviour, kl: float) -> dict[str, list[dict]]:
    """{"states": step, held-out control loss and KL (nats), replies; at step 0, the unsteered target, and at every EVERY-th step}."""
    decoder = job.decoder
    settings = Settings.of(decoder, steps=STEPS, evaluate=EVERY, patience=STEPS, certainty=None, kl=kl, seed=job.seed)
    training = Training(decoder, write_pairs(decoder, b.control), settings, b.control)
    states = []

    def keep(step: int) -> None:
        loss, divergence = training.evaluate()
        said = replies(decoder, partial(decoder.base.decoding, training.name), b.requests, job.seed)
        states.append({"step": step, "loss": round(loss, 5), "kl": round(divergence, 5), "replies": said})

    try:
        keep(0)
        training.run(lambda p: keep(p.step) if p.step % EVERY == 0 else None)
    finally:
        decoder.base.remove_adapter(training.name)
    return {"states": states}
