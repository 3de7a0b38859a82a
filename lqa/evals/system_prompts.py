"""The suite `system-prompts` (Pan et al. 2024, hidden system prompts): which persona is the assistant, from a user's everyday message?

Ten personas a set, one for each of ten system prompts; the target reads system prompt and message, and only the message's tokens (with the
header of the reply) are read.  The message is the same for all ten, so it gives nothing away.  In the set `hard` they come in pairs that
share trade, time and place.

    choice   the persona whose answer has the highest score: log-probability less its mean over the ten readings; chance is 10 %
    named    the free answer contains the name

With several messages the scores of a persona's readings are averaged, and the name is the one that most free answers contain (a tie
counts as the share of a blind pick).

    message and reply    the bare model is shown the message and the reply that it gave under the system prompt, and asked
    selfie, patchscopes  from the last token of the message's turn
    nearest              of the ten system prompts to what is injected, where the conditioning maps it to such texts: not the decoder's LoRA
    probe                trained on the same personas under other messages: what a linear reader that was told the ten could find
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from lqa.chat import render, resolve_span
from lqa.decoder import LatentDecoder, Reading
from lqa.evals import batch
from lqa.evals.baselines.nearest import nearest
from lqa.evals.baselines.patchscopes import DESCRIPTION, patchscope
from lqa.evals.baselines.probe import cross_validated
from lqa.evals.baselines.selfie import WRITE_LAYER, selfie
from lqa.evals.identify import hits
from lqa.evals.mention import contains
from lqa.evals.suite import Cell, Job, Plot, Result, Table, cell
from lqa.grounding import TEXT_ONLY

FILE = Path(__file__).parent / "system_prompts.yaml"
SETS = ("easy", "hard")
SPAN = "turn:-1"
NEW_TOKENS = 12
REPLY_TOKENS = 32
COUNTS = (1, 2, 4, 8)  # messages
ROWS = {
    "ours": "the decoder",
    "none": "none (slots not patched)",
    "shuffled": "shuffled (the next persona's activations)",
    "text_only": "text_only (bare model, the message as text)",
    "text_only_trained": "text_only_trained (decoder trained on text in place of slots)",
    "reply": "message and reply (bare model, both as text)",
    "selfie": "SelfIE",
    "patchscopes": "Patchscopes (entity description, l* = l)",
    "nearest": "nearest (what is injected, against the ten prompts; no decoder)",
    "probe": "linear probe (trained on the other messages)",
}


@dataclass(frozen=True)
class Persona:
    """A persona to be found out: its system prompt, and the answer that names it.  `names`: any of them names it."""

    name: str
    names: tuple[str, ...]
    system: str
    answer: str


def load() -> tuple[dict[str, list[Persona]], list[str], str]:
    """The personas of each set, the messages, and the question."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    sets = {s: [Persona(p["name"], (p["name"], *p.get("also", [])), p["system"], p["answer"]) for p in data[s]] for s in SETS}
    return sets, data["messages"], data["question"]


