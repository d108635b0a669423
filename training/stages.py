# SPDX-License-Identifier: MIT
"""What stages 1 and 2 (sft.py, reward.py; paper, section 2.1) share beside their loop: flags, the base model, the folder.

    with training_folder(program, args) as stage:               # nobody else's, and opened before anything slow
        stage.begin(model, base, args.model, sequences)         # training.json: the flags, hashes of data and base
        history = train_sft(model, ..., on_step=stage, team=stage.team)   # a checkpoint every --save-every steps, and at a signal
        stage.finish(lambda folder: save(model, folder), history)

While a training goes on its folder holds training.json and checkpoints, from which --resume repeats bit for bit the one that was
never stopped. At the end the model is moved in whole, config.json last: a folder with that file is a whole model, one without
it none. training.json stays, as the record of how the model was made. Where torchrun started several processes (docs/scale.md),
all of them load and train, and the folder is the first one's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from data import read_text
from formats.tokenizer import window_warning
from formats.write import any_console, write_json, write_tensors
from lora import add_lora, lora_layers, merge_lora
from model import Llama
from ppo import bounds_in_words
from training import interrupts, ranks
from training.devices import require_device
from training.folder import check_run_folder, checkpoints, checkpoints_line, flush, locked, move_in, prune, save_whole
from training.interrupts import Interrupts, Stopped
from training.origin import frozen_weights, texts_digest, weights_digest
from training.launch import Lost
from training.ranks import each, everybodys, first, here

RECORD = "training.json"


# ---------------------------------------------------------------------------------------------------------------- flags


class Flags(argparse.ArgumentParser):
    """Raises ValueError where argparse would print a page and exit."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; --help lists every flag")


def number(kind: type, **bounds: float) -> Callable[[str], Any]:
    """An argparse type: a finite number inside ppo.setting's bounds."""
    def parse(text: str) -> Any:
        value = kind(text)
        if not abs(value) < 2**63:  # nor NaN; torch counts in 64 bits
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
        inside = (bounds.get("low", value) <= value <= bounds.get("high", value)
                  and bounds.get("above", -math.inf) < value < bounds.get("below", math.inf))
        if not inside:
            raise argparse.ArgumentTypeError(f"{text}: must be {bounds_in_words(**bounds)}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def training_flags(parser: argparse.ArgumentParser, defaults: Any, rates: dict[str, float], unit: str) -> None:
    """The flags that both programs have. defaults: a reward.TrainingConfig; unit: what a batch is counted in."""
    count = number(int, low=1)
    training = parser.add_argument_group("training")
    training.add_argument("--tuning", choices=("lora", "full"), default="lora", help="what is trained (beside the head, if any)")
    training.add_argument("--epochs", type=count, default=defaults.epochs, help="passes over the data")
    training.add_argument("--batch-size", type=count, default=defaults.batch_size, help=f"{unit} an optimiser step")
    training.add_argument("--micro-batch-size", type=count, default=defaults.micro_batch_size, help=f"{unit} in memory at once")
    training.add_argument("--learning-rate", type=number(float, above=0), help=f"peak; None: {rates} by --tuning")
    training.add_argument("--warmup", type=number(float, low=0, high=1), default=defaults.warmup,
                          help="share of the steps on the way up")
    training.add_argument("--weight-decay", type=number(float, low=0), default=defaults.weight_decay, help="AdamW's")
    training.add_argument("--max-grad-norm", type=number(float, above=0), default=defaults.max_grad_norm, help="clips gradients")
    training.add_argument("--seed", type=number(int, low=0, high=2**63 - 1), default=defaults.seed,
                          help="of split, order, initialisation and dropout")
    lora = parser.add_argument_group("LoRA (paper, section 2.2)")
    lora.add_argument("--lora-rank", type=number(int, low=1, high=2**16), default=8, help="rank")
    lora.add_argument("--lora-alpha", type=number(float, above=0), default=64.0, help="scale, over rank")
    lora.add_argument("--lora-dropout", type=number(float, low=0, below=1), default=0.1, help="dropout probability")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="one device")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), help="None: float32, bfloat16 for LoRA on CUDA")
    machine.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    run = parser.add_argument_group("run")
    run.add_argument("--save-every", type=count, default=20, help="optimiser steps between checkpoints")
    run.add_argument("--resume", action="store_true", help="go on with the training in --out, which knows its other flags")


