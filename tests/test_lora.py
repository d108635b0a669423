"""What lora.py promises: the base stays the base, only the adapters train, PEFT and the released weights are read,
and merging is exact.

    python -m pytest tests/test_lora.py
"""

import json
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import place
from safetensors.torch import load_file, save_file
from torch import nn

import lora as lora_module
from lora import (LoRALinear, LowRank, add_lora, keep_mask, load_lora, lora_cast, lora_disabled, lora_layers,
                  lora_parameters, lora_snapshot, lora_state_dict, lora_weights, merge_lora,
                  save_lora, unmerge_lora)
from model import Llama, LlamaConfig, ValueModel, generate

Q = "model.layers.0.self_attn.q_proj"
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
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


# ---------------------------------------------------------------------------------------------- an earlier state of it


def test_inside_lora_weights_the_model_is_as_it_was_when_the_snapshot_was_taken():
    model = adapted()
    at_start, start = model(IDS), lora_snapshot(model)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.mul_(1.5)  # stands for a training step
    trained, now = model(IDS), lora_snapshot(model)
    with torch.no_grad(), lora_weights(model, start):
        assert torch.equal(model(IDS), at_start) and not torch.equal(at_start, trained)
        assert all(tensor.data_ptr() == start[name].data_ptr() for name, tensor in lora_state_dict(model).items())
        with lora_weights(model, now):
            assert torch.equal(model(IDS), trained)
        with lora_disabled(model):
            assert torch.equal(model(IDS), tiny()(IDS))
    assert same(lora_state_dict(model), now) and torch.equal(model(IDS), trained)


def test_lora_weights_gives_the_adapters_back_after_an_exception():
    model, other = adapted(), lora_snapshot(adapted(seed=3))
    before, parameters = lora_snapshot(model), lora_parameters(model)
    with pytest.raises(KeyError), lora_weights(model, other):
        raise KeyError
    assert same(lora_state_dict(model), before)
    assert all(now is then for now, then in zip(lora_parameters(model), parameters, strict=True))


def test_a_graph_built_before_lora_weights_has_the_gradients_that_it_would_have_had():
    grads = []
    for swap in (False, True):
        model = adapted(dropout=0.0)
        loss = model(IDS).square().mean()
        if swap:
            with torch.no_grad(), lora_weights(model, lora_snapshot(adapted(seed=3))):
                model(IDS)
        loss.backward()
        grads.append(dict(enumerate(parameter.grad for parameter in lora_parameters(model))))
    assert same(*grads)


def test_lora_weights_works_on_whatever_gpu_the_model_is(two_gpus):
    _, second = two_gpus
    model = place(lambda: add_lora(tiny()), second)
    with lora_weights(model, lora_snapshot(model)):
        assert str(model(torch.zeros(2, 4, dtype=torch.long, device=second)).device) == second


def test_a_snapshot_that_does_not_fit_is_refused_and_changes_nothing():
    model, key = adapted(), f"base_model.model.{Q}.lora_A.weight"
    good, before = lora_snapshot(adapted(seed=3)), lora_snapshot(model)
    cases = [(model, {name: good[name] for name in good if name != key}, f"missing tensor {key}"),
             (model, good | {"more": torch.ones(1)}, "unexpected tensor more"),
             (model, good | {key: torch.ones(4, 32)}, rf"{key} .* has shape \(4, 32\), not \(8, 32\)"),
             (model, lora_state_dict(model), "the very memory of the adapter"),  # a reference that follows the policy
             (tiny(), good, "no LoRA layers"),
             (merge_lora(adapted()), good, "call unmerge_lora")]
    for adapted_model, tensors, message in cases:
        with pytest.raises(ValueError, match=message), lora_weights(adapted_model, tensors):
            raise AssertionError("must not get here")
    assert same(lora_state_dict(model), before)


# ------------------------------------------------------------------------------------------------------------ storing


def in_transformers(ours, folder):
    ours.save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", [ATTENTION, MLP, ATTENTION + MLP], ids=["attention", "mlp", "all"])
