"""The miniature world's judges: a pool of simulated annotators with different tastes, and the writer they compare with.

AlpacaFarm draws one of 13 LLM annotators for each pair (Dubois et al. 2023, section 2); here one of five small
readers is drawn, and what each looks at can be read off the text, as people do: how many distinct facts a response
states (with diminishing returns), whether they are true, whether it stays with the topic and ends properly, whether it
repeats itself or rambles. Closed tasks have an exact answer. Training preferences get 25% of their labels flipped,
evaluation none, ties count half: the settings of AlpacaFarm. None of the readers minds which output comes first, so the
order of showing, random in AlpacaFarm, changes no preference here.

    python -m tiny.annotators       # prints what each annotator thinks of a few responses
"""

import random
import zlib
from dataclasses import asdict, dataclass

from tiny.knowledge import Claim, Entity, entities, read_claims, say, split_sentences, values
from tiny.tasks import Task, choose_facts

LABEL_NOISE = 0.25  # AlpacaFarm's share of flipped labels in training preferences
TIE = 0.02          # utilities closer than this are a tie


@dataclass(frozen=True)
class Reading:
    """What a reader takes from one response to an open task; counts and shares."""

    claims: int         # distinct facts about the topics, garbled ones not counted
    stated: int         # the same with the garbled ones
    true: float         # share of the stated that agrees with the tables, 0 when there is none
    repeats: int        # facts and sentences said again
    off_topic: int      # facts about something else
    unreadable: int     # sentences that are not English or state nothing
    named: float        # share of the topics called by name
    aspects: float      # share of the aspects asked for that are there (1 when none was asked for)
    sentences: int
    words: int
    finished: bool      # ends with a full stop


@dataclass(frozen=True)
class Annotator:
    """A taste: how much each thing that can be read off a response weighs."""

    name: str
    claims: float
    truth: float
    relevance: float
    form: float
    repeats: float
    length: float

    def utility(self, task: dict, response: str) -> float:
        """How much this annotator likes `response`; around 0 to 1.5, comparable within one task only."""
        if task["answer"] is not None:
            return closed_utility(task, response)
        r = read(task, response)
        sentences = max(1, r.sentences)
        return (
            self.claims * r.aspects * content(task, r)
            + self.truth * r.true
            + self.relevance * (r.named - r.off_topic / sentences)
            + self.form * (r.finished - r.unreadable / sentences)
            - self.repeats * min(3, r.repeats)
            - self.length * max(0, r.words - 40) / 40
        )


POOL = [
    Annotator("student", claims=0.9, truth=0.1, relevance=0.2, form=0.3, repeats=0.25, length=0.0),
    Annotator("teacher", claims=0.7, truth=0.2, relevance=0.2, form=0.3, repeats=0.25, length=0.1),
    Annotator("fact checker", claims=0.5, truth=0.4, relevance=0.2, form=0.2, repeats=0.25, length=0.0),
    Annotator("editor", claims=0.6, truth=0.1, relevance=0.2, form=0.4, repeats=0.35, length=0.3),
    Annotator("librarian", claims=0.6, truth=0.1, relevance=0.4, form=0.3, repeats=0.25, length=0.1),
]


def content(task: dict, r: Reading) -> float:
    """0 to about 1.1: distinct facts with diminishing returns, or how well a limit on facts or sentences is kept."""
    if task["facts"]:
        return max(0.0, 1 - abs(r.claims - task["facts"]) / task["facts"])
    if task["sentences"]:
        return max(0.0, 1 - abs(r.sentences - task["sentences"]) / 2) * min(1, r.claims)
    return (1 - 0.6 ** r.claims) / (1 - 0.6 ** 5)


def read(task: dict, response: str) -> Reading:
    """Reads a response to an open task."""
    topics = [entities()[name] for name in task["topics"]]
    claims, unreadable = read_claims(response, topics[0])
    on_topic = [c for c in claims if c.entity in topics]
    distinct = {(c.entity.name, c.attribute): c for c in reversed(on_topic)}  # the first mention counts
    sentences = split_sentences(response)
    said_again = len(sentences) - len(set(sentences)) if unreadable else 0
    return Reading(
        claims=sum(c.value in values()[c.entity.kind, c.attribute] for c in distinct.values()),
        stated=len(distinct),
        true=sum(c.true for c in distinct.values()) / max(1, len(distinct)),
        repeats=len(on_topic) - len(distinct) + said_again,
        off_topic=len(claims) - len(on_topic),
        unreadable=unreadable,
        named=sum(t.name in response or t.subject in response for t in topics) / len(topics),
        aspects=aspects_covered(task, on_topic),
        sentences=len(sentences),
        words=len(response.split()),
        finished=response.rstrip().endswith("."),
    )


def aspects_covered(task: dict, claims: list[Claim]) -> float:
    """1 without asked-for aspects; else from 0.4 (none of them) to 1 (all)."""
    if not task["aspects"]:
        return 1.0
    found = {c.attribute for c in claims}
    return 0.4 + 0.6 * sum(a in found for a in task["aspects"]) / len(task["aspects"])


