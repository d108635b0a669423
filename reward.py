# SPDX-License-Identifier: MIT
"""The reward model: a LLaMA with one number at the end, read from checkpoints and trained on preferences (stage 2).

    python reward.py --base runs/sft --data preferences.json --out runs/reward                   # LoRA, one GPU
    python reward.py --base runs/sft --data preferences.json --out runs/reward --tuning full     # as AlpacaFarm did

A reward can also be a plain function, `rule(prompts, responses) -> list[float]`: see rule_scorer.

The paper (section 2.1) takes AlpacaFarm's reward model as given: trained from SFT-10k on 10K human preference pairs
with the loss -log sigmoid(chosen - rejected) (Ouyang et al. 2022, eq. 1). Training defaults are AlpacaFarm's, for full
tuning.

Departures from the released code:
  * The score is read at the last real token on whichever side the padding is, found from the mask. There it is read at
    the last position, so right padding scored the padding; elsewhere it is sought by pad id, which misses a real EOS
    where pad = EOS.
  * Scores are standardised, (raw - mean) / std, over samples of the SFT model: the KL coefficient means something only
    beside rewards of known spread. mean and std are stored apart from the weights, so raw scores stay readable.
  * The head has no bias: the loss never moves one. AlpacaFarm's is kept as mean = -bias, which gives the same scores.
  * All pairs of one instruction form a group whose outputs are scored once each (Ouyang et al. 2022, section 3.5).

On disk: transformers' LlamaForSequenceClassification (config.json, model.safetensors with score.weight; it gives raw
scores) and reward_config.json (mean, std). The language head, which scoring never uses, is left out.

B batch, S sequence, D hidden, K outputs of one instruction.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

LEARNING_RATES = {"full": 3e-6, "lora": 1e-4}  # --tuning; the first is AlpacaFarm's
HEAD_NAMES = ("score.weight", "reward_head.weight", "reward_head.bias")  # ours and transformers', AlpacaFarm's


# ---------------------------------------------------------------------------------------------------------------- model


def last_token(attention_mask: Tensor) -> Tensor:
    """Position of the last real token: (B, S) → (B,), for left and right padding alike."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * attention_mask.bool()).argmax(-1)


class RewardModel(nn.Module):
    """A scalar per sequence: a backbone with `.hidden` and `.config.hidden_size`, and a float32 head D → 1.

    `mean` and `std` are float32 buffers, 0 and 1 until `standardise` sets them. The head starts at normal(0, 1/(D+1))
    (Stiennon et al. 2020, appendix B). To train an adapter and the head, call add_lora on `.backbone`.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        size, device = backbone.config.hidden_size, next(backbone.parameters()).device
        self.score = nn.Linear(size, 1, bias=False, dtype=torch.float32, device=device)
        nn.init.normal_(self.score.weight, std=(size + 1) ** -0.5)
        self.register_buffer("mean", torch.zeros((), device=device))
        self.register_buffer("std", torch.ones((), device=device))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Standardised scores of whole sequences (prompt and response): (B, S) → (B,), float32."""
        return self.standardised(self.raw(input_ids, attention_mask))

    def standardised(self, raw: Tensor) -> Tensor:
        """(raw - mean) / std, float32."""
        return (raw - self.mean.float()) / self.std.float()

    def raw(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores before standardising: (B, S) → (B,), float32."""
        return self.read(self.backbone.hidden(input_ids, attention_mask), last_token(attention_mask))

    def read(self, hidden: Tensor, last: Tensor) -> Tensor:
        """The head on position `last` (B,) of hidden states (B, S, D): (B,), float32."""
        rows = torch.arange(len(hidden), device=hidden.device)
        # .float(): `model.to(bfloat16)` reaches the head too, and its sums must not be rounded to 3 digits.
        return F.linear(hidden[rows, last].float(), self.score.weight.float()).squeeze(-1)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None) -> RewardModel:
        """Read our layout, transformers' LlamaForSequenceClassification with one label, or AlpacaFarm's reward model.

        Without model.py and formats/ beside this file the backbone is transformers' (and AlpacaFarm's layout is not read).

        dtype None keeps what is stored; the head is float32 in any case. The model comes back in eval mode. Raises
        FileNotFoundError or ValueError that names the file and what is wrong with it.
        """
        try:
            import formats  # noqa: F401
        except ImportError:  # this file was copied alone
            return _load_alone(cls, Path(path), dtype, device).eval()
        return _load(cls, Path(path), dtype, device).eval()

    def save_pretrained(self, directory: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write the layout described at the top. `dtype` is the backbone's on disk (None: as it is); head float32.

        Raises ValueError for an adapter that is not merged (lora.merge_lora): it is not part of this layout.
        """
        _save(self, Path(directory), dtype)


