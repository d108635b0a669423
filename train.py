# SPDX-License-Identifier: MIT
"""Stage 3, the main job: align a policy with PPO and LoRA against a reward model (Sun, Gupta, Iyyer 2023, sections 2 and 3).

    python train.py --estimator bregman                       # the miniature world, on whatever this machine has
    python train.py --estimator jensen_shannon --policy llama-sft10k --reward reward-model --data ppo.json   # real ones
    python train.py --config runs/bregman-s0/config.json --beta 0.1       # another run's settings but for one; or YAML
    python train.py --resume --out runs/bregman-s0            # go on where a run stopped; with more --steps, beyond its end
    python train.py --plan --policy llama-sft10k ...          # the memory it would need on each device
    torchrun --standalone --nproc-per-node 4 train.py ...     # the same run, shared by four processes (docs/scale.md)

One PPO step: sample responses, let four models read them, shape rewards (Eq. 3), estimate advantages, take a few clipped
optimiser steps (Eq. 2). All of that is in ppo.py; here is the loop around it, and training/ holds what the loop needs. A run
folder holds config.json, about.json (commit, date), metrics.jsonl (a line a step), samples.jsonl, evaluations.jsonl, curves.png
and step-0020/{policy,value,trainer}, whose policy/ PEFT loads as it is.

Departures from the released code: frozen weights on one device are shared, so that one GPU is enough; checkpoint N is saved
after step N with every random state, so that a resumed run repeats the one that was never stopped.
"""

import contextlib
import sys
import traceback
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from tqdm import tqdm

import ppo
from data import left_pad, load_instructions, tokenize_prompts
from divergences import get_estimator
from evaluation.card import write_card
from evaluation.measure import Benchmark, evaluate_now, load_benchmark, measure_true_kl
from evaluation.tables import before_after
from formats.tokenizer import load_tokenizer
from formats.write import any_console, write_json
from reward import RuleError
from training import launch, ranks, record
from training.checkpoint import LINES, State, load_checkpoint, save_bundle, save_checkpoint
from training.config import RunConfig, build_config, build_parser, read_config, settings_in, stored_config
from training.devices import gradient_gap, require_device, resolve_devices, same_kernels
from training.folder import check_run_folder, checkpoints_line, cut_after, locked, own_folder, read_lines
from training.interrupts import Interrupts, Stopped, exit_code
from training.models import Models, build_models, choose_dtype
from training.origin import about, check_origin, texts_digest
from training.plan import Shards, plan_of, require_sharable, shards_of
from training.progress import LEGEND, StepProgress, describe_run, save_samples, step_line, terminal_columns
from training.rewards import is_rule
from training.watch import Watch

# Which model lives where (the paper's two GPUs, "Limitations"). --policy-device and --reference-device override it; with
# fewer devices both fall to what there is, and models with the same frozen weights then share them.
POLICY_DEVICE = "cuda:0"     # policy and value: trained
REFERENCE_DEVICE = "cuda:1"  # reference and reward: frozen


def train(run: RunConfig, resume: bool = False) -> Path:
    """The whole run, in a folder that no other process is in; returns it."""
    ranks.require_even(run.ppo)
    out = Path(run.out)
    with contextlib.ExitStack() as until_the_end:
        ranks.first(until_the_end.enter_context, locked(out))
        train_in(out, run, resume)
    return out


def train_in(out: Path, run: RunConfig, resume: bool) -> None:
    """From the data to the last table; every check that needs no model comes first."""
    checkpoint = ranks.first(check_run_folder, out, resume)  # before anything slow
    print(place(run))
    shards = ranks.each(lambda: shards_of(run))
    models, state, benchmark = ranks.each(lambda: prepare(run, checkpoint, shards))
    ranks.require_equal("what is loaded:", state.origin | {"dtype": run.dtype, "step": state.step})
    ranks.alike(models.trained())
    ranks.first(write_json, out / "config.json", run.to_dict())
    if not checkpoint:
        ranks.first(write_json, out / "about.json", about())
    for name in LINES:
        ranks.first(cut_after, out / name, state.step if checkpoint else -1)
    with Interrupts() as interrupts:
        try:
            stop = launch.watched(loop, run, models, state, benchmark, interrupts)
        except (FloatingPointError, RuleError, launch.Lost) as error:
            error.args = (explain(error, out, state.step + 1, models.sampled),)
            raise
    if stop:
        raise Stopped(f"stopped by {stop.name} after step {state.step} of {run.steps}; go on with: python train.py --resume "
                      f"--out {out}", stop)
    ranks.first(finish, out, benchmark)


