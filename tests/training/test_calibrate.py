"""What calibrate promises: mean and deviation of raw scores on the policy's own answers, with errors, and said by every run."""

import json
import math
import shutil
import sys

import pytest
import torch
import transformers
from runs import settings, start

import reward
from reward import RewardModel
from training.calibrate import spread


def told(monkeypatch, capsys, *argv) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["reward.py", "calibrate", *map(str, argv)])
    return reward.main(), *capsys.readouterr()


@pytest.fixture
def found(world, tmp_path):
    """A reward model as it is found: transformers' classifier of random weights, with the policy's tokenizer."""
    torch.manual_seed(0)
    size = json.loads((world / "sft" / "config.json").read_text())["vocab_size"]
    config = transformers.LlamaConfig(vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=4, max_position_embeddings=512, num_labels=1, pad_token_id=0,
                                      initializer_range=0.5)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    shutil.copy(world / "sft" / "tokenizer.model", tmp_path / "reward")
    return tmp_path / "reward"


def flags(world, found, *more) -> list:
    return ["--reward", found, "--policy", world / "sft", "--data", world / "data" / "ppo.json", "--prompt-template", "tiny",
            "--response-length", "8", "--samples", "24", "--batch-size", "8", "--device", "cpu", *more]


def test_scores_have_mean_0_and_deviation_1_behind_it(world, found, tmp_path, monkeypatch, capsys):
    code, out, _ = told(monkeypatch, capsys, *flags(world, found))
    about = json.loads((found / "reward_config.json").read_text())
    assert code == 0 and "raw scores of 24 answers" in out and f"written: {found / 'reward_config.json'}" in out
    assert about["calibrated"]["n"] == 24 and about["eos"] is None and about["prompt_template"] == "tiny"
    assert RewardModel.from_pretrained(found).std.item() == pytest.approx(about["std"])
    assert about["calibrated"]["mean_se"] == pytest.approx(about["std"] / math.sqrt(24))
    said = start(settings(world, tmp_path / "run", reward=str(found), evaluation=None, steps=1, temperature=1.0))
    assert f"measured on 24 answers of {world / 'sft'}" in said and "--reward-eos no reads at the last word" in said


def test_a_model_of_any_size_is_said_to_be_so(world, found, tmp_path):
    said = start(settings(world, tmp_path / "run", reward=str(found), evaluation=None, steps=1))
    assert "python reward.py calibrate measures mean and deviation" in said


def test_other_batches_measure_the_same_answers(world, found, monkeypatch, capsys):
    told(monkeypatch, capsys, *flags(world, found, "--reward-eos", "yes"))
    first = json.loads((found / "reward_config.json").read_text())
    assert first["eos"] is True
    told(monkeypatch, capsys, *flags(world, found))
    again = json.loads((found / "reward_config.json").read_text())
    assert (again["mean"], again["std"], again["eos"]) == (pytest.approx(first["mean"]), pytest.approx(first["std"]), True)


def test_a_template_of_a_file_is_stored_by_what_it_holds(world, found, tmp_path, monkeypatch, capsys):
    texts = {"prompt_inputs": "{instruction} {input}", "prompt_noinputs": "{instruction}"}
    (tmp_path / "template.json").write_text(json.dumps(texts))
    code, _, err = told(monkeypatch, capsys, *flags(world, found, "--prompt-template", tmp_path / "template.json"))
    assert code == 0, err
    assert json.loads((found / "reward_config.json").read_text())["prompt_template"] == texts | {"before_response": ""}


def test_a_calibration_that_nobody_measured_is_one_line(found):
    (found / "reward_config.json").write_text(json.dumps({"mean": 0.0, "std": 1.0, "calibrated": {"n": 3}}))
    with pytest.raises(ValueError, match="reward_config.json: calibrated is not what"):
        RewardModel.from_pretrained(found)


def test_mean_deviation_and_their_errors_by_hand():
    """−1, 1, −1, 1: variance 4/3, fourth moment 1 below its square, so that the deviation has no error to speak of."""
    assert spread([-1.0, 1.0, -1.0, 1.0]) == {"mean": 0.0, "std": pytest.approx(math.sqrt(4 / 3)),
                                              "mean_se": pytest.approx(math.sqrt(4 / 3) / 2), "std_se": 0.0}
    found = spread([0.0, 0.0, 0.0, 4.0])  # mean 1, variance 4, fourth moment (3 + 81) / 4 = 21
    assert found["std"] == 2.0 and found["std_se"] == pytest.approx(math.sqrt((21 - 16) / 4) / 4)
    with pytest.raises(ValueError, match="tells no answer from another"):
        spread([2.0, 2.0])


@pytest.mark.parametrize(("change", "says"), [
    (["--reward", "no/such"], "--reward no/such: must be a folder of a reward model"), (["--samples", "1"], "argument --samples"),
    (["--data", "none.json"], "none.json: no such data file"), (["--temperature", "0"], "argument --temperature")])
def test_bad_input_is_one_line(world, found, monkeypatch, capsys, change, says):
    code, _, err = told(monkeypatch, capsys, *flags(world, found, *change))
    assert code == 2 and says in err and err.strip().count("\n") == 0 and not (found / "reward_config.json").exists()