Reward = Callable[[Tensor, Tensor, int], Tensor]  # as ppo.py calls it: (input_ids, attention_mask, n) -> (B,)


def scorer(model: RewardModel) -> Reward:
    """The model as a reward on the policy's token ids, where both tokenizers mean the same by every id."""
    return lambda input_ids, attention_mask, n: model(input_ids, attention_mask)


def retokenising_scorer(model: RewardModel, policy_tokenizer: Any, reward_tokenizer: Any) -> Reward:
    """The model as a reward where they don't: each sequence is decoded and tokenised anew, which loses the policy's own
    spelling and any special tokens inside the text."""
    def retokenised(input_ids: Tensor, attention_mask: Tensor, n: int) -> Tensor:
        sequences = []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            ids = ids[mask].tolist()
            text, ended = policy_tokenizer.decode(ids), ids[-1] == policy_tokenizer.eos_token_id
            sequences.append(reward_tokenizer.encode(text, bos=True, eos=ended))
        return model.standardised(_raw_scores(model, sequences, reward_tokenizer.pad_token_id))

    return retokenised


def same_ids(a: Any, b: Any) -> bool:
    """Whether every id that `a` can emit means the same to `b`; a pad id beyond the vocabulary is never read."""
    ids = [i for i in range(len(a)) if i != a.pad_token_id]
    same_ends = (a.bos_token_id, a.eos_token_id) == (b.bos_token_id, b.eos_token_id)
    # All in one text, as one call each would take seconds; backwards too, so that no two cuts of one text look alike.
    return same_ends and max(ids) < len(b) and all(a.decode(x) == b.decode(x) for x in (ids, ids[::-1]))


