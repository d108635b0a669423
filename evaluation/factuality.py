# SPDX-License-Identifier: MIT
"""Factual precision of long answers: which of the facts that a text states are true (FActScore; Min et al. 2023).

The paper's Table 2 asks for 183 people "Tell me a bio of X", breaks each answer into atomic facts and checks each against
the person's Wikipedia article. Here an LLM does both, through any function that answers prompts:

    ask_all = lambda prompts, desc: endpoint.ask_all(prompts, file=Path("facts.jsonl"), desc=desc)   # endpoint.py
    counts = count_facts(topics, texts, load_passages("passages.jsonl"), ask_all)
    figures = fact_figures(counts)

Where the truth is a table, as in the miniature world, the counts come from there and the figures are the same.

Departs from FActScore: facts are asked of a whole answer instead of sentence by sentence, passages are picked by rare shared
words instead of by a retrieval model, and an answer is an abstention where a phrase of refusal opens it or it states nothing.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

QUESTION = "Tell me a bio of {topic}."

# (prompts, what they are, for a progress bar) → answers, None for one that was cut off or refused
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON may hold one, no file takes it

AskAll = Callable[[Sequence[str], str], Sequence[str | None]]


class FactCount(NamedTuple):
    """What one answer states."""

    true: int
    stated: int
    abstained: bool = False  # the answer refuses or states nothing
    unread: int = 0          # facts whose check could not be read, not among the stated; 1 where their list could not be


def fact_figures(counts: Sequence[FactCount]) -> dict[str, Any]:
    """Table 2's figures, in %, facts an answer, and fact_counts, (true, stated) of each answer, for paired differences.

    fact_precision weighs every fact alike: Σ true / Σ stated. factscore weighs every answer alike: the mean of true / stated
    over answers that don't abstain, FActScore's definition. Standard errors count answers, whose facts stand or fall
    together. Both are absent where no answer states a fact.
    """
    answered = [c for c in counts if c.stated]
    result = {"facts": sum(c.stated for c in counts) / max(1, len(counts)), "abstained": sum(c.abstained for c in counts),
              "unread": sum(c.unread for c in counts), "fact_counts": [[c.true, c.stated] for c in counts]}
    if not answered:
        return result
    stated = sum(c.stated for c in answered)
    precision = sum(c.true for c in answered) / stated
    n, shares = len(answered), [c.true / c.stated for c in answered]
    score, unbiased = sum(shares) / n, max(1, n - 1)
    residual = sum((c.true - precision * c.stated) ** 2 for c in answered)
    return result | {
        "fact_precision": 100 * precision, "fact_precision_se": 100 * math.sqrt(residual * n / unbiased) / stated,
        "factscore": 100 * score, "factscore_se": 100 * math.sqrt(sum((s - score) ** 2 for s in shares) / unbiased / n)}


# -------------------------------------------------------------------------------------------------------- asking an LLM

FACTS_PROMPT = """\
Break the text below into atomic facts: short sentences that state one thing each and can be understood on their own, with \
names in place of pronouns. Take in every claim of the text, true or not, and nothing else. Write one fact a line, each line \
beginning with "- ". If the text states no facts, write "none".

[{mark} text]
{text}
[{mark} end]"""

SUPPORT_PROMPT = """\
Decide whether the statement about {topic} is supported by the passages. Use nothing but the passages.

[{mark} passages]
{passages}
[{mark} statement]
{fact}
[{mark} end]

Answer with one word, "True" or "False"."""

REFUSAL = re.compile(r"\b(?:I(?:'m| am)? (?:sorry|apologi[sz]e|unable|not (?:sure|able|aware|familiar)|cannot|can't|couldn't|"
                     r"could not|do not|don't|have no)|as an AI|no information|not enough information)\b", re.IGNORECASE)
THINKING = "think|thinking|thought|reasoning"
NONE = re.compile(r"^[^\w\n]*none[^\w\n]*$", re.IGNORECASE | re.MULTILINE)
TURNED = re.compile(r"(?:\b(?:not|never|neither|nor|cannot|if|whether)|n['’]t)\b[^.\n]{0,20}\b(?:true|false)\b", re.IGNORECASE)
BULLET = re.compile(r"^[^\S\n]*(?:[-*•]|\d+[.)])\s+(.+?)\s*$", re.MULTILINE)


def abstains(text: str) -> bool:
    """Whether an answer refuses in its first 100 characters, or is empty."""
    return not text.strip() or REFUSAL.search(text[:100]) is not None


def count_facts(topics: Sequence[str], texts: Sequence[str], passages: dict[str, list[str]], ask_all: AskAll) -> list[FactCount]:
    """Facts and true facts of each text about its topic. passages: as load_passages gives them.

    Raises ValueError for a topic without passages.
    """
    check_topics(topics, passages)
    speaking = [i for i, text in enumerate(texts) if not abstains(text)]
    lists = ask_all([filled(FACTS_PROMPT, text=texts[i]) for i in speaking], "facts stated")
    listed = {i: read_facts(answer) for i, answer in zip(speaking, lists, strict=True)}
    facts = [(i, fact) for i, stated in listed.items() for fact in stated or []]
    found = [passages[title_key(topic)] for topic in topics]
    prompts = [filled(SUPPORT_PROMPT, topic=topics[i], fact=fact, passages="\n\n".join(pick(found[i], fact)))
               for i, fact in facts]
    checked = [read_truth(answer) for answer in ask_all(prompts, "facts checked")]
    truths: list[list[bool | None]] = [[None] if listed.get(i, ()) is None else [] for i in range(len(texts))]
    for (i, _), truth in zip(facts, checked, strict=True):
        truths[i].append(truth)
    return [FactCount(true=t.count(True), stated=len(t) - t.count(None), abstained=not t, unread=t.count(None)) for t in truths]


def filled(prompt: str, **texts: str) -> str:
    """The prompt with its slots filled at once, and a mark that the texts don't hold."""
    texts["mark"] = next(mark for n in range(10**6) if (mark := f"#{n}") and not any(mark in text for text in texts.values()))
    return re.sub(r"\{(\w+)\}", lambda slot: texts[slot[1]], prompt)


