"""The committed miniature world is what its code builds: data letter by letter, checkpoints that give the reported figures."""

import json
from pathlib import Path

import pytest
import torch

from data import format_prompt
from formats.tokenizer import load_tokenizer
from model import Llama
from reward import RewardModel
from tiny import make
from tiny.annotators import add_references
from tiny.make import COMMITTED, public
from tiny.tasks import make_corpus, make_splits

TINY = Path(__file__).resolve().parent.parent / "tiny"
REPORT = json.loads((TINY / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def splits():
    made = make_splits(REPORT["seed"])
    for name in ("validation", "evaluation", "about"):
        made[name] = add_references(made[name], REPORT["seed"])
    return made


def test_the_committed_data_is_what_the_code_makes_from_its_seed(splits):
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


def test_the_reported_figures_of_sft_are_measured_again(splits):
    """988 answers of the committed checkpoint; other kernels may draw another word in a few of them."""
    measured = make.sft_report(make.load_sft(TINY / "sft"), load_tokenizer(TINY / "sft"), splits, REPORT["seed"])
    assert measured.keys() >= REPORT["sft"].keys()
    assert {key: measured[key] for key in REPORT["sft"]} == pytest.approx(REPORT["sft"], rel=0.02)


def test_the_reported_accuracy_of_the_reward_model_is_found_again_on_a_part(splits):
    """60 of its 2,000 held-out instructions: within three standard errors of the part, and the worst kinds stay the worst."""
    tokenizer, tasks = load_tokenizer(TINY / "reward"), splits["validation"][:60]
    samples = make.candidates(make.load_sft(TINY / "sft"), tokenizer, tasks, [make.TEMPERATURE] * 4, REPORT["seed"] + 200)
    model = RewardModel.from_pretrained(TINY / "reward", dtype=torch.float32)
    measured = make.reward_report(model, tokenizer, tasks, samples, REPORT["seed"])
    stored = {key: REPORT["reward"][key] for key in ("mean", "std")}
    assert {key: measured[key] for key in stored} == pytest.approx(stored)
    for labels in ("noise_free", "noisy"):
        found, reported = measured[labels], REPORT["reward"][labels]
        assert found["accuracy"] == pytest.approx(reported["accuracy"], abs=3 * found["se"]), labels
    kinds = measured["by_kind"]
    assert kinds["number of facts"]["accuracy"] > max(kinds[k]["accuracy"] for k in ("truth", "repeats", "right answer"))


def test_a_small_world_is_built_twice_alike_and_its_report_is_of_what_was_stored(splits, tmp_path, monkeypatch):
    """All stages of tiny/make.py on fewer records and a smaller model."""
    sizes = {"sft": 300, "preference": 12, "validation": 12, "evaluation": 20, "about": 8, "ppo": 8}
    monkeypatch.setattr(make, "make_splits", lambda seed: {name: splits[name][:n] for name, n in sizes.items()})
    monkeypatch.setattr(make, "make_corpus", lambda n, seed, _: make_corpus(300, seed, splits))
    monkeypatch.setattr(make, "VOCABULARY", 900)
    monkeypatch.setattr(make, "CONFIG", make.CONFIG | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1})
    first, second = (make.build(tmp_path / name, seed=0) for name in ("first", "second"))
    timeless = {"seconds", "sft_training"}
    assert {k: first[k] for k in first.keys() - timeless} == {k: second[k] for k in first.keys() - timeless}
    assert first.keys() == REPORT.keys()
    assert REPORT["sft"].keys() - first["sft"].keys() <= {"fact_precision", "fact_precision_se"}  # it states no facts
    for file in sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*") if p.is_file()):
        if file.name != "report.json":
            assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    stored, tokenizer = make.load_sft(tmp_path / "first" / "sft"), load_tokenizer(tmp_path / "first" / "sft")
    assert make.sft_report(stored, tokenizer, make.make_splits(0), 0) == first["sft"]


def test_the_world_leaves_room_for_the_study():
    """SFT neither wins nor loses everything, some of its facts are wrong, and the reward model knows more than chance."""
    assert 30 < REPORT["sft"]["win_rate"] < 45
    assert 55 <= REPORT["sft"]["fact_precision"] <= 80
    assert REPORT["reward"]["noise_free"]["accuracy"] >= 0.70