def test_saved_adapters_load_in_peft_with_equal_logits(targets, use_rslora, tmp_path):
    theirs = in_transformers(tiny(), tmp_path / "base")
    model = adapted(rank=4, alpha=12, targets=targets)
    for layer in lora_layers(model).values():
        layer.set_scaling(12, use_rslora)
    save_lora(model, tmp_path / "adapter", base_model_name_or_path="base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(targets)
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 12, "base")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert {name.rpartition(".")[2] for name, module in loaded.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)} == set(targets)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_of_peft_on_every_linear_layer_load_whatever_its_config_calls_the_targets(use_rslora, tmp_path):
    theirs = in_transformers(tiny(), tmp_path / "base")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear",
                                                         use_rslora=use_rslora, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config, logits = json.loads(file.read_text()), theirs(IDS).logits
    for targets in (config["target_modules"], "all-linear", r".*\.(self_attn|mlp)\..*_proj", [Q], None):
        file.write_text(json.dumps(config | {"target_modules": targets}))
        model = tiny()
        load_lora(model, tmp_path / "adapter")
        assert len(lora_layers(model)) == 2 * 7
        torch.testing.assert_close(model(IDS), logits, atol=1e-4, rtol=1e-4)


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


def test_a_tied_output_layer_that_an_adapter_was_merged_into_is_stored_by_itself(tmp_path):
    model = adapted(tiny(tie_word_embeddings=True), targets=("q_proj", "lm_head"))
    logits = model(IDS)
    merge_lora(model).save_pretrained(tmp_path / "merged")
    for again in (Llama.from_pretrained(tmp_path / "merged"),
                  lambda ids: transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits):
        torch.testing.assert_close(again(IDS), logits, atol=1e-4, rtol=1e-4)
    unmerge_lora(model).save_pretrained(tmp_path / "base")  # tied as before
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    base = Llama.from_pretrained(tmp_path / "base")
    assert base.config.tie_word_embeddings and torch.equal(base(IDS), tiny(tie_word_embeddings=True)(IDS))


def test_a_value_models_adapters_come_back_under_its_own_names(tmp_path):
    value = ValueModel(adapted())
    assert f"base_model.model.backbone.{Q}.lora_A.weight" in lora_state_dict(value)
    save_lora(value, tmp_path)
    other = ValueModel(tiny())
    load_lora(other, tmp_path)
    assert torch.equal(other.backbone.hidden(IDS), value.backbone.hidden(IDS))


