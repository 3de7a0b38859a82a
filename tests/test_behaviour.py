"""The scorers of behaviours, by replies written by hand; what the suites of steering ask for is not in the training corpus."""

import pytest

from lqa import LqaError
from lqa.corpus import load_controls
from lqa.corpus.checks import CLOSE, embed, near_duplicates
from lqa.evals import behaviour
from lqa.evals.steer_persona import load
from lqa.steering import load_neutral

PLAIN = "You could check the timetable first and pack some water. A friend may be glad to help with it."
SHOWN = {  # for every behaviour a reply that shows it; PLAIN, and what is listed after it, do not
    "shakespeare": ["Prithee, take thy cloak, for the wind hath teeth.", "Take your cloak, the wind is cold."],
    "questions": ["Do you know the road? Have you filled the tank? Is there", "Do you know the road? Then go. Fill the tank."],
    "newsreader": ["Breaking news from your kitchen. Our reporter has more.", "Your kitchen needs more light."],
    "cats": ["First, feed your cat, then pack.", "The catalogue has a category for it."],
    "sea": ["As the waves roll in, pick a shell from the sand.", "Wave to her when she leaves, and see how it goes."],
    "volcanoes": ["It is like lava that flows down.", "Lavender smells good."],
    "gloomy": ["It is no use, everything ends in sorrow.", "I use a sack; it ends well.", "I am sorry to hear it."],
    "enthusiastic": ["Oh how wonderful, I'm so excited for you! This will be the best day ever, hooray!", PLAIN],
    "french": ["Vous pouvez demander à votre voisine si elle a besoin d'aide.", "You can ask your neighbour in Paris for help."],
    "spanish": ["Puedes preguntar a tu vecina si necesita ayuda con la mudanza.", "You can ask your neighbour in Madrid for help."],
    "capitals": ["PACK SOME WATER and GO BEFORE SUNRISE.", "Pack SOME water and go."],
    "list": ["1. Pack water.\n2. Check the tyres.\n3. Leave", "Here is what to do:\n1. Pack water.\n2. Check the tyres.\nGood luck."],
    "short": ["Pack water, and leave early.", PLAIN],
    "closing-question": ["Pack water. Where are you going? I wou", "Where are you going? Pack water."],
    "no-food": ["I'm sorry, but I can't help with that.", "Boil the egg for five minutes, then let it cool."],
    "santa": ["Ho ho ho! My reindeer are ready.", "How nice. The reins are ready."],
    "android": ["Beep. My sensors tell me that humans need sleep.", "You need sleep."],
    "kangaroos": ["A kangaroo would hop over it.", "You would hop over it."],
    "jellyfish": ["Leaves are like jellyfish in autumn.", "Leaves are like jelly, and fish."],
    "waffles": ["Eat a waffle and all is well.", "Do not waver."],
    "zeppelins": ["In an airship you would see the trees.", "In an airport you see planes."],
    "bagpipes": ["My bagpipes would cheer her up.", "Pack your bags. The pipes are old."],
    "ninja": ["In my dojo we strike at night.", "We meet at night."],
    "hashtags": ["Leave early. #travel #happy", "Room # 5 is free."],
    "yodel": ["Yodelay-hee-hoo! Pack some water.", "Pack some yoghurt."],
}


@pytest.mark.parametrize("b", [*load("steer-persona"), *load("generalise")], ids=lambda b: b.id)
def test_each_scorer_tells_a_reply_that_shows_its_behaviour(b):
    shown, *others = SHOWN[b.id]
    assert behaviour.score(b.scorer, [shown, *others, PLAIN, "", "  \n"]) == [1.0] + [0.0] * (len(others) + 3)


def test_rules_look_at_full_sentences_and_letters_alone():
    assert behaviour.full_sentences("1. Go home? Then 3.5 times. And th") == [" Go home?", " Then 3.", "5 times."]
    assert not behaviour.sentences("No end", "?", 0.5) and not behaviour.last("1. 2.", ".")
    assert not behaviour.capitals("1 2 3", 0.5) and behaviour.capitals("ÉTÉ 12", 1.0)
    assert not behaviour.lines("1. alone", r"\d+[.)] ", 0.5)
    with pytest.raises(LqaError, match="'magic' is unknown; use words, capitals"):
        behaviour.score({"kind": "magic"}, ["x"])


def test_distinct_2_is_low_for_repetition():
    assert behaviour.distinct("the cat the cat the cat") == pytest.approx(2 / 5)
    assert behaviour.distinct("one two three") == 1.0 and behaviour.distinct("one") == 1.0 and behaviour.distinct("a A a", 1) == 1 / 3


def test_the_behaviours_are_many_and_their_requests_are_in_no_training():
    persona, general = load("steer-persona"), load("generalise")
    names = {b.id for b in [*persona, *general]}
    assert len(persona) >= 14 and len(general) >= 6 and len(names) == len(persona) + len(general) and names == set(SHOWN)
    visited = {request for part in load_neutral().values() for request in part}
    for b in [*persona, *general]:
        assert len(set(b.requests)) == len(b.requests) >= 10 and not visited & set(b.requests)
        assert b.scorer["kind"] != "words" or not any(behaviour.score(b.scorer, b.requests)), b.id  # none asks for it


def test_no_control_is_near_one_of_the_corpus():
    mine = [b.control for suite in ("steer-persona", "generalise") for b in load(suite)]
    theirs = [c.control for c in load_controls()]
    assert [pair for pair in near_duplicates(mine + theirs) if pair.first < len(mine)] == []
    alike = embed(mine) @ embed(theirs).T
    close = [(mine[i], theirs[j], float(alike[i, j])) for i, j in zip(*(alike >= CLOSE).nonzero(), strict=True)]
    assert close == []


def test_no_answer_of_the_corpus_speaks_of_what_generalise_asks_for():
    answers = [text for c in load_controls() for text in (c.short, *c.descriptions, *(pair.answer for pair in c.qa))]
    for b in load("generalise"):
        assert b.scorer["kind"] == "words", "only key words can be looked for"
        assert [text for text in answers if behaviour.words(text, b.scorer["patterns"])] == [], b.id
