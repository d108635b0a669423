# SPDX-License-Identifier: MIT
"""Instructions and preferences in, padded token batches out: everything between a data file and a model.

Paper section 2.1: the stages of RLHF train on splits of Alpaca-52K, in AlpacaFarm's JSON format and Alpaca's prompts.
This module reads those files (and records of other habits; CSV, Parquet and the hub's files with formats/rows.py),
renders prompts, tokenises them, and deals out instruction indices for PPO in an order that a checkpoint can resume. A
tokenizer is any object with

    encode(text, bos, eos) -> ids and decode(ids) -> text, such as formats.tokenizer.load_tokenizer gives

and, for the template "chat", render_chat(text) and for_template(template).

Departures from the released code:
  * Every mask here is built from lengths and never from pad ids, so pad = EOS is legal.
  * Prompt and response are tokenised apart, as generation sees them.
  * The instruction order depends only on (seed, epoch), so that a few integers resume it exactly.

B batch, S sequence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


# ----------------------------------------------------------------------------------------------------------- data files

HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate: JSON may hold one, and no tokenizer and no file takes it


class Rows(list):
    """The records that a file gave. note: how many, and what was left out or not read, in a line for a program to print."""

    def __init__(self, records: Sequence[dict], path: str | Path, total: int, dropped: Counter, unread: Counter):
        super().__init__(records)
        parts = [f"{path}: {len(records):,} of {total:,} rows"]
        parts += [f"{n:,} left out: {why}" for why, n in dropped.items()]
        parts += [f"not read: {what} ({n:,} rows)" for what, n in unread.items()]
        self.note = "; ".join(parts)


def load_instructions(path: str | Path, need_output: bool = False) -> Rows:
    """Read AlpacaFarm records {instruction, input, output}, or of other habits: {prompt}, {messages}, {prompt: messages}.

    The file is a JSON list, one JSON object a line, CSV or Parquet. `input` may be missing or null (it becomes ""), `output` too
    unless `need_output`; other fields are kept. Conversations of more than one turn are left out, and counted in the note.
    Raises FileNotFoundError or ValueError with one line that names file, record (counted from 0) and field.
    """
    records, total, dropped, unread = [], 0, Counter(), Counter()
    for where, record in _read_records(path):
        total += 1
        record = _of_one_turn(where, record, dropped, unread)
        if record is None:
            continue
        record = _with_prompt_fields(where, record)
        if need_output or record.get("output") is not None:
            _check_text(where, record, "output")
        records.append(record)
    return _some(Rows(records, path, total, dropped, unread))


def load_preferences(path: str | Path) -> Rows:
    """Read AlpacaFarm pairs {instruction, input, output_1, output_2, preference}: 1 or 2, the better output; or pairs of
    {chosen, rejected}, texts beside a prompt or whole conversations.

    Format and errors as in `load_instructions`. Ties (0, 1.5, null, chosen = rejected) are left out and counted in the note: the
    loss has no use for them. Margins are not read.
    """
    records, total, dropped, unread = [], 0, Counter(), Counter()
    for where, record in _read_records(path):
        total += 1
        record = _of_one_turn(where, _as_outputs(where, record, unread), dropped, unread)
        if record is None:
            continue
        record = _with_prompt_fields(where, record)
        _check_text(where, record, "output_1")
        _check_text(where, record, "output_2")
        preference = record.get("preference")
        if preference in (0, 1.5, None) and not isinstance(preference, bool):
            dropped["ties"] += 1
            continue
        if isinstance(preference, bool) or preference not in (1, 2):
            raise ValueError(f"{where}: field 'preference' is {preference!r}; it must be 1 or 2, or for a tie 0, 1.5 or null")
        records.append({**record, "preference": int(preference)})
    return _some(Rows(records, path, total, dropped, unread))


def _some(rows: Rows) -> Rows:
    if not rows:
        raise ValueError(f"{rows.note}: none is left")
    return rows


def _of_one_turn(where: str, record: dict, dropped: Counter, unread: Counter) -> dict | None:
    """The record with an `instruction`, whatever its file calls it; None, counted, for a conversation of several turns."""
    turns = record.get("messages", record.get("prompt"))
    if "instruction" in record or turns is None:
        return record
    if isinstance(turns, str):
        return {"instruction": turns, **record}
    said = [turn for turn in _conversation(where, turns) if turn["role"] != "system"]
    if len(said) < len(turns):
        unread["system messages"] += 1
    if [turn["role"] for turn in said] not in (["user"], ["user", "assistant"]):
        dropped["conversations of several turns"] += 1
        return None
    return {"instruction": said[0]["content"], **({"output": said[1]["content"]} if len(said) == 2 else {}), **record}


def _conversation(where: str, turns: Any) -> list[dict]:
    if not (isinstance(turns, list) and turns and all(isinstance(t, dict) and isinstance(t.get("role"), str)
                                                     and isinstance(t.get("content"), str) for t in turns)):
        raise ValueError(f"{where}: a conversation must be a list of {{role, content}}, both texts; found {str(turns)[:60]!r}")
    return turns


def _as_outputs(where: str, record: dict, unread: Counter) -> dict:
    """A pair of chosen and rejected as output_1 and output_2, of which the first is better; others as they are."""
    if "chosen" not in record or "output_1" in record:
        return record
    pair, prompts = [], []
    for name in ("chosen", "rejected"):
        answer = record.get(name)
        if not isinstance(answer, str):
            *before, last = _conversation(where, answer)
            if last["role"] != "assistant":
                raise ValueError(f"{where}: field '{name}' ends with a turn of {last['role']!r}, not of the assistant")
            answer, prompts = last["content"], [*prompts, before]
        pair.append(answer)
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        raise ValueError(f"{where}: 'chosen' and 'rejected' answer different prompts")
    if "margin" in record or "score_chosen" in record:
        unread["margins"] += 1
    prompt = {"prompt": prompts[0]} if any(prompts) else {}
    return {**prompt, "output_1": pair[0], "output_2": pair[1], "preference": int(pair[0] != pair[1]), **record}


def read_text(path: str | Path) -> str:
    """A user's text file, with or without the byte order mark that Windows puts before it. ValueError where it isn't UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def whole_characters(text: str) -> str:
    """The text with U+FFFD for every half character."""
    return HALF_A_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", text)