def run(job: Job) -> Result:
    sets, messages, question = load()
    if job.limit is not None:  # an item is a persona under a message
        messages = messages[: max(1, job.limit // sum(map(len, sets.values())))]
    counts = [n for n in COUNTS if n <= len(messages)]
    total = len(sets) * (len(messages) + 1)
    done: dict[str, list[dict]] = {}
    probed: dict[str, dict] = {}
    for name, personas in sets.items():
        done[name] = []
        for m, message in enumerate(messages):
            made = job.once(f"{name}/{m}", lambda p=personas, message=message: _message(job, p, message, question))
            done[name].append(made)
            job.progress(sum(map(len, done.values())) + len(probed), total)
        if len(messages) > 1:  # it is trained on the others
            probed[name] = job.once(f"{name}/probe", lambda p=personas: _probe(job, p, messages))
        job.progress(sum(map(len, done.values())) + len(probed), total)

    tables, plots, items = {}, [], []
    titles = ROWS | {name: name for name in job.rows}
    columns = {f"{what}, {n}": "%" for what in ("choice", "named") for n in counts}
    for name, personas in sets.items():
        methods = {method: [made[method] for made in done[name]] for method in done[name][0]}
        methods["shuffled"] = [{k: v[1:] + v[:1] for k, v in made.items()} for made in methods["ours"]]
        if name in probed:
            methods["probe"] = [{"scores": scores} for scores in probed[name]["scores"]]
        rows, series = {}, {}
        for method in [m for m in titles if m in methods]:
            made = methods[method]
            chosen = [_cell([choice(personas, [part["scores"] for part in group]) for group in groups(made, n)]) for n in counts]
            named = [
                _cell([majority(personas, [part["texts"] for part in group]) for group in groups(made, n)]) if "texts" in made[0] else None
                for n in counts
            ]
            rows[titles[method]] = [*chosen, *named]
            series[titles[method]] = {
                "x": counts,
                "y": [c.mean for c in chosen],
                "low": [c.low for c in chosen],
                "high": [c.high for c in chosen],
            }
        note = f"Chance of a choice is {1 / len(personas):.0%}. Layer {job.decoder.config.default_layer}; intervals by persona."
        tables[name] = Table(f"Hidden system prompts, {name}: accuracy from 1 to {counts[-1]} messages", columns, rows, note)
        plots.append(Plot(f"system-prompts-{name}", f"Hidden system prompts, {name}", "lines", series, "messages", "share right"))
        plots.append(_confusion(name, personas, methods["ours"]))
        for m, made in enumerate(methods["ours"]):
            chosen = choice(personas, [made["scores"]])
            for i, persona in enumerate(personas):
                entry = {"id": f"{name}/{persona.name}/{m}", "answer": made["texts"][i], "choice": chosen[i]}
                items.append(entry | {"scores": [round(score, 4) for score in made["scores"][i]]})
    return Result(
        data={"name": "20 personas written for this suite", "sha256": hashlib.sha256(FILE.read_bytes()).hexdigest()},
        tables=tables,
        items=items,
        plots=plots,
        settings={"question": question, "messages": messages, "span": SPAN, "new_tokens": NEW_TOKENS, "reply_tokens": REPLY_TOKENS},
    )


# --- what is computed ----------------------------------------------------------------------------------------------


def _chat(persona: Persona, message: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": persona.system}, {"role": "user", "content": message}]


def _message(job: Job, personas: Sequence[Persona], message: str, question: str) -> dict[str, dict]:
    """{method: {"scores": one row of log-probabilities for each persona's reading, "texts": its free answer}}."""
    decoder, answers = job.decoder, [persona.answer for persona in personas]
    runner, target = batch.adapted(decoder), batch.bare(decoder)

    def read(other: LatentDecoder) -> list[Reading]:
        return [job.read(_chat(persona, message), SPAN, None, other) for persona in personas]

    def both(runner: batch.Runner, prompts: Sequence[batch.Prompt]) -> dict[str, list]:
        return {"scores": batch.matrix(runner, prompts, answers), "texts": batch.texts(runner, prompts, NEW_TOKENS)}

    def told(reply: str) -> batch.Prompt:
        visible = f"User: {message}\nAssistant: {reply}"
        return batch.plain(decoder.base, [{"role": "user", "content": TEXT_ONLY.format(visible=visible, question=question)}])

    readings = read(decoder)
    replies = batch.texts(target, [batch.plain(decoder.base, _chat(persona, message)) for persona in personas], REPLY_TOKENS)
    last = torch.stack([reading.activations[-1] for reading in readings])  # of the last layer, if several are read
    # The colon, which the paper's model writes itself, is given, so that answers can be scored behind it.
    described = patchscope(decoder.base, last, DESCRIPTION + ":", "x")
    asked, n = [batch.ask(reading, question, source) for source in ("true", "none") for reading in readings], len(readings)
    read_or_not = both(runner, asked)
    found = {
        "ours": {what: rows[:n] for what, rows in read_or_not.items()},
        "none": {what: rows[n:] for what, rows in read_or_not.items()},
        "text_only": both(target, [batch.text_only(reading, question) for reading in readings]),
        "reply": both(target, [told(reply) for reply in replies]),
        "selfie": both(batch.bare(decoder, WRITE_LAYER), selfie(decoder.base, last)),
        "patchscopes": both(batch.bare(decoder, readings[0].layers[-1]), described),
    }
    if decoder.config.conditioning == "projected":
        found["nearest"] = {"scores": nearest(readings, [persona.system for persona in personas])}
    for name, other in job.further.items():
        found[name] = both(batch.adapted(other), [batch.ask(reading, question) for reading in read(other)])
    return found


def _probe(job: Job, personas: Sequence[Persona], messages: Sequence[str]) -> dict[str, list]:
    """{"scores": for every message, a row of log-probabilities for each persona's reading}, from probes trained on the other messages."""
    base, layer = job.decoder.base, job.decoder.config.check_layers(None)[-1]
    rendered = [render(base.tokenizer, _chat(persona, message)) for message in messages for persona in personas]
    states = batch.states(base, rendered, [layer])
    means = torch.stack([s[layer][resolve_span(SPAN, r)].mean(0) for s, r in zip(states, rendered, strict=True)])
    labels = [persona.name for _ in messages for persona in personas]
    groups = [str(m) for m in range(len(messages)) for _ in personas]
    logprobs, names = cross_validated(means, labels, groups, seed=job.seed)
    logprobs = logprobs[:, [names.index(persona.name) for persona in personas]].clip(min=-50)  # log 0 has no mean to be centred on
    n = len(personas)
    return {"scores": [logprobs[m * n : (m + 1) * n].tolist() for m in range(len(messages))]}


# --- what is reported ----------------------------------------------------------------------------------------------


def groups(made: Sequence, n: int) -> list[Sequence]:
    """The messages, n by n; what is left over belongs to no group."""
    return [made[i : i + n] for i in range(0, len(made) - n + 1, n)]


def choice(personas: Sequence[Persona], matrices: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """For every persona, 1 if its own answer has the highest centred score, averaged over messages; a tie counts in part."""
    return hits(torch.tensor(matrices, dtype=torch.float64).mean(0).tolist(), len(personas))


def majority(personas: Sequence[Persona], texts: Sequence[Sequence[str]]) -> list[float]:
    """For every persona, 1 if most of its free answers (one list of answers for each message) that name anybody name it."""
    named = []
    for i in range(len(personas)):
        counts = Counter(j for answers in texts for j, p in enumerate(personas) if any(contains(answers[i], name) for name in p.names))
        top = [j for j, count in counts.items() if count == max(counts.values())]
        named.append(1 / len(top) if i in top else 0.0)
    return named


def _cell(values: Sequence[Sequence[float]]) -> Cell:
    """The mean over groups and personas, clustered by persona."""
    return cell(list(zip(*values, strict=True)))


def _confusion(name: str, personas: Sequence[Persona], made: Sequence[dict]) -> Plot:
    """Which persona a single message's scores choose: rows are the truth."""
    s = torch.tensor([part["scores"] for part in made], dtype=torch.float64)
    picks = torch.nn.functional.one_hot((s - s.mean(1, keepdim=True)).argmax(-1), len(personas)).double().mean(0)
    names = [persona.name for persona in personas]
    series = {"": {"x": names, "y": names, "values": [[round(v, 4) for v in row] for row in picks.tolist()]}}
    return Plot(f"system-prompts-{name}-confusion", f"Hidden system prompts, {name}: the choice", "matrix", series, "chosen", "true")
