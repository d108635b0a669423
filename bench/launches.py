"""How many operations a sampled token starts: model.generate's step, which reads plainly, and training/decode.py's (docs/gpu.md).

    python bench/launches.py

Counted on a CPU, at toy sizes, as torch hands them to the device: views and allocations start nothing. On a GPU an operation is
a kernel or two (bench/results/gpu.md counts those), each of which takes some 10 µs to be told of. Two depths give what belongs to
a layer and what to the token.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

import torch  # noqa: E402
from ppo_step import machine  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lora import add_lora, lora_cast  # noqa: E402
from model import KVCache, Llama, LlamaConfig, sample_tokens  # noqa: E402
from training import decode  # noqa: E402
from training.models import folded  # noqa: E402

FREE = {"aten::" + name for name in (
    "view", "_unsafe_view", "expand", "t", "transpose", "permute", "slice", "select", "split", "split_with_sizes", "unsqueeze",
    "squeeze", "detach", "alias", "as_strided", "unbind", "empty", "new_empty", "empty_like", "empty_strided")}


class Count(TorchDispatchMode):
    """What is handed to the device inside."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        if name not in FREE:
            self.seen[name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def llama(layers: int, dtype: torch.dtype) -> Llama:
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4)
    model = add_lora(Llama(config)).eval()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def plain(model: Llama, dtype: torch.dtype) -> Counter:
    """One token of model.generate, its drawing included."""
    ids, mask = torch.ones(3, 9, dtype=torch.long), torch.ones(3, 10, dtype=torch.bool)
    cache = KVCache(model.config, 3, 20, dtype, ids.device)
    model.hidden(ids, mask[:, :9], cache)
    with Count() as count:
        logits = model.lm_head(model.hidden(ids[:, :1], mask, cache)[:, -1]).float()
        logits.amax(-1).isfinite().all()
        sample_tokens(logits, torch.rand(3))
    return count.seen


def fast(model: Llama, dtype: torch.dtype) -> Counter:
    """One step of training/decode.py."""
    ids = torch.ones(3, 9, dtype=torch.long)
    rows = decode.Rows(model, ids, torch.ones_like(ids), decode.Choice(torch.rand(8, 3), [2], 0))
    with Count() as count:
        rows.step(10)
    return count.seen


def count(step: Callable[[Llama, torch.dtype], Counter], dtype: torch.dtype) -> tuple[int, int, int]:
    """(operations of a layer, the same with each norm as the one kernel that it is on a GPU, of a token beside its layers)."""
    counts = []
    for layers in (2, 3):
        model = llama(layers, dtype)
        with torch.no_grad(), (lora_cast if dtype == torch.bfloat16 else folded)(model):
            counts.append(step(model, dtype))
    layer = counts[1] - counts[0]
    norm = 8 if dtype == torch.bfloat16 else 6
    return layer.total(), layer.total() - (norm - 1) * layer["rsqrt"], counts[0].total() - 2 * layer.total()


def main() -> None:
    lines = ["| | a layer, on a CPU | a layer, on a GPU, where a norm is one | a token beside | LLaMA-7B, on a GPU |",
             "| --- | --- | --- | --- | --- |"]
    for dtype in (torch.bfloat16, torch.float32):
        for name, step in (("model.generate", plain), ("training/decode.py", fast)):
            layer, on_gpu, once = count(step, dtype)
            kind = str(dtype).removeprefix("torch.")
            lines.append(f"| {name}, {kind} | {layer} | {on_gpu} | {once} | {once + 32 * on_gpu} |")
    file = ROOT / "bench" / "results" / "launches.md"
    text = (f"# Operations a sampled token starts\n\n`python bench/launches.py`, {machine()}; rank 8 on q, k, v and o, in bf16 "
            "beside the weights and in float32 folded into them.\n\n" + "\n".join(lines) + "\n")
    file.write_text(text, encoding="utf-8")
    print("\n".join(lines) + f"\nwritten to {file}")


if __name__ == "__main__":
    main()