def rule_scorer(rule: Callable[[list[str], list[str]], list[float]], tokenizer: Any) -> Reward:
    """A rule on texts, as a reward on token ids.

    The rule gets the prompts as the policy read them, template and all, and the responses, both without special tokens;
    it gives one finite number for each. They are used as they are: scale them to a deviation near 1, where beta belongs.
    """
    def reward(input_ids: Tensor, attention_mask: Tensor, n: int) -> Tensor:
        cut, real = input_ids.shape[1] - n, attention_mask.bool()
        prompts = [tokenizer.decode(ids[:cut][mask[:cut]]) for ids, mask in zip(input_ids, real, strict=True)]
        responses = [tokenizer.decode(ids[cut:][mask[cut:]]) for ids, mask in zip(input_ids, real, strict=True)]
        numbers = rule(prompts, responses)
        try:
            scores = torch.tensor([float(x) for x in numbers], device=input_ids.device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the rule must return a list of numbers ({error})") from error
        if len(scores) != len(responses) or not bool(scores.isfinite().all()):
            raise ValueError(f"the rule must return {len(responses)} finite numbers, one for each response; it returned "
                             f"{len(scores)}, {int(scores.isfinite().sum())} of them finite")
        return scores

    return reward


# ---------------------------------------------------------------------------------------------------------- checkpoints


def open_backbone(directory: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """(the backbone without memory, every stored tensor by name) of a stored reward model; no weight is read yet.

    Ours, transformers' LlamaForSequenceClassification, or AlpacaFarm's. The backbone is model.Llama; scoring needs no language
    head, so that is tied to the embedding: it takes no memory and every method stays usable.
    """
    from formats.alpacafarm import as_llama, backbone_fields
    from formats.read import local_copy
    from formats.tensors import parse_json, stored_tensors
    from model import LlamaConfig, without_memory

    directory = local_copy(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}/config.json: not found; a reward model folder holds config.json and its weights"
                                " (an adapter is first merged with PEFT)")
    # Before any weights are looked at: another family's would seem damaged, or a difference.
    parse_json(directory / "config.json", lambda description: LlamaConfig.from_dict(as_llama(description)))
    stored = stored_tensors(directory)

    def build(description: dict[str, Any]) -> LlamaConfig:
        return LlamaConfig.from_dict(backbone_fields(directory, description, stored) | {"tie_word_embeddings": True})

    config = parse_json(directory / "config.json", build)
    if config.num_hidden_layers > len(stored):  # else a nonsensical number would be built for hours
        raise ValueError(f"{directory}: num_hidden_layers is {config.num_hidden_layers}, but there are {len(stored)} tensors")
    return without_memory(config), stored


def _load(cls: type[RewardModel], directory: Path, dtype: torch.dtype | None,
          device: torch.device | str | None) -> RewardModel:
    from formats.read import local_copy
    from formats.tensors import check_names, load_tensors, parse_json, read_tensor
    from model import fill

    directory = local_copy(directory)
    backbone, stored = open_backbone(directory)
    # Apart, as the head stays float32 whatever the dtype.
    head = {name.rpartition(".")[2]: read_tensor(stored.pop(name), name).float() for name in HEAD_NAMES if name in stored}
    if "weight" not in head:
        raise ValueError(f"{directory}: neither score.weight nor reward_head.weight among the weights: not a reward "
                         "model; `python reward.py` trains one")
    if len(head["weight"]) != 1:
        raise ValueError(f"{directory}: score.weight has {len(head['weight'])} rows; a reward model has num_labels = 1")
    stored = {name.removeprefix("backbone_model."): tensor for name, tensor in stored.items()}
    wanted = check_names(directory, stored, {name: p for name, p in backbone.named_parameters() if name != "lm_head.weight"})
    fill(backbone, ((name, tensor) for _, name, tensor in load_tensors(wanted, dtype, device, like=backbone)))
    backbone.lm_head.weight = backbone.model.embed_tokens.weight
    scale = {"mean": -head.get("bias", torch.zeros(1)).item(), "std": 1.0}
    if (directory / "reward_config.json").is_file():
        scale |= parse_json(directory / "reward_config.json", dict)
    return _with_head(cls(backbone), directory, head["weight"], scale)


def _with_head(model: RewardModel, directory: Path, weight: Tensor, scale: dict[str, Any]) -> RewardModel:
    """The model with the stored head and the stored mean and std of its scores."""
    for name, low in (("mean", -math.inf), ("std", 0.0)):
        value = scale[name]
        if type(value) not in (int, float) or not max(low, -1e30) < value < 1e30:
            raise ValueError(f"{directory}/reward_config.json: {name} is {value!r}: must be a number"
                             + (" above 0" if name == "std" else ""))
    with torch.no_grad():
        model.score.weight.copy_(weight)
        model.mean.fill_(float(scale["mean"]))
        model.std.fill_(float(scale["std"]))
    return model


class _TransformersBackbone(nn.Module):
    """For a copy of this file alone: transformers' base model, with positions that count real tokens as model.py's do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, (B, S) → (B, S, D)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return self.model(input_ids, attention_mask=mask, position_ids=positions).last_hidden_state


def _load_alone(cls: type[RewardModel], directory: Path, dtype: torch.dtype | None,
                device: torch.device | str | None) -> RewardModel:
    """_load without model.py and formats/: transformers reads its own sequence classifiers, which our layout is one of."""
    from transformers import AutoModelForSequenceClassification

    whole = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype or "auto")
    if whole.config.num_labels != 1:
        raise ValueError(f"{directory}: a sequence classifier of {whole.config.num_labels} labels; a reward model has 1")
    file, scale = directory / "reward_config.json", {"mean": 0.0, "std": 1.0}
    if file.is_file():
        scale |= json.loads(file.read_text(encoding="utf-8"))
    model = cls(_TransformersBackbone(whole.base_model.to(device)))
    return _with_head(model, directory, whole.score.weight.float(), scale)


def _save(model: RewardModel, directory: Path, dtype: torch.dtype | None) -> None:
    from safetensors.torch import save_file

    if any(getattr(module, "merged", True) is False for module in model.backbone.modules()):
        raise ValueError("the backbone has an adapter that is not merged and would be lost: call lora.merge_lora first")
    backbone = model.backbone.state_dict()
    tensors = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in backbone.items()
               if not name.endswith((".lora_A", ".lora_B")) and not name.startswith("lm_head.")}
    stored = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    tensors["score.weight"] = model.score.weight.detach().float().contiguous()
    config = model.backbone.config.to_dict() | {
        "architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "tie_word_embeddings": True,
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "torch_dtype": stored}
    scale = {"mean": model.mean.item(), "std": model.std.item()}
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
    for name, content in (("config.json", config), ("reward_config.json", scale)):
        text = json.dumps(content, indent=2) + "\n"
        _write(directory / name, lambda file, text=text: file.write_text(text, encoding="utf-8"))


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and rename: a full disk or a kill leaves the last good file whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        os.replace(temporary, file)
    except SafetensorError as error:  # its own kind for a full disk
        raise OSError(f"{file}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- preferences and loss


class Group(NamedTuple):
    """K outputs to one instruction, each with its prompt as token ids, and labelled pairs (winner, loser) among them.

    An ordinary preference pair is a group of two: Group([chosen, rejected], [(0, 1)]).
    """

    sequences: list[list[int]]
    pairs: list[tuple[int, int]]


class Accuracy(NamedTuple):
    """Share of labelled pairs scored in the label's order. The standard error counts instructions as the independent
    unit, not pairs; `n` leaves out pairs with equal scores."""

    value: float
    standard_error: float
    n: int


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected), mean over (B,) pairs (Ouyang et al. 2022, eq. 1)."""
    return -F.logsigmoid(chosen - rejected).mean()


def group_preferences(records: Sequence[dict], encode: Callable[[dict, str], list[int]],
                      max_tokens: int) -> tuple[list[Group], int]:
    """Gather preference records (data.load_preferences) by instruction; equal outputs become one sequence.

    `encode(record, output)` gives the tokens of prompt and output. Returns the groups and how many pairs were left out:
    with an output over `max_tokens`, or two equal outputs.
    """
    outputs: dict[tuple[str, str], dict[str, int]] = {}
    groups: dict[tuple[str, str], Group] = {}
    dropped = 0
    for record in records:
        key = (record["instruction"], record["input"])
        texts = [record["output_1"], record["output_2"]]
        encoded = [encode(record, text) for text in texts]
        if texts[0] == texts[1] or max(map(len, encoded)) > max_tokens:
            dropped += 1
            continue
        known, group = outputs.setdefault(key, {}), groups.setdefault(key, Group([], []))
        for text, ids in zip(texts, encoded, strict=True):
            if known.setdefault(text, len(known)) == len(group.sequences):
                group.sequences.append(ids)
        winner = record["preference"] - 1
        group.pairs.append((known[texts[winner]], known[texts[1 - winner]]))
    return list(groups.values()), dropped


def _flatten(groups: Sequence[Group]) -> tuple[list[list[int]], Tensor]:
    """All sequences of a batch of groups, and its pairs (n, 2) as indices into them."""
    sequences, pairs = [], []
    for group in groups:
        pairs += [(winner + len(sequences), loser + len(sequences)) for winner, loser in group.pairs]
        sequences += group.sequences
    return sequences, torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def _raw_scores(model: RewardModel, sequences: Sequence[Sequence[int]], pad_token_id: int) -> Tensor:
    """Raw scores (B,) of token lists."""
    device, last = model.score.weight.device, torch.tensor([len(sequence) - 1 for sequence in sequences])
    input_ids = torch.full((len(sequences), int(last.max()) + 1), pad_token_id, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, :len(sequence)] = torch.as_tensor(sequence)
    # Padding is on the right, where causal attention never looks back at it: no mask, hence the fast causal kernel.
    return model.read(model.backbone.hidden(input_ids.to(device)), last.to(device))


# ------------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def score_all(model: RewardModel, sequences: Sequence[Sequence[int]], pad_token_id: int = 0, batch_size: int = 32,
              progress: bool = False) -> Tensor:
    """Raw scores (N,) on the CPU of token lists in any number and length, in eval mode."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.empty(len(sequences))
    for start in tqdm(range(0, len(order), batch_size), desc="score", disable=not progress):
        rows = order[start:start + batch_size]
        scores[rows] = _raw_scores(model, [sequences[i] for i in rows], pad_token_id).cpu()
    model.train(was_training)
    return scores


def accuracy(model: RewardModel, groups: Sequence[Group], pad_token_id: int = 0, batch_size: int = 32) -> Accuracy:
    """How often the model's order agrees with the labels of `groups`."""
    sequences, pairs = _flatten(groups)
    scores = score_all(model, sequences, pad_token_id, batch_size)
    margin = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(group.pairs) for group in groups]))
    right, counted = ((torch.zeros(len(groups)).index_add_(0, owner, x.float())) for x in (margin > 0, margin != 0))
    n = int(counted.sum())
    if n == 0:
        return Accuracy(math.nan, math.nan, 0)
    value = float(right.sum() / n)
    # Pairs of one instruction share outputs, so errors cluster: the ratio estimator's variance over instructions.
    m = int((counted > 0).sum())
    variance = float((right - value * counted).square().sum()) * m / max(1, m - 1)
    return Accuracy(value, math.sqrt(variance) / n, n)


