"""What judges.py promises: fair order, stable draws, nothing paid for twice, and patience with servers that misbehave."""

import json
import os
import random
import re
import threading
import time
from collections import Counter

import pytest

from evaluation.judges import (
    PROMPT,
    Answer,
    Endpoint,
    EndpointError,
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
])
def test_a_verdict_is_read_or_left_out(text, preference):
    assert read_verdict(text) == preference


def test_the_prompt_shows_everything_and_an_answer_cannot_fill_a_slot():
    seen = []

    class Echo:
        def ask(self, prompt):
            seen.append(prompt)
            return Answer("Verdict: 1", 7, 3)

    verdict = LLMJudge(Echo(), "{instruction}|{output_1}|{output_2}|{mark}")
    assert verdict({"instruction": "Do {output_2}"}, "first {instruction}", "second") == (1.0, "Verdict: 1", 7, 3)
    instruction, first, second, mark = seen[0].split("|")
    assert (instruction, first, second) == ("Do {output_2}", "first {instruction}", "second") and len(mark) == 8


def test_a_prompt_without_a_slot_is_refused():
    with pytest.raises(ValueError, match="lacks the slot {output_2}"):
        LLMJudge(None, "{instruction} {output_1}")


# --- a server that misbehaves ------------------------------------------------------------------------------------------


def endpoint(server, **settings) -> Endpoint:
    return Endpoint(server.url, "judge-1", **({"wait": 0.01, "timeout": 0.5, "retries": 4} | settings))


def test_a_request_is_the_openai_protocols(serve):
    server = serve()
    answer = endpoint(server, key="sk-secret", temperature=0.5, max_tokens=9).ask("Which one?")
    assert answer == ("The first. Verdict: 1", 11, 4)
    [(_, path, body)] = server.seen
    assert path == "/v1/chat/completions" and server.headers[0]["authorization"] == "Bearer sk-secret"
    assert body["messages"] == [{"role": "user", "content": "Which one?"}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.5, 9)


def test_without_a_key_the_users_hugging_face_token_goes_nowhere(serve, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    server = serve()
    endpoint(server).ask("x")
    assert "hf_private" not in str(server.headers)


@pytest.mark.parametrize("trouble", [429, 500, 503, "slow", "malformed", "no choices", "truncated", "reset", "wait"])
def test_a_server_in_trouble_is_asked_again(serve, trouble):
    server = serve(trouble)
    asked = endpoint(server)
    assert asked.ask("x").text.endswith("Verdict: 1")
    assert [what for what, *_ in server.seen] == [trouble, "ok"]
    assert (asked.calls, asked.retries_made, asked.tokens_in, asked.tokens_out) == (2, 1, 11, 4)


def test_retry_after_is_obeyed(serve):
    server, start = serve("wait"), time.monotonic()
    endpoint(server).ask("x")
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_request_that_is_wrong_is_not_repeated_and_the_message_hides_the_key(serve, status):
    server = serve(status, status)
    with pytest.raises(EndpointError) as caught:
        endpoint(server, key="sk-secret").ask("x")
    assert len(server.seen) == 1
    message = str(caught.value)
    assert f"HTTP {status}: " in message and f"trouble {status}" in message and server.url in message
    assert "sk-secret" not in message and "\n" not in message


def test_a_server_that_stays_down_ends_in_one_line(serve):
    server = serve(*[500] * 9)
    with pytest.raises(EndpointError, match="no answer after 3 attempts: HTTP 500"):
        endpoint(server, retries=2).ask("x")
    assert len(server.seen) == 3


def test_nobody_listening_ends_in_one_line():
    with pytest.raises(EndpointError, match="no answer after 2 attempts"):
        Endpoint("http://127.0.0.1:9/v1", "m", wait=0.01, retries=1).ask("x")


@pytest.mark.parametrize(("url", "message"), [
    ("127.0.0.1:8000", "must be an address"), ("ftp://host/v1", "must be an address"), ("http://", "must be an address"),
    ("http://[::1", "must be an address"), ("http://me:secret@host/v1", "keys belong into the environment")])
def test_an_address_that_is_none_is_refused_without_showing_a_password(url, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(url, "m")
    assert "secret" not in str(caught.value)


def judged(server, file=None, parallel=4, **settings):
    asked = endpoint(server, **settings)
    pool = {"llm": LLMJudge(asked)}
    return compare(TASKS, GOOD, BAD, pool, file=file, parallel=parallel), asked


def good_wins(body) -> str:
    """What an honest LLM would say to the prompt."""
    prompt = body["messages"][0]["content"]
    first = re.search(r"answer 1.\ngood", prompt) is not None
    return f"Verdict: {1 if first else 2}"


def test_every_kind_of_trouble_at_once_changes_no_judgement(serve):
    script = ["slow", 429, "malformed", 500, "truncated", "reset", "wait", "no choices", 503] * 3
    random.Random(0).shuffle(script)
    server = serve(*script, answer=good_wins)
    records, asked = judged(server, retries=12)
    assert [r["preference"] for r in records] == [2.0] * 40
    assert asked.calls == 40 + len(script) and asked.retries_made == len(script) and server.most <= 4


def test_an_interrupted_evaluation_pays_for_nothing_twice(serve, tmp_path):
    server, file = serve(*["ok"] * 15, 401, answer=good_wins), tmp_path / "judgements.jsonl"
    with pytest.raises(EndpointError, match="HTTP 401"):
        judged(server, file)
    paid = len(file.read_text().splitlines())
    assert 15 <= paid < 40  # those under way when the 401 came are kept too
    records, _ = judged(server, file)
    good = [json.dumps(body) for what, _, body in server.seen if what == "ok"]
    assert len(good) == len(set(good)) == 40 and [r["preference"] for r in records] == [2.0] * 40


def test_answers_that_cannot_be_read_are_left_out_counted_and_not_asked_again(serve, tmp_path):
    def hesitates(body):
        return "I like both." if "Question 1" in body["messages"][0]["content"] else good_wins(body)

    server, file = serve(answer=hesitates), tmp_path / "judgements.jsonl"
    records, _ = judged(server, file)
    left_out = [r["preference"] is None for r in records]
    assert sum(left_out) == 11 and "11 with an unreadable judgement" in summary(records)  # 1 and 10 to 19
    judged(server, file)
    assert len(server.seen) == 40


def test_an_answer_without_text_is_unreadable_and_not_an_error(serve):
    records, _ = judged(serve(*["empty"] * 40))
    assert all(r["preference"] is None and r["answer"] == "" for r in records)


def test_another_prompt_or_model_is_another_judge(serve, tmp_path):
    server, file = serve(answer=good_wins), tmp_path / "judgements.jsonl"
    cold, warm = endpoint(server), endpoint(server, temperature=1)
    for judge in (LLMJudge(cold), LLMJudge(cold, PROMPT + " "), LLMJudge(warm)):
        compare(TASKS[:3], GOOD[:3], BAD[:3], {"llm": judge}, file=file)
    assert len(server.seen) == 9


def test_no_key_reaches_any_file(serve, tmp_path):
    judged(serve(), tmp_path / "judgements.jsonl", key="sk-secret")
    assert "sk-secret" not in (tmp_path / "judgements.jsonl").read_text()
    assert "sk-secret" not in repr(Endpoint("http://127.0.0.1:9/v1", "m", key="sk-secret"))


# --- pools -------------------------------------------------------------------------------------------------------------


def test_a_pool_file_names_models_prompts_and_temperatures(serve, tmp_path):
    server, file = serve(answer=good_wins), tmp_path / "pool.json"
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
