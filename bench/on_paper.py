# SPDX-License-Identifier: MIT
"""What a PPO step of 7B, 13B and 70B would cost on 1 to 64 GPUs: arithmetic, nothing is run.

    python bench/on_paper.py > bench/results/scale_on_paper.md

Memory is training.plan's. Traffic counts the bytes that a GPU receives. Seconds are those of compute at a share of the GPU's
rate, of sampling by what a token has to wait for, and of traffic over the links; nothing overlaps. `phases` holds the formulas.
"""

import datetime
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.shapes import SHAPES  # noqa: E402
from model import LlamaConfig  # noqa: E402
from training import memory, plan  # noqa: E402
from training.config import RunConfig  # noqa: E402

FLOPS = 0.4 * 989e12      # a second: H100, bf16, of which 40 % is reached
MEMORY = 0.6 * 3.35e12    # bytes a second, of which 60 % is reached
OPERATIONS = 60 * 5e-6    # seconds a layer and sampled token: torch starts about 60 operations there, from Python
INSIDE, BETWEEN = 400e9, 50e9  # bytes a second and GPU inside a node, and between nodes
CARD = 80                 # GiB
ROLLOUT = 21              # bytes a token: id, mask, three float32 figures
MODELS = {"LLaMA-7B": "llama-7b", "LLaMA-13B": "llama-13b", "70B (Llama 3's shape)": "llama3-70b"}
FORMS = ("parallel", "whole", "in-step")
RUN = RunConfig(policy_device="cuda:0", reference_device="cuda:0", dtype="bfloat16", gradient_checkpointing=True)


@dataclass
class Cost:
    """Of one PPO step on one GPU: seconds of each phase, and bytes received."""

    sampling: float
    reading: float
    update: float
    exchange: float
    traffic: float

    @property
    def seconds(self) -> float:
        return self.sampling + self.reading + self.update + self.exchange