@torch.no_grad()
def standardise(model: RewardModel, sequences: Sequence[Sequence[int]], pad_token_id: int = 0,
                batch_size: int = 32) -> tuple[float, float]:
    """Set the model's mean and std from its raw scores of `sequences` (samples of the SFT model), and return them.

    Raises ValueError where the scores have no spread.
    """
    scores = score_all(model, sequences, pad_token_id, batch_size).double()
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    if not std > 1e-6:
        raise ValueError(f"cannot standardise: {len(sequences)} sequences have scores of standard deviation {std:.2g}")
    model.mean.fill_(mean)
    model.std.fill_(std)
    return mean, std


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate at `step` (from 0): a line up over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def length_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Index batches of similar length in random order: shuffle, sort inside windows of 32 batches, cut, shuffle."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = 32 * batch_size  # all of the data in one window would put the same groups together in every epoch
    windows = [sorted(order[i:i + window], key=lambda j: lengths[j]) for i in range(0, len(order), window)]
    batches = [w[i:i + batch_size] for w in windows for i in range(0, len(w), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass
class TrainingConfig:
    """The numbers of a training loop; sizes count groups of outputs here and sequences in sft.py."""

    epochs: int
    batch_size: int                     # to an optimiser step
    learning_rate: float                # the peak
    micro_batch_size: int | None = None  # in memory at once; the gradient stays as it is
    warmup: float = 0.03                # share of the steps on the way up
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0                       # of the order (torch's own generator draws the dropout)


REWARD = TrainingConfig(epochs=1, batch_size=64, learning_rate=LEARNING_RATES["full"])


def train_reward(model: RewardModel, groups: Sequence[Group], config: TrainingConfig = REWARD, *,
                 held_out: Sequence[Group] = (), pad_token_id: int = 0, progress: bool = True) -> list[dict]:
    """Train what requires gradients, in place, on the raw scores of all labelled pairs; each sequence is scored once.

    Returns a dict an epoch: epoch, loss and accuracy (running means over training pairs), held_out (an Accuracy, or None).
    Raises ValueError where there is nothing to train or to train on.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [group for group in groups if group.pairs]
    if not parameters or not groups:
        raise ValueError("train_reward: " + ("no labelled pairs" if parameters else "no parameter requires gradients"))
    total = config.epochs * math.ceil(len(groups) / config.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    factor = partial(warmup_cosine, total=total, warmup=math.ceil(config.warmup * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(config.seed)
    was_training, history = model.training, []

    def step(batch: list[Group]) -> tuple[float, float, int]:
        stats = _accumulate(model, batch, config.micro_batch_size or config.batch_size, pad_token_id)
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        return stats

    with tqdm(total=total, desc="reward model", unit="step", disable=not progress) as bar:
        for epoch in range(1, config.epochs + 1):
            model.train()
            history.append({"epoch": epoch, **_epoch(step, groups, config.batch_size, generator, bar)})
            history[-1]["held_out"] = accuracy(model, held_out, pad_token_id) if held_out else None
            if progress:
                tqdm.write(_epoch_line(history[-1]))
    model.train(was_training)
    return history


def _epoch_line(row: dict) -> str:
    held = row["held_out"]
    shown = f"{held.value:.1%} ± {held.standard_error:.1%} of {held.n} pairs" if held else "no pairs"
    return f"epoch {row['epoch']}: loss {row['loss']:.3f}, accuracy {row['accuracy']:.1%}; held out {shown}"


def _epoch(step: Callable[[list[Group]], tuple[float, float, int]], groups: Sequence[Group], batch_size: int,
           generator: torch.Generator, bar: tqdm) -> dict:
    """Every group once. Returns running means over pairs."""
    lengths = [max(map(len, group.sequences)) for group in groups]
    loss, right, pairs = 0.0, 0.0, 0
    for batch in length_batches(lengths, batch_size, generator):
        batch_loss, batch_right, n = step([groups[i] for i in batch])
        loss, right, pairs = loss + batch_loss * n, right + batch_right, pairs + n
        bar.set_postfix(loss=f"{batch_loss:.3f}", accuracy=f"{right / pairs:.3f}", refresh=False)
        bar.update()
    return {"loss": loss / pairs, "accuracy": right / pairs}


def _accumulate(model: RewardModel, batch: list[Group], micro_batch_size: int,
                pad_token_id: int) -> tuple[float, float, int]:
    """Add the gradient of the batch's mean loss. Returns (that loss, pairs in the right order, pairs)."""
    n = sum(len(group.pairs) for group in batch)
    mean, right = 0.0, 0.0
    for i in range(0, len(batch), micro_batch_size):
        sequences, pairs = _flatten(batch[i:i + micro_batch_size])
        scores = _raw_scores(model, sequences, pad_token_id)
        chosen, rejected = scores[pairs.to(scores.device).T]
        # Weighted by its share of the batch's pairs: every label counts the same, in whatever micro-batch it falls.
        loss = pairwise_loss(chosen, rejected) * (len(pairs) / n)
        loss.backward()
        mean, right = mean + loss.item(), right + (chosen > rejected).sum().item()
    return mean, right, n


# -------------------------------------------------------------------------------------------------------------- program


def training_flags(parser: argparse.ArgumentParser, defaults: TrainingConfig, rates: dict[str, float], unit: str) -> None:
    """The flags that this program and sft.py share; unit: what a batch is counted in."""
    training = parser.add_argument_group("training")
    training.add_argument("--tuning", choices=("lora", "full"), default="lora", help="what is trained (beside the head, if any)")
    training.add_argument("--epochs", type=int, default=defaults.epochs, help="passes over the data")
    training.add_argument("--batch-size", type=int, default=defaults.batch_size, help=f"{unit} an optimiser step")
    training.add_argument("--micro-batch-size", type=int, default=defaults.micro_batch_size, help=f"{unit} in memory at once")
    training.add_argument("--learning-rate", type=float, help=f"peak; None: {rates} by --tuning")
    training.add_argument("--warmup", type=float, default=defaults.warmup, help="share of the steps on the way up")
    training.add_argument("--weight-decay", type=float, default=defaults.weight_decay, help="AdamW's")
    training.add_argument("--max-grad-norm", type=float, default=defaults.max_grad_norm, help="clips gradients")
    training.add_argument("--seed", type=int, default=defaults.seed, help="of split, order, initialisation and dropout")
    lora = parser.add_argument_group("LoRA (paper, section 2.2)")
    lora.add_argument("--lora-rank", type=int, default=8, help="rank")
    lora.add_argument("--lora-alpha", type=float, default=64, help="scale, over rank")
    lora.add_argument("--lora-dropout", type=float, default=0.1, help="dropout probability")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="one device")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), help="None: float32, bfloat16 for LoRA on CUDA")
    machine.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")


