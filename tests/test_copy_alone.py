"""Each library module works as a single copied file: alone in an empty folder, it is imported and used there.

Python runs isolated (-I) with that folder as the only path of the project, so an import of a sibling would fail.
"""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT

USES = {
    "divergences": """
        from divergences import get_estimator, true_kl
        p, q = (torch.tensor(x).log() for x in ([0.5, 0.25], [0.25, 0.25]))
        assert torch.allclose(get_estimator("k3")(p, q), torch.tensor([0.5 - 1 + math.log(2), 0.0]), atol=1e-6)
        assert torch.allclose(true_kl(torch.zeros(2, 4), torch.zeros(2, 4)), torch.zeros(2))
        """,
    "lora": """
        from lora import add_lora, load_lora, lora_disabled, merge_lora, save_lora
        x, model = torch.randn(3, 4), torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 2)})
        before = model["q_proj"](x)
        add_lora(model, rank=2, dropout=0.0)
        model["q_proj"](x).square().sum().backward()
        with torch.no_grad():
            model["q_proj"].lora_B -= model["q_proj"].lora_B.grad
        adapted = model["q_proj"](x)
        assert not torch.allclose(adapted, before)
        with lora_disabled(model):
            assert torch.equal(model["q_proj"](x), before)
        save_lora(model, "adapter")
        fresh = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 2)})
        fresh["q_proj"].load_state_dict({k: v for k, v in model["q_proj"].state_dict().items() if "lora" not in k})
        load_lora(fresh, "adapter")
        assert torch.allclose(merge_lora(fresh)["q_proj"](x), adapted, atol=1e-6)
        """,
    "model": """
        from model import Llama, LlamaConfig, ValueModel, generate
        model = Llama(LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2))
        model.save_pretrained("saved")
        again, ids = Llama.from_pretrained("saved"), torch.tensor([[1, 5, 9]])
        assert torch.equal(again(ids), model(ids))
        said = generate(again, ids, torch.ones_like(ids), max_new_tokens=4, eos_token_id=2, pad_token_id=0)
        assert said.shape[0] == 1 and 1 <= said.shape[1] <= 4
        assert ValueModel(again)(ids).shape == (1, 3)
        """,
    "ppo": """
        import ppo
        embed, head = torch.nn.Embedding(7, 5), torch.nn.Linear(5, 8)  # 7 logits and a value
        def policy(ids, mask, keep): return head(embed(ids))[:, -keep:, :7]
        def value(ids, mask): return head(embed(ids))[..., 7]
        frozen = copy.deepcopy((embed, head))
        def reference(ids, mask, keep): return frozen[1](frozen[0](ids))[:, -keep:, :7]
        def reward(ids, mask, n): return (ids == 3).sum(1).float()
        def generate(prompts, mask): return torch.randint(2, 7, (len(prompts), 4))
        config = ppo.PPOConfig(rollout_batch_size=8, step_batch_size=4, micro_batch_size=2, learning_rate=0.1)
        actors = ppo.Actors(policy, value, reference, reward, generate, eos_token_id=2, pad_token_id=0)
        prompts = torch.full((8, 2), 4)
        rollout = ppo.collect(actors, lambda a, b: a - b, prompts, torch.ones_like(prompts), config)
        before = head.weight.detach().clone()
        trained = [*embed.parameters(), *head.parameters()]
        stats = ppo.update(actors, rollout, torch.optim.Adam(trained, lr=0.1), config)
        assert not torch.equal(head.weight, before) and all(math.isfinite(x) for x in stats.values())
        """,
    "data": """
        import json
        from data import PromptStream, encode_pair, left_pad, load_instructions, tokenize_prompts
        class Letters:  # any object that encodes and decodes
            def encode(self, text, bos=True, eos=False): return [1] * bos + [ord(c) for c in text] + [2] * eos
            def decode(self, ids): return "".join(map(chr, ids))
        records = [{"instruction": "Say a."}, {"instruction": "Say", "input": "b"}]
        pathlib.Path("ppo.json").write_text(json.dumps(records))
        letters = Letters()
        prompts = tokenize_prompts(load_instructions("ppo.json"), letters, "alpaca", max_tokens=400)
        ids, mask = left_pad([prompts.ids[i] for i in PromptStream(2).next_batch(2)], 0)
        assert len(prompts.examples) == 2 and mask.sum() == sum(map(len, prompts.ids)) and bool(mask[:, -1].all())
        assert encode_pair(prompts.examples[0], "a", letters)[1][-1] == 2
        """,
    "reward": """
        from types import SimpleNamespace
        from reward import Group, RewardModel, TrainingConfig, accuracy, standardise, train_reward
        class Backbone(torch.nn.Module):
            config = SimpleNamespace(hidden_size=6)
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(9, 6)
            def hidden(self, input_ids, attention_mask=None):
                return self.embed(input_ids).cumsum(1)
        model = RewardModel(Backbone())
        groups = [Group([[1, a, 7, 2], [1, a, 8, 2]], [(0, 1)]) for a in range(3, 7)]  # 7 is preferred to 8
        train_reward(model, groups, TrainingConfig(epochs=20, batch_size=2, learning_rate=0.05), progress=False)
        assert accuracy(model, groups).value == 1
        standardise(model, [s for g in groups for s in g.sequences])
        ids = torch.tensor([[1, 4, 7, 2, 0], [1, 4, 8, 2, 0]])
        good, bad = model(ids, (ids > 0).long()).tolist()
        assert good > bad
        """,
    "judges": """
        from judges import Verdict, compare
        def brief(task, first, second): return Verdict(1.0 if len(first) < len(second) else 2.0)
        tasks = [{"instruction": f"Say {i}."} for i in range(4)]
        ask = lambda: compare(tasks, ["yes"] * 4, ["certainly"] * 4, {"brief": brief}, file=pathlib.Path("log.jsonl"))
        assert [r["preference"] for r in ask()] == [2.0] * 4 and ask() == ask()
        """,
    "factuality": """
        from factuality import FactCount, count_facts, fact_figures
        said = iter([["- Ada was English."], ["True"]])
        counts = count_facts(["Ada"], ["Ada was English."], {"Ada": ["She was English."]}, lambda prompts, desc: next(said))
        assert counts == [FactCount(1, 1)] and fact_figures(counts)["factscore"] == 100
        """,
}