def phases(model: LlamaConfig, form: str, ranks: int, nodes: int, across: bool = False) -> Cost:
    """A PPO step in one of plan.forms' forms; across: weights are sharded over all GPUs, not over those of a node.

    Every response is as long as it may be. A weight that is used costs 2 operations a token forward, 2 backward (for what
    flows through it: it is frozen and needs no gradient), and 2 for a layer's second forward pass under checkpointing.
    """
    run = plan.evenly(RUN, ranks)
    config, P, T = run.ppo, run.query_length, run.ppo.response_length
    body, head = model.num_hidden_layers * memory.layer_parameters(model), model.vocab_size * model.hidden_size
    rows, micro, epochs = config.rollout_batch_size / ranks, config.micro_batch_size, config.ppo_epochs
    chunks = -(-rows // config.rollout_micro_batch_size)
    kl_rows = 32 if ranks == 1 else 16  # the true KL's 32 responses go in two batches, to two processes at most

    at_once = rows / chunks
    keys = 2 * 2 * model.num_hidden_layers * memory.sizes(model)[4] * at_once * (P + T / 2)
    token = max((2 * (body + head) + keys) / MEMORY, model.num_hidden_layers * OPERATIONS, 2 * (body + head) * at_once / FLOPS)
    sampling = chunks * T * token + 2 * body * rows * P / FLOPS
    reading = 2 * (body * (4 * rows + 2 * kl_rows) * (P + T) + head * 2 * (rows + kl_rows) * T) / FLOPS
    update = epochs * rows * (2 * 6 * body * (P + T) + 4 * head * T) / FLOPS

    trained = 2 * memory.adapter_parameters(model, run.targets, run.lora_rank)
    steps = epochs * config.rollout_batch_size // config.step_batch_size
    others = (ranks - 1) / ranks
    shared = steps * 2 * others * 4 * trained + others * config.rollout_batch_size * T * ROLLOUT
    weights = 0.0
    if form != "parallel":
        whole, read = 2 * memory.parameters(model), 2 * body  # the reward model's embedding stays gathered, it has no head
        passes = {"whole": chunks, "in-step": chunks * T}[form] + 2 * kl_rows / 16
        batches = rows / micro  # each: policy, reference, value, reward; and epochs times policy and value, twice
        weights = whole * passes + batches * 2 * (whole + read) + epochs * batches * 2 * (whole + read)
        over = ranks if across else ranks // nodes
        weights *= (over - 1) / over
    exchange = weights / (BETWEEN if across else INSIDE) + shared / (INSIDE if nodes == 1 else BETWEEN)
    return Cost(sampling, reading, update, exchange, weights + shared)


def table(model: LlamaConfig) -> list[str]:
    """Memory, traffic and seconds of every form on every number of GPUs; of what does not fit the card only the memory."""
    lines = head("GPUs", "nodes", "micro-batch", "GiB a GPU: parallel", "whole", "in-step", "GB a step: parallel", "whole",
                 "in-step", "s a step: parallel", "whole", "in-step")
    for ranks, nodes in plan.SIZES:
        run = plan.evenly(RUN, ranks)
        needed = plan.forms(run, model, model, ranks, nodes)
        costs = [phases(model, form, ranks, nodes) if fits(needed.get(form)) else None for form in FORMS]
        cells = [f"{needed[form] / memory.GIB:.1f}" if form in needed else "" for form in FORMS]
        cells += [f"{cost.traffic / 1e9:,.1f}" if cost else "" for cost in costs]
        cells += [f"{cost.seconds:,.1f}" if cost else "" for cost in costs]
        lines.append("| " + " | ".join(map(str, [ranks, nodes, run.ppo.micro_batch_size, *cells])) + " |")
    return lines


def breakdown(model: LlamaConfig) -> list[str]:
    """Of the fastest form that fits the card, where the time of a step goes."""
    lines = head("GPUs", "form", "sampling, s", "reading", "update", "exchange", "step", "GPU-seconds a step")
    for ranks, nodes in plan.SIZES:
        needed = plan.forms(plan.evenly(RUN, ranks), model, model, ranks, nodes)
        found = {form: phases(model, form, ranks, nodes) for form, amount in needed.items() if fits(amount)}
        if found:
            form = min(found, key=lambda name: found[name].seconds)
            cost = found[form]
            parts = (cost.sampling, cost.reading, cost.update, cost.exchange, cost.seconds)
            lines.append(f"| {ranks} | {form} | " + " | ".join(f"{x:.1f}" for x in parts) + f" | {ranks * cost.seconds:,.0f} |")
        else:
            lines.append(f"| {ranks} | none fits |" + "  |" * 6)
    return lines


def mesh(model: LlamaConfig) -> list[str]:
    """Weights sharded inside each node beside weights sharded over all of them, in step."""
    lines = head("GPUs", "nodes", "GiB a GPU: inside", "over all", "GB a step: inside", "over all", "s on the links: inside",
                 "over all", "s a step: inside", "over all")
    for ranks, nodes in plan.SIZES:
        if nodes > 1:
            run = plan.evenly(RUN, ranks)
            needed = [sum(memory.plan(run, model, model, share, False, ranks)["cuda:0"].values())
                      for share in (ranks // nodes, ranks)]
            costs = [phases(model, "in-step", ranks, nodes, across) for across in (False, True)]
            cells = ([f"{amount / memory.GIB:.1f}" for amount in needed] + [f"{cost.traffic / 1e9:,.0f}" for cost in costs]
                     + [f"{cost.exchange:,.0f}" for cost in costs] + [f"{cost.seconds:,.0f}" for cost in costs])
            lines.append(f"| {ranks} | {nodes} | " + " | ".join(cells) + " |")
    return lines


def next_steps() -> list[str]:
    """Seconds that sampling takes a step, gathers included, in the form that fits, and would take tensor parallel in a node."""
    lines = head("GPUs", *(title for name in MODELS
                           for title in (f"{name.split()[0]}: now", "tensor parallel", "and CUDA graphs")))
    for ranks, nodes in plan.SIZES:
        if ranks // nodes == 8:
            cells = []
            for shape in MODELS.values():
                model = SHAPES[shape]()
                alone = fits(plan.forms(plan.evenly(RUN, ranks), model, model, ranks, nodes)["parallel"])
                gathered = 0 if alone else RUN.ppo.response_length * 2 * memory.parameters(model) * 7 / 8 / INSIDE
                cells += [phases(model, FORMS[0], ranks, nodes).sampling + gathered, *tensor_parallel(model, nodes)]
            lines.append(f"| {ranks} | " + " | ".join(f"{x:.1f}" for x in cells) + " |")
    return lines


def tensor_parallel(model: LlamaConfig, nodes: int, gpus: int = 8) -> tuple[float, float]:
    """Seconds to sample a node's rows, all at once, with 1 / gpus of every layer's heads and inner units on each of its GPUs:
    as torch starts operations, and as if that took no time. After attention and MLP the GPUs add their vectors up."""
    P, T, L, D = RUN.query_length, RUN.ppo.response_length, model.num_hidden_layers, model.hidden_size
    rows, body = RUN.ppo.rollout_batch_size / nodes, L * memory.layer_parameters(model)
    weights = body + model.vocab_size * D
    keys = 2 * 2 * L * memory.sizes(model)[4] * rows * (P + T / 2)
    token = max((2 * weights + keys) / gpus / MEMORY, 2 * weights * rows / gpus / FLOPS)
    sums = 2 * L * 2 * (gpus - 1) / gpus * 2 * rows * D / INSIDE
    prompts = 2 * body * rows * P / gpus / FLOPS
    return tuple(T * (max(token, start) + sums) + prompts for start in (L * OPERATIONS, 0))


def fits(amount: float | None) -> bool:
    """Whether a card takes so many bytes."""
    return amount is not None and amount <= plan.FULL * CARD * memory.GIB


def head(*names: str) -> list[str]:
    """The first two lines of a table of numbers."""
    return ["| " + " | ".join(names) + " |", "|" + " ---: |" * len(names)]


def report() -> str:
    """All of it, as bench/results/scale_on_paper.md holds it below its first paragraph."""
    ppo = RUN.ppo
    lines = [f"""\
Setting: the paper's, {ppo.rollout_batch_size} responses a step of {RUN.query_length} + {ppo.response_length} tokens, all as long
as they may be; optimiser steps of {ppo.step_batch_size}, {ppo.ppo_epochs} epochs, micro-batches of {ppo.micro_batch_size} or the
largest that are shared evenly, at most {ppo.rollout_micro_batch_size} responses sampled at once;
LoRA of rank {RUN.lora_rank} on {", ".join(RUN.targets)}, frozen weights in bfloat16,
gradient checkpointing, reward model of the policy's shape, one process a GPU, 8 GPUs a node.

Assumed: {FLOPS / 1e12:.0f} TFLOP/s (40 % of an H100's 989), {MEMORY / 1e12:.2f} TB/s of memory (60 % of 3.35),
{OPERATIONS * 1e6:.0f} µs a layer and sampled token to start 60 operations from Python,
{INSIDE / 1e9:.0f} GB/s a GPU inside a node and {BETWEEN / 1e9:.0f} between nodes. Nothing overlaps.
Left out: latencies of the links, attention's own products (about a hundredth), and what sharding does in
Python at every layer. A GPU counts as full at {100 * plan.FULL:.0f} % of {CARD} GiB; what needs more has no seconds.

parallel: frozen weights whole on each GPU. whole and in-step: sharded inside a node, and put together to sample,
or gathered layer by layer at each token. GB are 10^9 bytes that a GPU receives in a step."""]
    for name, shape in MODELS.items():
        model = SHAPES[shape]()
        lines += [f"\n## {name}\n", *table(model), "\nWhere the time of the fastest form that fits goes:\n", *breakdown(model)]
    lines += ["\n## Sampling, s a step\n\nIn the form that fits, gathers included; tensor parallel inside a node; and so "
              "without Python's starts (CUDA graphs).\n", *next_steps()]
    lines += ["\n## 70B, in-step: sharded inside a node, and over all GPUs\n", *mesh(SHAPES["llama3-70b"]())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(f"# What it would cost on more GPUs\n\n**Arithmetic, foretold: nobody has run it.** `python bench/on_paper.py`, "
          f"{datetime.date.today()}, commit of this file; no GPU and no cores were\nmeasured.\n\n{report()}", end="")
