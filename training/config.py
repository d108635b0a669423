# SPDX-License-Identifier: MIT
"""What a run is: every number and name of it, its command-line flags, and config.json.

    run = build_config(vars(build_parser(...).parse_args()))     # the flags that were given, on top of the defaults
    run = stored_config({"out": "runs/bregman-s0"})              # of a run that is there

The defaults are the paper's (section 2.2) or the released code's; without --policy a run is the miniature world's, whose preset
overrides some of them. --config takes a file of settings in their place.
"""

import argparse
import contextlib
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from data import read_text
from divergences import ESTIMATORS, get_estimator
from ppo import PPOConfig, check_bounds

TINY = Path(__file__).resolve().parent.parent / "tiny"
# The miniature world's settings; everything else is the paper's. A model of a million parameters takes a larger learning
# rate, shorter texts and fewer steps.
TINY_PRESET = {
    "policy": str(TINY / "sft"), "reward": str(TINY / "reward"), "data": str(TINY / "data" / "ppo.json"),
    "evaluation": str(TINY / "data" / "evaluation.json"), "prompt_template": "tiny", "steps": 25, "lr_steps": 25,
    "response_length": 80, "temperature": 0.7, "learning_rate": 5e-4, "rollout_batch_size": 128, "step_batch_size": 64,
    "micro_batch_size": 32, "rollout_micro_batch_size": 128,
}


def setting(default: Any, group: str, unit: str, help: str, choices: tuple[str, ...] | None = None,
            bare: str | None = None, **bounds: float):
    """ppo.setting, with the heading under which --help shows the flag, choices where only some values will do, and what the flag
    means without a value, where it may stand so."""
    return field(default=default, metadata={"group": group, "unit": unit, "help": help, "choices": choices, "bare": bare,
                                            "bounds": bounds})


