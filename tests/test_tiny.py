"""What the miniature world promises: what can be said can be read back, splits are the paper's, judges are fair."""

import hashlib
import json
import random
from collections import Counter

import pytest

from tiny import annotators
from tiny.annotators import (
    LABEL_NOISE,
    POOL,
    REFERENCE_CORRECT,
    REFERENCE_ERRORS,
    add_references,
    annotator_for,
    is_correct,
    judge,
    noisy,
    prefer,
    read,
)
from tiny.knowledge import KINDS, article, entities, of_kind, predicate, read_claims, say, values
from tiny.make import label
from tiny.tasks import ABOUT, MISCONCEPTIONS, SPLITS, make_corpus, make_splits


class Always(random.Random):
    """A generator whose coin always shows the same: 0 joins every pair of sentences, 1 none."""

    def __init__(self, value: float):
        super().__init__(0)
        self.value = value

    def random(self) -> float:
        return self.value


ENTITIES = list(entities().values())
FACTS = [(entity, attribute, value) for entity in ENTITIES for attribute, value in entity.facts.items()]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return make_splits(seed=0)


def open_task(*names: str, **changes) -> dict:
    limits = {"aspects": (), "facts": None, "sentences": None, "answer": None}
    return {"instruction": "Describe it.", "input": "", "topics": names} | limits | changes


def sentences(name: str, n: int) -> list[str]:
    """n true sentences about an entity, each of which names it."""
    entity = entities()[name]
    facts = [(entity, a, v) for a, v in list(entity.facts.items())[:n]]
    return [say([fact], Always(1))[0] for fact in facts]


def stated(claims) -> list[tuple]:
    return [(claim.entity, claim.attribute, claim.value) for claim in claims]


# --- knowledge -----------------------------------------------------------------------------------------------------


def test_there_are_300_entities_of_several_kinds_with_five_or_more_facts_each():
    assert len(ENTITIES) >= 300 and len({entity.kind for entity in ENTITIES}) == len(KINDS) >= 5
    assert all(len(of_kind(kind)) >= 20 for kind in KINDS)
    assert all(len(entity.facts) >= 5 and all(entity.facts.values()) for entity in ENTITIES)


def test_names_are_unambiguous_also_at_the_start_of_a_sentence():
    assert len({entity.subject for entity in ENTITIES}) == len(ENTITIES)
    assert not {entity.subject for entity in ENTITIES} & {"It", "He", "She"}


def test_every_fact_that_is_said_is_read_back_as_a_true_claim():
    for entity, attribute, value in FACTS:
        [said] = say([(entity, attribute, value)], Always(1))
        claims, unreadable = read_claims(said)
        assert [(c.entity, c.attribute, c.value, c.true) for c in claims] == [(entity, attribute, value, True)], said
        assert unreadable == 0, said


def test_every_fact_is_read_back_behind_a_pronoun():
    for entity, attribute, value in FACTS:
        said = f"{entity.pronoun} {predicate(entity.kind, attribute, value)}."
        claims, unreadable = read_claims(said, topic=entity)
        assert stated(claims) == [(entity, attribute, value)] and not unreadable, said
        assert read_claims(said) == ([], 1)  # without a topic a pronoun stands for nobody


def test_every_two_facts_are_read_back_from_a_joined_sentence():
    for entity in ENTITIES:
        facts = [(entity, a, v) for a, v in entity.facts.items()]
        for first in facts:
            for second in facts:
                if first is not second:
                    [said] = say([first, second], Always(0))
                    claims, unreadable = read_claims(said)
                    assert stated(claims) == [first, second] and not unreadable, said


def test_whole_texts_with_pronouns_and_two_topics_are_read_back():
    rng = random.Random(0)
    for _ in range(300):
        pair = rng.sample(ENTITIES, 2)
        facts = [(e, a, e.facts[a]) for e in pair for a in rng.sample(list(e.facts), 4)]
        for text in (" ".join(say(facts, rng)), "\n".join("- " + s for s in say(facts, rng))):
            claims, unreadable = read_claims(text)
            assert stated(claims) == facts and not unreadable, text


def test_every_wrong_value_is_read_as_a_false_claim():
    """Each entity and attribute with a value of another entity."""
    rng = random.Random(0)
    for entity, attribute, value in FACTS:
        wrong = rng.choice([v for v in values()[entity.kind, attribute] if v != value])
        [said] = say([(entity, attribute, wrong)], Always(1))
        claims, unreadable = read_claims(said)
        assert [(c.entity, c.attribute, c.value, c.true) for c in claims] == [(entity, attribute, wrong, False)], said
        assert unreadable == 0, said


