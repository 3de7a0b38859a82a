"""Metrics by cases made by hand; the suite `identify` on a tiny decoder; its references, fakes and data."""

import json
import random

import pytest
import torch

from lqa import LqaError
from lqa.activations import Passes
from lqa.evals import data, identify
from lqa.evals.fakes import STRENGTH, add_row, fake
from lqa.evals.identify import FIXED_MESSAGE, Draw, Item, Setting, best, hits, make_draws, make_hard_draws
from lqa.evals.statistics import bootstrap
from lqa.evals.suite import Job, cell
from lqa.journal import Journal


def item(i: int, kind: str = "goal", **more) -> Item:
    control = f"Speak of {i} cities." + " Please." * (i % 3)
    return Item(f"{kind}-test{i % 3}-{i}", kind, control, f"What of {i}?", f"It speaks of {i} cities.", "Gladly.", **more)


@pytest.fixture
def job_for(tmp_path, monkeypatch):
    """job_for(decoder, items, **Job's): a job of `identify` on these items, with a journal of its own."""
    opened = []

    def build(decoder, items, **kwargs):
        source = {"name": "test", "sha256": "0"}
        monkeypatch.setattr(identify, "items_of", lambda folder, form="system": (list(items), dict(source)))
        monkeypatch.setattr(identify, "forms_of", lambda folder: ["control", "stimulus", "system"])
        monkeypatch.setattr(identify, "M", 4)
        journal = Journal(tmp_path / f"{len(opened)}" / "journal.jsonl", {}).__enter__()
        opened.append(journal)
        return Job("identify", decoder, journal, **{"data": None, "limit": None} | kwargs)

    yield build
    for journal in opened:
        journal.__exit__()


# --- metrics ----------------------------------------------------------------------------------------------------


def test_hits_are_argmax_of_centred_scores():
    # Sentence 0 is likely under every reading; only what differs from its mean may count.
    scores = [[-1.0, -5.0, -6.0], [-1.2, -4.0, -6.0], [-1.4, -5.0, -5.0]]
    assert hits(scores, 3) == [1.0, 1.0, 1.0]
    swapped = [scores[1], scores[0], scores[2]]
    assert hits(swapped, 3) == [0.0, 0.0, 1.0]
    assert hits(swapped, 1) == [0.0]
    assert best(swapped).tolist() == [[False, True, False], [True, False, False], [False, False, True]]


def test_equal_readings_hit_by_chance_exactly():
    assert hits([[-1.0, -2.0, -3.0, -4.0]] * 4, 4) == [0.25] * 4
    wobbly = [[-i + 1e-8 * (i * j % 3) for i in range(4)] for j in range(4)]
    assert hits(wobbly, 4) == [0.25] * 4  # rounding does not decide


def test_gap_is_own_reading_minus_the_mean_of_all():
    draw = Draw((item(0), item(1)), 2)
    accuracy, gap = identify._cells([draw], [[[-1.0, -2.0], [-1.5, -1.0]]])
    assert (accuracy.mean, accuracy.n) == (1.0, 2)
    assert gap.mean == pytest.approx((0.25 + 0.5) / 2) and gap.n == 2


def test_confusion_is_of_categories_and_every_row_sums_to_one():
    items = tuple(item(i) for i in range(3))  # categories goal-test0, -test1, -test2
    draw = Draw(items, 2)
    scores = {"ours": [[-1.0, -1.0, -1.0], [-3.0, -2.0, -1.0], [-1.0, -1.0, -2.0]]}  # 1 is taken for 2
    plot = identify._confusion([draw], [scores])
    (matrix,) = plot.series.values()
    assert matrix["x"] == ["goal-test0", "goal-test1", "goal-test2"] and matrix["y"] == ["goal-test0", "goal-test1"]
    assert matrix["values"][1] == [0, 0, 1] and all(sum(row) == pytest.approx(1) for row in matrix["values"])


def test_draws_are_of_one_kind_seeded_and_cover_everything():
    items = [item(i) for i in range(21)] + [item(i, "persona") for i in range(9)]
    draws = make_draws(items, 8, seed=0)
    assert draws == make_draws(items, 8, seed=0) != make_draws(items, 8, seed=1)
    assert sorted(i.label for draw in draws for i in draw.items[: draw.counted]) == sorted(i.label for i in items)  # each counts once
    for draw in draws:
        assert len(draw.items) == 8 and len({i.kind for i in draw.items}) == 1 and len({i.answer for i in draw.items}) == 8
    with pytest.raises(LqaError, match="too few items"):
        make_draws(items[:5], 8, seed=0)


