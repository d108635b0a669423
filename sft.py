# SPDX-License-Identifier: MIT
"""Stage 1, supervised fine-tuning: a LLaMA learns to answer instructions, in full or with LoRA (paper, section 2.1).

    python sft.py --model llama-7b --data sft.json --out runs/sft                  # LoRA, which fits one GPU
    python sft.py --model llama-7b --data sft.json --out runs/sft --tuning full    # as AlpacaFarm made SFT-10k
    python sft.py --resume --out runs/sft                                          # go on where it stopped or was killed

The loss is the cross-entropy of the response tokens, EOS included: the prompt is read, never learned, and a model that
never sees EOS among its targets never stops. `train_sft` is the loop alone, for other programs: a model and token ids
in, a trained model out.

The paper takes AlpacaFarm's SFT-10k as given; the defaults here are AlpacaFarm's for full tuning. Departures: batches
hold sequences of similar length, so that little is spent on padding; sequences that are too long are dropped and
counted, as a response cut short would teach no EOS; the learning rate for LoRA is ours.

B batch, S sequence, N response tokens in a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import encode_pair, load_instructions
from formats.tokenizer import check_vocabulary, describe_tokenizer, load_tokenizer
from lora import lora_layers, save_lora
from model import Llama
from reward import Loop, TrainingConfig, shared
from training.ranks import each
from training.stages import (Flags, Stage, exit_code, load_base, merge_for_storing, number, parse, say_window, training_config,
                             training_flags, training_folder)

LEARNING_RATES = {"full": 2e-5, "lora": 1e-4}  # --tuning; the first is AlpacaFarm's
SFT = TrainingConfig(epochs=3, batch_size=128, learning_rate=LEARNING_RATES["full"])

Pair = tuple[Sequence[int], Sequence[int]]  # (prompt ids, response ids through EOS)


# ----------------------------------------------------------------------------------------------------------------- loss


def collate(pairs: Sequence[Pair], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded (input_ids, predicts), both (B, S); `predicts` is true where the next token is a response's."""
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = torch.full((len(pairs), longest), pad_token_id, dtype=torch.long)
    predicts = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor([*prompt, *response])
        predicts[row, len(prompt) - 1:end - 1] = True
    return input_ids, predicts


def response_loss(model: nn.Module, pairs: Sequence[Pair], pad_token_id: int) -> tuple[Tensor, int]:
    """(summed cross-entropy of the response tokens, a float32 scalar; their number N)."""
    device = next(model.parameters()).device
    input_ids, predicts = (tensor.to(device) for tensor in collate(pairs, pad_token_id))
    # Padding is on the right, where causal attention never looks back at it: no mask, hence the fast causal kernel.
    hidden = model.hidden(input_ids)
    # The head runs on N rows instead of B * S: prompts need no logits, and at V = 32000 logits dominate memory.
    logits = model.lm_head(hidden[predicts])  # (N, V)
    targets = input_ids.roll(-1, dims=1)[predicts]  # (N,)
    return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


@torch.no_grad()
def validation_loss(model: nn.Module, pairs: Sequence[Pair], pad_token_id: int = 0, batch_size: int = 32,
                    team: Any = None) -> float:
    """Mean cross-entropy per response token, in nats, with dropout off. Raises FloatingPointError at NaN."""
    was_training = model.training
    model.eval()
    ordered = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = [ordered[i:i + batch_size] for i in range(0, len(ordered), batch_size)]
    sums = shared(team, lambda batch: response_loss(model, batch, pad_token_id)[0].item(), batches)
    model.train(was_training)
    mean = sum(sums) / sum(len(response) for _, response in pairs)
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss of held-out sequences is {mean}")
    return mean


# ------------------------------------------------------------------------------------------------------------- training


