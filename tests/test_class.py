"""The class: every answer of docs/class is applied to a copy of the project, run, and held to what its page claims."""

import ast
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import records
from safetensors.torch import load_file

import ppo
from evaluation import rollout_page

CLASS = ROOT / "docs" / "class"
PAGES = sorted(CLASS.glob("[0-9]*.md"))
ANSWERS = sorted(path.stem for path in (CLASS / "answers").glob("*.patch"))
FEW = ("--rollout-batch-size 8 --step-batch-size 8 --micro-batch-size 8 --rollout-micro-batch-size 8 --response-length 40 "
       "--steps 1 --policy-device cpu --reference-device cpu --out run").split()


class Copy:
    """A copy of the project with an answer applied."""

    def __init__(self, folder: Path, answer: str, world: Path):
        self.folder, self.world = folder / "copy", world
        shutil.copytree(ROOT, self.folder, ignore=shutil.ignore_patterns(
            ".*", "runs", "tests", "docs", "bench", "examples", "__pycache__", "*.egg-info"))
        done = subprocess.run(["git", "apply", str(CLASS / "answers" / f"{answer}.patch")], cwd=self.folder, capture_output=True,
                              text=True)
        assert done.returncode == 0, f"{answer}.patch fits the project no more: {done.stderr}"

    def train(self, *flags: str) -> subprocess.CompletedProcess:
        """A run of a second or two, in run/."""
        few = [*FEW, "--evaluation", str(self.world / "data" / "evaluation.json")]
        return subprocess.run([sys.executable, "train.py", *few, *flags], cwd=self.folder, capture_output=True, text=True)

    def python(self, code: str) -> object:
        """What the code prints, as a literal."""
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ast.literal_eval(done.stdout)

    def metrics(self) -> list[dict]:
        return records(self.folder / "run" / "metrics.jsonl")


@pytest.fixture
def copy(request, tmp_path, world):
    return Copy(tmp_path, request.param, world)


def answered(name: str):
    return pytest.mark.parametrize("copy", [name], indirect=True)


# ---------------------------------------------------------------------------------------------------------------- pages


def test_there_are_ten_exercises_each_with_its_answer():
    assert [page.name[:2] for page in PAGES] == [f"{n:02d}" for n in range(1, 11)]
    named = {name for page in PAGES for name in re.findall(r"answers/([\w-]+)\.patch", page.read_text(encoding="utf-8"))}
    assert named == set(ANSWERS)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert all(f"## {part}" in text for part in ("Change", "Predict", "Answer")), page.name
        assert page.name in (CLASS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["good", "hacked", "endless"])
def test_the_three_pages_are_what_the_program_writes_today(name):
    text = (CLASS / "pages" / f"{name}.html").read_text(encoding="utf-8")
    content = json.loads(text.split('id="content">')[1].split("</script>")[0])
    assert text == rollout_page.page(content["facts"], content["moments"])


def test_gae_by_hand_is_ppo_pys():
    text = (CLASS / "README.md").read_text(encoding="utf-8").replace("−", "-")
    rows = re.findall(r"^\| (\d) \| `[^`]+` \| (-?[\d.]+) \| (-?[\d.]+) \|", text, re.MULTILINE)
    rewards, values = (torch.tensor([[float(row[i]) for row in rows]]) for i in (1, 2))
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 4, dtype=torch.bool), 1.0, 0.95)
    by_hand = dict(re.findall(r"^\| (\d) \| [^|]*= (?:-?[\d.]+) \| (?:[^|]*= )?(-?[\d.]+) \|", text, re.MULTILINE))
    assert [float(by_hand[str(t)]) for t in range(4)] == pytest.approx(advantages[0].tolist(), abs=1.5e-3)
    last = re.search(r"learn A \+ V: (.*)\. The", text)[1]
    assert [float(x) for x in last.split(", ")] == pytest.approx(returns[0].tolist(), abs=1.5e-3)
    whitened = (advantages[0, 0].item() - 0.605) / 2.007
    assert f"{whitened:.3f} for `" in text


# -------------------------------------------------------------------------------------------------------------- answers


