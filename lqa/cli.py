"""The command line: `python -m lqa ask | score | steer | chat | eval | data | push | bench`.  Bad input: a sentence, exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from lqa.corpus import generate
from lqa.errors import LqaError


def _chat(options) -> list[dict[str, str]]:
    """The chat of --chat, or of --user and --system; checked before any model is loaded."""
    from lqa.chat import check_chat

    if options.chat is not None:
        if options.user is not None or options.system is not None:
            raise LqaError("Give either --chat or --user (with --system), not both.")
        return _chat_file(options.chat)
    if options.user is None:
        raise LqaError("Give the chat with --user TEXT (and --system TEXT), or with --chat FILE.json.")
    system = [{"role": "system", "content": options.system}] if options.system is not None else []
    return check_chat([*system, {"role": "user", "content": options.user}])


def _chat_file(path: str) -> list[dict[str, str]]:
    from lqa.chat import check_chat

    try:
        chat = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LqaError(f"The chat file {path} cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise LqaError(f"The chat file {path} is not JSON ({error}); it must hold a list of role/content messages.") from error
    return check_chat(chat)


def _read(options):
    """The reading of the chat, span and layer that the flags name; all files are checked before any model is loaded."""
    chat = _chat(options)
    reference = None if options.reference is None else _chat_file(options.reference)
    layer = None if options.layer is None else _layers(options.layer)
    return _decoder(options).read(chat, _span(options.span), layer, reference=reference)


def _layers(text: str) -> list[int]:
    """The layers `7` or `7,14,21`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise LqaError(f"The layer {text!r} is no number of a block; write 14, or 7,14,21 for a decoder that reads several.") from error


def _span(text: str):
    """A span as DESIGN writes it; a list of indices as `3,5,8`."""
    parts = text.split(",")
    return [int(p) for p in parts] if len(parts) > 1 and all(p.strip().isdigit() for p in parts) else text


def _decoder(options):
    from lqa.decoder import LatentDecoder

    where = {name: value for name in ("revision", "subfolder", "preset") if (value := getattr(options, name, None)) is not None}
    return LatentDecoder.from_pretrained(options.decoder, **where)


def _print(document: dict) -> None:
    print(json.dumps(document, ensure_ascii=False))


def ask(options) -> None:
    from lqa.calibration import CANNOT_TELL

    reading = _read(options)
    answers = reading.ask(options.question, grounding=options.grounding, max_new_tokens=options.max_new_tokens)
    if options.json:
        entries = [asdict(a) for a in answers]
        entries = [{"question": e["question"], "answer": e["text"], **{k: e[k] for k in ("confidence", "grounding")}} for e in entries]
        return _print({"answers": entries, "tokens": reading.tokens, "span": list(reading.span), "layer": reading.layer})
    for a in answers:
        print(f"Q: {a.question}\nA: {a.text}   (confidence {a.confidence:.2f}{f'; {CANNOT_TELL}' if a.cannot_tell else ''})")
        for name, text in asdict(a.grounding).items() if a.grounding else ():
            print(f"   {name}: {text}")


def score(options) -> None:
    reading = _read(options)
    scores = reading.score(options.question, options.answer)
    if options.json:
        return _print({"question": options.question, "answers": [asdict(s) for s in scores]})
    print(f"Q: {options.question}\n   logprob   without activations   (mean per token, nats)")
    for s in sorted(scores, key=lambda s: s.logprob - s.logprob_none, reverse=True):
        print(f"{s.logprob:10.3f} {s.logprob_none:21.3f}   {s.text}")


