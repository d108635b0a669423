"""What users' own files bring along: byte order marks, titles in two Unicode spellings, several ends of a response."""

import json
import shutil
import sys
import unicodedata

import pytest
import torch
from runs import configured, records, settings, start, to_flags

import train
from data import encode_pair, get_template, load_instructions, load_preferences
from evaluation.chat import chat
from evaluation.factuality import check_topics, count_facts, load_passages, load_topics
from evaluation.judges import load_pool, read_annotations
from evaluation.measure import evaluate_now, load_benchmark
from formats.tensors import parse_json
from formats.tokenizer import load_tokenizer
from lora import load_lora
from model import Llama
from reward import RewardModel
from training.config import read_config
from training.models import build_models

PAIR = {"instruction": "Name a river.", "output": "Elbe.", "output_1": "Elbe.", "output_2": "No.", "preference": 1}
TEMPLATE = {"prompt_inputs": "{instruction} {input}", "prompt_noinputs": "{instruction}"}
READERS = {
    "instructions.json": (load_instructions, [PAIR]), "pairs.json": (load_preferences, [PAIR]),
    "template.json": (get_template, TEMPLATE), "annotations.json": (read_annotations, [PAIR]),
    "passages.jsonl": (load_passages, {"title": "Marie Curie", "text": "A person."}),
    "pool.json": (lambda file: list(load_pool(file, lambda **settings: None)), [{"model": "m"}]),
    "config.json": (lambda file: parse_json(file, dict), {"a": 1}), "topics.txt": (load_topics, None)}


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, name):
    """Editors on Windows put one before UTF-8."""
    read, content = READERS[name]
    text = "Marie Curie\r\nCello\r\n" if content is None else json.dumps(content)
    found = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(text, encoding=encoding, newline="")
        found.append(read(str(tmp_path / name) if name == "template.json" else tmp_path / name))
    assert found[0] == found[1]
    (tmp_path / name).write_bytes(text.encode("utf-16"))  # what PowerShell's > writes
    with pytest.raises(ValueError, match=r"UTF-8|utf-8") as refused:
        read(str(tmp_path / name) if name == "template.json" else tmp_path / name)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_models_adapters_and_runs_are_read_with_a_byte_order_mark(world, tmp_path):
    start(settings(world, tmp_path / "run", steps=1, evaluation=None))
    shutil.copytree(world / "sft", tmp_path / "sft")
    shutil.copytree(world / "reward", tmp_path / "reward")
    adapter = tmp_path / "run" / "step-0001" / "policy"
    for file in (tmp_path / "sft" / "config.json", tmp_path / "reward" / "reward_config.json", adapter / "adapter_config.json",
                 tmp_path / "run" / "config.json"):
        file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    load_lora(Llama.from_pretrained(tmp_path / "sft"), adapter)
    assert RewardModel.from_pretrained(tmp_path / "reward").ends_with_eos
    assert read_config(tmp_path / "run" / "config.json")["steps"] == 1
    assert load_tokenizer(tmp_path / "sft").stop_ids == (2,)


def test_titles_match_in_any_unicode_spelling_and_missing_ones_are_said_first(tmp_path):
    name = "José Ñandú"
    titles = [unicodedata.normalize("NFD", name), "Ada_Lovelace"]
    lines = [json.dumps({"title": title, "text": "She was \ud83d a person."}) + "\n" for title in titles]  # and half an emoji
    (tmp_path / "passages.jsonl").write_text("".join(lines))
    passages = load_passages(tmp_path / "passages.jsonl")

    def ask_all(prompts, desc):
        assert all("She was \ufffd a person." in p.encode().decode() for p in prompts if "passages]" in p)
        return ["- She was a person."] * len(prompts) if desc == "facts stated" else ["True"] * len(prompts)

    counts = count_facts([name, "Ada Lovelace"], ["She was a person."] * 2, passages, ask_all)
    assert [(c.true, c.stated) for c in counts] == [(1, 1), (1, 1)]
    with pytest.raises(ValueError, match="none is titled 'Marie Curie', nor 1 other topics"):
        check_topics([name, "Marie Curie", "Lise Meitner"], passages)