def is_correct(task: dict, response: str) -> bool:
    """Whether a closed task's response starts with the exact answer, or its first claims are the answer's."""
    response, answer = " ".join(response.split()), task["answer"]
    if response == answer or response.startswith(answer + " "):
        return True
    topic = entities().get(task["topics"][0]) if task["topics"] else None
    wanted, got = read_claims(answer, topic)[0], read_claims(response, topic)[0]
    plain = [c.entity.facts[c.attribute] for c in wanted if c.true]
    return (bool(wanted) and got[: len(wanted)] == wanted) or response.rstrip(".") in plain


def closed_utility(task: dict, response: str) -> float:
    """A right answer counts most, then saying no more than was asked."""
    extra = max(0, len(split_sentences(response)) - len(split_sentences(task["answer"])))
    return is_correct(task, response) + 0.1 * response.rstrip().endswith((".", "?")) - 0.1 * min(3, extra)


def annotator_for(task: dict, seed: int = 0) -> Annotator:
    """The annotator who judges this task's pair: a stable draw from the pool, as AlpacaFarm seeds by the example."""
    key = f"{seed}|{task['instruction']}|{task['input']}"
    return POOL[zlib.crc32(key.encode()) % len(POOL)]


def prefer(annotator: Annotator, task: dict, output_1: str, output_2: str) -> float:
    """1 or 2 for the preferred output, 1.5 for a tie; no noise."""
    difference = annotator.utility(task, output_2) - annotator.utility(task, output_1)
    return 1.5 if abs(difference) < TIE else 1 + (difference > 0)


def noisy(preference: int, rng: random.Random, noise: float = LABEL_NOISE) -> int:
    """A training label, 1 or 2, flipped with probability `noise`; ties are left out of training preferences."""
    return 3 - preference if rng.random() < noise else preference


def judge(tasks: list[dict], candidates: list[str], references: list[str], seed: int = 0) -> list[float]:
    """The evaluation's preferences, reference as output 1 and candidate as output 2, one annotator a pair."""
    return [prefer(annotator_for(task, seed), task, reference, candidate)
            for task, candidate, reference in zip(tasks, candidates, references, strict=True)]


def with_blanks(task: dict) -> dict:
    """A record of a data file, which leaves empty fields out, with all the fields that the judges look at."""
    return asdict(Task(family="", instruction="")) | task


def facts_in(task: dict, response: str) -> tuple[int, int, int]:
    """(true facts, distinct facts, repeated facts) about the task's topics: FActScore with a known truth."""
    r = read(task, response)
    return round(r.true * r.stated), r.stated, r.repeats


# The reference writer -------------------------------------------------------------------------------------------------

# Chosen so that the SFT model wins about 37% against it, as in the paper's Table 1.
REFERENCE_COUNTS = {1: 12, 2: 28, 3: 34, 4: 18, 5: 8}  # facts in an open response: weight
REFERENCE_ERRORS = 0.20                                # share of its facts that are wrong
REFERENCE_CORRECT = 0.75                               # share of its closed answers that are right


def misremember(fact: tuple[Entity, str, str], rng: random.Random) -> tuple[Entity, str, str]:
    entity, attribute, value = fact
    others = [v for v in values()[entity.kind, attribute] if v != value]
    return (entity, attribute, rng.choice(others)) if rng.random() < REFERENCE_ERRORS else fact


def write_reference(task: dict, same_family: list[dict], rng: random.Random) -> str:
    """What the stand-in for text-davinci-003 answers; a wrong closed answer is another task's of the same family."""
    if task["answer"] is not None:
        others = [t["answer"] for t in same_family if t["answer"] != task["answer"]]
        return task["answer"] if rng.random() < REFERENCE_CORRECT or not others else rng.choice(others)
    topics = [entities()[name] for name in task["topics"]]
    count = rng.choices(list(REFERENCE_COUNTS), list(REFERENCE_COUNTS.values()))[0]
    count = task["facts"] or (2 if task["sentences"] else count)
    share = max(1, round(count / len(topics)))
    sentences = []
    for topic in topics:
        facts = choose_facts(topic, share, rng)
        asked = [(topic, a, topic.facts[a]) for a in task["aspects"] if a not in [f[1] for f in facts]]
        facts = asked + facts[: max(1, share - len(asked))]
        sentences += say([misremember(f, rng) for f in facts], rng, join=1.0 if task["sentences"] else 0.35)
    return " ".join(sentences)


def add_references(tasks: list[dict], seed: int) -> list[dict]:
    """The tasks with `output` replaced by the reference writer's, as AlpacaFarm's evaluation file has it."""
    rng = random.Random(seed)
    families: dict[str, list[dict]] = {}
    for task in tasks:
        families.setdefault(task["family"], []).append(task)
    return [task | {"output": write_reference(task, families[task["family"]], rng)} for task in tasks]


def main() -> None:
    from tiny.tasks import make_splits

    tasks = [t for t in make_splits()["about"]][:3]
    for task in tasks:
        reference = write_reference(task, tasks, random.Random(0))
        print(f"{task['instruction']}\n  demonstration: {task['output']}\n  reference:     {reference}")
        for annotator in POOL:
            scores = [annotator.utility(task, text) for text in (task["output"], reference)]
            print(f"  {annotator.name:<14}{scores[0]:6.2f} {scores[1]:6.2f}")


if __name__ == "__main__":
    main()
