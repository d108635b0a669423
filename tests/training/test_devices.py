"""The paper's placement, without its GPUs: policy and value on cuda:0, reference and reward model on cuda:1.

Fake tensors have a device and a shape but no numbers, so a tensor on the wrong GPU fails here as it would there.
"""

import pytest
import torch
from conftest import SIZES, place
from runs import configured
from torch._subclasses.fake_tensor import FakeTensor

import ppo
import train
from divergences import ESTIMATORS, true_kl
from lora import add_lora, lora_disabled
from model import Llama, LlamaConfig, ValueModel
from reward import RewardModel

V, EOS = 40, 2


def llama(rows: int = V) -> Llama:
    return Llama(LlamaConfig(vocab_size=rows, **SIZES))


def adapted_value() -> ValueModel:
    return ValueModel(add_lora(llama()))


def read_by_all(actors: ppo.Actors) -> tuple[dict, torch.Tensor]:
    """(what the four models say of two responses of three tokens to prompts of four, mask), all on the policy's device.

    Nothing is trimmed to the longest row: that would read a number back, and fake tensors have none.
    """
    device = actors.policy_device
    prompts, responses = (torch.zeros(2, n, dtype=torch.long, device=device) for n in (4, 3))
    mask = ppo.response_mask(responses, EOS)
    batch = prompts, torch.ones_like(prompts), responses, mask
    scored = ppo.score_trained(actors, ppo.pack(*batch), 0.7)
    frozen = ppo.score_frozen(actors, ppo.pack(*batch), *ppo.join(*batch), 0.7)
    assert devices(frozen.values()) == {actors.reference_device}
    return scored | {name: x.to(device) for name, x in frozen.items()}, mask


def score(policy_device: str, reference_device: str, reward_on: str) -> tuple[dict, torch.Tensor]:
    """The same of models placed so."""
    policy, value = place(lambda: add_lora(llama()), policy_device), place(adapted_value, policy_device)
    reference, reward = place(llama, reference_device), place(lambda: RewardModel(llama()), reward_on)
    return read_by_all(ppo.Actors(
        lambda ids, attention, keep: policy(ids, attention, logits_to_keep=keep), value,
        lambda ids, attention, keep: reference(ids, attention, logits_to_keep=keep),
        lambda ids, attention, n: reward(ids, attention), None, EOS, 0, policy_device, reference_device))


def devices(tensors) -> set[str]:
    return {str(tensor.device) for tensor in tensors}


def test_four_models_on_two_gpus_score_a_rollout_and_all_results_come_to_the_policys(two_gpus):
    scored, _ = score(*two_gpus, reward_on="cuda:1")
    assert all(isinstance(x, FakeTensor) for x in scored.values())
    assert devices(scored.values()) == {"cuda:0"}
    assert {name: tuple(x.shape) for name, x in scored.items()} == {
        "logprobs": (2, 3), "ref_logprobs": (2, 3), "values": (2, 3), "scores": (2,)}


def test_both_losses_are_computed_on_the_policys_gpu(two_gpus):
    scored, mask = score(*two_gpus, reward_on="cuda:1")
    logprobs, values = scored["logprobs"], scored["values"]
    for penalty in ESTIMATORS.values():
        rewards = ppo.shape_rewards(scored["scores"], penalty(logprobs, scored["ref_logprobs"]), mask, beta=0.02)
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
    """The wiring of the real run: the two names at the top of train.py, models built there, their callables."""
    from formats.tokenizer import load_tokenizer
    from training import models as training_models
    from training.config import build_config

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, a: tensor)  # fake tensors draw no numbers
    monkeypatch.setattr(Llama, "from_pretrained", lambda path, dtype, device, progress, part: place(lambda: llama(600), device))
    monkeypatch.setattr(RewardModel, "from_pretrained",
                        lambda path, dtype, device, part: place(lambda: RewardModel(llama(600)), device))
    run = build_config({"policy": str(world / "sft"), "reward": str(world / "reward"), "data": "unread", "out": str(tmp_path),
                        "tuning": tuning, "dtype": "float32"})
    train.place(run)
    models = training_models.build_models(run, load_tokenizer(world / "sft"))
    assert not models.shared
    assert devices([*models.policy.parameters(), *models.value.parameters()]) == {"cuda:0"}
    assert devices([*models.rewards.model.parameters(), *models.rewards.model.buffers()]) == {"cuda:1"}
    scored, _ = read_by_all(models.actors(run.ppo))
    assert devices(scored.values()) == {"cuda:0"}


class Pending(torch.Tensor):
    """A number that another GPU still works on: whatever is computed from it is pending too, and to read it back is to wait."""

    trace: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("item", "tolist", "nonzero", "numpy", "equal", "__bool__", "__int__", "__float__", "__index__"):
            cls.trace.append(f"waits: {name}")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_the_second_device_scores_while_the_first_samples_and_nothing_waits_for_it(world, tmp_path, monkeypatch):
    """In order, which is all that a machine without two GPUs can tell: a GPU is told what to do and the program goes on, unless
    it reads a number back. What the second has to read follows each chunk at once, and the next chunk comes without a wait."""
    from data import left_pad, load_instructions, tokenize_prompts
    from formats.tokenizer import load_tokenizer
    from training.models import build_models

    run = configured(world, tmp_path / "run", reference_device="cpu:0", response_length=4)
    tokenizer = load_tokenizer(world / "sft")
    prompts = tokenize_prompts(load_instructions(run.data), tokenizer, run.prompt_template, run.query_length, "--query-length")
    models = build_models(run, tokenizer)
    actors, trace = models.actors(run.ppo), []
    models.asked.now(prompts.ids[:8], prompts.examples[:8])
    monkeypatch.setattr(Pending, "trace", trace)

    def on_the_first(*batch, generate=actors.generate):
        trace.append("samples")
        return generate(*batch)

    def on_the_second(what, call):
        def told(ids, mask, n):
            trace.append(what)
            return call(ids.as_subclass(Pending), mask.as_subclass(Pending), n)

        return told

    actors.generate = on_the_first
    actors.reference, actors.reward = on_the_second("reference", actors.reference), on_the_second("reward", actors.reward)
    with torch.no_grad():
        scored = ppo.sample_and_score(actors, *left_pad(prompts.ids[:8], tokenizer.pad_token_id), run.ppo, lambda phase, n: None)
    a_chunk = ["samples", "reference", "reward", "reference", "reward"]  # of four, read two at a time
    assert trace == a_chunk + a_chunk
    assert isinstance(scored["ref_logprobs"], Pending) and isinstance(scored["scores"], Pending)  # to the end
    scored["scores"].tolist()
    assert trace[-1] == "waits: tolist"  # it would have been seen
