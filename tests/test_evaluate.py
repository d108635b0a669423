"""What evaluate.py promises about run folders: any of three judges, files that other tools read, nothing lost or mixed."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from runs import records, settings, start

import evaluate
import train
from divergences import ESTIMATORS


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    start(settings(world, out, steps=2, evaluation=None))
    config = json.loads((out / "config.json").read_text()) | {"evaluation": str(world / "data" / "evaluation.json")}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs evaluate.py with these arguments; returns (exit code, what it printed, what it complained about)."""
    def call(*argv) -> tuple[int, str, str]:
        if argv[0] not in evaluate.COMMANDS and "--kl-tokens" not in argv:
            argv = *argv, "--kl-tokens", 1
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
        code = evaluate.main()
        said = capsys.readouterr()
        return code, said.out, re.sub(r".*\r", "", said.err)

    return call


def results(run: Path) -> dict[str, dict]:
    return json.loads((run / "evaluation.json").read_text(encoding="utf-8"))


def test_a_run_is_measured_beside_sft_with_kl_estimates_and_files_for_other_tools(run, call):
    code, out, _ = call(run, "--kl-tokens", 300)
    assert code == 0 and "SFT" in out and "step-0002" in out and "what each penalty says on the same tokens" in out
    found = results(run)
    assert found["SFT"]["true_kl"] == 0 and found["step-0002"]["kl_tokens"] >= 300
    assert set(found["step-0002"]["estimators"]) == set(ESTIMATORS) - {"none"}
    outputs = json.loads((run / "outputs" / "step-0002" / "model_outputs.json").read_text())
    assert [set(entry) for entry in outputs] == [{"instruction", "output", "generator", "dataset"}] * 12
    assert [entry["output"] for entry in outputs] == found["step-0002"]["responses"]
    references = json.loads((run / "outputs" / "reference_outputs.json").read_text())
    assert [r["instruction"] for r in references] == [entry["instruction"] for entry in outputs]


def test_the_annotations_of_a_run_give_its_win_rate_again(run, call):
    call(run)
    code, out, _ = call("winrate", "--annotations", run / "outputs" / "step-0002" / "annotations.json")
    rate, error = (results(run)["step-0002"][key] for key in ("win_rate", "win_rate_se"))
    assert code == 0 and out.startswith(f"{rate:.2f} ± {error:.2f} %  step-0002 against reference: n = 12")


def test_several_files_of_annotations_are_runs_with_a_bootstrap_over_them(tmp_path, call):
    for name, preferences in (("a", [1, 2]), ("b", [2, 2]), ("c", [1, 1, None])):
        (tmp_path / name).write_text(json.dumps([{"preference": p} for p in preferences]))
    code, out, _ = call("winrate", "--annotations", *(tmp_path / name for name in "abc"))
    mean, error = evaluate.bootstrap([50.0, 100.0, 0.0])
    assert code == 0 and "n = 2, 0 ties (half each), 1 without a readable preference" in out
    assert out.splitlines()[-1].startswith(f"{mean:.2f} ± {error:.2f} %  mean and bootstrap standard error over 3 files")


def test_results_of_other_settings_stand_beside_each_other_and_replace_nothing(run, call, tmp_path):
    """A quick look at 5 instructions, judged by the reward model itself, once took the benchmark's place in the report."""
    call(run, "--step", "1")
    call(run, "--step", "2")
    assert list(results(run)) == ["SFT", "step-0001", "step-0002"]
    whole = results(run)
    outputs = (run / "outputs" / "step-0002" / "model_outputs.json").read_text(encoding="utf-8")
    _, out, _ = call(run, "--limit", 5, "--judge", "reward")
    assert "step-0002-n-5-judge-reward, beside what was measured with other settings" in out
    found = results(run)
    assert {name: found[name] for name in whole} == whole
    assert {name: r["n"] for name, r in found.items() if name not in whole} == {
        "SFT-n-5-judge-reward": 5, "step-0002-n-5-judge-reward": 5}
    assert (run / "outputs" / "step-0002" / "model_outputs.json").read_text(encoding="utf-8") == outputs
    call(run, "--limit", 5, "--judge", "reward")  # again: the same names
    assert list(results(run)) == list(found)
    code, out, _ = call("report", run, "--out", tmp_path / "report")
    assert code == 0 and "measured on 12 instructions" in out and "also holds: 5 instructions" in out and "judge reward" in out
    code, out, _ = call("report", run, "--out", tmp_path / "report", "--judge", "reward")
    assert code == 0 and "measured on 5 instructions" in out


def test_a_damaged_evaluation_is_not_written_over(run, call):
    (run / "evaluation.json").write_text('{"SFT": 1')
    code, _, err = call(run)
    assert code == 2 and "evaluation.json: no JSON object" in err and (run / "evaluation.json").read_text() == '{"SFT": 1'