def steer(options) -> None:
    from lqa.steering import check_pairs, load_pairs

    if (options.control is None) == (options.qa is None):
        raise LqaError("Give either --control TEXT or --qa FILE.json.")
    if options.control is not None and not options.control.strip():
        raise LqaError("The control is empty; write how the model shall behave.")
    pairs = check_pairs(load_pairs(options.qa)) if options.qa is not None else None
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)  # found out now, not after the training
    except OSError as error:
        raise LqaError(f"The folder {out} cannot be made ({error}); name another one with --out.") from error
    settings = {name: value for name in ("method", "steps") if (value := getattr(options, name)) is not None}

    def progress(p) -> None:
        found = f"step {p.step}/{p.steps}  loss {p.loss:.3f} (decoder {p.control:.3f}, KL {p.kl:.3f})"
        found += f"  held out {p.held_out:.3f}" if p.held_out is not None else ""
        print(f"{found}  {p.seconds_left:.0f} s left", file=sys.stderr, flush=True)

    steering = _decoder(options).steer(options.control, pairs, progress=progress, **settings)
    steering.save(out)
    record = steering.record
    if options.json:
        return _print({"out": options.out, **{key: record[key] for key in ("steps", "seconds", "loss", "qa")}})
    for question, answer in record["qa"]:
        print(f"Q: {question}\nA: {answer}")
    print(f"{options.out}: {record['steps']} steps in {record['seconds']:.0f} s, held-out loss {record['loss']:.3f}")


def chat(options) -> None:
    from contextlib import nullcontext

    messages = _chat(options)
    if options.strength is not None:
        from lqa.steering import check_strength

        if options.steering is None:
            raise LqaError("--strength is the strength of a steering; name one with --steering DIR.")
        check_strength(options.strength)
    decoder = _decoder(options)
    strength = {} if options.strength is None else {"strength": options.strength}
    with decoder.load_steering(options.steering).apply(**strength) if options.steering is not None else nullcontext():
        pieces = decoder.stream_reply(messages, max_new_tokens=options.max_new_tokens)
    if options.json:
        return _print({"reply": "".join(pieces).strip()})
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def evaluate(options) -> None:
    from lqa.evals import runner

    first, *rest = options.suites
    if first == "report":
        if not rest:
            raise LqaError("Name at least one results folder: `python -m lqa eval report DIR`.")
        return runner.print_report(rest)
    if first == "tables":
        written = runner.write_tables(rest, options.decoder, options.out or "README.md")
        return print("\n".join(written))
    if (options.endpoint is None) != (options.judge is None):
        raise LqaError("Give --endpoint URL and --judge MODEL together: that model behind that endpoint judges the answers.")
    if first == "judge":
        if len(rest) != 1 or options.judge is None:
            raise LqaError("Name one results folder and a judge: `python -m lqa eval judge DIR --endpoint URL --judge MODEL`.")
        runner.judge(rest[0], options.data, options.endpoint, options.judge)
        return runner.print_report(rest)
    if options.out is None:
        raise LqaError("Name a folder for the results with --out DIR.")
    if options.judge is not None:
        from lqa.evals.judge import JUDGED

        if not set(JUDGED) & set(options.suites):
            raise LqaError(f"--judge judges the answers of a suite of {', '.join(JUDGED)}; name it among the suites.")
    runner.run(
        options.suites,
        options.out,
        folder=options.data,
        decoder_source=options.decoder,
        limit=options.limit,
        seed=options.seed,
        sweep=options.sweep,
        text_only_trained=options.text_only_trained,
        rows=[row for row in options.rows.split(",") if row],
        methods=[name for name in options.methods.split(",") if name],
        examples=options.examples,
    )
    if options.judge is not None:
        runner.judge(options.out, options.data, options.endpoint, options.judge)
    runner.print_report([options.out])


def push(options) -> None:
    from lqa import hub

    about = {"results": options.results, "dataset": options.dataset}
    if options.dry_run:
        plan = hub.prepare(options.kind, options.path, options.repo_id, **about)
        print("\n".join(f"{size:>12,}  {name}" for name, size in plan.sizes().items()))
        return print(f"\n{hub.README}:\n\n{plan.card}")
    pushed = hub.push(options.kind, options.path, options.repo_id, private=options.private, **about)
    print(f"{pushed.url}: {f'{len(pushed.files)} files, ' if pushed.changed else 'nothing has changed, '}commit {pushed.commit}")


