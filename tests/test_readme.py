"""The README and docs/ stay true: commands are CI's and run as they stand, files exist, flags are real, lines are counted."""

import ast
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import evaluate
import lora
import reward
import sft
import train
from formats import convert
from training import calibrate
from training.config import build_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", *(ROOT / "docs").rglob("*.md")]}
# The miniature world in seconds: a few short responses a step, a dozen evaluation instructions.
SMALL = ["--rollout-batch-size", "4", "--step-batch-size", "4", "--micro-batch-size", "4", "--rollout-micro-batch-size", "4",
         "--response-length", "6", "--policy-device", "cpu", "--reference-device", "cpu"]


def blocks(text: str) -> list[str]:
    """The indented code blocks, without their indentation; a line that ends in a backslash goes on in the next."""
    found = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).replace("\\\n", "") for block in found]


def block(beginning: str) -> str:
    """The README's block that begins so."""
    [found] = [b for b in blocks(README) if b.startswith(beginning)]
    return found


def commands(text: str) -> list[list[str]]:
    """Every `python X.py ...` of the blocks, as words."""
    lines = [line for b in blocks(text) for line in b.splitlines() if re.match(r"python \w+\.py\b", line)]
    return [shlex.split(re.sub(r" 2> \w+", "", line.partition("  #")[0]))[1:] for line in lines]


# --- what stands there -----------------------------------------------------------------------------------------------


def test_the_readme_is_a_front_page():
    assert len(README.encode()) <= 10_240
    assert "@@" not in "".join(TEXTS.values()) and "TODO" not in "".join(TEXTS.values())


def test_ci_runs_the_readmes_test_command():
    [command] = [b for b in blocks(README) if "python -m pytest" in b]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("\\\n", "")
    assert " ".join(command.split()) in " ".join(script.split())


@pytest.mark.parametrize("text", TEXTS)
def test_no_command_runs_out_of_its_block(text):
    for line in TEXTS[text].splitlines():
        assert not line.startswith("    ") or len(line) <= 110 or text == "bench/README.md", line


@pytest.mark.parametrize("text", TEXTS)
def test_every_file_that_a_text_names_exists(text):
    folder = (ROOT / text).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXTS[text]):
        assert (folder / link).exists(), link
    in_a_run = {"config.json", "curves.png", "evaluation.json", "annotations.json", "outputs/reference_outputs.json",
                "judgements.jsonl", "factscore.jsonl", "debug-step-0007.pt", "trainer/origin.json", "reward_config.json",
                "rules.py", "hackable.py", "classifier.py", "params.json", "peer_step.py"}
    for name in set(re.findall(r"`((?:[a-z_0-9-]+/)*[a-z_0-9-]+\.(?:py|txt|md|json|jsonl|png))`", TEXTS[text])) - in_a_run:
        assert any((where / name).exists() for where in (ROOT, folder, folder / "results", ROOT / "tiny")), name


@pytest.mark.parametrize("text", TEXTS)
def test_every_flag_of_a_command_exists(text, capsys, monkeypatch):
    """Each program's own parser reads the words; nothing is run."""
    def parse(program: str, words: list[str]) -> None:
        if program == "train.py":
            build_parser("").parse_args(words)
        elif program == "evaluate.py":
            evaluate.build_parser().parse_args(words if words[0] in evaluate.COMMANDS else ["run", *words])
        elif words[:1] == ["calibrate"]:
            calibrate.parse_args(words[1:])
        elif program in ("sft.py", "reward.py"):
            {"sft.py": sft, "reward.py": reward}[program].parse_args(words)
        elif program == "lora.py":
            monkeypatch.setattr(lora, "merge_checkpoint", lambda *_, **__: (0, 0))
            lora.main(words)
        else:
            assert program in ("model.py", "divergences.py"), program
            for name in ("convert", "recover"):
                monkeypatch.setattr(convert, name, lambda *_, **__: 0.0)
            if words:
                monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))
                assert convert.main(None, words) == 0

    for program, *words in commands(TEXTS[text]):
        try:
            parse(program, words)
        except SystemExit:
            pytest.fail(f"{program} {' '.join(words)}: {capsys.readouterr().err}")


def test_the_class_path_counts_its_lines():
    """Every stretch begins at the file's first line or at a definition, ends where one ends, and they add up as promised."""
    rows = re.findall(r"^\| `([\w/.]+)` \| (\d+)–(\d+) \|", README, re.MULTILINE)
    [promised] = re.findall(r"^## A class path: (\d+) lines", README, re.MULTILINE)
    assert len(rows) >= 7 and sum(int(last) - int(first) + 1 for _, first, last in rows) == int(promised)
    assert 850 <= int(promised) <= 950
    for name, first, last in rows:
        body = ast.parse((ROOT / name).read_text(encoding="utf-8")).body
        starts = {min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) for node in body}
        assert int(first) in starts | {1}, (name, first)
        assert int(last) in {node.end_lineno for node in body}, (name, last)


# --- recipes, as they stand ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(world, tmp_path_factory) -> Path:
    """A folder from which the README's relative names are right, with a small run of its main command in it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny").symlink_to(ROOT / "tiny")
    (folder / "rules.py").write_text(block("# rules.py").partition("\n\npython ")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(patch, "train.py --estimator bregman", *SMALL, "--evaluation", str(world / "data" / "evaluation.json")) == 0
    return folder


def call(monkeypatch, command: str, *more: str) -> int:
    """A program of ours in this process."""
    program, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [program, *words, *more])
    return {"train.py": train, "evaluate.py": evaluate, "lora.py": lora}[program].main()


def recipe(words: str) -> str:
    """The README's command that holds these words."""
    [found] = [shlex.join(command) for command in commands(README) if words in shlex.join(command)]
    return found


