# SPDX-License-Identifier: MIT
"""The model card of a checkpoint's policy: what it is, of what it was made, and what was measured, for whoever finds it on a hub.

Written beside the adapter (README.md, and with the last step curves.png), so that `hf upload org/name runs/.../policy` is all
that publishing takes.
"""

import re
import shutil
from pathlib import Path

from evaluation.figures import draw_curves
from evaluation.results import NAMES, read_object
from evaluation.tables import before_after
from formats.write import write_text
from training.config import RunConfig
from training.folder import read_lines

ON_A_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def write_card(policy: Path, out: Path, run: RunConfig, step: int) -> None:
    """Into the policy's folder, of what the run folder holds so far."""
    if step == run.steps and (picture := draw_curves(out)):
        shutil.copyfile(picture, policy / "curves.png")
    write_text(policy / "README.md", card(out, run, step, (policy / "curves.png").is_file()))


def card(out: Path, run: RunConfig, step: int, curves: bool) -> str:
    """The text, with the metadata that a hub reads at its head."""
    base = named(run.policy)
    head = ["---", *([f"base_model: {base}"] if ON_A_HUB.fullmatch(base) else []),
            f"library_name: {'peft' if run.tuning == 'lora' else 'transformers'}", f"tags: [rlhf, ppo, {run.tuning}]", "---", ""]
    about = read_object(out / "about.json") if (out / "about.json").is_file() else {}
    penalty = NAMES.get(run.estimator, run.estimator)
    adapter = f"LoRA of rank {run.lora_rank}, α {run.lora_alpha:g}, on {', '.join(run.targets)}"
    lines = [f"# {base}, aligned by PPO", "", "A policy trained by reinforcement learning from a reward model, after Sun, Gupta "
             "and Iyyer (2023), https://arxiv.org/abs/2309.09055.", "",
             f"- starts from {base}; reward: {named(run.reward or 'none')}; instructions: {named(run.data)}",
             f"- {adapter if run.tuning == 'lora' else 'all weights'}; penalty: {penalty}, β {run.ppo.beta:g}",
             f"- {step} of {run.steps} steps of {run.ppo.rollout_batch_size} responses, learning rate {run.ppo.learning_rate:g}, "
             f"seed {run.seed}, temperature {run.ppo.temperature:g}, prompt template {named(str(run.prompt_template))}",
             f"- commit {about.get('commit', 'unknown')}, {about.get('began', 'date unknown')}", ""]
    evaluations = [e for e in read_lines(out / "evaluations.jsonl") if e["step"] <= step]
    if len(evaluations) > 1:
        lines += ["## Before and after", "", f"On {evaluations[0]['n']} instructions; ± is the standard error, differences are "
                  "paired.", "", *("    " + line for line in before_after(evaluations[0], evaluations[-1], []).splitlines()), ""]
    if curves:
        lines += ["![The run's curves over PPO steps](curves.png)", ""]
    if run.tuning == "lora":
        lines += ["## Use", "", "    from peft import PeftModel", "    from transformers import AutoModelForCausalLM", "",
                  f"    base = AutoModelForCausalLM.from_pretrained({base!r})",
                  '    model = PeftModel.from_pretrained(base, "this folder")', ""]
    return "\n".join([*head, *lines])


def named(path: str) -> str:
    """A hub's name as it is, of a path its last part: where it lay on the trainer's machine is nobody's business."""
    return str(path) if ON_A_HUB.fullmatch(str(path)) and not Path(path).exists() else Path(path).name