def bench(options) -> None:
    from lqa import bench as benchmarks

    if options.name == "read":
        result = benchmarks.bench_read(options.decoder, repeats=options.repeats)
    elif options.name == "steer":
        result = benchmarks.bench_steer(options.decoder, repeats=options.repeats)
    else:
        result = benchmarks.bench_train(options.config, repeats=options.repeats)
    _print(result) if options.json else print(benchmarks.format_bench(result))


def _needs_train(run):
    """`run`, with a sentence for people where the packages of the extra `train` are missing."""

    def checked(options) -> None:
        try:
            run(options)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "lqa":
                raise
            raise LqaError(f"This command needs the package {error.name}; run `pip install 'lqa[train]'`.") from error

    return checked


@_needs_train
def data_build(options) -> None:
    from lqa.corpus.build import build

    configs = build(options.out, extra=options.controls, against=options.against, base=options.base, seed=options.seed)
    sizes = {config: {name: len(rows) for name, rows in splits.items()} for config, splits in configs.items()}
    _print({"out": options.out, "rows": sizes}) if options.json else print(f"{options.out}: {sizes}")


@_needs_train
def data_complete(options) -> None:
    from lqa.corpus.completions import complete
    from lqa.models import load_base

    names = ("draws", "limit", "temperature", "top_p", "max_new_tokens", "seed")
    kept = complete(load_base(options.base), options.out, **{name: getattr(options, name) for name in names})
    _print({"out": options.out, "replies": kept}) if options.json else print(f"{options.out}: {kept} replies")


@_needs_train
def data_import(options) -> None:
    from lqa.corpus.latentqa import import_latentqa

    sizes = {name: len(rows) for name, rows in import_latentqa(options.folder, options.out).items()}
    _print({"out": options.out, "rows": {"latentqa": sizes}}) if options.json else print(f"{options.out}: {sizes}")


