"""What lora.py promises: the base stays the base, only the adapters train, PEFT and the released weights are read.

    python -m pytest tests/test_lora.py
"""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lora as lora_module
from lora import (LoRALinear, add_lora, load_lora, lora_disabled, lora_layers, lora_parameters, lora_state_dict,
                  merge_lora, save_lora, unmerge_lora)
from model import Llama, LlamaConfig, ValueModel, generate

Q = "model.layers.0.self_attn.q_proj"
IDS = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(1))


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return Llama(LlamaConfig(**(sizes | changes))).eval()


def adapted(model=None, seed=0, **settings):
    """A model whose adapters do something: B is random instead of zero."""
    model = add_lora(tiny() if model is None else model, **settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.02)
    return model


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ------------------------------------------------------------------------------------------------------- the contract


def test_the_update_is_alpha_over_rank_B_A_by_hand():
    # W = [[1, 0], [0, 1]], B A = [[1], [2]] [[3, 4]] = [[3, 4], [6, 8]], scaling = 6 / 1:
    # W + 6 B A = [[19, 24], [36, 49]]
    layer = LoRALinear(nn.Linear(2, 2, bias=False), rank=1, alpha=6, dropout=0.0)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.lora_A.copy_(torch.tensor([[3.0, 4.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [2.0]]))
    assert layer(torch.eye(2)).T.tolist() == [[19, 24], [36, 49]]
    layer.merge()
    assert layer.weight.tolist() == [[19, 24], [36, 49]]


def test_scaling_is_alpha_over_rank_or_over_its_root():
    assert LoRALinear(nn.Linear(4, 4)).scaling == 64 / 8  # the paper's, section 2.2
    assert LoRALinear(nn.Linear(4, 4), rank=16, alpha=8, use_rslora=True).scaling == 2.0


def test_new_adapters_change_no_logit():
    model = tiny()
    before = model(IDS)
    assert torch.equal(add_lora(model)(IDS), before)


def test_disabled_is_the_base_bit_for_bit_merged_or_not_and_nests():
    base = tiny()(IDS)
    model = adapted()
    with_adapters = model(IDS)
    assert not torch.equal(with_adapters, base)
    for prepare in (unmerge_lora, merge_lora):
        prepare(model)
        with lora_disabled(model):
            with lora_disabled(model):
                assert torch.equal(model(IDS), base)
            assert torch.equal(model(IDS), base)
        torch.testing.assert_close(model(IDS), with_adapters, atol=1e-4, rtol=1e-4)


def test_disabled_restores_after_an_exception():
    model = adapted()
    before = model(IDS)
    with pytest.raises(KeyError), lora_disabled(model):
        raise KeyError
    assert torch.equal(model(IDS), before)


def test_disabling_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="no LoRA layers"), lora_disabled(tiny()):
        pass