def training_config(args: argparse.Namespace, rates: dict[str, float]) -> TrainingConfig:
    """What those flags say."""
    given = {f.name: getattr(args, f.name) for f in fields(TrainingConfig)}
    return TrainingConfig(**given | {"learning_rate": args.learning_rate or rates[args.tuning]})


def load_base(args: argparse.Namespace, path: str) -> nn.Module:
    """The model on its device, ready to train in full or with LoRA."""
    from lora import add_lora
    from model import Llama

    default = "bfloat16" if args.tuning == "lora" and args.device.startswith("cuda") else "float32"
    model = Llama.from_pretrained(path, getattr(torch, args.dtype or default), args.device, progress=True)
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.tuning == "lora":
        add_lora(model, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout)
    return model


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a reward model on preference pairs (stage 2).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--base", required=True, help="the SFT model: folder, .gguf or hub name")
    files.add_argument("--data", required=True, help="AlpacaFarm preferences, JSON or JSON lines")
    files.add_argument("--out", required=True, help="directory for the reward model (LoRA is merged into it)")
    files.add_argument("--prompt-template", default="alpaca", help="prompt: alpaca, tiny, chat or a JSON file")
    files.add_argument("--max-tokens", type=int, default=512, help="longer prompt + output: the pair is dropped")
    files.add_argument("--held-out", type=float, default=0.1, help="share of the instructions kept for accuracy")
    training_flags(parser, replace(REWARD, micro_batch_size=2), LEARNING_RATES, "instructions")
    return parser.parse_args(argv)


