# SPDX-License-Identifier: MIT
"""The server behind LLM judges: chat completions from an OpenAI-compatible endpoint, whatever it does to us.

    endpoint = Endpoint("https://api.openai.com/v1", "gpt-4o-mini", key=os.environ["OPENAI_API_KEY"])
    answer = endpoint.ask("Which is better?")                        # text, what it cost, whether it is whole
    texts = endpoint.ask_all(prompts, file=Path("facts.jsonl"))      # None where there is no whole answer

Four kinds of trouble: a busy or broken server is asked again, later each time; a parameter that a model refuses is sent under
its other name or left away; a refusal that belongs to one prompt (content filter, too long) is that prompt's answer; anything
else (no such model, a wrong key) ends in one line.
"""

import json
import math
import random
import re
import threading
from collections.abc import Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from data import whole_characters
from evaluation.judges import EndpointError, losses, resumable


class Answer(NamedTuple):
    """What a server said to a prompt, in the order of judges.Verdict's fields."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    cut: str = ""      # why it is not whole: "length" or "content_filter"
    refused: str = ""  # the server's words, where it refuses this prompt


RETRIED = {408, 409, 425, 429}     # and 5xx: the request was in order, and may succeed later
REFUSED = {400, 403, 413, 422}     # may belong to the prompt: judges.resumable stops where every prompt is refused
# Why an answer is not whole, by the finish_reason of OpenAI's and other servers.
CUT = {"length": "length", "max_tokens": "length", "model_length": "length", "content_filter": "content_filter",
       "safety": "content_filter"}
# A prompt that can never be answered, whatever status comes with it: some servers say 500 or 429 to one that is too long.
UNANSWERABLE = re.compile(r"context[ _](?:length|size|window)|content[ _](?:filter|management|policy)|"
                          r"\b(?:prompt|input|request) (?:is )?too (?:long|large)", re.IGNORECASE)
# A parameter that a model doesn't know, or allows one value of; a value that is out of bounds is not that.
UNSUPPORTED = re.compile(r"unsupported|(?:not|n't) (?:be )?(?:support|permit|allow|accept|recogni)|unrecogni|unknown|unexpected|"
                         r"extra[ _](?:inputs|fields|forbidden)|invalid (?:param|argument|field)|deprecated|"
                         r"only (?:the default|[\d.]+ )|strictly positive|greater than 0|> 0", re.IGNORECASE)
OUT_OF_BOUNDS = re.compile(r"too (?:long|large|many)|larger|exceed|at most|up to", re.IGNORECASE)


class Endpoint:
    """Chat completions from an OpenAI-compatible server, through huggingface_hub's client; several threads may ask.

    base_url ends where "/chat/completions" begins, often in /v1. timeout: seconds without a byte. A request that met a
    busy or broken server is repeated up to `retries` times, after wait · 2^k seconds or what the server asks for. The
    key goes into the request's header and nowhere else: no message holds it. Raises EndpointError.
    """

    def __init__(self, base_url: str, model: str, *, key: str | None = None, temperature: float = 0.0, max_tokens: int = 300,
                 timeout: float = 120.0, retries: int = 6, wait: float = 1.0):
        from huggingface_hub import InferenceClient

        try:
            url = urlsplit(base_url)
            right = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:
            right = False
        if not right:
            raise ValueError(f"--base-url {base_url!r}: must be an address such as http://127.0.0.1:8000/v1")
        if url.username or url.password:
            raise ValueError("--base-url holds a user name or password: keys belong into the environment")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("the endpoint's key holds characters that no header may carry")
        self.base_url, self.model, self.temperature, self.max_tokens = base_url, model, temperature, max_tokens
        self.retries, self.wait, self.key = retries, wait, key
        self.calls = self.retries_made = self.tokens_in = self.tokens_out = 0
        # What is sent beside model and messages; None is left away. Replaced as a whole, so that threads read it unlocked.
        self._parameters: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "stream": False}
        self._lock, self._given_up = threading.Lock(), threading.Event()
        # Without a key the client would send the user's Hugging Face token, to whatever server this is.
        self._client = InferenceClient(base_url=base_url, api_key=key or "none", timeout=timeout)

    def ask(self, prompt: str) -> Answer:
        """The answer to one user message, or the server's refusal of it."""
        configured = parameters = self._parameters
        attempt, again = 0, False
        while True:
            if self._given_up.is_set():  # another thread found that the server can't be used
                raise EndpointError(f"{self.base_url}: given up")
            with self._lock:
                self.calls += 1
                self.retries_made += again
            try:
                answer = read_completion(self._client.chat_completion(
                    [{"role": "user", "content": prompt}], model=self.model, extra_body=parameters))
            except Exception as error:  # httpx, huggingface_hub, json and malformed answers each raise their own kinds
                status, words = read_error(error)
                again = False
                if status in (400, 422) and (name := refused_parameter(words, parameters)):
                    parameters = without(parameters, name)
                elif status in REFUSED or status not in (None, 401, 404) and UNANSWERABLE.search(words):
                    return Answer("", refused=self._describe(status, words, attempt))
                elif status is not None and status < 500 and status not in RETRIED or attempt == self.retries:
                    self._given_up.set()
                    raise EndpointError(self._describe(status, words, attempt)) from None
                else:
                    self._given_up.wait(self._pause(error, attempt))
                    attempt, again = attempt + 1, True
            else:
                if parameters is not configured:  # not before it helped: the words of a refusal may have been misread
                    self._adopt(parameters)
                with self._lock:
                    self.tokens_in += answer.tokens_in
                    self.tokens_out += answer.tokens_out
                return answer

    def ask_all(self, prompts: Sequence[str], *, file: Path | None = None, parallel: int = 8, desc: str = "asking"
                ) -> list[str | None]:
        """The answers to many, in order, through `resumable`; None where one was cut off or refused, which is said."""

        def work(prompt: str) -> dict:
            answer = self.ask(prompt)
            return {"prompt": prompt, "answer": answer.text, "annotator": self.model, "tokens_in": answer.tokens_in,
                    "tokens_out": answer.tokens_out, "cut": answer.cut, "refused": answer.refused}

        records = resumable(prompts, work, lambda prompt: [self.identity, prompt], file=file, parallel=parallel, desc=desc,
                            unit="answer", endpoints=[self])
        if lost := losses(records, [self]):
            tqdm.write(f"{desc}, {len(records)} prompts: {lost}")
        return [None if record.get("cut") or record.get("refused") else record["answer"] for record in records]

    def stop(self) -> None:
        """No thread tries again or asks anything new."""
        self._given_up.set()

    @property
    def identity(self) -> list:
        """What, beside the prompt, decides an answer: the settings as configured, whatever the model then takes of them."""
        return [self.model, self.temperature, self.max_tokens]

    def _adopt(self, parameters: dict[str, Any]) -> None:
        """What helped one request is sent with all from now on, and said once."""
        with self._lock:
            gone = [name for name, value in self._parameters.items() if value is not None and parameters.get(name) is None]
            self._parameters = parameters
        renamed = parameters.get("max_completion_tokens") is not None
        for name in gone:
            instead = "it is sent as max_completion_tokens" if name == "max_tokens" and renamed else "it is left away"
            tqdm.write(f"--base-url {self.base_url}: {self.model} refuses {name}: {instead}")

    def _pause(self, error: Exception, attempt: int) -> float:
        """Seconds until the next attempt: what the server asked for, else twice as long each time, with some chance so that
        threads which failed together don't come back together."""
        asked = seconds_asked(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", ""))
        return min(asked, 120.0) if asked >= 0 else min(60.0, self.wait * 2**attempt) * random.uniform(0.75, 1.25)

    def _describe(self, status: int | None, words: str, attempt: int) -> str:
        """One line without the key: the server's own words where it has any."""
        what = " ".join(words.split())
        what = f"HTTP {status}: {what}" if status else what
        if self.key:
            what = what.replace(self.key, "[key]")
        advice = {401: " (is the right key in OPENAI_API_KEY?)",
                  404: f" (has it a model {self.model!r}, and does its address end in /v1?)"}.get(status, "")
        tries = f" after {attempt + 1} attempts" if attempt else ""
        return f"--base-url {self.base_url}: no answer{tries}: {what[:300]}{advice}"


# ------------------------------------------------------------------------------------------------- what a server may say


class ServerError(ValueError):
    """An error that came in place of an answer, with status 200; `status` is what it says of itself."""

    def __init__(self, error: Any):
        super().__init__(json.dumps(error, ensure_ascii=False))
        code = str(error.get("code")) if isinstance(error, dict) else ""
        self.status = int(code) if re.fullmatch("[45][0-9][0-9]", code) else None


def read_completion(completion: Any) -> Answer:
    """Text and token counts of a chat completion. Raises ValueError where the server sent something else."""
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    error = getattr(completion, "error", None) or getattr(choice, "error", None)
    if error or getattr(completion, "object", None) == "error":
        raise ServerError(error or completion)
    reason = getattr(choice or completion, "finish_reason", None)
    if choice is None and getattr(completion, "prompt_filter_results", None):  # Azure's filter, before anything was written
        reason = "content_filter"
    cut, message = CUT.get(str(reason).lower(), ""), getattr(choice, "message", None)
    if message is None and not cut or reason == "error":
        raise ValueError("the server's answer is no chat completion")
    text = getattr(message, "content", None)
    if isinstance(text, list):  # parts, some of which are thoughts
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict) and part.get("type") == "text")
    if not isinstance(text, str | None):
        raise ValueError("the server's answer holds no text")
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    return Answer(whole_characters(text or ""), *(n if isinstance(n, int) else 0 for n in counts), cut)


