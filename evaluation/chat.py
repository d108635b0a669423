# SPDX-License-Identifier: MIT
"""Talk to a trained policy and to the SFT model it came from, side by side: `python evaluate.py chat RUN`.

    > Tell me about copper.
    SFT                                    step 25
    Copper is a metal. ...                 Copper is a metal with the symbol Cu. ...

Instructions come from the terminal, or from a file or pipe, one a line; an empty line or Ctrl-D ends it. Only the policy is
loaded: with LoRA the SFT model is the same weights with the adapter switched off (or as it started).
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from data import format_prompt, whole_characters
from formats.tokenizer import load_tokenizer, window_warning
from lora import load_lora, lora_disabled, lora_weights
from model import Llama, generate
from training.config import RunConfig, stored_config
from training.devices import resolve_devices
from training.folder import checkpoints, require_whole
from training.models import adapt_policy, choose_dtype, load_policy
from training.origin import check_origin, frozen_weights, weights_digest

Speaker = tuple[Llama, Callable[[], AbstractContextManager]]  # a model, and what to switch on while it answers


def load_pair(run: RunConfig, checkpoint: Path, tokenizer: Any, device: str) -> dict[str, Speaker]:
    """{"SFT": speaker, "step 25": speaker}."""
    name = f"step {int(checkpoint.name.removeprefix('step-'))}"
    sft = load_policy(run, tokenizer, notes=[], dtype=choose_dtype(run, device), device=device)
    check_origin(checkpoint, {"policy": weights_digest(frozen_weights(sft))}, vars(run))
    if run.tuning == "full":
        return {"SFT": (sft, nullcontext), name: (Llama.from_pretrained(checkpoint / "policy", device=device), nullcontext)}
    start = adapt_policy(run, sft, notes=[])
    load_lora(sft, checkpoint / "policy")
    return {"SFT": (sft, lambda: lora_weights(sft, start) if start else lora_disabled(sft)), name: (sft, nullcontext)}


def side_by_side(titles: list[str], texts: list[str], width: int) -> str:
    """Texts in columns of a terminal of that width."""
    column = max(20, (width - 3 * (len(texts) - 1)) // len(texts))
    wrapped = [[title, "-" * min(column, len(title))] + [line for paragraph in (text.split("\n") or [""])
                                                         for line in textwrap.wrap(paragraph, column) or [""]]
               for title, text in zip(titles, texts, strict=True)]
    height = max(map(len, wrapped))
    rows = zip(*(lines + [""] * (height - len(lines)) for lines in wrapped), strict=True)
    return "\n".join("   ".join(f"{cell:<{column}}" for cell in row).rstrip() for row in rows)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of `python evaluate.py chat`."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder of train.py")
    parser.add_argument("--step", type=int, help="checkpoint (default: the last)")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: the run's)")
    parser.add_argument("--max-tokens", type=int, help="of an answer (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")


def chat(folder: Path, step: int | None, temperature: float | None, max_tokens: int | None, seed: int) -> None:
    """Reads instructions until the input ends; prints the answers of both."""
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature {temperature}: must be 0 (the likeliest token) or above")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"--max-tokens {max_tokens}: must be at least 1")
    run = stored_config({"out": str(folder)})
    steps = {int(p.name.removeprefix("step-")): p for p in checkpoints(folder)}
    if not steps or step is not None and step not in steps:
        raise ValueError(f"--step {step or 'last'}: {folder} holds checkpoints {sorted(steps)}")
    device = resolve_devices(run.policy_device, run.reference_device)[0]
    tokenizer = load_tokenizer(run.policy).for_template(run.prompt_template, run.system)
    pair = load_pair(run, require_whole(steps[step if step is not None else max(steps)]), tokenizer, device)
    settings = {"temperature": run.ppo.temperature if temperature is None else temperature,
                "eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.pad_token_id}
    length, width = max_tokens or run.ppo.response_length, shutil.get_terminal_size((110, 24)).columns
    typed = sys.stdin.isatty()
    if typed:
        print(f"temperature {settings['temperature']:g}, at most {length} tokens; an empty line ends")
    while (instruction := read_line("> " if typed else "")) is not None:
        if not instruction and typed:
            break
        if not instruction:
            continue
        if not typed:
            print(f"> {instruction}")
        prompt = tokenizer.encode(format_prompt({"instruction": instruction}, run.prompt_template, tokenizer), bos=True)
        ids = torch.tensor([prompt], device=device)
        for warning in window_warning(len(prompt) + length, next(iter(pair.values()))[0].config.max_position_embeddings,
                                      "the instruction and --max-tokens"):
            print(warning)
        answers = []
        for model, active in pair.values():
            draw = torch.Generator(device).manual_seed(seed)
            with active():
                response = generate(model, ids, torch.ones_like(ids), length, generator=draw, **settings)
            answers.append(tokenizer.decode(response[0]))
        print(side_by_side(list(pair), answers, width) + "\n", flush=True)


def read_line(prompt: str) -> str | None:
    """One instruction; None at the end of the input."""
    try:
        return whole_characters(input(prompt).strip())
    except EOFError:
        return None