@answered("01-an-estimator")
def test_hellinger_is_nearly_unbiased_and_quiet(copy):
    near, far = copy.python("""
        from divergences import schulman_check
        print([schulman_check(mean)["hellinger"] for mean in (0.1, 1.0)])""")
    # 4 (1 − exp(−μ²/8)) over μ²/2
    assert near[0] == pytest.approx(-0.001, abs=1e-3) and far[0] == pytest.approx(-0.060, abs=1e-3) and near[1] < 1.5
    assert copy.train("--estimator", "hellinger").returncode == 0


@answered("02-where-the-score-lands")
def test_wherever_the_score_lands_the_whole_of_it_is_paid(copy):
    sums, firsts = copy.python("""
        import torch, ppo
        responses = torch.tensor([[5, 9, 6, 9, 2], [5, 6, 2, 0, 0]])  # 9: a full stop
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
        scores, penalties, values = torch.tensor([2.0, -1.0]), torch.rand(2, 5), torch.rand(2, 5)
        found = [ppo.shape_rewards(scores, penalties, mask, 0.1, ppo.landing(responses, mask, where, [9]))
                 for where in ("last", "spread", "sentences")]
        print(([rewards.sum(1).tolist() for rewards in found],
               [ppo.gae(rewards, values, mask, 1.0, 1.0)[1][:, 0].tolist() for rewards in found]))""")
    for found in (sums, firsts):
        assert found[1] == pytest.approx(found[0], abs=1e-6) and found[2] == pytest.approx(found[0], abs=1e-6)
    assert copy.train("--landing", "sentences").returncode == 0


@answered("03-without-a-value-model")
def test_answers_are_measured_by_one_another_and_no_value_is_learned(copy):
    rloo, grpo = copy.python("""
        import torch, ppo
        rewards, mask = torch.tensor([[0.0, 1.0], [1.0, 2.0]]), torch.ones(2, 2).bool()
        print([ppo.among_answers(rewards, mask, kind, 2).tolist() for kind in ("rloo", "grpo")])""")
    assert rloo == [[-2.0, -2.0], [2.0, 2.0]] and grpo[1] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert copy.train("--advantage", "rloo", "--answers", "4").returncode == 0
    value = load_file(copy.folder / "run" / "step-0001" / "value" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in value.items() if "lora_B" in name)
    asked = [sample["instruction"] for sample in records(copy.folder / "run" / "samples.jsonl")]
    assert len(asked) == 4 and len(set(asked)) == 1


@answered("04-kl-in-the-loss")
def test_the_gradient_of_a_good_estimate_need_not_be_a_good_gradient(copy):
    """On average over the policy's samples. In the loss, where the estimate is differentiated: of k1 it is 0, of k2 the KL's own,
    of k3 that of the other KL, of π_ref to π. In the reward, where the policy gradient weighs ∇ log π by the estimate: of k1 the
    KL's own, of k3 the difference of the two."""
    found = copy.python("""
        import torch, divergences
        torch.manual_seed(0)
        theta, ref = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64).log_softmax(0)
        pi = theta.log_softmax(0)
        def gradient(x):
            return torch.autograd.grad(x, theta, retain_graph=True)[0].tolist()
        weights = pi.exp().detach()  # of the samples: the policy's, and not differentiated
        means = {name: gradient((weights * divergences.ESTIMATORS[name](pi, ref)).sum())
                 for name in ("kl", "squared_error", "bregman")}
        means |= {f"paid {name}": gradient((weights * divergences.ESTIMATORS[name](pi, ref).detach() * pi).sum())
                  for name in ("kl", "bregman")}
        print(means | {"true": gradient((pi.exp() * (pi - ref)).sum()), "reverse": gradient((ref.exp() * (ref - pi)).sum())})""")
    assert found["kl"] == pytest.approx([0.0] * 5, abs=1e-12)
    assert found["squared_error"] == pytest.approx(found["true"], abs=1e-12)
    assert found["bregman"] == pytest.approx(found["reverse"], abs=1e-12)
    assert found["bregman"] != pytest.approx(found["true"], rel=0.1)
    assert found["paid kl"] == pytest.approx(found["true"], abs=1e-12)
    difference = [a - b for a, b in zip(found["true"], found["reverse"], strict=True)]
    assert found["paid bregman"] == pytest.approx(difference, abs=1e-12)
    assert copy.train("--kl-in-loss", "--estimator", "squared_error", "--beta", "0.3").returncode == 0


