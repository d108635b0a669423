# SPDX-License-Identifier: MIT
"""What an evaluation leaves in a folder, written and read again.

    evaluation.json                      figures, responses and preferences of every policy
    judgements.jsonl, facts.jsonl        every answer of a judge, as it came: read first, so that none is paid for twice
    outputs/<policy>/annotations.json    the judgements of one policy, in AlpacaEval's form
    outputs/<policy>/model_outputs.json  for the alpaca_eval tool, as is outputs/reference_outputs.json
    outputs/<policy>/factscore.jsonl     for FActScore, with --topics

Runs that differ in nothing but their seed are one configuration, as in the paper's Table 1.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
           "rollout_micro_batch_size", "gradient_checkpointing")


# -------------------------------------------------------------------------------------------------------------- writing


def write_outputs(folder: Path, policy: str, benchmark: Benchmark, result: dict) -> None:
    """What other evaluators read: alpaca_eval (its --model_outputs and --reference_outputs) and FActScore."""
    def entry(task: dict, output: str, generator: str) -> dict:
        return {"instruction": whole_instruction(task), "output": output, "generator": generator,
                "dataset": task.get("dataset", "evaluation")}

    tasks, outputs, generator = benchmark.tasks, folder / "outputs" / policy, f"{folder.resolve().name} {policy}"
    outputs.mkdir(parents=True, exist_ok=True)
    answered = [entry(task, text, generator) for task, text in zip(tasks, result["responses"], strict=True)]
    write_json(outputs / "model_outputs.json", answered, indent=1)
    if all(task.get("output") for task in tasks):
        references = [entry(task, task["output"], task.get("generator", "reference")) for task in tasks]
        write_json(folder / "outputs" / "reference_outputs.json", references, indent=1)
    if "about" in result:
        lines = [json.dumps({"topic": topic, "output": text}, ensure_ascii=False) + "\n"
                 for topic, text in zip(benchmark.topics, result["about"], strict=True)]
        write_text(outputs / "factscore.jsonl", "".join(lines))


def write_annotations(folder: Path, policy: str, records: Sequence[dict]) -> None:
    """The judgements of one policy, in AlpacaEval's form."""
    outputs = folder / "outputs" / policy
    outputs.mkdir(parents=True, exist_ok=True)
    write_json(outputs / "annotations.json", records, indent=1)


def merge_results(folder: Path, results: dict[str, dict]) -> Path:
    """evaluation.json with these results, and with older ones of other checkpoints that were measured alike."""
    file = folder / "evaluation.json"
    first = next(iter(results.values()))
    try:
        older = json.loads(file.read_text(encoding="utf-8"))
        alike = {name: r for name, r in older.items() if all(r.get(k) == first.get(k) for k in ("data", "n", "judge"))}
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        alike = {}
    write_json(file, alike | results, indent=1)
    return file


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass
class Run:
    """A finished run: its configuration and its evaluations by step, SFT's first."""

    folder: Path
    config: dict
    evaluations: list[dict]


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


def load_run(folder: Path) -> Run:
    """Raises ValueError where the folder is no run, or one that was never evaluated."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no config.json, so it is no run folder of train.py")
    config = read_object(folder / "config.json")
    missing = [key for key in ("estimator", "tuning", "lora_dropout") if key not in config]
    if missing:
        raise ValueError(f"{folder}/config.json: lacks {missing[0]}: it is no configuration of a run")
    during = by_step(folder / "evaluations.jsonl", read_lines(folder / "evaluations.jsonl"))
    file = folder / "evaluation.json"
    after = by_step(file, read_object(file).values()) if file.is_file() else {}
    if after:
        newest = next(iter(after.values()))
        alike = (newest["n"], newest.get("judge", "annotators"))
        during = {step: e for step, e in during.items() if (e["n"], "annotators") == alike}
    evaluations = [e for _, e in sorted((during | after).items())]
    if not evaluations or evaluations[0]["step"] or len(evaluations) < 2:
        raise ValueError(f"{folder}: has no evaluation of SFT and of a checkpoint; python evaluate.py {folder} --step all makes "
                         "them")
    return Run(folder, config, evaluations)


def read_object(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
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
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(run)
    firsts = [group[0].config for group in groups.values()]
    return [describe_configuration(group, firsts) for group in groups.values()]


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