def test_loading_draws_no_random_number(tmp_path):
    save_lora(adapted(), tmp_path)
    model, before = tiny(), torch.get_rng_state()
    load_lora(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    add_lora(tiny())
    assert not torch.equal(torch.get_rng_state(), before)


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
    with pytest.raises(ValueError, match="no adapter of the policy model"):
        load_lora(tiny(), tmp_path / "value.bin", part="policy")


def test_broken_adapters_are_named_file_and_tensor_and_change_nothing(tmp_path):
    save_lora(adapted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    good, key = load_file(file), f"base_model.model.{Q}.lora_A.weight"
    cases = [({name: tensor for name, tensor in good.items() if name != key}, rf"missing tensor {Q}.lora_A"),
             (good | {key: torch.ones(8, 31)}, rf"tensor {Q}.lora_A has shape \(8, 31\), not \(8, 32\)"),
             (good | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(8, 32)},
              r"unexpected tensor model.layers.7.self_attn.q_proj.lora_A"),
             (good | {"base_model.model.score.weight": torch.ones(1)}, r"unexpected tensor score.weight: .*merge it with PEFT"),
             (good | {key: torch.full((8, 32), torch.nan)}, rf"tensor {Q}.lora_A .* holds NaN"),
             (good | {key: torch.full((8, 32), -torch.inf)}, rf"tensor {Q}.lora_A .* holds NaN, infinity"),
             (good | {key: torch.ones(8, 32).int()}, rf"tensor {Q}.lora_A \(torch.int32\) holds")]
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


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class WritesAFile:
    """Unpickled by a careless reader, it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_absent_and_truncated_adapters_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load_lora(tiny(), tmp_path)
    save_lora(adapted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = file.read_bytes()
    for length in (0, 4, 100, len(content) - 50):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="adapter_model.safetensors: cannot be read"):
            load_lora(tiny(), tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors: not found"):
        load_lora(tiny(), tmp_path)


@pytest.mark.parametrize("write", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, 2))],
                         ids=["torch", "plain pickle"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_code_in_a_bin_file_is_refused_in_one_line_and_never_run(name, write, tmp_path):
    save_lora(adapted(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    if name == "pytorch_model.bin":
        (tmp_path / "adapter_config.json").unlink()
    write({"x": WritesAFile(tmp_path / "created")}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: (cannot be read|refused).*io.open") as error:
        load_lora(tiny(), tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "created").exists()
    pickle.loads(pickle.dumps(WritesAFile(tmp_path / "created"))).close()
    assert (tmp_path / "created").exists()  # so the file does what it threatens


@pytest.mark.parametrize("content", [[torch.ones(1)], {"state_dict": {}}, {1: torch.ones(1)}, torch.ones(1)])
def test_a_bin_file_of_something_else_than_named_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: holds something else than tensors by name"):
        load_lora(tiny(), tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"use_dora": True}, "use_dora True is not supported"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
    ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
    ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices \[1, 2\] is not supported"),
    ({"lora_bias": True}, "lora_bias True is not supported"), ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
    ({"rank_pattern": {"q_proj": 2}}, rf"{Q}.lora_A has shape \(8, 32\), not \(2, 32\) as rank 2 asks"),
    ({"rank_pattern": {"q_proj": True}}, "rank_pattern is .*: it must give a whole number from 1 up for each pattern"),
    ({"rank_pattern": [8]}, r"rank_pattern is \[8\]"),
    ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern is .*nan.*: it must give a finite number"),
    ({"alpha_pattern": {"(q": 3}}, r"alpha_pattern: '\(q' is no regular expression"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),  # its base isn't the stored one
    ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported: 'LORA' is"),
    ({"r": None}, "not a LoRA configuration of PEFT: r is None"),
    ({"r": 0}, "r is 0"), ({"r": True}, "r is True, not a whole number from 1 up"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a finite number"), ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),  # adapts nothing
    ({"lora_dropout": 1}, "lora_dropout is 1, not a number from 0"), ({"use_rslora": "no"}, "use_rslora is 'no'"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"r": 4}, r"adapter_model.safetensors: tensor .*lora_A has shape \(8, 32\), not \(4, 32\) as rank 4 asks"),
])
def test_a_configuration_that_the_tensors_alone_do_not_tell_is_refused_by_name(changes, message, tmp_path):
    save_lora(adapted(), tmp_path)
    edit(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_lora(tiny(), tmp_path)
    assert str(error.value).startswith(str(tmp_path / "adapter_")) and "\n" not in str(error.value)
    assert ("not supported" in str(error.value)) == ("merge it with PEFT first, PeftModel.from_pretrained" in str(error.value))
    for text, reason in (("[1]", "holds a list, not a JSON object"), ("{", "not JSON")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"adapter_config.json: {reason}"):
            load_lora(tiny(), tmp_path)


def test_what_peft_stores_beside_lora_and_a_double_wrapping_are_refused_by_name(tmp_path):
    theirs = in_transformers(tiny(), tmp_path / "base")
    for settings in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], **settings)
        peft.get_peft_model(in_transformers(tiny(), tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match=f"{next(iter(settings))} .* is not supported"):
            load_lora(tiny(), tmp_path / "adapter")
        edit(tmp_path / "adapter" / "adapter_config.json", use_dora=False, modules_to_save=None)  # it lies
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({name: tensor + ("lm_head" in name) for name, tensor in load_file(file).items()}, file)  # as if trained
        with pytest.raises(ValueError, match="unexpected tensor .*(lora_magnitude_vector|lm_head).*merge it with PEFT first"):
            load_lora(tiny(), tmp_path / "adapter")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    tensors = peft.get_peft_model_state_dict(theirs)
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
              tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="base_model.model.base_model.model.model.layers.0.* is wrapped twice"):
        load_lora(tiny(), tmp_path / "adapter")


@pytest.mark.parametrize("content", [{}, {"v_head.summary.weight": torch.ones(1, 32)},
                                     {"base_model.model.score.weight": torch.ones(1)}])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin"])
def test_a_file_that_adapts_nothing_is_no_adapter(name, content, tmp_path):
    save_lora(adapted(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    if name == "pytorch_model.bin":
        (tmp_path / "adapter_config.json").unlink()
    (save_file if name.endswith("s") else torch.save)(content, tmp_path / name)
    for model in (tiny(), add_lora(tiny())):
        before = weights(model)
        with pytest.raises(ValueError, match=f"{name}: holds no adapter"):
            load_lora(model, tmp_path)
        assert same(weights(model), before)


def test_a_whole_model_is_no_adapter(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "pytorch_model.bin")  # every tensor is the base's own
    with pytest.raises(ValueError, match="pytorch_model.bin: holds no adapter"):
        load_lora(tiny(), tmp_path)


def test_a_fresh_adapter_which_changes_nothing_yet_is_one(tmp_path):
    save_lora(add_lora(tiny()), tmp_path)
    model = tiny()
    load_lora(model, tmp_path)
    assert torch.equal(model(IDS), tiny()(IDS))


PATTERNS = {  # first match counts, keys are regular expressions for a name or its end
    "ends": ({"down_proj": 2, "1.self_attn.q_proj": 6}, {"self_attn.q_proj": 3, "1.mlp.down_proj": 10}),
    "whole names": ({f"^{Q}": 1}, {Q.replace(".0.", ".1."): 24.5}),
    "expressions": ({r"model\.layers\.[1-9]\..*": 3, "q_proj": 5}, {".*q_proj": 2, r"layers\.0.*": 7}),
    "no match": ({"proj": 2, "q": 3}, {"attn": 1}),
}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", PATTERNS)
def test_ranks_and_alphas_of_single_layers_are_pefts_loaded_and_saved_again(kind, use_rslora, tmp_path):
    ranks, alphas = PATTERNS[kind]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=use_rslora,
                             rank_pattern=ranks, alpha_pattern=alphas, init_lora_weights=False)
    theirs = peft.get_peft_model(in_transformers(tiny(), tmp_path / "base"), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = tiny()
    load_lora(model, tmp_path / "adapter")
    found = {f"base_model.model.{name}": (layer.rank, layer.scaling) for name, layer in lora_layers(model).items()}
    assert found == {name: (layer.r["default"], pytest.approx(layer.scaling["default"]))
                     for name, layer in theirs.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    assert len({size for size, _ in found.values()}) == (1 if kind == "no match" else len(ranks) + 1)
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    save_lora(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(in_transformers(tiny(), tmp_path / "base"), tmp_path / "again").eval()
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    load_lora(model, tmp_path / "again")  # into a model that has them, each rank in its place
    torch.testing.assert_close(merge_lora(model)(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_layers_that_are_scaled_in_two_ways_are_saved_as_one_adapter_of_peft(tmp_path):
    model = adapted(rank=4, alpha=12)
    for index, layer in enumerate(lora_layers(model).values()):
        layer.set_scaling(3, use_rslora=index % 2 == 1)
    save_lora(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(in_transformers(tiny(), tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_the_copy_of_the_output_layer_that_peft_stores_is_passed_over_where_it_is_the_bases(tied, tmp_path):
    theirs = in_transformers(tiny(tie_word_embeddings=tied), tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    file, copy = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(file)
    model = tiny(tie_word_embeddings=tied)
    assert copy in tensors and load_lora(model, tmp_path / "adapter") == {}
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    rounded = tiny(tie_word_embeddings=tied).to(torch.bfloat16)
    load_lora(rounded, tmp_path / "adapter")  # the copy is float32
    assert len(lora_layers(rounded)) == 3
    for wrong in (tensors[copy] + 1, tensors[copy][1:].clone()):  # trained, or of a vocabulary that was resized
        save_file(tensors | {copy: wrong}, file)
        with pytest.raises(ValueError, match="adapter_model.safetensors: unexpected tensor lm_head.weight: .*merge it with PEFT"):
            load_lora(tiny(tie_word_embeddings=tied), tmp_path / "adapter")


def test_an_adapter_of_the_embedding_is_refused_with_the_way_out(tmp_path):
    theirs = in_transformers(tiny(), tmp_path / "base")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="unexpected tensor model.embed_tokens.lora_embedding_A.*merge it with PEFT first"):
        load_lora(tiny(), tmp_path / "adapter")


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]},
                                      {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_the_way_out_that_a_refusal_names_gives_the_models_logits(settings, tmp_path):
    torch.manual_seed(0)
    in_transformers(tiny(), tmp_path / "base")
    theirs = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"),
                                 peft.LoraConfig(r=4, target_modules=["q_proj"], **settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"merge it with PEFT first, PeftModel.from_pretrained\(base, adapter\)"):
        load_lora(tiny(), tmp_path / "adapter")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "way out")
    merged = Llama.from_pretrained(tmp_path / "way out")
    torch.testing.assert_close(merged(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged(IDS), tiny()(IDS), atol=1e-2)


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


def test_stored_adapters_can_be_read_by_whoever_may_read_the_folder(tmp_path):
    save_lora(adapted(), tmp_path)
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode}


# --- the fast paths and their slow twins ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_low_rank_update_and_its_gradients_are_those_of_plain_autograd(dropout, dtype, tolerance):
    draw = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(*shape, generator=draw) for shape in ((3, 5, 16), (2, 16), (7, 2)))
    x, weights = x.to(dtype), torch.randn(3, 5, 7, generator=draw)
    fast, plain = ([t.clone().requires_grad_() for t in (x, A, B)] for _ in range(2))
    torch.manual_seed(3)
    found = LowRank.apply(*fast, 8.0, dropout)
    torch.manual_seed(3)
    kept = keep_mask(x, dropout) / (1 - dropout)
    expected = 8.0 * F.linear(F.linear(plain[0].float() * kept, plain[1]), plain[2])
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad.float(), atol=30 * tolerance, rtol=10 * tolerance)


def test_adapters_train_under_autocast_with_the_gradients_of_float32():
    """Mixed precision rounds the base's products, never the adapters'; a backward pass inside the context is legal too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    add_lora(model, rank=2, dropout=0.0, targets=["0", "1"])
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, 16)

    def gradients(autocast, backward_inside):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
            loss = out.float().square().mean()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        return [p.grad.clone() for p in lora_parameters(model)]

    exact = gradients(False, False)
    for inside in (False, True):
        for gradient, expected in zip(gradients(True, inside), exact, strict=True):
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, expected, atol=0.03 * expected.abs().max().item(), rtol=0.1)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_the_dropout_mask_drops_the_share_that_was_asked_for_anywhere(dropout):
    torch.manual_seed(0)
    mask = keep_mask(torch.empty(300, 1001), dropout).float()  # 300300 elements, no multiple of what is drawn at once
    error = 5 * (dropout * (1 - dropout) / 300300) ** 0.5
    assert abs(mask.mean() - (1 - dropout)) < error
    assert (mask.mean(0) - (1 - dropout)).abs().max() < 17 * error * 300 ** 0.5  # nor is any column special
    for lane in range(4):  # four masks come from one 64-bit draw: all of its bits must be random
        assert abs(mask.flatten()[lane::4].mean() - (1 - dropout)) < 2.5 * error
    neighbours = torch.corrcoef(torch.stack((mask.flatten()[:-1], mask.flatten()[1:])))[0, 1]
    assert abs(neighbours) < 5 / 300300 ** 0.5


def test_dropout_follows_torchs_seed_and_only_that():
    x = torch.empty(50, 50)
    torch.manual_seed(1)
    first = keep_mask(x, 0.5)
    assert not torch.equal(first, keep_mask(x, 0.5))
    torch.manual_seed(1)
    assert torch.equal(first, keep_mask(x, 0.5))


def test_cast_adapters_keep_an_update_that_folding_into_bf16_weights_loses():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    add_lora(model, targets=["0"], dropout=0.0)
    with torch.no_grad():
        model[0].lora_B.normal_(std=1e-5)
    x = torch.randn(8, 64).to(torch.bfloat16)
    update = LowRank.apply(x, model[0].lora_A, model[0].lora_B, model[0].scaling, 0.0).to(torch.bfloat16)
    base = model[0].weight.detach().clone()
    with lora_cast(model), torch.no_grad():
        A, B = model[0].cast
        torch.testing.assert_close(F.linear(F.linear(x, A), B), update.detach(), rtol=0.03, atol=1e-6)
        torch.testing.assert_close(model(x), F.linear(x, base) + update)
    assert model[0].cast is None
    merge_lora(model)
    lost = (model[0].weight == base).float().mean()
    assert lost > 0.9, "folding would do as well"
