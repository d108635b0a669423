"""Stage 3, the main job: align a policy with PPO and LoRA against a reward model (Sun, Gupta, Iyyer 2023, sections 2 and 3).

    python train.py --estimator bregman                       # the miniature world, on whatever this machine has
    python train.py --estimator jensen_shannon --policy llama-sft10k --reward reward-model --data ppo.json   # real ones
    python train.py --estimator none --lora-dropout 0.5       # Table 1's "dropout only"
    python train.py --resume --out runs/bregman-s0            # go on where a run stopped
    python train.py --plan --policy llama-sft10k ...          # the memory it would need on each device

One PPO step: sample responses, let four models read them, shape rewards (Eq. 3), estimate advantages, take a few clipped
optimiser steps (Eq. 2). All of that is in ppo.py; here are the configuration, the placement of the models, the loop, what it
shows and what it saves. A run folder holds config.json, metrics.jsonl (a line a step), samples.jsonl, evaluations.jsonl,
curves.png and step-0020/{policy,value,trainer}, whose policy/ PEFT loads as it is.

Departures from the released code: one GPU is enough, since frozen weights on the same device are shared; a checkpoint named N
is saved after step N with every random state, so a resumed run repeats the run that was never stopped.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import evaluate
import plan
import ppo
import show
from data import (PromptStream, check_vocabulary, describe_tokenizer, left_pad, load_instructions, load_tokenizer,
                  tokenize_prompts)
from checkpoints import local_copy
from divergences import ESTIMATORS, get_estimator
from interrupts import Interrupts, Stopped
from lora import (add_lora, load_lora, lora_cast, lora_disabled, lora_layers, lora_snapshot, lora_weights, merge_lora, save_lora,
                  unmerge_lora)
from model import Llama, ValueModel, generate, open_checkpoint, write_atomically
from ppo import PPOConfig
from reward import Reward, RewardModel, is_rule, load_rule, reward_config, rule_scorer, same_ids, scorer
from runfolder import (append_line, checkpoints, cut_after, flush, newest_whole, prune, require_whole, save_whole, sweep,
                       write_text)
from watch import Watch

# Which model lives where (the paper's two GPUs, "Limitations"). --policy-device and --reference-device override it; with
# fewer devices both fall to what there is, and models with the same frozen weights then share them.
POLICY_DEVICE = "cuda:0"     # policy and value: trained
REFERENCE_DEVICE = "cuda:1"  # reference and reward: frozen

TINY = Path(__file__).parent / "tiny"
# The miniature world's settings; everything else is the paper's. A model of a million parameters takes a larger learning
# rate, shorter texts and fewer steps.
TINY_PRESET = {
    "policy": str(TINY / "sft"), "reward": str(TINY / "reward"), "data": str(TINY / "data" / "ppo.json"),
    "evaluation": str(TINY / "data" / "evaluation.json"), "prompt_template": "tiny", "steps": 25,
    "response_length": 80, "temperature": 0.7, "learning_rate": 5e-4, "rollout_batch_size": 128, "step_batch_size": 64,
    "micro_batch_size": 32, "rollout_micro_batch_size": 128,
}


def setting(default, group: str, unit: str, help: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata={"group": group, "unit": unit, "help": help, "choices": choices})


@dataclass
class RunConfig:
    """What a run is, beside PPO's own numbers (ppo.PPOConfig). Every field is a flag."""

    estimator: str = setting("bregman", "objective", "", "the penalty of Table 1: " + ", ".join(ESTIMATORS) + " (or k1 k2 k3)")
    policy: str | None = setting(None, "data and models", "", "SFT model: folder, .gguf or hub name; None: the miniature world's")
    reward: str | None = setting(None, "data and models", "", "reward model folder, or file.py:function for a rule")
    data: str | None = setting(None, "data and models", "", "instructions, AlpacaFarm JSON or JSON lines")
    evaluation: str | None = setting(None, "data and models", "", "evaluation instructions, for the before/after table")
    adapter: str | None = setting(None, "data and models", "", "trained adapter that the policy starts from and is compared to: "
                                  "a PEFT folder, or the paper's released .bin")
    prompt_template: str = setting("alpaca", "data and models", "", "alpaca, tiny, chat (the tokenizer's own) or a JSON file")
    query_length: int = setting(192, "data and models", "tokens", "longer prompts are dropped")
    out: str | None = setting(None, "run", "", "run folder; None: runs/<estimator>-s<seed>")
    seed: int = setting(0, "run", "", "decides initialisation, sampling, dropout and the order of the data")
    steps: int = setting(100, "run", "PPO steps", "how many to take")
    save_every: int = setting(20, "run", "PPO steps", "between checkpoints; the last step is always saved")
    keep: int = setting(0, "run", "checkpoints", "the newest that are kept; 0: all")
    eval_every: int = setting(0, "run", "PPO steps", "between evaluations during training; 0: before and after only")
    policy_device: str = setting(POLICY_DEVICE, "placement", "", "holds policy and value")
    reference_device: str = setting(REFERENCE_DEVICE, "placement", "", "holds reference and reward")
    dtype: str = setting("auto", "placement", "", "of frozen weights; auto: bfloat16 on a GPU, float32 on a CPU",
                         ("auto", "float32", "bfloat16", "float16"))
    tuning: str = setting("lora", "tuned weights", "", "lora, or full fine-tuning of policy and value", ("lora", "full"))
    lora_rank: int = setting(8, "tuned weights", "", "rank k of B A (Eq. 1)")
    lora_alpha: float = setting(64.0, "tuned weights", "", "the update is scaled by alpha / rank")
    lora_targets: str = setting("q_proj,k_proj,v_proj,o_proj", "tuned weights", "", "adapted layers, by commas (MLP: gate_proj, "
                                "up_proj, down_proj)")
    lora_dropout: float = setting(0.1, "tuned weights", "", "on the input of every adapter, in updates only")
    gradient_checkpointing: bool = setting(False, "tuned weights", "", "recompute each layer in the backward pass: a third more "
                                           "time, activations of one layer")

    def __post_init__(self) -> None:
        get_estimator(self.estimator)
        for name, low in (("steps", 1), ("save_every", 1), ("keep", 0), ("eval_every", 0), ("query_length", 1), ("lora_rank", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: must be at least {low}")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha is {self.lora_alpha}: must be a finite number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: from 0 up to but not 1")
        if self.adapter and self.tuning == "full":
            raise ValueError(f"adapter {self.adapter} with tuning full: python lora.py merge makes one model of both, to name as "
                             "--policy")

    @property
    def targets(self) -> tuple[str, ...]:
        """The names in lora_targets."""
        return tuple(name.strip() for name in self.lora_targets.split(","))


# Command line ---------------------------------------------------------------------------------------------------------


def flag_type(annotation: Any) -> type:
    """int for `int`, float for `float | None`."""
    return next(t for t in get_args(annotation) if t is not type(None)) if isinstance(annotation, UnionType) else annotation


def build_parser() -> argparse.ArgumentParser:
    """A flag for every field of both configurations; unset flags stay out of the namespace."""
    parser = evaluate.Parser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--plan", action="store_true", help="print the memory that the run needs on each device, and stop")
    groups: dict[str, Any] = {}
    for config in (RunConfig, PPOConfig):
        for f in fields(config):
            title = f.metadata.get("group", "PPO")
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            if f.type is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif f.metadata.get("choices"):
                options = {"choices": f.metadata["choices"]}
            else:
                options = {"type": flag_type(f.type), "metavar": f.name.split("_")[-1].upper()}
            groups[title].add_argument("--" + f.name.replace("_", "-"), help=help_text(f), **options)
    return parser


def help_text(f: Field) -> str:
    """What the field is, its default and unit, and the miniature world's own default where it has one."""
    tiny = TINY_PRESET.get(f.name, f.default)
    default = f"{f.default}" + (f"; miniature world {tiny}" if tiny != f.default and f.default is not None else "")
    return f"{f.metadata['help']} (default {default} {f.metadata['unit']}".replace("%", "%%").rstrip() + ")"


def build_config(given: dict[str, Any]) -> tuple[RunConfig, PPOConfig]:
    """Defaults, overridden by the miniature world's preset when no policy is named, overridden by the flags given."""
    chosen = given if "policy" in given else TINY_PRESET | given
    run = RunConfig(**{f.name: chosen[f.name] for f in fields(RunConfig) if f.name in chosen})
    config = PPOConfig(**{f.name: chosen[f.name] for f in fields(PPOConfig) if f.name in chosen})
    for name in ("reward", "data"):
        if getattr(run, name) is None:
            raise ValueError(f"--{name} is missing: --policy names your own model, so name your own {name} too")
    run.out = run.out or f"runs/{run.estimator}-s{run.seed}"
    return run, config


def stored_config(given: dict[str, Any]) -> tuple[RunConfig, PPOConfig]:
    """The configuration of the run to resume; a flag that contradicts it is an error, since the run would be another one."""
    out = Path(given["out"]) if "out" in given else Path(build_config(given)[0].out)
    file = out / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"--resume: {file} not found: there is no run in {out} to go on with")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError(f"holds a {type(stored).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is no configuration of a run ({error})") from None
    stored |= {"out": str(out)}
    for f in (f for config in (RunConfig, PPOConfig) for f in fields(config)):
        if f.name not in stored:
            raise ValueError(f"{file}: lacks {f.name}: written by another version of train.py")
        if not is_of_type(stored[f.name], f.type):
            raise ValueError(f"{file}: {f.name} is {stored[f.name]!r}: must be {getattr(f.type, '__name__', f.type)}")
    for name, value in given.items():
        if name != "out" and stored.get(name) != value:
            raise ValueError(f"--resume: --{name.replace('_', '-')} {value} differs from the run's {stored.get(name)}: "
                             "leave the flag away, or start a new run in another --out")
    return (RunConfig(**{f.name: stored[f.name] for f in fields(RunConfig)}),
            PPOConfig(**{f.name: stored[f.name] for f in fields(PPOConfig)}))