def test_hard_draws_are_of_partners_or_of_one_category():
    a, b, c, d = (f"goal-test{i % 3}-{i}" for i in range(4))
    items = [item(0, contrast=(b, c)), item(1, contrast=(a, c)), item(2, contrast=(a, "persona-x-y")), item(3, contrast=("not-here",))]
    draws = make_hard_draws(items, items, 8, seed=0)
    assert [(draw.labels, draw.counted) for draw in draws] == [([a, b, c], 2), ([c, a], 1)]  # 0 and 1 share candidates; 3 has none
    limited = make_hard_draws(items[:1], items, 8, seed=0)  # partners that were not drawn still are candidates
    assert [(draw.labels, draw.counted) for draw in limited] == [([a, b, c], 1)]
    assert identify._chance(draws) == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    plain = [item(i) for i in range(7)]  # no partners known: categories of 3, 2 and 2
    found = make_hard_draws(plain, plain, 2, seed=0)
    assert all(len(draw.items) == 2 and len({i.category for i in draw.items}) == 1 for draw in found)
    assert sorted(i.label for draw in found for i in draw.items[: draw.counted]) == sorted(i.label for i in plain)
    assert make_hard_draws([item(0)], [item(0)], 8, seed=0) == []


def test_bootstrap_covers_the_mean_and_is_seeded():
    rng = random.Random(3)
    covered = 0
    for seed in range(60):
        values = [float(rng.random() < 0.3) for _ in range(80)]
        mean, low, high = bootstrap([[v] for v in values], resamples=400, seed=seed)
        assert mean == pytest.approx(sum(values) / 80) and low <= mean <= high
        covered += low <= 0.3 <= high
    assert covered >= 50  # 95 % nominal
    pairs = [[0.0, 0.0], [1.0, 1.0], [1.0]] * 10
    assert bootstrap(pairs, seed=5) == bootstrap(pairs, seed=5) and bootstrap(pairs)[0] == 0.6
    alone = bootstrap([[v] for pair in pairs for v in pair])
    assert bootstrap(pairs)[1] < alone[1]  # values that hang together say less
    assert cell(pairs).n == 50 and cell(pairs).mean == 0.6
    with pytest.raises(ValueError):
        bootstrap([])


# --- the suite --------------------------------------------------------------------------------------------------


def test_identify_none_and_text_only_are_chance_and_rerun_is_equal(tiny_decoder, job_for):
    decoder = tiny_decoder()
    items = [item(i) for i in range(8)]
    result = identify.run(job_for(decoder, items))
    assert result == identify.run(job_for(decoder, items))
    assert set(result.tables) == {"fixed", "own", "hard"} and result.data["items"] == "8" and result.settings["message"] == FIXED_MESSAGE
    for table in result.tables.values():
        assert set(table.rows) == {"ours", "none", "shuffled", "text_only"} and set(table.columns) == {"accuracy", "gap (nats a token)"}
        for accuracy, gap in table.rows.values():
            assert accuracy.n == gap.n == 8 and accuracy.low <= accuracy.mean <= accuracy.high
    for reader in ("none", "text_only"):  # nothing but the activations differs
        assert [c.mean for c in result.tables["fixed"].rows[reader]] == pytest.approx([0.25, 0], abs=1e-6)
    assert {len(entry["hits"]["ours"]) for entry in result.items if entry["table"] == "fixed"} == {4}
    left = identify.run(job_for(decoder, [*items, item(9, "user")]))
    assert "1 of kind user" in left.tables["fixed"].note


def test_identify_tells_a_reader_from_a_guesser(tiny_decoder, job_for, monkeypatch):
    """Scores of a reader who knows its control are right every time; with the next reading's scores they never are."""
    monkeypatch.setattr(identify, "_read", lambda job, item, setting, decoder=None: item)
    monkeypatch.setattr(identify.batch, "ask", lambda item, question, source="true": item if source == "true" else None)
    monkeypatch.setattr(identify.batch, "text_only", lambda item, question: None)

    def matrix(runner, asked, answers):
        return [[-1.0 - (item is not None and a != item.answer) * 0.1 - len(a) / 10 for a in answers] for item in asked]

    monkeypatch.setattr(identify.batch, "matrix", matrix)
    result = identify.run(job_for(tiny_decoder(), [item(i) for i in range(16)]))
    accuracies = {name: cells[0].mean for name, cells in result.tables["fixed"].rows.items()}
    assert accuracies == {"ours": 1, "shuffled": 0, "none": 1 / 4, "text_only": 1 / 4}