def read_error(error: Exception) -> tuple[int | None, str]:
    """(status, words) of whatever went wrong: the server's own words where it has any."""
    response = getattr(error, "response", None)
    try:
        words = response.text
    except Exception:  # no response, or one whose body was never read
        words = ""
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    if isinstance(error, json.JSONDecodeError):
        words = f"no JSON but {error.doc[:200]!r}"
    if not words.strip():
        words = str(error) if status else f"{type(error).__name__}: {error}"
    return status, whole_characters(words)


def said(body: Any) -> str:
    """The texts of an error that speak about the request, parameter first; not what it repeats of the request itself."""
    if isinstance(body, dict):
        fields = ("param", "error", "detail", "errors", "loc", "message", "msg", "type", "code")
        return " ".join(said(body[name]) for name in fields if name in body)
    return " ".join(map(said, body)) if isinstance(body, list) else body if isinstance(body, str) else ""


def refused_parameter(words: str, parameters: dict[str, Any]) -> str | None:
    """The parameter that a server says it doesn't support, the first named of those that were sent."""
    try:
        words = said(json.loads(words))
    except (ValueError, RecursionError):
        pass
    if not UNSUPPORTED.search(words) or UNANSWERABLE.search(words) or OUT_OF_BOUNDS.search(words):
        return None
    places = {name: re.search(rf"(?<!\w){name}(?!\w)", words) for name, value in parameters.items() if value is not None}
    return min((place.start(), name) for name, place in places.items() if place)[1] if any(places.values()) else None


def without(parameters: dict[str, Any], name: str) -> dict[str, Any]:
    """The parameters without one; max_tokens first goes under its newer name."""
    return parameters | {name: None} | ({"max_completion_tokens": parameters[name]} if name == "max_tokens" else {})


def seconds_asked(retry_after: str) -> float:
    """The seconds of a Retry-After header, which may be a date; nan where it says nothing."""
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
        return math.nan
