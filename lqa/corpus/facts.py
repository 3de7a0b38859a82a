"""Facts: questions whose answers are known, about an entity that the user mentions, for exact-match evaluation.

The target must recall the attribute by itself, and the decoder must read it: nothing in the chat says it.  Values come from well-kept
packages (countryinfo, Babel's CLDR data, periodictable); an entity with all its attributes lies in one split.

A row of the config `facts`: {"id", "entity", "entity_kind", "attribute", "chat", "span", "qa": [PAIR], "source"}.
"""

from __future__ import annotations

import hashlib
import random
from typing import NamedTuple

SPAN = "turn:0"  # the message that mentions the entity
PER_FACT = 3  # rows of one fact, each with another message and another question

MESSAGES = {
    "country": [
        "I'm going to {} in the spring.",
        "My cousin has just moved to {} for work.",
        "We watched a film that was set in {} last night.",
        "Can you help me plan two weeks in {}?",
        "A parcel from {} has arrived for me.",
        "My neighbour grew up in {}.",
        "Our team plays against {} on Saturday.",
        "I found an old stamp from {} in a drawer.",
        "What should I pack for {}?",
        "There was a long report about {} on the radio.",
    ],
    "element": [
        "Please tell me something about {}.",
        "We had to write about {} in class today.",
        "My daughter wants to know what {} is good for.",
        "I read that the price of {} went up.",
        "Where on Earth is {} found?",
        "The crossword asked for a property of {}.",
        "Is it dangerous to touch {}?",
        "Somebody at work keeps a sample of {} on his desk.",
    ],
    "language": [
        "I've begun to learn {}.",
        "My grandmother used to sing to us in {}.",
        "The manual came in {} only.",
        "How hard is it to pick up some {}?",
        "Two people behind me on the bus were speaking {}.",
        "I'd like to order a book in {}.",
        "Somebody left a note in {} on my door.",
        "The subtitles were in {} by mistake.",
    ],
    "currency": [
        "I still have some coins of the {} at home.",
        "My aunt paid me back, but in the {}.",
        "The news says that the {} fell again.",
        "The invoice is in the {} and I don't know what to do with it.",
        "How do I get hold of the {} before my trip?",
        "A friend collects banknotes of the {}.",
        "The hotel shows its price in the {}.",
        "My savings are in the {}.",
    ],
    "unit": [
        "The label gives it in {}, and I can't make sense of that.",
        "The form asks me for a figure in {}.",
        "Our old instrument shows {}.",
        "Could you explain {} to my son?",
        "The whole table is in {}.",
        "The quiz had a question about {}.",
        "Who came up with {}?",
        "I typed in the value in {} by mistake.",
    ],
}