def is_of_type(value: Any, annotation: Any) -> bool:
    """Whether a value read from JSON is what a field is declared as; a whole number will do for a float."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


# Placement ------------------------------------------------------------------------------------------------------------


def resolve_devices(policy_device: str, reference_device: str) -> tuple[str, str, str]:
    """(policy's device, reference's device, a line that says what happened). Only the defaults fall back; a device that was
    asked for and isn't there is an error."""
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps"] if torch.backends.mps.is_available() else []
    there.append("cpu")
    chosen, fallen = [], []
    for flag, name, default in (("--policy-device", policy_device, POLICY_DEVICE),
                                ("--reference-device", reference_device, REFERENCE_DEVICE)):
        name = "cuda:0" if name == "cuda" else name
        if name not in there and name != default:
            raise ValueError(f"{flag} {name} is not there: choose from {', '.join(there)}")
        if name not in there:
            fallen.append(name)
        chosen.append(name if name in there else there[0])
    note = f" ({' and '.join(fallen)} not there)" if fallen else ""
    return chosen[0], chosen[1], f"placement: policy, value → {chosen[0]}; reference, reward → {chosen[1]}{note}"


@dataclass
class Models:
    """The four models, and the callables in which ppo.py sees them."""

    policy: Llama
    value: ValueModel
    reward_model: RewardModel | None
    policy_logits: Callable[[Tensor, Tensor, int], Tensor]
    reference_logits: Callable[[Tensor, Tensor, int], Tensor]
    reward: Reward
    policy_device: str
    reference_device: str
    shared: bool

    def trained(self) -> list[torch.nn.Parameter]:
        return [p for m in (self.policy, self.value) for p in m.parameters() if p.requires_grad]

    def mode(self, training: bool) -> None:
        """Dropout is on in updates and off in rollouts (released code)."""
        self.policy.train(training)
        self.value.train(training)


