"""Stage 1, supervised fine-tuning: a LLaMA learns to answer instructions, in full or with LoRA (paper, section 2.1).

    python sft.py --model llama-7b --data sft.json --out runs/sft                  # LoRA, which fits one GPU
    python sft.py --model llama-7b --data sft.json --out runs/sft --tuning full    # as AlpacaFarm made SFT-10k

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
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import check_vocabulary, describe_tokenizer, encode_pair, load_instructions, load_tokenizer
from lora import add_lora, merge_lora, save_lora
from model import Llama
from reward import check_out, length_batches, warmup_cosine

LEARNING_RATES = {"full": 2e-5, "lora": 1e-4}  # --tuning

Pair = tuple[Sequence[int], Sequence[int]]  # (prompt ids, response ids through EOS)

# -------------------------------------------------------------------------------------------------------------- loss


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
def validation_loss(model: nn.Module, pairs: Sequence[Pair], pad_token_id: int = 0, batch_size: int = 32) -> float:
    """Mean cross-entropy per response token, in nats, with dropout off."""
    was_training = model.training
    model.eval()
    ordered = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    sums = [response_loss(model, ordered[i:i + batch_size], pad_token_id) for i in range(0, len(ordered), batch_size)]
    model.train(was_training)
    return sum(loss.item() for loss, _ in sums) / sum(n for _, n in sums)


# ---------------------------------------------------------------------------------------------------------- training


def train_sft(model: nn.Module, sequences: Sequence[Pair], *, validation: Sequence[Pair] = (), epochs: int = 3,
              batch_size: int = 128, micro_batch_size: int | None = None, learning_rate: float = 2e-5,
              warmup: float = 0.03, weight_decay: float = 0.0, max_grad_norm: float = 1.0, pad_token_id: int = 0,
              seed: int = 0, progress: bool = True,
              desc: str = "SFT") -> list[dict]:
    """Train the parameters of `model` that require gradients, in place, on (prompt ids, response ids through EOS).

    `model` offers `.hidden(input_ids)` -> (B, S, D) and `.lm_head`. `warmup` is the share of steps on the way up.
    `micro_batch_size` bounds the sequences in memory at once and leaves the gradient as it is. Order and result follow
    from `seed` (and torch's own, where there is dropout). Returns a dict an epoch: epoch, loss and validation_loss
    (nats per response token; None without validation), tokens_per_second (padding left out). Raises ValueError where
    there is nothing to train or to train on.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("train_sft: no parameter of the model requires gradients; add LoRA or unfreeze it")
    if not sequences or not all(len(prompt) and len(response) for prompt, response in sequences):
        raise ValueError("train_sft: give at least one sequence, each with a prompt and a response of at least a token")
    total = epochs * math.ceil(len(sequences) / batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    factor = partial(warmup_cosine, total=total, warmup=math.ceil(warmup * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(seed)
    micro, was_training, history = micro_batch_size or batch_size, model.training, []

    def step(batch: list[Pair]) -> tuple[float, int]:
        loss, n = _accumulate(model, batch, micro, pad_token_id)
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        return loss, n

    with tqdm(total=total, desc=desc, unit="step", disable=not progress) as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            history.append({"epoch": epoch, **_epoch(step, sequences, batch_size, generator, schedule, bar)})
            held_out = validation_loss(model, validation, pad_token_id, micro) if validation else None
            history[-1]["validation_loss"] = held_out
    model.train(was_training)
    return history


def _epoch(step, sequences: Sequence[Pair], batch_size: int, generator: torch.Generator, schedule, bar: tqdm) -> dict:
    """Every sequence once. Returns the mean loss per response token and the speed."""
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    start, tokens, targets, mean = time.perf_counter(), 0, 0, 0.0
    for batch in length_batches(lengths, batch_size, generator):
        loss, n = step([sequences[i] for i in batch])
        tokens, targets = tokens + sum(lengths[i] for i in batch), targets + n
        mean += (loss - mean) * n / targets
        speed = tokens / (time.perf_counter() - start)
        shown = {"loss": f"{loss:.3f}", "lr": f"{schedule.get_last_lr()[0]:.1e}", "tokens/s": f"{speed:.0f}"}
        bar.set_postfix(shown, refresh=False)
        bar.update()
    return {"loss": mean, "tokens_per_second": speed}


def _accumulate(model: nn.Module, batch: list[Pair], micro_batch_size: int, pad_token_id: int) -> tuple[float, int]:
    """Add the gradient of the batch's mean loss. Returns (that loss per response token, response tokens)."""
    n = sum(len(response) for _, response in batch)
    mean = 0.0
    for i in range(0, len(batch), micro_batch_size):
        # Divided by the whole batch's tokens: a mean of micro-batch means would weigh the shorter responses more.
        loss = response_loss(model, batch[i:i + micro_batch_size], pad_token_id)[0] / n
        loss.backward()
        mean += loss.item()
    return mean, n


# ----------------------------------------------------------------------------------------------------------- program


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default of the loop comes from `train_sft`."""
    loop = train_sft.__kwdefaults__
    parser = argparse.ArgumentParser(description="Supervised fine-tuning on instructions and outputs (stage 1).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--model", required=True, help="directory of the LLaMA to start from, with its tokenizer")
    files.add_argument("--data", required=True, help="AlpacaFarm JSON or JSON lines: instruction, input, output")
    files.add_argument("--out", required=True, help="directory for the tuned model (with LoRA: merged, and adapter/)")
    files.add_argument("--prompt-template", default="alpaca", help="prompt: alpaca, tiny, chat or a JSON file")
    files.add_argument("--max-tokens", type=int, default=512, help="longer prompt + response: dropped")
    files.add_argument("--validation", type=float, default=0.02, help="share of the data held out")
    training = parser.add_argument_group("training")
    training.add_argument("--tuning", choices=("lora", "full"), default="lora", help="what is trained")
    training.add_argument("--epochs", type=int, default=loop["epochs"], help="passes over the data")
    training.add_argument("--batch-size", type=int, default=loop["batch_size"], help="sequences an optimiser step")
    training.add_argument("--micro-batch-size", type=int, default=4, help="sequences in memory at once")
    training.add_argument("--learning-rate", type=float, help=f"peak; None: {LEARNING_RATES} by --tuning")
    training.add_argument("--warmup", type=float, default=loop["warmup"], help="share of the steps on the way up")
    training.add_argument("--weight-decay", type=float, default=loop["weight_decay"], help="AdamW's")
    training.add_argument("--max-grad-norm", type=float, default=loop["max_grad_norm"], help="clips gradients")
    training.add_argument("--seed", type=int, default=loop["seed"], help="of split, order, LoRA and dropout")
    lora = parser.add_argument_group("LoRA (paper, section 2.2)")
    lora.add_argument("--lora-rank", type=int, default=8, help="rank")
    lora.add_argument("--lora-alpha", type=float, default=64, help="scale, over rank")
    lora.add_argument("--lora-dropout", type=float, default=0.1, help="dropout probability")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="one device")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), help="None: float32, bfloat16 for LoRA on CUDA")
    machine.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    return parser.parse_args(argv)


def load_pairs(args: argparse.Namespace, tokenizer) -> tuple[list[Pair], list[Pair]]:
    """(training, validation) sequences that fit --max-tokens, split by --seed."""
    examples = load_instructions(args.data, need_output=True)
    pairs = [encode_pair(example, example["output"], tokenizer, args.prompt_template) for example in examples]
    kept = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= args.max_tokens]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = round(args.validation * len(kept))
    if len(kept) == held_out:
        shortest = min(len(prompt) + len(response) for prompt, response in pairs)
        raise ValueError(f"--max-tokens {args.max_tokens}, --validation {args.validation}: no sequence left to train "
                         f"on (the shortest of {len(pairs)} has {shortest} tokens)")
    print(f"{len(kept) - held_out} sequences to train on, {held_out} held out, {len(pairs) - len(kept)} dropped "
          f"(over {args.max_tokens} tokens)")
    return [kept[i] for i in order[held_out:]], [kept[i] for i in order[:held_out]]


def load_model(args: argparse.Namespace) -> Llama:
    """The model on its device, ready to train in full or with LoRA."""
    default = "bfloat16" if args.tuning == "lora" and args.device.startswith("cuda") else "float32"
    model = Llama.from_pretrained(args.model, getattr(torch, args.dtype or default), args.device, progress=True)
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.tuning == "lora":
        add_lora(model, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout)
    return model


def save(model: Llama, args: argparse.Namespace, tokenizer) -> None:
    """Write a whole model that every other program takes as it is, and the adapter alone beside it."""
    if args.tuning == "lora":
        save_lora(model, Path(args.out) / "adapter")
        merge_lora(model)
    model.save_pretrained(args.out)
    tokenizer.save(args.out)


def run(args: argparse.Namespace) -> None:
    """Load, train, save, and print what came of it."""
    check_out(args.out)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    print(describe_tokenizer(tokenizer))
    training, validation = load_pairs(args, tokenizer)
    model = load_model(args)
    check_vocabulary(tokenizer, model.config.vocab_size, f"--model {args.model}")
    history = train_sft(
        model, training, validation=validation, epochs=args.epochs, batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size, learning_rate=args.learning_rate or LEARNING_RATES[args.tuning],
        warmup=args.warmup, weight_decay=args.weight_decay, max_grad_norm=args.max_grad_norm,
        pad_token_id=tokenizer.pad_token_id, seed=args.seed)
    for row in history:
        shown = "none" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}"
        print(f"epoch {row['epoch']}: loss {row['loss']:.3f}, validation {shown} nats per response token, "
              f"{row['tokens_per_second']:.0f} tokens/s")
    save(model, args, tokenizer)
    print(f"saved {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for bad input."""
    try:
        run(parse_args(argv))
    except (ValueError, FileNotFoundError) as error:
        print(f"sft.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
