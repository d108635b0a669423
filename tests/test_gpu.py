"""What must be the same on a GPU as on a CPU: `pytest -m gpu` on a machine that has one (docs/gpu.md).

Without a GPU each test holds the CPU to itself, so that the file can't rot. float32 is compared number by number; a bf16
sum depends on the kernel that adds it up, so that there means are compared.
"""

import shutil
from functools import partial

import pytest
import torch
from conftest import SIZES
from runs import assert_same_run, records, settings, start
from torch._dynamo.utils import counters

import ppo
from divergences import ESTIMATORS, true_kl
from lora import add_lora, keep_mask, lora_disabled, lora_layers, lora_parameters
from model import Llama, LlamaConfig, ValueModel, generate
from training import decode, models
from train import SelfCheckError
from training.devices import compile_layers, gradient_gap
from training.models import folded

pytestmark = pytest.mark.gpu
GPU = "cuda:0" if torch.cuda.is_available() else "cpu"
COMPILER = "inductor" if torch.cuda.is_available() else "aot_eager"  # without a GPU it traces, and needs no C compiler
V = 50


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 would round float32 products to 10 bits; torch's default leaves it off, and so do we."""
    assert not torch.backends.cuda.matmul.allow_tf32


def adapted(dtype: torch.dtype = torch.float32, device: str = "cpu", **fields) -> Llama:
    """The same random model with adapters that are not zero, wherever it is."""
    torch.manual_seed(0)
    model = add_lora(Llama(LlamaConfig(vocab_size=V, **SIZES | fields)), dropout=0.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model.to(device).eval()


def batch(rows: int = 5, width: int = 11, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded token ids and their mask."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=draw)
    mask = (torch.arange(width) >= width - lengths).long()
    return (torch.randint(3, V, (rows, width), generator=draw) * mask).to(device), mask.to(device)


def test_logits_are_the_cpus_in_float32():
    ids, mask = batch()
    with torch.no_grad():
        ours, cpus = adapted(device=GPU)(ids.to(GPU), mask.to(GPU)), adapted()(ids, mask)
    torch.testing.assert_close(ours.cpu(), cpus, atol=1e-4, rtol=1e-4)


def test_logits_are_the_cpus_in_bf16_within_its_rounding():
    ids, mask = batch()
    with torch.no_grad():
        ours = adapted(torch.bfloat16, GPU)(ids.to(GPU), mask.to(GPU)).float().cpu()
        exact = adapted()(ids, mask)
        cpus = adapted(torch.bfloat16)(ids, mask).float()
    error, usual = ((x - exact)[mask.bool()].abs().mean().item() for x in (ours, cpus))
    assert error < 2 * usual + 1e-6  # as far from float32 as the CPU's bf16 is


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_gradients_of_adapters_are_the_cpus(dtype, tolerance):
    def gradient(device: str, dtype: torch.dtype) -> torch.Tensor:
        model = adapted(dtype, device)
        ids, mask = batch(device=device)
        responses = torch.randint(3, V, (5, 6), generator=torch.Generator().manual_seed(1)).to(device)
        text = ppo.pack(ids, mask, responses, torch.ones_like(responses).bool())
        logprobs, _ = ppo.response_logprobs(lambda ids, mask, keep: model(ids, mask, keep), text, 0.7)
        logprobs.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in lora_parameters(model)]).cpu()

    ours, exact = gradient(GPU, dtype), gradient("cpu", torch.float32)
    assert (ours - exact).norm() <= tolerance * exact.norm()


