"""The suite `relations` (Pan et al. 2024, relation extraction; data of Ghandeharioun et al. 2024, section 4.2): facts about a subject.

A snippet of text mentions a subject; from the target's activations of the snippet, what is the subject's object under a relation (country:
currency)?  The decoder never saw such questions.  All methods read the same target passes, over a chat whose one user turn is the snippet:

    ours, none, shuffled   the whole turn, with its header, and an authored question
    text_only              the snippet as text, and the same question
    patchscopes, selfie, logit lens, probe    the subject's last token
    told                   no reading: the bare model goes on with the relation's prompt, the subject in it as text; what it knows at all

An answer counts if it contains the object as a word (a plural counts too); the logit lens names one token, which has to be the object's
first.  Numbers are means over the decoder's read layers (over all its readings, if it reads several layers at once: what reads a single one
is then given the last of them).

A second table has the snippet in a hidden system turn and reads a user's message that says nothing: there the decoder's own conditioning
applies, which it does not where nothing is hidden, and the text gives nothing away.
"""

from __future__ import annotations

import csv
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lqa.activations import Layer, layer_name
from lqa.chat import Rendered, render
from lqa.decoder import Reading
from lqa.errors import LqaError
from lqa.evals import batch
from lqa.evals.baselines.logit_lens import logit_lens
from lqa.evals.baselines.patchscopes import patchscope
from lqa.evals.baselines.probe import cross_validated, learnable
from lqa.evals.baselines.selfie import WRITE_LAYER, selfie
from lqa.evals.data import RELATIONS_HOME
from lqa.evals.mention import contains
from lqa.evals.suite import Cell, Job, Plot, Result, Table, cell

COLUMNS = ("prompt_target", "prompt_source", "subject", "object")
QUESTIONS = {
    "country_currency": "What is the currency of the country that is mentioned?",
    "food_from_country": "Which country does the food that is mentioned come from?",
    "person_plays_pro_sport": "Which sport does the person who is mentioned play?",
    "person_plays_position_in_sport": "Which position does the player who is mentioned play?",
    "product_by_company": "Which company makes the product that is mentioned?",
    "star_constellation": "Which constellation is the star that is mentioned in?",
}
SPAN = "turn:-1"
CARRIER = "Please go on."  # the message that is read where the snippet is hidden
NEW_TOKENS = 16
CHUNK = 64  # items of one entry in the journal
PROBED = 200  # rows of a relation, at most, that the probe is trained and tested on
ROWS = {
    "ours": "the decoder",
    "none": "none (slots not patched)",
    "shuffled": "shuffled (the next snippet's activations)",
    "text_only": "text_only (bare model, the snippet as text)",
    "text_only_trained": "text_only_trained (decoder trained on text in place of slots)",
    "patchscopes": "Patchscopes (l* = l)",
    "patchscopes_best": "Patchscopes (best l* of the read layers, chosen on these items)",
    "selfie": "SelfIE",
    "logit_lens": "logit lens",
    "probe": "linear probe (cross-validated by subject)",
    "told": "told (bare model, relation prompt with the subject as text)",
}
HIDDEN_TEXT_ONLY = f'text_only (bare model, "{CARRIER}" as text)'


@dataclass(frozen=True)
class Item:
    """One row of a relation's file.  `id`: file and line, which is all that results say of it."""

    id: str
    relation: str
    prompt: str
    snippet: str
    subject: str
    object: str


