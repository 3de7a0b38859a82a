"""New controls, written by any model behind an OpenAI-compatible endpoint: seed, expand, probe (LatentQA, section 3), then judge.

Categories and examples come from seed files in the corpus's own schema.  A *seed* call invents a set of four near-neighbours, which
become each other's contrast partners; each of them is *expanded* to control, acknowledgement, stimuli and descriptions, *probed* with
questions, and *judged*.  Every reply is checked by the schema's own rules; one that is malformed, refused, leaking or repeated is counted
and asked for again.  A set of which fewer than three pass is replaced by another.

Each answered call is in OUT/calls.jsonl before it is used.  A request depends on nothing but the settings, the seeds and the earlier
replies in its own category, so the same command makes the same requests again, and those already answered cost nothing: after a kill it
goes on, and with a larger --controls it continues.  OUT/controls.yaml holds the controls, OUT/provenance.json says where they come from.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from string import Template

import yaml

from lqa.corpus import HERE, schema
from lqa.corpus.schema import Control, content_words, parse_control, problems, read_controls
from lqa.errors import LqaError
from lqa.journal import Journal, write_whole

SET = 4  # near-neighbours that one seed call invents
FEWEST = 3  # of them must pass, so that each has two contrast partners
ROUNDS = 2  # versions of a control that are judged before it is given up
TAKEN = 200  # details that a seed prompt lists as taken
STEPS = ("seed", "expand", "probe", "judge")
FAULTS = ("malformed", "refused", "leaking", "repeated")
VERDICTS = ("faithful", "specific", "blind", "everyday", "harmless")
_REFUSAL = re.compile(r"\b(i'm sorry|i am sorry|i apologi[sz]e|i'm unable|i (cannot|can't|won't|am unable|must decline)|as an ai)\b", re.I)


class Fault(Exception):
    """What is wrong with a reply: one of FAULTS, and a text that tells the model."""

    def __init__(self, name: str, text: str):
        super().__init__(text)
        self.name = name


@cache
def _prompts() -> tuple[dict, str]:
    """The prompts and their version."""
    text = (HERE / "prompts.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text), hashlib.sha256(text.encode()).hexdigest()[:12]


def _fill(name: str, **values) -> str:
    bounds = {key: f"{low} to {high}" for key, (low, high) in schema.WORDS.items()}
    return Template(_prompts()[0][name]).substitute(bounds | values)


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "- (none)"


def _shown(entry: dict, *hidden: str) -> str:
    """An entry in a prompt, without some of its fields."""
    return json.dumps({k: v for k, v in entry.items() if k not in hidden}, ensure_ascii=False)


# --- replies ---------------------------------------------------------------------------------------------------


def read_reply(text: str, finish: str) -> dict:
    """The JSON object in a reply, which may stand in prose or a code fence or after a chain of thought.  Raises Fault."""
    if finish in ("refusal", "content_filter"):
        raise Fault("refused", "the request was refused")
    body = re.sub(r"<think>.*?</think>", "", text, flags=re.S)
    decoder = json.JSONDecoder(strict=False)  # models put line breaks into strings
    for start in re.finditer(r"\{", body):
        with contextlib.suppress(ValueError, RecursionError):
            value = decoder.raw_decode(body, start.start())[0]
            json.dumps(value, ensure_ascii=False).encode()  # a ValueError for half of a surrogate pair, which no file takes
            return value
    if _REFUSAL.search(body.replace("\u2019", "'")[:300]):
        raise Fault("refused", "the request was refused")
    raise Fault("malformed", "it holds no complete JSON object" + (" and was cut off; be briefer." if finish == "length" else "."))


def _only(reply: dict, *names: str) -> dict:
    if set(reply) != set(names):
        raise Fault("malformed", f"the object must have exactly the keys {', '.join(names)}, not {', '.join(map(str, reply)) or 'none'}.")
    return reply


def _parse(entry: dict, ignore: str | None = None) -> Control:
    """The schema's own checks, as Faults; problems that contain `ignore` are not meant."""
    try:
        control = parse_control(entry, "reply")
        found = [p.removeprefix(f"{control.id}: ") for p in problems(control) if not (ignore and ignore in p)]
    except (ValueError, TypeError) as error:  # TypeError: a number or a mapping where a list or text should be
        raise Fault("malformed", f"{str(error).removeprefix('reply: ')}.") from error
    if leaks := [p for p in found if p.endswith("with the control")]:
        raise Fault("leaking", "; ".join(leaks) + ".")
    if found:
        raise Fault("malformed", "; ".join(found) + ".")
    return control


