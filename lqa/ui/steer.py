"""The tab "Steer": choose a ready-made steering, or say how the model shall behave and train one; compare.

A steering lies in a folder of the server's, named by the session's state: on ZeroGPU it is trained in one process and used in another, and
a visitor can name neither a path nor another visitor's steering.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import spaces

from lqa.decoder import LatentDecoder
from lqa.errors import LqaError
from lqa.steering import SIDECAR, Progress, Steering, check_pairs, read_sidecar, write_pairs
from lqa.ui.components import GPU, PRIVATE, QUICK, component, fixed, runs
from lqa.ui.limits import MAX_ANSWER_TEXT, MAX_PAIRS, MAX_REPLY, MAX_STEPS, check_control, check_turns

PRESETS = Path(__file__).parents[2] / "steerings"
OWN = "my own, trained here"
CONTROL = "Speak like a pirate."
MESSAGE = "What should I do on a rainy Sunday?"
TEMPERATURE = 0.8
LEAST_STEPS, STEPS = 5, 30
STRONGEST = 3.0
KEEP = 8  # steerings in memory
HOUR = 3600  # seconds that a session's steering is kept
WORKING = "training"
STEER = {"concurrency_limit": 1, "concurrency_id": "steer"}  # one training at a time; readings go on between its steps


class Preset(NamedTuple):
    """A ready-made steering: its folder, and what its sidecar says."""

    folder: Path
    record: dict

    @property
    def label(self) -> str:
        return self.record["control"] or self.folder.name


def presets(decoder: LatentDecoder) -> dict[str, Preset]:
    """{name: preset} of those in steerings/ that were made for the decoder's base.  Raises LqaError for one that is damaged."""
    base = decoder.base.fingerprint()
    found = {path.parent.name: Preset(path.parent, read_sidecar(path.parent)) for path in sorted(PRESETS.glob(f"*/{SIDECAR}"))}
    return {name: preset for name, preset in found.items() if preset.record["base"]["fingerprint"] == base}


def curve_view(stage="idle", steps=0, points=(), note="") -> dict:
    """The loss as it falls.  `points`: {"step", "loss", "held_out"}."""
    return {"stage": stage, "steps": steps, "points": list(points), "note": note}


def point_of(progress: dict) -> dict:
    """A step of a training (lqa.steering.Progress as a dict) in the curve."""
    return {key: None if progress[key] is None else round(progress[key], 4) for key in ("step", "loss", "held_out")}


def finished(record: dict) -> dict:
    """The curve of a steering that is trained."""
    note = f"{record['steps']} steps in {record['seconds']:.0f} s, loss on held-out chats {record['loss']:.2f} nats"
    return curve_view("done", record["history"][-1]["steps"], map(point_of, record["history"]), note)


def pairs_of(table) -> list[tuple[str, str]]:
    """The pairs in the table; empty rows are none."""
    rows = [[str(cell or "").strip() for cell in row] for row in table if isinstance(row, list)] if isinstance(table, list) else []
    rows = [row for row in rows if any(row)]
    if len(rows) > MAX_PAIRS:
        raise LqaError(f"There are {len(rows)} pairs, this page takes at most {MAX_PAIRS}; remove some.")
    if any(len(cell) > MAX_ANSWER_TEXT for row in rows for cell in row):
        raise LqaError(f"A question or answer is longer than {MAX_ANSWER_TEXT} characters; shorten it.")
    return check_pairs(rows) if rows else []


class Loaded:
    """The steerings in memory: a few, the latest used, each loaded once; one in use is never dropped."""

    def __init__(self, decoder: LatentDecoder, keep: int = KEEP):
        self.decoder, self.keep = decoder, keep
        self._lock, self._held = threading.Lock(), OrderedDict()  # folder: [steering, users]

    @contextmanager
    def using(self, folder: str) -> Iterator[Steering]:
        with self._lock:
            if folder not in self._held:
                self._held[folder] = [self.decoder.load_steering(folder), 0]
            self._held.move_to_end(folder)
            entry = self._held[folder]
            entry[1] += 1
            idle = [f for f, (_, users) in self._held.items() if not users]
            for old in idle[: max(0, len(self._held) - self.keep)]:
                self._held.pop(old)[0].remove()
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1


def trained(decoder: LatentDecoder, control: str | None, qa: list | None, steps: int) -> Iterator[Progress | Steering]:
    """`decoder.steer` as it goes: its Progress after every step, at last the Steering.

    Closed early, the training is cancelled: it ends with the step that it is at, and the model is as it was.
    """
    news: queue.Queue = queue.Queue()
    closed, handing = threading.Event(), threading.Lock()

    def work():
        try:
            result = decoder.steer(control=control, qa=qa, steps=steps, progress=news.put, cancel=closed.is_set)
        except BaseException as error:  # it is raised where the news is read
            result = error
        with handing:
            if closed.is_set() and isinstance(result, Steering):  # nobody is there to take it
                result.remove()
            news.put(result)

    threading.Thread(target=work, daemon=True).start()
    taken = None
    try:
        while not isinstance(taken, Steering):
            taken = news.get()
            if isinstance(taken, BaseException):
                raise taken
            yield taken
    finally:
        # Without waiting for the thread: Gradio closes what it cancels in its event loop, which nobody else would get through.
        with handing:
            closed.set()
            left = list(news.queue)
        for item in left:
            if isinstance(item, Steering):
                item.remove()