def load(folder: str | Path | None) -> tuple[dict[str, list[Item]], dict[str, str], dict[str, int]]:
    """The items of every *.tsv in `folder` or its `relations`, by relation; what they are (name, sha256); how many rows each file lost.

    A row is left out, as in the data's own code, if its snippet is empty or has a line break, and if the subject is not in the snippet.
    Raises LqaError that names the data's public home.
    """
    if folder is None:
        raise LqaError(f"The suite relations needs its TSV files; get them from {RELATIONS_HOME} and name their folder with --data.")
    paths = next((found for place in (Path(folder), Path(folder, "relations")) if (found := sorted(place.glob("*.tsv")))), [])
    items: dict[str, list[Item]] = {}
    lost: dict[str, int] = {}
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t"))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise LqaError(f"{path} cannot be read ({error}); get it from {RELATIONS_HOME}.") from error
        if not rows or (missing := [name for name in COLUMNS if any(row.get(name) is None for row in rows)]):
            what = f"lacks the column {missing[0]}" if rows else "is empty"
            raise LqaError(f"{path} {what}; it is not one of the relations' files, get them from {RELATIONS_HOME}.")
        if len(prompts := {row["prompt_target"] for row in rows}) > 1:
            raise LqaError(f"{path} has {len(prompts)} prompts; a file holds one relation, get them from {RELATIONS_HOME}.")
        made = [
            Item(f"{path.stem}/{n}", path.stem, row["prompt_target"], row["prompt_source"].strip(), row["subject"], row["object"])
            for n, row in enumerate(rows)
            if row["subject"] and row["object"] and row["subject"] in row["prompt_source"] and "\n" not in row["prompt_source"]
        ]
        lost[path.stem] = len(rows) - len(made)
        if made:
            items[path.stem] = made
    if not items:
        raise LqaError(f"{folder} holds no relations (TSV files with rows that can be used); get them from {RELATIONS_HOME}.")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    return items, {"name": f"relations ({', '.join(items)})", "sha256": digest}, lost


def check(folder: Path | None) -> None:
    """Raises LqaError if the suite cannot run on this data."""
    load(folder)


def question_of(item: Item) -> str:
    """The authored question, or for a relation without one a question made of its prompt ("The capital of x")."""
    prompt = re.sub(r"(?<!\w)x(?!\w)", "the one that is mentioned", item.prompt.strip())
    return QUESTIONS.get(item.relation) or f"What is {prompt[:1].lower()}{prompt[1:]}?"


def last_token(tokenizer, rendered: Rendered, subject: str) -> int:
    """The index of the last token of the first mention of `subject` in the last turn."""
    offsets = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    begin = rendered.text.rindex(rendered.chat[-1][1])
    end = rendered.text.index(subject, begin) + len(subject)
    return max(i for i, (start, _) in enumerate(offsets) if start < end)


