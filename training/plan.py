# SPDX-License-Identifier: MIT
"""What a run needs on each device, before anything is loaded: python train.py --plan.

Four models stand in memory in the third stage of RLHF (the paper's section 2.1 and "Limitations"). Here is what they cost,
counted from their configurations: frozen weights, adapters, optimiser, and the larger of what sampling needs (a second
copy of the adapted weights, keys and values, logits) and what an update needs (activations kept for the backward pass,
logits and their gradient). Bytes of a token and layer are counted in `activations`, where the code that keeps them is named.

    print(plan_of(run))                                     # the whole advice, for the devices that the run names
    memory = plan(run, policy_config, reward_config)        # {device: {item: bytes}}
    memory = plan(run, policy_config, reward_config, share=8, whole=False, ranks=16)     # of one process of sixteen, --shard
    mode = sampling_mode(run, policy_config, reward_config, share=8, room=80e9)          # what --shard auto means there

On a CPU two more items are measured, not counted: the program itself, and what the C library's allocator holds in the gaps
between its blocks (bench/README.md tells how well the sum foresees the peak). On a GPU the figure is that of torch's own
count of allocated memory; CUDA's context and the caching allocator's reserve come on top: a device counts as full at nine
tenths (FULL).

Sharded (torch 2.13's fully_shard): a unit, which is a layer, an embedding or an output layer, is gathered for its pass into a
buffer and copied from there into its weights; the buffer is freed as the next unit's is filled. Backward, the next unit is
gathered beside the one in use. So two units are in flight, whichever they are. What a process holds of a unit stays beside the
gathered one. The root of a model (its last norm, and an embedding that is its output layer too) stays gathered.
"""

import os
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from formats.read import local_copy, open_checkpoint
from lora import load_lora
from model import LlamaConfig, without_memory
from reward import open_backbone
from training.config import RunConfig
from training.models import check_targets, choose_dtype, reference_dtype, window_warnings
from training.ranks import here as team
from training.rewards import is_rule, require_model_name

GIB = 2**30
PROGRAM = 0.35 * GIB  # resident after the imports of train.py, Linux
GAPS = 0.55  # of everything that comes and goes, glibc
FULL = 0.9  # of a device's memory: the rest is CUDA's context, NCCL's buffers and what the caching allocator can't give again
CARDS = (24, 40, 80)  # GiB; of the table where there is no GPU
SIZES = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 2), (32, 4), (64, 8))  # (GPUs, nodes) of the table


def plan_of(run: RunConfig, gpu_dtype: str | None = None) -> str:
    """The table for the devices that the run names, what each knob would save, and the sums for one GPU, for two and for many.

    gpu_dtype: --dtype for GPUs, where the run's own was chosen for a CPU.
    """
    policy, _ = open_checkpoint(run.policy, LlamaConfig.from_dict)
    reward = None
    if not is_rule(run.reward):
        require_model_name(run.reward, "--reward")
        reward = open_backbone(local_copy(run.reward))[0].config
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