def side_by_side(decoder: LatentDecoder, steering: Steering, chat, strength: float, temperature: float, seed: int, most: int = MAX_REPLY):
    """Yields (unsteered, steered) replies as they grow: the same chat, the same seed."""
    settings = {"max_new_tokens": most, "temperature": temperature, "seed": seed}
    plain = decoder.stream_reply(chat, **settings)
    with steering.apply(strength):
        steered = decoder.stream_reply(chat, **settings)  # it stays steered wherever it is read
    streams, texts = {0: plain, 1: steered}, ["", ""]
    while streams:
        for i, stream in list(streams.items()):
            piece = next(stream, None)
            if piece is None:
                del streams[i]
            else:
                texts[i] = (texts[i] + piece).lstrip()
        yield texts[0], texts[1]


class Handlers(NamedTuple):
    choose: Callable  # a ready-made steering
    pairs: Callable  # the decoder's questions and answers about a control
    train: Callable
    compare: Callable
    archive: Callable  # the steering to download
    forget: Callable  # deletes a session's folder


def train_seconds(control, table, steps, curve, folder) -> int:
    """GPU time asked for: loading, the pairs, and half a second a step."""
    return 15 + (int(steps) if isinstance(steps, int | float) else STEPS) // 2


def make_handlers(decoder: LatentDecoder, ready: dict[str, Preset] | None = None) -> Handlers:
    """The handlers over a decoder and its ready-made steerings (None: `presets`)."""
    loaded = Loaded(decoder)
    ready = presets(decoder) if ready is None else ready

    def choose(preset, folder):
        """-> control, table, curve, download button"""
        if (known := known_preset(preset)) is None:
            return gr.skip(), gr.skip(), gr.skip(), archive(preset, folder)
        return known.label, [list(pair) for pair in known.record["qa"]], finished(known.record), archive(preset, folder)

    def known_preset(name) -> Preset | None:
        return ready.get(name) if isinstance(name, str) else None

    @spaces.GPU(duration=12)
    def pairs(control):
        """-> table, notice"""
        try:
            return [list(pair) for pair in write_pairs(decoder, check_control(control))], ""
        except LqaError as error:
            return gr.skip(), str(error)

    @spaces.GPU(duration=train_seconds)
    def train(control, table, steps, curve, folder) -> Iterator[tuple]:
        """-> curve, folder, table, preset, notice"""
        nothing = (gr.skip(),) * 3
        try:
            qa = pairs_of(table)
            control = None if qa else check_control(control)
            if not isinstance(steps, int | float) or not LEAST_STEPS <= steps <= MAX_STEPS:
                raise LqaError(f"The number of steps must be from {LEAST_STEPS} to {MAX_STEPS}, not {steps!r}.")
            points: list[dict] = []
            begun = "The decoder describes the control …" if control else "First step …"
            yield curve_view(WORKING, int(steps), points, begun), *nothing, ""
            for news in trained(decoder, control, qa or None, int(steps)):
                if isinstance(news, Progress):
                    points.append(point_of(vars(news)))
                    note = f"step {news.step} of at most {news.steps} · about {news.seconds_left:.0f} s left"
                    yield curve_view(WORKING, int(steps), points, note), *nothing, ""
                else:
                    made = tempfile.mkdtemp(prefix="lqa-steering-")
                    news.save(made)
                    news.remove()
                    forget(folder)
                    yield finished(news.record), made, [list(pair) for pair in news.record["qa"]], OWN, ""
        except LqaError as error:
            yield curve if isinstance(curve, dict) else curve_view(), *nothing, str(error)

    @spaces.GPU(duration=20)
    def compare(chat, message, preset, folder, strength, sample, seed) -> Iterator[tuple]:
        """-> unsteered reply, steered reply, notice"""
        try:
            own = isinstance(message, str) and message.strip()
            turns = check_turns([{"role": "user", "content": message}] if own else chat)
            if not isinstance(strength, int | float) or not -STRONGEST <= strength <= STRONGEST:
                raise LqaError(f"The strength must be from {-STRONGEST:g} to {STRONGEST:g}, not {strength!r}.")
            if not isinstance(seed, int | float) or not 0 <= seed < 2**31:
                raise LqaError("The seed must be a whole number of at least 0.")
            known = known_preset(preset)
            where = known.folder if known else folder
            if not where or not Path(where).is_dir():
                raise LqaError("There is no steering yet; train your own" + (", or choose a ready-made one." if ready else "."))
            with loaded.using(str(where)) as steering:
                for replies in side_by_side(decoder, steering, turns, strength, TEMPERATURE if sample else 0.0, int(seed)):
                    yield *replies, ""
        except LqaError as error:
            yield gr.skip(), gr.skip(), str(error)

    def archive(preset, folder):
        """-> download button: the steering as a zip file."""
        if known := known_preset(preset):
            return gr.update(value=_zipped(str(known.folder), preset), interactive=True)
        if not folder or not Path(folder).is_dir():
            return gr.update(value=None, interactive=False)
        return gr.update(value=shutil.make_archive(folder, "zip", folder), interactive=True)

    def forget(folder) -> None:
        if folder and Path(folder).name.startswith("lqa-steering-"):
            shutil.rmtree(folder, ignore_errors=True)
            Path(f"{folder}.zip").unlink(missing_ok=True)

    return Handlers(choose, pairs, train, compare, archive, forget)