def spoken(answer: str | None) -> str | None:
    """An answer behind its thinking; None where it was still thinking, or there is none.

    A closing tag alone closes what the chat template opened.
    """
    answer = re.sub(rf"<({THINKING})\b[^>]*>.*?</\1\s*>", "\n", answer or "", flags=re.IGNORECASE | re.DOTALL)
    answer = re.split(rf"</(?:{THINKING})\s*>", answer, flags=re.IGNORECASE)[-1]
    return None if re.search(rf"<(?:{THINKING})\b", answer, re.IGNORECASE) or not answer.strip() else answer


def read_facts(answer: str | None) -> list[str] | None:
    """The facts of a list, each once; none for the answer "none", None for one that is neither."""
    answer = spoken(answer) or ""
    facts = [fact for fact in dict.fromkeys(BULLET.findall(answer)) if not NONE.fullmatch(fact)]
    return facts if facts or NONE.search(answer) else None


def read_truth(answer: str | None) -> bool | None:
    """True or False, if the answer says one of them, and not both or that it isn't."""
    answer = spoken(answer) or ""
    words = {word.lower() for word in re.findall(r"\b(true|false)\b", answer, re.IGNORECASE)}
    return words == {"true"} if len(words) == 1 and not TURNED.search(answer) else None


# ------------------------------------------------------------------------------------------------------------- passages


def title_key(title: str) -> str:
    """One spelling of a title: Unicode writes an é in two ways, and Wikipedia a space as an underscore."""
    return " ".join(unicodedata.normalize("NFC", title).replace("_", " ").split())


def check_topics(topics: Sequence[str], passages: dict[str, list[str]]) -> None:
    """Raises ValueError for topics without passages, before anything is asked that costs money."""
    missing = [topic for topic in topics if title_key(topic) not in passages]
    if missing:
        others = f", nor {len(missing) - 1} other topics" if missing[1:] else ""
        raise ValueError(f"--passages: none is titled {missing[0]!r}{others}; each topic needs one to be checked against")


def read_lines(flag: str, file: str | Path) -> list[str]:
    """Of a text file, with or without the byte order mark that Windows puts before it."""
    try:
        return Path(file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {file}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def load_topics(file: str | Path) -> list[str]:
    """One topic a line, as FActScore's lists of people."""
    topics = [line.strip() for line in read_lines("--topics", file) if line.strip()]
    if not topics:
        raise ValueError(f"--topics {file}: is empty; it must hold one topic a line")
    return topics


def load_passages(file: str | Path, words: int = 150) -> dict[str, list[str]]:
    """Passages of about `words` words by title_key(title), from JSON lines {"title", "text"}; a title may come more than once."""
    passages: dict[str, list[str]] = {}
    for number, line in enumerate(read_lines("--passages", file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            title, text = title_key(record["title"]), HALF_A_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", record["text"]).split()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'--passages {file}: line {number}: must be {{"title": "...", "text": "..."}}') from None
        passages.setdefault(title, []).extend(" ".join(text[i:i + words]) for i in range(0, len(text), words))
    return passages


def pick(passages: Sequence[str], fact: str, k: int = 5) -> list[str]:
    """The k passages that share most with the fact, in their order; words that few passages have weigh more."""
    if len(passages) <= k:
        return list(passages)
    bags = [set(re.findall(r"\w+", passage.lower())) for passage in passages]
    spread = Counter(word for bag in bags for word in bag)
    wanted = set(re.findall(r"\w+", fact.lower()))
    scores = [sum(math.log(len(bags) / spread[word]) for word in wanted & bag) for bag in bags]
    best = sorted(range(len(passages)), key=lambda i: -scores[i])[:k]
    return [passages[i] for i in sorted(best)]