def choose_dtype(run: RunConfig, device: str) -> torch.dtype:
    """Full fine-tuning needs float32 weights: at a learning rate of 1e-5 most bf16 updates round away."""
    if run.tuning == "full":
        return torch.float32
    name = run.dtype if run.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")
    return getattr(torch, name)


def build_models(run: RunConfig, tokenizer, say: Callable[[str], None] = print) -> Models:
    """Loads policy, value, reference and reward and puts each on its device.

    On one device with LoRA the frozen weights stand in memory once: the reference is the policy with its adapter switched off,
    the value model is the reward model's backbone with an adapter. That is exact and makes two models of four.
    """
    policy_device, reference_device, line = resolve_devices(run.policy_device, run.reference_device)
    dtype = choose_dtype(run, policy_device)
    shared = run.tuning == "lora" and policy_device == reference_device
    say(f"{line}; {str(dtype).removeprefix('torch.')}"
        + ("; one device: frozen weights are shared, two models instead of four" if shared else ""))

    policy = Llama.from_pretrained(run.policy, dtype=dtype, device=policy_device, progress=True)
    rows = policy.config.vocab_size
    unused = check_vocabulary(tokenizer, rows, f"--policy {run.policy}")
    say(f"{describe_tokenizer(tokenizer)}; {rows:,} embedding rows in the policy" + (f", {unused} unused" if unused else ""))
    check_targets(policy, run.targets)
    reference = policy
    if not shared:
        reference = Llama.from_pretrained(run.policy, dtype=dtype, device=reference_device, progress=True).requires_grad_(False)
    reward_model, score, same_ids = load_reward(run, tokenizer, dtype, reference_device, say)
    if not same_ids:
        say("value: starts from the policy's weights, as there is no reward model with the policy's tokenizer")
        backbone = second_model(policy, own_weights=run.tuning == "full")
    elif shared:
        backbone = reward_model.backbone
    else:
        backbone = RewardModel.from_pretrained(run.reward, dtype=dtype, device=policy_device).backbone
    value = ValueModel(backbone)

    start: dict[str, Tensor] = {}  # the adapter that the reference keeps on
    if run.adapter and not shared:
        start_from(run, reference)
    if run.tuning == "lora":
        # Only now: building four models draws more numbers than building two, and neither adapters nor dropout may depend on it.
        torch.manual_seed(run.seed)
        if run.adapter:
            start = start_from(run, policy, say)
        else:
            add_lora(policy, run.lora_rank, run.lora_alpha, run.lora_dropout, run.targets)
        add_lora(backbone, run.lora_rank, run.lora_alpha, run.lora_dropout, run.targets)
    else:
        backbone.requires_grad_(True)  # its output layer is the embedding, tied, and so trains with it

    def reference_logits(input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        as_it_started = lora_weights(reference, start) if start else lora_disabled(reference)
        with as_it_started if shared else nullcontext():
            return reference(input_ids, attention_mask, logits_to_keep=keep)

    def reward(input_ids: Tensor, attention_mask: Tensor, n: int) -> Tensor:
        with lora_disabled(backbone) if shared and same_ids else nullcontext():
            return score(input_ids, attention_mask, n)

    reference.eval()
    policy.gradient_checkpointing = backbone.gradient_checkpointing = run.gradient_checkpointing
    models = Models(policy, value, reward_model, lambda ids, mask, keep: policy(ids, mask, logits_to_keep=keep),
                    reference_logits, reward, policy_device, reference_device, shared)
    models.mode(training=False)
    return models


def check_targets(model: Llama, targets: tuple[str, ...]) -> None:
    """A misspelt name would match nothing, and nobody would miss its adapters."""
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in targets:
        if target not in layers:
            raise ValueError(f"--lora-targets {target!r}: the model has no such layer; choose from {', '.join(sorted(layers))}")


def load_reward(run: RunConfig, tokenizer, dtype: torch.dtype, device: str, say: Callable[[str], None]
                ) -> tuple[RewardModel | None, Reward, bool]:
    """(reward model, how to score with it, whether it reads the policy's token ids); a rule has no model and reads text."""
    if is_rule(run.reward):
        say(f"reward: the rule {run.reward}, on decoded texts")
        return None, rule_scorer(load_rule(run.reward), tokenizer), False
    model = RewardModel.from_pretrained(run.reward, dtype=dtype, device=device).requires_grad_(False)
    its_own = load_tokenizer(run.reward).for_template(run.prompt_template)
    check_vocabulary(its_own, model.backbone.config.vocab_size, f"--reward {run.reward}")
    return model, scorer(model, tokenizer, its_own, say), same_ids(tokenizer, its_own)


def second_model(model: Llama, own_weights: bool) -> Llama:
    """Another model on the same weights, for adapters of its own, or with a copy of them, for full fine-tuning."""
    return copy.deepcopy(model, {} if own_weights else {id(p): p for p in model.parameters()})


def start_from(run: RunConfig, model: Llama, say: Callable[[str], None] = lambda line: None) -> dict[str, Tensor]:
    """Puts the trained adapter on the model and returns it as it is now, since training goes on with the same one."""
    load_lora(model, local_copy(run.adapter), part="policy")
    layers = lora_layers(model)
    for layer in layers.values():
        layer.dropout = run.lora_dropout
    first = next(iter(layers.values()))
    say(f"policy: starts from the adapter {run.adapter} (rank {first.rank}, alpha {first.alpha:g}, {len(layers)} layers); its "
        "reference keeps that adapter")
    return lora_snapshot(model)


# Checkpoints ----------------------------------------------------------------------------------------------------------


LINES = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")


@dataclass
class State:
    """Everything beside the weights that decides how a run goes on."""

    optimizer: torch.optim.Optimizer
    stream: PromptStream
    sampling: torch.Generator  # on the policy's device
    shuffling: torch.Generator  # on the CPU
    beta: float
    step: int = 0


def save_checkpoint(out: Path, run: RunConfig, models: Models, state: State) -> Path:
    """step-0020/{policy,value,trainer}, whole or not at all; with --keep, older ones go."""
    def write(part: Path) -> None:
        (part / "trainer").mkdir()
        (part / "value").mkdir()
        if run.tuning == "lora":
            save_lora(models.policy, part / "policy", base_model_name_or_path=str(run.policy))
            base = run.policy if is_rule(run.reward) else run.reward
            save_lora(models.value, part / "value", base_model_name_or_path=str(base))
        else:
            models.policy.save_pretrained(part / "policy")
            models.value.backbone.save_pretrained(part / "value")
        head = {name: tensor.detach().cpu() for name, tensor in models.value.head.state_dict().items()}
        write_atomically(part / "value" / "value_head.safetensors", lambda file: save_file(head, file))
        write_state(part / "trainer" / "state.pt", models, state)

    for name in LINES:
        if (out / name).is_file():
            flush(out / name)  # a checkpoint must not know more than the lines beside it
    final = save_whole(out / f"step-{state.step:04d}", write)
    prune(out, run.keep)
    return final


def write_state(file: Path, models: Models, state: State) -> None:
    """Optimiser, position in the data, beta and every random state."""
    random_states = {"torch": torch.get_rng_state(), "sampling": state.sampling.get_state(),
                     "shuffling": state.shuffling.get_state()}
    if models.policy_device.startswith("cuda"):
        random_states["cuda"] = torch.cuda.get_rng_state(models.policy_device)
    try:
        torch.save({"step": state.step, "beta": state.beta, "stream": state.stream.state_dict(), "random": random_states,
                    "optimizer": state.optimizer.state_dict()}, file)
    except RuntimeError as error:  # torch's kind for a full disk
        raise OSError(f"{file}: cannot be written ({str(error).splitlines()[0]})") from error


def read_state(file: Path) -> dict[str, Any]:
    """What write_state wrote, without running any code that a foreign file may hold. Raises ValueError."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(stored, dict):
            raise ValueError(f"holds a {type(stored).__name__}")
    except FileNotFoundError:
        raise
    except Exception as error:  # torch, pickle and zip each raise their own kinds
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: is no state of a trainer, or damaged ({what})") from None
    missing = [name for name in ("step", "beta", "stream", "random", "optimizer") if name not in stored]
    if missing:
        raise ValueError(f"{file}: lacks {missing[0]}")
    return stored


def load_weights(run: RunConfig, models: Models, folder: Path) -> None:
    """Policy and value of a checkpoint into models that were built with the same configuration."""
    require_whole(folder)
    if run.tuning == "lora":
        load_lora(models.policy, folder / "policy")
        load_lora(models.value, folder / "value")
    else:
        for module, name in ((models.policy, "policy"), (models.value.backbone, "value")):
            module.load_state_dict(Llama.from_pretrained(folder / name, device=models.policy_device).state_dict())
    models.value.head.load_state_dict(load_file(folder / "value" / "value_head.safetensors"))


def load_checkpoint(run: RunConfig, models: Models, state: State, folder: Path) -> None:
    """Everything save_checkpoint wrote, back in place."""
    load_weights(run, models, folder)
    stored = read_state(folder / "trainer" / "state.pt")
    state.optimizer.load_state_dict(stored["optimizer"])
    state.stream.load_state_dict(stored["stream"])
    state.step, state.beta = stored["step"], stored["beta"]
    torch.set_rng_state(stored["random"]["torch"])
    state.sampling.set_state(stored["random"]["sampling"])
    state.shuffling.set_state(stored["random"]["shuffling"])
    if "cuda" in stored["random"]:
        torch.cuda.set_rng_state(stored["random"]["cuda"], models.policy_device)


def check_run_folder(out: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None to begin at the beginning; an error when the folder holds another run's results."""
    if resume:
        sweep(out)
        found = newest_whole(out)
        if found is None and checkpoints(out):
            raise ValueError(f"--resume: no checkpoint in {out} is whole: delete the folder to start anew")
        if found is None:
            print(f"{out} holds no checkpoint yet: the run begins again")
        return found
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} already holds files: --resume goes on with that run, another --out starts a new one")
    return None


