# SPDX-License-Identifier: MIT
"""What an evaluation leaves in a folder, written and read again.

    evaluation.json                      figures, responses and preferences of every policy, once for all settings it was measured
                                         under: a quick look with other settings stands beside the benchmark, not in its place
    judgements.jsonl, facts.jsonl        every answer of a judge, as it came: read first, so that none is paid for twice
    outputs/<name>/annotations.json      the judgements of one policy, in AlpacaEval's form
    outputs/<name>/model_outputs.json    for the alpaca_eval tool, as is outputs/reference_outputs.json
    outputs/<name>/factscore.jsonl       for FActScore, with --topics

Runs that differ in nothing but their seed are one configuration, as in the paper's Table 1.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data import read_text
from divergences import ALIASES
from evaluation.judges import whole_instruction
from evaluation.measure import Benchmark
from evaluation.statistics import mean_and_error, paired_difference, paired_mean_difference, paired_ratio_difference
from formats.write import write_json, write_text
from training.folder import read_lines

NAMES = {"clamped_kl": "Clamped KL", "kl": "KL", "bregman": "Bregman", "squared_error": "Squared error",
         "jensen_shannon": "Jensen-Shannon", "none": "No regularization", "negative_kl": "Negative KL"}
FORMULAS = {"clamped_kl": "max(0, log π − log π_ref)", "kl": "log π − log π_ref", "bregman": "π_ref/π − 1 − log(π_ref/π)",
            "squared_error": "½ (log π − log π_ref)²",
            "jensen_shannon": "½ max(0, log π − log m) + ½ max(0, log π_ref − log m), m = ½(π + π_ref)", "none": "–",
            "negative_kl": "log π_ref − log π"}
# What two runs of one configuration may differ in.
PER_RUN = ("out", "seed", "save_every", "eval_every", "policy_device", "reference_device", "micro_batch_size",
           "rollout_micro_batch_size", "gradient_checkpointing", "baseline", "shard", "compile", "log_to")


# -------------------------------------------------------------------------------------------------------------- writing


def measured_before(folder: Path) -> dict[str, dict]:
    """What evaluation.json holds. Raises ValueError for a damaged one: it may have cost much, and would be written over."""
    file = folder / "evaluation.json"
    if not file.is_file():
        return {}
    found = read_object(file)
    if not all(isinstance(result, dict) for result in found.values()):
        raise ValueError(f"{file}: holds something other than evaluations by name: repair it or move it away")
    return found


def result_name(older: dict[str, dict], policy: str, settings: dict[str, Any]) -> str:
    """Under which name evaluation.json holds a policy that was measured with these settings: its own, or, where that belongs to
    other settings, one that says what is different."""
    for name, result in older.items():
        if result.get("policy", name) == policy and same_settings(result, settings):
            return name
    if policy not in older:
        return policy
    others = settings_of(older[policy])
    changed = [f"{key}-{value}" for key, value in settings.items() if key != "digest" and others.get(key) != value]
    name = re.sub(r"[^\w.]+", "-", "-".join([policy, *changed] if changed else [policy, "other-data"])).strip("-")
    return next(n for n in (name, *(f"{name}-{k}" for k in range(2, 10**6))) if n not in older)


def settings_of(result: dict) -> dict[str, Any]:
    """What a result was measured under; older versions stored three of the settings."""
    return result.get("settings") or {key: result.get(key) for key in ("data", "n", "judge")}


def same_settings(result: dict, settings: dict[str, Any]) -> bool:
    own = settings_of(result)
    return all(own[key] == settings.get(key) for key in own) and (len(own) == len(settings) or "settings" not in result)


def settings_in_words(result: dict) -> str:
    """The settings that a reader of a table asks for."""
    own = settings_of(result)
    left_out = f", {result['left_out']} left out as too long" if result.get("left_out") else ""
    return f"{own.get('n')} instructions of {own.get('data')}{left_out}, judge {own.get('judge') or 'none'}"


def write_outputs(folder: Path, name: str, benchmark: Benchmark, result: dict) -> None:
    """What other evaluators read: alpaca_eval (its --model_outputs and --reference_outputs) and FActScore."""
    def entry(task: dict, output: str, generator: str) -> dict:
        return {"instruction": whole_instruction(task), "output": output, "generator": generator,
                "dataset": task.get("dataset", "evaluation")}

    tasks, outputs, generator = benchmark.tasks, folder / "outputs" / name, f"{folder.resolve().name} {name}"
    outputs.mkdir(parents=True, exist_ok=True)
    answered = [entry(task, text, generator) for task, text in zip(tasks, result["responses"], strict=True)]
    write_json(outputs / "model_outputs.json", answered, indent=1)
    if all(task.get("output") for task in tasks):
        references = [entry(task, task["output"], task.get("generator", "reference")) for task in tasks]
        whole = folder / "outputs" / "reference_outputs.json"  # of the largest part that was measured
        if not whole.is_file() or len(references) >= len(json.loads(whole.read_text(encoding="utf-8"))):
            write_json(whole, references, indent=1)
    if "about" in result:
        lines = [json.dumps({"topic": topic, "output": text}, ensure_ascii=False) + "\n"
                 for topic, text in zip(benchmark.topics, result["about"], strict=True)]
        write_text(outputs / "factscore.jsonl", "".join(lines))


def write_annotations(folder: Path, policy: str, records: Sequence[dict]) -> None:
    """The judgements of one policy, in AlpacaEval's form."""
    outputs = folder / "outputs" / policy
    outputs.mkdir(parents=True, exist_ok=True)
    write_json(outputs / "annotations.json", records, indent=1)


