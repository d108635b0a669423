"""The memory plan counts what the models really hold."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import train
from bench import on_paper
from bench.shapes import SHAPES
from lora import add_lora, lora_parameters
from model import Llama, LlamaConfig, ValueModel
from ppo import PPOConfig
from reward import RewardModel
from training import memory, plan
from training.config import RunConfig, build_config, build_parser
from training.models import second_model

ONE_GPU = {"policy_device": "cuda:0", "reference_device": "cuda:0"}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_adapters_are_counted_to_the_last_number(tied):
    config = LlamaConfig(tie_word_embeddings=tied, **SMALL)
    model = Llama(config)
    assert memory.parameters(config) == sum(p.numel() for p in model.parameters())
    for targets in (QKVO, ("q_proj", "gate_proj", "down_proj")):
        adapters = lora_parameters(add_lora(Llama(config), rank=5, targets=targets))
        assert memory.adapter_parameters(config, targets, 5) == sum(p.numel() for p in adapters)


def test_llama_7b_is_12_5_gib_in_bf16():
    assert memory.parameters(LlamaConfig.llama_7b()) == 6_738_415_616


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
    counted = memory.activations(config, QKVO, 8, dtype.itemsize, cpu=True, dropout=dropout > 0, full=False)
    assert counted == pytest.approx(found, rel=0.1)  # RoPE's tables, attention's sums and the last norm are left out


def total(**changes):
    config = LlamaConfig.llama_7b()
    run = RunConfig(**ONE_GPU | changes)
    return {device: sum(items.values()) / memory.GIB for device, items in memory.plan(run, config, config).items()}


def test_llama_7b_in_the_papers_setting_counted_by_hand():
    """Rank 8 on q, k, v, o; micro-batches of 8 rows of 192 + 300 tokens; bf16 takes 2 bytes, float32 4."""
    config = LlamaConfig.llama_7b()
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    two_models = 2 * weights - 32000 * 4096         # a reward model's output layer is its embedding
    frozen = 2 * two_models                         # policy's and value's base, 24.9 GiB
    adapters = 2 * 32 * 4 * 8 * (4096 + 4096)       # A and B of both
    layer = (2 * 2 * 4096 + 2 * 4096                # inputs of two norms, and what q, k, v read
             + 2 * 3 * 4096 + 2 * 4096              # attention: q, k, v; what o reads
             + 2 * 3 * 11008                        # SwiGLU
             + 4 * 4 * 8 + 4 * 4096)                # A h, and a byte an input for dropout
    passing = 6 * 2 * 11008 + 16 * 4096             # gradients inside one layer
    by_hand = {"frozen weights": frozen, "adapters": 4 * adapters, "gradients and Adam": 12 * adapters,
               "activations": 8 * 492 * (32 * layer + passing), "logits and gradient": 2 * 2 * 8 * 300 * 32000 + 4 * 4 * 2**24}
    one = RunConfig(**ONE_GPU)
    assert memory.plan(one, config, config) == {"cuda:0": by_hand}
    two = memory.plan(replace(one, reference_device="cuda:1"), config, config)
    assert two["cuda:0"] == by_hand and two["cuda:1"]["frozen weights, reference and reward"] == frozen
    released = memory.plan(replace(one, reference_device="cuda:1", reference_dtype="float32"), config, config)
    assert released["cuda:1"]["frozen weights, reference and reward"] == 4 * two_models


def test_full_tuning_of_llama_7b_fits_no_80_gb_gpu():
    """16 bytes a weight of policy and value (float32, its gradient, two moments) alone are more than two such GPUs hold."""
    assert total()["cuda:0"] < 80e9 / memory.GIB
    assert total(tuning="full")["cuda:0"] > 2 * 16 * 6_738_415_616 / memory.GIB > 2 * 80e9 / memory.GIB


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


# ------------------------------------------------------------------------------------------------------- several GPUs


LLAMA = {"7B": SHAPES["llama-7b"](), "13B": SHAPES["llama-13b"](), "70B": SHAPES["llama3-70b"]()}


def test_frozen_weights_are_counted_as_often_as_they_stand_in_memory(tmp_path):
    """A stored reward model has no output layer; where the reward is a rule the value model stands on the policy's weights."""
    config = LlamaConfig(**SMALL)
    policy = Llama(config)
    RewardModel(Llama(config)).save_pretrained(tmp_path / "reward")
    reward = RewardModel.from_pretrained(tmp_path / "reward").backbone

    def frozen(run, *models):
        found = {p.data_ptr(): p.numel() for model in models for p in model.parameters()}
        assert memory.plan(run, config, config)["cuda:0"]["frozen weights"] == 2 * sum(found.values())

    frozen(RunConfig(**ONE_GPU), policy, reward)
    frozen(RunConfig(reward="rules.py:brief", **ONE_GPU), policy, ValueModel(second_model(policy, own_weights=False)).backbone)


