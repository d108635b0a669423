"""LLaMA's kin, Mistral, Qwen2 and 2.5, Qwen3, beside transformers' classes of random weights: logits, greedy answers, adapters'
gradients, folders, GGUF files, reward models, and PPO with a policy of one and a reward model of another."""

import json
import shutil

import pytest
import torch
import transformers
from runs import records, settings, start
from test_layouts import write_gguf

from lora import add_lora, load_lora, merge_checkpoint, save_lora
from model import Llama, LlamaConfig, generate
from reward import RewardModel

SIZES = dict(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
             initializer_range=0.2)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
KIN = {
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 biased": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral windowed": ("Mistral", {"sliding_window": 40}),
    "llama yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}}),
    "llama dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
}
IDS = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(0))


def theirs(kin: str, kind: str = "ForCausalLM", **changes):
    """transformers' model with random weights, biases and norms included: at 0 and 1 one left out would go unseen."""
    family, more = KIN[kin]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | more | changes)
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.3).add_(1.0)
    return model


@pytest.fixture(scope="module", params=KIN)
def both(request, tmp_path_factory):
    """(their model, ours from its folder, the folder)."""
    folder, model = tmp_path_factory.mktemp("kin"), theirs(request.param)
    model.save_pretrained(folder)
    return model, Llama.from_pretrained(folder), folder


