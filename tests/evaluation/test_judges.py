"""What judges.py promises: fair order, stable draws, nothing paid for twice, and patience with servers that misbehave."""

import json
import os
import re
import threading
import time
from collections import Counter

import pytest

from evaluation.endpoint import Answer, Endpoint
from evaluation.judges import (
    PROMPT,
    LLMJudge,
    ScoreJudge,
    Verdict,
    compare,
    draw,
    load_pool,
    read_annotations,
    read_verdict,
    resumable,
    shown_swapped,
    summary,
)

TASKS = [{"instruction": f"Question {i}?", "input": "some text" if i % 3 == 0 else ""} for i in range(40)]
GOOD = [f"good answer {i}" for i in range(40)]
BAD = [f"bad answer {i}" for i in range(40)]


def prefers_good(task, first, second) -> Verdict:
    return Verdict(1.0 if first.startswith("good") else 2.0)


def prefers_first(task, first, second) -> Verdict:
    return Verdict(1.0)


# --- pairs -------------------------------------------------------------------------------------------------------------


def test_a_preference_is_about_reference_and_candidate_whatever_order_the_judge_saw():
    records = compare(TASKS, GOOD, BAD, {"judge": prefers_good})
    assert {r["preference"] for r in records} == {2.0} and {r["shown_first"] for r in records} == {1, 2}
    assert {r["preference"] for r in compare(TASKS, BAD, GOOD, {"judge": prefers_good})} == {1.0}


def test_a_judge_that_always_takes_the_first_answer_wins_nothing():
    """Half of the pairs are shown in either order, so a taste for the first place cancels."""
    tasks = [{"instruction": f"Question {i}?"} for i in range(2000)]
    records = compare(tasks, ["a"] * 2000, ["b"] * 2000, {"judge": prefers_first})
    assert sum(r["preference"] - 1 for r in records) / 2000 == pytest.approx(0.5, abs=0.035)  # three standard errors


def test_draws_depend_on_the_example_and_the_seed_alone():
    assert [draw(t, 0, 5) for t in TASKS] == [draw(t, 0, 5) for t in TASKS] != [draw(t, 1, 5) for t in TASKS]
    assert [shown_swapped(t, 0) for t in TASKS] != [shown_swapped(t, 1) for t in TASKS]
    assert set(Counter(draw(t, 0, 3) for t in TASKS)) == {0, 1, 2}


def test_the_pools_draw_is_the_miniature_worlds():
    from tiny.annotators import POOL, annotator_for

    assert all(POOL[draw(task, seed, len(POOL))] is annotator_for(task, seed) for task in TASKS for seed in (0, 7))


def test_each_pair_goes_to_one_judge_of_the_pool():
    asked = Counter()
    pool = {name: lambda task, a, b, name=name: asked.update([name]) or Verdict(2.0) for name in ("x", "y", "z")}
    records = compare(TASKS, GOOD, BAD, pool)
    assert sum(asked.values()) == len(TASKS) and Counter(r["annotator"] for r in records) == asked and len(asked) == 3


def test_identical_answers_are_a_tie_that_nobody_is_asked_about():
    def refuses(task, first, second):
        raise AssertionError("asked")

    records = compare(TASKS[:2], ["same", "same"], ["same", "same"], {"judge": refuses})
    assert [r["preference"] for r in records] == [1.5, 1.5] and records[0]["annotator"] == "identical"
    assert "2 with identical answers" in summary(records)


def test_records_are_annotations_that_the_win_rate_can_be_recomputed_from(tmp_path):
    records = compare(TASKS, GOOD, BAD, {"judge": prefers_good}, names=("davinci", "mine"))
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    preferences, names = read_annotations(tmp_path / "annotations.json")
    assert preferences == [2.0] * 40 and names == "mine against davinci"
    assert records[0]["instruction"] == "Question 0?\n\nsome text" and records[1]["instruction"] == "Question 1?"


