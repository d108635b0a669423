# SPDX-License-Identifier: MIT
"""Mean and deviation of a reward model's scores on a policy's own answers: `python reward.py calibrate`.

    python reward.py calibrate --reward reward-model --policy sft10k --data ppo.json

The coefficient of the penalty (Eq. 3) means something only beside rewards of known spread, and a reward model as it is found has
any. What is measured stands in the folder's reward_config.json from then on, with the number of answers and both errors, and
every program reads scores as (raw − mean) / deviation. The released code takes scores as they come.
"""

import argparse
import json
import math
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import get_template, left_pad, load_instructions, template_to_store, tokenize_prompts
from formats.tokenizer import load_tokenizer
from formats.write import write_json
from model import Llama
from reward import score_all
from training import ranks, shard
from training.devices import resolve_devices
from training.rewards import Reader, open_reader
from training.stages import Flags, number


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Flags(prog="reward.py calibrate", description="Measure mean and deviation of a reward model's scores.",
                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--reward", required=True, metavar="DIR", help="the reward model's folder, which is written to")
    parser.add_argument("--policy", required=True, help="whose answers it is to score: folder, .gguf or hub name")
    parser.add_argument("--data", required=True, help="instructions")
    parser.add_argument("--samples", type=number(int, low=2), default=512, help="answers, one to an instruction")
    parser.add_argument("--prompt-template", default="alpaca", help="prompt: alpaca, tiny, chat or a JSON file")
    parser.add_argument("--reward-eos", choices=("yes", "no"), help="whether the model was trained on sequences that end in EOS")
    parser.add_argument("--query-length", type=number(int, low=1), default=192, help="longer prompts are left out")
    parser.add_argument("--response-length", type=number(int, low=1), default=300, help="longest answer")
    parser.add_argument("--temperature", type=number(float, above=0), default=1.0, help="of the sampling")
    parser.add_argument("--batch-size", type=number(int, low=1), default=32, help="answers at a time; changes memory only")
    parser.add_argument("--seed", type=number(int, low=0, high=2**63 - 1), default=0, help="of the sampling")
    parser.add_argument("--device", default="cuda:0", help="or what there is")
    args = parser.parse_args(argv)
    args.resume = False
    return args


def run(args: argparse.Namespace) -> None:
    """Samples, scores, and writes what came of it into the reward model's folder."""
    if ranks.here().size > 1:
        raise ValueError("calibrate is with one process: start it with python, without torchrun")
    folder = Path(args.reward)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--reward {folder}: must be a folder of a reward model, since it is written to (a model on the hub is "
                         "first downloaded into one)")
    device, _, line = resolve_devices(args.device, args.device)
    print(line)
    rows = load_instructions(args.data)
    print(f"data: {rows.note}")
    reader, note = open_reader(args.reward, "--reward", args.prompt_template, args.reward_eos, device=device)
    print(f"reward: {note}")
    sequences = sample(args, rows, reader, device)
    scores = score_all(reader.model.requires_grad_(False), sequences, reader.tokenizer.pad_token_id, args.batch_size)
    found = spread(scores.double().tolist())
    about = {"mean": found["mean"], "std": found["std"], "eos": reader.model.ends_with_eos if reader.end_is_known else None,
             "prompt_template": reader.model.prompt_template or template_to_store(args.prompt_template),
             "calibrated": {"policy": str(args.policy), "data": str(args.data), "temperature": args.temperature, "n": len(scores),
                            "mean_se": found["mean_se"], "std_se": found["std_se"], "date": date.today().isoformat()}}
    file = folder / "reward_config.json"
    write_json(file, (json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}) | about)
    print(f"raw scores of {len(scores)} answers: mean {found['mean']:.3f} ± {found['mean_se']:.3f}, deviation {found['std']:.3f} "
          f"± {found['std_se']:.3f}\nwritten: {file}")


@torch.no_grad()
def sample(args: argparse.Namespace, rows: Sequence[dict], reader: Reader, device: str) -> list[list[int]]:
    """Instructions with the policy's answers, as the reward model reads them."""
    tokenizer = load_tokenizer(args.policy).for_template(args.prompt_template)
    prompts = tokenize_prompts(rows, tokenizer, args.prompt_template, args.query_length, "--query-length")
    draw = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(prompts.ids), generator=draw)[:args.samples].tolist()
    policy = Llama.from_pretrained(args.policy, device=device, progress=True)
    how = {"temperature": args.temperature, "eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.pad_token_id}
    before = "" if args.prompt_template == "chat" else get_template(args.prompt_template).before_response
    batches = [chosen[start:start + args.batch_size] for start in range(0, len(chosen), args.batch_size)]
    sequences: list[list[int]] = []
    for part in tqdm(batches, desc="answers", unit="batch"):
        ids, mask = (x.to(device) for x in left_pad([prompts.ids[i] for i in part], tokenizer.pad_token_id))
        draws = torch.rand(args.response_length, len(part), generator=draw)
        answers = shard.sample(policy, ids, mask, args.response_length, generator=draws, **how)
        for i, answer in zip(part, answers.tolist(), strict=True):
            end = next((t for t, token in enumerate(answer) if token in tokenizer.stop_ids), None)
            text = tokenizer.decode(answer[:end]).removeprefix(before)
            sequences.append(reader.ids(prompts.examples[i], text, ended=end is not None))
    return sequences


def spread(scores: Sequence[float]) -> dict[str, Any]:
    """Mean and deviation with their standard errors; that of a deviation from the scores' fourth moment. Raises ValueError where
    all scores are one."""
    n = len(scores)
    mean = sum(scores) / n
    second = sum((x - mean) ** 2 for x in scores) / (n - 1)
    fourth = sum((x - mean) ** 4 for x in scores) / n
    if second <= 1e-12 * max(1.0, mean * mean):
        raise ValueError(f"all {n} scores are {mean:.4g}: this reward model tells no answer from another; look at its template "
                         "and its tokenizer")
    std, of_variance = math.sqrt(second), math.sqrt(max(0.0, fourth - second**2) / n)
    return {"mean": mean, "std": std, "mean_se": std / math.sqrt(n), "std_se": of_variance / (2 * std)}
