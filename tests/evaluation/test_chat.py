"""What chat promises: SFT and policy answer the same instruction side by side."""

import io
import json
import sys

import pytest
import torch
from runs import settings, start

import evaluate
from data import format_prompt
from evaluation import chat
from formats.tokenizer import load_tokenizer
from model import Llama, generate
from training.config import stored_config
from training.folder import checkpoints


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request, world, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    start(settings(world, out, steps=2, evaluation=None, tuning=request.param))
    return out


def talk(monkeypatch, capsys, *argv, typed="Tell me about copper.\n\nName a metal.\n") -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "chat", *map(str, argv)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return evaluate.main(), *capsys.readouterr()


def test_each_instruction_is_answered_by_both(run, monkeypatch, capsys):
    code, out, _ = talk(monkeypatch, capsys, run)
    assert code == 0 and out.count("SFT") == 2 and out.count("step 2") == 2
    assert "> Tell me about copper." in out and "> Name a metal." in out


def test_the_left_column_is_the_model_before_training(run, world, monkeypatch):
    config = stored_config({"out": str(run)})
    tokenizer, base = load_tokenizer(world / "sft"), Llama.from_pretrained(world / "sft")
    ids = torch.tensor([tokenizer.encode(format_prompt({"instruction": "Name a metal."}, "tiny", tokenizer), bos=True)])
    greedy = {"max_new_tokens": 8, "temperature": 0, "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id}
    expected = generate(base, ids, torch.ones_like(ids), **greedy)
    pair = chat.load_pair(config, checkpoints(run)[-1], tokenizer, "cpu")
    model, active = pair["SFT"]
    with active():
        assert torch.equal(generate(model, ids, torch.ones_like(ids), **greedy), expected)
        before = model(ids)
    trained, active = pair["step 2"]
    with active():
        assert not torch.equal(trained(ids), before)


@pytest.mark.parametrize(("flags", "message"), [
    (["--step", 7], "holds checkpoints [1, 2]"), (["--temperature", -1], "--temperature -1.0"),
    (["--max-tokens", 0], "--max-tokens 0")])
def test_wrong_flags_are_one_line(run, monkeypatch, capsys, flags, message):
    code, _, err = talk(monkeypatch, capsys, run, *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_folder_that_is_no_run_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps({}))
    code, _, err = talk(monkeypatch, capsys, tmp_path)
    assert code == 2 and err.count("\n") == 1


def test_columns_hold_long_and_short_texts_side_by_side():
    text = chat.side_by_side(["SFT", "step 2"], ["word " * 12, "one\n\ntwo"], width=43)
    lines = text.split("\n")
    assert lines[0].split() == ["SFT", "step", "2"] and all(len(line) <= 43 for line in lines)
    assert lines[2].endswith("one") and lines[4].endswith("two") and " ".join(lines).count("word") == 12
