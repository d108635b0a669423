# SPDX-License-Identifier: MIT
"""The reward model: a LLaMA with one number at the end, read from checkpoints and trained on preferences (stage 2).

    python reward.py --base runs/sft --data preferences.json --out runs/reward                   # LoRA, one GPU
    python reward.py --base runs/sft --data preferences.json --out runs/reward --tuning full     # as AlpacaFarm did
    python reward.py --resume --out runs/reward                                # go on where it stopped or was killed
    python reward.py calibrate --reward DIR --policy runs/sft --data ppo.json  # standardise one as it is found

A reward can also be a plain function, `rule(prompts, responses) -> list[float]`: see apply_rule.

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
scores) and reward_config.json (mean, std, eos, prompt_template). The language head, which scoring never uses, is left out.

B batch, S sequence, D hidden, K outputs of one instruction.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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

    What it was trained to read is stored with it: `ends_with_eos`, whether its sequences ended in EOS, where the score is then
    read (None: the folder doesn't say), and `prompt_template`, a name or a template file's contents (None: it doesn't say).
    """

    ends_with_eos: bool | None = True
    prompt_template: str | dict[str, str] | None = None
    stored_scale: tuple[float, float, dict[str, Any] | None] = 0.0, 1.0, None  # mean, std, how training/calibrate.py found them

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
    def from_pretrained(cls, path: str | os.PathLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                        part: Callable[[Tensor], Tensor] | None = None) -> RewardModel:
        """Read our layout, transformers' LlamaForSequenceClassification (Qwen2's, ...) with one label, or AlpacaFarm's.

        Without model.py and formats/ beside this file the backbone is transformers' (and AlpacaFarm's layout is not read).

        dtype None keeps what is stored; the head is float32 in any case; part: formats.tensors.load_tensors, of the backbone.
        The model comes back in eval mode. Raises FileNotFoundError or ValueError that names the file and what is wrong.
        """
        try:
            import formats  # noqa: F401
        except ImportError:  # this file was copied alone
            return _load_alone(cls, Path(path), dtype, device).eval()
        return _load(cls, Path(path), dtype, device, part).eval()

    def save_pretrained(self, directory: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write the layout described at the top. `dtype` is the backbone's on disk (None: as it is); head float32.

        Raises ValueError for an adapter that is not merged (lora.merge_lora): it is not part of this layout.
        """
        _save(self, Path(directory), dtype)


Reward = Callable[[Tensor, Tensor, int], Tensor]  # as ppo.py calls it: (input_ids, attention_mask, n) -> (B,)


def scorer(model: RewardModel, stop_ids: Sequence[int] = (), eos_token_id: int | None = None) -> Reward:
    """The model as a reward on the policy's token ids, where both read the same text in the same ids.

    A response that the policy ended with any of stop_ids is read as the model was trained: through eos_token_id, or up to
    the last word by a model that saw no EOS (`ends_with_eos`).
    """
    def score(input_ids: Tensor, attention_mask: Tensor, n: int) -> Tensor:
        response = torch.arange(input_ids.shape[1], device=input_ids.device) >= input_ids.shape[1] - n
        end = torch.zeros_like(input_ids, dtype=torch.bool)
        for stop in stop_ids:
            end = end | (input_ids == stop) & response
        if model.ends_with_eos is False:
            return model(input_ids, attention_mask.bool() & end.logical_not())
        return model(input_ids if eos_token_id is None else input_ids.masked_fill(end, eos_token_id), attention_mask)

    return score


def retokenising_scorer(model: RewardModel, respell: Callable[[list[int], list[int]], list[int]], pad_token_id: int) -> Reward:
    """The model as a reward where they don't: respell(prompt ids, response ids) gives the ids of the same instruction and answer
    as the model was trained to read them."""
    def score(input_ids: Tensor, attention_mask: Tensor, n: int) -> Tensor:
        sequences = [respell(prompt, response) for prompt, response in prompts_and_responses(input_ids, attention_mask, n)]
        return model.standardised(_raw_scores(model, sequences, pad_token_id))

    return score


def prompts_and_responses(input_ids: Tensor, attention_mask: Tensor, n: int) -> list[tuple[list[int], list[int]]]:
    """The real tokens of each row, those of its last n positions apart."""
    cut, real = input_ids.shape[1] - n, attention_mask.bool()
    return [(ids[:cut][mask[:cut]].tolist(), ids[cut:][mask[cut:]].tolist()) for ids, mask in zip(input_ids, real, strict=True)]


def same_ids(a: Any, b: Any) -> bool:
    """Whether every id that `a` can emit, special tokens too, means the same to `b`; a pad id is never read."""
    ids = [i for i in range(len(a)) if i != a.pad_token_id]
    same_ends = (a.bos_token_id, a.eos_token_id) == (b.bos_token_id, b.eos_token_id)
    return same_ends and max(ids) < len(b) and a.pieces(ids) == b.pieces(ids)


class RuleError(ValueError):
    """A rule raised (`raised`), or gave something other than a finite number for each response."""

    def __init__(self, message: str, raised: bool = False):
        super().__init__(message)
        self.raised = raised


def rule_scorer(rule: Callable[..., Sequence[float]], tokenizer: Any,
                asked: Callable[[list[int]], tuple[str, dict]] | None = None) -> Reward:
    """A rule on texts, as a reward on token ids; see `apply_rule`.

    asked(prompt ids) gives the prompt as it was rendered and the record of the data behind it; without, prompts are decoded,
    which loses special tokens, and there are no records. Responses come without special tokens.
    """
    def score(input_ids: Tensor, attention_mask: Tensor, n: int) -> Tensor:
        pairs = prompts_and_responses(input_ids, attention_mask, n)
        prompts = [asked(ids) if asked else (tokenizer.decode(ids), {}) for ids, _ in pairs]
        return apply_rule(rule, prompts, [tokenizer.decode(ids) for _, ids in pairs]).to(input_ids.device)

    return score


def apply_rule(rule: Callable[..., Sequence[float]], prompts: Sequence[tuple[str, dict]], responses: Sequence[str]) -> Tensor:
    """The rule's numbers (B,), used as they are: scale them to a deviation near 1, where beta belongs.

    rule(prompts, responses) gets texts, and with further parameters what they are named for: `examples`, the records of the
    data with all their fields; any other name, the instructions alone. Raises RuleError, with the line that raised.
    """
    texts, records = [text for text, _ in prompts], [record for _, record in prompts]
    instructions = ["\n\n".join(filter(None, (r.get("instruction"), r.get("input")))) for r in records]
    file = getattr(getattr(rule, "__code__", None), "co_filename", "")
    name = f"{Path(file).name}:{rule.__name__}" if file else repr(rule)
    try:
        further = [records if what == "examples" else instructions for what in further_parameters(rule)]
        numbers = rule(texts, list(responses), *further)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = [frame for frame in frames if frame.filename == file or not file][-1]
        raise RuleError(f"the rule {name} raised {type(error).__name__}: {' '.join(str(error).split())} "
                        f"({Path(where.filename).name}, line {where.lineno}: {where.line})", raised=True) from error
    try:
        scores = torch.tensor([float(x) for x in numbers])
    except (TypeError, ValueError) as error:
        raise RuleError(f"the rule {name} must return a list of numbers ({error})") from error
    if len(scores) != len(responses) or not bool(scores.isfinite().all()):
        raise RuleError(f"the rule {name} must return {len(responses)} finite numbers, one for each response; it returned "
                        f"{len(scores)}, {int(scores.isfinite().sum())} of them finite")
    return scores


def further_parameters(rule: Callable) -> list[str]:
    """What a rule wants to be given beside prompts and responses."""
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(rule).parameters.values() if p.kind in plain and p.default is p.empty][2:]


# ---------------------------------------------------------------------------------------------------------- checkpoints


def open_backbone(directory: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """(the backbone without memory, every stored tensor by name) of a stored reward model; no weight is read yet.

    Ours, transformers' LlamaForSequenceClassification, or AlpacaFarm's. The backbone is model.Llama; scoring needs no language
    head, so that is tied to the embedding: it takes no memory and every method stays usable.
    """
    from formats.alpacafarm import as_llama, backbone_fields
    from formats.read import local_copy, refuse_unfinished
    from formats.tensors import parse_json, stored_tensors
    from model import LlamaConfig, without_memory

    directory = local_copy(directory)
    refuse_unfinished(directory)
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


def _load(cls: type[RewardModel], directory: Path, dtype: torch.dtype | None, device: torch.device | str | None,
          part: Callable[[Tensor], Tensor] | None) -> RewardModel:
    from formats.read import local_copy
    from formats.tensors import check_names, load_tensors, parse_json, read_tensor
    from model import fill

    directory = local_copy(directory)
    backbone, stored = open_backbone(directory)
    alpacafarm = "reward_head.weight" in stored
    # Apart, as the head stays float32 whatever the dtype.
    head = {name.rpartition(".")[2]: read_tensor(stored.pop(name), name).float() for name in HEAD_NAMES if name in stored}
    if "weight" not in head:
        raise ValueError(f"{directory}: neither score.weight nor reward_head.weight among the weights: not a reward "
                         "model; `python reward.py` trains one")
    if len(head["weight"]) != 1:
        raise ValueError(f"{directory}: score.weight has {len(head['weight'])} rows; a reward model has num_labels = 1")
    stored = {name.removeprefix("backbone_model."): tensor for name, tensor in stored.items()}
    wanted = check_names(directory, stored, {name: p for name, p in backbone.named_parameters() if name != "lm_head.weight"})
    fill(backbone, ((name, tensor) for _, name, tensor in load_tensors(wanted, dtype, device, like=backbone, part=part)))
    backbone.lm_head.weight = backbone.model.embed_tokens.weight
    about = {"mean": -head.get("bias", torch.zeros(1)).item(), "std": 1.0}
    if alpacafarm:  # it was trained on Alpaca's prompts, and without EOS
        about |= {"eos": False, "prompt_template": "alpaca"}
    if (directory / "reward_config.json").is_file():
        about |= {"eos": True} | parse_json(directory / "reward_config.json", dict)
    return _with_head(cls(backbone), directory, head["weight"], about)


def _with_head(model: RewardModel, directory: Path, weight: Tensor, about: dict[str, Any]) -> RewardModel:
    """The model with the stored head and what is stored about it: mean and std of its scores, and what it reads."""
    model.ends_with_eos, model.prompt_template = about.get("eos"), about.get("prompt_template")
    if not isinstance(model.ends_with_eos, bool | None):
        raise ValueError(f"{directory}/reward_config.json: eos is {model.ends_with_eos!r}: must be true or false")
    for name, low in (("mean", -math.inf), ("std", 0.0)):
        value = about[name]
        if type(value) not in (int, float) or not max(low, -1e30) < value < 1e30:
            raise ValueError(f"{directory}/reward_config.json: {name} is {value!r}: must be a number"
                             + (" above 0" if name == "std" else ""))
    found = about.get("calibrated")
    if found is not None and not (isinstance(found, dict) and {"policy", "n", "mean_se", "std_se"} <= found.keys()):
        raise ValueError(f"{directory}/reward_config.json: calibrated is not what python reward.py calibrate writes")
    with torch.no_grad():
        model.score.weight.copy_(weight)
        model.stored_scale = float(about["mean"]), float(about["std"]), found
        model.mean.fill_(float(about["mean"]))
        model.std.fill_(float(about["std"]))
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
    file, about = directory / "reward_config.json", {"mean": 0.0, "std": 1.0}
    if file.is_file():
        about |= {"eos": True} | json.loads(file.read_text(encoding="utf-8-sig"))
    model = cls(_TransformersBackbone(whole.base_model.to(device)))
    return _with_head(model, directory, whole.score.weight.float(), about)


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
        "num_labels": 1, "tie_word_embeddings": True,
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "torch_dtype": stored}
    config["architectures"] = [name.replace("ForCausalLM", "ForSequenceClassification") for name in config["architectures"]]
    about = {"mean": model.mean.item(), "std": model.std.item(), "eos": model.ends_with_eos,
             "prompt_template": model.prompt_template} | ({"calibrated": model.stored_scale[2]} if model.stored_scale[2] else {})
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
    for name, content in (("config.json", config), ("reward_config.json", about)):
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


def shared(team: Any, work: Callable, items: Sequence) -> list:
    """work(item) of each item, in their order, whoever of the team does which. team: like ppo.Alone; None: one process."""
    if team is None:
        return [work(item) for item in items]

    def do_mine() -> dict[int, Any]:
        mine = team.share(list(range(len(items))))
        if team.in_step:  # the others' forward passes take this process too: who has one less does the first again
            mine += [0] * (-(-len(items) // team.size) - len(mine))
        return {k: work(items[k]) for k in mine}

    found = {k: result for part in team.gather(do_mine) for k, result in part.items()}
    return [found[k] for k in range(len(items))]


@torch.no_grad()
def score_all(model: RewardModel, sequences: Sequence[Sequence[int]], pad_token_id: int = 0, batch_size: int = 32,
              progress: bool = False, team: Any = None) -> Tensor:
    """Raw scores (N,) on the CPU of token lists in any number and length, in eval mode. Raises FloatingPointError at NaN."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    scores = torch.empty(len(sequences))
    with tqdm(total=len(batches), desc="score", disable=not progress) as bar:
        def score(rows: list[int]) -> Tensor:
            bar.update()
            return _raw_scores(model, [sequences[i] for i in rows], pad_token_id).cpu()

        for rows, found in zip(batches, shared(team, score, batches), strict=True):
            scores[rows] = found
    model.train(was_training)
    if bad := int((~scores.isfinite()).sum()):
        raise FloatingPointError(f"{bad} of {len(scores)} scores are NaN or infinite")
    return scores


def accuracy(model: RewardModel, groups: Sequence[Group], pad_token_id: int = 0, batch_size: int = 32,
             team: Any = None) -> Accuracy:
    """How often the model's order agrees with the labels of `groups`."""
    sequences, pairs = _flatten(groups)
    scores = score_all(model, sequences, pad_token_id, batch_size, team=team)
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
def standardise(model: RewardModel, sequences: Sequence[Sequence[int]], pad_token_id: int = 0, batch_size: int = 32,
                team: Any = None) -> tuple[float, float]:
    """Set the model's mean and std from its raw scores of `sequences` (samples of the SFT model), and return them.

    Raises ValueError where the scores have no spread.
    """
    scores = score_all(model, sequences, pad_token_id, batch_size, team=team).double()
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
    seed: int = 0                       # of the order and the dropout


REWARD = TrainingConfig(epochs=1, batch_size=64, learning_rate=LEARNING_RATES["full"])


class Loop:
    """The optimiser steps of stages 1 and 2: epochs of batches of similar length, AdamW, warm-up and half a cosine.

    It may be left after any step and taken up by another process: state_dict() holds everything beside the trained
    weights that decides how it goes on. `step` counts the steps taken, `history` holds a row for every finished epoch,
    `sums` is for what the caller adds up over the present one. team: where several processes share each batch, this one's
    view of them, like ppo.Alone (training/ranks.py); None: there is one.
    """

    def __init__(self, parameters: list[nn.Parameter], lengths: list[int], config: TrainingConfig,
                 betas: tuple[float, float] = (0.9, 0.999), team: Any = None) -> None:
        self.parameters, self.lengths, self.config, self.team = parameters, lengths, config, team
        self.total = config.epochs * math.ceil(len(lengths) / config.batch_size)
        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=betas,
                                           weight_decay=config.weight_decay, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.order = self.generator.get_state()  # at the beginning of the epoch
        self.step, self.history, self.sums = 0, [], Counter()
        self.begun = time.perf_counter()

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        warmup = math.ceil(self.config.warmup * self.total)
        return self.config.learning_rate * warmup_cosine(self.step, self.total, warmup)

    def seconds(self) -> float:
        """Since the epoch began, without the time between two processes."""
        return time.perf_counter() - self.begun

    def run(self, model: nn.Module, learn: Callable[[list[int]], tuple[float, dict[str, str]]], row: Callable[[], dict],
            on_step: Callable[[Loop], object] | None, desc: str, progress: bool) -> list[dict]:
        """All steps that are left; returns the history.

        learn(indices of a batch) adds the gradient of the batch's mean loss and returns (that loss, what else the bar
        shows); row() is what an epoch came to. on_step(self) comes before the first step and after each. Raises
        FloatingPointError before the first step whose loss or gradient is NaN or infinite.
        """
        was_training = model.training
        if on_step:
            on_step(self)
        with tqdm(total=self.total, initial=self.step, desc=desc, unit="step", disable=not progress) as bar:
            while len(self.history) < self.config.epochs:
                model.train()
                for batch in self.batches():
                    loss, shown = learn(batch)
                    bar.set_postfix({"loss": f"{loss:.3f}"} | shown, refresh=False)
                    self.update(loss)
                    bar.update()
                    if on_step:
                        on_step(self)
                try:
                    self.history.append({"epoch": len(self.history) + 1} | row())
                except FloatingPointError as error:
                    raise FloatingPointError(f"step {self.step}: {error}") from error
                self.sums.clear()
                self.begun = time.perf_counter()
        model.train(was_training)
        return self.history

    def batches(self) -> list[list[int]]:
        """What the epoch has left."""
        self.order = self.generator.get_state()
        batches = length_batches(self.lengths, self.config.batch_size, self.generator)
        return batches[self.step - len(self.history) * len(batches):]

    def micro_batches(self, batch: list) -> Iterator[list]:
        """Those of a batch that are this process's. torch is seeded for each by its place in the training, so that its dropout
        depends neither on what was drawn before nor on who goes through it."""
        size = self.config.micro_batch_size or self.config.batch_size
        starts = list(enumerate(range(0, len(batch), size)))
        for i, start in self.team.share(starts) if self.team else starts:
            torch.manual_seed(random.Random(f"{self.config.seed} {self.step} {i}").getrandbits(63))
            yield batch[start:start + size]

    def add_up(self, *sums: float) -> list[float]:
        """The sums over all processes, and in place those of the gradients."""
        if self.team is None or self.team.size == 1:
            return list(sums)
        reached = [float(p.grad is not None) for p in self.parameters]
        for p in self.parameters:  # a process without a micro-batch has none, and all must send the same
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sent = torch.tensor([*sums, *reached], device=self.parameters[0].device)
        found = torch.stack(list(self.team.total(dict(zip(map(str, range(len(sent))), sent)), self.parameters).values())).tolist()
        for p, processes in zip(self.parameters, found[len(sums):], strict=True):
            p.grad = p.grad if processes else None  # what no loss depends on stays without, and AdamW passes it over
        return found[:len(sums)]

    def update(self, loss: float) -> None:
        """One step on the gradient that was added up."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm).item()
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if not math.isfinite(value):
                raise FloatingPointError(f"step {self.step + 1}: {name} is {value}; stopped before the optimiser step")
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Of tensors, numbers, strings and their lists alone, as torch.load(weights_only=True) reads them."""
        rows = [{name: tuple(x) if isinstance(x, tuple) else x for name, x in row.items()} for row in self.history]
        return {"step": self.step, "history": rows, "sums": dict(self.sums), "seconds": self.seconds(), "order": self.order,
                "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse; the trained weights are to be put back beside it."""
        self.step, self.history = state["step"], state["history"]
        self.sums.clear()
        self.sums.update(state["sums"])
        self.begun = time.perf_counter() - state["seconds"]
        self.generator.set_state(state["order"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_reward(model: RewardModel, groups: Sequence[Group], config: TrainingConfig = REWARD, *,
                 held_out: Sequence[Group] = (), pad_token_id: int = 0, progress: bool = True,
                 on_step: Callable[[Loop], object] | None = None, team: Any = None) -> list[dict]:
    """Train what requires gradients, in place, on the raw scores of all labelled pairs; each sequence is scored once.

    on_step: see Loop.run; team: see Loop. Returns a dict an epoch: epoch, loss and accuracy (running means over training
    pairs), held_out (an Accuracy, or None). Raises ValueError where there is nothing to train or to train on,
    FloatingPointError at NaN.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [group for group in groups if group.pairs]
    if not parameters or not groups:
        raise ValueError("train_reward: " + ("no labelled pairs" if parameters else "no parameter requires gradients"))
    loop = Loop(parameters, [max(map(len, group.sequences)) for group in groups], config, team=team)
    sums = loop.sums

    def learn(batch: list[int]) -> tuple[float, dict[str, str]]:
        n = sum(len(groups[i].pairs) for i in batch)
        loss, right = loop.add_up(*_accumulate(model, loop.micro_batches([groups[i] for i in batch]), n, pad_token_id))
        sums.update(loss=loss * n, right=right, pairs=n)
        return loss, {"accuracy": f"{sums['right'] / sums['pairs']:.3f}"}

    def row() -> dict:
        found = {"loss": sums["loss"] / sums["pairs"], "accuracy": sums["right"] / sums["pairs"],
                 "held_out": accuracy(model, held_out, pad_token_id, team=team) if held_out else None}
        if progress:
            tqdm.write(_epoch_line(len(loop.history) + 1, found))
        return found

    history = loop.run(model, learn, row, on_step, "reward model", progress)
    return [row | {"held_out": row["held_out"] and Accuracy(*row["held_out"])} for row in history]


def _epoch_line(epoch: int, row: dict) -> str:
    held = row["held_out"]
    shown = f"{held.value:.1%} ± {held.standard_error:.1%} of {held.n} pairs" if held else "no pairs"
    return f"epoch {epoch}: loss {row['loss']:.3f}, accuracy {row['accuracy']:.1%}; held out {shown}"


def _accumulate(model: RewardModel, micro_batches: Iterable[list[Group]], n: int, pad_token_id: int) -> tuple[float, float]:
    """Add the gradient of the mean loss of n pairs, those of the micro-batches. Returns (that loss, pairs in the right order)."""
    mean, right = 0.0, 0.0
    for groups in micro_batches:
        sequences, pairs = _flatten(groups)
        scores = _raw_scores(model, sequences, pad_token_id)
        chosen, rejected = scores[pairs.to(scores.device).T]
        # Weighted by its share of the batch's pairs: every label counts the same, in whatever micro-batch it falls.
        loss = pairwise_loss(chosen, rejected) * (len(pairs) / n)
        loss.backward()
        mean, right = mean + loss.item(), right + (chosen > rejected).sum().item()
    return mean, right


# -------------------------------------------------------------------------------------------------------------- program


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from training.stages import Flags, number, parse, training_flags

    parser = Flags(prog="reward.py", description="Train a reward model on preference pairs (stage 2).",
                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--base", help="the SFT model: folder, .gguf or hub name")
    files.add_argument("--data", help="AlpacaFarm preferences, JSON or JSON lines")
    files.add_argument("--out", required=True, help="directory for the reward model (LoRA is merged into it)")
    files.add_argument("--prompt-template", default="alpaca", help="prompt: alpaca, tiny, chat or a JSON file")
    files.add_argument("--max-tokens", type=number(int, low=1), default=512, help="longer prompt + output: the pair is dropped")
    files.add_argument("--held-out", type=number(float, low=0, below=1), default=0.1,
                       help="share of the instructions kept for accuracy")
    training_flags(parser, replace(REWARD, micro_batch_size=2), LEARNING_RATES, "instructions")
    return parse(parser, argv, ("base", "data"), LEARNING_RATES)


def load_groups(args: argparse.Namespace, tokenizer: Any) -> tuple[list[Group], list[Group]]:
    """(training, held-out) groups, split by instruction so that no prompt is in both."""
    from data import encode_pair, load_preferences

    def encode(record: dict, output: str) -> list[int]:
        prompt, response = encode_pair(record, output, tokenizer, args.prompt_template)
        return prompt + response

    pairs = load_preferences(args.data)
    print(f"data: {pairs.note}")
    groups, dropped = group_preferences(pairs, encode, args.max_tokens)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(args.seed)).tolist()
    n = round(args.held_out * len(groups))
    if len(groups) == n:
        raise ValueError(f"--max-tokens {args.max_tokens}, --held-out {args.held_out}: no pair left to train on")
    print(f"{len(groups) - n} instructions to train on, {n} held out; {dropped} pairs dropped (over {args.max_tokens} "
          "tokens, or two equal outputs)")
    return [groups[i] for i in order[n:]], [groups[i] for i in order[:n]]


def save_reward_model(model: RewardModel, folder: Path, tokenizer: Any) -> None:
    """Write the reward model and the tokenizer of its base."""
    if model.backbone.config.pad_token_id is None:
        model.backbone.config.pad_token_id = tokenizer.pad_token_id  # transformers finds the last token by it
    model.save_pretrained(folder)
    tokenizer.save(folder)


def run(args: argparse.Namespace) -> None:
    """Load, train, standardise, save, and print what came of it."""
    from training.stages import training_folder

    with training_folder("reward.py", args) as stage:
        if not stage.finished:
            train_and_save(args, stage)
    print(f"saved {args.out}")


def prepare(args: argparse.Namespace) -> tuple[RewardModel, Any, list[Group], list[Group]]:
    """(model, tokenizer, training groups, held-out groups) of a training before its first step."""
    from data import template_to_store
    from formats.tokenizer import check_vocabulary, describe_tokenizer, load_tokenizer
    from training.stages import load_base, say_window

    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.base)
    print(describe_tokenizer(tokenizer))
    groups, held_out = load_groups(args, tokenizer)
    model = RewardModel(load_base(args, args.base))
    model.prompt_template = template_to_store(args.prompt_template)
    say_window(args, model.backbone, f"--base {args.base}")
    check_vocabulary(tokenizer, model.backbone.config.vocab_size, f"--base {args.base}")
    return model, tokenizer, groups, held_out


def train_and_save(args: argparse.Namespace, stage: Any) -> None:
    """A training from its beginning or its newest checkpoint to the stored model."""
    from training.stages import each, everybodys, merge_for_storing, training_config

    model, tokenizer, groups, held_out = each(lambda: prepare(args))
    stage.begin(model, model.backbone, args.base, [*groups, *held_out])
    history = train_reward(model, groups, training_config(args, REWARD), held_out=held_out, pad_token_id=tokenizer.pad_token_id,
                           on_step=stage, team=stage.team)
    merge_for_storing(model.backbone)  # before standardising: its scores are to be those of what is stored
    # Outputs of preference data are samples of the SFT model; held-out ones weren't fitted, so their spread is honest.
    samples = [sequence for group in held_out or groups for sequence in group.sequences]
    try:
        mean, std = standardise(model, samples, tokenizer.pad_token_id, team=stage.team)
    except ValueError as error:
        raise everybodys(ValueError(f"{error}; the trained weights are in {stage.saved}")) from error
    print(f"standardised on {len(samples)} samples: raw mean {mean:.3f}, deviation {std:.3f}")
    rows = [row | {"held_out": row["held_out"] and row["held_out"]._asdict()} for row in history]
    stage.finish(lambda folder: save_reward_model(model, folder, tokenizer), rows, mean=mean, std=std)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 with one line for bad input, or as training/stages.py has them."""
    from training.stages import exit_code

    words = sys.argv[1:] if argv is None else argv
    if list(words[:1]) == ["calibrate"]:
        from training import calibrate

        return exit_code("reward.py", lambda: calibrate.parse_args(words[1:]), calibrate.run)
    return exit_code("reward.py", lambda: parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
