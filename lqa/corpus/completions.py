"""On-policy completions: the target itself replies under each control, so that a decoder reads what this model does.

    python -m lqa data complete --out FILE.jsonl

The file begins with a line that says how it was made; every line after it is one reply, or says why it was dropped.  Replies are
sampled in chunks, each with a seed of its own and written at once: a run that was killed goes on where the file ends, and the file is the
same as that of a run that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lqa import engine
from lqa.chat import render
from lqa.config import default_prompt
from lqa.corpus import HERE, load_controls, load_messages, message_side, split_of
from lqa.corpus.readings import control_chat, pool_message
from lqa.corpus.schema import Control
from lqa.errors import LqaError

FOLDER = HERE / "completions"
CHUNK = 16
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def control_hash(control: Control) -> str:
    """Changes when the words that a completion answers to do."""
    return hashlib.sha256(f"{control.control}\0{control.acknowledgement}".encode()).hexdigest()[:12]


def make_items(controls: Sequence[Control], messages: Sequence[str], draws: int, seed: int) -> list[dict]:
    """What is to be replied to: `draws` messages of the pool for every control, of the control's own side."""
    sides, pools = split_of(controls), {}
    for message in messages:
        pools.setdefault(message_side(message), []).append(message)
    items = []
    for control in controls:
        rng = random.Random(f"{seed}/{control.id}")
        for draw in range(draws):
            message = pool_message(control, pools[sides[control.id]], rng)
            items.append({"label": control.id, "control": control_hash(control), "draw": draw, "message": message})
    return items


def _whole(text: str, finished: bool) -> str:
    """`text` up to its last sentence's end if it was cut off; empty if it has none."""
    if finished:
        return text.strip()
    ends = [m.end() for m in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def sample_chunk(base, chats: Sequence[list[dict]], settings: dict, seed: int) -> list[str]:
    """One sampled reply of the bare model to each chat; cut back to whole sentences where the length ran out."""
    ids = [render(base.tokenizer, chat).ids for chat in chats]
    longest = max(map(len, ids)) + settings["max_new_tokens"]
    if longest > base.context:
        raise LqaError(f"A chat needs {longest} tokens with its reply, but the model's context is {base.context}; lower --max-new-tokens.")
    prefix_ids, suffixes = engine.common_prefix(ids)
    with base.decoding() as model:
        prefix = engine.prefill(model, [prefix_ids])
    stop = [i for i in [base.tokenizer.eos_token_id, *default_prompt(base.tokenizer).stop_ids(base.tokenizer)] if i is not None]
    rows = [engine.Row(0, suffix) for suffix in suffixes]
    found: list[list[int]] = [[] for _ in rows]
    choose = engine.sampler(settings["temperature"], settings["top_p"], seed)
    for step in engine.decode(base.decoding, prefix, rows, settings["max_new_tokens"], stop, choose):
        for row, token, _ in step:
            found[row].append(token)
    texts = base.tokenizer.batch_decode(found, skip_special_tokens=True)
    return [_whole(text, len(tokens) < settings["max_new_tokens"]) for text, tokens in zip(texts, found, strict=True)]


def _lines(path: Path) -> list[dict]:
    """The whole lines of `path`; a last one that a kill cut off is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise LqaError(f"{path} is damaged ({error}); remove it and sample again.") from error


def complete(
    base,
    out: str | Path,
    *,
    controls: Sequence[Control] | None = None,
    messages: Sequence[str] | None = None,
    draws: int = 2,
    limit: int | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_new_tokens: int = 96,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> int:
    """Samples replies of `base` under every control into `out`, going on where the file ends; returns the number of replies kept.

    limit   take only so many controls, drawn with the seed
    Raises LqaError if the file was made otherwise than asked for now, or cannot be written.
    """
    if draws < 1 or max_new_tokens < 1 or (limit is not None and limit < 1):
        raise LqaError(f"--draws, --max-new-tokens and --limit must be at least 1, not {draws}, {max_new_tokens} and {limit}.")
    controls = load_controls() if controls is None else controls
    items = make_items(controls, load_messages() if messages is None else messages, draws, seed)
    if limit is not None and limit < len(controls):
        kept = set(random.Random(seed).sample([c.id for c in controls], limit))
        items = [item for item in items if item["label"] in kept]
    by_id = {c.id: c for c in controls}
    settings = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed, "draws": draws, "chunk": CHUNK}
    head = {"model": base.name, "weights": base.weights, **settings, "items": len(items)}
    head["corpus"] = hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]
    out = Path(out)
    try:
        lines = _lines(out) if out.exists() else []
        if lines and lines[0] != head:
            changed = [key for key in head if lines[0].get(key) != head[key]]
            raise LqaError(f"{out} was sampled with other settings ({', '.join(changed)}); name another file or remove this one.")
        done = max(0, len(lines) - 1)
        done -= done % CHUNK if done < len(items) else 0  # a chunk is whole or sampled anew
        lines = [head, *lines[1 : done + 1]]
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f"{out.name}.part")
        part.write_text("".join(map(_line, lines)), encoding="utf-8")
        part.replace(out)
        seen = {_normal(line["reply"]) for line in lines[1:] if line["reply"]}
        with out.open("a", encoding="utf-8") as file:
            while done < len(items):
                chunk = items[done : done + CHUNK]
                chats = [control_chat(by_id[item["label"]], "stimulus", item["message"]) for item in chunk]
                replies = sample_chunk(base, chats, settings, int(hashlib.sha256(f"{seed}/{done}".encode()).hexdigest()[:8], 16))
                text = ""
                for item, reply in zip(chunk, replies, strict=True):
                    dropped = "empty" if not reply else "duplicate" if _normal(reply) in seen else None
                    seen.add(_normal(reply))
                    text += _line(item | {"reply": None if dropped else reply, "dropped": dropped})
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                done += len(chunk)
                progress(f"complete: {done} of {len(items)} replies")
        return sum(line["reply"] is not None for line in _lines(out)[1:])
    except OSError as error:
        raise LqaError(f"{out} cannot be written ({error.strerror}); what is in it stays, start again when that is mended.") from error


def _line(entry: dict) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def load_completions(controls: Sequence[Control], folder: str | Path = FOLDER) -> tuple[dict[str, list[dict]], int]:
    """({label: [{"message", "reply", "model"}]}, how many are out of date) of every file in `folder`.

    Out of date: the control was reworded or removed since.
    """
    hashes, found, stale = {c.id: control_hash(c) for c in controls}, {}, 0
    for path in sorted(Path(folder).glob("*.jsonl")):
        head, *lines = _lines(path) or [{}]
        for line in lines:
            if line["reply"] is None:
                continue
            if hashes.get(line["label"]) != line["control"]:
                stale += 1
                continue
            found.setdefault(line["label"], []).append({"message": line["message"], "reply": line["reply"], "model": head["model"]})
    return found, stale