@dataclass
class RunConfig:
    """What a run is, with PPO's own numbers in `ppo`. Every field is a flag."""

    estimator: str = setting("bregman", "objective", "", "the penalty of Table 1: " + ", ".join(ESTIMATORS) + " (or k1 k2 k3)")
    policy: str | None = setting(None, "data and models", "", "SFT model: folder, .gguf or hub name; None: the miniature world's")
    reward: str | None = setting(None, "data and models", "", "reward model folder, or file.py:function for a rule")
    reward_eos: str | None = setting(None, "data and models", "", "whether the reward model was trained on sequences that end in "
                                     "EOS, where its folder doesn't say (ours do)", ("yes", "no"))
    data: str | None = setting(None, "data and models", "", "instructions, AlpacaFarm JSON or JSON lines")
    evaluation: str | None = setting(None, "data and models", "", "evaluation instructions, for the before/after table")
    adapter: str | None = setting(None, "data and models", "", "trained adapter that the policy starts from and is compared to: "
                                  "a PEFT folder, or the paper's released .bin")
    evaluation_length: int | None = setting(None, "data and models", "tokens", "longest answer in evaluations (the released code "
                                            "takes 512); None: response_length", low=1)
    baseline: str | None = setting(None, "data and models", "", "run folder of the same start, seed and evaluation: its figures "
                                   "before the first step are taken over, not measured again")
    prompt_template: str = setting("alpaca", "data and models", "", "alpaca, tiny, chat (the tokenizer's own) or a JSON file")
    system: str | None = setting(None, "data and models", "", "a message before every instruction, with --prompt-template chat")
    query_length: int = setting(192, "data and models", "tokens", "longer prompts are dropped", low=1)
    out: str | None = setting(None, "run", "", "run folder; None: runs/<estimator>-s<seed>")
    seed: int = setting(0, "run", "", "decides initialisation, sampling, dropout and the order of the data", low=0,
                        high=2**63 - 1)
    steps: int = setting(100, "run", "PPO steps", "how many to take", low=1)
    save_every: int = setting(20, "run", "PPO steps", "between checkpoints; the last step is always saved", low=1)
    keep: int = setting(0, "run", "checkpoints", "the newest that are kept; 0: all", low=0)
    eval_every: int = setting(0, "run", "PPO steps", "between evaluations during training; 0: before and after only", low=0)
    log_to: str | None = setting(None, "run", "", "show the curves while the run goes: tensorboard (in the run folder) or wandb",
                                 ("tensorboard", "wandb"))
    policy_device: str | None = setting(None, "placement", "", "holds policy and value; None: where train.py pins it, or what "
                                        "there is")
    reference_device: str | None = setting(None, "placement", "", "holds reference and reward; None: alike")
    dtype: str = setting("auto", "placement", "", "of frozen weights; auto: bfloat16 on a GPU, float32 on a CPU",
                         ("auto", "float32", "bfloat16", "float16"))
    reference_dtype: str = setting("same", "placement", "", "of reference and reward (the released code: float32); same: dtype",
                                   ("same", "float32", "bfloat16", "float16"))
    compile: bool = setting(False, "placement", "", "torch.compile fuses each layer's small operations: on a GPU less time a "
                            "step of large models, a minute more to start; needs a C++ compiler")
    shard: str | None = setting(None, "placement", "", "torchrun: each process of a machine holds a share of the frozen weights; "
                                "they are put together for sampling (whole) or layer by layer (in-step); auto: whole where there "
                                "is room", ("auto", "whole", "in-step"), bare="auto")
    tuning: str = setting("lora", "tuned weights", "", "lora, or full fine-tuning of policy and value", ("lora", "full"))
    lora_rank: int = setting(8, "tuned weights", "", "rank k of B A (Eq. 1)", low=1, high=2**16)
    lora_alpha: float = setting(64.0, "tuned weights", "", "the update is scaled by alpha / rank", above=0)
    lora_targets: str = setting("q_proj,k_proj,v_proj,o_proj", "tuned weights", "", "adapted layers, by commas (MLP: gate_proj, "
                                "up_proj, down_proj)")
    lora_dropout: float = setting(0.1, "tuned weights", "", "on the input of every adapter, in updates only", low=0, below=1)
    gradient_checkpointing: bool = setting(False, "tuned weights", "", "recompute each layer in the backward pass: a third more "
                                           "time, activations of one layer")
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        get_estimator(self.estimator)
        check_bounds(self)
        if self.adapter and self.tuning == "full":
            raise ValueError(f"adapter {self.adapter} with tuning full: python lora.py merge makes one model of both, to name as "
                             "--policy")
        if self.shard and self.tuning == "full":
            raise ValueError(f"shard {self.shard}: only frozen weights are sharded, and under --tuning full none are frozen: "
                             "leave one of the two away")
        if self.shard and self.compile:
            raise ValueError(f"compile with shard {self.shard}: layers whose weights come and go are not compiled: leave one "
                             "of the two away")
        if self.steps > self.ppo.lr_steps:
            raise ValueError(f"steps is {self.steps}: must be at most lr_steps {self.ppo.lr_steps}, where the learning rate "
                             f"is 0; --lr-steps {self.steps} lets it fall more slowly")

    @property
    def targets(self) -> tuple[str, ...]:
        """The names in lora_targets."""
        return tuple(name.strip() for name in self.lora_targets.split(","))

    def to_dict(self) -> dict[str, Any]:
        """Every number and name by its field, flat, as config.json holds them."""
        return {f.name: getattr(self if f.name in vars(self) else self.ppo, f.name) for f in FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The reverse; what is left out has its default."""
        given = {f.name: values[f.name] for f in FIELDS if f.name in values}
        ppo = PPOConfig(**{f.name: given.pop(f.name) for f in fields(PPOConfig) if f.name in given})
        return cls(**given, ppo=ppo)


FIELDS: list[Field] = [f for f in fields(RunConfig) if f.name != "ppo"] + list(fields(PPOConfig))


# --------------------------------------------------------------------------------------------------------- command line


EXAMPLES = """examples:
  python train.py --estimator bregman                          the miniature world, on whatever this machine has
  python train.py --policy sft10k --reward reward-model --data ppo.json --evaluation eval.json
                                                               models and data of your own, with the paper's numbers
  python train.py --resume --out runs/bregman-s0 --steps 50    go on where a run stopped, or beyond its end"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, instead of after a page of all that there are."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; --help lists every flag\n")


def build_parser(description: str) -> argparse.ArgumentParser:
    """A flag for every field; unset flags stay out of the namespace."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS, epilog=EXAMPLES,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="settings from a run's config.json, or JSON or YAML of the same "
                        "names; flags override them")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--plan", action="store_true", help="print the memory that the run needs on each device, and stop")
    groups: dict[str, Any] = {}
    for f in FIELDS:
        title = f.metadata.get("group", "PPO")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif f.metadata.get("choices"):
            options = {"choices": f.metadata["choices"]}
            options |= {"nargs": "?", "const": f.metadata["bare"]} if f.metadata["bare"] else {}
        else:
            options = {"type": flag_type(f.type), "metavar": f.name.split("_")[-1].upper()}
        groups[title].add_argument("--" + f.name.replace("_", "-"), help=help_text(f), **options)
    return parser


def flag_type(annotation: Any) -> type:
    """int for `int`, float for `float | None`."""
    return next(t for t in get_args(annotation) if t is not type(None)) if isinstance(annotation, UnionType) else annotation


def help_text(f: Field) -> str:
    """What the field is, its default and unit, and the miniature world's own default where it has one."""
    tiny = TINY_PRESET.get(f.name, f.default)
    default = f"{f.default}" + (f"; miniature world {tiny}" if tiny != f.default else "")
    shown = f" (default {default} {f.metadata['unit']}".rstrip() + ")"
    return (f.metadata["help"] + (shown if f.default is not None else "")).replace("%", "%%")  # what None means, its help says


def build_config(given: Mapping[str, Any]) -> RunConfig:
    """Defaults, overridden by the miniature world's preset when no policy is named, overridden by the flags given."""
    run = checked(given if "policy" in given else TINY_PRESET | given)
    for name in ("reward", "data"):
        if getattr(run, name) is None:
            raise ValueError(f"--{name} is missing: --policy names your own model, so name your own {name} too")
    run.out = run.out or f"runs/{run.estimator}-s{run.seed}"
    return run


def checked(values: Mapping[str, Any]) -> RunConfig:
    """The run of these fields; ValueError speaks of flags."""
    try:
        return RunConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(in_flags(str(error))) from None


def in_flags(message: str) -> str:
    """A message about fields, with the names that were typed: lr_steps becomes --lr-steps, and steps at its head --steps."""
    flags = {f.name: "--" + f.name.replace("_", "-") for f in FIELDS}
    head, _, rest = message.partition(" ")
    return flags.get(head, head) + " " + re.sub(r"(?<![\w-])[a-z]+(_[a-z]+)+(?!\w)", lambda m: flags.get(m[0], m[0]), rest)


# ---------------------------------------------------------------------------------------------------------- config.json


def stored_config(given: Mapping[str, Any]) -> RunConfig:
    """The configuration of the run in given["out"]. More steps than it has extend it, and --shard and --log-to only say who holds
    what and who looks on; any other flag that contradicts it is an error, since the run would be another one."""
    out = Path(given["out"]) if "out" in given else Path(build_config(given).out)
    stored = read_config(out / "config.json") | {"out": str(out)}
    for name, value in given.items():
        if name in ("out", "shard", "log_to") or stored.get(name) == value or name == "steps" and value > stored["steps"]:
            continue
        raise ValueError(f"--resume: --{name.replace('_', '-')} {value} differs from the run's {stored.get(name)}: "
                         "leave the flag away, or start a new run in another --out")
    return checked(stored | {name: given.get(name, stored[name]) for name in ("steps", "shard", "log_to")})


def settings_in(file: Path) -> dict[str, Any]:
    """What --config names: fields by name, some or all, in JSON or YAML. Of a run's config.json the folder is left away, which is
    that run's. Raises ValueError naming file and field."""
    import yaml  # comes with transformers

    if not file.is_file():
        raise FileNotFoundError(f"--config {file}: there is no such file")
    try:
        found = yaml.safe_load(read_text(file))  # JSON is YAML, too
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}, not names with values")
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config {file}: no settings of a run ({str(error).splitlines()[0]})") from None
    known, given = {f.name: f for f in FIELDS}, {}
    for name, value in found.items():
        field = str(name).replace("-", "_")
        if field not in known:
            near = difflib.get_close_matches(field, known, 1)
            raise ValueError(f"--config {file}: {name!r} is no setting" + (f"; {near[0]} is" if near else ""))
        if isinstance(value, str) and float in (get_args(known[field].type) or (known[field].type,)):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML takes 1e-5, without a point, for a text
        kind, choices = known[field].type, known[field].metadata.get("choices")
        if not is_of_type(value, kind) or choices and value is not None and value not in choices:
            raise ValueError(f"--config {file}: {name} is {value!r}: must be "
                             + (f"one of {', '.join(choices)}" if choices else getattr(kind, "__name__", str(kind))))
        given[field] = value
    return {name: value for name, value in given.items() if not (name == "out" and file.name == "config.json")}


def read_config(file: Path) -> dict[str, Any]:
    """The fields in config.json, each there and of its type. Raises FileNotFoundError, or ValueError naming file and field."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no run in {file.parent}: it holds no config.json")
    try:
        stored = json.loads(read_text(file))
        if not isinstance(stored, dict):
            raise ValueError(f"holds a {type(stored).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is no configuration of a run ({error})") from None
    # What runs did before there were such fields.
    stored = {"lr_steps": stored.get("steps"), "reference_dtype": "same", "evaluation_length": None, "reward_eos": None,
              "shard": None, "baseline": None, "log_to": None, "system": None} | stored
    for f in FIELDS:
        if f.name not in stored:
            raise ValueError(f"{file}: lacks {f.name}: written by another version of train.py")
        if not is_of_type(stored[f.name], f.type):
            raise ValueError(f"{file}: {f.name} is {stored[f.name]!r}: must be {getattr(f.type, '__name__', f.type)}")
    return stored


def is_of_type(value: Any, annotation: Any) -> bool:
    """Whether a value read from JSON is what a field is declared as; a whole number will do for a float."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)