@pytest.mark.parametrize(("text", "expected"), [
    ('[{"preference": 1}, {"preference": "2"}, {"preference": null}, {"preference": NaN}, {"preference": 0}]',
     [1, 2, None, None, 0]),
    ('{"preference": 1.5}\n{"preference": ""}\n', [1.5, None]),
])
def test_annotations_of_other_tools_are_read(tmp_path, text, expected):
    (tmp_path / "a.json").write_text(text)
    assert read_annotations(tmp_path / "a.json")[0] == expected


@pytest.mark.parametrize(("text", "message"), [
    ("[{", "neither a JSON list nor JSON lines"), ('[{"choice": 1}]', 'record 1: has no field "preference"'),
    ('[{"preference": 1}, {"preference": "A"}]', "record 2: preference 'A' must be a number from 1 to 2"), ("[3]", "record 1"),
    *((f'[{{"preference": 1}}, {{"preference": {value}}}]', "record 2: preference") for value in (
        "Infinity", "-Infinity", "true", "false", "3", "0.5", "-1", '"7"', "[1]", "1" + "0" * 400)),
])
def test_annotations_that_are_none_are_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_annotations(tmp_path / "a.json")


def test_a_score_decides_by_the_higher_number():
    scores = {("Say x.", "long"): 2.0, ("Say x.", "short"): 1.0, ("Say x.", "brief"): 1.0}
    judge, task = ScoreJudge(scores), {"instruction": "Say x."}
    assert [judge(task, *pair).preference for pair in (("long", "short"), ("short", "long"), ("short", "brief"))] == [1, 2, 1.5]


# --- work that resumes -------------------------------------------------------------------------------------------------


def square(file, items, fail_at=None, parallel=1):
    done = []

    def work(x):
        if x == fail_at:
            raise RuntimeError("the server went away")
        done.append(x)
        return {"square": x * x}

    try:
        return [r["square"] for r in resumable(items, work, lambda x: x, file=file, parallel=parallel)], done
    except RuntimeError:
        return None, done


def test_interrupted_work_goes_on_and_repeats_nothing(tmp_path):
    file = tmp_path / "log.jsonl"
    result, first = square(file, range(10), fail_at=6)
    assert result is None and first == [0, 1, 2, 3, 4, 5]
    result, second = square(file, range(10))
    assert result == [x * x for x in range(10)] and second == [6, 7, 8, 9]
    assert square(file, range(10)) == (result, [])


def test_what_was_under_way_when_one_failed_is_kept(tmp_path):
    file, both = tmp_path / "log.jsonl", threading.Barrier(2)

    def work(x):
        both.wait(5)
        if x == 0:
            raise RuntimeError
        time.sleep(0.1)  # still at work when the other has failed
        return {"x": x}

    with pytest.raises(RuntimeError):
        resumable([0, 1], work, lambda x: x, file=file, parallel=2)
    assert json.loads(file.read_text())["x"] == 1


def test_equal_items_are_worked_on_once(tmp_path):
    assert square(tmp_path / "log.jsonl", [3, 4, 3], parallel=3)[0] == [9, 16, 9]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_a_record_cut_off_in_the_middle_is_done_again(tmp_path):
    file = tmp_path / "log.jsonl"
    square(file, range(3))
    whole = file.read_bytes()
    for cut in range(len(whole) - 20, len(whole)):
        file.write_bytes(whole[:cut])
        assert square(file, range(3)) == ([0, 1, 4], [2])
        assert file.read_bytes() == whole


