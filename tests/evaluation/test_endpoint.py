"""What endpoint.py promises: patience with a server that misbehaves, nothing paid for twice, no prompt that ends all."""

import json
import math
import random
import re
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from evaluation.endpoint import Answer, Endpoint, refused_parameter, seconds_asked
from evaluation.judges import PROMPT, EndpointError, LLMJudge, compare, summary

TASKS = [{"instruction": f"Question {i}?", "input": "some text" if i % 3 == 0 else ""} for i in range(40)]
GOOD = [f"good answer {i}" for i in range(40)]
BAD = [f"bad answer {i}" for i in range(40)]


# --- a server that misbehaves ------------------------------------------------------------------------------------------


def endpoint(server, **settings) -> Endpoint:
    return Endpoint(server.url, "judge-1", **({"wait": 0.01, "timeout": 30, "retries": 4} | settings))


def test_a_request_is_the_openai_protocols(serve):
    server = serve()
    answer = endpoint(server, key="sk-secret", temperature=0.5, max_tokens=9).ask("Which one?")
    assert answer == Answer("The first. Verdict: 1", 11, 4)
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
    asked = endpoint(server, timeout=0.5)
    assert asked.ask("x").text.endswith("Verdict: 1")
    assert [what for what, *_ in server.seen] == [trouble, "ok"]
    assert (asked.calls, asked.retries_made, asked.tokens_in, asked.tokens_out) == (2, 1, 11, 4)


def test_a_date_to_retry_after_is_understood_and_nonsense_is_not():
    soon = datetime.now(timezone.utc) + timedelta(seconds=30)
    assert 28 <= seconds_asked(format_datetime(soon, usegmt=True)) <= 30
    assert seconds_asked(format_datetime(soon - timedelta(days=1), usegmt=True)) == 0 and seconds_asked("0.3") == 0.3
    assert all(math.isnan(seconds_asked(text)) for text in ("", "soon", "Sat, 99 Foo 2020 00:00:00 GMT"))


def test_retry_after_is_obeyed(serve):
    server, start = serve("wait"), time.monotonic()
    endpoint(server).ask("x")
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("status", [401, 404])
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
    records, asked = judged(server, retries=12, timeout=1.5)
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


# --- a refusal that belongs to one prompt ------------------------------------------------------------------------------


FILTERED = {"status": 400, "body": {"error": {"message": "blocked by the content filter", "code": "content_filter"}}}


def refuses(which, how=FILTERED):
    """A server that refuses the pairs of some questions and judges the others."""
    return lambda body: how if re.search(which, body["messages"][0]["content"]) else good_wins(body)


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_refused_prompt_is_asked_once_and_its_reason_hides_the_key(serve, status):
    server = serve(status)
    answer = endpoint(server, key="sk-secret").ask("x")
    assert len(server.seen) == 1 and answer.text == "" and f"HTTP {status}: " in answer.refused
    assert f"trouble {status}" in answer.refused and "sk-secret" not in answer.refused and "\n" not in answer.refused


@pytest.mark.parametrize("how", [
    {"status": 500, "body": {"error": {"message": "the request exceeds the available context size", "code": 500}}},
    {"status": 429, "body": {"error": {"message": "Request too large for m on tokens per min: Limit 100, Requested 200"}}},
    {"body": {"error": {"message": "maximum context length is 1024 tokens", "code": 400}}}])
def test_a_prompt_that_can_never_be_answered_is_not_asked_again_whatever_its_status(serve, how):
    server = serve(answer=how)
    assert endpoint(server).ask("x").refused and len(server.seen) == 1


def test_a_refused_pair_is_left_out_counted_and_asked_again_the_next_time(serve, tmp_path):
    server, file = serve(answer=refuses("Question 1")), tmp_path / "judgements.jsonl"
    records, asked = judged(server, file)
    refused = [r for r in records if r.get("refused")]
    assert len(refused) == 11 and all(r["preference"] is None for r in refused)  # 1 and 10 to 19
    assert [r["preference"] for r in records if not r.get("refused")] == [2.0] * 29
    said = summary(records, [asked])
    assert "0 with an unreadable judgement" in said and "11 refused by the server" in said and "blocked by the content" in said
    assert len(file.read_text().splitlines()) == 29
    server.answer = good_wins
    assert [r["preference"] for r in judged(server, file)[0]] == [2.0] * 40 and len(server.seen) == 51


def test_pairs_that_are_refused_again_are_no_server_that_refuses_everything(serve, tmp_path):
    server, file = serve(answer=refuses("Question [12]")), tmp_path / "judgements.jsonl"
    for _ in range(2):
        records, _ = judged(server, file, parallel=1)
    assert sum(bool(r.get("refused")) for r in records) == 22