def test_a_sharded_run_counted_by_hand():
    """Two GPUs, bf16; a layer has 7,744 weights, the policy 26,464, the reward model without output layer 24,864."""
    config = LlamaConfig(**SMALL)
    ppo = PPOConfig(response_length=3, rollout_micro_batch_size=4, micro_batch_size=1)
    run = RunConfig(query_length=2, ppo=ppo, **ONE_GPU)
    adapters = 2 * 3 * 8 * (64 + 48 + 48 + 64)
    held = {"frozen weights": 2 * (26_464 + 24_864) // 2, "adapters": 4 * adapters, "gradients and Adam": 12 * adapters,
            "roots of the models, whole": 2 * (32 + 32 + 50 * 32)}  # two norms, and the reward model's embedding
    sampling = {"adapted weights, folded": 0, "keys and values": 2 * 3 * 16 * 4 * 5 * 2, "logits": 18 * 4 * 50,
                "prompts": 4 * 2 * (3 * 2 * 48 + 8 * 32), "policy, put together": 2 * (26_464 - 32)}
    kept = 2 * 2 * 32 + 2 * 32 + 2 * (32 + 2 * 16) + 2 * 32 + 3 * 2 * 48 + 4 * 8 * 4 + 4 * 32
    update = {"activations": 5 * (3 * kept + 6 * 2 * 48 + 16 * 32), "logits and gradient": (2 * 2 + 4 * 4) * 3 * 50,
              "two units of weights, whole": 2 * 2 * 7_744}
    assert memory.plan(run, config, config, share=2, ranks=2) == {"cuda:0": held | sampling}
    assert memory.plan(run, config, config, share=2, whole=False, ranks=2) == {"cuda:0": held | update}


@pytest.mark.parametrize("changes", [{}, {"dtype": "float32"}, {"reference_dtype": "float32"}])
def test_shares_halve_the_frozen_weights_and_whole_takes_no_less_than_in_step(changes):
    config = LLAMA["7B"]  # sampling needs more than an update does
    run = RunConfig(ppo=PPOConfig(micro_batch_size=1), gradient_checkpointing=True, **ONE_GPU | changes)

    def items(share, whole=False):
        return memory.plan(run, config, config, share, whole, ranks=2)["cuda:0"]

    for name in [name for name in items(1) if name.startswith("frozen")]:
        assert [items(1)[name] / items(share)[name] for share in (2, 4, 8)] == [2, 4, 8]
    assert all(sum(items(share, whole=True).values()) >= sum(items(share).values()) for share in (2, 4, 8))
    # Only weights that are put together can have adapters folded into them.
    assert bool(items(2, whole=True).get("adapted weights, folded")) == (changes.get("dtype") == "float32")
    assert not items(2).get("adapted weights, folded")


def test_processes_share_the_rollout_and_add_gradients_up_in_one_piece():
    config = LLAMA["7B"]
    run = RunConfig(ppo=PPOConfig(micro_batch_size=1), gradient_checkpointing=True, **ONE_GPU)
    keys = [memory.plan(run, config, config, ranks=ranks)["cuda:0"]["keys and values"] for ranks in (1, 8, 16, 64)]
    assert keys == [keys[0], keys[0], keys[0] / 2, keys[0] / 8]  # 32 at once, of 256, 32, 16 and 4
    full = replace(run, tuning="full")
    assert memory.plan(full, config, config, ranks=2)["cuda:0"]["gradients in one piece"] > 4 * 13e9
    assert "gradients in one piece" not in memory.plan(full, config, config)["cuda:0"]


