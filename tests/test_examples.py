"""The example runs on four families of Hugging Face's models, tiny and random: the first ratio is 1, the reward is asked about
whole texts, and PEFT reads what came of it."""

import sys

import pytest
import torch

from lora import lora_layers, save_lora
from ppo import PPOConfig

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
             num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "gemma": transformers.GemmaConfig,
            "mistral": transformers.MistralConfig}


@pytest.fixture
def tokenizer():
    """A word for each of ids 3 to 39."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 40))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("family", FAMILIES)
def test_ppo_on_a_hugging_face_model_of_any_family(family, tokenizer, tmp_path):
    from examples import hf_ppo

    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](**SIZES))
    hf.save_pretrained(tmp_path / "base")
    asked = []

    def reward(prompts, responses):
        asked.extend(zip(prompts, responses, strict=True))
        return [float(r.count("w7")) for r in responses]

    config = PPOConfig(rollout_batch_size=8, step_batch_size=4, micro_batch_size=2, rollout_micro_batch_size=4, response_length=6,
                       learning_rate=0.01)
    first, second = hf_ppo.train(hf, tokenizer, ["w4 w5 w6", "w9"], reward, config, steps=2)
    assert first["ratio_error"] <= 1e-5 and second["ratio_error"] <= 1e-5  # adapted, too
    assert first["kl_k3"] == 0 < second["kl_k3"]
    assert {prompt for prompt, _ in asked} == {"w4 w5 w6", "w9"} and len(asked) == 16
    assert all(word in tokenizer.get_vocab() for _, response in asked for word in response.split())
    assert all(layer.lora_B.abs().max() > 0 for layer in lora_layers(hf).values()) and len(lora_layers(hf)) == 8

    save_lora(hf.eval(), tmp_path / "adapter")
    ids = torch.randint(3, 40, (2, 9))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        before, after = base(ids).logits, hf(ids).logits
        reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
    torch.testing.assert_close(reloaded, after, atol=1e-5, rtol=1e-4)
    assert (before - after).abs().max() > 1e-3


def test_the_example_is_a_page_and_needs_three_files_of_ours():
    from examples import hf_ppo

    text = open(hf_ppo.__file__, encoding="utf-8").read()
    assert text.count("\n") <= 80
    ours = {line.split()[1] for line in text.splitlines() if line.split()[:1] in (["import"], ["from"])} & {
        "ppo", "divergences", "lora", "model", "reward", "data", "train", "evaluate", "sft", "training", "formats", "evaluation"}
    assert ours == {"ppo", "divergences", "lora"} and "sys" in sys.modules


def test_a_text_classifier_is_a_rule_of_ten_lines(tmp_path, monkeypatch):
    """docs/ecosystem.md's, as it stands, on a BERT of random weights."""
    import re

    import transformers

    from conftest import ROOT
    from training.rewards import load_rule

    text = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    code = re.search(r"^    # classifier\.py\n((?:    .*\n|\n(?=    ))+)", text, re.MULTILINE)[1]
    code = re.sub(r"^    ", "", code, flags=re.MULTILINE).partition("\npython ")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "name", "a", "metal", "copper"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16, num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "classifier.py").write_text(code.replace("path/to/classifier", str(tmp_path / "bert")))
    found = load_rule(f"{tmp_path / 'classifier.py'}:liked")(["", ""], ["copper", "a"], ["name a metal", "name a metal"])
    assert len(found) == 2 and found[0] != found[1]
