"""Memory that torch keeps after samplings on a GPU, with a pool of memory for each recording and with one for all.

    python bench/recordings.py --device cuda:0

Sampling records a step anew for each number of rows and each width (training/decode.py). Six times the same prompts, with a
seed a time; both ways draw the same tokens.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from ppo_step import random_model  # noqa: E402

from lora import add_lora  # noqa: E402
from training import decode  # noqa: E402
from training.models import folded  # noqa: E402


def one_each(step, device):
    """decode.record as it was: a stream and a pool of its own for every graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        step()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", default="smollm2-135m")
    args = parser.parse_args()
    device = args.device
    model, found = add_lora(random_model(args.shape, torch.bfloat16, device)), {}
    ids = torch.randint(3, model.config.vocab_size, (256, 64), device=device)
    stops = list(range(5, 400))  # so many that rows end and leave all the time
    for name, record in {"one each": one_each, "one for all": decode.record}.items():
        decode.record = record
        torch.cuda.empty_cache()
        for seed in range(6):
            draws = torch.rand(300, len(ids), generator=torch.Generator().manual_seed(seed))
            start = time.perf_counter()
            with folded(model):
                responses = decode.sample(model, ids, torch.ones_like(ids), decode.Choice(draws, stops, 0))
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            kept, used = torch.cuda.memory_reserved() / 2**30, torch.cuda.memory_allocated() / 2**30
            same = torch.equal(found.setdefault(seed, responses), responses)
            print(f"{name}, {seed}: {seconds:.2f} s, {kept:.2f} GiB kept, {used:.2f} in use, same tokens: {same}", flush=True)


if __name__ == "__main__":
    main()