def test_a_damaged_record_is_named(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"key": "a"}\n{"key": \n{"key": "b"}\n')
    with pytest.raises(ValueError, match="log.jsonl: line 2 is no record"):
        square(file, range(3))


# --- reading an LLM ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "preference"), [
    ("The second is wrong. Verdict: 1", 1), ("verdict: **2**", 2), ("Verdict: Tie.", 1.5), ("VERDICT - answer 2", 2),
    ("Verdict: 1? No, on reflection:\nVerdict: 2", 2), ("2", 2), (" Answer 1. ", 1), ("tie", 1.5), ("**1**", 1),
    ("", None), ("Both are fine.", None), ("Verdict: 3", None), ("Verdict: 12", None),
    ("Answer 1 is better than answer 2.", None),
    ("Verdict: 1, because answer 2 is shorter", 1), ("Verdict: 2 gives more detail", 2), ("Verdict: **2**.", 2),
    ("Verdict: Answer 2", 2),
    ("__Verdict__: __2__", 2),
    ("Verdict: 1. Answer 2 is shorter.", 1), ("Verdict: 1 (answer 1)", 1), ("Verdict: 1 is much better", 1), ("Verdict:\n1", 1),
    ("## Verdict\n\n**2**\n", 2), ('{"verdict": 2, "confidence": 0.9}', 2), ("Verdict: tie, both are good", 1.5),
    ("Verdict: 2 (95% sure)", 2), ("Verdict: 1.0", 1), ("Verdict is 2", 2), ("Verdict: 1 The first is right.", 1),
    ("Verdict: 1\nThis verdict is close, but answer 2 errs.", 1), ("Verdict: 1\nVerdict: 2", None),
    ("Verdict: 1\n\nVerdict: 2", 2), ("Verdict: 1\nVerdict: 2\nVerdict: tie\n\nVerdict: 2", 2),
])
def test_a_verdict_is_read_or_left_out(text, preference):
    assert read_verdict(text) == preference


@pytest.mark.parametrize("text", [
    "Verdict: 1 or 2", "Verdict: 1/2", "Verdict: 1 and 2", "Verdict: 1, 2", "Verdict: 1 - 2", "Verdict: 1 = 2",
    "Verdict: 2 or tie", "Verdict: 1 vs 2", "Verdict: 1 vs. 2", "Verdict: tie or 1", "Verdict: 1|2|tie", "Verdict: 1 2",
    "Verdict: (1, 2)", "1 or 2", "Verdict: answer 1 or answer 2", "Verdict: Answer 1/Answer 2", 'Verdict: "1", "2", or "tie"',
    "Verdict: 1 or\n2",
    "Verdict: 1.5", "Verdict: 1,5", "Verdict: 1/10", "1.5", "1/2", "Verdict: 1½", "Verdict: 1, 1 or 2"])
def test_several_choices_or_a_fraction_are_no_verdict(text):
    assert read_verdict(text) is None


@pytest.mark.parametrize("text", ["Verdict: neither", "Verdict:", "Verdict: not 1", "Verdict: 1 is wrong", "Verdict: 1 if brief",
                                  "Verdict: unclear. 1", "Verdict: both 1 and 2", "Verdict - neither"])
def test_a_last_statement_that_is_no_choice_gives_no_way_to_an_earlier_one(text):
    assert read_verdict(text) is None and read_verdict(f"Verdict: 2\n\nBut then:\n{text}") is None


ECHO = PROMPT.splitlines()[-1]


@pytest.mark.parametrize("text", [
    ECHO, 'I will close with one line: "Verdict: 1", "Verdict: 2", or "Verdict: tie".', ECHO.replace(", or ", ",\nor "),
    ECHO.replace(", ", ",\n"), "Verdict: 1\nVerdict: 2\nVerdict: tie", "- Verdict: 1\n- Verdict: 2\n- Verdict: tie",
    "1. Verdict: 1\n2. Verdict: 2\n3. Verdict: tie", "Verdict: 1\n\nVerdict: 2\n\nVerdict: tie", "Verdict: 1\nor\nVerdict: 2",
    "Verdict: 1 (the first is better)\nVerdict: 2 (the second is better)\nVerdict: tie (they are equal)",
    "Verdict: 1, Verdict: 2", "Possible verdicts: 1, 2, tie"])
def test_a_list_of_the_choices_is_an_echo_and_no_vote(text):
    assert read_verdict(text) is None
    assert read_verdict(f"{text}\nThe second is fuller.\nVerdict: 2") == 2  # a real one, stated behind it


@pytest.mark.parametrize(("text", "preference"), [
    ("<think>Verdict: 1, or is it?</think>\nVerdict: 2", 2), ("<thinking>\n1\n</thinking> 2", 2),
    ("The first is Verdict: 1. Wait.</think>Verdict: 2", 2), ("<Reasoning>a</Reasoning>Verdict: tie", 1.5),
    ("<think>Verdict: 1", None), ("Verdict: 1\n<think>But", None), ("<think>Verdict: 1</think>", None),
    ("Verdict: 1</think>", None), ("<think>a</think>b</think> Verdict: 1 <think>c</think>", 1)])
