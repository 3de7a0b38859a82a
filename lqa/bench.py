"""Benchmarks: reading, training and steering, each against named alternatives that are measured in the same run.

`bench_read`, `bench_train` and `bench_steer` return {schedule: {"seconds": [one per round], "ratio": x, "ratio_is": what x divides,
...}}; with a limit, "target" and "met" stand beside the ratio.  Schedules alternate within a run, so that a drifting machine slows all
of them alike, and ratios are of medians.  Progress goes to stderr.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lqa import engine
from lqa.activations import Capture, gather_spans
from lqa.chat import render, resolve_span
from lqa.conditioning import REFERENCED, condition, reference
from lqa.decoder import LatentDecoder, Reading
from lqa.errors import LqaError
from lqa.injection import Injection
from lqa.models import Base, load_base

CHAT = [
    {"role": "system", "content": "You are a ship's cook from the age of sail. Speak like an old pirate and never say that you are an AI."},
    {"role": "user", "content": "I have half an hour and almost nothing in the kitchen: rice, two eggs and an onion. What could I make?"},
]
SPAN = "user"

READ_TARGETS = {"paper": (">=", 10.0), "generate": ("<=", 1.0)}
STEER_TARGETS = {"paper": (">=", 2.0)}
TRAIN_TARGETS = {"paper": (">=", 1.4), "sft": ("<=", 1.25)}
MEMORY_TARGET = ("<=", 1.2)
TRAIN_SCHEDULES = ("ours", "packed", "paper", "sft")
TIE = 1e-3  # two logits closer than this may change places between two exact schedules, which add up in another order


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _judged(ratio: float, ratio_is: str, target: tuple[str, float] | None = None) -> dict:
    found = {"ratio": ratio, "ratio_is": ratio_is}
    if target is None:
        return found
    sign, limit = target
    return found | {"target": f"{sign} {limit}", "met": ratio >= limit if sign == ">=" else ratio <= limit}


# --- reading ---------------------------------------------------------------------------------------------------------


def bench_read(
    decoder_source: str | Path | LatentDecoder | None = None,
    *,
    questions: int = 16,
    new_tokens: int = 48,
    repeats: int = 3,
    skip_paper: bool = False,
) -> dict[str, dict]:
    """Times `questions` questions of exactly `new_tokens` tokens each (greedy, no early stop) about one chat.

    ours       LatentDecoder.read, the prefix once, all questions in one batch through the engine; adapter on, nothing kept from before
    generate   transformers' `generate` with its KV cache on a copy of the bare model (no LoRA layers in it, no target, no injection):
               the same decoder prompts, rendered and left-padded, as one batch.
               ratio = seconds(ours) / seconds(generate): below 1, ours is the faster
    paper      the released routine of Pan et al. 2024: two copies of the weights; the target once per question, through all layers;
               then, for every token, the decoder's whole sequence again without a cache, all questions as one batch.  Run once; what a
               conditioned decoder is given besides (the reference's activations) is read before the clock starts.
               ratio = seconds(paper) / seconds(ours): so many times slower than ours

    paper["same_tokens"] says whether its tokens are those of `ours`, all of them; paper["ties"] counts the rows that part at a place
    where both tokens' logits differ by less than TIE.  Raises LqaError if, in float32, a row parts from ours anywhere else.
    """
    if min(questions, new_tokens, repeats) < 1:
        raise LqaError("The numbers of questions, new tokens and repeats must each be at least 1.")
    decoder = decoder_source if isinstance(decoder_source, LatentDecoder) else LatentDecoder.from_pretrained(decoder_source)
    asked = _questions(questions)
    reading = decoder.read(CHAT, SPAN)
    prompts = [reading._prompt_ids()[0] + row.suffix for row in reading._rows(asked, ("true",), new_tokens)]
    plain = _without_lora(decoder.base)
    shape = {"questions": questions, "new_tokens": new_tokens, "slots": len(reading.span), "tokens": questions * new_tokens}
    _say(f"read: {questions} questions x {new_tokens} tokens, {len(reading.span)} slots, prompts of {len(prompts[0])} tokens and the like")

    _read_ours(decoder, asked, 2)
    _read_generate(decoder, plain, prompts, 2)
    seconds: dict[str, list[float]] = {"ours": [], "generate": []}
    for i in range(repeats):
        for name in seconds if i % 2 == 0 else reversed(seconds):
            start = _now()
            if name == "ours":
                tokens = _read_ours(decoder, asked, new_tokens)
            else:
                _read_generate(decoder, plain, prompts, new_tokens)
            seconds[name].append(_now() - start)
            _say(f"  {name:9} {seconds[name][-1]:8.2f} s")
    del plain
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "ours": {"seconds": seconds["ours"]} | _judged(1.0, "ours itself"),
        "generate": {"seconds": seconds["generate"]}
        | _judged(medians["ours"] / medians["generate"], "seconds(ours) / seconds(generate)", READ_TARGETS["generate"]),
    }
    if not skip_paper:
        twin, compared = _twin(decoder.base), _reference_activations(decoder, reading)
        start = _now()
        theirs, ties = _read_paper(decoder, twin, asked, new_tokens, tokens, *compared)
        seconds["paper"] = [_now() - start]
        _say(f"  paper     {seconds['paper'][0]:8.2f} s")
        result["paper"] = {"seconds": seconds["paper"]} | _judged(
            seconds["paper"][0] / medians["ours"], "seconds(paper) / seconds(ours)", READ_TARGETS["paper"]
        )
        result["paper"] |= {"same_tokens": bool(torch.equal(theirs, tokens)), "ties": ties}
    for entry in result.values():
        entry |= shape | {"tokens_per_second": shape["tokens"] / statistics.median(entry["seconds"])}
    return result


def _questions(n: int) -> list[str]:
    """The corpus's generic questions about personas and goals; from the first again where n asks for more than there are."""
    from lqa.corpus import load_questions

    found = [q for kind in ("persona", "goal") for q in load_questions()[kind]["description"]]
    return [found[i % len(found)] for i in range(n)]


def _without_lora(base: Base) -> torch.nn.Module:
    """A copy of the base model as transformers loads it: PEFT's layers replaced by the layers that they wrap."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(base.model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
    return model


def _twin(base: Base) -> Base:
    """A second copy of the weights, adapters included."""
    twin = Base(copy.deepcopy(base.model), base.tokenizer, base.name, base.weights)
    twin.find_adapters()
    return twin


def _read_ours(decoder: LatentDecoder, asked: list[str], new: int) -> Tensor:
    """The new tokens, (questions, new)."""
    reading = decoder.read(CHAT, SPAN)
    rows = reading._rows(asked, ("true",), new)
    steps = engine.decode(decoder.session, reading._prefix(("true",)), rows, new, [])
    return torch.tensor([[token for _, token, _ in step] for step in steps]).T


def _read_generate(decoder: LatentDecoder, model: torch.nn.Module, prompts: list[list[int]], new: int) -> Tensor:
    """The new tokens, (questions, new)."""
    tokenizer = decoder.base.tokenizer
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    ids, mask, _ = _left_padded(prompts, pad, model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=pad
        )
    return out[:, ids.shape[1] :].cpu()


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and positions, (rows, longest) each."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)


def _reference_activations(decoder: LatentDecoder, reading: Reading) -> tuple[Tensor | None, list[bool] | None]:
    """What the decoder's conditioning compares with, (N, D), and which tokens are of the opening; None if with nothing.  Every token of
    the benchmark's span has a reference."""
    if decoder.config.conditioning not in REFERENCED:
        return None, None
    found = reference(decoder.base.tokenizer, reading.rendered, list(reading.span))
    return (decoder._capture(found.rendered, found.places, reading.layers), found.opening) if found else (None, None)


def _read_paper(
    decoder: LatentDecoder,
    twin: Base,
    asked: list[str],
    new: int,
    ours: Tensor,
    h0: Tensor | None = None,
    opening: list[bool] | None = None,
) -> tuple[Tensor, int]:
    """The new tokens (questions, new), and how many rows part from `ours` at a tie.  `twin` is the decoder's copy of the weights."""
    base, config = decoder.base, decoder.config
    rendered = render(base.tokenizer, CHAT)
    layers, span = config.check_layers(None), resolve_span(SPAN, rendered)
    target_ids = torch.tensor([rendered.ids] * len(asked), device=base.device)
    with base.decoding() as model, Capture(base.blocks, layers, stop=False) as captured:
        model(input_ids=target_ids, attention_mask=torch.ones_like(target_ids), use_cache=False)
    activations = gather_spans({k: captured[k] for k in layers}, [span] * len(asked), [layers] * len(asked))
    how = (config.conditioning, config.conditioning_constant, decoder.projection)
    activations = torch.cat([condition(h, h0, None, config.blocks(layers), *how, opening) for h in activations.chunk(len(asked))])
    prefix, slots = config.prompt.prefix(base.tokenizer, config.slot_token_id, len(span), config.blocks(layers))
    prompts = [prefix + config.prompt.question(base.tokenizer, q) for q in asked]
    ids, mask, positions = _left_padded(prompts, 0, base.device)
    where, _, _ = _left_padded([slots + [False] * (len(p) - len(slots)) for p in prompts], False, base.device)
    same, ties, ours = torch.ones(len(asked), dtype=torch.bool), 0, ours.to(base.device)
    with Injection(twin, config.write_layer, config.operation) as injection:
        for step in range(new):
            with twin.decoding(decoder.adapter) as model, injection.armed(where, activations):
                out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
            logits = out.logits[:, -1].float()
            tokens = logits.argmax(-1)
            for row in (same & (tokens != ours[:, step]).cpu()).nonzero().flatten().tolist():
                gap = (logits[row, tokens[row]] - logits[row, ours[row, step]]).item()
                if gap > TIE and base.dtype == torch.float32:
                    raise LqaError(
                        f"Question {row}, token {step}: the paper's schedule prefers another token than ours by {gap:.4f} in the logits; "
                        "the two should compute the same."
                    )
                same[row], ties = False, ties + 1
            ids = torch.cat([ids, tokens.unsqueeze(1)], 1)
            mask, where = (torch.nn.functional.pad(x, (0, 1), value=v) for x, v in ((mask, 1), (where, False)))
            positions = torch.cat([positions, positions[:, -1:] + 1], 1)
            if step % 8 == 0:
                _say(f"  paper     token {step + 1} of {new}")
    return ids[:, -new:].cpu(), ties


# --- training --------------------------------------------------------------------------------------------------------


def bench_train(
    config_path: str | Path,
    *,
    steps: int = 10,
    warmup: int = 2,
    repeats: int = 2,
    overrides: Sequence[str] = (),
    schedules: Sequence[str] = TRAIN_SCHEDULES,
) -> dict[str, dict]:
    """Times `steps` optimizer steps of the trainer (forward, backward, optimizer, data) behind `warmup` uncounted ones.

    All schedules take the same readings, drawn from the authored corpus with the config's seed, in the same order and in batches of the
    config's size; each runs in a process of its own, so that its peak memory is its own.  An example is one question with its answer.

    ours     LatentQATrainer, one question per reading
    packed   LatentQATrainer, all of the config's questions (qa_per_reading) of each reading, as branches behind one prefix
             ratio = seconds per example (ours) / (packed): so many times faster than ours
    paper    the paper's step: the target through all layers, logits and loss at every position; one question per reading
             ratio = seconds per example (paper) / (packed): so many times slower than training as it is done here;
             unpacked_ratio = seconds per example (paper) / (ours): the same with one question per reading on both sides
    sft      TRL's SFTTrainer as it comes, on the decoder's rows of `ours` as token ids with labels: no target, no injection
             ratio = seconds per example (ours) / (sft), memory_ratio = peak memory (ours) / (sft): 1 is plain fine-tuning

    Each entry has examples_per_second (of the median round) and peak_mb (of the highest; on a GPU what torch had allocated there).
    """
    if unknown := sorted(set(schedules) - set(TRAIN_SCHEDULES)):
        raise LqaError(f"Unknown schedule(s) {', '.join(unknown)}; known are {', '.join(TRAIN_SCHEDULES)}.")
    if min(steps, repeats) < 1 or warmup < 0:
        raise LqaError("Measure at least one step in at least one round.")
    rounds: dict[str, list[dict]] = {name: [] for name in schedules}
    _say(f"train: {repeats} rounds of {warmup} + {steps} steps")
    for i in range(repeats):
        for name in schedules if i % 2 == 0 else reversed(schedules):
            found = _in_a_process(name, config_path, list(overrides), steps, warmup)
            rounds[name].append(found)
            _say(f"  {name:7} {found['seconds']:8.2f} s, {found['examples'] / found['seconds']:.2f} examples/s, {found['peak_mb']:.0f} MB")
    result, cost = {}, {}
    for name, found in rounds.items():
        seconds = [r["seconds"] for r in found]
        cost[name] = statistics.median(seconds) / found[0]["examples"]
        result[name] = {
            "seconds": seconds,
            "ratio": 1.0,
            "ratio_is": "ours itself",
            "steps": steps,
            "examples": found[0]["examples"],
            "examples_per_second": 1 / cost[name],
            "peak_mb": max(r["peak_mb"] for r in found),
        }
    for name in set(schedules) - {"ours"} if "ours" in schedules else ():
        above, below = ("paper", "packed" if "packed" in schedules else "ours") if name == "paper" else ("ours", name)
        what = f"seconds per example({above}) / seconds per example({below})"
        result[name] |= _judged(cost[above] / cost[below], what, TRAIN_TARGETS.get(name))
    if {"ours", "paper"} <= set(schedules):
        result["paper"]["unpacked_ratio"] = cost["paper"] / cost["ours"]
    if {"ours", "sft"} <= set(schedules):
        memory = _judged(result["ours"]["peak_mb"] / result["sft"]["peak_mb"], "peak_mb(ours) / peak_mb(sft)", MEMORY_TARGET)
        result["sft"] |= {f"memory_{key}": value for key, value in memory.items()}
    return result


def _in_a_process(schedule: str, config_path: str | Path, overrides: list[str], steps: int, warmup: int) -> dict:
    root = str(Path(__file__).parent.parent)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        job = json.dumps([schedule, str(config_path), [*overrides, f"training_args.output_dir={folder}"], steps, warmup])
        code = "import sys; from lqa.bench import _worker; sys.exit(_worker(*sys.argv[1:]))"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        done = subprocess.run([sys.executable, "-c", code, job, str(out)], env=environment, stdout=2)  # 2: its prints are progress
        if done.returncode or not out.is_file():
            raise LqaError(f"The schedule {schedule!r} failed with the exit code {done.returncode}; its messages are above.")
        return json.loads(out.read_text(encoding="utf-8"))


def _worker(job: str, out: str) -> int:
    """The other process's main."""
    try:
        found = train_once(*json.loads(job))
    except LqaError as error:
        _say(str(error))
        return 2
    Path(out).write_text(json.dumps(found), encoding="utf-8")
    return 0


def train_once(schedule: str, config_path: str, overrides: list[str], steps: int, warmup: int) -> dict:
    """One round of one schedule in this process: {"seconds", "examples", "peak_mb"} of the counted steps."""
    clock = _clock()
    trainer = make_trainer(schedule, config_path, overrides, steps + warmup, [clock])
    data, args = trainer.train_dataset, trainer.args
    per_row = sum(len(row["qa"]) for row in data) / len(data) if "qa" in data.column_names else 1
    trainer.train()
    rows = steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {"seconds": clock.ends[-1] - clock.ends[-1 - steps], "examples": round(rows * per_row), "peak_mb": _peak_mb()}


def _clock():
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = []  # when training began, then the end of every optimizer step

        def on_train_begin(self, *_, **__):
            self.ends.append(_now())

        def on_step_end(self, *_, **__):
            self.ends.append(_now())

    return Clock()


def make_trainer(schedule: str, config_path: str, overrides: list[str], steps: int, callbacks=()):
    """The trainer of a schedule, as `python -m train.decoder` builds it, but that it neither evaluates, logs nor saves."""
    from train.decoder import build_trainer, load_config

    quiet = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    quiet |= {"max_steps": steps}
    config = load_config(config_path, [*overrides, *(f"training_args.{key}={json.dumps(value)}" for key, value in quiet.items())])
    config.cache, config.examples = None, None  # activations are read live; as many readings as the steps consume
    if schedule == "paper":
        config.conditioning, config.conditioning_constant, config.projection = "raw", None, {}
        if config.merged:
            config.merged, config.default_layer = False, config.read_layers[len(config.read_layers) // 2]
    projection = None
    if config.conditioning == "projected":  # what it maps to costs no time
        from train.projection import identity

        width = load_base(config.base).hidden_size
        projection = identity([*config.read_layers, *([tuple(config.read_layers)] if config.merged else [])], width)
    trainer = build_trainer(config, callbacks, projection)
    if schedule == "packed":
        return trainer
    # The same readings as `packed`, one of its questions each; all places in turn, as generic questions come first and have long answers.
    trainer.train_dataset = trainer.train_dataset.map(lambda row, i: {"qa": [row["qa"][i % len(row["qa"])]]}, with_indices=True)
    if schedule == "ours":
        return trainer
    return _paper_trainer(trainer) if schedule == "paper" else _sft_trainer(trainer, callbacks)


def _paper_trainer(trainer):
    """`trainer` with the paper's step (Pan et al. 2024, lit/train.py)."""
    from lqa.masks import block_mask
    from train.trainer import LatentQATrainer

    class PaperTrainer(LatentQATrainer):
        def _answer_positions(self, head, args):
            return None  # logits at every position, of the target too

        def read(self, inputs):
            if "read_ids" not in inputs:
                return None
            layers = {layer for layers in inputs["read_layers"] for layer in layers}
            with torch.no_grad(), self.base.using() as model, Capture(self.base.blocks, layers, stop=False) as captured:
                model(input_ids=inputs["read_ids"], attention_mask=inputs["read_mask"], use_cache=False)
            return gather_spans({layer: captured[layer] for layer in layers}, inputs["read_spans"], inputs["read_layers"])

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self._labels = inputs["labels"]
            if (activations := self.read(inputs)) is not None:
                self._injection.arm(inputs["slots"], activations)
            out = model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                attention_mask=block_mask(self.base.model.config, inputs["branch"], inputs["position_ids"], self.base.dtype),
                labels=inputs["labels"],
                num_items_in_batch=num_items_in_batch,
                use_cache=False,
            )
            return (out.loss, out) if return_outputs else out.loss

    trainer.__class__ = PaperTrainer  # everything but the step is the trainer's own
    return trainer


def _sft_trainer(trainer, callbacks=()):
    """TRL's SFTTrainer with the same adapter, arguments and rows of tokens."""
    from datasets import Dataset
    from trl import SFTTrainer

    rows = [trainer.data_collator.row(example)[0] for example in trainer.train_dataset]
    data = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    return SFTTrainer(trainer.model, trainer.args, train_dataset=data, processing_class=trainer.base.tokenizer, callbacks=list(callbacks))


def _peak_mb() -> float:
    """The most memory that this process has held, in MB; on a GPU the most that torch had allocated there.

    Linux's VmHWM begins anew with a program; getrusage's ru_maxrss also counts the process that started it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# --- steering --------------------------------------------------------------------------------------------------------


def bench_steer(
    decoder_source: str | Path | LatentDecoder | None = None, *, chats: int = 4, pairs: int = 8, repeats: int = 3, **settings
) -> dict[str, dict]:
    """Times the training of a steering by the joint method on the same gradient examples: every one of `pairs` question-answer pairs (of
    an authored control) with every one of `chats` neutral chats, float32 throughout.

    ours    one target pass a chat, stopped at the read layer; all pairs as branches behind one prefix, logits at answer tokens; what the
            decoder computes before its write layer kept.  The KL is off, as the paper has none
    kl      the same with the KL: its target passes run through all layers, those of the unsteered model included.
            ratio = seconds(kl) / seconds(ours): what the KL costs
    paper   the released routine of Pan et al. 2024: two copies of the weights; for every example the target through all layers and the
            decoder's whole prompt, logits at every position of both, and an optimizer step.
            ratio = seconds(paper) / seconds(ours): so many times slower than ours

    A round begins with a fresh LoRA and with nothing kept from before.
    """
    from lqa.corpus import load_controls, load_questions
    from lqa.steering.training import Settings

    if min(chats, pairs, repeats) < 1:
        raise LqaError("The numbers of chats, pairs and rounds must each be at least 1.")
    decoder = decoder_source if isinstance(decoder_source, LatentDecoder) else LatentDecoder.from_pretrained(decoder_source)
    control = load_controls()[0]
    generic = load_questions()[control.id.split("-")[0]]["description"]
    qa = [(pair.question, pair.answer) for pair in control.qa]
    qa += [(question, control.descriptions[i % len(control.descriptions)]) for i, question in enumerate(generic)]
    if len(qa) < pairs:
        raise LqaError(f"There are {len(qa)} pairs to be had; ask for no more.")
    base = {"chats": chats, "batch": 1, "steps": chats, "autocast": False, "certainty": None} | settings
    schedules = {"ours": Settings(**base | {"kl": 0.0}), "kl": Settings(**base | {"kl": 1.0}), "paper": Settings(**base | {"kl": 0.0})}
    twin = _twin(decoder.base)
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    _say(f"steer: {chats} chats x {pairs} pairs")
    for i in range(repeats):
        for name in schedules if i % 2 == 0 else reversed(schedules):
            seconds[name].append(_steer_once(decoder, twin if name == "paper" else None, qa[:pairs], schedules[name])[0])
            _say(f"  {name:7} {seconds[name][-1]:8.2f} s")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "ours": _judged(1.0, "ours itself"),
        "kl": _judged(medians["kl"] / medians["ours"], "seconds(kl) / seconds(ours)"),
        "paper": _judged(medians["paper"] / medians["ours"], "seconds(paper) / seconds(ours)", STEER_TARGETS["paper"]),
    }
    examples = chats * pairs
    return {
        name: {"seconds": seconds[name]} | ratios[name] | {"examples": examples, "examples_per_second": examples / medians[name]}
        for name in schedules
    }


def _steer_once(decoder: LatentDecoder, twin: Base | None, qa: list[tuple[str, str]], settings) -> tuple[float, list[Tensor]]:
    """(seconds, the gradient summed over all examples at the LoRA's beginning) of one round; with a twin, by the paper's schedule."""
    from lqa.steering.training import Training

    training = Training(decoder, qa, settings)
    try:
        with decoder.base.training(training.name) as parameters:
            optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.0)  # its work, and every gradient at one place
            total = [torch.zeros_like(p) for p in parameters.values()]

            def step() -> None:
                for sum_, p in zip(total, parameters.values(), strict=True):
                    sum_ += p.grad
                optimizer.step()
                optimizer.zero_grad()

            start = _now()
            for chat in training.chats:
                if twin is None:
                    training.backward(chat, 1.0)
                    step()
                    continue
                for pair in qa:
                    _paper_loss(decoder, twin, training, chat, pair).backward()
                    step()
            return _now() - start, total
    finally:
        decoder.base.remove_adapter(training.name)


def _paper_loss(decoder: LatentDecoder, twin: Base, training, chat, pair: tuple[str, str]) -> Tensor:
    """One example's loss: mean per token of the answer, in nats, divided by the number of pairs as `ours` does."""
    from lqa.config import IGNORE

    base, config, (layers,) = decoder.base, decoder.config, training.readings
    with base.using(training.name) as model, Capture(base.blocks, layers, stop=False) as captured:
        model(input_ids=torch.tensor([chat.ids], device=base.device), use_cache=False)
    if training.loss.hidden:
        chat.reference(base, layers, False)
    h = training.loss.injected({k: captured[k][0, chat.span] for k in layers}, chat, layers)
    row = config.prompt.row(base.tokenizer, config.slot_token_id, len(chat.span), config.blocks(layers), [pair])
    ids, slots, labels = (torch.tensor([row[key]], device=base.device) for key in ("input_ids", "slots", "labels"))
    with twin.using(decoder.adapter) as model, Injection(twin, config.write_layer, config.operation) as injection:
        with injection.armed(slots, h):
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=IGNORE) / len(training.loss.qa)


# --- printing --------------------------------------------------------------------------------------------------------


def format_bench(result: dict[str, dict]) -> str:
    """A result as a small text table, one line per schedule, and what each ratio divides below it."""
    columns = {
        "schedule": lambda name, entry: name,
        "seconds": lambda name, entry: f"{statistics.median(entry['seconds']):.2f}",
        "range": lambda name, entry: f"{min(entry['seconds']):.2f}-{max(entry['seconds']):.2f}",
        "ratio": lambda name, entry: f"{entry['ratio']:.2f}",
        "target": lambda name, entry: f"{entry['target']} {'met' if entry['met'] else 'missed'}" if "target" in entry else "",
        "tokens/s": lambda name, entry: f"{entry['tokens_per_second']:.1f}" if "tokens_per_second" in entry else "",
        "examples/s": lambda name, entry: f"{entry['examples_per_second']:.2f}" if "examples_per_second" in entry else "",
        "peak MB": lambda name, entry: f"{entry['peak_mb']:.0f}" if "peak_mb" in entry else "",
    }
    table = [list(columns), *([cell(name, entry) for cell in columns.values()] for name, entry in result.items())]
    table = [cells for cells in zip(*table, strict=True) if any(cells[1:])]  # by column; empty ones left out
    widths = [max(map(len, cells)) for cells in table]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in zip(*table, strict=True)]
    for name, entry in result.items():
        if name != "ours":
            lines.append(f"{name}: ratio = {entry['ratio_is']}")
        if "unpacked_ratio" in entry:
            lines.append(f"{name}: seconds per example({name}) / seconds per example(ours) = {entry['unpacked_ratio']:.2f}")
        if "memory_ratio" in entry:
            met = "met" if entry["memory_met"] else "missed"
            lines.append(f"{name}: {entry['memory_ratio_is']} = {entry['memory_ratio']:.2f} (target {entry['memory_target']}, {met})")
        if "same_tokens" in entry:
            same = "the same tokens as ours" if entry["same_tokens"] else f"other tokens than ours in {entry['ties']} row(s), at ties"
            lines.append(f"{name}: {same}")
    return "\n".join(lines)
