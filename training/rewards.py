# SPDX-License-Identifier: MIT
"""The reward of a run: a model that reads its own text, or a rule.

    asked = Asked(tokenizer, run.prompt_template)
    reward = load_reward(run, tokenizer, asked, notes, dtype=dtype, device=device)
    asked.now(ids, records)                       # which instructions the prompts are, before anything is scored
    scores = reward.score(input_ids, attention_mask, n)         # of token ids, as ppo.py asks
    scores = reward.score_texts(records, answers, ended)        # of texts, as a judge asks

The paper's policy and reward model share LLaMA's tokenizer (section 2.1). Others need not: a reward model then reads instruction
and answer as texts, never the policy's prompt decoded, in the template that it was trained with and up to the end that it was
trained with.
"""

import ast
import contextlib
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import encode_pair, format_prompt, get_template
from formats.tokenizer import check_vocabulary, load_tokenizer
from reward import (Reward, RewardModel, apply_rule, retokenising_scorer, rule_scorer, same_ids, score_all, scorer)
from training.config import RunConfig
from training.ranks import first, here

Record = dict[str, Any]  # instruction, input and whatever else the data file holds
ScoreTexts = Callable[[Sequence[Record], Sequence[str], Sequence[bool]], list[float]]  # (records, answers, which came to an end)
PROBE = {"instruction": "Name a river.", "input": ""}


class Asked:
    """The records of the data behind the prompts that are being answered, found by the prompts' token ids: what a model or rule
    with another tokenizer reads is the text of the data."""

    def __init__(self, tokenizer: Any, template: str):
        self.tokenizer, self.template = tokenizer, template
        self.records: dict[tuple[int, ...], Record] = {}

    def now(self, ids: Sequence[Sequence[int]], records: Sequence[Record]) -> None:
        """From here on these are answered, and no others."""
        self.records = {tuple(prompt): record for prompt, record in zip(ids, records, strict=True)}

    def record(self, prompt_ids: Sequence[int]) -> Record:
        """Raises LookupError for a prompt that is not one of those in hand."""
        try:
            return self.records[tuple(prompt_ids)]
        except KeyError:
            raise LookupError("a reward was asked about a prompt that isn't one of those in hand (Asked.now)") from None

    def prompt(self, prompt_ids: Sequence[int]) -> tuple[str, Record]:
        """(the prompt as it was rendered, special tokens and all, the record)."""
        record = self.record(prompt_ids)
        return format_prompt(record, self.template, self.tokenizer), record


@dataclass
class LoadedReward:
    """A reward, as PPO and as a judge ask it."""

    score: Reward
    score_texts: ScoreTexts
    model: RewardModel | None = None  # None: a rule
    file: str | None = None           # a rule's
    its_ids: bool = False             # every id of the policy's tokenizer means the same to the model