def _read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield ("file: record i", object) for a JSON list, JSON lines, CSV or Parquet."""
    for i, record in enumerate(_parse(path)):
        where = f"{path}: record {i}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object with an 'instruction', found {type(record).__name__}")
        for field, value in record.items():
            half = isinstance(value, str) and HALF_A_CHARACTER.search(value)
            if half:
                raise ValueError(f"{where}: field '{field}' holds half a character, {half[0]!r} at position {half.start()}, as "
                                 "of an emoji that was cut in two: take it away or write it whole")
        yield where, record


def _parse(path: str | Path) -> list:
    """The records of a file, or of one on the hub."""
    if str(path).startswith("hf://"):
        from formats.rows import fetch

        path = fetch(str(path))
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file; give a JSON list of records, one JSON object a line, CSV or Parquet")
    if path.suffix.lower() == ".parquet":
        from formats.rows import parse_parquet

        return parse_parquet(path)
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; give a JSON list of records, one JSON object a line, CSV or Parquet")
    if path.suffix.lower() == ".csv":
        from formats.rows import parse_csv

        return parse_csv(path, text)
    records = _parse_list(path, text) if text.lstrip().startswith("[") else _parse_lines(path, text)
    if not records:
        raise ValueError(f"{path}: the list holds no records")
    return records


def _parse_list(path: Path, text: str) -> list:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON: nested too deeply to be read") from None


def _parse_lines(path: Path, text: str) -> list:
    records = []
    # Not splitlines(): it also splits at U+2028 and the like, which may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: neither a JSON list nor JSON lines: {error.msg} "
                             f"(line {number}, column {error.colno})") from None
        except RecursionError:
            raise ValueError(f"{path}: line {number} is nested too deeply to be read") from None
    return records


def _with_prompt_fields(where: str, record: dict) -> dict:
    _check_text(where, record, "instruction")
    if not record["instruction"].strip():
        raise ValueError(f"{where}: field 'instruction' is empty; every record needs one")
    record = {**record, "input": "" if record.get("input") is None else record["input"]}
    _check_text(where, record, "input")
    return record


def _check_text(where: str, record: dict, field: str) -> None:
    if field not in record:
        raise ValueError(f"{where}: field '{field}' is missing; found {', '.join(map(str, record)) or 'no fields'}")
    if not isinstance(record[field], str):
        raise ValueError(f"{where}: field '{field}' is {type(record[field]).__name__}; it must be a string")


# -------------------------------------------------------------------------------------------------------------- prompts


class Template(NamedTuple):
    """Two prompt texts with the slots {instruction} and {input}, and what stands between prompt and response.

    `before_response` belongs to the response: a prompt that ended in a space would cut the first word off its space.
    """

    with_input: str
    without_input: str
    before_response: str = ""


# Alpaca's published prompts, letter by letter (no newline after the last colon): its checkpoints know no others.
ALPACA = Template(
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)
TEMPLATES: dict[str, Template] = {
    "alpaca": ALPACA,
    # The miniature world's: a response's first word is the same piece as inside a sentence, so it is learned only once.
    "tiny": ALPACA._replace(before_response=" "),
}


def get_template(template: str | Template | dict[str, str]) -> Template:
    """A template by name (TEMPLATES), or of AlpacaFarm's form, prompt_inputs and prompt_noinputs, from a JSON file or its
    contents."""
    if isinstance(template, Template):
        return template
    if isinstance(template, str) and template in TEMPLATES:
        return TEMPLATES[template]
    if not isinstance(template, dict) and not Path(template).is_file():
        raise ValueError(f"template {template!r}: neither a file nor one of {', '.join(TEMPLATES)}, chat")
    try:
        texts = template if isinstance(template, dict) else json.loads(read_text(template))
        read = Template(texts["prompt_inputs"], texts["prompt_noinputs"], texts.get("before_response", ""))
        read.with_input.format(instruction="", input=""), read.without_input.format(instruction="")
        "".join(read).encode()  # half a character fails here
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as error:
        raise ValueError(f"{template}: a template file is JSON with prompt_inputs (slots {{instruction}} and {{input}})"
                         f" and prompt_noinputs ({{instruction}} only): {type(error).__name__} {error}") from None
    return read


def template_to_store(template: str) -> str | dict[str, str]:
    """A template as it is kept beside what was trained on it: its name, or what its file holds."""
    if template in (*TEMPLATES, "chat"):
        return template
    read = get_template(template)
    return {"prompt_inputs": read.with_input, "prompt_noinputs": read.without_input, "before_response": read.before_response}


def format_prompt(example: dict, template: str | Template = "alpaca", tokenizer: Any = None) -> str:
    """The prompt text of one {instruction, input}; the name "chat" means the chat template of the tokenizer given."""
    instruction, context = example["instruction"], example.get("input") or ""
    if template == "chat":
        if getattr(tokenizer, "render_chat", None) is None:
            raise ValueError(f"template 'chat': the tokenizer has no chat template (one is read only beside a "
                             f"tokenizer.json or in a .gguf file); choose {' or '.join(TEMPLATES)}")
        return tokenizer.render_chat(f"{instruction}\n\n{context}" if context else instruction)
    chosen = get_template(template)
    if context:
        return chosen.with_input.format(instruction=instruction, input=context)
    return chosen.without_input.format(instruction=instruction)


def encode_pair(example: dict, response: str, tokenizer: Any,
                template: str | Template = "alpaca") -> tuple[list[int], list[int]]:
    """(prompt ids from BOS, response ids through EOS), for SFT and reward training alike: one text, one spelling."""
    before = ""
    if template == "chat":
        tokenizer = tokenizer.for_template(template)  # a chat model's responses end as its turns do
    else:
        before = get_template(template).before_response
    prompt_ids = tokenizer.encode(format_prompt(example, template, tokenizer), bos=True)
    return prompt_ids, tokenizer.encode(before + response, bos=False, eos=True)


class Prompts(NamedTuple):
    """`ids[i]` are the prompt tokens of `examples[i]`; `dropped` counts the instructions that were too long."""

    ids: list[list[int]]
    examples: list[dict]
    dropped: int


def tokenize_prompts(examples: Sequence[dict], tokenizer: Any, template: str | Template = "alpaca",
                     max_tokens: int = 192, limit: str = "max_tokens") -> Prompts:
    """Tokenise every prompt; those of more than `max_tokens` tokens are dropped, never cut, as in the released code.

    Raises ValueError where none is left, which calls the number as its user does: `limit`.
    """
    if template != "chat":
        template = get_template(template)
    ids = [tokenizer.encode(format_prompt(example, template, tokenizer), bos=True) for example in examples]
    short = [i for i, prompt in enumerate(ids) if len(prompt) <= max_tokens]
    if not short:
        shortest = min(map(len, ids), default=0)
        raise ValueError(f"{limit} {max_tokens}: all {len(ids)} prompts are longer (the shortest has {shortest} tokens)")
    return Prompts([ids[i] for i in short], [examples[i] for i in short], len(ids) - len(short))


# -------------------------------------------------------------------------------------------------------------- batches


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts for generation, which goes on at the right edge: (input_ids, attention_mask), both (B, S), mask bool."""
    return _pad(sequences, pad_id, left=True)