def test_what_a_judge_thinks_is_not_what_it_says(text, preference):
    assert read_verdict(text) == preference


def test_what_was_stored_is_read_as_carefully_as_what_comes(tmp_path):
    """A file of an older version holds votes that its reader saw in echoes; nothing is asked again."""
    class Echo:
        identity: list = []
        calls = retries_made = tokens_in = tokens_out = 0

        def ask(self, prompt):
            return Answer(ECHO)

    file, pool = tmp_path / "log.jsonl", {"llm": LLMJudge(Echo())}
    compare(TASKS, GOOD, BAD, pool, file=file)
    stored = file.read_text().replace('"preference": null', '"preference": 1.5')
    assert stored.count("1.5") == 40
    file.write_text(stored.replace(json.dumps(ECHO), '"Verdict: 1"', 20))
    Echo.ask = None
    preferences = [r["preference"] for r in compare(TASKS, GOOD, BAD, pool, file=file)]
    assert preferences == [1.0 + shown_swapped(task, 0) for task in TASKS[:20]] + [None] * 20


def test_the_prompt_shows_everything_and_an_answer_cannot_fill_a_slot():
    seen = []

    class Echo:
        def ask(self, prompt):
            seen.append(prompt)
            return Answer("Verdict: 1", 7, 3)

    verdict = LLMJudge(Echo(), "{instruction}|{output_1}|{output_2}|{mark}")
    assert verdict({"instruction": "Do {output_2}"}, "first {instruction}", "second") == Verdict(1.0, "Verdict: 1", 7, 3)
    instruction, first, second, mark = seen[0].split("|")
    assert (instruction, first, second) == ("Do {output_2}", "first {instruction}", "second") and len(mark) == 8


def test_an_answer_that_is_not_whole_is_no_vote_of_the_judge():
    class Cut:
        def ask(self, prompt):
            return Answer("Verdict: 1", cut="length")

    assert LLMJudge(Cut())({"instruction": "x"}, "a", "b") == Verdict(None, "Verdict: 1", cut="length")


def test_a_prompt_without_a_slot_is_refused():
    with pytest.raises(ValueError, match="lacks the slot {output_2}"):
        LLMJudge(None, "{instruction} {output_1}")


# --- pools -------------------------------------------------------------------------------------------------------------


def test_a_pool_file_names_models_prompts_and_temperatures(serve, tmp_path):
    server, file = serve(), tmp_path / "pool.json"
    prompt = "{instruction}\nanswer 1.\n{output_1}\nanswer 2.\n{output_2}"
    file.write_text(json.dumps([{"model": "big"}, {"model": "big", "name": "strict", "prompt": prompt, "temperature": 1.0}]))
    pool = load_pool(file, lambda model, **settings: Endpoint(server.url, model, **settings))
    compare(TASKS, GOOD, BAD, pool, parallel=4)
    assert Counter((body["model"], body["temperature"]) for _, _, body in server.seen).keys() == {("big", 0.0), ("big", 1.0)}


@pytest.mark.parametrize(("content", "message"), [
    ("{", "no JSON"), ("[]", "at least one judge"), ('[{"name": "x"}]', 'judge 1: must be an object with a "model"'),
    ('[{"model": "m"}, {"model": "m"}]', "judge 2: the name 'm' is taken"),
    ('[{"model": "m", "temprature": 1}]', "unknown field 'temprature'"),
    ('[{"model": "m", "temperature": "hot"}]', "field 'temperature' is 'hot'"),
    ('[{"model": "m", "prompt": "{output_1}"}]', "judge 1: the judge's prompt lacks the slot {instruction}")])
def test_a_wrong_pool_is_named(tmp_path, content, message):
    (tmp_path / "pool.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pool(tmp_path / "pool.json", lambda **settings: None)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_and_not_a_silent_loss(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError):
        resumable([1], lambda x: {"x": x}, lambda x: x, file=tmp_path / "log.jsonl")
