"""What the miniature world knows: tables of real facts, the sentences that state them, and the reader that checks them.

`tiny/facts/*.tsv` holds one table per kind of thing (elements, countries, animals, ...), one entity a row, one attribute
a column. Every attribute has a predicate ("has the symbol {v}"), so a fact can be said and a sentence can be read back:
`read_claims` splits a response into sentences, finds whom each is about, and compares the stated value with the table.
That is FActScore (Min et al. 2023; the paper's Table 2) with a known truth and without a language model.

    python -m tiny.knowledge        # prints the size of every table and some sentences
"""

import csv
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

FACTS = Path(__file__).parent / "facts"

# column: (noun for instructions, question, predicate). "{a}" becomes the article that fits the value.
# The first attribute of a kind is its lead: the one with which a description likes to start.
ELEMENT = {
    "category": ("category", "What kind of element is {x}?", "is {a} {v}"),
    "symbol": ("symbol", "What is the chemical symbol of {x}?", "has the symbol {v}"),
    "number": ("atomic number", "What is the atomic number of {x}?", "has the atomic number {v}"),
    "state": ("state", "Is {x} a solid, a liquid or a gas?", "is a {v} at room temperature"),
    "color": ("color", "What color does {x} have?", "looks {v}"),
    "period": ("period", "In which period of the table does {x} stand?", "stands in the {v} period"),
    "use": ("use", "What is {x} used in?", "is used in {v}"),
    "discovered": ("discovery", "When was {x} discovered?", "was discovered in {v}"),
    "source": ("source", "Where is {x} mainly found?", "is mainly found in {v}"),
}
COUNTRY = {
    "continent": ("continent", "On which continent does {x} lie?", "is a country in {v}"),
    "capital": ("capital", "What is the capital of {x}?", "has the capital {v}"),
    "language": ("language", "Which language is spoken in {x}?", "has the official language {v}"),
    "currency": ("currency", "What is the currency of {x}?", "pays with the {v}"),
    "neighbor": ("neighbor", "Which country borders {x}?", "shares a border with {v}"),
    "coast": ("coast", "On which sea does {x} lie?", "has a coast on the {v}"),
    "export": ("main export", "What does {x} export?", "exports {v}"),
    "people": ("people", "What are the people of {x} called?", "is the home of the {v}"),
    "flag": ("flag", "Which color is on the flag of {x}?", "has a flag with the color {v}"),
}
ANIMAL = {
    "class": ("class", "To which class of animals does {x} belong?", "is {a} {v}"),
    "diet": ("diet", "Is {x} a carnivore, a herbivore or an omnivore?", "lives as {a} {v}"),
    "food": ("food", "What does {x} eat?", "eats {v}"),
    "habitat": ("habitat", "Where does {x} live?", "lives in {v}"),
    "continent": ("range", "In which part of the world is {x} found?", "is found in {v}"),
    "cover": ("body cover", "What covers the body of {x}?", "is covered with {v}"),
    "young": ("young", "What is the young of {x} called?", "has a young called the {v}"),
    "group": ("group", "What is a group of {x} called?", "forms a group called the {v}"),
    "lifespan": ("lifespan", "How many years does {x} live?", "lives for about {v} years"),
    "active": ("active time", "When is {x} active?", "is active at {v}"),
    "legs": ("number of legs", "How many legs does {x} have?", "has {v} legs"),
}
PERSON = {
    "profession": ("profession", "What was the profession of {x}?", "was {a} {v}"),
    "country": ("home country", "From which country did {x} come?", "came from {v}"),
    "birthplace": ("birthplace", "In which town was {x} born?", "was born in the town of {v}"),
    "born": ("year of birth", "In which year was {x} born?", "was born in the year {v}"),
    "died": ("year of death", "In which year did {x} die?", "died in the year {v}"),
    "known_for": ("fame", "What is {x} known for?", "is known for {v}"),
    "field": ("field", "In which field did {x} work?", "worked in {v}"),
    "era": ("era", "In which century did {x} work?", "lived in the {v}"),
    "language": ("mother tongue", "What was the mother tongue of {x}?", "spoke {v}"),
    "deathplace": ("place of death", "In which town did {x} die?", "died in the town of {v}"),
}
FOOD = {
    "group": ("food group", "What kind of food is {x}?", "is {a} {v}"),
    "color": ("color", "What color is {x}?", "has a {v} color"),
    "taste": ("taste", "How does {x} taste?", "tastes {v}"),
    "grows": ("growth", "How does {x} grow?", "grows {v}"),
    "origin": ("origin", "Where does {x} come from?", "comes from {v}"),
    "climate": ("climate", "Which climate does {x} need?", "needs a {v} climate"),
    "dish": ("use in the kitchen", "Which dish is made with {x}?", "is used in {v}"),
    "nutrient": ("main nutrient", "Which nutrient is {x} rich in?", "is rich in {v}"),
    "season": ("season", "In which season is {x} harvested?", "is harvested in {v}"),
    "part": ("part that is eaten", "Which part of {x} is eaten?", "is eaten for its {v}"),
}
INSTRUMENT = {
    "family": ("family", "To which family does {x} belong?", "is {a} {v} instrument"),
    "material": ("material", "What is {x} made of?", "is made of {v}"),
    "played": ("way of playing", "How is {x} played?", "is played by {v}"),
    "origin": ("origin", "Where does {x} come from?", "comes from {v}"),
    "pitch": ("range", "Which range does {x} have?", "has a {v} range"),
    "size": ("size", "What size is {x}?", "has a {v} body"),
    "genre": ("music", "In which music is {x} heard?", "is heard in {v}"),
    "player": ("player", "What is a player of {x} called?", "is played by {a} {v}"),
    "parts": ("parts", "Which parts does {x} have?", "comes with {v}"),
}
PLACE = {
    "type": ("type", "What kind of place is {x}?", "is a famous {v}"),
    "country": ("country", "In which country does {x} lie?", "lies in {v}"),
    "continent": ("continent", "On which continent does {x} lie?", "belongs to {v}"),
    "nearby": ("nearby place", "Which place is close to {x}?", "is close to {v}"),
    "feature": ("fame", "What is {x} known for?", "is known for {v}"),
    "material": ("material", "What is {x} made of?", "is made of {v}"),
    "climate": ("climate", "Which climate does {x} have?", "has a {v} climate"),
    "origin": ("age", "From when does {x} date?", "dates from {v}"),
    "visitors": ("visitors", "Who visits {x}?", "draws {v}"),
    "water": ("nearby water", "Which water lies near {x}?", "lies near {v}"),
}
KINDS = {
    "element": ("elements", ELEMENT), "country": ("countries", COUNTRY), "animal": ("animals", ANIMAL),
    "person": ("people", PERSON), "food": ("foods", FOOD), "instrument": ("instruments", INSTRUMENT),
    "place": ("places", PLACE),
}
# Values that need words of their own; everything else is said with the attribute's predicate.
SPECIAL = {
    ("element", "discovered", "antiquity"): "has been known since antiquity",
    ("country", "coast", "no sea"): "has no coast",
    ("country", "neighbor", "no other country"): "shares a border with no other country",
    ("animal", "active", "day"): "is active by day",
    ("animal", "legs", "0"): "has no legs",
    ("animal", "lifespan", "1"): "lives for about one year",
}