@pytest.mark.parametrize("words", ["--reward rules.py:brief", "--lora-dropout 0.5", "gate_proj"])
def test_a_recipe_trains(home, world, monkeypatch, tmp_path, words):
    monkeypatch.chdir(home)
    small = [*SMALL, "--steps", "2", "--out", str(tmp_path / "run"), "--evaluation", str(world / "data" / "evaluation.json")]
    assert call(monkeypatch, recipe(words), *small) == 0
    assert (tmp_path / "run" / "step-0002" / "policy" / "adapter_config.json").is_file()


def test_resuming_merging_evaluating_reporting_and_chatting_run_as_they_stand(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert call(monkeypatch, recipe("--resume")) == 0
    assert call(monkeypatch, recipe("lora.py merge")) == 0 and (home / "merged" / "model.safetensors").is_file()
    assert call(monkeypatch, "evaluate.py runs/bregman-s0", "--kl-tokens", "100") == 0
    assert call(monkeypatch, recipe("evaluate.py report")) == 0 and (home / "report" / "report.html").is_file()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me about copper.\n"))
    assert call(monkeypatch, recipe("evaluate.py chat")) == 0 and "step 25" in capsys.readouterr().out
    assert call(monkeypatch, recipe("evaluate.py rollout")) == 0
    assert "<html" in (home / "rollout.html").read_text(encoding="utf-8")
    assert {"evaluate.py runs/bregman-s0"} <= {shlex.join(command) for command in commands(README)}


def test_the_memory_of_ones_own_checkpoints_is_planned(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for name, source in (("sft10k", "sft"), ("reward-model", "reward")):
        shutil.copytree(ROOT / "tiny" / source, home / name, dirs_exist_ok=True)
    assert call(monkeypatch, recipe("--policy sft10k"), "--plan") == 0 and "frozen weights" in capsys.readouterr().out


def test_an_estimator_is_added_in_five_lines(world, tmp_path):
    """The recipe in a copy of divergences.py: its table shows the new one, a run trains with it, and nothing overflows."""
    function, _, line = block("def reverse_bregman").rstrip().rpartition("\n\n")
    source = (ROOT / "divergences.py").read_text(encoding="utf-8")
    assert source.count("ESTIMATORS: dict") == 1
    above, below = source.split("ESTIMATORS: dict")
    first, rest = below.split("\n", 1)
    changed = f"{above}{function}\n\n\nESTIMATORS: dict{first}\n    {line}\n{rest}"
    (tmp_path / "divergences.py").write_text(changed, encoding="utf-8")
    table = subprocess.run([sys.executable, "divergences.py"], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert table.returncode == 0 and "reverse_bregman" in table.stdout, table.stderr
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
from divergences import get_estimator
far = torch.tensor([-1e4, -1.0, 0.0])
penalty = get_estimator("reverse_bregman")(far, far.flip(0))
assert penalty.isfinite().all() and (penalty >= 0).all() and penalty[1] == 0, penalty
sys.path.append({str(ROOT)!r})
import train
sys.argv[1:] = ["--estimator", "reverse_bregman", "--steps", "1", "--out", "run", "--evaluation",
                {str(world / "data" / "evaluation.json")!r}, *{SMALL!r}]
sys.exit(train.main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "penalty reverse_bregman" in done.stdout


def shapes(transformers) -> dict:
    """Tiny random models of four families."""
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8)
    return {"llama": transformers.LlamaConfig(**sizes), "qwen2": transformers.Qwen2Config(**sizes),
            "gemma": transformers.GemmaConfig(**sizes),
            "gpt2": transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
def test_ppo_py_takes_a_hugging_face_model_of_any_family(family):
    """Rows are packed to the left, so that positions decide: each row gives the logits that it gives by itself."""
    import transformers

    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(shapes(transformers)[family]).eval()
    names = {"hf": hf}
    exec(block("def policy(ids, mask, keep)"), names)
    ids, mask = torch.randint(3, 40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        logits = names["policy"](ids, mask, 3)
        alone = hf(ids[:1, 4:]).logits[:, -3:]
    assert logits.shape == (2, 3, 40)
    torch.testing.assert_close(logits[:1], alone, atol=1e-5, rtol=1e-4)


def test_lora_py_adapts_a_hugging_face_model_and_peft_reads_what_it_saves(tmp_path, monkeypatch):
    import transformers

    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(shapes(transformers)["llama"]).eval()
    base.save_pretrained("base")
    ids = torch.tensor([[1, 5, 9]])
    before = base(ids).logits
    names = {"model": base, "ids": ids}
    exec(block("from lora import add_lora"), names)
    assert torch.equal(names["reference_logits"], before) and len(lora.lora_layers(base)) == 4
    fresh = transformers.AutoModelForCausalLM.from_pretrained("base")
    assert torch.allclose(peft.PeftModel.from_pretrained(fresh, "adapter")(ids).logits, base(ids).logits, atol=1e-6)
    assert os.path.exists("adapter/adapter_model.safetensors")
