"""Counts processes whose first torch.sin on several threads is not their second: a race in MKL (docs/reliability.md).

    python bench/first_call.py --processes 1000 --threads 8
    python bench/first_call.py --processes 1000 --threads 8 --one-first    # one thread calls it first, as model.py does

Each process is a fork of this one, which has called no function of MKL's. A busy machine shows more. Needs an x86 wheel of torch
with MKL 2024.2 and an Intel processor with AVX-512: on AMD's, MKL has one set of kernels and nothing can be mistaken.
"""

import argparse
import os
import time

import torch


def first_differs(threads: int, one_first: bool) -> str:
    """"" where the first call agrees with the second, else how they differ."""
    torch.set_num_threads(threads)
    if one_first:
        torch.zeros(1).sin()
    x = torch.arange(10_000.0 * threads) % 60
    torch.ones(10**6).mul_(1.0)  # the threads are there and sleep, as they do in front of a first forward pass
    time.sleep(0.02)
    first, second = x.sin(), x.sin()
    wrong = (first != second).nonzero()[:, 0]
    return f"{len(wrong)} elements from {wrong[0]} to {wrong[-1]}, up to {(first - second).abs().max():.2g}" if len(wrong) else ""


def in_a_fork(threads: int, one_first: bool) -> str:
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, first_differs(threads, one_first).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise ChildProcessError("a process failed")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--one-first", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no threads but the one that forked
    found = [in_a_fork(args.threads, args.one_first) for _ in range(args.processes)]
    print(*filter(None, found), f"{sum(map(bool, found))} of {len(found)} differ", sep="\n")


if __name__ == "__main__":
    main()
