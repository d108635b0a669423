"""The memory plan counts what the models really hold."""

from dataclasses import replace

import pytest
import torch

import train
from lora import add_lora, lora_parameters
from model import Llama, LlamaConfig
from ppo import PPOConfig
from training import plan
from training.config import RunConfig

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_adapters_are_counted_to_the_last_number(tied):
    config = LlamaConfig(tie_word_embeddings=tied, **SMALL)
    model = Llama(config)
    assert plan.parameters(config) == sum(p.numel() for p in model.parameters())
    for targets in (QKVO, ("q_proj", "gate_proj", "down_proj")):
        adapters = lora_parameters(add_lora(Llama(config), rank=5, targets=targets))
        assert plan.adapter_parameters(config, targets, 5) == sum(p.numel() for p in adapters)


def test_llama_7b_is_12_5_gib_in_bf16():
    assert plan.parameters(LlamaConfig.llama_7b()) == 6_738_415_616


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_what_autograd_keeps(dtype, dropout):
    config = LlamaConfig(**SMALL)
    model = add_lora(Llama(config).to(dtype), dropout=dropout).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(3, 50, (4, 30))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(ids, None)
    found = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own) / ids.numel() / 3
    counted = plan.activations(config, QKVO, 8, dtype.itemsize, cpu=True, dropout=dropout > 0, full=False)
    assert counted == pytest.approx(found, rel=0.1)  # RoPE's tables, attention's sums and the last norm are left out


def total(**changes):
    config = LlamaConfig.llama_7b()
    run = RunConfig(**{"policy_device": "cuda:0", "reference_device": "cuda:0"} | changes)
    return {device: sum(items.values()) / plan.GIB for device, items in plan.plan(run, config, config).items()}


def test_llama_7b_in_the_papers_setting_counted_by_hand():
    """Rank 8 on q, k, v, o; micro-batches of 8 rows of 192 + 300 tokens; bf16 takes 2 bytes, float32 4."""
    config = LlamaConfig.llama_7b()
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    frozen = 2 * 2 * weights                        # policy's and value's base, 25.1 GiB
    adapters = 2 * 32 * 4 * 8 * (4096 + 4096)       # A and B of both
    layer = (2 * 2 * 4096 + 2 * 4096                # inputs of two norms, and what q, k, v read
             + 2 * 3 * 4096 + 2 * 4096              # attention: q, k, v; what o reads
             + 2 * 3 * 11008                        # SwiGLU
             + 4 * 4 * 8 + 4 * 4096)                # A h, and a byte an input for dropout
    passing = 6 * 2 * 11008 + 16 * 4096             # gradients inside one layer
    by_hand = {"frozen weights": frozen, "adapters": 4 * adapters, "gradients and Adam": 12 * adapters,
               "activations": 8 * 492 * (32 * layer + passing), "logits and gradient": 2 * 2 * 8 * 300 * 32000}
    one = RunConfig(policy_device="cuda:0", reference_device="cuda:0")
    assert plan.plan(one, config, config) == {"cuda:0": by_hand}
    two = plan.plan(replace(one, reference_device="cuda:1"), config, config)
    assert two["cuda:0"] == by_hand and two["cuda:1"]["frozen weights, reference and reward"] == frozen
    released = plan.plan(replace(one, reference_device="cuda:1", reference_dtype="float32"), config, config)
    assert released["cuda:1"]["frozen weights, reference and reward"] == 2 * 4 * weights


def test_full_tuning_of_llama_7b_fits_no_80_gb_gpu():
    """16 bytes a weight of policy and value (float32, its gradient, two moments) alone are more than two such GPUs hold."""
    assert total()["cuda:0"] < 80e9 / plan.GIB
    assert total(tuning="full")["cuda:0"] > 2 * 16 * 6_738_415_616 / plan.GIB > 2 * 80e9 / plan.GIB


def test_every_knob_that_is_advised_saves_memory():
    whole = total()["cuda:0"]
    assert total(gradient_checkpointing=True)["cuda:0"] < whole
    assert total(ppo=PPOConfig(micro_batch_size=4))["cuda:0"] < whole
    assert total(dtype="float32")["cuda:0"] > whole


def test_plan_is_printed_before_anything_is_loaded_or_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--plan", "--out", str(tmp_path / "run"), "--policy-device", "cpu",
                                     "--reference-device", "cpu"])
    monkeypatch.setattr(train, "build_models", lambda *_: pytest.fail("loaded the models"))
    assert train.main() == 0
    printed = capsys.readouterr().out
    assert "cpu: " in printed and "frozen weights" in printed and "--micro-batch-size 16" in printed and "on 2 GPUs" in printed
    assert not (tmp_path / "run").exists()