def prepare(run: RunConfig, checkpoint: Path | None, shards: Shards | None) -> tuple[Models, State, Benchmark | None]:
    """Everything that a run needs, as it is before its first step or where the checkpoint left it."""
    torch.manual_seed(run.seed)
    tokenizer = load_tokenizer(run.policy).for_template(run.prompt_template, run.system)
    print(f"data: {(rows := load_instructions(run.data)).note}")
    prompts = tokenize_prompts(rows, tokenizer, run.prompt_template, run.query_length, "--query-length")
    origin, benchmark = {"data": texts_digest(prompts.ids, prompts.examples)}, None
    if run.evaluation:
        benchmark = load_benchmark(run.evaluation, tokenizer, run.prompt_template, run.query_length)
        origin["evaluation"] = texts_digest(benchmark.prompts, benchmark.tasks)
    if checkpoint:
        check_origin(checkpoint, origin, vars(run))
    models = build_models(run, tokenizer, shards)
    print("\n".join(models.notes))
    state = State.at_start(run, models, prompts)
    state.origin = origin | models.origin | {"instructions": len(prompts.ids), "dropped": prompts.dropped}
    print(describe_run(run, models, state) + (f"\n{benchmark.in_words(run.query_length)}" if benchmark else ""))
    if checkpoint:
        load_checkpoint(run, models, state, checkpoint)
        print(f"resumed from {checkpoint}")
    return models, state, benchmark


def explain(error: Exception, out: Path, step: int, sampled: list[tuple[torch.Tensor, ...]]) -> str:
    """The error's words with the step, where its batch was saved and what there is to go on from."""
    team = ranks.here()
    if getattr(error, "everybodys", False):  # met in another process perhaps: all of them are here, to say what they sampled
        sampled = [chunk for part in team.gather(lambda: sampled) for chunk in part]
    if team.rank and ranks.is_everybodys(error):
        return str(error)
    bundle = "" if isinstance(error, launch.Lost) else save_bundle(out, step, error, sampled)
    return f"step {step}: {error}{bundle}; {checkpoints_line(out)}"


def place(run: RunConfig) -> str:
    """Puts the models where they were asked for or else pinned, or where there is a device; returns a line that says so.
    config.json then holds what the run had: resumed elsewhere, "auto" could mean another dtype."""
    asked = run.policy_device or POLICY_DEVICE, run.reference_device or REFERENCE_DEVICE
    run.policy_device, run.reference_device, line = resolve_devices(*asked)
    run.dtype = str(choose_dtype(run, run.policy_device)).removeprefix("torch.")
    return line


def loop(run: RunConfig, models: Models, state: State, benchmark: Benchmark | None, interrupts: Interrupts) -> Signals | None:
    """Steps until the last one or a signal, which is returned; checkpoints every save_every, evaluations every eval_every."""
    out = Path(run.out)
    keep, watch = record.Record(run, state.step), Watch(ranks.first(read_lines, out / "metrics.jsonl"))

    def evaluate(label: str, step: int) -> None:
        ranks.first(keep, "evaluations", {"step": step} | evaluate_now(models, run, benchmark, label))

    with tqdm(total=run.steps, initial=state.step, desc="PPO", unit="step", position=0) as bar:
        if benchmark and state.step == 0 and not models.shared:
            evaluate("before", 0)
        tqdm.write(LEGEND)
        stop = interrupts.agreed()
        while state.step < run.steps and not stop:
            metrics, rollout, rows = step_or_save(out, models, state, run)
            ranks.first(keep, "metrics", metrics)
            tqdm.write("\n".join([step_line(metrics, terminal_columns()), *watch(metrics)]))
            bar.update()
            ranks.first(save_samples, out / "samples.jsonl", state, rollout, rows[:4], models.tokenizer)
            if benchmark and state.step == 1 and models.shared:  # the start is the policy without its adapter: a step comes first
                evaluate("before", 0)
            if benchmark and (state.step == run.steps or run.eval_every and state.step % run.eval_every == 0):
                evaluate(f"step {state.step}", state.step)
            stop = interrupts.agreed()
            if state.step % run.save_every == 0 or state.step == run.steps or stop:
                ranks.first(save_checkpoint, out, run, models, state, write_card)
    return stop