# One PPO step ---------------------------------------------------------------------------------------------------------


class PhaseBars:
    """Progress inside a step: one bar a phase with rate and time left; also adds up the seconds each phase took."""

    def __init__(self, config: PPOConfig):
        n = config.rollout_batch_size
        self.left = {"generate": n, "score": n, "update": n * config.ppo_epochs}  # responses, in the order of the phases
        self.seconds = dict.fromkeys(self.left, 0.0)
        self.mark = time.perf_counter()
        self.bar = self.next_bar()

    def next_bar(self) -> tqdm | None:
        """A bar for the first phase with anything left; shown once it has run for a second."""
        phase = next((phase for phase, n in self.left.items() if n), None)
        return phase and tqdm(total=self.left[phase], desc=f"  {phase}", unit="response", leave=False, position=1, delay=1)

    def resume(self) -> None:
        """What has passed since the last response belongs to no phase."""
        self.mark = time.perf_counter()

    def __call__(self, phase: str, n: int) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self.mark
        self.mark = now
        self.left[phase] -= n
        self.bar.update(n)
        if not self.left[phase]:
            self.bar.close()
            self.bar = self.next_bar()


@contextmanager
def folded(policy: Llama) -> Iterator[None]:
    """For sampling: in float32 the adapter is folded into the weights, which saves its cost at every token; in bf16 the fold
    would round small updates away, so there it stays apart and is rounded by itself."""
    if not exact_sampler(policy):
        with lora_cast(policy):
            yield
        return
    merge_lora(policy)
    try:
        yield
    finally:
        unmerge_lora(policy)


