# SPDX-License-Identifier: MIT
"""The memory of a run on each device, counted from the models' configurations; plan.py asks.

    memory = plan(run, policy_config, reward_config)        # {device: {item: bytes}}
    memory = plan(run, policy_config, reward_config, share=8, whole=False, ranks=16)     # of one process of sixteen, --shard

Four models stand in memory in the third stage of RLHF (the paper's section 2.1 and "Limitations"). Here is what they cost:
frozen weights, adapters, optimiser, and the larger of what sampling needs (a second copy of the adapted weights, keys and
values, logits) and what an update needs (activations kept for the backward pass, logits and their gradient). Bytes of a token
and layer are counted in `activations`, where the code that keeps them is named.

On a GPU that has room for it, sampling takes copies of q, k and v beside this (training/decode.py), 3 GiB for LLaMA-7B.

On a CPU two more items are measured, not counted: the program itself, and what the C library's allocator holds in the gaps
between its blocks (bench/README.md tells how well the sum foresees the peak). On a GPU the figure is that of torch's own
count of allocated memory; CUDA's context and the caching allocator's reserve come on top.

Sharded (torch 2.13's fully_shard): a unit, which is a layer, an embedding or an output layer, is gathered for its pass into a
buffer and copied from there into its weights; the buffer is freed as the next unit's is filled. Backward, the next unit is
gathered beside the one in use. So two units are in flight, whichever they are. What a process holds of a unit stays beside the
gathered one. The root of a model (its last norm, and an embedding that is its output layer too) stays gathered.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from training.config import RunConfig
from training.models import choose_dtype, reference_dtype
from training.rewards import is_rule

GIB = 2**30
PROGRAM = 0.35 * GIB  # resident after the imports of train.py, Linux
GAPS = 0.55  # of everything that comes and goes, glibc


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

    rows = min(config.rollout_micro_batch_size or 1, -(-config.rollout_batch_size // ranks))
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
    at_once = 0 if run.policy_device.startswith("cpu") else 4 * 4 * min(2**24, micro * T * policy.vocab_size)  # ppo.TokenLogprobs
    return {"activations": largest, "logits and gradient": 2 * size * micro * T * policy.vocab_size + at_once}


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