def _distinct(name: str, texts: Iterable[str]) -> None:
    if twice := [text for text, n in Counter(" ".join(text.lower().split()) for text in texts).items() if n > 1]:
        raise Fault("repeated", f"the {name} {twice[0]!r} occurs twice.")


@dataclass(frozen=True)
class Idea:
    """A control that a seed call invented; `id` as in the schema."""

    id: str
    text: str


def read_seed(reply: dict, category: str, taken: Iterable[str]) -> list[Idea]:
    """The ideas of a seed reply.  Raises Fault."""
    ideas = _only(reply, "controls")["controls"]
    if not isinstance(ideas, list) or len(ideas) != SET:
        raise Fault("malformed", f"'controls' must be a list of exactly {SET} entries.")
    for idea in ideas:
        if not isinstance(idea, dict) or not all(isinstance(idea.get(k), str) for k in ("detail", "idea")):
            raise Fault("malformed", "every entry of 'controls' must have the texts 'detail' and 'idea'.")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", idea["detail"]):
            raise Fault("malformed", f"the detail {idea['detail']!r} must be lower-case words joined by hyphens.")
        if not 4 <= len(idea["idea"].split()) <= 60:
            raise Fault("malformed", f"the idea of {idea['detail']!r} must be one sentence.")
    details = [idea["detail"] for idea in ideas]
    if again := sorted(set(details) & set(taken)) or sorted(d for d, n in Counter(details).items() if n > 1):
        raise Fault("repeated", f"these details are taken: {', '.join(again)}.")
    return [Idea(f"{category}-{idea['detail']}", " ".join(idea["idea"].split())) for idea in ideas]


def read_expansion(reply: dict, ident: str, contrast: list[str]) -> dict:
    """The entry that an expand reply makes, still without questions.  Raises Fault."""
    entry = {"id": ident, **_only(reply, "control", "acknowledgement", "stimuli", "descriptions", "short"), "qa": [], "contrast": contrast}
    control = _parse(entry, ignore=": qa needs ")
    _distinct("stimulus", control.stimuli)
    _distinct("description", control.descriptions)
    return entry


def read_probe(reply: dict, entry: dict) -> dict:
    """The entry completed with the questions of a probe reply.  Raises Fault."""
    entry = {**entry, "qa": _only(reply, "qa")["qa"]}
    _distinct("question", [pair.question for pair in _parse(entry).qa])
    return entry


def read_verdict(reply: dict) -> str:
    """What the judge found wrong; "" if nothing.  Raises Fault."""
    _only(reply, *VERDICTS, "reason")
    if not all(isinstance(reply[name], bool) for name in VERDICTS) or not isinstance(reply["reason"], str):
        raise Fault("malformed", f"{', '.join(VERDICTS)} must be true or false, and 'reason' a text.")
    wrong = [name for name in VERDICTS if not reply[name]]
    return f"not {', not '.join(wrong)}: {' '.join(reply['reason'].split())}" if wrong else ""


# --- the steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the requests depend on, beside the seeds: a journal made under other settings is not continued."""

    model: str
    judge_model: str
    request: dict  # further fields of every request, such as {"temperature": 0.8}
    seed: int
    attempts: int  # how often one reply is asked for before what it was for is given up
    prompts: str  # their version
    seeds: str  # a hash of the seed controls


