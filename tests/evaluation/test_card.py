"""What the model card says of a checkpoint's policy, for whoever finds it on a hub; and that vLLM's reader takes the folder."""

import json
import re

import pytest
import yaml
from runs import settings, start
from safetensors import safe_open

from evaluation.card import card, named
from training.config import RunConfig


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("card") / "run"
    start(settings(world, out, estimator="jensen_shannon", steps=2))
    return out


def test_the_card_says_what_it_is_and_what_was_measured(run):
    text = (run / "step-0002" / "policy" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"library_name": "peft", "tags": ["rlhf", "ppo", "lora"]}  # a base that is on no hub is none to link
    for words in ("penalty: Jensen-Shannon, β 0.02", "2 of 2 steps of 8 responses", "seed 0", "LoRA of rank 8, α 64", "true KL",
                  "win rate after − before", "![The run's curves", json.loads((run / "about.json").read_text())["commit"]):
        assert words in text
    assert (run / "step-0002" / "policy" / "curves.png").is_file() and not (run / "step-0001" / "policy" / "curves.png").exists()
    assert str(run.parent) not in text  # nobody's paths


def test_a_hubs_name_is_linked_and_a_path_is_not_told(tmp_path):
    config = RunConfig(policy="org/model", reward="/home/me/reward", data="/home/me/ppo.json", estimator="kl", out=str(tmp_path))
    text = card(tmp_path, config, 10, curves=False)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "org/model" and "/home" not in text and "reward: reward" in text
    assert named("org/model") == "org/model" and named("/a/b") == "b"


def test_the_adapters_folder_is_as_vllm_documents_it(run):
    """--enable-lora reads adapter_config.json's r, lora_alpha and target_modules, without bias, DoRA or saved modules, and
    tensors named base_model.model.<module>.lora_A.weight."""
    folder = run / "step-0002" / "policy"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] <= 16 and config["lora_alpha"]
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert config.get("bias", "none") == "none" and not config.get("use_dora") and not config.get("modules_to_save")
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        for name in tensors.keys():
            assert re.fullmatch(r"base_model\.model\.model\.layers\.\d+\.self_attn\.[qkvo]_proj\.lora_[AB]\.weight", name)