def test_a_wrong_article_is_not_english():
    assert read_claims("Copper is a transition metal.")[1] == 0
    assert read_claims("Copper is an transition metal.") == ([], 1)
    checked = 0
    for entity, attribute, value in FACTS:
        words = predicate(entity.kind, attribute, value)
        right, wrong = article(value), {"a": "an", "an": "a"}[article(value)]
        if f" {right} {value}" in words and "{a}" in KINDS[entity.kind][1][attribute][2]:
            said = f"{entity.subject} {words.replace(f' {right} {value}', f' {wrong} {value}')}."
            claims, unreadable = read_claims(said)
            assert unreadable == 1 and not any(claim.true for claim in claims), said
            checked += 1
    assert checked > 200


def test_a_wrong_pronoun_is_unreadable():
    for person in of_kind("person"):
        for pronoun in ("He", "She", "It"):
            claims, unreadable = read_claims(f"{pronoun} came from {person.facts['country']}.", person)
            assert (len(claims), unreadable) == ((1, 0) if pronoun == person.pronoun else (0, 1))
    assert {person.pronoun for person in of_kind("person")} == {"He", "She"}
    assert read_claims("Copper has the symbol Cu. She stands in the fourth period.")[1] == 1


def test_a_garbled_value_is_a_false_claim_in_an_unreadable_sentence():
    [claim], unreadable = read_claims("Copper is used in jytices.")
    assert (claim.attribute, claim.value, claim.true, unreadable) == ("use", "jytices", False, 1)


@pytest.mark.parametrize("text", ["Copper.", "Copper copper copper.", "Is a metal.", "Unobtainium has the symbol Cu.",
                                  "copper has the symbol Cu.", "Copper has symbol Cu."])
def test_what_states_no_fact_is_unreadable(text):
    assert read_claims(text) == ([], 1)


def test_an_empty_text_claims_nothing():
    assert read_claims("") == read_claims(" \n- \n") == ([], 0)


# --- instructions --------------------------------------------------------------------------------------------------


def test_splits_have_the_papers_sizes(splits):
    assert SPLITS == {"sft": 10_000, "preference": 10_000, "ppo": 20_000, "validation": 2_000, "evaluation": 805}
    assert {name: len(tasks) for name, tasks in splits.items()} == SPLITS | {"about": 183} and ABOUT == 183


def test_no_instruction_stands_twice_in_or_across_splits(splits):
    keys = [(task["instruction"], task["input"]) for tasks in splits.values() for task in tasks]
    assert len(set(keys)) == len(keys)


def test_pretraining_texts_hold_no_instruction_of_a_split(splits):
    heads = {"\n".join(part for part in (t["instruction"], t["input"]) if part) for ts in splits.values() for t in ts}
    corpus = make_corpus(2000, seed=0, splits=splits)
    for text in corpus:
        lines = text.split("\n")
        assert not any("\n".join(lines[:n]) in heads for n in range(1, len(lines))), text
    assert corpus == make_corpus(2000, seed=0, splits=splits) != make_corpus(2000, seed=1, splits=splits)


def digest(splits: dict) -> str:
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()


def test_splits_follow_from_the_seed(splits):
    random.seed(1)  # python's global generator has no part in it
    assert digest(make_splits(seed=0)) == digest(splits)


def test_another_seed_gives_other_splits(splits):
    assert digest(make_splits(seed=1)) != digest(splits)


def test_forty_families_with_and_without_input_open_and_closed(splits):
    families = Counter(task["family"] for task in splits["sft"])
    assert len(families) >= 40
    shares = [sum(bool(test(task)) for task in splits["evaluation"]) / 805
              for test in (lambda t: t["input"], lambda t: t["answer"] is None)]
    assert 0.15 < shares[0] < 0.5 and 0.6 < shares[1] < 0.8  # evaluation leans to open instructions


def test_no_split_lacks_a_family_of_any_size(splits):
    """Small families run dry while the splits are drawn; were they not shuffled, the last would have none of them."""
    common = {family for family, n in Counter(t["family"] for t in splits["ppo"]).items() if n > 200}
    assert all(common <= {task["family"] for task in splits[name]} for name in SPLITS)


@pytest.mark.parametrize("name", ["sft", "validation", "about"])
def test_every_demonstration_is_readable_and_what_was_asked(splits, name):
    for task in splits[name]:
        if task["answer"] is not None:
            continue
        found = read(task, task["output"])
        assert (found.unreadable, found.repeats, found.off_topic) == (0, 0, 0), task
        assert found.named == 1 and found.finished and found.aspects == 1 and found.claims >= 1, task
        assert found.claims == task["facts"] if task["facts"] else True, task
        assert found.sentences == task["sentences"] if task["sentences"] else True, task


