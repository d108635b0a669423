"""The committed miniature world is what its code builds: data letter by letter, checkpoints that load, figures in range."""

import json
from pathlib import Path

import pytest
import torch

from data import format_prompt
from formats.tokenizer import load_tokenizer
from model import Llama
from reward import RewardModel
from tiny.annotators import add_references
from tiny.make import COMMITTED, public
from tiny.tasks import make_splits

TINY = Path(__file__).resolve().parent.parent / "tiny"
REPORT = json.loads((TINY / "report.json").read_text(encoding="utf-8"))


def test_the_committed_data_is_what_the_code_makes_from_its_seed():
    splits = make_splits(REPORT["seed"])
    for name in ("validation", "evaluation", "about"):
        splits[name] = add_references(splits[name], REPORT["seed"])
    for name in COMMITTED:
        made = json.loads(json.dumps([public(task) for task in splits[name]]))
        assert json.loads((TINY / "data" / f"{name}.json").read_text(encoding="utf-8")) == made, name


def test_the_checkpoints_are_small_and_load_with_their_tokenizer():
    assert sum(f.stat().st_size for folder in ("sft", "reward") for f in (TINY / folder).iterdir()) <= 8e6
    tokenizer = load_tokenizer(TINY / "sft")
    model = Llama.from_pretrained(TINY / "sft")
    reward = RewardModel.from_pretrained(TINY / "reward")
    assert len(tokenizer) == model.config.vocab_size == reward.backbone.config.vocab_size
    assert (TINY / "sft" / "tokenizer.model").read_bytes() == (TINY / "reward" / "tokenizer.model").read_bytes()


def test_the_reward_model_prefers_many_facts_to_one():
    """Its strongest taste; on SFT samples it agrees with the annotators as tiny/report.json says."""
    tokenizer, reward = load_tokenizer(TINY / "reward"), RewardModel.from_pretrained(TINY / "reward", dtype=torch.float32)
    prompt = tokenizer.encode(format_prompt({"instruction": "Tell me about the lion.", "input": ""}, "tiny"), bos=True)
    more = " It lives as a carnivore and is found in Africa. It is covered with fur."
    scores = []
    for text in (" The lion is a mammal.", " The lion is a mammal." + more):
        ids = torch.tensor([prompt + tokenizer.encode(text, bos=False, eos=True)])
        scores.append(reward(ids, torch.ones_like(ids)).item())
    assert scores[1] > scores[0]


def test_the_reported_figures_are_in_the_range_that_the_study_needs():
    assert REPORT["sft"]["win_rate"] == pytest.approx(37, abs=4)
    assert 55 <= REPORT["sft"]["fact_precision"] <= 80
    assert REPORT["reward"]["noise_free"]["accuracy"] >= 0.70
