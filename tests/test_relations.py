"""The suite `relations`: its data, its metric by hand, and a run on a tiny decoder."""

import csv
import json

import pytest

from lqa import LqaError
from lqa.chat import render
from lqa.evals import relations
from lqa.evals.mention import contains
from lqa.evals.relations import Item, choose, first_tokens, last_token, load, question_of
from lqa.evals.suite import Job
from lqa.journal import Journal

HEADER = ["", "prompt_target", "prompt_source", "subject", "object"]


def write(path, rows) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([HEADER, *([n, *row] for n, row in enumerate(rows))])


CITIES = [
    ["The city of x", ' the "doctor" cooks', "doctor", "Oslo"],
    ["The city of x", " a pirate cooks", "pirate", "Rome"],
    ["The city of x", " two\nlines with a doctor", "doctor", "Oslo"],
    ["The city of x", "", "doctor", "Oslo"],
    ["The city of x", " nobody cooks", "doctor", "Oslo"],
    ["The city of x", " the assistant cooks at sea", "assistant", "Rome"],
    ["The city of x", " the user and the weather", "user", "Oslo"],
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "relations").mkdir(parents=True)
    write(tmp_path / "data" / "relations" / "country_currency.tsv", CITIES)
    write(tmp_path / "data" / "relations" / "pirate_ship.tsv", [["The ship of x", " it was a pirate", "pirate", "Sea"]] * 2)
    return tmp_path / "data"


def test_rows_that_cannot_be_used_are_left_out_and_counted(folder):
    items, about, lost = load(folder)
    assert load(folder / "relations")[0] == items and lost == {"country_currency": 3, "pirate_ship": 0}
    first = items["country_currency"][0]
    assert first == Item("country_currency/0", "country_currency", "The city of x", 'the "doctor" cooks', "doctor", "Oslo")
    assert [item.id for item in items["country_currency"]] == [f"country_currency/{n}" for n in (0, 1, 5, 6)]
    assert len(about["sha256"]) == 64


def test_wrong_data_names_the_public_home(folder, tmp_path):
    path = folder / "relations" / "country_currency.tsv"
    for text in ("", "a\tb\n1\t2\n", "\t".join(HEADER[:-1]) + "\n0\tx\ty\tz\n"):
        path.write_text(text)
        with pytest.raises(LqaError, match="PAIR-code/interpretability"):
            relations.check(folder)
    write(path, [CITIES[0], ["The ship of x", *CITIES[1][1:]]])
    with pytest.raises(LqaError, match="2 prompts"):
        relations.check(folder)
    for place in (None, tmp_path):
        with pytest.raises(LqaError, match="PAIR-code/interpretability"):
            relations.check(place)


def test_an_answer_counts_if_it_contains_the_object():
    assert contains("It is the Krona, I think.", "krona") and contains("They pay in krónas", "Krona") and contains("pesos", "Peso")
    assert contains("Somewhere in the Middle-East.", "Middle East")
    assert not contains("It is wonderful.", "Won") and not contains("It is brand new, really.", "Rand") and not contains("", "Won")
    assert not contains("anything", " ")


def test_every_public_relation_has_a_question_and_others_get_one():
    assert question_of(Item("a/0", "country_currency", "The official currency of x", "", "", "")).endswith("mentioned?")
    unknown = Item("a/0", "exotic", "The maximum tax of x", "", "", "")
    assert question_of(unknown) == "What is the maximum tax of the one that is mentioned?"
    public = {"country_currency", "food_from_country", "person_plays_pro_sport", "person_plays_position_in_sport"}
    assert set(relations.QUESTIONS) == public | {"product_by_company", "star_constellation"}


