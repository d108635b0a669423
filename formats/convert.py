# SPDX-License-Identifier: MIT
"""Hugging Face model folders of everything else: the programs behind `python model.py convert` and `recover`.

    python model.py convert --model smollm2.gguf --out smollm2
    python model.py recover --base llama-7b --diff alpaca-farm-sft10k-wdiff --out sft10k

Which model it is, `open_model` knows, which model.py hands in: (a model without memory, the stored tensors that fill it).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from formats.alpacafarm import recover
from formats.read import local_copy
from formats.tensors import Stored, load_tensors
from formats.tokenizer import copy_tokenizer
from formats.write import ShardWriter, any_console, new_folder, write_json


OpenModel = Callable[[Path], tuple[nn.Module, dict[str, Stored]]]


def convert(open_model: OpenModel, model: str | os.PathLike, out: str | os.PathLike, dtype: torch.dtype | None = None,
            progress: bool = False) -> None:
    """Write a model of any layout, with its tokenizer, as a Hugging Face folder; dtype None keeps what is stored."""
    source = local_copy(model)
    like, stored = open_model(source)
    with new_folder(Path(out)) as part:
        if progress:
            print(f"{len(stored)} tensors, {like.config.num_hidden_layers} layers", flush=True)
        writer = ShardWriter(part)
        for _, name, tensor in load_tensors(stored, dtype, progress=progress, like=like):
            writer.add(name, tensor)
            if name == "model.embed_tokens.weight":
                stored_dtype = str(tensor.dtype).removeprefix("torch.")
        writer.close()
        write_json(part / "config.json", like.config.to_dict() | {"torch_dtype": stored_dtype})
        copy_tokenizer(source, part)


def main(open_model: OpenModel, argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for bad input."""
    any_console()
    parser = argparse.ArgumentParser(prog="model.py", description="Make Hugging Face model folders of other formats.")
    programs = parser.add_subparsers(dest="program", required=True)
    converting = programs.add_parser("convert", help="of a GGUF file, a folder of Meta's, or a model on the hub")
    converting.add_argument("--model", required=True, help=".gguf file, folder, or org/name")
    recovering = programs.add_parser("recover", help="of AlpacaFarm's weight difference to LLaMA-7B")
    recovering.add_argument("--base", required=True, help="LLaMA-7B, in any layout")
    recovering.add_argument("--diff", required=True, help="folder of the difference, or org/name on the hub")
    for program in (converting, recovering):
        program.add_argument("--out", required=True, help="new folder for the model and its tokenizer")
        program.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="on disk (default: as stored)")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        if args.program == "convert":
            convert(open_model, args.model, args.out, dtype, progress=True)
        else:
            total = recover(open_model, args.base, args.diff, args.out, dtype, progress=True)
            print(f"the weights sum to {total:.6g}, as model_sum.txt says")
    except (ValueError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    print(f"written to {args.out}: {size / 2**30:.2f} GiB")
    return 0