def step_or_save(out: Path, models: Models, state: State, run: RunConfig) -> tuple[dict[str, float], ppo.Rollout, list[int]]:
    """ppo_step; where the user's rule fails in it, the steps before it are saved."""
    before = state.position(models.policy_device)
    try:
        return ppo_step(models, state, run)
    except RuleError:
        state.go_to(before, models.policy_device)
        if state.step and state.step % run.save_every:
            ranks.first(save_checkpoint, out, run, models, state, write_card)
        raise


def ppo_step(models: Models, state: State, run: RunConfig) -> tuple[dict[str, float], ppo.Rollout, list[int]]:
    """One rollout and the updates on it; returns the step's metrics, the rollout and which prompts it answered."""
    config, actors = run.ppo, models.actors(run.ppo, state.sampling)
    progress = StepProgress(config)
    rows = state.stream.next_batch(config.rollout_batch_size)
    prompts = [state.prompts.ids[i] for i in rows]
    models.asked.now(prompts, [state.prompts.examples[i] for i in rows])
    input_ids, attention_mask = left_pad(prompts, actors.pad_token_id)
    models.mode(training=False)
    rollout = ppo.collect(actors, get_estimator(run.estimator), input_ids, attention_mask, config, state.beta, progress)
    metrics = ppo.rollout_stats(rollout) | true_kl_of(actors, rollout, config.temperature) | {"beta": state.beta}
    judged = ppo.judged_scores(rollout.scores, rollout.finished, config.missing_eos_penalty)
    shaped = ppo.shape_rewards(judged, rollout.penalties, rollout.mask, state.beta)
    metrics["shaped_reward"] = shaped.sum(1).mean().item()
    if state.step == 0:
        ranks.each(lambda: self_check(models, rollout, run))

    rate = ppo.learning_rate(state.step + 1, config)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    models.mode(training=True)
    progress.resume()
    metrics |= ppo.update(actors, rollout, state.optimizer, config, state.shuffling, progress)
    models.mode(training=False)
    if config.kl_target is not None:
        state.beta = ppo.adapt_beta(state.beta, metrics["kl_k1"], config.kl_target, config.kl_horizon, len(rollout))
    state.step += 1
    seconds = {f"seconds_{phase}": round(s, 3) for phase, s in progress.seconds.items()}
    return {"step": state.step, "learning_rate": rate} | metrics | seconds, rollout, rows