class Generator:
    """Makes sets of controls, one category independently of the others.  `progress` has tqdm's update and set_postfix."""

    def __init__(self, endpoint, journal: Journal, settings: Settings, seeds: list[Control], progress):
        self.endpoint, self.journal, self.settings, self.progress = endpoint, journal, settings, progress
        self.seeds: dict[str, list[Control]] = defaultdict(list)
        for control in seeds:
            self.seeds[f"{control.kind}-{control.category}"].append(control)
        self.replies = {step: Counter() for step in STEPS}
        self.used: dict[str, dict] = {}  # the journal's records that this run made use of
        self.rejected = self.given_up = self.incomplete = self.paid = 0

    def _draw(self, category: str, purpose: str, n: int) -> list[Control]:
        """Seed controls as examples, the same in every run."""
        pool = self.seeds[category]
        return random.Random(f"{self.settings.seed}/{purpose}").sample(pool, min(n, len(pool)))

    async def _call(self, step: str, about: str, attempt: int, messages: list[dict]) -> dict:
        """The journal's record of this call: an old one, or a new one once it is on disk."""
        model = self.settings.judge_model if step == "judge" else self.settings.model
        body = {"model": model, "messages": messages, **self.settings.request}
        key = hashlib.sha256(json.dumps([about, attempt, body], sort_keys=True).encode()).hexdigest()[:32]
        record = self.journal.records.get(key)
        if record is None:
            reply = await self.endpoint.complete(body)
            time = datetime.now(UTC).isoformat(timespec="seconds")
            record = {"key": key, "step": step, "about": about, "attempt": attempt, "time": time, **asdict(reply)}
            self.paid += 1
            try:
                self.journal.add(record)
            except LqaError as error:
                self.endpoint.stop(error)
                raise
        self.used[key] = record
        return record

    async def _ask(self, step: str, about: str, prompt: str, read: Callable[[dict], object]):
        """What `read` makes of the first reply that it accepts; None after as many attempts as the settings allow."""
        asked = [{"role": "user", "content": f"{_prompts()[0]['preface']}\n\n{prompt}"}]  # not every model's template has a system role
        messages = asked
        for attempt in range(1, self.settings.attempts + 1):
            record = await self._call(step, about, attempt, messages)
            try:
                value = read(read_reply(record["text"], record["finish"]))
            except Fault as fault:
                self.replies[step][fault.name] += 1
                messages = asked  # a refusal left in the chat invites another
                if fault.name != "refused" and record["text"].strip():
                    again = _fill("again", problem=str(fault))
                    messages = [*asked, {"role": "assistant", "content": record["text"]}, {"role": "user", "content": again}]
                value = None
            else:
                self.replies[step]["accepted"] += 1
            redone = sum(counts[name] for counts in self.replies.values() for name in FAULTS)
            self.progress.set_postfix(calls=len(self.used), redone=redone, refresh=False)
            if value is not None:
                return value
        return None

    async def _control(self, idea: Idea, ideas: list[Idea]) -> dict | None:
        """One control, expanded, probed and passed by the judge."""
        kind, category, _ = idea.id.split("-", 2)
        others = [other for other in ideas if other is not idea]
        neighbours = _listed(f"{other.id}: {other.text}" for other in others)
        drawn = [asdict(control) for control in self._draw(f"{kind}-{category}", idea.id, 2)]
        examples = _listed(_shown(entry, "id", "qa", "contrast") for entry in drawn)
        about = {"id": idea.id, "kind": kind, **_prompts()[0]["kinds"][kind], "idea": idea.text, "neighbours": neighbours}
        questions = _listed(pair["question"] for entry in drawn for pair in entry["qa"])
        contrast, remark = [other.id for other in others], ""
        for number in range(1, ROUNDS + 1):
            name = f"{idea.id}/{number}"
            prompt = _fill("expand", examples=examples, remark=remark, **about)
            entry = await self._ask("expand", name, prompt, partial(read_expansion, ident=idea.id, contrast=contrast))
            if entry is None:
                break
            facts = _prompts()[0]["scenario"] if kind == "scenario" else ""
            shown = _shown(entry, "qa", "contrast")
            prompt = _fill("probe", entry=shown, neighbours=neighbours, examples=questions, scenario=facts)
            entry = await self._ask("probe", name, prompt, partial(read_probe, entry=entry))
            if entry is None:
                break
            prompt = _fill("judge", entry=_shown(entry, "contrast"), neighbours=neighbours)
            wrong = await self._ask("judge", name, prompt, read_verdict)
            if wrong is None:
                break
            if not wrong:
                return entry
            self.rejected += 1
            remark = "\n" + _fill("rejected", reason=wrong) + "\n"
        self.given_up += 1
        return None

    async def _set(self, ideas: list[Idea]) -> list[dict]:
        """The controls of one set that passed, each with the others as contrast partners; [] if too few did."""
        made = [entry for entry in await asyncio.gather(*(self._control(idea, ideas) for idea in ideas)) if entry]
        self.progress.update(len(made) if len(made) >= FEWEST else 0)
        return partnered(made)

    async def category(self, name: str, wanted: int) -> list[list[dict]]:
        """`wanted` sets of controls of a category, or as many as the model manages with twice the seed calls and two more."""
        kind = name.split("-")[0]
        taken = [control.id.split("-", 2)[2] for control in self.seeds[name]]
        done, number = [], 0
        while len(done) < wanted and number < 2 * wanted + 2:
            under_way = []
            try:
                for _ in range(wanted - len(done)):
                    number += 1
                    about = f"{name}/{number}"
                    examples = _listed(f"{c.id.split('-', 2)[2]}: {c.descriptions[0]}" for c in self._draw(name, about, 6))
                    listed = _listed([", ".join(taken[-TAKEN:])] if taken else [])
                    about_kind = _prompts()[0]["kinds"][kind]
                    prompt = _fill("seed", kind=kind, category=name, examples=examples, taken=listed, **about_kind)
                    ideas = await self._ask("seed", about, prompt, partial(read_seed, category=name, taken=tuple(taken)))
                    if ideas is not None:
                        taken += [idea.id.split("-", 2)[2] for idea in ideas]
                        under_way.append(asyncio.create_task(self._set(ideas)))
                made = await asyncio.gather(*under_way)
            finally:
                await asyncio.gather(*under_way, return_exceptions=True)
            self.incomplete += sum(not entries for entries in made)
            done += [entries for entries in made if entries]
        return done