def write_results(folder: Path, results: dict[str, dict]) -> Path:
    """evaluation.json with these results by name, and all that it holds under other names."""
    file = folder / "evaluation.json"
    write_json(file, measured_before(folder) | results, indent=1)
    return file


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass
class Run:
    """A finished run: its configuration and its evaluations by step, SFT's first."""

    folder: Path
    config: dict
    evaluations: list[dict]
    others: list[str] = field(default_factory=list)  # measured under other settings and not among them, in words


@dataclass
class Configuration:
    """Runs that differ in their seed only."""

    name: str        # short, for legends
    adaptation: str
    regularization: str
    formula: str
    runs: list[Run]

    def at_step(self) -> dict[int, list[dict]]:
        """Evaluations by step, over the runs that have one there."""
        steps = sorted({e["step"] for run in self.runs for e in run.evaluations})
        return {step: [e for run in self.runs for e in run.evaluations if e["step"] == step] for step in steps}

    def last(self) -> list[dict]:
        return [run.evaluations[-1] for run in self.runs]

    def changes(self, key: str) -> tuple[float, float] | None:
        """A figure's change from SFT to the last checkpoint, paired within each run, and its error: over runs, where several."""
        found = [paired_changes(run.evaluations[0], run.evaluations[-1]) for run in self.runs]
        if not all(key in changes for changes in found):
            return None
        pairs = [(changes[key], changes[key + "_se"]) for changes in found]
        return pairs[0] if len(pairs) == 1 else mean_and_error([change for change, _ in pairs])


def paired_changes(before: dict, after: dict) -> dict[str, float]:
    """after − before, and its standard error, of every figure that both hold example by example."""
    sources = {"win_rate": ("preferences", paired_difference), "reward": ("rewards", paired_mean_difference),
               "tokens": ("lengths", paired_mean_difference), "fact_precision": ("fact_counts", paired_ratio_difference)}
    changes = {}
    for figure, (source, difference) in sources.items():
        if source in before and source in after:
            try:
                change, error = difference(before[source], after[source])
            except ValueError:  # no instruction was judged in both, or they are not the same instructions
                continue
            scale = 100 if figure == "fact_precision" else 1
            changes |= {figure: scale * change, figure + "_se": scale * error}
    return changes


def first_of_each_seed(configs: Sequence[Configuration]) -> list[dict]:
    """SFT's evaluations, one for each sampling seed: the policies are means over the same."""
    return list({run.config.get("seed"): run.evaluations[0] for c in configs for run in c.runs}.values())