@dataclass
class Reader:
    """How a reward model reads an answer: its own tokenizer, the template and the end that it was trained with."""

    model: RewardModel
    tokenizer: Any
    template: Any
    end_is_known: bool = True  # whether it was trained on sequences that end in EOS; else that is assumed

    def ids(self, record: Record, answer: str, ended: bool) -> list[int]:
        """Prompt and answer; EOS behind an answer that came to its end, if the model was trained so."""
        prompt, response = encode_pair(record, answer, self.tokenizer, self.template)
        return prompt + (response if ended and self.model.ends_with_eos is not False else response[:-1])

    def score_texts(self, records: Sequence[Record], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """Standardised scores."""
        sequences = [self.ids(*each) for each in zip(records, answers, ended, strict=True)]
        return self.model.standardised(score_all(self.model, sequences, self.tokenizer.pad_token_id, team=here())
                                       .to(self.model.mean.device)).tolist()


def load_reward(run: RunConfig, tokenizer: Any, asked: Asked, notes: list[str], **how: Any) -> LoadedReward:
    """The run's reward model or rule; a rule reads texts. notes: how it reads, for the program to print. how: dtype, device and
    part, as from_pretrained takes them."""
    if is_rule(run.reward):
        notes.append(f"reward: the rule {run.reward}, on texts")
        rule = load_rule(run.reward)

        def score_texts(records: Sequence[Record], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
            prompts = [(format_prompt(record, run.prompt_template, tokenizer), record) for record in records]
            return first(lambda: apply_rule(rule, prompts, answers).tolist())

        return LoadedReward(rule_scorer(rule, tokenizer, asked.prompt), score_texts, file=run.reward.rpartition(":")[0])
    reader, note = open_reader(run.reward, "--reward", run.prompt_template, run.reward_eos, **how)
    its_ids = same_ids(tokenizer, reader.tokenizer)
    if its_ids and encode_pair(PROBE, "The Elbe.", tokenizer, run.prompt_template) == encode_pair(
            PROBE, "The Elbe.", reader.tokenizer, reader.template):
        notes.append(f"reward: reads the policy's token ids as they are (one tokenizer, one template), {note}")
        score = scorer(reader.model, tokenizer.stop_ids, tokenizer.eos_token_id)
        return LoadedReward(score, reader.score_texts, reader.model, its_ids=True)
    notes.append(f"reward: reads instruction and answer as texts, with a {'template' if its_ids else 'tokenizer'} of its own "
                 f"(template {reader.template if isinstance(reader.template, str) else 'stored with it'}), {note}")
    before = "" if run.prompt_template == "chat" else get_template(run.prompt_template).before_response

    def respell(prompt_ids: list[int], response_ids: list[int]) -> list[int]:
        answer = tokenizer.decode(response_ids).removeprefix(before)
        return reader.ids(asked.record(prompt_ids), answer, ended=response_ids[-1] in tokenizer.stop_ids)

    return LoadedReward(retokenising_scorer(reader.model, respell, reader.tokenizer.pad_token_id), reader.score_texts,
                        reader.model, its_ids=its_ids)


def open_reader(name: str, flag: str, template: str, eos: str | None, **how: Any) -> tuple[Reader, str]:
    """(a stored reward model with what it reads, words that say where its score is read).

    how: as from_pretrained takes it. template and eos ("yes", "no", None) count where its folder doesn't say what it was trained
    with. Raises ValueError where eos contradicts it, or where it has no such template.
    """
    require_model_name(name, flag)
    model = RewardModel.from_pretrained(name, **how).requires_grad_(False)
    template = model.prompt_template or template
    tokenizer = load_tokenizer(name).for_template(template)
    check_vocabulary(tokenizer, model.backbone.config.vocab_size, f"{flag} {name}")
    said = model.ends_with_eos
    if eos is not None and said is not None and said != (eos == "yes"):
        raise ValueError(f"--reward-eos {eos}: {name} says that it was trained {'with' if said else 'without'} EOS: leave the "
                         "flag away")
    model.ends_with_eos = said if said is not None else eos != "no"
    note = "at the EOS, as it was trained" if model.ends_with_eos else "at the last word, as it was trained without EOS"
    if said is None and eos is None:
        note = "at the EOS: its folder doesn't say whether it was trained so, and --reward-eos no reads at the last word"
    try:
        encode_pair(PROBE, "The Elbe.", tokenizer, template)
    except ValueError as error:  # a chat template that isn't there, or that fails
        raise ValueError(f"{flag} {name}: {error}") from None
    return Reader(model, tokenizer, template, said is not None or eos is not None), f"and is read {note}; {scale_in_words(model)}"


def scale_in_words(model: RewardModel) -> str:
    """Where the scores' mean and deviation are from, without which beta means nothing."""
    mean, std, found = model.stored_scale
    if found:
        return (f"its scores less {mean:.3g} ± {found['mean_se']:.2g}, over {std:.3g} ± {found['std_se']:.2g}, measured on "
                f"{found['n']} answers of {found['policy']}")
    if std == 1.0:
        return "its scores are of any size, so that beta means nothing: python reward.py calibrate measures mean and deviation"
    return f"its scores less {mean:.3g}, over {std:.3g}, as its training left them"


# ---------------------------------------------------------------------------------------------------------------- rules


def require_model_name(name: str, flag: str) -> None:
    """Raises ValueError for a file of rules without the name of one."""
    if name.endswith(".py"):
        raise ValueError(f"{flag} {name}: a rule is named file.py:function; {functions_in(name)}")


def is_rule(name: str) -> bool:
    """Whether the name is `file.py:function`, and not a folder."""
    return ".py:" in name


def load_rule(name: str) -> Callable[..., Sequence[float]]:
    """The function that `path/to/file.py:function` names; the file is run, and may import what lies beside it. Raises ValueError
    where there is none."""
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file; a rule is named file.py:function")
    try:
        with importable(Path(file).resolve().parent):
            space = runpy.run_path(file)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"--reward {name}: {file} can't be run: {what}") from error
    if not callable(space.get(function)):
        raise ValueError(f"{name}: {file} has no function {function!r}; {functions_in(file)}")
    return space[function]


def functions_in(file: str) -> str:
    """What a file could be named for, in words; it is not run."""
    if not Path(file).is_file():
        return "there is no such file"
    try:
        body = ast.parse(Path(file).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return "it can't be read"
    names = [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    return f"it has {', '.join(names) or 'none'}"


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Inside, a file of that folder imports its neighbours, even one that is named like a module of ours (data.py), and keeps
    them to itself. What its functions import later is found there too, behind everything else."""
    neighbours = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}

    def shadowed() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in neighbours]

    ours = {name: sys.modules.pop(name) for name in shadowed() if is_ours(name)}
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.path.append(str(folder))
        for name in set(shadowed()) - before:  # another rule may have a neighbour of that name
            del sys.modules[name]
        sys.modules.update(ours)


def is_ours(module: str) -> bool:
    """Whether a module that is loaded is this project's."""
    file = getattr(sys.modules[module], "__file__", None)
    return file is not None and module != "__main__" and Path(file).is_relative_to(Path(__file__).resolve().parent.parent)