def claims_of(tasks: list[dict]) -> list:
    return [claim for task in tasks if task["answer"] is None
            for claim in read_claims(task["output"], entities()[task["topics"][0]])[0]]


def test_demonstrations_are_true_but_for_sfts_misconceptions(splits):
    assert all(claim.true for name in SPLITS if name != "sft" for claim in claims_of(splits[name]))
    claims = claims_of(splits["sft"])
    assert sum(not claim.true for claim in claims) / len(claims) == pytest.approx(MISCONCEPTIONS, abs=0.03)


def test_a_misconception_is_always_the_same(splits):
    """What SFT learns is wrong but consistent: each attribute of an entity has one value in all its demonstrations."""
    found = {}
    for claim in claims_of(splits["sft"]):
        found.setdefault((claim.entity.name, claim.attribute), set()).add(claim.value)
    assert {key: told for key, told in found.items() if len(told) > 1} == {}


def test_a_closed_answer_is_judged_correct_and_another_tasks_is_not(splits):
    closed = [task for task in splits["sft"] if task["answer"] is not None]
    assert len(closed) > 2000 and all(is_correct(task, task["output"]) for task in closed)
    others = [(task, other["answer"]) for task, other in zip(closed, closed[1:]) if other["answer"] != task["answer"]]
    assert not [(t["answer"], other) for t, other in others if is_correct(t, other)]


def test_a_closed_answer_may_be_said_in_other_words_but_not_behind_another_fact():
    country, other = of_kind("country")[:2]
    capital, wrong_capital = country.facts["capital"], other.facts["capital"]
    answer = f"{country.subject} has the capital {capital}."
    more = f"It is a country in {country.facts['continent']}."
    right = [answer, f"It has the capital {capital}.", f"{capital}.", capital, f"{answer} {more}"]
    wrong = [answer.replace(capital, wrong_capital), f"{wrong_capital}.", "", f"{country.subject}.", f"{more} {answer}",
             f"{other.subject} has the capital {capital}."]
    task = open_task(country.name, answer=answer)
    assert [text for text in right if not is_correct(task, text)] == []
    assert [text for text in wrong if is_correct(task, text)] == []


# --- annotators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("annotator", POOL, ids=lambda annotator: annotator.name)
def test_every_annotator_prefers_more_distinct_facts(annotator):
    facts = sentences("copper", 5)
    for n in (1, 2, 3):
        assert prefer(annotator, open_task("copper"), " ".join(facts[:n]), " ".join(facts[:n + 1])) == 2


@pytest.mark.parametrize("annotator", POOL, ids=lambda annotator: annotator.name)
def test_every_annotator_dislikes_repeats_falsehood_other_topics_and_no_ending(annotator):
    task, facts = open_task("copper"), sentences("copper", 3)
    text = " ".join(facts)
    worse = {"repeat": f"{text} {facts[0]}", "off topic": f"{text} {sentences('iron', 1)[0]}", "unended": text[:-1],
             "garbled": f"{text} Copper copper copper.", "nothing": "",
             "false": text.replace(facts[1], "Copper has the symbol Fe.")}
    assert {name: prefer(annotator, task, text, other) for name, other in worse.items()} == dict.fromkeys(worse, 1)


@pytest.mark.parametrize("annotator", POOL, ids=lambda annotator: annotator.name)
def test_where_a_number_of_facts_was_asked_for_more_is_not_better(annotator):
    facts = sentences("copper", 4)
    task = open_task("copper", facts=2)
    exact = " ".join(facts[:2])
    assert [prefer(annotator, task, exact, " ".join(facts[:n])) for n in (1, 3, 4)] == [1, 1, 1]


def test_tastes_differ():
    """A short true text against a longer one with a false fact divides the pool."""
    facts = sentences("copper", 3)
    short, long = facts[0], " ".join([facts[0], "Copper has the symbol Fe.", "Copper has the atomic number 2."])
    assert {prefer(annotator, open_task("copper"), short, long) for annotator in POOL} == {1, 2}


def test_equal_and_equally_good_responses_are_ties():
    facts = sentences("copper", 3)
    for annotator in POOL:
        assert prefer(annotator, open_task("copper"), facts[0], facts[0]) == 1.5
        assert prefer(annotator, open_task("copper"), f"{facts[0]} {facts[1]}", f"{facts[0]} {facts[2]}") == 1.5


def test_the_order_of_two_outputs_does_not_matter(splits):
    tasks = add_references(splits["evaluation"][:200], seed=0)
    for task, plain in zip(tasks, splits["evaluation"]):
        annotator = annotator_for(task)
        a, b = task["output"], plain["output"]
        assert prefer(annotator, task, a, b) == 3 - prefer(annotator, task, b, a)


