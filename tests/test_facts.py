"""Facts are right where the world is known, never stated in the chat, and held out by entity."""

from lqa.corpus import facts


def known() -> dict:
    return {(f.kind, f.entity, f.attribute): f for f in facts.load_facts()}


def test_some_facts_of_the_world():
    found = known()
    assert found["country", "Morocco", "capital"].answer == "Rabat"
    assert found["country", "Japan", "currency"].answer == "Japanese Yen" and "yen" in found["country", "Japan", "currency"].alternatives
    assert found["country", "Brazil", "language"].answer == "Portuguese"
    assert found["country", "Netherlands", "capital"].shown == "the Netherlands"
    assert found["element", "iron", "symbol"].answer == "Fe" and found["element", "gold", "number"].answer == "79"
    assert found["language", "Greek", "script"].answer == "Greek"
    assert found["currency", "Moroccan Dirham", "code"].answer == "MAD"
    assert found["unit", "pascals", "quantity"].answer == "pressure" and found["unit", "hours", "quantity"].answer == "time"


def test_contested_or_shared_things_are_left_out():
    found = known()
    assert ("country", "South Africa", "capital") not in found and ("country", "South Africa", "currency") in found
    assert ("country", "Switzerland", "language") not in found  # several official ones
    assert not [k for k in found if k[1] in ("Serbia and Montenegro", "Burma", "Hong Kong", "neutron")]
    assert sum(k[0] == "country" and k[2] == "region" for k in found) > 160
    assert sum(k[2] == "symbol" for k in found) == 118


def test_rows_are_held_out_by_entity_and_never_state_the_answer():
    splits = facts.build_facts()
    entities = {name: {(row["entity_kind"], row["entity"]) for row in rows} for name, rows in splits.items()}
    assert not entities["train"] & entities["test"] and not entities["train"] & entities["validation"]
    assert not entities["validation"] & entities["test"]
    total = sum(map(len, entities.values()))
    assert all(0.05 < len(entities[name]) / total < 0.15 for name in ("validation", "test"))
    rows = [row for part in splits.values() for row in part]
    assert len(rows) == facts.PER_FACT * len(facts.load_facts()) and len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        (pair,) = row["qa"]
        message = row["chat"][0]["content"]
        assert "{" not in message and row["entity"].removeprefix("The ") in message
        assert row["entity"] not in pair["question"]  # the question alone does not say whom it is about
        assert pair["answer"].strip() == pair["answer"] and pair["answer"] and pair["answer"] not in pair["alternatives"]
    by_fact: dict = {}
    for row in rows:
        by_fact.setdefault(row["id"].rsplit("/", 1)[0], set()).add((row["chat"][0]["content"], row["qa"][0]["question"]))
    assert {len(v) for v in by_fact.values()} == {facts.PER_FACT}


def test_the_same_seed_gives_the_same_rows_and_another_one_others():
    assert facts.build_facts(0) == facts.build_facts(0) != facts.build_facts(1)