def parse(parser: Flags, argv: Sequence[str] | None, needed: tuple[str, ...], rates: dict[str, float]) -> argparse.Namespace:
    """The flags; with --resume those of the training in --out, which the ones given must not contradict."""
    args = parser.parse_args(argv)
    if not args.resume:
        if missing := [f"--{name}" for name in needed if getattr(args, name) is None]:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
        args.learning_rate = args.learning_rate or rates[args.tuning]
        args.dtype = args.dtype or ("bfloat16" if args.tuning == "lora" and args.device.startswith("cuda") else "float32")
        return args
    unset = object()  # argparse leaves what a namespace has already
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    file = Path(args.out) / RECORD
    stored = stored_flags(parser, file, needed)
    for name, value in given.items():
        if value is not unset and name not in ("out", "resume", "save_every") and value != getattr(stored, name):
            raise ValueError(f"--resume: --{name.replace('_', '-')} {value} differs from the training's {getattr(stored, name)}: "
                             "leave the flag away, or start a new training in another --out")
    stored.out, stored.resume = args.out, True
    stored.save_every = args.save_every if given["save_every"] is not unset else stored.save_every
    return stored


def stored_flags(parser: Flags, file: Path, needed: tuple[str, ...]) -> argparse.Namespace:
    """The flags in training.json, read as if they had been typed. Raises FileNotFoundError, or ValueError naming the file."""
    flags = read_record(file, parser.prog)["flags"]
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
             for name, value in flags.items() if value is not None and value is not False]
    try:
        args = parser.parse_args([*words, "--out="])
    except (ValueError, SystemExit) as error:  # a flag named help
        raise ValueError(f"{file}: {error}") from None
    if missing := [name for name in (*needed, "learning_rate", "dtype") if getattr(args, name) is None]:
        raise ValueError(f"{file}: lacks {missing[0]}")
    return args


def read_record(file: Path, program: str) -> dict[str, Any]:
    """training.json of a training that `program` began."""
    if not file.is_file():
        raise FileNotFoundError(f"--resume: {file} not found: there is no training in {file.parent} to go on with")
    try:
        record = json.loads(read_text(file))
        if not isinstance(record, dict) or not isinstance(record.get("flags"), dict):
            raise ValueError("holds no flags")
        if record.get("program") != program:
            raise ValueError(f"its program is {record.get('program')!r}, not {program}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is no record of a training ({error})") from None
    return record


def training_config(args: argparse.Namespace, defaults: Any) -> Any:
    """A reward.TrainingConfig of what the flags say."""
    return replace(defaults, **{f.name: getattr(args, f.name) for f in fields(defaults)})


# ---------------------------------------------------------------------------------------------------------------- model


def load_base(args: argparse.Namespace, path: str) -> Llama:
    """The model on its device, ready to train in full or with LoRA."""
    model = Llama.from_pretrained(path, getattr(torch, args.dtype), args.device, progress=True)
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.tuning == "lora":
        add_lora(model, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout)
    return model


def say_window(args: argparse.Namespace, model: Llama, what: str) -> None:
    """A line where the longest sequences are longer than what the base was trained on."""
    for warning in window_warning(args.max_tokens, model.config.max_position_embeddings, f"{what}, --max-tokens"):
        print(warning)


def merge_for_storing(model: nn.Module) -> None:
    """Folds an adapter into its base, in float32: rounded to bf16, nearly half of what a short training has changed is lost."""
    if lora_layers(model):
        merge_lora(model.float())


# --------------------------------------------------------------------------------------------------------------- folder