def exact_sampler(policy: Llama) -> bool:
    """Whether sampling computes log-probabilities as precisely as the update does: KV cache and folded adapter in float32."""
    return policy.lm_head.weight.dtype == torch.float32


def make_generate(models: Models, config: PPOConfig, tokenizer, generator: torch.Generator) -> Callable:
    """The rollout's sampler, as ppo.collect calls it."""

    def sample(prompts: Tensor, prompt_mask: Tensor) -> Tensor:
        with folded(models.policy):
            return generate(models.policy, prompts, prompt_mask, config.response_length, temperature=config.temperature,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, generator=generator,
                            return_logprobs=exact_sampler(models.policy))

    return sample


def true_kl_of(models: Models, rollout: ppo.Rollout, config: PPOConfig, tokenizer) -> float:
    """True KL per token over the vocabulary, on the first quarter of the rollout, 8 to 32 responses."""
    rows = min(32, max(8, len(rollout) // 4))
    prompts = [p[m.bool()].tolist() for p, m in zip(rollout.prompts[:rows], rollout.prompt_mask[:rows], strict=True)]
    responses = [r[m].tolist() for r, m in zip(rollout.responses[:rows], rollout.mask[:rows], strict=True)]
    return evaluate.measure_true_kl(models.policy_logits, models.reference_logits, prompts, responses,
                                    pad_token_id=tokenizer.pad_token_id, temperature=config.temperature,
                                    policy_device=models.policy_device, reference_device=models.reference_device)[0]


def ppo_step(models: Models, state: State, run: RunConfig, config: PPOConfig, tokenizer, prompts
             ) -> tuple[dict, ppo.Rollout, list[int]]:
    """One rollout and the updates on it; returns the step's metrics, the rollout and which prompts it answered."""
    bars = PhaseBars(config)
    rows = state.stream.next_batch(config.rollout_batch_size)
    input_ids, attention_mask = left_pad([prompts.ids[i] for i in rows], tokenizer.pad_token_id)
    models.mode(training=False)
    rollout = ppo.collect(
        models.policy_logits, models.value, models.reference_logits, models.reward,
        make_generate(models, config, tokenizer, state.sampling), get_estimator(run.estimator), input_ids, attention_mask,
        config, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        policy_device=models.policy_device, reference_device=models.reference_device, beta=state.beta, progress=bars)
    metrics = ppo.rollout_stats(rollout) | {"true_kl": true_kl_of(models, rollout, config, tokenizer), "beta": state.beta}
    shaped = ppo.shape_rewards(rollout.scores, rollout.penalties, rollout.mask, state.beta)
    metrics["shaped_reward"] = shaped.sum(1).mean().item()
    if state.step == 0:
        self_check(models, rollout, config)

    rate = ppo.learning_rate(state.step + 1, run.steps, config)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    models.mode(training=True)
    bars.resume()
    metrics |= ppo.update(models.policy_logits, models.value, rollout, state.optimizer, config, state.shuffling, progress=bars)
    models.mode(training=False)
    if config.kl_target is not None:
        state.beta = ppo.adapt_beta(state.beta, metrics["kl_k1"], config.kl_target, config.kl_horizon, len(rollout))
    state.step += 1
    seconds = {f"seconds_{phase}": round(s, 3) for phase, s in bars.seconds.items()}
    return {"step": state.step, "learning_rate": rate} | metrics | seconds, rollout, rows


class SelfCheckError(RuntimeError):
    """The arithmetic of rollout, reference and update does not agree."""


def self_check(models: Models, rollout: ppo.Rollout, config: PPOConfig) -> None:
    """Before the first update the ratio is 1 and the reference is the policy; anything else is a bug and stops the run."""
    found = ppo.self_check(models.policy_logits, rollout, config)
    # bf16 rounds otherwise in a batch of another shape, by up to a third for single tokens: there the mean is what tells.
    exact = models.policy.lm_head.weight.dtype == torch.float32
    tolerance, error = (1e-3, found["ratio_error"]) if exact else (0.1, found["ratio_error_mean"])
    tokens = int(rollout.mask.sum())
    line = (f"self-check over {tokens:,} tokens: ratio 1 ± {found['ratio_error']:.1e} (mean {found['ratio_error_mean']:.1e}), "
            f"|log π − log π_ref| ≤ {found['reference_gap']:.1e} before the first update")
    if not (error <= tolerance and found["reference_gap"] <= tolerance):  # NaN is none of both
        raise SelfCheckError(f"{line}: must be 0 within {tolerance}; masks, positions or weights disagree")
    tqdm.write(line)


LEGEND = """reward: the reward model's score; shaped: less beta · penalty (Eq. 3); k1, k3, KL: nats per token to the reference,
two estimates and the true one on 8 to 32 responses; clip: share of tokens clipped; grad: norm before clipping; s: seconds to
generate + score + update"""


def step_line(m: dict) -> str:
    """The line a step prints."""
    return (f"step {m['step']:4d}  reward {m['score_mean']:6.3f}  shaped {m['shaped_reward']:6.3f}  k1 {m['kl_k1']:7.4f}  "
            f"k3 {m['kl_k3']:6.4f}  KL {m['true_kl']:6.4f}  tokens {m['length']:5.1f}  clip {m['clip_fraction']:5.3f}  "
            f"v-loss {m['value_loss']:6.4f}  grad {m['grad_norm']:6.3f}  "
            f"s {m['seconds_generate']:.1f}+{m['seconds_score']:.1f}+{m['seconds_update']:.1f}")


# The run --------------------------------------------------------------------------------------------------------------


def describe(run: RunConfig, config: PPOConfig, models: Models, prompts, say: Callable[[str], None] = print) -> None:
    """Sizes that follow from the configuration, in words."""
    updates = config.ppo_epochs * config.rollout_batch_size // config.step_batch_size
    seen = run.steps * config.rollout_batch_size
    trained = sum(p.numel() for p in models.trained())
    total = sum(p.numel() for p in models.policy.parameters())
    if run.policy == TINY_PRESET["policy"]:
        numbers = [f"{name} {value}" for name, value in TINY_PRESET.items() if not isinstance(value, str)]
        say(f"miniature world, preset: {', '.join(numbers)} (flags override it)")
    say(f"{run.tuning}: {trained:,} trained parameters (policy, value and its head) beside {total:,} in the policy; "
        f"penalty {run.estimator}, beta {config.beta}")
    say(f"{run.steps} steps × {config.rollout_batch_size} responses = {seen:,} of {len(prompts.ids):,} instructions "
        f"({seen / len(prompts.ids):.2f} epochs; {prompts.dropped} dropped as longer than {run.query_length} tokens); "
        f"a step has {updates} optimiser steps of {config.step_batch_size}, in micro-batches of {config.micro_batch_size}")


def evaluate_now(models: Models, run: RunConfig, config: PPOConfig, tokenizer, benchmark: dict, label: str, kl_tokens: int = 0,
                 **measuring) -> dict:
    """evaluate.py's figures for the policy as it is, at the temperature of the rollouts; measuring: as evaluate.measure's.
    kl_tokens 0: the true KL on the answers to the benchmark alone."""
    with folded(models.policy):
        sampled = evaluate.answer(models.policy, tokenizer, benchmark, max_new_tokens=config.response_length,
                                  temperature=config.temperature, seed=run.seed, label=label, kl_tokens=kl_tokens)
    return evaluate.measure(sampled, models.policy_logits, models.reference_logits, models.reward, tokenizer, benchmark,
                            temperature=config.temperature, policy_device=models.policy_device,
                            reference_device=models.reference_device, kl_tokens=kl_tokens or 28_000, **measuring)


def save_samples(file: Path, step: int, rollout: ppo.Rollout, prompts, rows: list[int], tokenizer) -> None:
    """The first responses of a rollout in readable form."""
    for row, index in enumerate(rows):
        example = prompts.examples[index]
        text = tokenizer.decode(rollout.responses[row][rollout.mask[row]])
        append_line(file, {"step": step, "instruction": example["instruction"], "input": example.get("input", ""),
                           "response": text, "score": round(rollout.scores[row].item(), 4)})


def train(run: RunConfig, config: PPOConfig, resume: bool = False) -> Path:
    """The whole run; returns its folder."""
    out = Path(run.out)
    checkpoint = check_run_folder(out, resume)  # before anything slow
    torch.manual_seed(run.seed)
    tokenizer = load_tokenizer(run.policy).for_template(run.prompt_template)
    prompts = tokenize_prompts(load_instructions(run.data), tokenizer, run.prompt_template, run.query_length)
    benchmark = None
    if run.evaluation:
        benchmark = evaluate.load_benchmark(run.evaluation, tokenizer, run.prompt_template, run.query_length)
    models = build_models(run, tokenizer)
    optimizer = torch.optim.Adam(models.trained(), lr=config.learning_rate, eps=config.adam_eps)
    state = State(optimizer, PromptStream(len(prompts.ids), run.seed),
                  sampling=torch.Generator(models.policy_device).manual_seed(run.seed),
                  shuffling=torch.Generator().manual_seed(run.seed), beta=config.beta)
    describe(run, config, models, prompts)
    if checkpoint:
        load_checkpoint(run, models, state, checkpoint)
        print(f"resumed from {checkpoint}")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.json", json.dumps(asdict(run) | asdict(config), indent=2) + "\n")
    for name in LINES:
        cut_after(out / name, state.step if checkpoint else -1)
    with Interrupts() as interrupts:
        try:
            loop(run, config, models, state, tokenizer, prompts, benchmark, interrupts)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {state.step + 1}: {error}{save_bundle(out, state.step + 1, error)}; "
                                     f"{checkpoints_line(out)}") from error
    if interrupts.caught:
        raise Stopped(f"stopped by {interrupts.caught.name} after step {state.step} of {run.steps}; go on with: python train.py "
                      f"--resume --out {out}", interrupts.caught)
    finish(out, benchmark)
    return out


def save_bundle(out: Path, step: int, error: FloatingPointError) -> str:
    """The rollout that led to NaN or infinity, for whoever looks for the cause; returns the words that say where it is."""
    rollout = getattr(error, "rollout", None)
    if rollout is None:
        return ""
    file = out / f"debug-step-{step:04d}.pt"
    tensors = {f.name: getattr(rollout, f.name).detach().cpu() for f in fields(rollout)}
    try:
        write_atomically(file, lambda part: torch.save({"step": step, "error": str(error)} | tensors, part))
    except (OSError, RuntimeError) as trouble:
        return f"; the batch could not be saved ({str(trouble).splitlines()[0]})"
    return f"; the batch is in {file}"


def checkpoints_line(out: Path) -> str:
    """What there is to go on from."""
    found = newest_whole(out)
    return f"the last checkpoint is {found}" if found else "there is no checkpoint yet"


def loop(run: RunConfig, config: PPOConfig, models: Models, state: State, tokenizer, prompts, benchmark: dict | None,
         interrupts: Interrupts) -> None:
    """Steps until the last one or a signal, with a checkpoint every save_every and evaluations before, after and every
    eval_every."""
    out = Path(run.out)
    watch = Watch(evaluate.read_lines(out / "metrics.jsonl"))

    def evaluation(label: str) -> None:
        result = evaluate_now(models, run, config, tokenizer, benchmark, label)
        append_line(out / "evaluations.jsonl", {"step": state.step} | result)

    with tqdm(total=run.steps, initial=state.step, desc="PPO", unit="step", position=0) as bar:
        if benchmark and state.step == 0:
            evaluation("before")
        tqdm.write(LEGEND)
        while state.step < run.steps and not interrupts.caught:
            metrics, rollout, rows = ppo_step(models, state, run, config, tokenizer, prompts)
            append_line(out / "metrics.jsonl", metrics)
            tqdm.write(step_line(metrics))
            for line in watch(metrics):
                tqdm.write(line)
            bar.update()
            save_samples(out / "samples.jsonl", state.step, rollout, prompts, rows[:4], tokenizer)
            if benchmark and (state.step == run.steps or run.eval_every and state.step % run.eval_every == 0):
                evaluation(f"step {state.step}")
            if state.step % run.save_every == 0 or state.step == run.steps or interrupts.caught:
                save_checkpoint(out, run, models, state)


def finish(out: Path, benchmark: dict | None) -> None:
    """The before/after table, three pairs of answers, the picture, and where all of it lies."""
    evaluations = evaluate.read_lines(out / "evaluations.jsonl")
    if evaluations:
        print("\n" + show.before_after(evaluations[0], evaluations[-1], benchmark["tasks"]))
    picture = show.draw_curves(out)
    print(f"\nwritten to {out}: {', '.join(sorted(p.name for p in out.iterdir() if not p.name.startswith('.')))}"
          + ("" if picture else "\ncurves.png needs matplotlib: pip install matplotlib"))


def plan_of(run: RunConfig, config: PPOConfig) -> str:
    """plan.py's table for the placement of this run, for one GPU and for two, and what each knob would save."""
    policy, _ = open_checkpoint(local_copy(run.policy))
    critic = policy if is_rule(run.reward) else reward_config(local_copy(run.reward))
    first, second, line = resolve_devices(run.policy_device, run.reference_device)

    def memory(run: RunConfig, config: PPOConfig, first: str, second: str) -> dict[str, dict[str, float]]:
        return plan.plan(policy, critic, size=choose_dtype(run, first).itemsize, tuning=run.tuning, rank=run.lora_rank,
                         targets=run.targets, dropout=run.lora_dropout, checkpointing=run.gradient_checkpointing,
                         config=config, query_length=run.query_length, policy_device=first, reference_device=second)

    def fullest(run: RunConfig, config: PPOConfig) -> float:
        return max(sum(items.values()) for items in memory(run, config, first, second).values())

    lines = [line, plan.table(memory(run, config, first, second))]
    smaller = {}
    for name in ("micro_batch_size", "rollout_micro_batch_size", "response_length"):
        if (half := getattr(config, name) // 2) and (name != "micro_batch_size" or config.step_batch_size % half == 0):
            smaller[f"--{name.replace('_', '-')} {half}"] = fullest(run, replace(config, **{name: half}))
    smaller["--gradient-checkpointing"] = fullest(replace(run, gradient_checkpointing=True), config)
    smaller["--query-length " + str(half := max(1, run.query_length // 2))] = fullest(replace(run, query_length=half), config)
    if choose_dtype(run, first).itemsize == 4 and run.tuning == "lora":
        smaller["--dtype bfloat16"] = fullest(replace(run, dtype="bfloat16"), config)
    if run.tuning == "full":
        smaller["--tuning lora"] = fullest(replace(run, tuning="lora"), config)
    lines.append(plan.advice(fullest(run, config), smaller))
    for names in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
        if names != (first, second):
            there = memory(run, config, *names)
            lines.append(f"on {len(there)} GPU{'s' * (len(there) > 1)}: "
                         + ", ".join(f"{device} {sum(items.values()) / plan.GIB:.2f} GiB" for device, items in there.items()))
    return "\n".join(filter(None, lines))


def main() -> int:
    given = vars(build_parser().parse_args())
    resume, only_plan = given.pop("resume", False), given.pop("plan", False)
    try:
        run, config = stored_config(given) if resume else build_config(given)
        if only_plan:
            print(plan_of(run, config))
        else:
            train(run, config, resume)
    except Stopped as stopped:
        print(stopped)
        return stopped.exit_code
    except (ValueError, FileNotFoundError, PermissionError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError, SelfCheckError) as error:  # a full disk, NaN, arithmetic that doesn't agree
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"train.py: {str(error).splitlines()[0]}; python train.py --plan with the same flags says what to turn",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
