# SPDX-License-Identifier: MIT
"""What a run needs on each device, before anything is loaded: python train.py --plan.

    print(plan_of(run))                                     # the whole advice, for the devices that the run names
    mode = sampling_mode(run, policy_config, reward_config, share=8, room=80e9)          # what --shard auto means there

memory.py counts; here is what follows: what to turn when it doesn't fit, how many GPUs and nodes it would take, and who holds
which weights under --shard. A device counts as full at nine tenths (FULL).
"""

import os
from dataclasses import replace
from typing import Any

import torch

from formats.read import local_copy, open_config
from lora import load_lora
from model import LlamaConfig, without_memory
from reward import open_backbone
from training.config import RunConfig
from training.devices import resolve_devices
from training.memory import GIB, plan
from training.models import check_targets, choose_dtype, window_warnings
from training.ranks import Ranks
from training.ranks import here as team
from training.ranks import require_equal
from training.rewards import is_rule, require_model_name
from training.shard import Shards, machine_mesh

FULL = 0.9  # of a device's memory: the rest is CUDA's context, NCCL's buffers and what the caching allocator can't give again
CARDS = (24, 40, 80)  # GiB; of the table where there is no GPU
SIZES = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 2), (32, 4), (64, 8))  # (GPUs, nodes) of the table