def choose(items: dict[str, list[Item]], limit: int | None, seed: int) -> dict[str, list[Item]]:
    """At most `limit` items, the relations' shares as equal as their sizes allow; seeded."""
    chosen = {name: random.Random(f"{seed}/{name}").sample(rows, len(rows)) for name, rows in items.items()}
    if limit is None:
        return chosen
    left, out = limit, {}
    for n, name in enumerate(sorted(chosen, key=lambda name: len(chosen[name]))):
        share = -(-left // (len(chosen) - n))
        out[name] = chosen[name][:share]
        left -= len(out[name])
    return {name: out[name] for name in chosen if out[name]}


def run(job: Job) -> Result:
    items, data, lost = load(job.data)
    everything, chosen = items, choose(items, job.limit, job.seed)
    decoder = job.decoder
    layers, default = list(map(layer_name, decoder.config.readings)), layer_name(decoder.config.check_layers(None))
    parts = {name: _cut(rows) for name, rows in chosen.items()}
    work: list[tuple[str, Callable[[], dict]]] = []
    for name, chunks in parts.items():
        for n, chunk in enumerate(chunks):
            work.append((f"{name}/{n}/text", lambda chunk=chunk: _from_text(job, chunk)))
            work.append((f"{name}/{n}/hidden", lambda chunk=chunk: _hidden(job, chunk, default)))
            work += [(f"{name}/{n}/{layer}", lambda chunk=chunk, layer=layer: _read(job, chunk, layer)) for layer in layers]
        work.append((f"{name}/probe", lambda name=name: _probe(job, everything[name], chosen[name])))
    done = {}
    for n, (key, make) in enumerate(work, start=1):
        done[key] = job.once(key, make)
        job.progress(n, len(work))

    answers: dict[str, dict[Layer | None, dict[str, str]]] = {}  # method -> layer (None: has none) -> item -> answer
    hidden: dict[str, dict[str, str]] = {}
    for name, chunks in parts.items():
        for n, chunk in enumerate(chunks):
            for key, layer in [("text", None), *((layer, layer) for layer in layers)]:
                for method, texts in done[f"{name}/{n}/{key}"].items():
                    answers.setdefault(method, {}).setdefault(layer, {}).update({i.id: t for i, t in zip(chunk, texts, strict=True)})
            for method, texts in done[f"{name}/{n}/hidden"].items():
                hidden.setdefault(method, {}).update({i.id: t for i, t in zip(chunk, texts, strict=True)})
        for layer in layers:
            answers.setdefault("probe", {}).setdefault(layer, {}).update(done[f"{name}/probe"][str(layer)])

    hits = {method: {layer: _hits(chosen, method, texts) for layer, texts in by.items()} for method, by in answers.items()}
    _best_target_layer(hits, layers)
    titles = ROWS | {name: name for name in job.rows}
    shown = [method for method in titles if method in hits]
    columns = {**dict.fromkeys(chosen, "%"), "all": "%"}
    rows = {titles[m]: [*(_cell(rows, hits[m]) for rows in chosen.values()), _cell(_all(chosen), hits[m])] for m in shown}
    note = (
        f"Share of answers that contain the object; means over the read layers {', '.join(map(str, layers))}; intervals by subject. The "
        f"probe is trained on up to {PROBED} rows of a relation; an object that no other subject has is beyond it and counts as a miss "
        f"({_share_learnable(everything, chosen):.0%} of these items are within it)."
    )
    apart = {method: {default: _hits(chosen, method, texts)} for method, texts in hidden.items()}
    names = titles | {"text_only": HIDDEN_TEXT_ONLY}
    other = {names[m]: [*(_cell(rows, apart[m]) for rows in chosen.values()), _cell(_all(chosen), apart[m])] for m in names if m in apart}
    series = {}
    for method in shown:
        by_layer = {k: hits[method].get(k, hits[method].get(None)) for k in layers}  # those without layers are a level line
        cells = {k: _cell(_all(chosen), {k: by}) for k, by in by_layer.items() if by is not None}
        series[titles[method]] = {
            "x": [k if isinstance(k, int) else str(k) for k in cells],
            "y": [c.mean for c in cells.values()],
            "low": [c.low for c in cells.values()],
            "high": [c.high for c in cells.values()],
        }
    entries = [
        {
            "id": i.id,
            "layer": k,
            "answer": answers["ours"][k][i.id],
            "hits": {m: by[place][i.id] for m, by in hits.items() for place in (k, None) if place in by},
        }
        for i in _all(chosen)
        for k in layers
    ]
    return Result(
        data=data,
        tables={
            "read": Table("Relations: the snippet is read", columns, rows, note),
            "hidden": Table(
                f'Relations: the snippet is hidden, "{CARRIER}" is read, layer {default}',
                columns,
                other,
                "The snippet is the system turn; the activations of the user's turn go through the decoder's conditioning.",
            ),
        },
        items=entries,
        plots=[Plot("relations", "Relations, all items", "lines", series, x="read layer", y="share of answers with the object")],
        settings={
            "questions": {name: question_of(rows[0]) for name, rows in chosen.items()},
            "span": SPAN,
            "carrier": CARRIER,
            "layers": layers,
            "new_tokens": NEW_TOKENS,
            "items": {name: len(rows) for name, rows in chosen.items()},
            "left_out": lost,
        },
    )


def _cut(rows: list[Item]) -> list[list[Item]]:
    """Parts of at most CHUNK items, as equal as possible: a part of one would have no other reading for `shuffled`."""
    n = -(-len(rows) // CHUNK)
    return [rows[len(rows) * i // n : len(rows) * (i + 1) // n] for i in range(n)]


def _all(chosen: dict[str, list[Item]]) -> list[Item]:
    return [item for rows in chosen.values() for item in rows]


# --- what is computed ----------------------------------------------------------------------------------------------


def _visible(item: Item) -> list[dict[str, str]]:
    return [{"role": "user", "content": item.snippet}]


def _asked(job: Job, chats: Sequence, layer: Layer, question: str) -> tuple[list[Reading], dict[str, list[str]]]:
    """The decoder's readings of chats, and its answers: "ours", "none", "shuffled", and "ours" of every further decoder of the run."""
    readings = [job.read(chat, SPAN, layer) for chat in chats]
    donors = readings[1:] + readings[:1] if len(readings) > 1 else [None]
    sources, pairs = {"ours": "true", "none": "none", "shuffled": "shuffled"}, list(zip(readings, donors, strict=True))
    asked = [batch.ask(reading, question, source, donor) for source in sources.values() for reading, donor in pairs]
    said = iter(batch.texts(batch.adapted(job.decoder), asked, NEW_TOKENS))
    found = {method: [next(said) for _ in pairs] for method in sources}
    for name, other in job.rows.items():
        if other.config.reads(layer):
            prompts = [batch.ask(job.read(chat, SPAN, layer, other), question) for chat in chats]
            found[name] = batch.texts(batch.adapted(other), prompts, NEW_TOKENS)
    return readings, found


def _read(job: Job, chunk: Sequence[Item], layer: Layer) -> dict[str, list[str]]:
    """Every method's answers from the activations of `layer`."""
    decoder, base = job.decoder, job.decoder.base
    readings, found = _asked(job, [_visible(item) for item in chunk], layer, question_of(chunk[0]))
    at = [r.span.index(last_token(base.tokenizer, r.rendered, i.subject)) for r, i in zip(readings, chunk, strict=True)]
    subjects = torch.stack([r.activations[n - len(r.span)] for r, n in zip(readings, at, strict=True)])  # in the last layer's block
    prompts = patchscope(base, subjects, chunk[0].prompt, "x")
    for target in sorted(decoder.config.read_layers):
        found[f"patchscopes/{target}"] = batch.texts(batch.bare(decoder, target), prompts, NEW_TOKENS)
    found["patchscopes"] = found[f"patchscopes/{readings[0].layers[-1]}"]
    found["selfie"] = batch.texts(batch.bare(decoder, WRITE_LAYER), selfie(base, subjects), NEW_TOKENS)
    top = logit_lens(base, subjects).argmax(-1).tolist()
    # One token cannot contain the object: where it is the object's first, the object is entered for it.
    found["logit_lens"] = [i.object if t in first_tokens(base.tokenizer, i.object) else "" for i, t in zip(chunk, top, strict=True)]
    return found


def first_tokens(tokenizer, name: str) -> set[int]:
    """The tokens that `name` may begin with: at the start of a text or behind a space, as written, in lower case or capitalised."""
    forms = {form for n in (name, name.lower(), name[:1].upper() + name[1:]) for form in (n, " " + n)}
    return {tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms}


def _hidden(job: Job, chunk: Sequence[Item], layer: Layer) -> dict[str, list[str]]:
    chats = [[{"role": "system", "content": item.snippet}, {"role": "user", "content": CARRIER}] for item in chunk]
    question = question_of(chunk[0])
    readings, found = _asked(job, chats, layer, question)
    found["text_only"] = batch.texts(batch.bare(job.decoder), [batch.text_only(reading, question) for reading in readings], NEW_TOKENS)
    if (trained := job.text_only_trained) is not None:
        own = [batch.ask(job.read(chat, SPAN, None, trained), question) for chat in chats]
        found["text_only_trained"] = batch.texts(batch.adapted(trained), own, NEW_TOKENS)
    return found


def _from_text(job: Job, chunk: Sequence[Item]) -> dict[str, list[str]]:
    """The bare model's answers, to which layers do not matter."""
    tokenizer, question = job.decoder.base.tokenizer, question_of(chunk[0])
    prompts = [re.sub(r"(?<!\w)x(?!\w)", lambda _, i=i: i.subject, i.prompt) for i in chunk]
    told = [batch.Prompt(tuple(tokenizer(prompt)["input_ids"])) for prompt in prompts]
    shown = [batch.text_only(job.read(_visible(item), SPAN), question) for item in chunk]
    bare = batch.bare(job.decoder)
    found = {"text_only": batch.texts(bare, shown, NEW_TOKENS), "told": batch.texts(bare, told, NEW_TOKENS)}
    if (trained := job.text_only_trained) is not None:
        own = [batch.ask(job.read(_visible(item), SPAN, None, trained), question) for item in chunk]
        found["text_only_trained"] = batch.texts(batch.adapted(trained), own, NEW_TOKENS)
    return found


def _probe(job: Job, rows: Sequence[Item], chosen: Sequence[Item]) -> dict[str, dict[str, str]]:
    """{layer: {item: object}}: what a probe that never saw the item's subject takes its object for; "" where it cannot say."""
    base, layers = job.decoder.base, {str(layer_name(own)): own[-1] for own in job.decoder.config.readings}
    ids = {item.id for item in chosen}
    others = [item for item in rows if item.id not in ids]
    room = max(0, PROBED - len(chosen))
    used = [*chosen, *random.Random(job.seed).sample(others, min(room, len(others)))]
    rendered = [render(base.tokenizer, _visible(item)) for item in used]
    states = batch.states(base, rendered, sorted(set(layers.values())))
    at = [last_token(base.tokenizer, r, i.subject) for r, i in zip(rendered, used, strict=True)]
    objects, subjects = [item.object for item in used], [item.subject for item in used]
    if len(set(subjects)) < 2:
        return {name: {item.id: "" for item in chosen} for name in layers}
    found = {}
    for name, layer in layers.items():
        x = torch.stack([s[layer][n] for s, n in zip(states, at, strict=True)])
        logprobs, names = cross_validated(x, objects, subjects, seed=job.seed)
        best = [names[row.argmax()] if row.max() > -float("inf") else "" for row in logprobs]
        found[name] = {item.id: said for item, said in zip(used, best, strict=True) if item.id in ids}
    return found


# --- what is reported ----------------------------------------------------------------------------------------------


def _hits(chosen: dict[str, list[Item]], method: str, texts: dict[str, str]) -> dict[str, float]:
    """1 for every item whose answer contains its object.  The probe names an object, which has to be the item's."""
    exact = method == "probe"
    return {i.id: float(texts[i.id] == i.object if exact else contains(texts[i.id], i.object)) for i in _all(chosen)}


def _best_target_layer(hits: dict, layers: Sequence[int]) -> None:
    """Patchscopes over the target layers l*: for every read layer the l* with the most hits, in favour of the baseline."""
    targets = [m for m in hits if m.startswith("patchscopes/")]
    hits["patchscopes_best"] = {k: max((hits[m][k] for m in targets), key=lambda by: sum(by.values())) for k in layers}
    for method in targets:
        del hits[method]


def _cell(items: Sequence[Item], by_layer: dict) -> Cell:
    """The mean over items of their mean over layers; clustered by subject."""
    clusters: dict[str, list[float]] = {}
    for item in items:
        values = [by[item.id] for by in by_layer.values()]
        clusters.setdefault(f"{item.relation}/{item.subject}", []).append(sum(values) / len(values))
    return cell(list(clusters.values()))


def _share_learnable(everything: dict[str, list[Item]], chosen: dict[str, list[Item]]) -> float:
    within = {name: learnable([i.object for i in rows], [i.subject for i in rows]) for name, rows in everything.items()}
    items = _all(chosen)
    return sum(item.object in within[item.relation] for item in items) / len(items)