@pytest.mark.parametrize(("pairs", "requests"), [(40, 10), (3, 3)])
def test_a_server_that_refuses_everything_stops_the_evaluation_with_its_words(serve, tmp_path, pairs, requests):
    server = serve(answer={"status": 400, "body": {"error": {"message": "no model judge-1"}}})
    with pytest.raises(EndpointError, match="no model judge-1.*so were all"):
        compare(TASKS[:pairs], GOOD[:pairs], BAD[:pairs], {"llm": LLMJudge(endpoint(server))}, file=tmp_path / "log.jsonl")
    assert len(server.seen) == requests and not (tmp_path / "log.jsonl").exists()


def test_one_judge_of_a_pool_that_refuses_everything_is_not_hidden_by_the_others(serve, tmp_path):
    good, bad = serve(answer=good_wins), serve(answer=FILTERED)
    with pytest.raises(EndpointError, match="content filter"):
        compare(TASKS, GOOD, BAD, {"a": LLMJudge(endpoint(good)), "b": LLMJudge(endpoint(bad))}, file=tmp_path / "log.jsonl")


def test_prompts_that_are_refused_or_cut_off_have_no_answer_among_many(serve, tmp_path, capsys):
    def answer(body):
        prompt = body["messages"][0]["content"]
        return FILTERED if prompt == "b" else {"text": prompt.upper(), "finish_reason": "length" if prompt == "c" else "stop"}

    server = serve(answer=answer)
    asked = endpoint(server, max_tokens=77)
    for requests in (4, 5):  # the refused one is asked again
        assert asked.ask_all(["a", "b", "c", "d"], file=tmp_path / "facts.jsonl", desc="facts") == ["A", None, None, "D"]
        assert len(server.seen) == requests
    said = capsys.readouterr().out
    assert "facts, 4 prompts: 1 cut off at 77 tokens" in said and "1 refused by the server" in said


# --- parameters that a model refuses -----------------------------------------------------------------------------------


def openai(name, value=None):
    words = {"max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
             "instead.", "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only the default "
             "(1) value is supported."}[name]
    return {"status": 400, "body": {"error": {"message": words, "type": "invalid_request_error", "param": name, "code": None}}}


def pydantic(name, value):
    return {"status": 422, "body": {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "input": value,
                                                "msg": "Extra inputs are not permitted"}]}}


def vllm(name, value):
    return {"status": 400, "body": {"object": "error", "code": 400, "message": f"[{{'type': 'extra_forbidden', 'loc': ('body', "
                                    f"'{name}'), 'msg': 'Extra inputs are not permitted', 'input': {value}}}]"}}


def strict(how, *names):
    """A server that judges nothing while one of these parameters is sent."""
    def answer(body):
        return next((how(name, body[name]) for name in names if name in body), None) or good_wins(body)
    return answer


@pytest.mark.parametrize(("how", "names", "sent"), [
    (openai, ["max_tokens"], {"max_completion_tokens": 300, "temperature": 0.0, "stream": False}),
    (openai, ["temperature"], {"max_tokens": 300, "stream": False}),
    (openai, ["temperature", "max_tokens"], {"max_completion_tokens": 300, "stream": False}),
    (pydantic, ["max_tokens", "max_completion_tokens"], {"temperature": 0.0, "stream": False}),
    (vllm, ["stream", "temperature", "max_tokens", "max_completion_tokens"], {})])
def test_a_parameter_that_a_model_refuses_is_sent_otherwise_or_left_away(serve, capsys, how, names, sent):
    server = serve(answer=strict(how, *names))
    records, asked = judged(server, parallel=1, retries=0)
    assert [r["preference"] for r in records] == [2.0] * 40
    assert {name: v for name, v in server.seen[-1][2].items() if name not in ("model", "messages")} == sent
    assert len(server.seen) == asked.calls == 40 + len(names)  # refused by the first request, never sent again
    assert (asked.retries_made, asked.tokens_in) == (0, 40 * 11) and asked.identity == ["judge-1", 0.0, 300]
    said = capsys.readouterr().out
    assert all(said.count(f"refuses {name}:") == 1 for name in names if name != "max_completion_tokens")


def test_threads_share_what_a_model_takes(serve, capsys):
    server = serve(answer=strict(openai, "max_tokens", "temperature"))
    records, asked = judged(server, parallel=8)
    assert [r["preference"] for r in records] == [2.0] * 40 and asked.calls <= 40 + 2 * 8
    assert capsys.readouterr().out.count("refuses") == 2


def test_a_prompt_that_is_too_long_is_no_refused_parameter(serve):
    words = "'max_tokens' or 'max_completion_tokens' is too large: 300. This model's maximum context length is 1024 tokens"
    server = serve(answer=refuses(r"Question 1\?", {"status": 400, "body": {"error": {"message": words, "param": "max_tokens"}}}))
    records, _ = judged(server)
    assert [bool(r.get("refused")) for r in records].count(True) == 1 and len(server.seen) == 40


def test_a_refusal_that_only_sounds_like_a_parameters_changes_nothing_for_others(serve):
    words = "the prompt asks for a temperature, which is not supported"
    server = serve(answer=refuses(r"Question 1\?", {"status": 400, "body": {"error": words}}))
    records, _ = judged(server, parallel=1)
    assert [bool(r.get("refused")) for r in records].count(True) == 1
    assert all("temperature" in body for *_, body in server.seen if "Question 1?" not in body["messages"][0]["content"])