def test_values_start_at_zero_and_their_gradient_is_the_cpus():
    def gradient(device: str) -> torch.Tensor:
        model = ValueModel(adapted(device=device))
        values = model(*batch(device=device))
        assert not values.any()
        (values - 1).square().sum().backward()
        return model.head.weight.grad.cpu()

    torch.testing.assert_close(gradient(GPU), gradient("cpu"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_answers_are_the_cpus_token_for_token(temperature):
    """Greedily, and sampled by the same draws."""
    def answers(device: str) -> list[list[int]]:
        draws = torch.rand(12, 5, generator=torch.Generator().manual_seed(0))
        with folded(model := adapted(device=device)):
            return generate(model, *batch(device=device), 12, temperature=temperature, generator=draws, eos_token_id=2).tolist()

    assert answers(GPU) == answers("cpu")


@pytest.mark.parametrize("rows", [3, 40])
def test_the_sampler_that_replays_gives_what_the_plain_one_gives(rows):
    """Longer than two blocks of columns, with rows that end and leave: several graphs are recorded."""
    model, (ids, mask) = adapted(device=GPU), batch(rows, device=GPU)
    draws = torch.rand(2 * decode.COLUMNS, rows, generator=torch.Generator().manual_seed(0))
    how = dict(generator=draws, eos_token_id=[2, 7], pad_token_id=0, return_logprobs=True)
    with folded(model):
        plain, logprobs = generate(model, ids, mask, len(draws), **how)
        ours, its = decode.sample(model, ids, mask, decode.Choice(**how))
    assert torch.equal(ours, plain) and len({int((row != 0).sum()) for row in plain}) > rows // 3
    torch.testing.assert_close(its, logprobs, atol=1e-4, rtol=0)


def test_sampled_logprobs_are_those_of_the_update():
    model, (ids, mask) = adapted(device=GPU), batch(device=GPU)
    with folded(model):
        responses, logprobs = generate(model, ids, mask, 12, eos_token_id=2, return_logprobs=True)
    real = ppo.response_mask(responses, 2)
    with torch.no_grad():
        text = ppo.pack(ids, mask, responses, real)
        again, _ = ppo.response_logprobs(lambda ids, mask, keep: model(ids, mask, keep), text, 1.0)
    torch.testing.assert_close(ppo.real(logprobs, real), ppo.real(again, real), atol=1e-4, rtol=0)


def test_dropout_keeps_the_share_that_it_should():
    kept = keep_mask(torch.empty(1000, 1001, device=GPU), 0.1).float()
    assert abs(kept.mean().item() - 0.9) < 5 * (0.09 / kept.numel()) ** 0.5
    assert abs(kept[:, ::2].mean().item() - kept[:, 1::2].mean().item()) < 10 * (0.09 / kept.numel()) ** 0.5


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_estimators_and_the_true_kl_are_the_cpus(name):
    draw = torch.Generator().manual_seed(0)
    first, second = (-3 * torch.rand(4, 9, generator=draw) for _ in range(2))
    torch.testing.assert_close(ESTIMATORS[name](first.to(GPU), second.to(GPU)).cpu(), ESTIMATORS[name](first, second))
    torch.testing.assert_close(true_kl(first.to(GPU), second.to(GPU)).cpu(), true_kl(first, second))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_checks_itself_and_resumes_bit_for_bit(world, tmp_path, dtype):
    """Before the first step the ratio is 1 and the reference the policy (train.self_check), or the run would stop."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(settings(world, whole, evaluation=None, policy_device=GPU, reference_device=GPU, dtype=dtype))
    shutil.copytree(whole, cut)
    for step in (2, 3):
        shutil.rmtree(cut / f"step-000{step}")
    assert "resumed from" in start({"out": str(cut)}, resume=True)
    assert_same_run(whole, cut)


def test_a_run_gives_the_cpus_figures_in_float32(world, tmp_path):
    """Draws come from the device's own generator, so that samples differ; what the same policy is worth does not."""
    def first_step(name: str, device: str) -> dict:
        out = tmp_path / name
        start(settings(world, out, policy_device=device, reference_device=device, dtype="float32", steps=1))
        return records(out / "evaluations.jsonl")[0]

    ours, cpus = first_step("ours", GPU), first_step("cpus", "cpu")
    assert ours["n"] == cpus["n"] and ours["true_kl"] == pytest.approx(0, abs=1e-6)
    assert abs(ours["reward"] - cpus["reward"]) < 5 * (ours["reward_se"] + cpus["reward_se"])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_models_stand_on_two_devices_where_there_are_two(world, tmp_path, tuning):
    """Two GPUs, else the GPU and the CPU, else the CPU by two names."""
    second = "cuda:1" if torch.cuda.device_count() > 1 else "cpu" if GPU != "cpu" else "cpu:0"
    places = dict(policy_device=GPU, reference_device=second)
    start(settings(world, tmp_path / "run", evaluation=None, dtype="float32", tuning=tuning, **places))
    assert len(records(tmp_path / "run" / "metrics.jsonl")) == 3
    assert all(m["kl_k1"] == m["kl_k1"] for m in records(tmp_path / "run" / "metrics.jsonl"))


def test_recomputed_activations_give_the_same_run(world, tmp_path):
    for name, more in (("plain", {}), ("recomputed", {"gradient_checkpointing": True})):
        start(settings(world, tmp_path / name, evaluation=None, policy_device=GPU, reference_device=GPU, dtype="float32", **more))
    plain, recomputed = (records(tmp_path / name / "metrics.jsonl") for name in ("plain", "recomputed"))
    assert [m["score_mean"] for m in plain] == pytest.approx([m["score_mean"] for m in recomputed], abs=1e-4)


def test_compiled_layers_compute_what_the_plain_ones_do():
    """Logits and gradients, padded and not, of several lengths, with adapters, without, and sampled."""
    counters.clear()
    plain, compiled = adapted(device=GPU), adapted(device=GPU)
    compile_layers(compiled, COMPILER)
    for rows, width in ((5, 11), (4, 9)):
        ids, mask = batch(rows, width, GPU)
        losses, gradients = {}, {}
        for model in (plain, compiled):
            losses[model] = model(ids, mask).logsumexp(-1)[mask.bool()].mean()
            gradients[model] = torch.autograd.grad(losses[model], lora_parameters(model))
        torch.testing.assert_close(losses[compiled], losses[plain])
        torch.testing.assert_close(gradients[compiled], gradients[plain], atol=1e-5, rtol=1e-3)
        with torch.no_grad(), lora_disabled(plain), lora_disabled(compiled):
            torch.testing.assert_close(compiled(ids, mask), plain(ids, mask), atol=1e-4, rtol=1e-4)
        draws = torch.rand(6, rows, device=GPU)
        assert torch.equal(*(generate(model, ids, mask, 6, generator=draws, eos_token_id=2) for model in (plain, compiled)))
    assert 0 < counters["stats"]["unique_graphs"] < 8 and not counters["graph_break"]  # a layer in one piece, for all lengths


def test_a_compiled_run_gives_the_plain_ones_figures(world, tmp_path, monkeypatch):
    """Without dropout, which is drawn in another order there. Policy, reference, value and reward model."""
    monkeypatch.setattr(models, "compile_layers", partial(compile_layers, backend=COMPILER))
    for name, compiled in (("plain", False), ("compiled", True)):
        start(settings(world, tmp_path / name, evaluation=None, policy_device=GPU, reference_device=GPU, dtype="float32",
                       lora_dropout=0.0, compile=compiled))
    plain, compiled = (records(tmp_path / name / "metrics.jsonl") for name in ("plain", "compiled"))
    for name in ("score_mean", "value_loss", "policy_loss", "kl_k3"):
        assert [m[name] for m in compiled] == pytest.approx([m[name] for m in plain], rel=1e-3, abs=1e-4)


def halving(graph, inputs):
    """A compiler whose graphs compute what they should and hand back half of each gradient."""
    return lambda *args: [x / 2 + (x / 2).detach() for x in graph(*args)]


@pytest.mark.parametrize("backend, expected", [("eager", 0.0), (halving, 1 - 1 / 4)])  # two layers: each halves what passes
def test_wrong_gradients_of_a_compiler_are_seen_by_what_reaches_the_first_layer(backend, expected):
    model = adapted(device=GPU)
    compile_layers(model, backend)
    ids, mask = batch(device=GPU)
    gap = gradient_gap(model, lambda: model(ids, mask).logsumexp(-1)[mask.bool()].mean())
    assert gap == pytest.approx(expected, abs=1e-5)


def test_a_run_stops_before_its_first_update_where_compiled_gradients_are_wrong(world, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "compile_layers", partial(compile_layers, backend=halving))
    with pytest.raises(SelfCheckError, match="gradients of compiled layers off by 7.5e-01"):
        start(settings(world, tmp_path / "run", evaluation=None, policy_device=GPU, reference_device=GPU, dtype="float32",
                       compile=True))


def test_compiled_dropout_keeps_the_share_that_it_should():
    compiled = torch.compile(keep_mask, backend=COMPILER)
    first, second = (compiled(torch.empty(1000, 1000, device=GPU), 0.1) for _ in range(2))
    assert first.dtype == torch.uint8 and set(first.unique().tolist()) == {0, 1}
    assert first.float().mean().item() == pytest.approx(0.9, abs=2e-3) and not torch.equal(first, second)