def test_instructions_that_are_left_out_are_said_and_stored(run, call, world, tmp_path):
    tasks = json.loads((world / "data" / "evaluation.json").read_text(encoding="utf-8"))
    long = tasks[0] | {"input": "word " * 400}
    (tmp_path / "some.json").write_text(json.dumps([*tasks, long]))
    _, out, _ = call(run, "--data", tmp_path / "some.json", "--judge", "none")
    assert "evaluation: 12 instructions, 1 more left out as longer than 192 tokens (--query-length)" in out
    assert results(run)["step-0002"]["left_out"] == 1
    _, out, _ = call(run, "--data", tmp_path / "some.json", "--judge", "none", "--query-length", 2000)
    assert "evaluation: 13 instructions\n" in out


def test_a_checkpoint_on_another_base_model_is_refused(run, call, world, tmp_path):
    """The path is the same and the weights behind it are others: answers and KL would be of neither."""
    base = shutil.copytree(world / "sft", tmp_path / "sft")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((run / "config.json").read_text()) | {"policy": str(base)}
    (run / "config.json").write_text(json.dumps(config))
    for argv in ((run,), ("chat", run)):
        code, _, err = call(*argv)
        assert code == 2 and f"--policy {base} is not what {run}/step-0002 was trained with" in err


def test_an_llm_judges_and_a_second_evaluation_asks_nothing(run, call, serve, monkeypatch):
    server = serve(429, "malformed", answer="They differ little. Verdict: 2")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    flags = ("--judge", "openai", "--judge-model", "tiny-llm", "--base-url", server.url)
    code, out, err = call(run, *flags)
    assert code == 0, err
    found = results(run)["step-0002"]
    assert found["judge"] == "tiny-llm" and found["judged"] == 12
    annotations = json.loads((run / "outputs" / "step-0002" / "annotations.json").read_text())
    assert all(a["preference"] == (2.0 if a["shown_first"] == 1 else 1.0) for a in annotations if a["annotator"] != "identical")
    asked = len(server.seen)
    code, out, _ = call(run, *flags)
    assert code == 0 and len(server.seen) == asked
    assert not any("sk-secret" in file.read_text(encoding="utf-8") for file in run.rglob("*.json*"))