def load_groups(args: argparse.Namespace, tokenizer: Any) -> tuple[list[Group], list[Group]]:
    """(training, held-out) groups, split by instruction so that no prompt is in both."""
    from data import encode_pair, load_preferences

    def encode(record: dict, output: str) -> list[int]:
        prompt, response = encode_pair(record, output, tokenizer, args.prompt_template)
        return prompt + response

    groups, dropped = group_preferences(load_preferences(args.data), encode, args.max_tokens)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(args.seed)).tolist()
    n = round(args.held_out * len(groups))
    if len(groups) == n:
        raise ValueError(f"--max-tokens {args.max_tokens}, --held-out {args.held_out}: no pair left to train on")
    print(f"{len(groups) - n} instructions to train on, {n} held out; {dropped} pairs dropped (over {args.max_tokens} "
          "tokens, or two equal outputs)")
    return [groups[i] for i in order[n:]], [groups[i] for i in order[:n]]


def merge_for_storing(model: nn.Module) -> None:
    """Folds an adapter into its base, in float32: rounded to bf16, nearly half of what a short training has changed is lost."""
    from lora import lora_layers, merge_lora

    if lora_layers(model):
        merge_lora(model.float())


def save_reward_model(model: RewardModel, folder: Path, tokenizer: Any) -> None:
    """Write the reward model and the tokenizer of its base."""
    if model.backbone.config.pad_token_id is None:
        model.backbone.config.pad_token_id = tokenizer.pad_token_id  # transformers finds the last token by it
    model.save_pretrained(folder)
    tokenizer.save(folder)