@answered("05-no-whitening")
def test_without_whitening_advantages_have_the_rewards_size(copy):
    on, off = copy.python("""
        import torch, ppo
        model = lambda ids, mask, keep: torch.zeros(len(ids), keep, 7)
        def deviation(scale, **changes):
            config = ppo.PPOConfig(rollout_batch_size=4, step_batch_size=4, micro_batch_size=4, response_length=3,
                                   whiten_rewards=False, **changes)
            reward = lambda ids, mask, n: scale * torch.tensor([1.0, 2.0, 3.0, 4.0])
            actors = ppo.Actors(model, lambda ids, mask: torch.zeros(ids.shape), model, reward,
                                lambda ids, mask: torch.full((len(ids), 3), 5), 2, 0)
            prompts = torch.ones(4, 2, dtype=torch.long)
            rollout = ppo.collect(actors, lambda p, q: torch.zeros_like(p), prompts, torch.ones_like(prompts), config)
            return rollout.advantages.std(correction=0).item()
        print([[deviation(scale, whiten_advantages=whitened) for scale in (1.0, 10.0)] for whitened in (True, False)])""")
    assert on == pytest.approx([1.0, 1.0], abs=1e-4) and off[1] == pytest.approx(10 * off[0], rel=1e-5)
    assert copy.train("--no-whiten-advantages").returncode == 0


@answered("06-mask-too-long")
def test_a_mask_that_is_too_long_is_noticed_before_the_first_update(copy):
    done = copy.train()
    assert done.returncode == 1 and "masks, positions or weights disagree" in done.stderr
    assert not (copy.folder / "run" / "metrics.jsonl").exists()


@answered("06-mask-too-short")
def test_a_mask_that_is_too_short_is_noticed_by_what_never_ends(copy):
    done = copy.train()
    assert done.returncode == 0 and "100 % of the responses never end" in done.stdout
    assert copy.metrics()[0]["finished"] == 0


@answered("07-eos-never-sampled")
def test_a_sampler_that_skips_eos_is_not_the_policy(copy):
    done = copy.train()
    assert done.returncode == 1 and "masks, positions or weights disagree" in done.stderr


@answered("07-no-eos-at-all")
def test_a_policy_without_eos_writes_to_the_limit(copy):
    done = copy.train()
    assert done.returncode == 0 and "100 % of the responses never end" in done.stdout
    assert copy.metrics()[0]["length"] == 40 and copy.metrics()[0]["finished"] == 0


@answered("08-alpha")
def test_alpha_1_moves_the_policy_far_less_than_64(copy):
    kl = []
    for flags in ([], ["--lora-alpha", "64"]):
        assert copy.train("--steps", "2", "--warmup-steps", "1", *flags).returncode == 0
        kl.append(copy.metrics()[1]["true_kl"])
        shutil.rmtree(copy.folder / "run")
    assert kl[1] > 300 * kl[0]


@answered("09-a-reward-to-hack")
def test_the_reward_that_is_hacked_counts_full_stops(copy):
    assert copy.train("--reward", "hackable.py:informative").returncode == 0
    for sample in records(copy.folder / "run" / "samples.jsonl"):
        assert sample["score"] == sample["response"].count(".")


@answered("10-bias-on-text")
def test_the_noise_of_a_whole_response_is_that_of_its_sum(copy):
    """Errors 1, −1 | 2 | 1: sums 0, 2, 1, of deviation 1 (n − 1)."""
    found = copy.python("""
        import torch
        from evaluation.measure import estimator_quality
        values = {"true_kl": torch.zeros(4), "kl": torch.tensor([1.0, -1.0, 2.0, 1.0])}
        print(estimator_quality([2, 1, 1], values)["kl"])""")
    assert found["of_a_response"] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------------- notebook


def test_the_walkthrough_runs_from_start_to_end():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="the walkthrough is run in a kernel")
    file = ROOT / "docs" / "walkthrough.ipynb"
    assert file.stat().st_size < 150_000
    notebook = nbformat.read(file, as_version=4)
    committed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in committed] == list(range(1, len(committed) + 1))
    assert "<iframe" in json.dumps(committed[-1].outputs)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(file.parent)}}).execute()
    fresh = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "<iframe" in json.dumps(fresh[-1].outputs) and "error" not in {o.output_type for cell in fresh for o in cell.outputs}