def train_sft(model: nn.Module, sequences: Sequence[Pair], config: TrainingConfig = SFT, *, validation: Sequence[Pair] = (),
              pad_token_id: int = 0, progress: bool | str = True, on_step: Callable[[Loop], object] | None = None,
              team: Any = None) -> list[dict]:
    """Train the parameters of `model` that require gradients, in place, on (prompt ids, response ids through EOS).

    `model` offers `.hidden(input_ids)` -> (B, S, D) and `.lm_head`; progress: a bar, under a name of its own if it is one;
    on_step: see reward.Loop.run; team: see reward.Loop. Returns a dict an epoch: epoch, loss and validation_loss (nats per
    response token; None without validation), tokens_per_second (padding left out).
    Raises ValueError where there is nothing to train or to train on, FloatingPointError at NaN.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("train_sft: no parameter of the model requires gradients; add LoRA or unfreeze it")
    if not sequences or not all(len(prompt) and len(response) for prompt, response in sequences):
        raise ValueError("train_sft: give at least one sequence, each with a prompt and a response of at least a token")
    micro = config.micro_batch_size or config.batch_size
    loop = Loop(parameters, [len(prompt) + len(response) for prompt, response in sequences], config, (0.9, 0.95), team)
    sums = loop.sums

    def learn(batch: list[int]) -> tuple[float, dict[str, str]]:
        n = sum(len(sequences[i][1]) for i in batch)
        [loss] = loop.add_up(_accumulate(model, loop.micro_batches([sequences[i] for i in batch]), n, pad_token_id))
        sums.update(tokens=sum(loop.lengths[i] for i in batch), targets=n)
        sums["loss"] += (loss - sums["loss"]) * n / sums["targets"]
        return loss, {"lr": f"{loop.rate:.1e}", "tokens/s": f"{sums['tokens'] / loop.seconds():.0f}"}

    def row() -> dict:
        found = {"loss": sums["loss"], "tokens_per_second": sums["tokens"] / loop.seconds()}
        held_out = validation_loss(model, validation, pad_token_id, micro, team) if validation else None
        return found | {"validation_loss": held_out}

    return loop.run(model, learn, row, on_step, progress if isinstance(progress, str) else "SFT", bool(progress))


def _accumulate(model: nn.Module, micro_batches: Iterable[list[Pair]], n: int, pad_token_id: int) -> float:
    """Add the gradient of the mean loss of n response tokens, which the micro-batches hold. Returns that loss."""
    mean = 0.0
    for pairs in micro_batches:
        # Divided by the whole batch's tokens: a mean of micro-batch means would weigh the shorter responses more.
        loss = response_loss(model, pairs, pad_token_id)[0] / n
        loss.backward()
        mean += loss.item()
    return mean


# -------------------------------------------------------------------------------------------------------------- program


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Flags(prog="sft.py", description="Supervised fine-tuning on instructions and outputs (stage 1).",
                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--model", help="directory of the LLaMA to start from, with its tokenizer")
    files.add_argument("--data", help="AlpacaFarm JSON or JSON lines: instruction, input, output")
    files.add_argument("--out", required=True, help="directory for the tuned model (with LoRA: merged, and adapter/)")
    files.add_argument("--prompt-template", default="alpaca", help="prompt: alpaca, tiny, chat or a JSON file")
    files.add_argument("--max-tokens", type=number(int, low=1), default=512, help="longer prompt + response: dropped")
    files.add_argument("--validation", type=number(float, low=0, below=1), default=0.02, help="share of the data held out")
    training_flags(parser, replace(SFT, micro_batch_size=4), LEARNING_RATES, "sequences")
    return parse(parser, argv, ("model", "data"), LEARNING_RATES)


def load_pairs(args: argparse.Namespace, tokenizer) -> tuple[list[Pair], list[Pair]]:
    """(training, validation) sequences that fit --max-tokens, split by --seed."""
    examples = load_instructions(args.data, need_output=True)
    print(f"data: {examples.note}")
    pairs = [encode_pair(example, example["output"], tokenizer, args.prompt_template) for example in examples]
    short = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= args.max_tokens]
    order = torch.randperm(len(short), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = round(args.validation * len(short))
    if len(short) == held_out:
        shortest = min(len(prompt) + len(response) for prompt, response in pairs)
        raise ValueError(f"--max-tokens {args.max_tokens}, --validation {args.validation}: no sequence left to train "
                         f"on (the shortest of {len(pairs)} has {shortest} tokens)")
    print(f"{len(short) - held_out} sequences to train on, {held_out} held out, {len(pairs) - len(short)} dropped "
          f"(over {args.max_tokens} tokens)")
    return [short[i] for i in order[held_out:]], [short[i] for i in order[:held_out]]


def save_model(model: Llama, folder: Path, tokenizer: Any) -> None:
    """Write a whole model that every other program takes as it is, and the adapter, if there is one, alone beside it."""
    if lora_layers(model):
        save_lora(model, folder / "adapter")
    merge_for_storing(model)
    model.save_pretrained(folder)
    tokenizer.save(folder)


def run(args: argparse.Namespace) -> None:
    """Load, train, save, and print what came of it."""
    with training_folder("sft.py", args) as stage:
        if not stage.finished:
            train_and_save(args, stage)
    print(f"saved {args.out}")


def prepare(args: argparse.Namespace) -> tuple[Llama, Any, list[Pair], list[Pair]]:
    """(model, tokenizer, training sequences, those held out) of a training before its first step."""
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    print(describe_tokenizer(tokenizer))
    training, validation = load_pairs(args, tokenizer)
    model = load_base(args, args.model)
    check_vocabulary(tokenizer, model.config.vocab_size, f"--model {args.model}")
    say_window(args, model, f"--model {args.model}")
    return model, tokenizer, training, validation


def train_and_save(args: argparse.Namespace, stage: Stage) -> None:
    """A training from its beginning or its newest checkpoint to the stored model."""
    model, tokenizer, training, validation = each(lambda: prepare(args))
    stage.begin(model, model, args.model, [*training, *validation])
    history = train_sft(model, training, training_config(args, SFT), validation=validation, pad_token_id=tokenizer.pad_token_id,
                        on_step=stage, team=stage.team)
    if not validation:  # then nothing has read the last step's weights yet: raises at NaN
        validation_loss(model, training[:4], tokenizer.pad_token_id)
    for row in history:
        shown = "none" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}"
        print(f"epoch {row['epoch']}: loss {row['loss']:.3f}, validation {shown} nats per response token, "
              f"{row['tokens_per_second']:.0f} tokens/s")
    stage.finish(lambda folder: save_model(model, folder, tokenizer), history)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 with one line for bad input, or as training/stages.py has them."""
    return exit_code("sft.py", lambda: parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