def run(args: argparse.Namespace) -> None:
    """Load, train, standardise, save, and print what came of it."""
    from formats.tokenizer import check_vocabulary, describe_tokenizer, load_tokenizer
    from formats.write import new_folder

    with new_folder(Path(args.out)) as out:
        torch.manual_seed(args.seed)
        tokenizer = load_tokenizer(args.base)
        print(describe_tokenizer(tokenizer))
        groups, held_out = load_groups(args, tokenizer)
        model = RewardModel(load_base(args, args.base))
        check_vocabulary(tokenizer, model.backbone.config.vocab_size, f"--base {args.base}")
        train_reward(model, groups, training_config(args, LEARNING_RATES), held_out=held_out, pad_token_id=tokenizer.pad_token_id)
        merge_for_storing(model.backbone)  # before standardising: its scores are to be those of what is stored
        # Outputs of preference data are samples of the SFT model; held-out ones weren't fitted, so their spread is honest.
        samples = [sequence for group in held_out or groups for sequence in group.sequences]
        mean, std = standardise(model, samples, tokenizer.pad_token_id)
        print(f"standardised on {len(samples)} samples: raw mean {mean:.3f}, deviation {std:.3f}")
        save_reward_model(model, out, tokenizer)
    print(f"saved {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for bad input."""
    try:
        run(parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"reward.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
