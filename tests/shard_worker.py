"""What test_layouts.py has three processes do: torchrun --standalone --nproc-per-node 3 tests/shard_worker.py FOLDER, with the
project in PYTHONPATH.

Each model in FOLDER is loaded whole, and by rows as --shard does; FOLDER/found-<rank>.json says for each how far the two are
apart and what this process holds of it.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lora import add_lora
from model import Llama
from reward import RewardModel
from training import launch
from training.shard import Shards, machine_mesh

sys.setswitchinterval(10)  # so long does Python keep its lock from gloo's threads, which must have had it when this ends
IDS = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))


def held(model: torch.nn.Module) -> tuple[int, int, int]:
    """Bytes of the cut weights here, of all of them, and of the largest."""
    cut = [p for p in model.parameters() if isinstance(p, DTensor)]
    return sum(p.to_local().nbytes for p in cut), sum(p.nbytes for p in cut), max(p.nbytes for p in cut)


@torch.no_grad()
def load(path: Path, shards: Shards) -> dict:
    """A reward model's folder has a name that says so."""
    part = shards.rows(torch.float32, "cpu")
    if path.name.startswith("reward"):
        whole, cut = RewardModel.from_pretrained(path, torch.float32), RewardModel.from_pretrained(path, part=part)
        backbone, read = cut.backbone, lambda model: model(IDS, torch.ones_like(IDS))
    else:
        whole, cut = Llama.from_pretrained(path, torch.float32), Llama.from_pretrained(path, part=part)
        backbone, read = cut, lambda model: model(IDS)
    add_lora(backbone)
    before = held(backbone)
    shards.cut(backbone)
    gap = (read(whole) - read(cut)).abs().max().item()
    return {"gap": gap, "held": before}


with launch.joined():
    folder = Path(sys.argv[1])
    shards = Shards(machine_mesh("cpu"), whole=False)
    found = {path.name: load(path, shards) for path in sorted(folder.iterdir()) if path.suffix == ".gguf" or path.is_dir()}
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
