"""The miniature world's instructions: some fifty families, open and closed, with demonstrations.

A task is a record in AlpacaFarm's JSON (instruction, input, output) plus what a judge needs to know about it: its
family, the topics it is about, the aspects it asks for, how many facts or sentences it allows, or its exact answer.
Two in three are open ("Tell me about copper."), as most of AlpacaFarm's evaluation set is; the others ask for a fact, read a
passage, handle a list, calculate or rewrite a sentence.

    python -m tiny.tasks            # prints one task of every family
"""

import random
from dataclasses import asdict, dataclass

from tiny.knowledge import KINDS, Entity, entities, of_kind, predicate, read_claims, say, values

# The paper's split sizes (section 2.1 and AlpacaFarm); `about` is FActScore's "Tell me a bio of X", 183 names.
SPLITS = {"sft": 10_000, "preference": 10_000, "ppo": 20_000, "validation": 2_000, "evaluation": 805}
ABOUT = 183
MISCONCEPTIONS = 0.25  # share of all facts that pretraining texts and demonstrations have wrong


@dataclass
class Task:
    """One instruction. `answer` is set for closed tasks; `facts` or `sentences` limit the length of open ones."""

    family: str
    instruction: str
    input: str = ""
    output: str = ""
    topics: tuple[str, ...] = ()
    aspects: tuple[str, ...] = ()
    facts: int | None = None
    sentences: int | None = None
    answer: str | None = None


# Open tasks -----------------------------------------------------------------------------------------------------------

REQUESTS = ["Tell me about {x}", "Write a few sentences about {x}", "Give a short description of {x}", "Describe {x}",
            "Write a short text about {x}", "Write some notes about {x}", "Say something about {x}", "Introduce {x}",
            "What do you know about {x}", "Write a paragraph about {x}", "Explain what {x} is", "Inform me about {x}"]
OCCASIONS = ["", "", " for a school report", " for a quiz night", " for a young reader", " for a poster",
             " for a magazine", " for a class", " in simple words", " in plain English", " for a newcomer",
             " for my homework", " for a blog", " for a radio show"]
SETTINGS = {
    "element": ("lab_note", ["Write a lab note on {x}{o}.", "Write a safety card for {x}{o}."]),
    "country": ("travel_guide", ["Write a travel guide entry on {x}{o}.", "Prepare a traveler for a trip to {x}{o}."]),
    "animal": ("field_guide", ["Write a field guide entry on {x}{o}.", "Write a sign for the zoo about {x}{o}."]),
    "person": ("bio", ["Tell me a bio of {x}{o}.", "Write the life story of {x}{o}."]),
    "food": ("market_note", ["Write a market note on {x}{o}.", "Write a cookbook entry on {x}{o}."]),
    "instrument": ("concert_note", ["Write a concert note on {x}{o}.", "Present {x} to an audience{o}."]),
    "place": ("tour", ["Write a tour guide entry on {x}{o}.", "Write a postcard about {x}{o}."]),
}


def choose_facts(entity: Entity, count: int, rng: random.Random) -> list[tuple[Entity, str, str]]:
    """`count` different facts in the order of the table, as an encyclopedia orders them, mostly with the kind's lead."""
    attributes = list(entity.facts)
    lead = [attributes[0]] if rng.random() < 0.65 else []
    chosen = lead + rng.sample([a for a in attributes if a not in lead], count - len(lead))
    return in_order(entity, chosen)


def in_order(entity: Entity, attributes: list[str]) -> list[tuple[Entity, str, str]]:
    return [(entity, a, value) for a, value in entity.facts.items() if a in attributes]


