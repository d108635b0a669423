"""Bad input gets one clear line that names what is wrong and what would be right, exit code 2, no traceback, and no file.

A table: what is wrong with the world or the flags, and words that the line must hold.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from runs import configured, settings, to_flags

import evaluate
import lora
import model
import reward
import sft
import train

DEEP = "[" * 100_000


def write(name: str, content: str | bytes):
    """Replaces a file of the world."""
    def harm(world: Path) -> None:
        (world / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return harm


def remove(name: str):
    return lambda world: (world / name).unlink()


def cut(name: str, share: float = 0.6):
    """Leaves the first part of a file."""
    def harm(world: Path) -> None:
        content = (world / name).read_bytes()
        (world / name).write_bytes(content[:int(len(content) * share)])

    return harm


def change(name: str, **values):
    """Other values in a JSON object."""
    def harm(world: Path) -> None:
        (world / name).write_text(json.dumps(json.loads((world / name).read_text()) | values))

    return harm


def tensors(name: str, edit):
    """Other tensors in a safetensors file."""
    def harm(world: Path) -> None:
        found = load_file(world / name)
        edit(found)
        save_file(found, world / name)

    return harm


class Code:
    """A pickle that would run a command."""

    def __reduce__(self):
        return (exec, ("open('/tmp/never-run', 'w')",))


def pickled(world: Path) -> None:
    (world / "sft" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Code()}, world / "sft" / "pytorch_model.bin")


def misleading_index(world: Path) -> None:
    (world / "sft" / "model.safetensors").rename(world / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (world / "sft" / "model.safetensors.index.json").write_text(json.dumps(index))


def larger_vocabulary(world: Path) -> None:
    """A model with fewer embedding rows than its tokenizer has tokens."""
    change("sft/config.json", vocab_size=500)(world)
    tensors("sft/model.safetensors", lambda t: t.update({n: x[:500].clone() for n, x in t.items()
                                                         if "embed" in n or "lm_head" in n}))(world)


def an_adapter(**changed):
    """A PEFT folder beside the world, with something wrong in its configuration."""
    def harm(world: Path) -> None:
        policy = lora.add_lora(model.Llama.from_pretrained(world / "sft"))
        lora.save_lora(policy, world / "adapter", base_model_name_or_path=str(world / "sft"))
        change("adapter/adapter_config.json", **changed)(world)

    return harm


def adapter_without_weights(world: Path) -> None:
    an_adapter()(world)
    (world / "adapter" / "adapter_model.safetensors").unlink()


def adapter_of_nothing(world: Path) -> None:
    an_adapter()(world)
    save_file({}, world / "adapter" / "adapter_model.safetensors")


ADAPTER = ["--adapter", "{world}/adapter"]
WRONG = [  # (what is wrong with the world, flags of train.py behind the right ones, words of the message)
    # instructions
    (write("data/ppo.json", ""), [], "ppo.json: the file is empty"),
    (write("data/ppo.json", "[]"), [], "ppo.json: the list holds no records"),
    (write("data/ppo.json", '[{"instruction": "Say x."'), [], "ppo.json: not JSON"),
    (write("data/ppo.json", "instruction: Say x."), [], "neither a JSON list nor JSON lines"),
    (write("data/ppo.json", "[1]"), [], "record 0: expected an object with an 'instruction', found int"),
    (write("data/ppo.json", '[{"input": "x"}]'), [], "record 0: field 'instruction' is missing; found input"),
    (write("data/ppo.json", '[{"instruction": 3}]'), [], "field 'instruction' is int; it must be a string"),
    (write("data/ppo.json", '[{"instruction": " "}]'), [], "field 'instruction' is empty"),
    (write("data/ppo.json", '[{"instruction": "a", "input": 4}]'), [], "field 'input' is int"),
    (write("data/ppo.json", b'[{"instruction": "\xff"}]'), [], "ppo.json: not UTF-8 text"),
    (write("data/ppo.json", DEEP), [], "ppo.json: not JSON: nested too deeply"),
    (write("data/ppo.json", '{"instruction": "a"}\n{"instruction": '), [], "neither a JSON list nor JSON lines"),
    (remove("data/ppo.json"), [], "ppo.json: no such data file"),
    (None, ["--data", "{world}/data"], "data: no such data file"),
    (remove("data/evaluation.json"), [], "evaluation.json: no such data file"),
    (write("data/evaluation.json", '[{"instruction": "a", "output": 3, "family": "x"}]'), [], "field 'output' is int"),
    # models
    (remove("sft/config.json"), [], "config.json"),
    (write("sft/config.json", "{"), [], "sft/config.json"),
    (write("sft/config.json", "[]"), [], "holds a list, not an object"),
    (write("sft/config.json", DEEP), [], "sft/config.json"),
    (change("sft/config.json", model_type="gpt2"), [], "model_type 'gpt2' is not supported"),
    (change("sft/config.json", quantization_config={"bits": 4}), [], "sft/config.json: quantization_config: the model is"),
    (change("sft/config.json", hidden_size="large"), [], "hidden_size is 'large'"),
    (change("sft/config.json", num_hidden_layers=10**9), [], "num_hidden_layers is 1000000000: it must be a whole number from 1"),
    (change("sft/config.json", num_hidden_layers=10**6), [], "num_hidden_layers is 1000000, but there are"),
    (change("sft/config.json", intermediate_size=10**7), [], "has shape"),
    (change("sft/config.json", num_hidden_layers=1), [], "unexpected tensor model.layers.1"),
    (change("sft/config.json", hidden_size=32), [], "has shape"),
    (change("sft/config.json", num_attention_heads=3), [], "num_attention_heads 3"),
    (change("sft/config.json", hidden_act="gelu"), [], "hidden_act 'gelu' is not supported"),
    (change("sft/config.json", rope_scaling={"rope_type": "longrope"}), [], "rope_scaling type 'longrope' is not supported"),
    (remove("sft/model.safetensors"), [], "no model.safetensors or pytorch_model.bin"),
    (cut("sft/model.safetensors"), [], "model.safetensors: cannot be read, truncated or damaged"),
    (write("sft/model.safetensors", b""), [], "model.safetensors: cannot be read, truncated or damaged"),
    (write("sft/model.safetensors", b"<html>not found</html>"), [], "model.safetensors: cannot be read"),
    (tensors("sft/model.safetensors", lambda t: t.pop("model.norm.weight")), [], "missing tensor model.norm.weight"),
    (tensors("sft/model.safetensors", lambda t: t.update(x=torch.zeros(1))), [], "unexpected tensor x"),
    (tensors("sft/model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(16).int()})), [], "is of torch.int32"),
    (pickled, [], "refused, and none of it was run"),
    (misleading_index, [], "which is not in its own folder"),
    (write("sft/model_sum.txt", "3.0"), [], "holds the difference to another model's weights"),
    # tokenizers
    (remove("sft/tokenizer.model"), [], "tokenizer"),
    (cut("sft/tokenizer.model"), [], "tokenizer.model"),
    (write("sft/tokenizer.model", b""), [], "tokenizer.model"),
    (write("sft/tokenizer.json", "{}"), [], "tokenizer"),
    (larger_vocabulary, [], "500 embedding rows, but the tokenizer's largest id is 599"),
    (None, ["--prompt-template", "chat"], "the tokenizer has no chat template"),
    (write("template.json", '{"prompt_inputs": "{instruction}"}'), ["--prompt-template", "{world}/template.json"],
     "a template file is JSON with prompt_inputs"),
    # reward models and adapters
    (remove("reward/config.json"), [], "reward/config.json: not found"),
    (write("reward/config.json", "null"), [], "reward/config.json"),
    (change("reward/reward_config.json", mean="high"), [], "mean is 'high'"),
    (change("reward/reward_config.json", std=0), [], "std is 0"),
    (cut("reward/model.safetensors"), [], "reward/model.safetensors: cannot be read"),
    (tensors("reward/model.safetensors", lambda t: t.pop("score.weight")), [], "score.weight"),
    (an_adapter(r=0), ADAPTER, "r is 0"),
    (an_adapter(lora_alpha="large"), ADAPTER, "lora_alpha is 'large'"),
    (an_adapter(use_dora=True), ADAPTER, "use_dora True is not supported"),
    (write("reward/x", ""), ADAPTER, "adapter: no adapter_config.json"),
    (adapter_without_weights, ADAPTER, "adapter_model.safetensors: not found"),
    (adapter_of_nothing, ADAPTER, "adapter_model.safetensors: holds no adapter"),
    (change("reward/config.json", model_type="gemma"), [], "reward/config.json: model_type 'gemma' is not supported"),
    (change("reward/config.json", quantization_config={"bits": 4}), [], "reward/config.json: quantization_config: the model is"),
    # flags
    (None, ["--estimator", "chi_squared"], "estimator 'chi_squared' does not exist; choose clamped_kl"),
    (None, ["--steps", "0"], "steps is 0: must be at least 1"),
    (None, ["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (None, ["--stepz", "3"], "unrecognized arguments: --stepz 3"),
    (None, ["--keep", "-1"], "keep is -1: must be at least 0"),
    (None, ["--tuning", "half"], "argument --tuning: invalid choice: 'half'"),
    (None, ["--beta", "nan"], "beta is nan: must be a finite number"),
    (None, ["--beta", "-1"], "beta is -1.0: must be at least 0"),
    (None, ["--learning-rate", "inf"], "--learning-rate is inf: must be a finite number"),
    (None, ["--learning-rate", "0"], "--learning-rate is 0.0: must be above 0"),
    (None, ["--gamma", "2"], "gamma is 2.0: must be from 0 to 1"),
    (None, ["--cliprange", "0"], "cliprange is 0.0: must be above 0"),
    (None, ["--lora-alpha", "nan"], "--lora-alpha is nan"),
    (None, ["--lora-rank", "-8"], "--lora-rank is -8: must be from 1 to 65536"),
    (None, ["--seed", "9" * 19], "must be a finite number"),
    (None, ["--steps", "9" * 400], "must be a finite number"),
    (None, ["--micro-batch-size", "3"], "--step-batch-size 4 is not a multiple of --micro-batch-size 3"),
    (None, ["--policy-device", "cuda:9"], "--policy-device cuda:9 is not there: choose from"),
    (None, ["--query-length", "3"], "--query-length 3: all 60 prompts are longer"),
    (None, ["--reward", "{world}/rules.py:rule"], "rules.py: no such file"),
    (write("rules.py", "x = 1"), ["--reward", "{world}/rules.py:rule"], "rules.py has no function 'rule'"),
    (write("rules.py", "def rule(p, r):\n    return [None]"), ["--reward", "{world}/rules.py:rule"],
     "must return a list of numbers"),
    (None, ["--resume", "--out", "{world}"], "there is no run in"),
]


def complaint(program, name: str, argv: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """(exit code, stderr without progress bars)."""
    monkeypatch.setattr(sys, "argv", [name, *argv])
    try:
        code = program.main()
    except SystemExit as error:  # argparse's
        code = error.code
    lines = capsys.readouterr().err.splitlines()
    lines = [line.split("\x1b[A")[-1].strip() for line in lines]  # tqdm moves up between bars
    return code, "".join(line + "\n" for line in lines if line and not re.search(r"\d+%\|", line))


@pytest.fixture
def broken(world, tmp_path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "world"))


def test_the_table_is_as_long_as_promised():
    assert len(WRONG) + len(WRONG_EVALUATIONS) >= 60


@pytest.mark.parametrize(("harm", "more", "words"), WRONG, ids=[f"{i}: {words[:40]}" for i, (_, _, words) in enumerate(WRONG)])
def test_train_says_in_one_line_what_is_wrong(broken, tmp_path, monkeypatch, capsys, harm, more, words):
    if harm:
        harm(broken)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    argv = to_flags(settings(broken, tmp_path / "run")) + [flag.format(world=broken) for flag in more]
    code, error = complaint(train, "train.py", argv, monkeypatch, capsys)
    assert code == 2, error
    assert error.startswith("train.py: ") and error.count("\n") == 1 and words in error, error
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    late = {p for p in after if p.parent == tmp_path / "run"}  # a rule is only known to be wrong once it has been called
    assert {p: c for p, c in after.items() if p not in late} == before
    assert not late or "must return" in words
    assert not Path("/tmp/never-run").exists()


WRONG_EVALUATIONS = [  # (file of the run that is written, its content, flags of evaluate.py, words)
    ("a.json", "[{}]", ["winrate", "--annotations", "{run}/a.json"], 'record 1: has no field "preference"'),
    ("a.json", '[{"preference": 7}]', ["winrate", "--annotations", "{run}/a.json"], "record 1: preference 7 must be a number"),
    ("a.json", DEEP, ["winrate", "--annotations", "{run}/a.json"], "neither a JSON list nor JSON lines"),
    ("a.json", "[]", ["winrate", "--annotations", "{run}/a.json"], "no preference is left"),
    ("x", "", ["winrate", "--annotations", "{run}/none.json"], "none.json"),
    ("pool.json", "{}", ["{run}", "--judge", "openai", "--judge-pool", "{run}/pool.json"], "must be a JSON list"),
    ("pool.json", '[{"model": "m", "temperature": "x"}]', ["{run}", "--judge", "openai", "--judge-pool", "{run}/pool.json"],
     "field 'temperature' is 'x'"),
    ("x", "", ["{run}", "--judge", "openai", "--judge-model", "m", "--base-url", "localhost"],
     "--base-url 'localhost': must be an address such as"),
    ("x", "", ["{run}", "--judge", "nobody"], "argument --judge: invalid choice: 'nobody'"),
    ("config.json", "{", ["{run}"], "config.json: is no configuration of a run"),
    ("config.json", DEEP, ["{run}"], "config.json: is no configuration of a run"),
    ("config.json", "{}", ["{run}"], "lacks estimator"),
    ("x", "", ["report", "{run}/none", "--out", "{run}/report"], "holds no config.json"),
    ("config.json", "{", ["report", "{run}", "--out", "{run}/report"], "config.json: no JSON object"),
    ("evaluations.jsonl", "{}\n", ["report", "{run}", "--out", "{run}/report"], "an evaluation lacks step"),
    ("evaluations.jsonl", "[1]\n", ["report", "{run}", "--out", "{run}/report"], "line 1 is no object"),
    ("x", "", ["report", "{run}"], "the following arguments are required: --out"),
    ("x", "", ["chat", "{run}", "--step", "9"], "holds checkpoints"),
    ("x", "", [], "the following arguments are required: command"),
]


@pytest.mark.parametrize(("file", "content", "argv", "words"), WRONG_EVALUATIONS,
                         ids=[f"{i}: {words[:40]}" for i, (*_, words) in enumerate(WRONG_EVALUATIONS)])
def test_evaluate_says_in_one_line_what_is_wrong(world, tmp_path, monkeypatch, capsys, file, content, argv, words):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(configured(world, run).to_dict()))
    (run / file).write_text(content)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, error = complaint(evaluate, "evaluate.py", [flag.format(run=run) for flag in argv], monkeypatch, capsys)
    assert code == 2 and error.startswith("evaluate.py") and error.count("\n") == 1 and words in error, error
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("program", "argv", "words"), [
    (reward, ["--base", "{world}/sft", "--data", "{world}/data/ppo.json", "--out", "{world}/out"], "output_1"),
    (reward, ["--base", "{world}/none", "--data", "{world}/p.json", "--out", "{world}/out"], "none"),
    (sft, ["--model", "{world}/sft", "--data", "{world}/none.json", "--out", "{world}/out"], "none.json: no such data file"),
    (model, ["convert", "--model", "{world}/none", "--out", "{world}/out"], "none"),
    (lora, ["merge", "--base", "{world}/sft", "--adapter", "{world}/none", "--out", "{world}/out"], "none")])
def test_the_other_programs_do_so_too(broken, monkeypatch, capsys, program, argv, words):
    code, error = complaint(program, "program", [flag.format(world=broken) for flag in argv], monkeypatch, capsys)
    assert code == 2 and words in error and len(error.strip().split("\n")) == 1, error
    assert not (broken / "out").exists()


@pytest.mark.parametrize(("harm", "words"), [
    (adapter_of_nothing, "adapter_model.safetensors: holds no adapter"), (an_adapter(lora_alpha=0), "lora_alpha is 0"),
    (an_adapter(base_model_name_or_path=7), "--policy is missing: ")])
def test_evaluate_says_what_is_wrong_with_an_adapter(broken, monkeypatch, capsys, harm, words):
    harm(broken)
    argv = [str(broken / "adapter"), "--data", str(broken / "data" / "evaluation.json"), "--prompt-template", "tiny"]
    code, error = complaint(evaluate, "evaluate.py", argv, monkeypatch, capsys)
    assert code == 2 and error.startswith("evaluate.py: ") and error.count("\n") == 1 and words in error, error