@pytest.mark.parametrize(("words", "name"), [
    ("litellm.UnsupportedParamsError: m doesn't support parameters: ['temperature']", "temperature"),
    ('{"error": "Input validation error: `temperature` must be strictly positive", "error_type": "validation"}', "temperature"),
    ('{"error": {"message": "Unrecognized request argument supplied: stream", "param": null}}', "stream"),
    ('{"error": {"message": "invalid temperature: only 1 is allowed for this model"}}', "temperature"),
    ('{"error": {"message": "temperature must be at most 1"}}', None),
    ('{"error": {"message": "m does not support max_tokens larger than 256"}}', None),
    ('{"error": {"message": "max_tokens beyond the context length is not supported"}}', None),
    ('{"error": {"message": "max_tokens is too large: 300. This model supports at most 256 completion tokens"}}', None),
    ('{"detail": [{"loc": ["body", "messages"], "msg": "not allowed", "input": {"temperature": 0}}]}', None),
    ('{"error": {"message": "Unsupported parameter: \'max_completion_tokens\'"}}', None)])
def test_the_refused_parameter_is_the_one_named_as_unsupported(words, name):
    assert refused_parameter(words, {"temperature": 0.0, "max_tokens": 300, "stream": False}) == name


# --- answers that are not whole, and errors in place of one ------------------------------------------------------------


@pytest.mark.parametrize("reason", ["length", "content_filter", "max_tokens"])
def test_an_answer_that_was_cut_off_is_no_vote_even_with_a_verdict(serve, tmp_path, reason):
    server, file = serve(answer=lambda body: {"text": good_wins(body), "finish_reason": reason}), tmp_path / "judgements.jsonl"
    for _ in range(2):
        records, asked = judged(server, file, max_tokens=7)
        assert all(r["preference"] is None for r in records) and len(server.seen) == 40
    said = summary(records, [asked])
    assert "40 with an unreadable judgement" in said
    assert ("40 cut off by the server's content filter" if reason == "content_filter" else "40 cut off at 7 tokens") in said
    assert "max_tokens in --judge-pool" in said or reason == "content_filter"


@pytest.mark.parametrize("body", [
    {"choices": [{"index": 0, "finish_reason": "content_filter", "message": {"role": "assistant", "content": None}}]},
    {"choices": [{"index": 0, "finish_reason": "content_filter"}]},
    {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}])
def test_a_filtered_answer_is_unreadable_and_not_an_error(serve, body):
    assert endpoint(serve(answer={"body": body}), retries=0).ask("x") == Answer("", cut="content_filter")


def test_half_a_pair_of_surrogates_does_not_lose_what_was_paid(serve, tmp_path):
    server, file = serve(answer=lambda body: "\ud83d " + good_wins(body)), tmp_path / "judgements.jsonl"
    records, _ = judged(server, file)
    assert {r["answer"][0] for r in records} == {"\ufffd"} and [r["preference"] for r in records] == [2.0] * 40
    assert endpoint(server).ask_all(["x"], file=tmp_path / "facts.jsonl")[0].startswith("\ufffd")
    server.answer = {"body": {"error": {"message": "no \ud83d here", "code": 400}}}
    endpoint(server).ask("x").refused.encode()


def test_of_an_answer_in_parts_the_text_is_read(serve):
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Verdict: 1"}]}, {"type": "text", "text": "Verdict: 2"}]
    body = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": parts}}]}
    assert endpoint(serve(answer={"body": body})).ask("x").text == "Verdict: 2"


@pytest.mark.parametrize(("body", "words"), [
    ({"error": {"message": "upstream is down", "code": 502}}, "after 2 attempts: HTTP 502: .*upstream is down"),
    ({"error": "upstream is down"}, "after 2 attempts: .*upstream is down"),
    ({"object": "error", "message": "no such user", "code": 401}, "no answer: HTTP 401: .*no such user"),
    ({"choices": [{"error": {"message": "cut", "code": 503}, "finish_reason": "error"}]}, "after 2 attempts: HTTP 503"),
    ({"choices": [{"finish_reason": "error", "message": {"content": "Verd"}}]}, "after 2 attempts: "),
    ([], "after 2 attempts: ")])
def test_an_error_in_place_of_an_answer_is_told_in_the_servers_words(serve, body, words):
    said = [{"body": body}, "Verdict: 1"]
    assert words.startswith("no answer") or endpoint(serve(answer=lambda _: said.pop(0))).ask("x").text == "Verdict: 1"
    with pytest.raises(EndpointError, match=words):
        endpoint(serve(answer={"body": body}), retries=1).ask("x")


def test_a_page_in_place_of_an_answer_is_shown(serve):
    with pytest.raises(EndpointError, match="no JSON but '<html>gateway</html>'"):
        endpoint(serve("malformed", "malformed"), retries=1).ask("x")