@pytest.mark.parametrize(("changes", "layers"), [({}, [0, 1]), ({"layers_per_reading": 2, "default_layer": [0, 1]}, ["(0, 1)"])])
def test_a_sweep_shares_readings_and_target_passes(tiny_decoder, job_for, monkeypatch, changes, layers):
    decoder, passed = tiny_decoder(**changes), []
    monkeypatch.setattr(decoder, "_pass", lambda ids, layers, run=decoder._pass: passed.append(tuple(ids)) or run(ids, layers))
    job = job_for(decoder, [item(i) for i in range(4)], sweep=True)
    result = identify.run(job)
    assert len(passed) == len(set(passed))  # no chat twice, however many spans, layers and forms are read of it
    assert list(result.tables["sweep-form"].rows) == ["control", "stimulus", "system"]  # the forms that the data hold
    assert list(result.tables["sweep-span"].rows) == ["all", "last 1", "last 4", "first 10"]
    assert list(result.tables["sweep-layer"].rows) == list(map(str, layers))
    for name in ("form", "span", "layer"):
        assert list(result.tables[f"sweep-{name}"].columns) == ["ours", "none", "shuffled", "text_only"]
    main = result.tables["fixed"].rows["ours"][0]
    ours = [result.tables[f"sweep-{by}"].rows[part][0] for by, part in (("form", "system"), ("span", "all"), ("layer", str(layers[-1])))]
    assert ours == [main] * 3
    assert len(job.journal.records) == 10 + len(layers) - 3  # system, all and the default layer are `fixed` again
    curve = next(plot for plot in result.plots if plot.name == "layers")
    assert curve.series["ours"]["x"] == layers and curve.series["ours"]["y"][-1] == main.mean


@pytest.mark.parametrize(("span", "expected"), [("all", slice(None)), ("last 1", slice(-1, None)), ("last 4", slice(-4, None))])
def test_spans_are_of_the_visible_tokens(tiny_decoder, span, expected):
    decoder, setting = tiny_decoder(), Setting(1, span=span)
    chat = setting.chat(item(0))
    visible = decoder.read(chat, "turn:-1").span
    assert decoder.read(chat, setting.tokens(decoder, chat)).span == visible[expected]
    first = Setting(1, span="first 10")
    assert decoder.read(chat, first.tokens(decoder, chat)).span == visible[:10]


def test_kept_passes_are_bounded_and_change_nothing(tiny_decoder):
    decoder = tiny_decoder(conditioning="amplified", conditioning_constant=2.0)
    chats = [Setting(1).chat(item(i)) for i in range(4)]
    passes = Passes(room=60_000)
    for chat in chats * 2:
        for layer in (0, 1):
            kept, plain = decoder.read(chat, "user", layer, passes=passes), decoder.read(chat, "user", layer)
            assert torch.equal(kept.activations, plain.activations) and torch.equal(kept.injected, plain.injected)
            assert passes.held <= 60_000
    assert 0 < len(passes._kept) < 5 and passes.held == sum(2 * 4 * 32 * len(ids) for ids in passes._kept)


# --- references and fakes -----------------------------------------------------------------------------------------


def test_text_only_trained_is_given_the_text_and_no_activations(tiny_decoder, decoder_folder, job_for, tiny):
    from lqa import LatentDecoder

    decoder = tiny_decoder()
    folder = decoder_folder("smol", injection="visible_text", injection_constant=None)
    reader = LatentDecoder.from_pretrained(folder, base=decoder.base)
    chat = Setting(1).chat(item(0))
    reading = reader.read(chat, "turn:-1")
    ids, slots = reading._prompt_ids()
    prompt = decoder.base.tokenizer.decode(ids)
    assert f"Layer 1:User: {FIXED_MESSAGE}\n" in prompt and "Speak of" not in prompt and not any(slots)
    other = reader.read(Setting(1).chat(item(1)), "turn:-1")  # another control, the same visible text
    answers = ["A pirate.", "A doctor."]
    assert reading.logprobs("Who?", answers) == other.logprobs("Who?", answers) != reading.logprobs("Who?", answers, "none")
    with pytest.raises(LqaError, match="reads text"):
        reading.logprobs("Who?", answers, "shuffled")
    result = identify.run(job_for(decoder, [item(i) for i in range(4)], text_only_trained=reader))
    assert result.tables["fixed"].rows["text_only_trained"][0].mean == 0.25
    assert "text_only_trained" in result.tables["own"].rows