@cache
def _zipped(folder: str, name: str) -> str:
    return shutil.make_archive(str(Path(tempfile.mkdtemp(prefix="lqa-zip-"), name)), "zip", folder)


def steer_tab(decoder: LatentDecoder, chat: gr.HTML) -> None:
    """Builds the tab."""
    ready = presets(decoder)
    handlers = make_handlers(decoder, ready)
    first = next(iter(ready), OWN)
    begun = handlers.choose(first, None)
    control_text, pairs, curve_now, download_now = begun if ready else (CONTROL, None, curve_view(), begun[-1])
    folder = gr.State(None, time_to_live=HOUR, delete_callback=handlers.forget)
    fixed(
        "<h2>Say how it shall behave</h2><p>The decoder says what it would read in a model that behaves so, as questions and answers. The "
        "model is then trained until the decoder reads just that in it: a small LoRA, that a slider makes weaker or stronger.</p>"
    )
    choices = [(p.label, name) for name, p in ready.items()] + [(OWN, OWN)]
    preset = gr.Radio(choices, value=first, label="Steering", visible=bool(ready), elem_id="preset")
    with gr.Accordion("How it was trained; train your own" if ready else "Train your own", open=not ready, elem_id="own"):
        with gr.Row(equal_height=True):
            control = gr.Textbox(
                control_text, label="How shall it behave?", lines=2, max_lines=4, scale=4, min_width=240, elem_id="control"
            )
            steps = gr.Slider(LEAST_STEPS, MAX_STEPS, STEPS, step=1, label="Steps at most", scale=2, min_width=180, elem_id="steps")
        table = gr.Dataframe(
            pairs,
            headers=["Question", "Answer"],
            datatype="str",
            type="array",
            column_count=2,
            row_count=1,
            interactive=True,
            wrap=True,
            column_widths=["42%", "58%"],
            label="What the decoder shall read (empty: it writes this itself)",
            elem_id="pairs",
        )
        with gr.Row(elem_classes="buttons"):
            write = gr.Button("Write the pairs", elem_id="write", min_width=120)
            go = gr.Button("Train", variant="primary", elem_id="train", min_width=120)
            stop = gr.Button("Stop", scale=0, min_width=90, elem_id="train-stop")
        curve = component("curve", curve_now, "curve")
    notice = component("notice", "", "steer-notice")
    fixed("<h2>Compare</h2><p>The model as it was and the steered one reply to the same message, with the same seed.</p>")
    message = gr.Textbox(
        MESSAGE, label="Message to both", info="Empty: the chat on this page", lines=1, max_lines=3, elem_id="message"
    )
    strength = gr.Slider(
        -STRONGEST,
        STRONGEST,
        1.0,
        step=0.25,
        label="Strength",
        info="0: the model as it was; 1: as trained; negative: the other way",
        elem_id="strength",
    )
    with gr.Row(equal_height=True):
        sample = gr.Checkbox(False, label=f"Sample (temperature {TEMPERATURE})", scale=3, min_width=180, elem_id="sample")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=1, min_width=90, elem_id="seed")
    with gr.Row(elem_classes="buttons"):
        compare = gr.Button("Reply", variant="primary", elem_id="compare", min_width=120)
        halt = gr.Button("Stop", scale=0, min_width=90, elem_id="compare-stop")
        download = gr.DownloadButton(
            "Download the steering", download_now["value"], interactive=bool(ready), elem_id="download", min_width=160
        )
    with gr.Row(equal_height=True):
        plain = gr.Textbox(label="Unsteered", lines=8, max_lines=12, interactive=False, min_width=240, elem_id="plain")
        steered = gr.Textbox(label="Steered", lines=8, max_lines=12, interactive=False, min_width=240, elem_id="steered")

    preset.input(handlers.choose, [preset, folder], [control, table, curve, download], **QUICK)
    # The pairs are what is trained: those of another control must not stand below a new one.
    control.input(lambda: [["", ""]], None, table, trigger_mode="always_last", **QUICK)
    write.click(handlers.pairs, control, [table, notice], trigger_mode="once", **GPU, **PRIVATE)
    inputs, outputs = [control, table, steps, curve, folder], [curve, folder, table, preset, notice]
    training = runs([go.click], handlers.train, inputs, outputs, curve, stop, **STEER)
    training.then(handlers.archive, [preset, folder], download, **QUICK)
    inputs = [chat, message, preset, folder, strength, sample, seed]
    comparing = compare.click(handlers.compare, inputs, [plain, steered, notice], trigger_mode="once", **GPU, **PRIVATE)
    halt.click(None, cancels=[comparing], **QUICK)
