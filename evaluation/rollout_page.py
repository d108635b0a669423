# SPDX-License-Identifier: MIT
"""A response token by token, to be looked at: tables for a terminal of 80 columns, and one HTML page (rollout.html, filled).

facts are those of the run (run, estimator, instruction, gamma, ...), a moment is what evaluation/rollout.py takes of a
checkpoint. The page holds all numbers as JSON and loads nothing from anywhere; every text gets into it as text.
"""

import html
import json
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluation.results import FORMULAS, NAMES

Moment = dict[str, Any]
TEMPLATE = Path(__file__).with_name("rollout.html")


def page(facts: dict[str, Any], moments: Sequence[Moment]) -> str:
    """The whole page."""
    estimators = {name: {"name": NAMES.get(name, name), "formula": FORMULAS.get(name, "")} for name in moments[0]["by"]}
    content = json.dumps(rounded({"facts": facts, "estimators": estimators, "moments": moments}), ensure_ascii=False)
    content = content.replace("<", "\\u003c")  # "</script>" or "<!--" in a response would end the data
    title = html.escape(f"{facts['run']}: one response, token by token")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", title).replace("{{content}}", content)


def rounded(content: Any) -> Any:
    """With numbers of six digits, more than are shown."""
    if isinstance(content, dict):
        return {name: rounded(x) for name, x in content.items()}
    if isinstance(content, (list, tuple)):
        return [rounded(x) for x in content]
    return float(f"{content:.6g}") if isinstance(content, float) else content


# ------------------------------------------------------------------------------------------------------------- terminal


def table(facts: dict[str, Any], moment: Moment) -> str:
    """What happened to the response at one checkpoint: four tables, the first two along Eq. 3, GAE and Eq. 2."""
    own, beta, tokens = moment["by"][facts["estimator"]], moment["beta"], moment["tokens"]
    score = [""] * (len(tokens) - 1) + [fit(moment["judged"])]
    clipped = ["clipped" if is_clipped(token["ratio"], advantage, facts["cliprange"]) else ""
               for token, advantage in zip(tokens, own["advantage"], strict=True)]
    end = "" if moment["finished"] else ", which did not come to its end"
    name = NAMES.get(facts["estimator"], facts["estimator"])
    by_estimator = {SHORT.get(name, name)[:8]: found["penalty"] for name, found in moment["by"].items() if name != "none"}
    parts = [
        f"step {moment['step']} of {facts['run']}, response {facts['row']} of the batch that follows{end}",
        f"instruction: {' '.join((facts['instruction'] + ' ' + facts['input']).split())}", "",
        f"Penalty and reward (Eq. 3): {name}, β {beta:g}, score {fit(moment['score'])}",
        f"rewards are scaled by {fit(own['scale'])}, one over the batch's deviation", "",
        columns(tokens, {"log π": of(tokens, "logprob"), "log ref": of(tokens, "ref_logprob"), "true KL": of(tokens, "true_kl"),
                         "penalty": own["penalty"], "β·pen.": [beta * x for x in own["penalty"]], "score": score,
                         "reward": own["reward"]}), "",
        f"Advantage (GAE, λ {facts['lam']:g}), and ratio after the update (Eq. 2)",
        f"adv. is GAE less {fit(own['mean'])}, over {fit(own['deviation'])}: mean and deviation of the batch",
        "the learning rate is 0: this update moves nothing" if not moment["learning_rate"] else "",
        columns(tokens, {"value": of(tokens, "value"), "δ": own["delta"], "GAE": own["gae"], "adv.": own["advantage"],
                         "return": own["returns"], "ratio": of(tokens, "ratio"), "": clipped}), "",
        "The penalty under every estimator", "",
        columns(tokens, by_estimator), "",
        "The likeliest other tokens, in % under policy/reference", "", *others(tokens)]
    return "\n".join(line for part in parts for line in (textwrap.wrap(part, 80) if "\n" not in part and part else [part]))


SHORT = {"clamped_kl": "clamped", "kl": "KL", "bregman": "Bregman", "squared_error": "squared", "jensen_shannon": "Jensen-S",
         "negative_kl": "−KL"}


def is_clipped(ratio: float, advantage: float, cliprange: float) -> bool:
    """Whether Eq. 2's minimum is the clipped one, from which no gradient comes."""
    return min(max(ratio, 1 - cliprange), 1 + cliprange) * advantage < ratio * advantage


def of(tokens: Sequence[dict], name: str) -> list[float]:
    return [token[name] for token in tokens]


def columns(tokens: Sequence[dict], given: dict[str, Sequence[float | str]]) -> str:
    """Number and text of every token, and a column of numbers for each name, in 80 columns."""
    wide = (80 - 16) // len(given)
    lines = ["  t token     " + "".join(pad(name, wide, str.rjust) for name in given)]
    for t, (token, *values) in enumerate(zip(tokens, *given.values(), strict=True)):
        cells = (pad(x if isinstance(x, str) else fit(x), wide, str.rjust) for x in values)
        lines.append(f"{t:3d} {pad(plain(token['text']), 10)}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def others(tokens: Sequence[dict]) -> list[str]:
    """A line a token, as many of the others as 80 columns hold."""
    lines = []
    for t, token in enumerate(tokens):
        line = f"{t:3d} {pad(plain(token['text']), 10)} "
        for text, probability, reference in token["others"]:
            entry = f" {plain(text)} {100 * probability:.1f}/{100 * reference:.1f}"
            line += entry if width(line + entry) <= 80 else ""
        lines.append(line)
    return lines


def fit(x: float) -> str:
    """Three decimals, or an exponent of what is too large for a column."""
    return f"{round(x, 3) + 0.0:.3f}" if abs(x) < 1000 else f"{x:.0e}"  # + 0.0: no -0


def plain(text: str) -> str:
    """Of one line, with a dot for a space at its head."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    text = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" else c for c in text)
    return "·" * (len(text) - len(text.lstrip(" "))) + text.lstrip(" ")


def width(text: str) -> int:
    """Columns on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def pad(text: str, columns: int, align: Callable[[str, int], str] = str.ljust) -> str:
    """The text cut or filled to that many columns."""
    while width(text) > columns:
        text = text[:-2] + "…"
    return align(text, columns - width(text) + len(text))