QUESTIONS = {
    "capital": [
        "What is the capital of the country that the user mentions?",
        "Which city is the seat of government of the country in the message?",
        "Name the capital of the place that the user has in mind.",
        "The user speaks of a country. What is its capital?",
        "What city would you look for on a map as this country's capital?",
    ],
    "currency": [
        "What money does one pay with in the country that the user mentions?",
        "Name the currency of the country in the message.",
        "Which currency is legal tender in the place that the user speaks of?",
        "The user mentions a country. What is its currency?",
        "What would banknotes be called in that country?",
    ],
    "language": [
        "What is the official language of the country that the user mentions?",
        "Which language is official in the place the message is about?",
        "Name the official language of the country in question.",
        "The user mentions a country. Which language does its government use?",
        "In what language would that country's laws be written?",
    ],
    "region": [
        "Which part of the world is the country that the user mentions in?",
        "Name the region of the world that the country in the message belongs to.",
        "Where in the world does the place that the user speaks of lie?",
        "The user mentions a country. Which world region is it in?",
        "On which continent would one look for that country?",
    ],
    "demonym": [
        "What is a person from the country that the user mentions called?",
        "Name the adjective for somebody who comes from the place in the message.",
        "How does one call the inhabitants of the country that the user speaks of?",
        "The user mentions a country. What nationality do its citizens have?",
        "What would a passport from that country say under nationality?",
    ],
    "symbol": [
        "What is the chemical symbol of the element that the user mentions?",
        "Which letters stand for the substance in the message in the periodic table?",
        "Name the symbol of the element in question.",
        "The user mentions an element. How is it abbreviated?",
        "How would a chemist write that substance in a formula?",
    ],
    "number": [
        "What is the atomic number of the element that the user mentions?",
        "How many protons does an atom of the substance in the message have?",
        "At which number does the element in question stand in the periodic table?",
        "The user mentions an element. Give its atomic number.",
        "Which number does that element have?",
    ],
    "script": [
        "In which script is the language that the user mentions written?",
        "Name the writing system of the language in the message.",
        "Which letters or characters would one learn for the language that the user speaks of?",
        "The user mentions a language. What script does it use?",
        "What kind of writing would be seen in a book in that language?",
    ],
    "code": [
        "What is the three-letter code of the currency that the user mentions?",
        "Name the ISO code of the money in the message.",
        "Under which letters would a bank list the currency in question?",
        "The user mentions a currency. How is it abbreviated by banks?",
        "Which code stands for that currency on an exchange board?",
    ],
    "quantity": [
        "What kind of quantity do the units that the user mentions measure?",
        "Name the quantity that is measured in the units in the message.",
        "The user mentions units. What are they units of?",
        "What does one measure with the units in question?",
        "To which physical quantity do those units belong?",
    ],
}

# Not states, or gone; and capitals that are shared, contested, or have moved since.
_NO_COUNTRY = {"AN", "CS", "EH", "GP", "HK", "MQ", "PR", "PS", "RE"}
_NO_CAPITAL = {"BI", "BO", "IL", "KZ", "LK", "SZ", "ZA"}
_NAMES = {"MK": "North Macedonia", "SZ": "Eswatini"}
_ARTICLE = ("United", "Republic", "Democratic", "Central African", "Dominican", "Czech")
_ARTICLES = {"Bahamas", "Comoros", "Gambia", "Maldives", "Netherlands", "Philippines", "Solomon Islands"}
_SAME = "acceleration angle area energy force frequency length mass power pressure speed temperature torque volume"
_QUANTITIES = {name: name for name in _SAME.split()} | {"duration": "time", "digital": "information"}
_ALSO = {
    "information": ("data", "storage"),
    "length": ("distance",),
    "mass": ("weight",),
    "speed": ("velocity",),
    "time": ("duration",),
}
_NO_UNIT = {"force-kilowatt-hour-per-100-kilometer", "speed-light-speed", "pressure-gasoline-energy-density", "duration-night"}


class Fact(NamedTuple):
    """One attribute of one entity: `shown` is how a message names it, `answer` and `alternatives` are all right."""

    kind: str
    entity: str
    shown: str
    attribute: str
    answer: str
    alternatives: tuple[str, ...]
    source: str


def _countries(locale) -> list[Fact]:
    from babel.languages import get_official_languages
    from babel.numbers import get_territory_currencies
    from countryinfo import all_countries

    facts, seen = [], set()
    for country in all_countries():
        data = country.info()
        code = data.get("ISO", {}).get("alpha2")
        if code in _NO_COUNTRY | seen or code not in locale.territories or not data.get("capital") or data.get("population", 0) < 300_000:
            continue
        seen.add(code)
        name = _NAMES.get(code, data["name"].removeprefix("The "))
        shown = f"the {name}" if name in _ARTICLES or name.startswith(_ARTICLE) else name

        def add(attribute: str, answer: str, source: str, *alternatives: str, name=name, shown=shown) -> None:
            facts.append(Fact("country", name, shown, attribute, answer, tuple(a for a in alternatives if a and a != answer), source))

        if code not in _NO_CAPITAL:
            add("capital", data["capital"], "countryinfo")
        if len(currencies := get_territory_currencies(code)) == 1:
            currency = locale.currencies[currencies[0]]
            add("currency", currency, "CLDR (Babel)", currency.split()[-1].lower(), currencies[0])
        languages = get_official_languages(code)
        if len(languages) == 1 and languages[0] in locale.languages:
            add("language", locale.languages[languages[0]], "CLDR (Babel)")
        add("region", data["region"], "countryinfo", data.get("subregion", ""))
        if (demonym := data.get("demonym", "")) and "," not in demonym and "/" not in demonym:
            add("demonym", demonym, "countryinfo", f"{demonym}s")
    return facts