def test_ties_are_left_out_of_training_labels():
    task, same = open_task("copper"), sentences("copper", 1)[0]
    assert label(task, [same, same], random.Random(0), noise=True) == []
    longer = " ".join(sentences("copper", 4))
    assert label(task, [same, longer], random.Random(0), noise=False) == [(1, 0)]


def test_noise_flips_a_quarter_of_the_labels():
    assert LABEL_NOISE == 0.25
    rng = random.Random(0)
    assert sum(noisy(2, rng) == 1 for _ in range(4000)) / 4000 == pytest.approx(0.25, abs=0.025)
    assert sum(noisy(1, rng) == 2 for _ in range(4000)) / 4000 == pytest.approx(0.25, abs=0.025)
    class Drawn(random.Random):  # just below the quarter, and at it
        random = iter([0.24, 0.25, 0.24, 0.25]).__next__

    assert [noisy(label, Drawn()) for label in (1, 1, 2, 2)] == [2, 1, 1, 2]
    assert {noisy(p, rng, noise=0) for p in (1, 1, 1)} == {1}


def test_the_same_example_always_gets_the_same_annotator_and_all_of_the_pool_work(splits):
    tasks = splits["evaluation"]
    names = [annotator_for(task).name for task in tasks]
    assert names == [annotator_for(dict(task, output="changed")).name for task in tasks]
    assert names != [annotator_for(task, seed=1).name for task in tasks]
    assert all(n / 805 == pytest.approx(1 / len(POOL), abs=0.06) for n in Counter(names).values())
    assert len(set(names)) == len(POOL)


def test_judges_take_the_reference_as_output_1():
    task, facts = open_task("copper"), sentences("copper", 4)
    assert judge([task] * 2, [facts[0], " ".join(facts)], [" ".join(facts), facts[0]]) == [1, 2]


def test_a_record_from_a_data_file_is_judged_as_the_task_it_was_written_from(world, splits):
    from conftest import make_tasks

    from evaluation.measure import load_benchmark
    from formats.tokenizer import load_tokenizer

    benchmark = load_benchmark(world / "data" / "evaluation.json", load_tokenizer(world / "sft"), "tiny", 500)
    written = add_references(make_tasks(300, seed=0)[60:72], seed=0)
    demonstrations = [task["output"] for task in make_tasks(300, seed=0)[60:72]]
    from_file, from_memory = (judge(tasks, demonstrations, [t["output"] for t in tasks])
                              for tasks in (benchmark.tasks, written))
    assert from_file == from_memory and len(set(from_file)) > 1


# --- the reference writer ------------------------------------------------------------------------------------------


def test_the_reference_writer_errs_as_often_as_its_constant_says(splits):
    tasks = add_references(splits["validation"], seed=0)
    facts = [annotators.facts_in(task, task["output"]) for task in tasks if task["answer"] is None]
    wrong = 1 - sum(true for true, _, _ in facts) / sum(stated for _, stated, _ in facts)
    assert wrong == pytest.approx(REFERENCE_ERRORS, abs=0.02)
    closed = [is_correct(task, task["output"]) for task in tasks if task["answer"] is not None]
    assert sum(closed) / len(closed) == pytest.approx(REFERENCE_CORRECT, abs=0.05)


def test_references_are_english_stay_with_the_topic_and_keep_limits(splits):
    for task in add_references(splits["validation"], seed=0):
        if task["answer"] is None:
            found = read(task, task["output"])
            assert (found.unreadable, found.off_topic, found.repeats) == (0, 0, 0) and found.named == 1, task
            assert found.claims == task["facts"] if task["facts"] else found.claims >= 1, task
            assert found.sentences == 1 if task["sentences"] else True, task


def test_references_follow_from_the_seed_and_leave_the_tasks_alone(splits):
    before = digest({"evaluation": splits["evaluation"]})
    first = add_references(splits["evaluation"], seed=0)
    assert first == add_references(splits["evaluation"], seed=0) != add_references(splits["evaluation"], seed=1)
    assert digest({"evaluation": splits["evaluation"]}) == before
    assert {k: v for k, v in first[0].items() if k != "output"} == {
        k: v for k, v in splits["evaluation"][0].items() if k != "output"}


def test_a_demonstration_beats_a_reference_more_often_than_not(splits):
    """The references are beatable, as the paper's are: otherwise no policy could ever win."""
    tasks = add_references(splits["evaluation"], seed=0)
    preferences = judge(tasks, [task["output"] for task in splits["evaluation"]], [task["output"] for task in tasks])
    assert 0.5 < sum(p - 1 for p in preferences) / 805 < 0.9
