"""What factuality.py promises: FActScore's figures by hand, answers of an LLM read or counted, the right passages shown."""

import math
import re

import pytest

from evaluation.factuality import (
    FactCount,
    abstains,
    count_facts,
    fact_figures,
    filled,
    load_passages,
    load_topics,
    pick,
    read_facts,
    read_truth,
)


def test_the_figures_by_hand():
    """3 of 4 and 1 of 2 facts are true: 4/6 of all facts, (75 % + 50 %) / 2 of the answers; one abstains."""
    found = fact_figures([FactCount(3, 4), FactCount(1, 2, unread=1), FactCount(0, 0, abstained=True)])
    assert found["fact_precision"] == pytest.approx(100 * 4 / 6)
    residual = (3 - 4 * 4 / 6) ** 2 + (1 - 2 * 4 / 6) ** 2
    assert found["fact_precision_se"] == pytest.approx(100 * math.sqrt(residual * 2 / 1) / 6)
    assert found["factscore"] == 62.5
    assert found["factscore_se"] == pytest.approx(100 * math.sqrt((0.125**2 + 0.125**2) / 1 / 2))
    assert (found["facts"], found["abstained"], found["unread"]) == (2, 1, 1)


def test_where_nobody_states_a_fact_there_is_no_precision():
    found = fact_figures([FactCount(0, 0, abstained=True)])
    assert "fact_precision" not in found and "factscore" not in found and found["facts"] == 0


@pytest.mark.parametrize(("text", "expected"), [
    ("", True), ("   ", True), ("I'm sorry, but I don't know this person.", True), ("I am not familiar with her.", True),
    ("As an AI, I know nothing.", True), ("There is no information about him.", True),
    ("Ada Lovelace was a mathematician.", False), ("Marie Curie found radium. " * 5 + "I'm sorry.", False),
    ("I know her well: she was born in 1815.", False)])
def test_refusals_are_told_from_answers(text, expected):
    assert abstains(text) is expected


@pytest.mark.parametrize(("answer", "facts"), [
    ("- Ada was born in 1815.\n- Ada was English.", ["Ada was born in 1815.", "Ada was English."]),
    ("Here they are:\n1. One.\n2) Two.\n* Three.\n• Four.", ["One.", "Two.", "Three.", "Four."]),
    ("- Same.\n- Same.", ["Same."]), ("None", []), ("none.", []), ("I see many facts here!", None), ("", None),
    ("- none", []), ('If the text states no facts, I write "none".', None), (None, None),
    ("<think>\n- One.\n</think>\n- Two.", ["Two."]), ("<think>\n- One.", None), ("- One.\n</think>\nnone", [])])
def test_lists_of_facts_are_read_or_said_to_be_none(answer, facts):
    assert read_facts(answer) == facts


@pytest.mark.parametrize(("answer", "truth"), [
    ("True", True), ("FALSE.", False), ("The answer is true", True), ("True or False?", None), ("Unsupported", None), ("", None),
    ("untrue", None), ("It is not true.", None), ("It isn't quite true", None), ("Is it true? I can't say whether.", True),
    ("I can't say whether it is true.", None), (None, None), ('Answer with one word, "True" or "False".', None),
    ("<think>True?</think> False", False), ("<think>True", None), ("It is true.</think>False", False)])
def test_truth_is_read_or_left_out(answer, truth):
    assert read_truth(answer) is truth


def test_passages_are_cut_and_joined_by_title(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"title": "Ada", "text": "a b c d e"}\n\n{"title": "Ada", "text": "f"}\n{"title": "Bo", "text": ""}\n')
    assert load_passages(file, words=2) == {"Ada": ["a b", "c d", "e", "f"], "Bo": []}


@pytest.mark.parametrize("line", ["{", "[1]", '{"title": "Ada"}', '{"title": "Ada", "text": 3}'])
def test_a_passage_that_is_none_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"title": "Ada", "text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match="p.jsonl: line 2: must be"):
        load_passages(tmp_path / "p.jsonl")


def test_an_empty_list_of_topics_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="must hold one topic a line"):
        load_topics(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text("Ada Lovelace\n\nMarie Curie \n")
    assert load_topics(tmp_path / "t.txt") == ["Ada Lovelace", "Marie Curie"]


def test_the_passages_shown_are_those_that_share_rare_words_with_the_fact():
    passages = [f"She was the {word} of the town." for word in ("mayor", "baker", "doctor", "piper", "teacher", "miller")]
    assert passages[2] in pick(passages, "She was the doctor.", k=2) and passages[5] in pick(passages, "A miller.", k=2)
    assert pick(passages[:3], "anything", k=5) == passages[:3]


def test_a_text_cannot_fill_a_slot_or_forge_the_mark():
    assert filled("{mark} {text} {mark}", text="{mark} #0 {text}") == "#1 {mark} #0 {text} #1"


TRUE = {"Ada was born in 1815.", "Ada was English."}


def answers(prompts, desc):
    """An LLM that lists each sentence as a fact and knows TRUE; of one fact it can't say."""
    said = []
    for prompt in prompts:
        if "atomic facts" in prompt:
            text = re.search(r"text]\n(.*?)\n\[", prompt, re.DOTALL)[1]
            listed = "\n".join(f"- {sentence}." for sentence in text.rstrip(".").split(". "))
            said.append("nothing to list, sorry" if "garbled" in text else listed)
        else:
            fact = re.search(r"statement]\n(.*?)\n\[", prompt, re.DOTALL)[1]
            said.append("Hard to say." if "hard" in fact else str(fact in TRUE))
    return said


def test_facts_are_counted_from_split_to_support():
    texts = ["Ada was born in 1815. Ada was French. Ada was English.", "I'm sorry, I don't know.",
             "This is hard. Ada was English.", "garbled"]
    counts = count_facts(["Ada"] * 4, texts, {"Ada": ["Ada Lovelace, born in 1815, was English."]}, answers)
    assert counts == [FactCount(2, 3), FactCount(0, 0, abstained=True), FactCount(1, 1, unread=1), FactCount(0, 0, unread=1)]


def test_a_list_or_a_check_without_a_whole_answer_is_counted_as_unread():
    def cut(prompts, desc):
        return [None if "statement" in p and "French" in p or "cut off" in p else a
                for p, a in zip(prompts, answers(prompts, desc), strict=True)]

    counts = count_facts(["Ada"] * 2, ["Ada was French. Ada was English.", "This is cut off."], {"Ada": ["p"]}, cut)
    assert counts == [FactCount(1, 1, unread=1), FactCount(0, 0, unread=1)]


def test_a_topic_without_passages_is_named_before_anything_is_asked():
    with pytest.raises(ValueError, match="none is titled 'Bo'"):
        count_facts(["Ada", "Bo"], ["x", "y"], {"Ada": ["p"]}, lambda prompts, desc: pytest.fail("asked"))