def _elements() -> list[Fact]:
    import periodictable

    found = []
    for element in periodictable.elements:
        if element.number:  # 0 is the neutron
            common = ("element", element.name, element.name)
            found.append(Fact(*common, "symbol", element.symbol, (), "periodictable"))
            found.append(Fact(*common, "number", str(element.number), (), "periodictable"))
    return found


def _languages(locale) -> list[Fact]:
    from babel.core import get_global
    from babel.languages import get_official_languages

    official = {code for territory in locale.territories if len(territory) == 2 for code in get_official_languages(territory)}
    likely, found = get_global("likely_subtags"), []
    for code in sorted(official & set(locale.languages)):
        if subtags := likely.get(code):
            script = locale.scripts[subtags.split("_")[1]]
            found.append(Fact("language", locale.languages[code], locale.languages[code], "script", script, (), "CLDR (Babel)"))
    return found


def _currencies(locale) -> list[Fact]:
    from babel.numbers import get_territory_currencies

    codes = {code for territory in locale.territories if len(territory) == 2 for code in get_territory_currencies(territory)}
    found = []
    for code in sorted(codes & set(locale.currencies)):
        name = locale.currencies[code]
        found.append(Fact("currency", name, name, "code", code, (), "CLDR (Babel)"))
    return found


def _units(locale) -> list[Fact]:
    found = []
    for key in sorted(set(locale.unit_display_names) - _NO_UNIT):
        quantity, name = _QUANTITIES.get(key.split("-")[0]), locale.unit_display_names[key].get("long")
        if quantity and name and quantity not in name.lower():
            found.append(Fact("unit", name, name, "quantity", quantity, _ALSO.get(quantity, ()), "CLDR (Babel)"))
    return found


def load_facts() -> list[Fact]:
    """Every fact, in a fixed order."""
    from babel import Locale

    locale = Locale("en")
    facts = [*_countries(locale), *_elements(), *_languages(locale), *_currencies(locale), *_units(locale)]
    return sorted({(f.kind, f.entity, f.attribute): f for f in facts}.values())


def entity_side(kind: str, entity: str) -> str:
    """The split of an entity: a tenth each for validation and test, by its name alone."""
    share = int(hashlib.sha256(f"{kind}/{entity}".encode()).hexdigest()[:8], 16) / 16**8
    return "test" if share < 0.1 else "validation" if share < 0.2 else "train"


def build_facts(seed: int = 0) -> dict[str, list[dict]]:
    """{split: rows}: every fact PER_FACT times, with different messages and questions."""
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for fact in load_facts():
        rng = random.Random(f"{seed}/{fact.kind}/{fact.entity}/{fact.attribute}")
        messages, questions = rng.sample(MESSAGES[fact.kind], PER_FACT), rng.sample(QUESTIONS[fact.attribute], PER_FACT)
        for i, (message, question) in enumerate(zip(messages, questions, strict=True)):
            pair = {"question": question, "answer": fact.answer, "alternatives": list(fact.alternatives), "type": "short", "generic": True}
            splits[entity_side(fact.kind, fact.entity)].append(
                {
                    "id": f"{fact.kind}/{fact.entity}/{fact.attribute}/{i}",
                    "entity": fact.entity,
                    "entity_kind": fact.kind,
                    "attribute": fact.attribute,
                    "chat": [{"role": "user", "content": message.format(fact.shown)}],
                    "span": SPAN,
                    "qa": [pair],
                    "source": fact.source,
                }
            )
    return splits