@dataclass(frozen=True)
class Entity:
    """One thing of the world: `name` as it stands in a sentence ("copper", "the lion"), its kind and its facts."""

    name: str
    kind: str
    facts: dict[str, str] = field(hash=False)
    pronoun: str = "It"

    @property
    def subject(self) -> str:
        """The name as a sentence starts with it: "Copper", "The lion"."""
        return self.name[0].upper() + self.name[1:]


@dataclass(frozen=True)
class Claim:
    """What a sentence says: `attribute` of `entity` has `value`; `true` compares it with the table."""

    entity: Entity
    attribute: str
    value: str
    true: bool


def article(value: str) -> str:
    return "an" if value[0] in "aeiou" and not value.startswith(("uk", "uni", "eu")) else "a"


def predicate(kind: str, attribute: str, value: str) -> str:
    """The words that state a fact, without subject: ("element", "symbol", "Cu") → "has the symbol Cu"."""
    special = SPECIAL.get((kind, attribute, value))
    if special:
        return special
    return KINDS[kind][1][attribute][2].format(v=value, a=article(value))


def sentence_name(row: dict[str, str], kind: str) -> str:
    """The name with the article it takes inside a sentence."""
    if kind in ("animal", "food", "instrument") or row.get("article") == "the":
        return "the " + row["name"]
    return row["name"]