def true_kl_of(actors: ppo.Actors, rollout: ppo.Rollout, temperature: float) -> dict[str, float]:
    """True KL per token over the vocabulary with its error, on the first quarter of the rollout, 8 to 32 responses."""
    rows = min(32, max(8, len(rollout) // 4))
    prompts = [p[m.bool()].tolist() for p, m in zip(rollout.prompts[:rows], rollout.prompt_mask[:rows], strict=True)]
    responses = [r[m].tolist() for r, m in zip(rollout.responses[:rows], rollout.mask[:rows], strict=True)]
    return dict(zip(("true_kl", "true_kl_se"), measure_true_kl(actors, prompts, responses, temperature), strict=True))


class SelfCheckError(RuntimeError):
    """The arithmetic of rollout, reference and update does not agree."""


def self_check(models: Models, rollout: ppo.Rollout, run: RunConfig) -> None:
    """Before the first update the ratio is 1 and the reference is the policy; anything else is a bug and stops the run."""
    dtype, its_dtype = (model.lm_head.weight.dtype for model in (models.policy, models.reference))
    exact = dtype == torch.float32
    # Compiled layers are held against plain ones: in float32 those that sampled, in bf16, where compiled ones read, those here.
    with torch.compiler.set_stance("force_eager") if run.compile and not exact else contextlib.nullcontext():
        check = ppo.self_check(models.policy_logits, rollout, run.ppo)
    # bf16 rounds otherwise in a batch of another shape, by up to a third for single tokens: there the mean is what tells.
    ratio, ratio_tolerance = (check["ratio_error"], 1e-3) if exact else (check["ratio_error_mean"], 0.1)
    # Policy and reference read the very same batches: where dtype and kernels are the same, they give equal numbers. Compiled
    # with adapters and without, kernels are not.
    same = not run.compile and dtype == its_dtype and same_kernels(models.policy_device, models.reference_device)
    gap, gap_tolerance = check["reference_gap"], 1e-3 if exact else 0.0
    if not same:
        gap, gap_tolerance = check["reference_gap_mean"], 1e-3 if exact and its_dtype == dtype else 0.1
    line = (f"self-check over {int(rollout.mask.sum()):,} tokens: ratio 1 ± {check['ratio_error']:.1e} (mean "
            f"{check['ratio_error_mean']:.1e}), |log π − log π_ref| ≤ {check['reference_gap']:.1e} before the first update")
    if not (ratio <= ratio_tolerance and gap <= gap_tolerance):  # NaN is none of both
        raise SelfCheckError(f"{line}: must be 0 within {ratio_tolerance} and {gap_tolerance}; masks, positions or weights "
                             "disagree")
    if run.compile:
        batch = rollout.micro_batch(torch.arange(min(run.ppo.micro_batch_size, len(rollout)), device=rollout.mask.device))
        off = gradient_gap(models.policy, lambda: ppo.actor_loss(models.policy_logits, batch, run.ppo)[0])
        line += f"; gradients of compiled layers off by {off:.1e}"
        if not off <= (1e-2 if exact else 0.1):
            raise SelfCheckError(f"{line} of their length: torch {torch.__version__} compiles wrong ones; leave out --compile")
    tqdm.write(line)


def finish(out: Path, benchmark: Benchmark | None) -> None:
    """The before/after table, three pairs of answers, the picture, and where all of it lies."""
    evaluations = read_lines(out / "evaluations.jsonl")
    if evaluations:
        print("\n" + before_after(evaluations[0], evaluations[-1], benchmark.tasks))
    picture = (out / "curves.png").is_file()  # drawn with the last checkpoint, whose card shows it
    print(f"\nwritten to {out}: {', '.join(sorted(p.name for p in out.iterdir() if not p.name.startswith('.')))}"
          + ("" if picture else "\ncurves.png needs matplotlib: pip install matplotlib"))


def configure(given: dict[str, Any], resume: bool) -> RunConfig:
    """The run that the flags describe, or that a resumed folder holds."""
    for name in ("policy_device", "reference_device"):
        require_device(f"--{name.replace('_', '-')}", given.get(name))
    file = given.pop("config", None)
    if file and resume:
        raise ValueError(f"--config {file} with --resume: a resumed run has its own, in its folder")
    if file:
        given.update(settings_in(Path(file)) | given)
    run = stored_config(given) if resume else build_config(given)
    if resume and is_rule(run.reward) and "reward" not in given:
        raise ValueError(f"--resume: the run's reward is the rule {run.reward}, which is code and runs only when it is named: "
                         f"--reward {run.reward}")
    return run


def is_begun(run: RunConfig) -> bool:
    """Whether its folder holds this very run, which torchrun --max-restarts then goes on with."""
    run, file = RunConfig.from_dict(run.to_dict()), Path(run.out) / "config.json"
    place(run)
    return file.is_file() and read_config(file) | {"out": run.out} == run.to_dict()


def run_as_told(given: dict[str, Any], resume: bool, only_plan: bool) -> None:
    """Trains, or tells what that would take."""
    run = ranks.each(lambda: configure(given, resume))
    ranks.require_equal("flag", run.to_dict())
    if only_plan:
        asked = run.dtype  # on a GPU "auto" is another one than place finds on a CPU
        print(f"{place(run)}\n{plan_of(run, asked)}")
    else:
        require_sharable(run, resume)
        ranks.each(lambda: record.require_log(run))
        if not ("out" in given or resume):
            run.out = ranks.first(own_folder, run.out, ranks.restarted())
        train(run, resume or ranks.restarted() and ranks.first(is_begun, run))


def complain(error: BaseException) -> tuple[int, str]:
    """(exit code, what to say): 2 for bad input, 1 for what a run met on its way, 128 + the signal that ended it. What is none of
    them is a fault of ours, to be seen whole."""
    match error:
        case KeyboardInterrupt():
            return 130, "train.py: interrupted before the first step; nothing was begun"
        case Stopped():
            return error.exit_code, str(error)
        case ValueError() | FileNotFoundError() | PermissionError():
            return 1 if getattr(error, "raised", False) else 2, f"train.py: {error}"
        case OSError() | FloatingPointError() | SelfCheckError():  # a full disk, NaN, arithmetic that doesn't agree
            return 1, f"train.py: {error}"
        case torch.OutOfMemoryError():
            return 1, f"train.py: {str(error).splitlines()[0]}; python train.py --plan with the same flags says what to turn"
    return 1, "".join(traceback.format_exception(error))


def main() -> int:
    """0 when all went well, complain's codes when not."""
    any_console()
    with ranks.one_voice():
        given = vars(build_parser(__doc__.split("\n\n")[0]).parse_args())
    resume, only_plan = given.pop("resume", False), given.pop("plan", False)
    return exit_code(lambda: run_as_told(given, resume, only_plan), complain)


if __name__ == "__main__":
    sys.exit(main())