def test_the_subjects_last_token_is_found_in_the_message(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    rendered = render(tokenizer, [{"role": "user", "content": "The pirate doctor cooks"}])
    found = last_token(tokenizer, rendered, "doctor")
    upto = "".join(token.text for token in rendered.tokens[: found + 1])
    assert upto.endswith("pirate doctor")
    # the template's own "assistant" stands before it
    chat = [{"role": "user", "content": "Ask an assistant about it"}]
    found = last_token(tokenizer, render(tokenizer, chat), "assistant")
    assert render(tokenizer, chat).tokens[found].content


def test_a_limit_is_shared_equally_and_small_files_leave_their_part():
    items = {name: [Item(f"{name}/{n}", name, "", "", "", "") for n in range(size)] for name, size in (("a", 50), ("b", 2), ("c", 50))}
    chosen = choose(items, 20, seed=0)
    assert {name: len(rows) for name, rows in chosen.items()} == {"a": 9, "b": 2, "c": 9} and choose(items, 20, seed=0) == chosen
    assert choose(items, 20, seed=1) != chosen
    assert sum(map(len, choose(items, 1, seed=0).values())) == 1 and sum(map(len, choose(items, None, seed=0).values())) == 102


def test_first_tokens_of_a_name(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    ids = first_tokens(tokenizer, "france")
    assert tokenizer(" France", add_special_tokens=False)["input_ids"][0] in ids and 2 <= len(ids) <= 4


def test_patchscopes_gets_its_best_target_layer():
    hits = {
        "patchscopes": {0: {"a": 0.0, "b": 0.0}, 1: {"a": 1.0, "b": 0.0}},
        "patchscopes/0": {0: {"a": 0.0, "b": 0.0}, 1: {"a": 1.0, "b": 1.0}},
        "patchscopes/1": {0: {"a": 1.0, "b": 0.0}, 1: {"a": 1.0, "b": 0.0}},
    }
    relations._best_target_layer(hits, [0, 1])
    assert hits["patchscopes_best"] == {0: {"a": 1.0, "b": 0.0}, 1: {"a": 1.0, "b": 1.0}} and "patchscopes/0" not in hits


def result(decoder, folder, out, **more):
    with Journal(out / "journal.jsonl", {}) as journal:
        return relations.run(Job("relations", decoder, journal, data=folder, limit=None, **more))


def test_run_reports_every_method_and_goes_on_where_it_was_killed(tiny_decoder, folder, tmp_path):
    decoder = tiny_decoder("smol", conditioning="projected")
    whole = result(decoder, folder, tmp_path / "whole")
    table = whole.tables["read"]
    titles = set(relations.ROWS.values()) - {relations.ROWS["text_only_trained"]}
    assert set(table.rows) == titles and list(table.columns) == ["country_currency", "pirate_ship", "all"]
    assert all([cell.n for cell in row] == [4, 2, 6] for row in table.rows.values())
    probe = table.rows[relations.ROWS["probe"]]
    assert probe[1].mean == 0.0  # its only subject is the one that it is tested on
    known = {relations.ROWS[name] for name in ("ours", "none", "shuffled")} | {relations.HIDDEN_TEXT_ONLY}
    assert set(whole.tables["hidden"].rows) == known
    assert {item["id"] for item in whole.items} == {f"country_currency/{n}" for n in (0, 1, 5, 6)} | {"pirate_ship/0", "pirate_ship/1"}
    assert "cooks" not in json.dumps(whole.items) and whole.settings["left_out"]["country_currency"] == 3
    assert all(len(series["x"]) == 2 for series in whole.plots[0].series.values())

    (tmp_path / "cut").mkdir()
    lines = (tmp_path / "whole" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "journal.jsonl").write_text("".join(lines[: len(lines) // 2]))
    assert result(decoder, folder, tmp_path / "cut") == whole


@pytest.mark.parametrize("changes", [{}, {"layers_per_reading": 2, "default_layer": [0, 1]}])
def test_further_decoders_get_rows(tiny_decoder, folder, tmp_path, changes):
    decoder = tiny_decoder(**changes)
    whole = result(decoder, folder, tmp_path / "out", rows={"twin": decoder})
    assert whole.tables["read"].rows["twin"] == whole.tables["read"].rows[relations.ROWS["ours"]]
    assert whole.tables["hidden"].rows["twin"] == whole.tables["hidden"].rows[relations.ROWS["ours"]]