def test_fakes_are_of_the_stated_strength_and_leave_the_decoder_alone(tiny_decoder, job_for):
    decoder = tiny_decoder()
    chat, answers = Setting(1).chat(item(0)), ["A pirate.", "A doctor."]
    before = decoder.read(chat, "user").logprobs("Who?", answers)
    made = {kind: fake(decoder, kind, seed=1) for kind in ("random", "untrained")}
    assert decoder.read(chat, "user").logprobs("Who?", answers) == before
    scores = {kind: twin.read(chat, "user").logprobs("Who?", answers) for kind, twin in made.items()}
    assert scores["random"] != before != scores["untrained"] and scores["random"] != scores["untrained"]
    assert fake(decoder, "random", seed=1).read(chat, "user").logprobs("Who?", answers) == scores["random"]
    assert fake(decoder, "random", seed=2).read(chat, "user").logprobs("Who?", answers) != scores["random"]
    for module in decoder.base.tuners(made["random"].adapter):
        update = module.get_delta_weight(made["random"].adapter)
        assert (update.norm() / module.get_base_layer().weight.norm()).item() == pytest.approx(STRENGTH, rel=1e-4)
        assert module.get_delta_weight(made["untrained"].adapter).count_nonzero() == 0
    result = identify.run(job_for(decoder, [item(i) for i in range(4)], rows=made))
    assert list(result.tables["fixed"].rows)[-2:] == ["random", "untrained"] and "random" not in result.tables["own"].rows


def test_rows_are_fakes_or_folders(tiny_decoder):
    decoder, rows = tiny_decoder(), {}
    add_row(rows, decoder, str(decoder.folder), 0)
    assert list(rows) == [decoder.folder.name] and rows[decoder.folder.name].base is decoder.base
    with pytest.raises(LqaError, match="'magic'.*random, untrained, or a folder"):
        add_row(rows, decoder, "magic", 0)


# --- data -------------------------------------------------------------------------------------------------------


def test_latentqa_format_is_read_in_place(tmp_path):
    folder = tmp_path / "latentqa" / "eval_dev"
    folder.mkdir(parents=True)
    system = [{"label": "goal-x-y", "system": "S", "stimulus_user": "U"}, {"label": "goal-no-qa", "system": "S", "stimulus_user": "U"}]
    (folder / "system.json").write_text(json.dumps(system))
    reply = {"label": "goal-x-y", "control_user": "C", "control_model": "Yes.", "stimulus_user": "U", "stimulus_model": "R"}
    (folder / "stimulus_completion.json").write_text(json.dumps([reply]))
    (folder / "qa.json").write_text(json.dumps({"goal-x-y": [["Q1", "A1"], ["Q2", "A2"]]}))
    own = (("Q1", "A1"), ("Q2", "A2"))
    expected = [Item("goal-x-y", "goal", "S", "U", "A1", own=own)]
    assert data.latentqa_items(tmp_path)[0] == expected == data.latentqa_items(folder)[0]
    (found,), about = data.items_of(tmp_path, "stimulus_completion")
    assert found == Item("goal-x-y", "goal", "C", "U", "A1", "Yes.", "R", own=own) and "stimulus_completion" in about["name"]
    roles = [m["content"] for m in Setting(0, form="stimulus_completion").chat(found)]
    assert roles == ["C", "Yes.", "U", "R"]
    assert data.forms_of(tmp_path) == ["stimulus_completion", "system"]
    with pytest.raises(LqaError, match="control.json.*github.com/aypan17/latentqa"):
        data.items_of(tmp_path, "control")
    before = data.digest(tmp_path)
    (folder / "qa.json").write_text("{}")
    assert data.digest(tmp_path) != before
    with pytest.raises(LqaError, match="no item.*github.com/aypan17/latentqa"):
        data.latentqa_items(tmp_path)
    (folder / "qa.json").write_text("[1]")
    with pytest.raises(LqaError, match="github.com/aypan17/latentqa"):
        data.latentqa_items(tmp_path)


def test_own_test_split_serves_without_outside_data(monkeypatch):
    items, _ = data.items_of(None)
    assert len(items) >= 16 and {i.kind for i in items} <= set(data.QUESTIONS)
    assert all(i.control and i.message and i.answer and i.acknowledgement for i in items)
    hard = make_hard_draws(items, items, 8, seed=0)
    assert sum(draw.counted for draw in hard) >= 0.9 * len(items)  # contrast partners are on one side of the split
    monkeypatch.setattr(data, "load_completions", lambda controls: ({}, 0))
    assert data.forms_of(None) == ["control", "stimulus", "system"]
    some = {items[0].label: [{"message": "What now?", "reply": "This.", "model": "m"}]}
    monkeypatch.setattr(data, "load_completions", lambda controls: (some, 0))
    (found,) = data.items_of(None, "stimulus_completion")[0]
    assert found == items[0]._replace(message="What now?", reply="This.") and data.forms_of(None)[2] == "stimulus_completion"
