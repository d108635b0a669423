# SPDX-License-Identifier: MIT
"""Checkpoints of a run: step-0020/{policy,value,trainer}, from which a resumed run repeats the one that was never stopped.

policy/ and value/ are adapters in PEFT's layout (or whole models, with full fine-tuning), beside the value head; trainer/ holds
the optimiser, the position in the data, beta and every random state. Departs from the released code, which saves a checkpoint
before the step that it is named by, and no random state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data import Prompts, PromptStream
from formats.write import write_atomically, write_json
from lora import load_lora, save_lora
from model import Llama
from training.config import RunConfig
from training.folder import flush, prune, require_whole, save_whole
from training.models import Models
from training.origin import ORIGIN, check_origin
from training.rewards import is_rule

LINES = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")


@dataclass
class State:
    """Everything beside the weights that decides how a run goes on."""

    optimizer: torch.optim.Optimizer
    prompts: Prompts            # the instructions of the run
    stream: PromptStream        # the order in which they come
    sampling: torch.Generator   # on the policy's device
    shuffling: torch.Generator  # on the CPU
    beta: float
    step: int = 0
    # Digests of the data and of what training leaves as it is (origin.py), and how many instructions were used and dropped.
    origin: dict[str, str | int] = field(default_factory=dict)

    @classmethod
    def at_start(cls, run: RunConfig, models: Models, prompts: Prompts) -> "State":
        """Before the first step."""
        return cls(torch.optim.Adam(models.trained(), lr=run.ppo.learning_rate, eps=run.ppo.adam_eps), prompts,
                   PromptStream(len(prompts.ids), run.seed),
                   sampling=torch.Generator(models.policy_device).manual_seed(run.seed),
                   shuffling=torch.Generator().manual_seed(run.seed), beta=run.ppo.beta)

    def position(self, device: str) -> dict[str, Any]:
        """Where the run stands between two steps, with every random state; device: the policy's."""
        kind = torch.device(device).type
        random = {"torch": torch.get_rng_state(), "sampling": self.sampling.get_state(), "shuffling": self.shuffling.get_state()}
        if kind != "cpu":  # dropout draws there
            random[kind] = torch.mps.get_rng_state() if kind == "mps" else torch.cuda.get_rng_state(device)
        return {"step": self.step, "beta": self.beta, "stream": self.stream.state_dict(), "random": random}

    def go_to(self, position: dict[str, Any], device: str) -> None:
        """Back to such a place."""
        self.step, self.beta, random = position["step"], position["beta"], position["random"]
        self.stream.load_state_dict(position["stream"])
        torch.set_rng_state(random["torch"])
        self.sampling.set_state(random["sampling"])
        self.shuffling.set_state(random["shuffling"])
        if "mps" in random:
            torch.mps.set_rng_state(random["mps"])
        elif "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], device)


def save_checkpoint(out: Path, run: RunConfig, models: Models, state: State, card: Callable[..., object] | None = None) -> Path:
    """step-0020/{policy,value,trainer}, whole or not at all; with --keep, older ones go. card(policy/, out, run, step) may
    describe the policy in its folder."""
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
        if card:
            card(part / "policy", out, run, state.step)
        head = {name: tensor.detach().cpu() for name, tensor in models.value.head.state_dict().items()}
        write_atomically(part / "value" / "value_head.safetensors", lambda file: save_file(head, file))
        write_state(part / "trainer" / "state.pt", models, state)
        write_json(part / "trainer" / ORIGIN, state.origin)

    for name in LINES:
        if (out / name).is_file():
            flush(out / name)  # a checkpoint must not know more than the lines beside it
    final = save_whole(out / f"step-{state.step:04d}", write)
    prune(out, run.keep)
    return final


def write_state(file: Path, models: Models, state: State) -> None:
    """Position and optimiser."""
    try:
        torch.save(state.position(models.policy_device) | {"optimizer": state.optimizer.state_dict()}, file)
    except RuntimeError as error:  # torch's kind for a full disk
        raise OSError(f"{file}: cannot be written ({str(error).splitlines()[0]})") from error


# -------------------------------------------------------------------------------------------------------------- reading


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
    """Policy and value of a checkpoint into models that were built with the same configuration, from the same files."""
    require_whole(folder)
    check_origin(folder, models.origin, vars(run))
    if run.tuning == "lora":
        load_lora(models.policy, folder / "policy")
        load_lora(models.value, folder / "value")
    else:
        for module, name in ((models.policy, "policy"), (models.value.backbone, "value")):
            module.load_state_dict(Llama.from_pretrained(folder / name, device=models.policy_device).state_dict())
    models.value.head.load_state_dict(load_file(folder / "value" / "value_head.safetensors"))


def load_checkpoint(run: RunConfig, models: Models, state: State, folder: Path) -> None:
    """Everything save_checkpoint wrote, back in place."""
    stored = read_state(folder / "trainer" / "state.pt")
    here = torch.device(models.policy_device).type
    kind = next((kind for kind in ("cuda", "mps") if kind in stored["random"]), "cpu")
    if kind != here:
        raise ValueError(f"--resume: {folder} was written on {kind} and its random states mean nothing on {here}: go on with "
                         f"--policy-device {kind}, or start a new run from its policy, --adapter {folder / 'policy'}")
    load_weights(run, models, folder)
    state.optimizer.load_state_dict(stored["optimizer"])
    state.go_to(stored, models.policy_device)


# ------------------------------------------------------------------------------------------------ when a run ends early


def save_bundle(out: Path, step: int, error: Exception, sampled: list[tuple[torch.Tensor, ...]]) -> str:
    """The rollout that led to NaN or that a rule failed on (of which there are only the samples), for whoever looks for the
    cause; returns the words that say where it is."""
    rollout = getattr(error, "rollout", None)
    if rollout is None and not sampled:
        return ""
    file = out / f"debug-step-{step:04d}.pt"
    names = ("prompts", "prompt_mask", "responses")
    tensors: dict[str, Any] = {name: [chunk[i].cpu() for chunk in sampled] for i, name in enumerate(names)}
    if rollout is not None:
        tensors = {f.name: getattr(rollout, f.name).detach().cpu() for f in fields(rollout)}
    try:
        write_atomically(file, lambda part: torch.save({"step": step, "error": str(error)} | tensors, part))
    except (OSError, RuntimeError) as trouble:
        return f"; the batch could not be saved ({str(trouble).splitlines()[0]})"
    return f"; the batch is in {file}"