def plan(run: RunConfig, policy: Any, critic: Any, share: int = 1, whole: bool = True,
         ranks: int = 1) -> dict[str, dict[str, float]]:
    """{device: {item: bytes}} of one process; policy and critic are model configurations, whose devices the run names.

    The reward model has the critic's shape; its output layer is its embedding (reward.py). On one device with LoRA the frozen
    weights stand once, and where the reward is a rule, the value model's are the policy's (models.build_models).
    share: how many GPUs the frozen weights are sharded over; whole: whether they are put together for sampling. ranks: how many
    processes share the rollout, which they all hold in the end (a few MB, counted nowhere).
    """
    config, rank, targets = run.ppo, run.lora_rank, run.targets
    dtype = choose_dtype(run, run.policy_device)
    size, frozen = dtype.itemsize, reference_dtype(run, dtype)
    cpu, full = run.policy_device.startswith("cpu"), run.tuning == "full"
    shared = run.policy_device == run.reference_device and not full and frozen == dtype
    rule = bool(run.reward) and is_rule(run.reward)
    critic = critic if rule else replace(critic, tie_word_embeddings=True)
    frozen_models = (policy,) if rule and not full else (policy, critic)
    weights = sum(map(parameters, frozen_models))
    trained = weights if full else adapter_parameters(policy, targets, rank) + adapter_parameters(critic, targets, rank)
    roots, units = {}, {}  # what stands whole beside the shards: always, and in passes
    if share > 1:
        roots = {"roots of the models, whole": size * sum(map(root, frozen_models))}
        units = {"two units of weights, whole": 2 * size * max(map(largest_unit, frozen_models))}

    rows = min(config.rollout_micro_batch_size, -(-config.rollout_batch_size // ranks))
    sampling = sampled(run, policy, size, rows, fold=not full and size == 4 and (share == 1 or whole))
    if share > 1:
        sampling |= {"policy, put together": size * (parameters(policy) - root(policy))} if whole else units
    update = updated(run, policy, critic, size) | units
    # The true KL reads 16 responses at once, with the logits of two models.
    reading = {"logits of two models": 2 * size * 16 * config.response_length * policy.vocab_size} | units
    exchange = {"gradients in one piece": 4 * trained} if ranks > 1 else {}  # Ranks.total, when activations are gone

    phase = max((sampling, update, reading, exchange), key=lambda items: sum(items.values()))
    here = {"frozen weights" if not full else "weights": size * weights // share}
    if not full:
        here["adapters"] = 4 * trained
    here |= {"gradients and Adam": 12 * trained} | roots | phase
    if cpu:
        here["gaps between blocks"] = GAPS * sum(sum(items.values()) for items in (sampling, update, reading, exchange))
        here["program"] = PROGRAM
    memory = {run.policy_device: here}
    if not shared:
        wide, tokens = frozen.itemsize, config.micro_batch_size * (run.query_length + config.response_length)
        read = tokens * (3 * wide * policy.intermediate_size + 8 * policy.hidden_size) \
            + 2 * wide * config.micro_batch_size * config.response_length * policy.vocab_size
        other = {"frozen weights, reference and reward": wide * weights // share, "reading": read}
        if share > 1:
            other["whole of reference and reward"] = wide * (sum(roots.values()) + sum(units.values())) // size
        if run.reference_device == run.policy_device:
            here |= other
        else:
            memory[run.reference_device] = other
    return memory


def sampled(run: RunConfig, policy: Any, size: int, rows: int, fold: bool) -> dict[str, float]:
    """{item: bytes} that sampling `rows` responses at once needs beside the weights."""
    P, T = run.query_length, run.ppo.response_length
    head = [(policy.hidden_size, policy.vocab_size)] * ("lm_head" in run.targets)
    numbers = sum(i * o for i, o in adapted(policy, run.targets) * policy.num_hidden_layers + head)
    return {
        "adapted weights, folded": 4 * numbers * fold,
        "keys and values": 2 * policy.num_hidden_layers * sizes(policy)[4] * rows * (P + T) * size,
        "logits": (size + 4 * 4) * rows * policy.vocab_size,  # and in float32: scaled, probabilities, their sums
        "prompts": rows * P * (3 * size * policy.intermediate_size + 8 * policy.hidden_size),
    }


def updated(run: RunConfig, policy: Any, critic: Any, size: int) -> dict[str, float]:
    """{item: bytes} that forward and backward pass of a micro-batch need beside the weights."""
    micro, T, full = run.ppo.micro_batch_size, run.ppo.response_length, run.tuning == "full"
    largest = 0
    for model in (policy, critic):  # one after the other: the larger counts
        layer = activations(model, run.targets, run.lora_rank, size, run.policy_device.startswith("cpu"), run.lora_dropout > 0,
                            full)
        layers = model.num_hidden_layers
        passing = 6 * size * model.intermediate_size + 16 * model.hidden_size  # what flows back through one layer
        recomputed = size * model.hidden_size * layers + layer  # every layer's input, and one layer's activations
        amount = (recomputed if run.gradient_checkpointing else layers * layer) + passing
        largest = max(largest, micro * (run.query_length + T) * amount)
    return {"activations": largest, "logits and gradient": 2 * size * micro * T * policy.vocab_size}


def parameters(model) -> int:
    """Weights of a LLaMA of that configuration; a tied output layer counts once."""
    D, _, V, _, _ = sizes(model)
    return model.num_hidden_layers * layer_parameters(model) + V * D * (1 if model.tie_word_embeddings else 2) + D


def layer_parameters(model) -> int:
    """Weights of one block."""
    D, F, _, queries, keys = sizes(model)
    return 2 * D * queries + 2 * D * keys + 3 * D * F + 2 * D


def root(model) -> int:
    """Weights that belong to no unit of their own when a model is sharded."""
    return model.hidden_size * (1 + model.vocab_size * model.tie_word_embeddings)


def largest_unit(model) -> int:
    """Weights of the largest that is gathered at once."""
    return max(layer_parameters(model), 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size)


def sizes(model) -> tuple[int, int, int, int, int]:
    """(hidden, inner, vocabulary, all query heads, all key heads)."""
    head = model.head_dim
    return (model.hidden_size, model.intermediate_size, model.vocab_size, model.num_attention_heads * head,
            model.num_key_value_heads * head)


def adapted(model, targets: Collection[str]) -> list[tuple[int, int]]:
    """(inputs, outputs) of every adapted layer of one block; lm_head stands in none."""
    D, F, _, queries, keys = sizes(model)
    shapes = {"q_proj": (D, queries), "k_proj": (D, keys), "v_proj": (D, keys), "o_proj": (queries, D),
              "gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
    return [shapes[name] for name in targets if name in shapes]


def adapter_parameters(model, targets: Collection[str], rank: int) -> int:
    """Numbers in A and B of a whole model."""
    layers = model.num_hidden_layers * sum(rank * (inputs + outputs) for inputs, outputs in adapted(model, targets))
    return layers + rank * (model.hidden_size + model.vocab_size) * ("lm_head" in targets)


def activations(model, targets: Collection[str], rank: int, size: int, cpu: bool, dropout: bool, full: bool) -> int:
    """Bytes that the backward pass finds again, per token and layer, at `size` bytes a number.

    model.py: RMSNorm keeps its input (in float32 on a CPU), attention its q, k, v and output (in float32 on a CPU), the
    layers after them their inputs, SwiGLU three inner vectors. lora.py: a byte an input for dropout, and A h.
    """
    D, F, _, queries, keys = sizes(model)
    wide = 4 if cpu else size
    attention = wide * (queries + 2 * keys) + (wide * queries if wide != size else 0) + size * queries
    amount = 2 * wide * D + size * D + attention + 3 * size * F + 4 * rank * len(targets) * (not full)
    if full:  # the gradient of W needs the MLP's inputs too
        amount += size * (D + F)
    return amount + (sum(inputs for inputs, _ in adapted(model, targets)) if dropout and not full else 0)


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
