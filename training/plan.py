# SPDX-License-Identifier: MIT
"""What a run needs on each device, before anything is loaded: python train.py --plan.

Four models stand in memory in the third stage of RLHF (the paper's section 2.1 and "Limitations"). Here is what they cost,
counted from their configurations: frozen weights, adapters, optimiser, and the larger of what sampling needs (a second
copy of the adapted weights, keys and values, logits) and what an update needs (activations kept for the backward pass,
logits and their gradient). Bytes of a token and layer are counted in `activations`, where the code that keeps them is named.

    print(plan_of(run))                                     # the whole advice, for the devices that the run names
    memory = plan(run, policy_config, reward_config)        # {device: {item: bytes}}

On a CPU two more items are measured, not counted: the program itself, and what the C library's allocator holds in the gaps
between its blocks (bench/README.md tells how well the sum foresees the peak). On a GPU the figure is that of torch's own
count of allocated memory; CUDA's context and the caching allocator's reserve come on top.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from formats.read import local_copy, open_checkpoint
from lora import load_lora
from model import LlamaConfig, without_memory
from reward import open_backbone
from training.config import RunConfig
from training.models import check_targets, choose_dtype, reference_dtype, window_warnings
from training.rewards import is_rule, require_model_name

GIB = 2**30
PROGRAM = 0.35 * GIB  # resident after the imports of train.py, Linux
GAPS = 0.55  # of everything that comes and goes, glibc


def plan_of(run: RunConfig) -> str:
    """The table for the devices that the run names, for one GPU and for two, and what each knob would save."""
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

    def fullest(run: RunConfig) -> float:
        return max(sum(items.values()) for items in plan(run, policy, critic).values())

    lines = [*window_warnings(run, policy, reward), table(plan(run, policy, critic)),
             advice(fullest(run), {flag: fullest(r) for flag, r in knobs(run).items()})]
    for names in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
        if names != (run.policy_device, run.reference_device):
            there = plan(replace(run, policy_device=names[0], reference_device=names[1]), policy, critic)
            lines.append(f"on {len(there)} GPU{'s' * (len(there) > 1)}: "
                         + ", ".join(f"{device} {sum(items.values()) / GIB:.2f} GiB" for device, items in there.items()))
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


def plan(run: RunConfig, policy: Any, critic: Any) -> dict[str, dict[str, float]]:
    """{device: {item: bytes}}; policy and critic are model configurations, whose devices the run names.

    The reward model has the critic's shape. On one device with LoRA the frozen weights stand once (models.build_models).
    """
    config, rank, targets = run.ppo, run.lora_rank, run.targets
    dtype = choose_dtype(run, run.policy_device)
    size, frozen = dtype.itemsize, reference_dtype(run, dtype)
    cpu, full = run.policy_device.startswith("cpu"), run.tuning == "full"
    shared = run.policy_device == run.reference_device and not full and frozen == dtype
    P, T, micro = run.query_length, config.response_length, config.micro_batch_size
    weights = size * (parameters(policy) + parameters(critic))
    trained = parameters(policy) + parameters(critic) if full else \
        adapter_parameters(policy, targets, rank) + adapter_parameters(critic, targets, rank)

    rows, D = config.rollout_micro_batch_size, policy.hidden_size
    head = [(policy.hidden_size, policy.vocab_size)] * ("lm_head" in targets)
    folded = 0 if full or size != 4 else 4 * sum(i * o for i, o in adapted(policy, targets) * policy.num_hidden_layers + head)
    sampling = {
        "adapted weights, folded": folded,
        "keys and values": 2 * policy.num_hidden_layers * sizes(policy)[4] * rows * (P + T) * size,
        "logits": (size + 4 * 4) * rows * policy.vocab_size,  # and in float32: scaled, probabilities, their sums
        "prompts": rows * P * (3 * size * policy.intermediate_size + 8 * D),
    }
    largest = 0
    for model in (policy, critic):  # one after the other: the larger counts
        layer = activations(model, targets, rank, size, cpu, run.lora_dropout > 0, full)
        layers = model.num_hidden_layers
        passing = 6 * size * model.intermediate_size + 16 * model.hidden_size  # what flows back through one layer
        recomputed = size * model.hidden_size * layers + layer  # every layer's input, and one layer's activations
        largest = max(largest, micro * (P + T) * ((recomputed if run.gradient_checkpointing else layers * layer) + passing))
    update = {"activations": largest, "logits and gradient": 2 * size * micro * T * policy.vocab_size}
    # The true KL reads 16 responses at once, with the logits of two models.
    reading = {"logits of two models": 2 * size * 16 * T * policy.vocab_size}

    phase = max((sampling, update, reading), key=lambda items: sum(items.values()))
    here = {"frozen weights" if not full else "weights": weights}
    if not full:
        here["adapters"] = 4 * trained
    here |= {"gradients and Adam": 12 * trained} | phase
    if cpu:
        here["gaps between blocks"] = GAPS * sum(sum(items.values()) for items in (sampling, update, reading))
        here["program"] = PROGRAM
    memory = {run.policy_device: here}
    if not shared:
        wide = frozen.itemsize
        read = micro * (P + T) * (3 * wide * policy.intermediate_size + 8 * D) + 2 * wide * micro * T * policy.vocab_size
        other = {"frozen weights, reference and reward": weights * wide // size, "reading": read}
        if run.reference_device == run.policy_device:
            here |= other
        else:
            memory[run.reference_device] = other
    return memory


def parameters(model) -> int:
    """Weights of a LLaMA of that configuration; a tied output layer counts once."""
    D, F, V, queries, keys = sizes(model)
    layer = 2 * D * queries + 2 * D * keys + 3 * D * F + 2 * D
    return model.num_hidden_layers * layer + V * D * (1 if model.tie_word_embeddings else 2) + D


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