def load_run(folder: Path, judge: str | None = None) -> Run:
    """The run as it was evaluated under one of the settings (see `fullest`), by that judge if one is named. Raises ValueError
    where the folder is no run, or one that was never evaluated so."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no config.json, so it is no run folder of train.py")
    config = read_object(folder / "config.json")
    missing = [key for key in ("estimator", "tuning", "lora_dropout") if key not in config]
    if missing:
        raise ValueError(f"{folder}/config.json: lacks {missing[0]}: it is no configuration of a run")
    during = by_step(folder / "evaluations.jsonl", read_lines(folder / "evaluations.jsonl"))
    # What training measured, it measured on the run's own instructions; only the miniature world's annotators judged it.
    during = {step: {"data": config.get("evaluation"), "judge": "annotators" if "preferences" in e else None} | e
              for step, e in during.items()}
    file = folder / "evaluation.json"
    results = [e for e in measured_before(folder).values() if judge in (None, e.get("judge"))]
    by_step(file, results)
    chosen, others = fullest(results)
    after = by_step(file, chosen)
    if after:
        alike = (chosen[0]["n"], chosen[0].get("judge", "annotators"))
        during = {step: e for step, e in during.items() if (e["n"], "annotators") == alike}
    elif judge not in (None, "annotators"):
        during = {}
    evaluations = [e for _, e in sorted((during | after).items())]
    if not evaluations or evaluations[0]["step"] or len(evaluations) < 2:
        raise ValueError(f"{folder}: has no evaluation of SFT and of a checkpoint; python evaluate.py {folder} --step all makes "
                         "them")
    return Run(folder, config, evaluations, others)


def fullest(results: Sequence[dict]) -> tuple[list[dict], list[str]]:
    """(the results under one of the settings, the other settings in words): of those under which SFT and a checkpoint were
    measured it takes the most instructions, then the most tokens for the true KL, then the first."""
    groups: dict[str, list[dict]] = {}
    for e in results:
        groups.setdefault(json.dumps(settings_of(e), sort_keys=True), []).append(e)

    def worth(group: list[dict]) -> tuple:
        return len({e["step"] for e in group}) > 1 and any(not e["step"] for e in group), group[0]["n"], group[-1]["kl_tokens"]

    best = max(groups.values(), key=worth, default=[])
    return best, [settings_in_words(group[0]) for group in groups.values() if group is not best]


def read_object(file: Path) -> dict:
    try:
        content = json.loads(read_text(file))
        return dict(content.items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON object ({error})") from None


def by_step(file: Path, evaluations: Iterable[dict]) -> dict[int, dict]:
    """Evaluations by their PPO step, with the figures that every table needs."""
    steps = {}
    for e in evaluations:
        lacks = [key for key in ("step", "n", "true_kl", "true_kl_se", "tokens", "tokens_se", "responses") if key not in e]
        if lacks:
            raise ValueError(f"{file}: an evaluation lacks {lacks[0]}: it was written by another version, or by hand")
        if type(e["step"]) is not int:  # it is sorted by, and written into the page
            raise ValueError(f"{file}: the step of an evaluation is {e['step']!r}, not a whole number")
        steps[e["step"]] = e
    return steps


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """The runs by configuration, in the order in which they were named."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        alike = {key: value for key, value in run.config.items() if key not in PER_RUN}
        alike["estimator"] = ALIASES.get(alike["estimator"], alike["estimator"])  # k3 is bregman
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(run)
    firsts = [group[0].config for group in groups.values()]
    configs = [describe_configuration(group, firsts) for group in groups.values()]
    names = [c.name for c in configs]
    return [replace(c, name=f"{c.name} ({c.runs[0].folder.name})", regularization=f"{c.regularization} ({c.runs[0].folder.name})")
            if names.count(c.name) > 1 else c for c in configs]  # what sets them apart is in no name


def describe_configuration(group: list[Run], firsts: Sequence[dict]) -> Configuration:
    """Names as in Table 1, and whatever else sets this configuration apart from the others."""
    config = group[0].config
    estimator = ALIASES.get(config["estimator"], config["estimator"])
    dropout = config["lora_dropout"]
    full = config["tuning"] == "full"
    if estimator == "none" and dropout > 0.1 and not full:
        regularization = f"Dropout only (p = {dropout:g})"
    else:
        regularization = NAMES.get(estimator, estimator) + (f", dropout {dropout:g}" if dropout != 0.1 and not full else "")
    usual = {key: max((f.get(key) for f in firsts), key=[f.get(key) for f in firsts].count) for key in config}
    apart = [f"{key.replace('_', ' ')} {value}" for key, value in config.items()
             if value != usual[key] and key not in (*PER_RUN, "estimator", "lora_dropout", "tuning")]
    regularization += "".join(f", {what}" for what in apart)
    name = regularization + (", full tuning" if full else "")
    return Configuration(name, "Full model tuning" if full else "LoRA", regularization, FORMULAS.get(estimator, estimator), group)