@pytest.mark.parametrize("model, ranks, in_step, whole", [
    ("7B", 1, 33.6, 33.6), ("7B", 2, 22.1, 27.3), ("7B", 8, 12.7, 22.6), ("7B", 16, 7.0, 17.7),
    ("13B", 1, 61.6, 61.6), ("13B", 2, 38.9, 49.5), ("13B", 8, 20.7, 40.4), ("13B", 16, 11.3, 32.5),
    ("70B", 8, 47.7, None), ("70B", 16, 31.3, None)])
def test_the_plan_agrees_with_an_independent_count(model, ranks, in_step, whole):
    """GiB a GPU, worked out beside a prototype of sharding, over as many GPUs as processes. It took the gathered policy for all
    that a process has of it; torch keeps its shard of it beside."""
    config, run = LLAMA[model], RunConfig(gradient_checkpointing=True, **ONE_GPU)

    def found(mode):
        items = memory.plan(run, config, config, ranks, mode, ranks)["cuda:0"]
        in_chunks = 4 * 4 * 2**24 * ("logits and gradient" in items)  # of ppo.TokenLogprobs: that count left them out
        return (sum(items.values()) - in_chunks) / memory.GIB

    assert found(False) == pytest.approx(in_step, rel=0.025)
    if whole:
        kept = 2 * memory.parameters(config) / ranks / memory.GIB if ranks > 1 else 0
        assert found(True) - kept == pytest.approx(whole, rel=0.025)


def test_sampling_is_whole_where_there_is_room_for_it():
    config, run = LLAMA["7B"], RunConfig(**ONE_GPU)
    needed = sum(memory.plan(run, config, config, 8, True, 8)["cuda:0"].values())
    modes = [plan.sampling_mode(run, config, config, 8, room) for room in (needed / 0.89, needed / 0.91, needed, None)]
    assert modes == ["whole", "in-step", "in-step", "whole"]


def test_the_table_of_gpus_is_legible_says_what_fits_and_what_cannot_be_shared():
    run, config = RunConfig(gradient_checkpointing=True, **ONE_GPU), LLAMA["13B"]
    lines = plan.scale_table(run, config, config, None, own=(4, 2)).splitlines()
    assert max(map(len, lines)) <= 100
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in lines[2:-1]}
    assert rows["1", "1"] == ["8", "61.3", "-", "-", "-", "-", "parallel"]
    assert rows["4", "2"][-2:] == ["this", "run"] and rows["4", "1"][-1] == "parallel" and len(rows) == 8
    assert rows["8", "1"][-3:] == ["in-step", "in-step", "parallel"] and rows["64", "8"][-3:] == ["in-step", "whole", "parallel"]
    assert [rows[size][0] for size in (("16", "2"), ("32", "4"), ("64", "8"))] == ["8", "4", "2"]  # 128 in equal parts
    uneven = replace(run, ppo=PPOConfig(rollout_batch_size=96, step_batch_size=48, micro_batch_size=6))
    lines = plan.scale_table(uneven, config, config, 40e9).splitlines()
    assert "37 GiB" in lines[1] and "none: --step-batch-size must be a multiple of 64" in lines[-2]
    assert lines[5].split()[:3] == ["8", "1", "6"] and lines[6].split()[:3] == ["16", "2", "3"]


def test_what_fits_one_small_gpu_needs_no_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--plan"])
    assert train.main() == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "one GPU of" in line]
    assert "holds all of it" in line and len(line) <= 100


