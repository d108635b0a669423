# SPDX-License-Identifier: MIT
"""--shard: each process of a machine holds its rows of the frozen weights, put together layer by layer as they are used.

    shards = Shards(machine_mesh("cuda"), whole=False)
    model = Llama.from_pretrained(path, part=shards.rows(dtype, device))    # rows only: nobody ever holds the model
    add_lora(model)                                                         # adapters stay whole, in every process
    shards.cut(model)                                                       # from here on forward passes put layers together
    with gathered(model): ...                                               # the whole model, for a while
    responses = sample(model, input_ids, attention_mask, 300)               # or in step with the other processes

The paper could not ("FSDP implementations did not support disabling gradients for specific parameters", "Limitations"): torch's
FSDP2 can, as long as what is trained stays outside. Its adapters, their gradients, Adam's moments, checkpoints and PEFT folders
are then those of one process. Every forward and backward pass takes all processes of the machine: they must make equally many, in
the same order.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from model import Llama, generate
from training import decode


@dataclass
class Shards:
    """Over which processes the weights are cut, and whether the policy is put together for sampling."""

    mesh: DeviceMesh
    whole: bool

    def rows(self, dtype: torch.dtype, device: str) -> Callable[[Tensor], Tensor]:
        """A function that keeps this process's rows of a stored tensor, as the DTensor that the whole is."""
        rank, size = self.mesh.get_local_rank(), self.mesh.size()

        def part(tensor: Tensor) -> Tensor:
            each = -(-len(tensor) // size)  # as torch.chunk: the last may have fewer, or none
            mine = tensor[rank * each:(rank + 1) * each]
            local = torch.empty(mine.shape, dtype=dtype, device=device).copy_(mine)
            stride = torch.empty(tensor.shape, device="meta").stride()
            return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=stride)

        return part

    def in_words(self) -> str:
        """For the line about placement."""
        return (f"frozen weights over {self.mesh.size()} processes, for sampling "
                + ("put together" if self.whole else "layer by layer"))

    def cut(self, model: Llama) -> None:
        """From here on the model's rows are put together for each forward and backward pass, a layer at a time.

        Last of all: adapters can't be added and the model can't be copied any more. FSDP2 does its own cutting, of whole
        weights: it gets some without memory in the place of the rows, which then come back.
        """
        rows = {name: p.requires_grad_(False) for name, p in model.named_parameters() if isinstance(p, DTensor)}
        put(model, {name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
                    for name, p in rows.items()})
        trained = {p for p in model.parameters() if p.requires_grad}
        ends = [] if model.config.tie_word_embeddings else [model.model.embed_tokens, model.lm_head]
        for unit in (*model.model.layers, *ends, model):
            fully_shard(unit, mesh=self.mesh, ignored_params=trained)
        register_fsdp_forward_method(model, "hidden")
        put(model, rows)


def machine_mesh(device: str) -> DeviceMesh:
    """The processes of this machine, of all that torchrun started. Between machines weights would travel too slowly
    (docs/scale.md), so that each machine holds them all. Every process must call this."""
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    machines = dist.get_world_size() // here
    return init_device_mesh(torch.device(device).type, (machines, here), mesh_dim_names=("machine", "process"))["process"]


def put(model: Llama, parameters: dict[str, nn.Parameter]) -> None:
    """Each in its place; a tied output layer follows the embedding."""
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
    model._tie()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds the whole model and goes its own way."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    for unit in units[1:]:  # the root never lets go of its own by itself, nor may it be told to: a tied output layer needs them
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units[1:]:
            unit.set_reshard_after_forward(True, recurse=False)
        for unit in units:
            unit.reshard()


def is_cut(model: nn.Module) -> bool:
    """Whether this process has but rows of its layers just now."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def sample(model: Llama, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **how: Any
           ) -> Tensor | tuple[Tensor, Tensor]:
    """model.generate, on a GPU its fast twin; of a model that is cut, in step: every token takes all processes, until the last
    row of them all ends. One that --shard has put together samples plainly: its layers still ask whether they are whole."""
    rows, length, limit = len(input_ids), input_ids.shape[1] + max_new_tokens, model.config.longest
    if decode.replays(input_ids.device) and not isinstance(model, FSDPModule) and (limit is None or length <= limit) \
            and decode.has_room(model, rows, length):
        return decode.sample(model, input_ids, attention_mask, decode.Choice(**how))
    in_step = InStep(model, max_new_tokens)
    answers = generate(model, input_ids, attention_mask, max_new_tokens, progress=in_step, **how)
    in_step.to_the_end()
    return answers


class InStep:
    """Tokens sampled by several processes at once. As a function it is generate's `progress`."""

    def __init__(self, model: Llama, max_new_tokens: int):
        self.model, self.left = model, max_new_tokens
        self.mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
        self.going = self.mesh is not None  # whether any process has an unfinished row

    def __call__(self, rows: int) -> None:
        """After each token, with the rows that this process has unfinished."""
        if self.mesh is None:
            return
        self.left -= 1
        most = torch.tensor(rows, device=self.mesh.device_type)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.mesh.get_group())
        self.going = bool(most)

    @torch.no_grad()
    def to_the_end(self) -> None:
        """Tokens for nobody, as long as the others need this process's rows of the weights."""
        while self.going and self.left:
            nothing = torch.zeros((1, 1), dtype=torch.long, device=self.mesh.device_type)
            self.model.lm_head(self.model.hidden(nothing)[:, -1])
            self(0)