def test_merged_equals_adapted_and_unmerge_restores_bit_for_bit():
    model = adapted()
    before, logits = weights(model), model(IDS)
    merge_lora(merge_lora(model))  # twice is once
    torch.testing.assert_close(model(IDS), logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(model.state_dict()[f"{Q}.weight"], before[f"{Q}.weight"])
    unmerge_lora(unmerge_lora(model))
    assert same(weights(model), before) and torch.equal(model(IDS), logits)


def test_merging_leaves_a_model_that_shares_the_weights_alone():
    reward, value = tiny(), tiny()
    for name, parameter in reward.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(value.get_submodule(owner), leaf, parameter)
    before = reward(IDS)
    merge_lora(adapted(value))
    assert torch.equal(reward(IDS), before)


def test_only_lora_trains():
    model = adapted(dropout=0.0)
    before = weights(model)
    optimizer = torch.optim.Adam(lora_parameters(model), lr=1e-2)
    model(IDS).square().mean().backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(trainable) == 2 * 2 * 4  # A and B, two layers, q k v o
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trainable


def test_a_bfloat16_base_keeps_float32_adapters_that_get_gradients():
    model = add_lora(tiny().to(torch.bfloat16))
    logits = model(IDS)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    for layer in lora_layers(model).values():
        assert layer.weight.dtype == torch.bfloat16
        assert layer.lora_A.dtype == layer.lora_B.dtype == layer.lora_B.grad.dtype == torch.float32
        assert layer.lora_B.grad.abs().sum() > 0
    merge_lora(model)
    assert model(IDS).dtype == torch.bfloat16


def test_dropout_acts_on_the_adapter_in_training_only():
    model = adapted(dropout=0.5)
    quiet = model(IDS)
    assert torch.equal(model(IDS), quiet)
    model.train()
    assert not torch.equal(model(IDS), model(IDS))
    with lora_disabled(model):
        assert torch.equal(model(IDS), model(IDS))


def test_adding_is_reproducible_and_keeps_the_mode():
    first, second = (add_lora(tiny(seed=5)) for _ in range(2))
    assert same(lora_state_dict(first), lora_state_dict(second))
    assert not any(layer.training for layer in lora_layers(first).values())
    assert all(layer.training for layer in lora_layers(add_lora(tiny().train())).values())


def test_adding_twice_or_nowhere_is_refused():
    with pytest.raises(ValueError, match="already has LoRA"):
        add_lora(add_lora(tiny()))
    with pytest.raises(ValueError, match="match no nn.Linear"):
        add_lora(tiny(), targets=("c_attn",))
    assert sorted(lora_layers(add_lora(tiny(), targets=("layers.1.mlp.up_proj", "lm_head")))) == [
        "lm_head", "model.layers.1.mlp.up_proj"]


def test_llama_7b_trains_the_papers_16_7_million_parameters():
    with torch.device("meta"):
        policy = Llama(LlamaConfig.llama_7b())
        value = ValueModel(Llama(LlamaConfig.llama_7b()))
    add_lora(policy)
    add_lora(value.backbone)
    trained = sum(parameter.numel() for model in (policy, value) for parameter in model.parameters()
                  if parameter.requires_grad)
    assert trained == 16_777_216 + 4096 + 1  # section 2.2: 16.7M, and the value head
    assert sum(parameter.numel() for parameter in lora_parameters(policy)) == 8_388_608
    assert all(parameter.is_meta for parameter in lora_parameters(policy))


def test_sampling_works_with_adapters_on_merged_and_off():
    model = adapted()
    mask = torch.ones_like(IDS)
    expected = generate(model, IDS, mask, 6, temperature=0, eos_token_id=()).tolist()
    with lora_disabled(model):
        assert generate(model, IDS, mask, 6, temperature=0, eos_token_id=()).tolist() == generate(
            tiny(), IDS, mask, 6, temperature=0, eos_token_id=()).tolist() != expected
    assert generate(merge_lora(model), IDS, mask, 6, temperature=0, eos_token_id=()).tolist() == expected


# ------------------------------------------------------------------------------------------------------------ storing


def in_transformers(ours, folder):
    ours.save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def test_saved_adapters_load_in_peft_with_equal_logits(tmp_path):
    theirs = in_transformers(tiny(), tmp_path / "base")
    model = adapted(rank=4, alpha=12)
    save_lora(model, tmp_path / "adapter", base_model_name_or_path="base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 12, "base")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adapt_first", [False, True])
def test_adapters_of_peft_load_with_equal_logits(use_rslora, adapt_first, tmp_path):
    theirs = in_transformers(tiny(), tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=use_rslora,
                             task_type="CAUSAL_LM", init_lora_weights=False, layers_to_transform=[1])
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = tiny()
    if adapt_first:  # rank must agree, the scaling comes from the file
        add_lora(model, rank=4, alpha=1, targets=["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"])
    assert load_lora(model, tmp_path / "adapter") == {}
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    save_lora(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert same(again, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    targets = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]  # layer 0 stays as it is
    fresh = tiny()
    load_lora(fresh, tmp_path / "again")
    assert torch.equal(fresh(IDS), model(IDS))


def test_a_merged_model_is_stored_whole_and_an_adapted_one_as_its_base(tmp_path):
    model = adapted()
    logits = model(IDS)
    model.save_pretrained(tmp_path / "base")
    merge_lora(model).save_pretrained(tmp_path / "merged")
    assert torch.equal(Llama.from_pretrained(tmp_path / "base")(IDS), tiny()(IDS))
    torch.testing.assert_close(Llama.from_pretrained(tmp_path / "merged")(IDS), logits, atol=1e-4, rtol=1e-4)


def test_a_value_models_adapters_come_back_under_its_own_names(tmp_path):
    value = ValueModel(adapted())
    assert f"base_model.model.backbone.{Q}.lora_A.weight" in lora_state_dict(value)
    save_lora(value, tmp_path)
    other = ValueModel(tiny())
    load_lora(other, tmp_path)
    assert torch.equal(other.backbone.hidden(IDS), value.backbone.hidden(IDS))


def released(policy, value):
    """The layout of the paper's released pytorch_model.bin, as far as it is known."""
    tensors = {"value_head": torch.randn(1, 32), "value_head_bias": torch.randn(1)}
    for prefix, model in (("", policy), ("base_model.", value)):
        for name, layer in lora_layers(model).items():
            tensors[f"{prefix}{name}.lora_A"] = layer.lora_A.detach().clone()
            tensors[f"{prefix}{name}.lora_B"] = layer.lora_B.detach().clone()
    return tensors


def test_the_papers_released_weights_load_into_policy_and_value(tmp_path):
    policy, value = adapted(seed=1), adapted(seed=2)
    tensors = released(policy, value)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    new_policy, new_value = tiny(), ValueModel(tiny())
    assert load_lora(new_policy, tmp_path) == {}
    head = load_lora(new_value, tmp_path / "pytorch_model.bin")
    assert torch.equal(new_policy(IDS), policy(IDS))
    assert torch.equal(new_value.backbone(IDS), value(IDS))
    assert same(head, {name: tensors[name] for name in ("value_head", "value_head_bias")})
    layer = lora_layers(new_policy)[Q]
    assert (layer.rank, layer.scaling, layer.dropout) == (8, 8.0, 0.1)
    backbone = tiny()
    assert load_lora(backbone, tmp_path, part="value").keys() == head.keys()
    assert torch.equal(backbone(IDS), value(IDS))


def test_a_released_file_of_one_part_needs_no_choice(tmp_path):
    value = adapted(seed=2)
    only = {name: tensor for name, tensor in released(value, value).items() if name.startswith(("base_model", "value"))}
    torch.save(only, tmp_path / "value.bin")
    backbone = tiny()
    assert load_lora(backbone, tmp_path / "value.bin").keys() == {"value_head", "value_head_bias"}
    assert torch.equal(backbone(IDS), value(IDS))
    with pytest.raises(ValueError, match="no adapters of the policy model"):
        load_lora(tiny(), tmp_path / "value.bin", part="policy")


def test_broken_adapters_are_named_file_and_tensor_and_change_nothing(tmp_path):
    save_lora(adapted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    good, key = load_file(file), f"base_model.model.{Q}.lora_A.weight"
    cases = [({name: tensor for name, tensor in good.items() if name != key}, rf"missing tensor {Q}.lora_A"),
             (good | {key: torch.ones(8, 31)}, rf"tensor {Q}.lora_A has shape \(8, 31\), not \(8, 32\)"),
             (good | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(8, 32)},
              r"unexpected tensor model.layers.7.self_attn.q_proj.lora_A"),
             (good | {"base_model.model.score.weight": torch.ones(1)}, r"unexpected tensor base_model.model.score")]
    for tensors, message in cases:
        save_file(tensors, file)
        for model in (tiny(), add_lora(tiny())):
            before = weights(model)
            with pytest.raises(ValueError, match=rf"adapter_model.safetensors: {message}"):
                load_lora(model, tmp_path)
            assert same(weights(model), before)


def test_adapters_that_do_not_fit_the_models_own_are_refused(tmp_path):
    save_lora(adapted(), tmp_path)
    with pytest.raises(ValueError, match="has rank 8, the model's adapter 4"):
        load_lora(add_lora(tiny(), rank=4), tmp_path)
    with pytest.raises(ValueError, match="has no adapter"):
        load_lora(add_lora(tiny(), targets=("q_proj",)), tmp_path)
    with pytest.raises(ValueError, match=r"missing tensor model.layers.0.mlp.up_proj"):
        load_lora(add_lora(tiny(), targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")), tmp_path)
    with pytest.raises(ValueError, match="call unmerge_lora"):
        load_lora(merge_lora(add_lora(tiny())), tmp_path)


def test_damaged_absent_and_foreign_adapters_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load_lora(tiny(), tmp_path)
    save_lora(adapted(), tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="adapter_model.safetensors: cannot be read"):
        load_lora(tiny(), tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora True is not supported"):
        load_lora(tiny(), tmp_path)


def test_a_failed_write_leaves_the_last_good_file(tmp_path, monkeypatch):
    save_lora(adapted(seed=0), tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()

    def disk_full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(lora_module, "save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_lora(adapted(seed=1), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