@pytest.mark.parametrize("flags, share", [([], 1), (["--shard"], 2), (["--shard", "in-step"], 2)])
def test_a_run_of_several_processes_is_planned_as_it_would_run(capsys, monkeypatch, flags, share):
    """Four on two machines: weights are shared by the two of each, and the table marks the line."""
    monkeypatch.setattr(plan, "team", lambda: SimpleNamespace(size=4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(plan, "CARDS", (0.2,))  # GiB, so that there is a table
    run = build_config(vars(build_parser("").parse_args(flags)))
    run.policy_device = run.reference_device = "cpu"
    printed = plan.plan_of(run).splitlines()
    world = LlamaConfig.from_dict(json.loads((ROOT / "tiny" / "sft" / "config.json").read_text(encoding="utf-8")))
    assert f"{'frozen weights':<40}{4 * 2 * memory.parameters(world) / share / memory.GIB:8.3f}" in printed[1]
    assert ("so much for each of 4 processes" + ", which share the frozen weights, 2 a machine" * (share > 1)) in printed
    [marked] = [line for line in printed if line.endswith("this run")]
    assert marked.split()[:2] == ["4", "2"]


def test_gpus_are_planned_in_their_own_dtype(capsys, monkeypatch):
    """auto is float32 on a CPU and bfloat16 on a GPU."""
    printed, cpu = [], ["--policy-device", "cpu", "--reference-device", "cpu"]
    for dtype in ("auto", "bfloat16", "float32"):
        monkeypatch.setattr("sys.argv", ["train.py", "--plan", "--dtype", dtype, *cpu])
        assert train.main() == 0
        printed.append(capsys.readouterr().out.splitlines())
    auto, half, single = printed
    assert auto[1] == single[1] != half[1] and auto[-3:] == half[-3:] != single[-3:]


def test_what_is_foretold_for_many_gpus_is_what_the_formulas_say():
    """python bench/on_paper.py > bench/results/scale_on_paper.md after a change of either."""
    stored = (ROOT / "bench" / "results" / "scale_on_paper.md").read_text(encoding="utf-8")
    assert stored.endswith(on_paper.report()) and "nobody has run it" in stored


def test_a_step_on_paper_costs_what_a_hand_count_says():
    """LLaMA-7B: 6.74e9 weights, of which 6.48e9 in layers and 0.13e9 in the output layer."""
    model, layers, head = SHAPES["llama-7b"](), 6.476e9, 0.131e9
    one, eight = (on_paper.phases(model, "parallel", ranks, 1) for ranks in (1, 8))
    assert one.update == pytest.approx(2 * 256 * (492 * 2 * 6 * layers + 300 * 4 * head) / 395.6e12, rel=1e-3)
    assert one.traffic == 0 and eight.traffic == pytest.approx(7 / 8 * (4 * 2 * 4 * 16_777_216 + 256 * 300 * 21))
    # Of 32 responses at once a token takes as long as the weights and keys take to be read, or the operations to be started.
    assert one.sampling == pytest.approx(8 * 300 * 32 * 300e-6 + 2 * layers * 256 * 192 / 395.6e12, rel=1e-3)
    assert on_paper.phases(model, "parallel", 64, 8).sampling > 0.9 * eight.sampling  # few rows take as long as many
    whole, step = (on_paper.phases(model, form, 8, 1).traffic - eight.traffic for form in ("whole", "in-step"))
    # Policy and its reference, 13.5 GB each, value and reward without output layer and embedding, 13.0 GB each.
    assert step - whole == pytest.approx(299 * 13.48e9 * 7 / 8, rel=1e-3)
    read = 4 * 2 * (13.48e9 + 12.95e9) + 2 * 4 * 2 * (13.48e9 + 12.95e9)  # 4 micro-batches; 2 epochs, forward and backward
    assert whole == pytest.approx((3 * 13.48e9 + read) * 7 / 8, rel=1e-3)  # to sample, and two passes for the true KL


def test_a_plan_needs_no_weights_and_no_download(world, tmp_path, monkeypatch, capsys):
    """config.json alone, in a folder or fetched from the hub, gives the table of the whole models."""
    import shutil

    import huggingface_hub

    def table(policy, reward) -> str:
        return plan.plan_of(build_config({"policy": str(policy), "reward": str(reward), "data": "x.json", "policy_device": "cpu",
                                          "reference_device": "cpu"}))

    for name in ("sft", "reward"):
        (tmp_path / name).mkdir()
        shutil.copy(world / name / "config.json", tmp_path / name)
    whole = table(world / "sft", world / "reward")
    assert table(tmp_path / "sft", tmp_path / "reward") == whole
    asked = []

    def download(name, file, revision=None):
        asked.append((name, file, revision))
        return str(tmp_path / name.partition("/")[2] / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert table("org/sft@v1", "org/reward") == whole
    assert asked == [("org/sft", "config.json", "v1"), ("org/reward", "config.json", None)]