@_needs_train
def data_stats(options) -> None:
    from lqa.corpus.checks import contamination
    from lqa.corpus.stats import load_readings, sample, statistics, table

    splits = load_readings(options.folder)
    if options.sample is not None:
        return print(sample(splits, options.sample, options.seed))
    columns, close = {options.folder: statistics(splits)}, None
    if options.against is not None:
        other = load_readings(options.against)
        columns[options.against] = statistics(other)
        close = contamination(*([row for part in side.values() for row in part] for side in (splits, other)))
    if options.json:
        return _print({"statistics": columns, "close": close})
    print(table(columns))
    if close is not None:
        print("\n".join(["", f"Items close to one of {options.against}, by wording or meaning: {len(close)}", *close]))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m lqa", description="Read a language model's activations in natural language.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--decoder", metavar="PATH|HUB_ID", help="a decoder folder or Hub id (default: the embedded one)")
        return sub

    def chat_flags(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--revision", metavar="REV", help="a branch, tag or commit of the decoder on the Hub (default: main)")
        sub.add_argument("--subfolder", metavar="NAME", help="where in its repository or folder the decoder lies")
        sub.add_argument("--preset", metavar="NAME", help="for a decoder without a sidecar: latentqa, activation-oracle")
        sub.add_argument("--user", metavar="TEXT", help="the user's message")
        sub.add_argument("--system", metavar="TEXT", help="a system prompt before it")
        sub.add_argument("--chat", metavar="FILE.json", help="a whole chat instead: a list of role/content messages")
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")

    def reading_flags(sub: argparse.ArgumentParser) -> None:
        chat_flags(sub)
        spans = "all, system, user, assistant, turn:T, from:T, last:N, A:B, or indices 3,5,8 (default: all)"
        sub.add_argument("--span", default="all", help=spans)
        text = "read layer, a 0-based block; several as 7,14,21, for a decoder that reads them at once (default: the decoder's)"
        sub.add_argument("--layer", metavar="K", help=text)
        text = "for a decoder that reads differences: a chat with the same visible turns to compare with (default: these turns alone)"
        sub.add_argument("--reference", metavar="FILE.json", help=text)

    sub = command("ask", ask, "Ask questions about the activations of a chat.")
    reading_flags(sub)
    sub.add_argument("-q", "--question", action="append", required=True, metavar="Q", help="a question; may be given several times")
    sub.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="longest answer in tokens (default: 48)")
    sub.add_argument("--grounding", action="store_true", help="also answer from no activations, another chat's, and the visible text only")

    sub = command("score", score, "Score given answers to a question, with and without the activations.")
    reading_flags(sub)
    sub.add_argument("-q", "--question", required=True, metavar="Q", help="the question")
    sub.add_argument("--answer", action="append", required=True, metavar="A", help="an answer to score; give several to compare")

    sub = command("steer", steer, "Train a steering: say how the target shall behave, and the decoder's loss makes it so.")
    sub.add_argument("--control", metavar="TEXT", help="how the target shall behave")
    sub.add_argument("--qa", metavar="FILE.json", help="instead: a list of [question, answer], what the decoder shall say of the target")
    sub.add_argument("--out", required=True, metavar="DIR", help="where to write the steering")
    sub.add_argument("--method", choices=["joint", "per-layer"], help="one loss, or one for each part of the blocks (default: joint)")
    sub.add_argument("--steps", type=int, metavar="N", help="at most so many optimizer steps")
    sub.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")

    sub = command("chat", chat, "Let the target itself reply to a chat, steered or not.")
    chat_flags(sub)
    sub.add_argument("--steering", metavar="DIR", help="a steering's folder")
    sub.add_argument("--strength", metavar="X", help="how strongly: 0 is the unsteered model, 1 the steering as trained (default: 1)")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest reply in tokens (default: 128)")

    text = "Evaluate a decoder against its references and baselines."
    sub = command("eval", evaluate, f"{text} `eval report DIR ...` prints results again; `eval tables` writes them into README.md.")
    sub.add_argument(
        "suites",
        nargs="+",
        metavar="SUITE",
        help="of reading: identify, open, system-prompts, relations, sensitivity, calibration; of steering: steer-persona, generalise, "
        "crows-pairs, inversion, steer-curve; or: report DIR ...; or: judge DIR; "
        "or: tables [DIR --decoder FOLDER]",
    )
    sub.add_argument("--data", metavar="DIR", help="outside evaluation data (default: the corpus's own test split)")
    text = "use at most N items of a suite, drawn with the seed (of steering: an item is a request under a control; of crows-pairs: a pair)"
    sub.add_argument("--limit", type=int, metavar="N", help=text)
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of draws and samples (default: 0)")
    sub.add_argument("--sweep", action="store_true", help="identify also by read form, span and layer; steer-persona also by strength")
    sub.add_argument("--text-only-trained", metavar="DIR", help="a decoder trained with visible_text=true, as a further reference")
    sub.add_argument(
        "--rows", default="", metavar="LIST", help="fakes as further rows of identify: random, untrained, or folders, separated by commas"
    )
    text = "suites of steering: some of unsteered, system_prompt, caa, sft, dpo, steering, separated by commas (default: all)"
    sub.add_argument("--methods", default="", metavar="LIST", help=text)
    text = "suites of steering: the budget of each trained method in gradient examples (default: a steering's own)"
    sub.add_argument("--examples", type=int, metavar="N", help=text)
    sub.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible endpoint, such as http://localhost:8000/v1, for --judge")
    sub.add_argument(
        "--judge",
        metavar="MODEL",
        help="a model there that judges the answers of open, the replies of steer-persona and generalise; its key: OPENAI_API_KEY",
    )
    sub.add_argument("--out", metavar="DIR", help="where to write the results; killed, the same command goes on there")

    data = commands.add_parser("data", help="Make, import, check and publish the QA corpus.", description="The QA corpus.")
    parts = data.add_subparsers(dest="part", required=True, metavar="PART")

    def part(name: str, run, text: str, seed: str | None = None) -> argparse.ArgumentParser:
        sub = parts.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
        if seed:
            sub.add_argument("--seed", type=int, default=0, metavar="N", help=f"{seed} (default: 0)")
        return sub

    sub = part("build", data_build, "Check the corpus and write it as a dataset.", "draws messages and questions")
    sub.add_argument("--out", default="dataset", metavar="DIR", help="the dataset's folder (default: dataset)")
    sub.add_argument(
        "--controls", nargs="+", default=[], metavar="FILE.yaml", help="further controls, in the schema of lqa/corpus/controls"
    )
    sub.add_argument("--against", metavar="DIR", help="fail if an item is close to one of this corpus")
    sub.add_argument("--base", metavar="PATH|HUB_ID", help="the model whose tokens `context` is counted in (default: the embedded one)")

    sub = part("complete", data_complete, "Sample the target's own replies under every control.", "of the sampling")
    sub.add_argument("--out", required=True, metavar="FILE.jsonl", help="the replies; a file that is there is gone on with")
    sub.add_argument("--base", metavar="PATH|HUB_ID", help="the model that replies (default: the embedded one)")
    sub.add_argument("--draws", type=int, default=2, metavar="N", help="replies to each control (default: 2)")
    sub.add_argument("--limit", type=int, metavar="N", help="take only N controls, drawn with the seed")
    sub.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (default: 0.8)")
    sub.add_argument("--top-p", type=float, default=0.95, metavar="X", help="nucleus of the sampling (default: 0.95)")
    sub.add_argument("--max-new-tokens", type=int, default=96, metavar="N", help="longest reply in tokens (default: 96)")

    sub = part("import-latentqa", data_import, "Turn LatentQA's JSON files into this corpus's schema.")
    sub.add_argument("folder", metavar="DIR", help="their folder, or one that holds such folders (train, eval)")
    sub.add_argument("--out", required=True, metavar="DIR", help="the dataset's folder")

    sub = part("stats", data_stats, "Print a corpus's figures, or a random draw of its items.", "of --sample")
    sub.add_argument("folder", nargs="?", default="dataset", metavar="DIR", help="a dataset, or LatentQA's JSON files (default: dataset)")
    sub.add_argument("--against", metavar="DIR", help="another corpus: its figures beside, and items of the first that are close to it")
    sub.add_argument("--sample", type=int, metavar="N", help="print N random readings instead")

    text = "Write new controls with a model behind an OpenAI-compatible endpoint."
    sub = parts.add_parser("generate", help=text, description=text)
    generate.add_arguments(sub)
    sub.set_defaults(run=generate.run)

    text = "Publish a folder on the Hub as one commit, with a card; needs a token (`hf auth login`)."
    sub = commands.add_parser("push", help=text, description=text)
    sub.set_defaults(run=push)
    sub.add_argument("kind", choices=["decoder", "steering", "dataset", "space"])
    sub.add_argument("path", metavar="PATH", help="the folder; for a Space, a clone of lqa's repository")
    sub.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the Hub")
    sub.add_argument("--private", action="store_true", help="make the repository private")
    sub.add_argument("--dry-run", action="store_true", help="print the files and the card, and send nothing; needs no network")
    sub.add_argument("--results", metavar="DIR", help="of a decoder: the results folder whose figures go into its card")
    sub.add_argument("--dataset", metavar="REPO_ID", help="of a decoder: its corpus on the Hub, which the card then links")

    sub = command("bench", bench, "Measure speed against named alternatives in the same run.")
    sub.add_argument("name", choices=["read", "train", "steer"])
    sub.add_argument("--config", default="train/configs/smollm2-135m-instruct.yaml", help="training config for `train`")
    sub.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds; medians are reported (default: 3)")
    sub.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    return top


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        options.run(options)
    except LqaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