HOMES = {"judges": "evaluation/judges.py", "factuality": "evaluation/factuality.py"}  # the others stand on top


def run_isolated(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)


def alone(module: str, folder: Path, code: str) -> str:
    """What the code prints where the module is the only file of the project."""
    shutil.copy(ROOT / HOMES.get(module, f"{module}.py"), folder)
    done = run_isolated("\n".join([f"import copy, math, pathlib, sys; sys.path.insert(0, {str(folder)!r})",
                                   "import torch; torch.manual_seed(0)", textwrap.dedent(code)]), folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", USES)
def test_a_module_works_alone_in_an_empty_folder(module, tmp_path):
    loaded = alone(module, tmp_path, textwrap.dedent(USES[module]) + "\nprint(*sys.modules)")
    ours = {file.stem for file in ROOT.glob("*.py")} | {file.stem for file in ROOT.glob("*/*.py")} | {"formats", "training"}
    top_level = {name.partition(".")[0] for name in loaded.split()}
    assert ours & top_level - set(sys.stdlib_module_names) == {module}


def test_statistics_work_alone_under_any_name(tmp_path):
    """As statistics.py they would stand in the place of Python's own."""
    shutil.copy(ROOT / "evaluation" / "statistics.py", tmp_path / "rates.py")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import rates; print(rates.win_rate([1, 2, 2, None]))"
    done = run_isolated(code, tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("(66.66"), done.stderr


def test_reward_py_alone_reads_a_stored_reward_model_and_gives_the_same_scores(world, tmp_path):
    """Its backbone is then transformers'."""
    from reward import RewardModel

    ids = torch.tensor([[0, 0, 1, 5, 9, 2], [1, 7, 7, 30, 12, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    model = RewardModel.from_pretrained(world / "reward")
    with torch.no_grad():
        model.mean.fill_(0.25), model.std.fill_(2.0)
        expected = model(ids, mask)
    model.save_pretrained(tmp_path / "stored")
    printed = alone("reward", tmp_path, f"""
        from reward import RewardModel
        model = RewardModel.from_pretrained("stored")
        with torch.no_grad():
            print(*model(torch.tensor({ids.tolist()}), torch.tensor({mask.tolist()})).tolist())
        model.save_pretrained("again")
        assert torch.equal(RewardModel.from_pretrained("again").score.weight, model.score.weight)
        """)
    torch.testing.assert_close(torch.tensor([float(x) for x in printed.split()]), expected, atol=1e-5, rtol=1e-4)


def test_model_py_alone_reads_shards_ties_and_says_what_is_missing(tmp_path):
    alone("model", tmp_path, """
        from safetensors.torch import load_file, save_file
        from model import Llama, LlamaConfig
        for tied in (False, True):
            folder = pathlib.Path(f"tied {tied}")
            model = Llama(LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=4, tie_word_embeddings=tied))
            model.save_pretrained(folder)
            tensors = sorted(load_file(folder / "model.safetensors").items())
            (folder / "model.safetensors").unlink()
            for k in range(2):
                save_file(dict(tensors[k::2]), folder / f"model-0000{k + 1}-of-00002.safetensors")
            again, ids = Llama.from_pretrained(folder, dtype=torch.float32), torch.tensor([[1, 5, 9]])
            assert torch.equal(again(ids), model(ids))
            assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
        save_file(dict(tensors[2:]), folder / "model-00001-of-00002.safetensors")
        (folder / "model-00002-of-00002.safetensors").unlink()
        try:
            Llama.from_pretrained(folder)
        except ValueError as error:
            assert "tied True" in str(error) and "\\n" not in str(error), error
        else:
            raise AssertionError("half a model was loaded")
        """)


def test_lora_py_alone_says_what_needs_the_rest_of_the_project(tmp_path):
    alone("lora", tmp_path, """
        from lora import load_lora, main
        (pathlib.Path("released")).mkdir()
        torch.save({}, "released/pytorch_model.bin")
        model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 2)})
        try:
            load_lora(model, "released")
        except FileNotFoundError as error:
            assert "not an adapter in PEFT's layout" in str(error)
        """)


def test_lora_py_alone_refuses_an_empty_adapter_and_reads_ranks_of_single_layers(tmp_path):
    alone("lora", tmp_path, """
        from safetensors.torch import save_file
        from lora import add_lora, load_lora, lora_layers, save_lora
        def model(): return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4), "v_proj": torch.nn.Linear(4, 4)})
        save_lora(add_lora(model(), rank=3), "adapter")
        config = pathlib.Path("adapter/adapter_config.json")
        text = config.read_text().replace('"rank_pattern": {}', '"rank_pattern": {"v_.*": 3}')
        config.write_text(text.replace('"r": 3', '"r": 2'))
        try:
            load_lora(model(), "adapter")
        except ValueError as error:
            assert "q_proj.lora_A has shape (3, 4), not (2, 4) as rank 2 asks" in str(error), error
        save_file({}, "adapter/adapter_model.safetensors")
        try:
            load_lora(model(), "adapter")
        except ValueError as error:
            assert "adapter_model.safetensors: holds no adapter" in str(error), error
        else:
            raise AssertionError("an empty adapter was loaded")
        """)


def test_model_py_alone_refuses_a_quantised_model(tmp_path):
    alone("model", tmp_path, """
        import json
        from safetensors.torch import load_file, save_file
        from model import Llama, LlamaConfig
        Llama(LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                          num_attention_heads=4)).save_pretrained("model")
        config, weights = pathlib.Path("model/config.json"), pathlib.Path("model/model.safetensors")
        tensors, name = load_file(weights), "model.layers.0.mlp.up_proj.weight"
        for dtype in (torch.int8, torch.int32, torch.float8_e4m3fn):
            save_file(tensors | {name: tensors[name].to(dtype)}, weights)
            try:
                Llama.from_pretrained("model", dtype=torch.float32)
            except ValueError as error:
                assert f"tensor {name} is missing, quantised, or" in str(error), error
            else:
                raise AssertionError("weights without their scales were loaded")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"bits": 4}}))
        try:
            Llama.from_pretrained("model")
        except ValueError as error:
            assert "quantization_config: the model is quantised" in str(error), error
        """)


def test_lora_py_alone_trains_in_hugging_faces_trainer_in_bf16(tmp_path):
    alone("lora", tmp_path, """
        import transformers
        from lora import add_lora, lora_parameters
        config = transformers.LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                          num_attention_heads=2, num_key_value_heads=2)
        model = add_lora(transformers.LlamaForCausalLM(config))
        before = [p.detach().clone() for p in lora_parameters(model)]
        settings = transformers.TrainingArguments("out", max_steps=2, bf16=True, use_cpu=True, report_to=[], learning_rate=0.1,
                                                  save_strategy="no", disable_tqdm=True)
        data = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}] * 8
        transformers.Trainer(model, settings, train_dataset=data).train()
        after = lora_parameters(model)
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after)
        assert not all(torch.equal(a, b) for a, b in zip(before, after))
        """)


def test_a_module_that_leans_on_a_sibling_would_be_noticed(tmp_path):
    """The proof that the tests above can fail: a program, which may import siblings, does not run alone."""
    shutil.copy(ROOT / "sft.py", tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sft"
    done = run_isolated(code, tmp_path)
    assert done.returncode == 1 and "No module named 'data'" in done.stderr


def test_no_module_takes_more_than_torch_and_safetensors_to_import(tmp_path):
    """transformers and sentencepiece are imported where they are needed, or not at all."""
    modules = [HOMES.get(module, f"{module}.py").removesuffix(".py").replace("/", ".") for module in USES]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}; print(*sys.modules)"
    done = run_isolated(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not {"transformers", "sentencepiece", "peft", "matplotlib"} & set(done.stdout.split())
