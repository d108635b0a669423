"""What a run's reward promises: a model reads its own text, in its own turns and to its own end; a rule that fails is named."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import assert_same_run, records, settings, start, to_flags

import train
from data import encode_pair
from formats.tokenizer import load_tokenizer
from model import Llama, LlamaConfig
from reward import RewardModel

CHAT = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def chat_tokenizer(folder: Path, size: int, start: str, end: str, roles: tuple[str, str]) -> None:
    """A byte-level BPE of `size` pieces with a chat template of its own."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8")], trainers.BpeTrainer(
        show_progress=False, vocab_size=size, special_tokens=[start, end, *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast.save(str(folder / "tokenizer.json"))
    template = CHAT.replace("<|{{ m['role'] }}|>", f"{{% if m['role'] == 'user' %}}{roles[0]}{{% else %}}{roles[1]}{{% endif %}}")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": end, "pad_token": start,
              "chat_template": template.replace("<|end|>", end).replace("<|assistant|>", roles[1])}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def two_chats(tmp_path) -> Path:
    """policy/ and reward/, chat models with tokenizers and templates of their own, and four instructions."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.4,
                 eos_token_id=1)
    for name, size, words in (("policy", 600, ("<bos>", "<end>", ("<user>", "<assistant>"))),
                              ("reward", 700, ("[bos]", "[end]", ("[user]", "[assistant]")))):
        torch.manual_seed(size)
        model = Llama(LlamaConfig(vocab_size=size, **sizes))
        (model if name == "policy" else RewardModel(model)).save_pretrained(tmp_path / name)
        chat_tokenizer(tmp_path / name, size, *words)
    asked = [{"instruction": f"Name a {x}.", "input": "one word" * (x == "river"), "answer": x}
             for x in ("river", "tree", "metal", "city")]
    (tmp_path / "ppo.json").write_text(json.dumps(asked))
    return tmp_path


def chat_run(folder: Path, **changes) -> dict:
    return dict(policy=str(folder / "policy"), reward=str(folder / "reward"), data=str(folder / "ppo.json"),
                prompt_template="chat", rollout_batch_size=4, step_batch_size=4, micro_batch_size=2, response_length=6,
                steps=1, estimator="kl", policy_device="cpu", reference_device="cpu", out=str(folder / "run")) | changes


@pytest.mark.parametrize("eos", [True, False])
def test_a_reward_model_with_its_own_chat_template_reads_its_own_turns(two_chats, eos):
    """Decoded, the policy's prompt would reach it without turns, instruction and answer glued together."""
    stored = json.loads((two_chats / "reward" / "reward_config.json").read_text())
    (two_chats / "reward" / "reward_config.json").write_text(json.dumps(stored | {"eos": eos}))
    printed = start(chat_run(two_chats))
    assert ("read at the EOS, as it was trained" if eos else "read at the last word, as it was trained without EOS") in printed
    model, own = RewardModel.from_pretrained(two_chats / "reward"), load_tokenizer(two_chats / "reward").for_template("chat")
    for sample in records(two_chats / "run" / "samples.jsonl"):
        prompt, response = encode_pair(sample, sample["response"], own, "chat")
        assert own.pieces(prompt)[0] == "[user]" and own.pieces(prompt)[-1] == "[assistant]"
        cut_off = model(torch.tensor([prompt + response[:-1]]), torch.ones(1, len(prompt + response) - 1)).item()
        whole = model(torch.tensor([prompt + response]), torch.ones(1, len(prompt + response))).item()
        assert min(abs(sample["score"] - score) for score in ([cut_off, whole] if eos else [cut_off])) < 1e-3


def test_one_tokenizer_with_two_chat_templates_is_not_one_text(two_chats):
    """Nor are two tokenizers that differ in special tokens alone; either way the reward model reads its own turns."""
    shutil.copy(two_chats / "policy" / "tokenizer.json", two_chats / "reward")
    config = json.loads((two_chats / "policy" / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("<user>", "<user>Q: ")
    (two_chats / "reward" / "tokenizer_config.json").write_text(json.dumps(config))
    assert "reads instruction and answer as texts, with a template of its own" in start(chat_run(two_chats))
    shutil.rmtree(two_chats / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (two_chats / "policy" / name).read_text(encoding="utf-8").replace("<assistant>", "<model>")
        (two_chats / "reward" / name).write_text(text, encoding="utf-8")
    assert "reads instruction and answer as texts, with a tokenizer of its own" in start(chat_run(two_chats))


def test_a_reward_model_reads_the_template_that_it_was_trained_with(two_chats):
    stored = json.loads((two_chats / "reward" / "reward_config.json").read_text())
    texts = {"prompt_inputs": "Q {instruction} {input} A:", "prompt_noinputs": "Q {instruction} A:", "before_response": " "}
    (two_chats / "reward" / "reward_config.json").write_text(json.dumps(stored | {"prompt_template": texts, "eos": False}))
    assert "(template stored with it)" in start(chat_run(two_chats))
    model, own = RewardModel.from_pretrained(two_chats / "reward"), load_tokenizer(two_chats / "reward")
    for sample in records(two_chats / "run" / "samples.jsonl"):
        middle = f" {sample['input']}" if sample["input"] else ""
        ids = own.encode(f"Q {sample['instruction']}{middle} A:") + own.encode(" " + sample["response"], bos=False)
        assert sample["score"] == pytest.approx(model(torch.tensor([ids]), torch.ones(1, len(ids))).item(), abs=1e-3)


def test_a_rule_gets_the_prompt_as_rendered_and_what_it_asks_for_beside(two_chats):
    (two_chats / "rules.py").write_text(
        "def score(prompts, responses, instructions, examples):\n"
        "    assert all(p.startswith('<user>Name a ') and p.endswith('<assistant>') for p in prompts), prompts\n"
        "    assert all(e['instruction'] in i and e['answer'] in i for i, e in zip(instructions, examples))\n"
        "    return [float(i == 'Name a river.\\n\\none word') for i in instructions]\n")
    start(chat_run(two_chats, reward=f"{two_chats / 'rules.py'}:score"))
    samples = records(two_chats / "run" / "samples.jsonl")
    assert {s["instruction"]: s["score"] for s in samples} == {
        "Name a river.": 1, "Name a tree.": 0, "Name a metal.": 0, "Name a city.": 0}


def test_a_rule_may_import_what_lies_beside_it_even_by_a_name_of_ours(world, tmp_path):
    (tmp_path / "data.py").write_text("def words(text):\n    return len(text.split())\n")
    (tmp_path / "later.py").write_text("HALF = 0.5\n")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "__init__.py").write_text("")
    (tmp_path / "evaluation" / "report.py").write_text("ZERO = 0\n")
    (tmp_path / "rules.py").write_text("""
from data import words
from evaluation.report import ZERO

def score(prompts, responses):
    from later import HALF
    return [HALF * words(r) + ZERO for r in responses]
""")
    start(settings(world, tmp_path / "run", reward=f"{tmp_path / 'rules.py'}:score", steps=1, evaluation=None))
    samples = records(tmp_path / "run" / "samples.jsonl")
    assert [s["score"] for s in samples] == [0.5 * len(s["response"].split()) for s in samples]
    assert sys.modules["data"].__file__ == str(ROOT / "data.py")


def test_a_rule_that_raises_names_itself_and_loses_nothing(world, tmp_path, monkeypatch, capsys):
    """Step and line are named, the steps before it are saved, and with the rule mended the run goes on bit for bit."""
    right = "def score(prompts, responses):\n    return [len(r) / 10 for r in responses]\n"
    wrong = ("calls = 0\ndef score(prompts, responses):\n    global calls\n    calls += 1\n"
             "    return [1 / (calls < 9) and len(r) / 10 for r in responses]\n")
    rule, run = tmp_path / "rules.py", dict(save_every=10, evaluation=None)
    rule.write_text(right)
    start(settings(world, tmp_path / "whole", reward=f"{rule}:score", **run))
    rule.write_text(wrong)
    flags = to_flags(settings(world, tmp_path / "run", reward=f"{rule}:score", **run))
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    assert train.main() == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "step 3: the rule rules.py:score raised ZeroDivisionError: division by zero (rules.py, line 5: return" in line
    assert f"the batch is in {tmp_path / 'run'}/debug-step-0003.pt; the last checkpoint is {tmp_path / 'run'}/step-0002" in line
    kept = torch.load(tmp_path / "run" / "debug-step-0003.pt", weights_only=True)
    assert sum(len(responses) for responses in kept["responses"]) == 8
    rule.write_text(right)
    printed = start({"out": str(tmp_path / "run"), "reward": f"{rule}:score"}, resume=True)
    assert f"the rule {rule}:score was changed since" in printed
    (tmp_path / "run" / "debug-step-0003.pt").unlink()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