@pytest.fixture
def two_ends(world, tmp_path):
    """The world with a policy whose generation_config.json names all odd ids as ends: every second token."""
    shutil.copytree(world, tmp_path / "world")
    ends = list(range(3, 600, 2))
    (tmp_path / "world" / "sft" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *ends]}))
    return tmp_path / "world"


def test_every_named_end_ends_a_response_in_rollouts_and_evaluations(two_ends, tmp_path, monkeypatch, capsys):
    run = configured(two_ends, tmp_path / "run", steps=1, missing_eos_penalty=-1.0)
    tokenizer = load_tokenizer(run.policy)
    models = build_models(run, tokenizer)
    benchmark = load_benchmark(run.evaluation, tokenizer, "tiny", 192)
    result = evaluate_now(models, run, benchmark, "now")
    assert result["finished"] > 90 and sum(result["ended"]) == round(result["finished"] * 12 / 100)
    assert max(n for n, ended in zip(result["lengths"], result["ended"], strict=True) if ended) <= 8
    start(settings(two_ends, tmp_path / "run", steps=1, missing_eos_penalty=-1.0, evaluation=None))
    metrics = records(tmp_path / "run" / "metrics.jsonl")[0]
    assert metrics["finished"] > 0.7 and metrics["length"] < 5
    monkeypatch.setattr(sys, "stdin", open(two_ends / "asked.txt", "w+"))  # noqa: SIM115
    sys.stdin.write("Name a metal.\n")
    sys.stdin.seek(0)
    seen = []
    monkeypatch.setattr("evaluation.chat.generate",
                        lambda *args, **given: seen.append(given["eos_token_id"]) or torch.tensor([[2]]))
    chat(tmp_path / "run", None, None, None, 0)
    assert set(seen[0]) == {2, *range(3, 600, 2)}


def test_a_response_that_another_end_ended_is_scored_at_the_reward_models_own(two_ends, tmp_path):
    """It never saw those; the score of what it was trained to read is the response through its own EOS."""
    start(settings(two_ends, tmp_path / "run", steps=1, evaluation=None))
    models = build_models(configured(two_ends, tmp_path / "x"), load_tokenizer(two_ends / "sft"))
    model, tokenizer = models.rewards.model, models.tokenizer
    prompt, _ = encode_pair(PAIR, "x", tokenizer, "tiny")
    ids = torch.tensor([prompt + [4, 7]])  # 7 ends it
    expected = model(torch.tensor([prompt + [4, 2]]), torch.ones_like(ids))
    torch.testing.assert_close(models.reward(ids, torch.ones_like(ids), 2), expected)


@pytest.mark.parametrize("targets, code", [("q_proj,vproj", 2), ("q_proj,lm_head", 0)])
def test_the_plan_knows_the_layers_that_a_run_knows(world, tmp_path, monkeypatch, capsys, targets, code):
    flags = to_flags(settings(world, tmp_path / "run", lora_targets=targets))
    monkeypatch.setattr(sys, "argv", ["train.py", "--plan", *flags])
    assert train.main() == code
    said = capsys.readouterr()
    assert "no such layer; choose from" in said.err if code else "adapters" in said.out


@pytest.mark.parametrize("flags, message", [
    (["--adapter", "{world}/empty"], "adapter_model.bin: holds no adapter"),
    (["--reward", "{world}/rules.py"], "a rule is named file.py:function; it has score")])
def test_the_plan_refuses_what_a_run_refuses(world, tmp_path, monkeypatch, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 64}))
    torch.save({}, tmp_path / "empty" / "adapter_model.bin")
    (tmp_path / "rules.py").write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    given = to_flags(settings(world, tmp_path / "run")) + [flag.format(world=tmp_path) for flag in flags]
    for more in (["--plan"], []):
        monkeypatch.setattr(sys, "argv", ["train.py", *given, *more])
        assert train.main() == 2 and message in capsys.readouterr().err