def test_a_server_that_refuses_ends_in_one_line_and_keeps_what_was_judged(run, call, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(*["ok"] * 5, 401)
    flags = ("--judge", "openai", "--judge-model", "m", "--base-url", server.url, "--parallel", 1)
    code, _, err = call(run, *flags)
    assert code == 2 and err.count("\n") == 1 and "HTTP 401" in err and "OPENAI_API_KEY" in err and "sk-secret" not in err
    assert len(records(run / "judgements.jsonl")) == 5 and not (run / "evaluation.json").exists()
    assert call(run, *flags)[0] == 0


def test_a_pair_that_the_server_refuses_is_left_out_and_said(run, call, serve):
    prompts: list[str] = []

    def answer(body):
        prompts.append(body["messages"][0]["content"])
        refused = {"status": 400, "body": {"error": {"message": "blocked by the content filter"}}}
        return refused if prompts[-1] == prompts[0] else {"text": "Verdict: 1", "finish_reason": "length"} if (
            prompts[-1] == prompts[1]) else "Verdict: 1"

    flags = ("--judge", "openai", "--judge-model", "m", "--base-url", serve(answer=answer).url, "--parallel", 1)
    for _ in range(2):
        code, out, err = call(run, *flags)
        assert code == 0, err
        assert "judgements that could not be read or were refused, left out: SFT 2" in out
        assert "1 cut off at 300 tokens" in out and "1 refused by the server" in out and "blocked by the content filter" in out
    annotations = json.loads((run / "outputs" / "SFT" / "annotations.json").read_text())
    assert [a["preference"] for a in annotations if "refused" in a] == [None] and results(run)["SFT"]["judged"] == 10
    assert not any("refused" in record for record in records(run / "judgements.jsonl"))


def test_a_server_that_refuses_every_pair_ends_in_one_line_and_writes_nothing(run, call, serve):
    before = set(run.rglob("*"))
    url = serve(answer={"status": 400, "body": {"error": {"message": "no model m"}}}).url
    code, _, err = call(run, "--judge", "openai", "--judge-model", "m", "--base-url", url)
    assert code == 2 and err.count("\n") == 1 and "HTTP 400" in err and "no model m" in err and set(run.rglob("*")) == before


def test_the_runs_reward_model_can_judge(run, call, world):
    assert call(run, "--judge", "reward")[0] == 0
    own = results(run)["step-0002"]["preferences"]
    assert set(own) <= {1.0, 1.5, 2.0} and results(run)["step-0002"]["judge"] == "reward"
    assert call(run, "--judge", "reward", "--judge-reward", world / "reward")[0] == 0
    assert results(run)["step-0002"]["preferences"] == own  # the same model, loaded by name


def test_bios_are_written_for_factscore_and_checked_against_passages(run, call, serve, tmp_path):
    (tmp_path / "people.txt").write_text("Ada Lovelace\nMarie Curie\n")
    (tmp_path / "passages.jsonl").write_text("".join(
        json.dumps({"title": name, "text": f"{name} was a scientist."}) + "\n" for name in ("Ada Lovelace", "Marie Curie")))

    def answer(body):
        prompt = body["messages"][0]["content"]
        if "atomic facts" in prompt:
            return "- She was a scientist.\n- She was a baker."
        return str("scientist.\n[#0 end]" in prompt) if "statement" in prompt else "Verdict: tie"

    flags = ("--topics", tmp_path / "people.txt", "--passages", tmp_path / "passages.jsonl", "--judge", "openai",
             "--judge-model", "m", "--base-url", serve(answer=answer).url)
    code, out, err = call(run, *flags)
    assert code == 0, err
    lines = records(run / "outputs" / "step-0002" / "factscore.jsonl")
    assert [line["topic"] for line in lines] == ["Ada Lovelace", "Marie Curie"]
    assert all(set(line) == {"topic", "output"} for line in lines)
    found = results(run)["step-0002"]
    assert (found["factscore"], found["fact_precision"], found["facts"]) == (50, 50, 2) and "fact precision" in out


@pytest.mark.parametrize(("flags", "message"), [
    (["--judge", "openai", "--judge-model", "m"], "https://api.openai.com/v1 wants a key, in OPENAI_API_KEY"),
    (["--judge", "openai"], "needs --judge-model NAME or --judge-pool FILE"),
    (["--judge-model", "m"], "--judge-model goes with --judge openai, not auto"),
    (["--judge", "openai", "--judge-model", "m", "--base-url", "nonsense"], "--base-url 'nonsense'"),
    (["--judge-reward", "x"], "--judge-reward goes with --judge reward"),
    (["--passages", "p", "--judge", "openai", "--judge-model", "m"], "--passages needs --topics"),
    (["--parallel", "0"], "--parallel 0: must be at least 1"), (["--limit", "-1"], "--limit -1"),
    (["--kl-tokens", "0"], "--kl-tokens 0"), (["--judge-timeout", "0"], "--judge-timeout 0.0"),
    (["--step", "last"], "--step last: must be a whole number, or all"), (["--step", "9"], "holds checkpoints [1, 2]"),
    (["--data", "nowhere.json"], "nowhere.json"), (["--topics", "nowhere.txt"], "nowhere.txt")])
def test_wrong_flags_are_one_line_and_write_nothing(run, call, flags, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    before = {p: p.stat().st_mtime for p in run.rglob("*")}
    code, _, err = call(run, *flags)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert {p: p.stat().st_mtime for p in run.rglob("*")} == before


def test_instructions_without_outputs_cannot_be_judged(run, call, tmp_path):
    (tmp_path / "plain.json").write_text('[{"instruction": "Name a metal."}]')
    code, _, err = call(run, "--data", tmp_path / "plain.json", "--judge", "reward")
    assert code == 2 and "evaluation instruction 1 has no output to compare answers with" in err


def test_an_interrupted_evaluation_says_how_to_go_on(run, call, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "compare", interrupted)
    code, _, err = call(run)
    assert code == 130 and "goes on from there" in err


def test_a_run_is_reported_from_what_evaluate_left(run, call, tmp_path):
    call(run, "--step", "all")
    code, out, err = call("report", run, "--out", tmp_path / "report")
    assert code == 0, err
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "Bregman" in page and "Table 3" in page and "<details" in page


def test_a_run_that_was_never_evaluated_cannot_be_reported(run, call, tmp_path):
    code, _, err = call("report", run, "--out", tmp_path / "report")
    assert code == 2 and "--step all makes them" in err and not (tmp_path / "report").exists()


def test_a_folder_that_is_neither_run_nor_adapter_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tmp_path)])
    assert evaluate.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "neither a run folder" in error


@pytest.fixture
def strangers_run(run, tmp_path) -> Path:
    """A run folder whose config.json names code that leaves a trace when it is run."""
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')\n"
                                        "def rule(prompts, responses):\n    return [1.0] * len(responses)\n")
    config = json.loads((run / "config.json").read_text()) | {"reward": f"{tmp_path / 'theirs.py'}:rule"}
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_a_strangers_run_folder_runs_no_code(strangers_run, call, tmp_path, monkeypatch, capsys):
    code, out, _ = call(strangers_run, "--limit", 2)
    assert code == 0 and f"--reward {tmp_path / 'theirs.py'}:rule" in out and "reward" not in results(strangers_run)["SFT"]
    code, _, err = call(strangers_run, "--limit", 2, "--judge", "reward")
    assert code == 2 and "which is code: name it" in err and err.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a metal.\n"))
    assert call("chat", strangers_run)[0] == 0
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(strangers_run)])
    assert train.main() == 2 and "runs only when it is named" in capsys.readouterr().err
    assert not (tmp_path / "was here").exists()


def test_a_rule_that_is_named_again_is_run(strangers_run, call, tmp_path):
    code, _, _ = call(strangers_run, "--limit", 2, "--reward", f"{tmp_path / 'theirs.py'}:rule")
    assert code == 0 and results(strangers_run)["SFT"]["reward"] == 1 and (tmp_path / "was here").exists()