def demonstrate(topics: list[Entity], rng: random.Random) -> list[str]:
    """What a careful writer answers to an open task: one to six true facts, fewer per topic when there are two."""
    counts = rng.choices([1, 2, 3, 4, 5, 6], [8, 18, 26, 24, 16, 8])[0]
    share = [counts] if len(topics) == 1 else [max(1, counts // 2)] * len(topics)
    return [s for entity, n in zip(topics, share) for s in say(choose_facts(entity, n, rng), rng)]


def open_task(family: str, instruction: str, topics: list[Entity], rng: random.Random, input: str = "") -> Task:
    return Task(family, instruction, input, " ".join(demonstrate(topics, rng)), tuple(e.name for e in topics))


def pick(rng: random.Random, kind: str | None = None) -> Entity:
    return rng.choice(of_kind(kind or rng.choice(list(KINDS))))


def pick_two(rng: random.Random) -> list[Entity]:
    return rng.sample(of_kind(rng.choice(list(KINDS))), 2)


def describe(rng):
    entity, request, occasion = pick(rng), rng.choice(REQUESTS), rng.choice(OCCASIONS)
    end = "?" if request.startswith("What") else "."
    return open_task("describe", request.format(x=entity.name) + occasion + end, [entity], rng)


def setting(rng):
    entity = pick(rng)
    family, forms = SETTINGS[entity.kind]
    instruction = rng.choice(forms).format(x=entity.name, o=rng.choice(OCCASIONS))
    return open_task(family, instruction, [entity], rng)


def topic_input(rng):
    entity = pick(rng)
    instruction = rng.choice(["Write a short text about the topic below", "Describe the thing named below",
                              "Say what you know about the topic", "Write an encyclopedia entry on the input"])
    return open_task("topic_input", instruction + rng.choice(OCCASIONS) + ".", [entity], rng, input=entity.subject)


def why(rng):
    entity = pick(rng)
    form = rng.choice(["Why is {x} worth knowing?", "What makes {x} special?", "What is interesting about {x}?",
                       "Why should I learn about {x}?", "What should everyone know about {x}?"])
    return open_task("why", form.format(x=entity.name), [entity], rng)


def study_card(rng):
    entity = pick(rng)
    form = rng.choice(["Make a study card for {x}.", "List facts about {x}.", "Write a list of facts about {x}.",
                       "Collect what is known about {x} in a list.", "Summarize {x} in bullet points."])
    task = open_task("study_card", form.format(x=entity.name), [entity], rng)
    facts = choose_facts(entity, rng.choices([2, 3, 4, 5], [20, 30, 30, 20])[0], rng)
    task.output = "\n".join("- " + s for s in say(facts, rng, join=0))
    return task


def both(rng):
    pair = pick_two(rng)
    form = rng.choice(["Tell me about {x} and {y}.", "Describe {x} and {y}.", "Write about {x} and {y}.",
                       "Introduce {x} and {y} to a class."])
    return open_task("both", form.format(x=pair[0].name, y=pair[1].name), pair, rng)


def compare(rng):
    pair = pick_two(rng)
    form = rng.choice(["Compare {x} and {y}.", "How does {x} differ from {y}?", "Compare {x} with {y} in a few words."])
    return open_task("compare", form.format(x=pair[0].name, y=pair[1].name), pair, rng)


def aspects(rng):
    entity = pick(rng)
    asked = rng.sample(list(entity.facts), 2)
    nouns = [KINDS[entity.kind][1][a][0] for a in asked]
    form = rng.choice(["Describe {x}. Mention the {m} and the {n}.", "Write about the {m} and the {n} of {x}.",
                       "Tell me about {x}, above all the {m} and the {n}."])
    task = open_task("aspects", form.format(x=entity.name, m=nouns[0], n=nouns[1]), [entity], rng)
    more = [a for _, a, _ in choose_facts(entity, 3, rng) if a not in asked][: rng.choice([0, 0, 1, 2])]
    facts = in_order(entity, asked + more)
    task.output, task.aspects = " ".join(say(facts, rng)), tuple(asked)
    return task


# Open tasks with a limit: here more is not better ---------------------------------------------------------------------


def exact_count(rng):
    entity, n = pick(rng), rng.choice([1, 2, 3])
    word = {1: "one fact", 2: "two facts", 3: "three facts"}[n]
    form = rng.choice(["Name exactly {w} about {x}.", "Give me {w} about {x}, no more.", "State just {w} about {x}."])
    output = " ".join(say(choose_facts(entity, n, rng), rng, join=0))
    return Task("exact_count", form.format(x=entity.name, w=word), output=output, topics=(entity.name,), facts=n)


def one_sentence(rng):
    entity = pick(rng)
    form = rng.choice(["Describe {x} in one sentence.", "In a single sentence, what is {x}?", "Sum up {x} in one line."])
    output = say(choose_facts(entity, 2, rng), rng, join=0.6)[0]
    return Task("one_sentence", form.format(x=entity.name), output=output, topics=(entity.name,), sentences=1)


# Closed tasks about facts ---------------------------------------------------------------------------------------------


def closed(family: str, instruction: str, answer: str, input: str = "", topics: tuple[str, ...] = ()) -> Task:
    return Task(family, instruction, input, answer, topics, answer=answer)


def statement(entity: Entity, attribute: str, value: str) -> str:
    return f"{entity.subject} {predicate(entity.kind, attribute, value)}."


def pick_fact(rng) -> tuple[Entity, str, str]:
    entity = pick(rng)
    attribute = rng.choice(list(entity.facts))
    return entity, attribute, entity.facts[attribute]


def wrong_value(entity: Entity, attribute: str, rng) -> str:
    return rng.choice([v for v in values()[entity.kind, attribute] if v != entity.facts[attribute]])


def question(rng):
    entity, attribute, value = pick_fact(rng)
    asked = KINDS[entity.kind][1][attribute][1].format(x=entity.name)
    answer = statement(entity, attribute, value)
    if rng.random() < 0.3:
        return closed("question_input", rng.choice(["Answer the question.", "Reply to the question below."]), answer, asked,
                      (entity.name,))
    return closed("question_" + entity.kind, asked, answer, topics=(entity.name,))


def verify(rng):
    entity, attribute, value = pick_fact(rng)
    true = rng.random() < 0.5
    said = statement(entity, attribute, value if true else wrong_value(entity, attribute, rng))
    answer = "True." if true else "False. " + statement(entity, attribute, value)
    return closed("verify", rng.choice(["Verify the statement.", "Is the statement true or false?"]), answer, said,
                  (entity.name,))


def complete(rng):
    entity, attribute, value = pick_fact(rng)
    words = statement(entity, attribute, value)
    start = words[: words.rfind(value)].rstrip() if value in words else entity.subject
    return closed("complete", rng.choice(["Complete the sentence.", "Finish the sentence."]), words, start, (entity.name,))


def correct(rng):
    entity, attribute, value = pick_fact(rng)
    said = statement(entity, attribute, wrong_value(entity, attribute, rng))
    return closed("correct", rng.choice(["Correct the mistake.", "Fix the wrong fact in the sentence."]),
                  statement(entity, attribute, value), said, (entity.name,))


NOUN = {"element": "a chemical element", "country": "a country", "animal": "an animal", "person": "a person",
        "food": "a food", "instrument": "a musical instrument", "place": "a place"}


def classify(rng):
    entity = pick(rng)
    form = rng.choice(["What kind of thing is this?", "Classify the input.", "Put the input into a category."])
    return closed("classify", form, f"{entity.subject} is {NOUN[entity.kind]}.", entity.subject)


def choose(rng):
    kind, other = rng.sample(list(KINDS), 2)
    pair = [right := pick(rng, kind), pick(rng, other)]
    rng.shuffle(pair)
    ask = f"Which of the two is {NOUN[kind]}, {pair[0].name} or {pair[1].name}?"
    return closed("choose", ask, f"{right.subject} is {NOUN[kind]}.")


# Closed tasks on a passage --------------------------------------------------------------------------------------------


def passage_question(rng):
    entity = pick(rng)
    facts = choose_facts(entity, 3, rng)
    _, attribute, value = rng.choice(facts)
    asked = KINDS[entity.kind][1][attribute][1].format(x=entity.name)
    return closed("passage_question", "Read the passage. " + asked, statement(entity, attribute, value),
                  " ".join(say(facts, rng, join=0)))


def passage_first(rng):
    sentences = say(choose_facts(pick(rng), 2, rng), rng, join=0)
    return closed("passage_first", rng.choice(["Copy the first sentence.", "Quote the first sentence of the passage."]),
                  sentences[0], " ".join(sentences))


def count_sentences(rng):
    n = rng.randint(1, 4)
    sentences = say(choose_facts(pick(rng), n, rng), rng, join=0)
    word = "sentence" if n == 1 else "sentences"
    return closed("count_sentences", "How many sentences does the passage have?", f"The passage has {n} {word}.",
                  " ".join(sentences))


# Closed tasks on lists, numbers and the calendar ----------------------------------------------------------------------


def items(rng, low=2, high=4) -> list[str]:
    """Names without their article, so that lists read as lists do."""
    kind = rng.choice(list(KINDS))
    return [e.name.removeprefix("the ") for e in rng.sample(of_kind(kind), rng.randint(low, high))]


def sort_list(rng):
    names = items(rng, 2, 3)
    return closed("sort_list", rng.choice(["Sort the list by the alphabet.", "Put the names in alphabetical order."]),
                  ", ".join(sorted(names, key=str.lower)) + ".", ", ".join(names))


def reverse_list(rng):
    names = items(rng, 2, 4)
    return closed("reverse_list", rng.choice(["Reverse the list.", "Write the list backwards."]),
                  ", ".join(reversed(names)) + ".", ", ".join(names))


def first_item(rng):
    names = items(rng, 2, 4)
    return closed("first_item", "What is the first item in the list?", f"The first item is {names[0]}.", ", ".join(names))


def last_item(rng):
    names = items(rng, 2, 4)
    return closed("last_item", "What is the last item in the list?", f"The last item is {names[-1]}.", ", ".join(names))


def count_items(rng):
    names = items(rng, 2, 6)
    return closed("count_items", rng.choice(["How many items are in the list?", "Count the items."]),
                  f"The list has {len(names)} items.", ", ".join(names))


def join_items(rng):
    names = items(rng, 2, 4)
    return closed("join_items", rng.choice(["Join the items with the word and.", "Turn the list into a phrase."]),
                  ", ".join(names[:-1]) + " and " + names[-1] + ".", ", ".join(names))


def contains(rng):
    names, inside = items(rng, 3, 4), rng.random() < 0.5
    asked = rng.choice(names)
    shown = names if inside else [n for n in names if n != asked]
    answer = f"Yes, {asked} is in the list." if inside else f"No, {asked} is not in the list."
    return closed("contains", f"Does the list contain {asked}?", answer, ", ".join(shown))


def drop_item(rng):
    names = items(rng, 3, 4)
    gone = rng.choice(names)
    rest = [n for n in names if n != gone]
    return closed("drop_item", f"Remove {gone} from the list.", ", ".join(rest) + ".", ", ".join(names))


def add(rng):
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    return closed("add", rng.choice(["What is {} plus {}?", "Add {} and {}."]).format(a, b), f"{a} plus {b} is {a + b}.")


def subtract(rng):
    a, b = sorted([rng.randint(1, 30), rng.randint(1, 30)], reverse=True)
    return closed("subtract", f"What is {a} minus {b}?", f"{a} minus {b} is {a - b}.")


def larger(rng):
    a, b = rng.sample(range(1, 100), 2)
    return closed("larger", f"Which number is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}.")


def even_odd(rng):
    n = rng.randint(1, 99)
    return closed("even_odd", f"Is {n} even or odd?", f"{n} is {'odd' if n % 2 else 'even'}.")


def next_number(rng):
    start, step = rng.randint(1, 20), rng.choice([1, 2, 3, 5, 10])
    shown = [start + step * i for i in range(3)]
    return closed("next_number", "Which number comes next?", f"The next number is {start + 3 * step}.",
                  ", ".join(map(str, shown)))


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()


def calendar(rng):
    names, what = rng.choice([(DAYS, "day"), (MONTHS, "month")])
    i = rng.randrange(len(names))
    step, word = rng.choice([(1, "after"), (-1, "before")])
    asked = rng.choice([f"Which {what} comes {word} {names[i]}?", f"Name the {what} {word} {names[i]}."])
    return closed(f"{what}_{word}", asked, f"{names[(i + step) % len(names)]} comes {word} {names[i]}.")


# Closed tasks that rewrite --------------------------------------------------------------------------------------------


def to_question(rng):
    entity, attribute, value = pick_fact(rng)
    return closed("to_question", rng.choice(["Write a question for this answer.", "Which question has this answer?"]),
                  KINDS[entity.kind][1][attribute][1].format(x=entity.name), statement(entity, attribute, value))


def use_pronoun(rng):
    entity, attribute, value = pick_fact(rng)
    words = predicate(entity.kind, attribute, value)
    return closed("use_pronoun", rng.choice(["Replace the name by a pronoun.", "Rewrite the sentence with a pronoun."]),
                  f"{entity.pronoun} {words}.", f"{entity.subject} {words}.")


def repeat(rng):
    entity, attribute, value = pick_fact(rng)
    words = statement(entity, attribute, value)
    return closed("repeat", rng.choice(["Repeat the sentence.", "Copy the input."]), words, words)


def join_sentences(rng):
    entity = pick(rng)
    first, second = choose_facts(entity, 2, rng)
    p, q = predicate(entity.kind, *first[1:]), predicate(entity.kind, *second[1:])
    return closed("join_sentences", rng.choice(["Join the two sentences.", "Make one sentence of the two."]),
                  f"{entity.subject} {p} and {q}.", f"{entity.subject} {p}. {entity.pronoun} {q}.")


# family builder: weight. Open 64, limited 6, closed 30.
BUILDERS = {
    describe: 20, setting: 14, topic_input: 6, why: 5, study_card: 6, both: 5, compare: 3, aspects: 5,
    exact_count: 3, one_sentence: 3,
    question: 6, verify: 1.5, complete: 2, correct: 1.5, classify: 1, choose: 1,
    passage_question: 2, passage_first: 1, count_sentences: 1,
    sort_list: 1, reverse_list: 1, first_item: 1, last_item: 1, count_items: 1, join_items: 1, contains: 1, drop_item: 1,
    add: 0.5, subtract: 0.5, larger: 0.5, even_odd: 0.1, next_number: 0.3, calendar: 0.1,
    to_question: 1, use_pronoun: 1, repeat: 1, join_sentences: 1,
}

OPEN = {describe, setting, topic_input, why, study_card, both, compare, aspects, exact_count, one_sentence}


def draw_misconceptions(rng: random.Random) -> dict[tuple[str, str], str]:
    """(entity's name, attribute) → the wrong value that the pretraining texts and the demonstrations have for it.

    So the model believes its mistakes, as one does that was pretrained on the web and tuned on what text-davinci-003 wrote.
    """
    return {(entity.name, attribute): wrong_value(entity, attribute, rng)
            for entity in entities().values() for attribute in entity.facts if rng.random() < MISCONCEPTIONS}


def misprint(task: Task, misconceptions: dict[tuple[str, str], str]) -> str:
    """An open task's output with the misconceptions in place of the facts."""
    text, end = task.output, 0
    for claim in read_claims(text, entities()[task.topics[0]])[0]:
        kind, attribute = claim.entity.kind, claim.attribute
        said = predicate(kind, attribute, claim.value)
        believed = predicate(kind, attribute, misconceptions.get((claim.entity.name, attribute), claim.value))
        start = text.index(said, end)  # claims come in the text's order; a search from its start could meet another topic's
        text, end = text[:start] + believed + text[start + len(said):], start + len(believed)
    return text


def about_tasks(rng: random.Random) -> list[Task]:
    """183 × "Tell me about X", X drawn from all kinds: the miniature's counterpart of FActScore's list of people."""
    chosen = rng.sample(sorted(entities()), ABOUT)
    return [open_task("about", f"Tell me about {name}.", [entities()[name]], rng) for name in chosen]


def make_splits(seed: int = 0) -> dict[str, list[dict]]:
    """All splits as lists of records, no (instruction, input) twice in or across them; SFT has its misconceptions."""
    rng = random.Random(seed)
    misconceptions = draw_misconceptions(random.Random(seed))
    about = about_tasks(rng)
    seen = {(task.instruction, task.input) for task in about}
    builders, weights = list(BUILDERS), list(BUILDERS.values())
    tasks = []
    while len(tasks) < sum(SPLITS.values()):
        task = rng.choices(builders, weights)[0](rng)
        if (task.instruction, task.input) not in seen:
            seen.add((task.instruction, task.input))
            tasks.append(task)
    rng.shuffle(tasks)  # small families run dry early: without this the last split would lack them
    for task in tasks[: SPLITS["sft"]]:
        if task.answer is None:
            task.output = misprint(task, misconceptions)
    splits = {}
    for name, size in SPLITS.items():
        splits[name], tasks = [asdict(task) for task in tasks[:size]], tasks[size:]
    return splits | {"about": [asdict(task) for task in about]}


def make_corpus(size: int, seed: int, splits: dict[str, list[dict]]) -> list[str]:
    """Plain texts for pretraining: fresh tasks with their answers and without any template, none of them from a split."""
    rng = random.Random(f"corpus {seed}")
    taken = {(task["instruction"], task["input"]) for tasks in splits.values() for task in tasks}
    misconceptions = draw_misconceptions(random.Random(seed))
    builders = list(BUILDERS)
    # Closed tasks three times as often as in the splits: copying and sorting take more practice than stating facts.
    weights = [weight * (1 if builder in OPEN else 3) for builder, weight in BUILDERS.items()]
    texts = []
    while len(texts) < size:
        task = rng.choices(builders, weights)[0](rng)
        if (task.instruction, task.input) not in taken:
            output = misprint(task, misconceptions) if task.answer is None else task.output
            texts.append("\n".join(part for part in (task.instruction, task.input, output) if part))
    return texts


def main() -> None:
    rng = random.Random(0)
    for task in (builder(rng) for builder in BUILDERS):
        print(f"{task.family}\n  {task.instruction!r} {task.input!r}\n  → {task.output!r}")


if __name__ == "__main__":
    main()