class Stage:
    """A training in its folder. As a function it is what reward.Loop calls before the first step and after each."""

    def __init__(self, program: str, args: argparse.Namespace, out: Path, stack: contextlib.ExitStack) -> None:
        self.program, self.args, self.out, self.stack, self.team = program, args, out, stack, here()
        self.finished = first(lambda: args.resume and (out / "config.json").is_file())
        self.saved = None if self.finished else first(check_run_folder, out, args.resume)  # the newest checkpoint
        self.started, self.record, self.interrupts = False, {}, Interrupts()

    def begin(self, model: nn.Module, backbone: nn.Module, base: str, data: Sequence) -> None:
        """Writes training.json, or compares data and base with what it says. base: the folder that the backbone came from."""
        self.model = model
        hashes = {"data": texts_digest(data, ()), "base": weights_digest(frozen_weights(backbone))}
        ranks.require_equal("what is loaded:", hashes)
        ranks.alike(list(self.trained().values()))
        self.record = first(self.recorded, base, hashes)
        self.stack.enter_context(self.interrupts)

    def recorded(self, base: str, hashes: dict[str, str]) -> dict[str, Any]:
        """training.json as it is from here on."""
        if not self.args.resume:
            record = {"program": self.program, "flags": flags_of(self.args)} | hashes
            write_json(self.out / RECORD, record)
            self.stack.callback(self.forget)
            return record
        record = read_record(self.out / RECORD, self.program)
        if record.get("data") != hashes["data"]:
            raise ValueError(f"--resume: {self.args.data}: gives other tokens than when the training began: the file, the "
                             "prompt template or the tokenizer has changed")
        if record.get("base") != hashes["base"]:
            raise ValueError(f"--resume: {base}: its weights are not those that the training began with")
        return record

    def forget(self) -> None:
        """Of a training that came to nothing, no checkpoint and no model, not even the record stays."""
        if self.saved is None and not self.finished:
            (self.out / RECORD).unlink(missing_ok=True)

    def __call__(self, loop: Any) -> None:
        if not self.started:
            self.started = True
            if self.saved:
                each(lambda: self.restore(loop, self.saved))
            return
        caught = self.interrupts.agreed()
        if loop.step % self.args.save_every == 0 or loop.step == loop.total or caught:
            self.save(loop)
        if caught:
            raise Stopped(f"stopped by {caught.name} after step {loop.step} of {loop.total}; go on with: python {self.program} "
                          f"--resume --out {self.out}", caught)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self, loop: Any) -> None:
        """step-0020/: trained.safetensors and state.pt; older ones than the newest two go."""
        def write(part: Path) -> None:
            write_tensors(part / "trained.safetensors", tensors)
            try:
                torch.save(loop.state_dict(), part / "state.pt")
            except RuntimeError as error:  # torch's kind for a full disk
                raise OSError(f"{part / 'state.pt'}: cannot be written ({str(error).splitlines()[0]})") from error

        def save_and_prune() -> Path:
            if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
                raise FloatingPointError(f"step {loop.step}: {bad[0]} holds NaN or infinity and is not saved")
            saved = save_whole(self.out / f"step-{loop.step:04d}", write)
            prune(self.out, 2)
            return saved

        tensors = {name: p.detach().cpu().contiguous() for name, p in self.trained().items()}
        self.saved = first(save_and_prune)

    def restore(self, loop: Any, checkpoint: Path) -> None:
        """The reverse."""
        try:
            stored = load_file(checkpoint / "trained.safetensors")
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                for name, parameter in self.trained().items():
                    parameter.copy_(stored[name])
                state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
                loop.load_state_dict(state)
        except Exception as error:  # torch, pickle and zip each raise their own kinds
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{checkpoint}: is no checkpoint of this training ({what})") from None
        older = "; it is from before dropout was seeded by the step, which is drawn otherwise from here on"
        print(f"resumed from {checkpoint}{older if 'random' in state else ''}")

    def finish(self, write: Callable[[Path], object], history: list[dict], **more: Any) -> None:
        """write(folder) makes the model, which then takes its place; checkpoints go, and training.json says what came of it."""
        def move() -> None:
            write_json(self.out / RECORD, self.record | {"history": history} | more)
            move_in(self.out, write, last="config.json")
            self.finished = True
            self.tidy()

        first(move)

    def tidy(self) -> None:
        """Takes away what a finished training needs no longer."""
        for leaving in [*checkpoints(self.out), *self.out.glob(".*.part")]:
            shutil.rmtree(leaving)
        flush(self.out)


@contextlib.contextmanager
def training_folder(program: str, args: argparse.Namespace) -> Iterator[Stage]:
    """--out for one run; what ends a training is said with the checkpoint that is left."""
    each(lambda: require_device("--device", args.device))
    with contextlib.ExitStack() as stack:
        out = first(stack.enter_context, locked(Path(args.out)))
        stage = Stage(program, args, out, stack)
        if stage.finished:  # perhaps killed before it had tidied up
            first(stage.tidy)
        try:
            yield stage
        except (FloatingPointError, Lost) as error:
            if isinstance(error, FloatingPointError):  # found by all in the same numbers
                everybodys(error)
            if stage.team.rank == 0:
                error.args = (f"{error}; {checkpoints_line(out)}",)
            raise


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides how a training goes."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "resume")}


def is_begun(program: str, args: argparse.Namespace) -> bool:
    """Whether --out holds this very training, which torchrun --max-restarts then goes on with."""
    file = Path(args.out) / RECORD
    return file.is_file() and read_record(file, program)["flags"] == flags_of(args)


def exit_code(program: str, parse_args: Callable[[], argparse.Namespace], run: Callable[[argparse.Namespace], object]) -> int:
    """0 when all went well, 2 for bad input, 1 for what a training met on its way, 128 + the signal that ended it."""
    def parse_and_run() -> None:
        args = each(parse_args)
        ranks.require_equal("flag", vars(args))
        args.resume = args.resume or ranks.restarted() and first(is_begun, program, args)
        run(args)

    def complain(error: BaseException) -> tuple[int, str]:
        match error:
            case Stopped():
                return error.exit_code, str(error)
            case KeyboardInterrupt():
                return 130, f"{program}: interrupted before the first step"
            case ValueError() | FileNotFoundError() | PermissionError():
                return 2, f"{program}: {' '.join(str(error).splitlines())}"  # a name may hold a line break
            case OSError() | FloatingPointError() | torch.OutOfMemoryError():
                return 1, f"{program}: {error}".splitlines()[0]
        return 1, "".join(traceback.format_exception(error))  # a fault of ours, to be seen whole

    any_console()
    return interrupts.exit_code(parse_and_run, complain)