@torch.no_grad()
def test_logits_are_transformers_beside_padding(both):
    hf, ours, _ = both
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = hf(IDS, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(ours(IDS, mask)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_greedy_answers_are_transformers_token_for_token(both):
    hf, ours, _ = both
    expected = hf.generate(IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 30:]
    assert torch.equal(generate(ours, IDS[:1], None, 8, temperature=0, eos_token_id=()), expected)


def test_the_samplers_logprobs_are_those_of_a_pass_over_all(both):
    _, ours, _ = both
    draws = torch.rand(8, 2, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = generate(ours, IDS[:, :20], None, 8, eos_token_id=(), generator=draws, return_logprobs=True)
    with torch.no_grad():
        logits = ours(torch.cat((IDS[:, :20], tokens), 1))[:, 19:-1]
    again = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(logprobs, again, atol=1e-4, rtol=0)


def test_its_folder_is_read_by_transformers_as_the_family_it_is(both, tmp_path):
    hf, ours, _ = both
    ours.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is type(hf)
    torch.testing.assert_close(back(IDS).logits, hf(IDS).logits, atol=1e-4, rtol=0)
    assert Llama.from_pretrained(tmp_path).config == ours.config


def test_adapters_have_pefts_gradients_and_are_read_by_it(both, tmp_path):
    peft = pytest.importorskip("peft")
    hf, _, folder = both
    ours = Llama.from_pretrained(folder)
    torch.manual_seed(2)
    add_lora(ours, rank=4, alpha=8, dropout=0.0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    save_lora(ours, tmp_path / "adapter", base_model_name_or_path=str(folder))
    wrapped = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter",
                                             is_trainable=True)
    for logits in (ours(IDS), wrapped(IDS).logits):
        logits.log_softmax(-1)[..., 5].sum().backward()
    adapters = {name: parameter for name, parameter in ours.named_parameters() if "lora_" in name}
    assert len(adapters) == 16
    for name, parameter in adapters.items():
        its = wrapped.get_parameter(f"base_model.model.{name}.default.weight").grad
        torch.testing.assert_close(parameter.grad, its, atol=1e-3, rtol=1e-3)
    again = Llama.from_pretrained(folder)
    load_lora(again, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS), ours(IDS))


@pytest.mark.parametrize("kin", ["qwen2", "qwen3", "mistral"])
def test_a_reward_model_of_the_family_scores_as_transformers_does_and_goes_back(kin, tmp_path):
    classifier = theirs(kin, "ForSequenceClassification", num_labels=1)
    classifier.save_pretrained(tmp_path / "its")
    ours = RewardModel.from_pretrained(tmp_path / "its")
    ours.mean.zero_()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS, torch.ones_like(IDS)), classifier(IDS).logits[:, 0], atol=1e-4, rtol=0)
        ours.save_pretrained(tmp_path / "ours")
        back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
        assert type(back) is type(classifier)
        torch.testing.assert_close(back(IDS).logits, classifier(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kin", ["qwen2", "qwen3", "qwen3 biased"])
def test_gguf_files_of_qwen_are_read(kin, tmp_path):
    model = theirs(kin, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    ours = Llama.from_pretrained(write_gguf(tmp_path / "tiny.gguf", model, architecture=kin.split()[0]))
    assert ours.config.model_type == kin.split()[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS).logits, atol=1e-4, rtol=0)


def test_gguf_files_of_llama_3_bring_their_scaled_rope(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": 5000.0}
    KIN["llama 3"] = ("Llama", {"rope_parameters": scaling, "head_dim": 16})
    model = theirs("llama 3")
    plain = 5000.0 ** (-torch.arange(0, 16, 2) / 16)
    divisors = plain / model.model.rotary_emb.inv_freq
    assert divisors.max() > 2  # so that it matters
    file = write_gguf(tmp_path / "tiny.gguf", model, extra={"rope_freqs.weight": divisors})
    ours = Llama.from_pretrained(file)
    assert ours.config.rope_scaling["factor"] == pytest.approx(8.0)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kin", "longest"), [("mistral windowed", 40), ("llama dynamic", 64)])
def test_what_is_longer_than_can_be_computed_alike_is_refused(kin, longest, tmp_path):
    theirs(kin).save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    ours(torch.ones(1, longest, dtype=torch.long))
    with pytest.raises(ValueError, match=f"a sequence of {longest + 1} tokens: this model is computed up to {longest}"):
        ours(torch.ones(1, longest + 1, dtype=torch.long))


def test_a_window_that_is_not_in_use_is_none():
    for fields, window in (({"model_type": "qwen2", "sliding_window": 32}, None), ({"model_type": "mistral"}, 4096),
                           ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True}, 32),
                           ({"model_type": "llama", "sliding_window": 32}, None),
                           ({"model_type": "mistral", "sliding_window": None}, None)):
        config = LlamaConfig.from_dict(fields)
        assert config.sliding_window == window and LlamaConfig.from_dict(config.to_dict()) == config


def test_a_policy_of_one_family_trains_with_a_reward_model_of_another(world, tmp_path):
    """The miniature world's tokenizer, a Qwen3 policy and a Qwen2 reward model of its vocabulary."""
    vocabulary = json.loads((world / "sft" / "config.json").read_text())["vocab_size"]
    theirs("qwen3", vocab_size=vocabulary, max_position_embeddings=512).save_pretrained(tmp_path / "policy")
    theirs("qwen2", "ForSequenceClassification", num_labels=1, vocab_size=vocabulary,
           max_position_embeddings=512).save_pretrained(tmp_path / "reward")
    for name in ("policy", "reward"):
        shutil.copy(world / "sft" / "tokenizer.model", tmp_path / name)
    folders = {name: str(tmp_path / name) for name in ("policy", "reward")}
    said = start(settings(world, tmp_path / "run", **folders, evaluation=None, steps=2, reward_eos="yes"))
    assert len(records(tmp_path / "run" / "metrics.jsonl")) == 2 and "lora:" in said


def test_a_run_beyond_the_window_is_refused_before_it_begins(world, tmp_path, capsys):
    theirs("mistral windowed", vocab_size=json.loads((world / "sft" / "config.json").read_text())["vocab_size"]).save_pretrained(
        tmp_path / "policy")
    shutil.copy(world / "sft" / "tokenizer.model", tmp_path / "policy")
    with pytest.raises(ValueError, match="--query-length \\+ --response-length: 200 tokens, .* up to 40"):
        start(settings(world, tmp_path / "run", policy=str(tmp_path / "policy"), evaluation=None))


@pytest.mark.parametrize("kin", ["qwen2 tied", "qwen3"])
def test_an_adapter_is_merged_into_a_folder_of_the_family(kin, tmp_path):
    theirs(kin).save_pretrained(tmp_path / "base")
    ours = Llama.from_pretrained(tmp_path / "base")
    add_lora(ours, rank=4, alpha=8, dropout=0.0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    save_lora(ours, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, ours(IDS), atol=1e-4, rtol=0)