def plan_of(run: RunConfig, gpu_dtype: str | None = None) -> str:
    """The table for the devices that the run names, what each knob would save, and the sums for one GPU, for two and for many.

    gpu_dtype: --dtype for GPUs, where the run's own was chosen for a CPU.
    """
    policy, reward = shapes(run)
    critic = reward or policy
    if run.tuning == "lora":
        check_targets(without_memory(policy), run.targets)
    if run.adapter:  # what the run would refuse is refused here
        load_lora(without_memory(policy), local_copy(run.adapter), part="policy")
    ranks, share, gpu = team().size, neighbours() if run.shard else 1, room(run.policy_device)
    whole = (run.shard if run.shard != "auto" else sampling_mode(run, policy, critic, share, gpu)) != "in-step"

    def counted(run: RunConfig) -> dict[str, dict[str, float]]:
        return plan(run, policy, critic, share, whole, ranks)

    def fullest(run: RunConfig) -> float:
        return max(sum(items.values()) for items in counted(run).values())

    lines = [*window_warnings(run, policy, reward), table(counted(run)),
             f"so much for each of {ranks} processes"
             + f", which share the frozen weights, {share} a machine" * (share > 1) if ranks > 1 else "",
             advice(fullest(run), {flag: fullest(r) for flag, r in knobs(run).items()})]
    on_gpus = replace(run, dtype=gpu_dtype or run.dtype)
    for names in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
        there = replace(on_gpus, policy_device=names[0], reference_device=names[1])
        if names != (run.policy_device, run.reference_device):
            memory = plan(there, policy, critic)
            lines.append(f"on {len(memory)} GPU{'s' * (len(memory) > 1)}: "
                         + ", ".join(f"{device} {sum(items.values()) / GIB:.2f} GiB" for device, items in memory.items()))
    lines.append(scale_table(on_gpus, policy, critic, gpu, (ranks, ranks // neighbours()) if ranks > 1 else None))
    return "\n".join(filter(None, lines))


def shapes(run: RunConfig) -> tuple[LlamaConfig, LlamaConfig | None]:
    """Of the policy and of the reward model; None: a rule."""
    policy = open_config(run.policy, LlamaConfig.from_dict)
    if run.reward is None or is_rule(run.reward):
        return policy, None
    require_model_name(run.reward, "--reward")
    try:  # of its config.json, before a download
        return policy, open_config(run.reward, lambda values: LlamaConfig.from_dict(values | {"tie_word_embeddings": True}))
    except ValueError:  # AlpacaFarm's names no sizes, and what is wrong with others is said by who reads them
        return policy, open_backbone(local_copy(run.reward))[0].config


def knobs(run: RunConfig) -> dict[str, RunConfig]:
    """{flag: the run with that flag}, of everything that saves memory."""
    def with_ppo(**changes: Any) -> RunConfig:
        return replace(run, ppo=replace(run.ppo, **changes))

    turned = {}
    for name in ("micro_batch_size", "rollout_micro_batch_size", "response_length"):
        if (half := getattr(run.ppo, name) // 2) and (name != "micro_batch_size" or run.ppo.step_batch_size % half == 0):
            turned[f"--{name.replace('_', '-')} {half}"] = with_ppo(**{name: half})
    turned["--gradient-checkpointing"] = replace(run, gradient_checkpointing=True)
    turned["--query-length " + str(half := max(1, run.query_length // 2))] = replace(run, query_length=half)
    if choose_dtype(run, run.policy_device).itemsize == 4 and run.tuning == "lora":
        turned["--dtype bfloat16"] = replace(run, dtype="bfloat16")
    if run.tuning == "full":
        turned["--tuning lora"] = replace(run, tuning="lora")
    return turned


def table(memory: dict[str, dict[str, float]]) -> str:
    """A line an item, in GiB, with the sum of each device."""
    lines = []
    for device, items in memory.items():
        lines.append(f"{device}: {sum(items.values()) / GIB:.2f} GiB")
        lines += [f"    {name:<40}{amount / GIB:8.3f}" for name, amount in items.items() if amount]
    return "\n".join(lines)


def advice(before: float, changed: dict[str, float]) -> str:
    """What each change would save, largest first: {flag: GiB on the fullest device with it}."""
    saved = sorted(((before - after, flag) for flag, after in changed.items()), reverse=True)
    lines = [f"    {flag:<40}{amount / GIB:8.3f} less" for amount, flag in saved if amount > 0.005 * before]
    return "what to turn when it doesn't fit:\n" + "\n".join(lines) if lines else ""


# ------------------------------------------------------------------------------------------------------- several GPUs


def room(device: str) -> float | None:
    """Bytes that are free on a GPU; None: it is a CPU."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else None


def neighbours() -> int:
    """How many of the run's processes are on one machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", team().size)) if team().size > 1 else 1


def require_sharable(run: RunConfig, resume: bool) -> None:
    """Raises ValueError where --shard has nobody to share with. A run that is resumed by one process has room in it."""
    if run.shard and team().size == 1 and not resume:
        raise ValueError("--shard: there is one process, which holds it all: leave the flag away, or start several, torchrun "
                         "--standalone --nproc-per-node N train.py ...")


def shards_of(run: RunConfig) -> Shards | None:
    """Who holds which frozen weights under --shard; None where this process holds all. Every process of the run must ask, and
    from here on they keep in step."""
    Ranks.in_step = False
    if not run.shard:
        return None
    require_equal("with --shard", {"processes a machine": neighbours()})
    if neighbours() == 1:
        print("the run's --shard: a process alone on its machine holds all of the frozen weights")
        return None
    device, its, _ = resolve_devices(run.policy_device, run.reference_device)
    if device != its:
        raise ValueError(f"--shard: all four models of a process stand on one device, not on {device} and {its}: start as many "
                         "processes as there are GPUs (--nproc-per-node)")
    modes = {run.shard}
    if run.shard == "auto":
        run, (policy, reward) = replace(run, policy_device=device, reference_device=its), shapes(run)
        modes = set(team().gather(lambda: sampling_mode(run, policy, reward or policy, neighbours(), room(device))))
    shards = Shards(machine_mesh(device), whole="in-step" not in modes)
    Ranks.in_step = True
    return shards


def sampling_mode(run: RunConfig, policy: Any, critic: Any, share: int, room: float | None) -> str:
    """"whole" where a process that puts the policy's sharded weights together for sampling stays within FULL of the room (bytes)
    on each of its devices, else "in-step", layer by layer at each token; room None: it is not known, and "whole"."""
    memory = plan(run, policy, critic, share, whole=True, ranks=max(share, team().size))
    return "whole" if room is None or max(sum(items.values()) for items in memory.values()) <= FULL * room else "in-step"


def forms(run: RunConfig, policy: Any, critic: Any, ranks: int, nodes: int) -> dict[str, float]:
    """{"parallel" | "whole" | "in-step": bytes a GPU}, one process a GPU: frozen weights on each, or sharded inside a node."""
    run, share = replace(run, policy_device="cuda:0", reference_device="cuda:0"), ranks // nodes
    found = {"parallel": plan(run, policy, critic, ranks=ranks)}
    if share > 1 and run.tuning == "lora":
        found |= {name: plan(run, policy, critic, share, name == "whole", ranks) for name in ("whole", "in-step")}
    return {name: sum(memory["cuda:0"].values()) for name, memory in found.items()}


def evenly(run: RunConfig, ranks: int) -> RunConfig | None:
    """The run with the largest micro-batches, up to its own, that so many processes share evenly (ranks.require_even)."""
    step = run.ppo.step_batch_size
    micro = next((m for m in range(run.ppo.micro_batch_size, 0, -1) if step % (m * ranks) == 0), 0)
    return replace(run, ppo=replace(run.ppo, micro_batch_size=micro)) if micro else None


def scale_table(run: RunConfig, policy: Any, critic: Any, gpu: float | None, own: tuple[int, int] | None = None) -> str:
    """A line for each number of GPUs and nodes, with what fits a GPU of `gpu` bytes (None: of CARDS); own: the run's, if several
    processes share it. One line for all of them where a single GPU would be half empty."""
    cards = [gpu / GIB] if gpu else CARDS
    alone = forms(run, policy, critic, 1, 1)["parallel"] / GIB
    if alone <= cards[0] / 2:
        return f"one GPU of {cards[0]:.0f} GiB holds all of it ({alone:.2f} GiB): nothing needs to be sharded (docs/scale.md)"
    lines = [f"GiB a GPU, one process a GPU, {str(choose_dtype(run, 'cuda')).removeprefix('torch.')} (foretold); and what fits a "
             f"GPU, in {FULL:g} of it:",
             f"{'GPUs':>6}{'nodes':>7}{'micro-batch':>13}{'parallel':>10}{'whole':>8}{'in-step':>9}"
             + "".join(f"{f'{card:.0f} GiB':>10}" for card in cards)]
    for ranks, nodes in sorted({*SIZES, own or (1, 1)}):
        mark = "  this run" if (ranks, nodes) == own else ""
        shared = evenly(run, ranks)
        if shared is None:
            lines.append(f"{ranks:>6}{nodes:>7}  none: --step-batch-size must be a multiple of {ranks}{mark}")
            continue
        found = {name: amount / GIB for name, amount in forms(shared, policy, critic, ranks, nodes).items()}
        widths = {"parallel": 10, "whole": 8, "in-step": 9}
        amounts = [f"{found[name]:>{w}.1f}" if name in found else f"{'-':>{w}}" for name, w in widths.items()]
        fitting = [f"{next((name for name, amount in found.items() if amount <= FULL * card), '-'):>10}" for card in cards]
        lines.append(f"{ranks:>6}{nodes:>7}{shared.ppo.micro_batch_size:>13}" + "".join(amounts + fitting) + mark)
    return "\n".join([*lines, "parallel: frozen weights on each GPU; whole, in-step: --shard (docs/scale.md)"])
