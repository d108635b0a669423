"""The paper's placement, without its GPUs: policy and value on cuda:0, reference and reward model on cuda:1.

Fake tensors have a device and a shape but no numbers, so a tensor on the wrong GPU fails here as it would there.
"""

import pytest
import torch
from conftest import SIZES
from torch._subclasses.fake_tensor import FakeTensor

import ppo
from divergences import ESTIMATORS, true_kl
from lora import add_lora, lora_disabled
from model import Llama, LlamaConfig, ValueModel
from reward import RewardModel

V, EOS = 40, 2


def place(build, device: str) -> torch.nn.Module:
    """The model with fake weights on `device`."""
    with torch.device("meta"):
        model = build()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    return model


def llama(rows: int = V) -> Llama:
    return Llama(LlamaConfig(vocab_size=rows, **SIZES))


def adapted_value() -> ValueModel:
    return ValueModel(add_lora(llama()))


def score(policy_device: str, reference_device: str, reward_on: str) -> tuple[dict, torch.Tensor]:
    """(what ppo.score says, mask), with two responses of three tokens to left-padded prompts of four."""
    policy, value = place(lambda: add_lora(llama()), policy_device), place(adapted_value, policy_device)
    reference, reward = place(llama, reference_device), place(lambda: RewardModel(llama()), reward_on)
    prompts = torch.zeros(2, 4, dtype=torch.long, device=policy_device)
    responses = torch.zeros(2, 3, dtype=torch.long, device=policy_device)
    mask = ppo.response_mask(responses, EOS)
    said = ppo.score(lambda ids, attention, keep: policy(ids, attention, logits_to_keep=keep), value,
                     lambda ids, attention, keep: reference(ids, attention, logits_to_keep=keep),
                     lambda ids, attention, n: reward(ids, attention),
                     prompts, torch.ones_like(prompts), responses, mask, temperature=0.7,
                     policy_device=policy_device, reference_device=reference_device)
    return said, mask


def devices(tensors) -> set[str]:
    return {str(tensor.device) for tensor in tensors}


def test_four_models_on_two_gpus_score_a_rollout_and_all_results_come_to_the_policys(two_gpus):
    said, _ = score(*two_gpus, reward_on="cuda:1")
    assert all(isinstance(x, FakeTensor) for x in said.values())
    assert devices(said.values()) == {"cuda:0"}
    assert {name: tuple(x.shape) for name, x in said.items()} == {
        "logprobs": (2, 3), "ref_logprobs": (2, 3), "values": (2, 3), "scores": (2,)}


def test_both_losses_are_computed_on_the_policys_gpu(two_gpus):
    said, mask = score(*two_gpus, reward_on="cuda:1")
    logprobs, values = said["logprobs"], said["values"]
    for penalty in ESTIMATORS.values():
        rewards = ppo.shape_rewards(said["scores"], penalty(logprobs, said["ref_logprobs"]), mask, beta=0.02)
        advantages, returns = ppo.gae(ppo.whiten(rewards, mask, shift_mean=False), values, mask)
        actor, actor_stats = ppo.policy_loss(logprobs, logprobs, ppo.whiten(advantages, mask), mask)
        critic, critic_stats = ppo.value_loss(values, values, returns, mask)
        found = [actor + 0.1 * critic, *actor_stats.values(), *critic_stats.values()]
        assert devices(found) == {"cuda:0"} and {x.shape for x in found} == {torch.Size([])}


def test_the_true_kl_is_computed_where_the_policys_logits_are(two_gpus):
    first, second = two_gpus
    logits, ref_logits = (torch.empty(2, 3, V, device=device) for device in (first, second))
    assert str(true_kl(logits, ref_logits.to(first)).device) == first
    with pytest.raises(RuntimeError, match="cuda:0 and cuda:1"):
        true_kl(logits, ref_logits)


def test_a_reward_model_on_the_wrong_gpu_is_noticed(two_gpus):
    """The proof that the tests above can fail: everything else stays as it was."""
    with pytest.raises(RuntimeError, match="same device.*cuda"):
        score(*two_gpus, reward_on="cuda:0")


def test_a_value_head_on_the_wrong_gpu_is_noticed(two_gpus):
    first, second = two_gpus
    value = place(adapted_value, first)
    value.head = place(lambda: torch.nn.Linear(SIZES["hidden_size"], 1), second)
    ids = torch.zeros(2, 4, dtype=torch.long, device=first)
    with pytest.raises(RuntimeError, match="same device.*cuda"):
        value(ids, torch.ones_like(ids))


def test_an_index_on_the_wrong_gpu_is_noticed(two_gpus):
    first, second = two_gpus
    hidden, rows = torch.empty(2, 7, 16, device=first), torch.zeros(2, dtype=torch.long, device=first)
    assert hidden[rows, rows].shape == (2, 16)
    with pytest.raises(RuntimeError, match="index on cuda:1"):
        hidden[rows, rows.to(second)]


def test_an_adapter_can_be_switched_off_where_it_is(two_gpus):
    """One GPU's reference: the policy's own weights."""
    first, _ = two_gpus
    policy = place(lambda: add_lora(llama()), first)
    ids = torch.zeros(2, 4, dtype=torch.long, device=first)
    with lora_disabled(policy):
        assert str(policy(ids, torch.ones_like(ids)).device) == first


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_train_py_itself_places_the_models_so(world, tmp_path, two_gpus, monkeypatch, tuning):
    """The wiring of the real run: train.build_models on two GPUs, its callables in ppo.score."""
    import train
    from data import load_tokenizer

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, a: tensor)  # fake tensors draw no numbers
    monkeypatch.setattr(train.Llama, "from_pretrained", lambda path, dtype, device, progress: place(lambda: llama(600), device))
    monkeypatch.setattr(train.RewardModel, "from_pretrained",
                        lambda path, dtype, device: place(lambda: RewardModel(llama(600)), device))
    run, _ = train.build_config({"policy": str(world / "sft"), "reward": str(world / "reward"), "data": "unread",
                                 "out": str(tmp_path), "tuning": tuning, "dtype": "float32"})
    models = train.build_models(run, load_tokenizer(world / "sft"), say=lambda line: None)
    assert not models.shared
    assert devices([*models.policy.parameters(), *models.value.parameters()]) == {"cuda:0"}
    assert devices([*models.reward_model.parameters(), *models.reward_model.buffers()]) == {"cuda:1"}
    prompts, responses = (torch.zeros(2, n, dtype=torch.long, device="cuda:0") for n in (4, 3))
    said = ppo.score(models.policy_logits, models.value, models.reference_logits, models.reward, prompts,
                     torch.ones_like(prompts), responses, ppo.response_mask(responses, EOS), temperature=0.7,
                     policy_device=models.policy_device, reference_device=models.reference_device)
    assert devices(said.values()) == {"cuda:0"}