def right_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Whole sequences for training: (input_ids, attention_mask), both (B, S), mask bool."""
    return _pad(sequences, pad_id, left=False)


def _pad(sequences: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    if not sequences or min(map(len, sequences)) == 0:
        raise ValueError(f"cannot pad: {'no sequences' if not sequences else 'a sequence without tokens'}")
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    # From lengths, never `input_ids != pad_id`: where pad = EOS that would hide the real EOS.
    attention_mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        span = slice(longest - len(sequence), None) if left else slice(len(sequence))
        input_ids[row, span] = torch.as_tensor(sequence, dtype=torch.long)
        attention_mask[row, span] = True
    return input_ids, attention_mask


class PromptStream:
    """Endless batches of indices into n instructions: every epoch visits each once, in an order set by (seed, epoch).

    A batch may reach into the next epoch, so none is short and no instruction is skipped. `state_dict()` is four
    integers; a stream that loads them continues exactly where the saved one stood.
    """

    def __init__(self, n: int, seed: int = 0) -> None:
        if n < 1:
            raise ValueError(f"PromptStream: n = {n}; at least one instruction is needed")
        self.n, self.seed, self.epoch, self.position = n, seed, 0, 0
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        # One generator an epoch: with a single running one, resuming would have to replay every epoch before.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.n, generator=generator).tolist()

    def next_batch(self, batch_size: int) -> list[int]:
        """The next `batch_size` indices."""
        batch: list[int] = []
        while len(batch) < batch_size:
            if self.position == self.n:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            taken = self._order[self.position:self.position + batch_size - len(batch)]
            self.position += len(taken)
            batch += taken
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, for a checkpoint."""
        return {"n": self.n, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`. Raises ValueError when it was saved over another number of instructions."""
        if state["n"] != self.n:
            raise ValueError(f"cannot resume: the checkpoint counts {state['n']} instructions, the data has {self.n}; "
                             "give the same data file, template and maximum prompt length")
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._order = self._shuffled()