def partnered(entries: list[dict]) -> list[dict]:
    """The entries of one set with each other as contrast partners; [] if they are too few to be that."""
    if len(entries) < FEWEST:
        return []
    return [{**entry, "contrast": [other["id"] for other in entries if other is not entry]} for entry in entries]


def assemble(sets: Iterable[list[dict]], seeds: Iterable[Control]) -> tuple[list[dict], int]:
    """The final list of entries, in the order of `sets`, and how many were left out because their control repeats another's words."""
    seen = {frozenset(content_words(control.control)) for control in seeds}
    entries, repeated = [], 0
    for group in sets:
        kept = []
        for entry in group:
            words = frozenset(content_words(entry["control"]))
            if words in seen:
                repeated += 1
            else:
                seen.add(words)
                kept.append(entry)
        entries += partnered(kept)
    return entries, repeated


def shares(categories: list[str], controls: int) -> dict[str, int]:
    """{category: sets}: `controls`, rounded up to whole sets, dealt round; with more controls no category gets fewer."""
    total = -(-controls // SET)
    return {name: total // len(categories) + (i < total % len(categories)) for i, name in enumerate(categories)}


# --- provenance -------------------------------------------------------------------------------------------------


def spent(records: Iterable[dict], price: tuple[float, float] | None) -> dict:
    """Tokens and cost in USD of the calls.

    `price` is USD per million tokens (prompt, completion); without it the cost is what the endpoint reported with every call, else None.
    Calls whose usage the endpoint did not report are counted, not guessed.
    """
    usages = [record["usage"] for record in records]
    known = [u for u in usages if isinstance(u.get("prompt_tokens"), int) and isinstance(u.get("completion_tokens"), int)]
    tokens = {name: sum(u[f"{name}_tokens"] for u in known) for name in ("prompt", "completion")}
    cost = None
    if price is not None:
        cost = (tokens["prompt"] * price[0] + tokens["completion"] * price[1]) / 1e6
    elif usages and all(isinstance(u.get("cost"), int | float) for u in usages):
        cost = float(sum(u["cost"] for u in usages))
    return {"tokens": tokens, "calls_without_usage": len(usages) - len(known), "cost_usd": cost}


# --- the command ------------------------------------------------------------------------------------------------


def add_arguments(parser) -> None:
    """The flags of `python -m lqa data generate`."""
    add = parser.add_argument
    add("--endpoint", required=True, metavar="URL", help="base URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    add("--model", required=True, metavar="NAME", help="the model that writes")
    add("--out", required=True, metavar="DIR", help="folder for calls.jsonl, controls.yaml, provenance.json; a run goes on in its own")
    add("--controls", type=int, default=100, metavar="N", help=f"how many controls; they come in sets of {SET} neighbours (default: 100)")
    add("--seeds", nargs="+", metavar="FILE", help="controls in the corpus's schema: categories, examples (default: the authored corpus)")
    add("--category", action="append", metavar="NAME", help="only this kind-category of the seeds; may be given several times")
    add("--judge-model", metavar="NAME", help="the model that judges (default: the one that writes)")
    add("--key-env", default="OPENAI_API_KEY", metavar="VAR", help="environment variable that holds the key, if one is needed")
    add("--request", default="{}", metavar="JSON", help="further fields of every request, such as '{\"temperature\": 0.8}'")
    add("--concurrency", type=int, default=8, metavar="N", help="requests under way at once (default: 8)")
    add("--rpm", type=float, metavar="N", help="at most N requests a minute")
    add("--timeout", type=float, default=120, metavar="S", help="seconds that an answer may take (default: 120)")
    add("--retries", type=int, default=6, metavar="N", help="how often a failing request is sent again (default: 6)")
    add("--attempts", type=int, default=3, metavar="N", help="how often a reply that cannot be used is asked for (default: 3)")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="USD per million prompt and completion tokens, to record the cost")
    add("--seed", type=int, default=0, metavar="N", help="seed of the draws of examples (default: 0)")
    add("--json", action="store_true", help="print one JSON document on stdout and nothing else there")


def read_seeds(paths: list[str] | None) -> list[Control]:
    """The seed controls.  Raises LqaError for a file that is not in the schema or breaks its rules: bad examples teach bad habits."""
    files = [Path(p) for p in paths] if paths else sorted((HERE / "controls").glob("*.yaml"))
    controls = []
    for file in files:
        try:
            found = read_controls([file])
        except (ValueError, TypeError) as error:
            text = " ".join(str(error).split())
            raise LqaError(f"The seed file {file} cannot be used: {text[:300].rstrip('.')}; AUTHORING.md shows the form.") from error
        if broken := [p for control in found for p in problems(control)]:
            text = f"The seed file {file} breaks {len(broken)} rule(s), the first: {broken[0].rstrip('.')}"
            raise LqaError(f"{text}; `python -m lqa.corpus.schema {file}` lists them.")
        controls += found
    if not controls:
        raise LqaError("The seed files hold no control; give at least one for each category.")
    return controls


def _checked(options) -> tuple[list[Control], list[str], dict]:
    """The seeds, the categories, and --request; everything is checked before anything is paid for."""
    for name, low in (("controls", 1), ("concurrency", 1), ("attempts", 1), ("retries", 0)):
        if getattr(options, name) < low:
            raise LqaError(f"--{name} must be at least {low}, not {getattr(options, name)}.")
    for name in ("timeout", "rpm"):
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise LqaError(f"--{name} must be greater than 0, not {value:g}.")
    try:
        request = json.loads(options.request)
    except ValueError as error:
        raise LqaError(f"--request is not JSON ({error}); write for instance '{{\"temperature\": 0.8}}'.") from error
    if not isinstance(request, dict) or set(request) & {"model", "messages", "stream", "n"}:
        raise LqaError("--request must be a JSON object without model, messages, stream or n; write for instance '{\"temperature\": 0.8}'.")
    seeds = read_seeds(options.seeds)
    known = sorted({f"{c.kind}-{c.category}" for c in seeds})
    if unknown := [name for name in options.category or () if name not in known]:
        raise LqaError(f"The seeds have no category {unknown[0]!r}; they have {', '.join(known)}.")
    return seeds, sorted(set(options.category)) if options.category else known, request


def run(options) -> None:
    """Runs the command; see the module's head.  Raises LqaError; what was answered until then stays in the journal."""
    seeds, categories, request = _checked(options)
    settings = Settings(
        model=options.model,
        judge_model=options.judge_model or options.model,
        request=request,
        seed=options.seed,
        attempts=options.attempts,
        prompts=_prompts()[1],
        seeds=hashlib.sha256(json.dumps([asdict(c) for c in seeds]).encode()).hexdigest()[:12],
    )
    key = os.environ.get(options.key_env, "").strip() or None
    if key is None and options.key_env != "OPENAI_API_KEY":
        raise LqaError(f"The environment variable {options.key_env} of --key-env is not set; put the key into it.")
    out = Path(options.out)
    with Journal(out / "calls.jsonl", asdict(settings), width=options.concurrency) as journal:
        try:
            document = asyncio.run(_generate(options, settings, seeds, categories, key, journal))
        except LqaError as error:
            if not journal.records:
                raise
            kept = f"the {len(journal.records)} finished calls are kept in {out}, and the same command goes on from there"
            raise LqaError(f"{str(error).rstrip('.')}; {kept}.") from error
    if not document["controls"]:
        found = {name: sum(counts[name] for counts in document["replies"].values()) for name in FAULTS}
        faults = ", ".join(f"{n} were {name}" for name, n in found.items() if n)
        raise LqaError(f"No control passed: of {document['calls']} replies {faults or 'none was at fault'}; try a more capable --model.")
    if options.json:
        print(json.dumps({"out": str(out), **document}, ensure_ascii=False))
    else:
        cost = "" if document["cost_usd"] is None else f", {document['cost_usd']:.2f} USD"
        new = f"{document['paid_now']} of {document['calls']} calls made now{cost}"
        print(f"{document['controls']} controls in {out / 'controls.yaml'}; {new}; {document['rejected']} versions rejected by the judge")


async def _generate(options, settings: Settings, seeds, categories, key, journal: Journal) -> dict:
    from tqdm import tqdm

    from lqa.endpoint import Endpoint
    from lqa.provenance import code_version

    wanted = {name: n for name, n in shares(categories, options.controls).items() if n}
    endpoint = Endpoint(
        options.endpoint,
        key,
        key_name=options.key_env,
        concurrency=options.concurrency,
        rpm=options.rpm,
        timeout=options.timeout,
        retries=options.retries,
    )
    loop = asyncio.get_running_loop()

    def interrupt() -> None:  # the first Ctrl-C waits for the calls under way, the second does not
        loop.remove_signal_handler(signal.SIGINT)
        endpoint.stop(LqaError("Interrupted."))

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
        loop.add_signal_handler(signal.SIGINT, interrupt)
    total = SET * sum(wanted.values())
    async with endpoint:
        with tqdm(total=total, unit="control", disable=None) as bar:  # None: no bar where nobody watches
            generator = Generator(endpoint, journal, settings, seeds, bar)
            try:
                made = await asyncio.gather(*(generator.category(name, n) for name, n in wanted.items()))
            except BaseException as error:  # the calls under way are paid for: they are waited for, and written down
                endpoint.stop(error if isinstance(error, LqaError) else LqaError("Another part of the run failed."))
                await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
                raise
    entries, repeated = assemble((group for sets in made for group in sets), seeds)
    assert not schema.check([parse_control(entry, "generated") for entry in entries])
    records = list(generator.used.values())
    times = sorted(record["time"] for record in records)
    document = {
        "endpoint": re.sub(r"//[^/@]*@", "//", options.endpoint),
        **asdict(settings),
        "code": code_version(),
        "served_models": sorted({record["model"] for record in records if record["model"]}),
        "started": times[0],
        "finished": times[-1],
        "controls": len(entries),
        "categories": dict(sorted(Counter("-".join(entry["id"].split("-")[:2]) for entry in entries).items())),
        "calls": len(records),
        "replies": {step: {name: counts[name] for name in ("accepted", *FAULTS)} for step, counts in generator.replies.items()},
        "rejected": generator.rejected,
        "given_up": generator.given_up,
        "incomplete_sets": generator.incomplete,
        "repeated_controls": repeated,
        "failures": dict(sorted(sum((Counter(record["failures"]) for record in records), Counter()).items())),
        **spent(records, options.price),
    }
    head = f"# Written by {settings.model}, prompts {settings.prompts}; provenance.json says more.\n"
    write_whole(journal.path.with_name("controls.yaml"), head + yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=140))
    write_whole(journal.path.with_name("provenance.json"), json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return {**document, "paid_now": generator.paid}
