# SPDX-License-Identifier: MIT
"""What a run was made of, in few digits: its instructions, its frozen models, the adapter that it started from.

    origin = {"data": texts_digest(prompts.ids, prompts.examples), "policy": weights_digest(weights)}
    check_origin(checkpoint, origin, names)         # ValueError where the checkpoint remembers another

A path stays while the file behind it changes; resumed or evaluated on other data or another base model, a run would go on without
a word as another one. Departs from the released code, whose checkpoints know nothing but weights.
"""

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ORIGIN = "origin.json"  # in a checkpoint's trainer/
WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def about() -> dict[str, str]:
    """When a run began, and with which version of torch and of these files: their commit, where they are in a git repository."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                                text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {"commit": commit or "unknown", "torch": torch.__version__, "began": date.today().isoformat()}


def texts_digest(ids: Sequence[Sequence[int]], records: Sequence[dict]) -> str:
    """Of instructions with their tokens; how the file spells its JSON doesn't matter."""
    return hashlib.sha256(json.dumps([ids, records], sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(file: str | Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, types, shapes and, for each tensor, the sum of its bit patterns: exact on every device and as fast as memory."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        bits = mine.detach().contiguous().view(WIDTHS[tensor.element_size()]).sum(dtype=torch.int64)
        if isinstance(tensor, DTensor):  # this process's rows of it (--shard)
            dist.all_reduce(bits, group=tensor.device_mesh.get_group())
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {bits.item()}\n".encode())
    return digest.hexdigest()[:16]


def frozen_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Everything but adapters, by name."""
    return [(name, p) for name, p in module.named_parameters() if not name.endswith((".lora_A", ".lora_B"))]


def check_origin(checkpoint: Path, now: Mapping[str, str], names: Mapping[str, str | None]) -> None:
    """Raises ValueError for the first that differs; names: what each was read from. A changed rule is only said, and nothing is
    asked of checkpoints from before there were digests."""
    file = checkpoint / "trainer" / ORIGIN
    if not file.is_file():
        return
    then = json.loads(file.read_text(encoding="utf-8"))
    for what, digest in now.items():
        if then.get(what, digest) == digest:
            continue
        if what == "rule":  # whoever mends one that failed wants to go on with it
            print(f"the rule {names['reward']} was changed since {checkpoint}: from here on the new one decides")
        else:
            raise ValueError(f"--{what} {names[what]} is not what {checkpoint} was trained with (it was changed since): bring it "
                             "back as it was, or start a new run in another --out")