@lru_cache(maxsize=1)
def entities() -> dict[str, Entity]:
    """Every entity of every table, by its name as it stands in a sentence."""
    found = {}
    for kind, (table, attributes) in KINDS.items():
        with open(FACTS / f"{table}.tsv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                facts = {attribute: row[attribute] for attribute in attributes}
                name = sentence_name(row, kind)
                found[name] = Entity(name, kind, facts, row.get("pronoun", "it").capitalize())
    return found


@lru_cache(maxsize=1)
def values() -> dict[tuple[str, str], list[str]]:
    """All values an attribute takes, sorted: from here come wrong answers that sound right."""
    pool: dict[tuple[str, str], set[str]] = {}
    for entity in entities().values():
        for attribute, value in entity.facts.items():
            pool.setdefault((entity.kind, attribute), set()).add(value)
    return {key: sorted(found) for key, found in pool.items()}


def of_kind(kind: str) -> list[Entity]:
    return [entity for entity in entities().values() if entity.kind == kind]


# Saying facts ---------------------------------------------------------------------------------------------------------


def say(facts: list[tuple[Entity, str, str]], rng, join: float = 0.35) -> list[str]:
    """Sentences that state `facts` in order, as a person would write them.

    The first sentence about an entity names it, later ones mostly use the pronoun; with probability `join` two facts
    about the same entity share a sentence ("Copper is a transition metal and has the symbol Cu.").
    """
    sentences, position, last = [], 0, None
    while position < len(facts):
        entity, attribute, value = facts[position]
        words = predicate(entity.kind, attribute, value)
        position += 1
        if position < len(facts) and facts[position][0] is entity and rng.random() < join:
            words += " and " + predicate(entity.kind, *facts[position][1:])
            position += 1
        subject = entity.subject if last is not entity or rng.random() < 0.2 else entity.pronoun
        sentences.append(f"{subject} {words}.")
        last = entity
    return sentences


# Reading facts back ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def readers() -> dict[str, list[tuple[re.Pattern, str, str | None]]]:
    """Per kind the patterns that recognise a predicate, the most specific first: (pattern, attribute, fixed value)."""
    found: dict[str, list[tuple[re.Pattern, str, str | None]]] = {}
    for kind, (_, attributes) in KINDS.items():
        rules = [(words, attribute, value) for (k, attribute, value), words in SPECIAL.items() if k == kind]
        rules = [(re.compile(re.escape(words)), attribute, value) for words, attribute, value in rules]
        forms = [(form, attribute) for attribute, (_, _, form) in attributes.items()]
        for form, attribute in sorted(forms, key=lambda pair: -len(pair[0])):
            pattern = re.escape(form).replace(re.escape("{a}"), "(?P<a>an?)").replace(re.escape("{v}"), "(?P<v>.+)")
            rules.append((re.compile(pattern), attribute, None))
        found[kind] = rules
    return found


@lru_cache(maxsize=1)
def subjects() -> re.Pattern:
    """Matches a sentence's subject: an entity as a sentence starts with it, or a pronoun. Longest name first."""
    names = sorted((entity.subject for entity in entities().values()), key=len, reverse=True)
    return re.compile("(" + "|".join(re.escape(name) for name in [*names, "It", "He", "She"]) + r") (.+)")


@lru_cache(maxsize=1)
def by_subject() -> dict[str, Entity]:
    return {entity.subject: entity for entity in entities().values()}


def split_sentences(text: str) -> list[str]:
    """Sentences without their full stop; list markers ("- ") and line breaks separate as full stops do."""
    parts = re.split(r"\.(?:\s+|$)|\n", text)
    return [part.strip().removeprefix("- ").strip() for part in parts if part.strip(" -\n")]


@lru_cache(maxsize=200_000)
def read_predicate(kind: str, words: str) -> tuple[tuple[str, str], ...]:
    """The (attribute, value) pairs that `words` state, for one predicate or two joined by "and"; empty if unreadable.

    A known value is preferred to an unknown one: "is a solid at room temperature" is a state, not the category "solid at ...".
    """
    single = read_single(kind, words)
    if single and single[1] in values()[kind, single[0]]:
        return (single,)
    for join in re.finditer(" and ", words):
        left, right = (read_single(kind, part) for part in (words[: join.start()], words[join.end():]))
        if left and right:
            return left, right
    return (single,) if single else ()


def read_single(kind: str, words: str) -> tuple[str, str] | None:
    """(attribute, value) of one predicate; the value may be one that no table holds ("is used in jytices")."""
    unknown = None
    for pattern, attribute, fixed in readers()[kind]:
        match = pattern.fullmatch(words)
        if not match:
            continue
        value = fixed or match["v"]
        if "a" in pattern.groupindex and match["a"] != article(value):
            continue  # a wrong article is not English
        if value in values()[kind, attribute]:
            return attribute, value
        unknown = unknown or (attribute, value)
    return unknown


def read_claims(text: str, topic: Entity | None = None) -> tuple[list[Claim], int]:
    """Claims in the order in which `text` makes them, and the number of sentences with something unreadable.

    A pronoun stands for the entity named last, at the start for `topic`. A value that no table holds is a false claim, and
    its sentence unreadable as well: such words are mostly garbled.
    """
    claims, unreadable, about = [], 0, topic
    for sentence in split_sentences(text):
        match = subjects().fullmatch(sentence)
        if match and match[1] in by_subject():
            about = by_subject()[match[1]]
        wrong_pronoun = match and match[1] not in by_subject() and about and match[1] != about.pronoun
        stated = read_predicate(about.kind, match[2]) if match and about and not wrong_pronoun else ()
        for attribute, value in stated:
            claims.append(Claim(about, attribute, value, about.facts[attribute] == value))
        if not stated or any(value not in values()[about.kind, attribute] for attribute, value in stated):
            unreadable += 1
    return claims, unreadable


def main() -> None:
    import random

    rng = random.Random(0)
    for kind in KINDS:
        things = of_kind(kind)
        print(f"{kind:<11}{len(things):4d} entities, {len(things[0].facts):2d} facts each")
        entity = rng.choice(things)
        print("   ", " ".join(say([(entity, a, v) for a, v in entity.facts.items()], rng)))


if __name__ == "__main__":
    main()
