# SPDX-License-Identifier: MIT
"""What happens to each token of one response: `python evaluate.py rollout RUN`, as a table and as a page.

A checkpoint is set to do its next PPO step as training did it: the batch is sampled, read by four models, charged (Eq. 3),
credited (GAE) and trained on (Eq. 2), and one of its responses is taken out, with every number that led to its loss. Of the
last checkpoint but those at learning rate 0 these are the run's own next step, bit for bit; the others get the same prompts and
random draws, so that what differs between them are the weights.

A moment is what `take` returns, one for each checkpoint, and all that table and page are made of:

    step, beta, learning_rate          of the checkpoint, for the step that follows it
    score, judged, finished            of the response; judged: with missing_eos_penalty
    tokens                             for each: text, logprob, ref_logprob, true_kl, value; after the update new_logprob, ratio;
                                       others: the likeliest other tokens, (text, probability, probability under the reference)
    by                                 for every estimator, had it been the run's: its scale (whitening the rewards), mean and
                                       deviation (whitening the advantages) over the batch, and for each token penalty, shaped
                                       (Eq. 3), reward (shaped · scale), delta, gae, advantage (gae whitened), returns
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import ppo
from data import format_prompt, left_pad, load_instructions, tokenize_prompts, whole_characters
from divergences import ESTIMATORS, get_estimator, true_kl
from evaluation.rollout_page import page, table
from formats.tokenizer import load_tokenizer
from formats.write import write_text
from training.checkpoint import State, load_weights, read_state
from training.config import RunConfig, stored_config
from training.folder import checkpoints, require_whole
from training.models import Models, build_models
from training.progress import StepProgress
from training.rewards import is_rule

OTHERS = 5  # of the likeliest tokens that were not sampled


@dataclass
class Batch:
    """The prompts of one PPO step, and the one that is looked at."""

    ids: list[list[int]]
    records: list[dict]
    row: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of `python evaluate.py rollout`."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder of train.py")
    parser.add_argument("--step", nargs="+", default=[], metavar="N", help="checkpoints, 0 for the start, or all (default: the "
                        "last whose update moves the policy; with --out all)")
    parser.add_argument("--row", type=int, default=0, metavar="K", help="which response of the batch, from 0 (default: 0)")
    parser.add_argument("--prompt", metavar="TEXT", help="an instruction to put in the place of that row's")
    parser.add_argument("--reward", metavar="FILE.py:RULE", help="the run's own rule: code, which runs only when it is named")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write the page")


def show(args: argparse.Namespace) -> None:
    """The whole command."""
    if args.out and not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent} to write it in")
    if args.out and args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a folder; name a file, such as {args.out / 'rollout.html'}")
    run = stored_config({"out": str(args.folder)})
    if not 0 <= args.row < run.ppo.rollout_batch_size:
        raise ValueError(f"--row {args.row}: a batch of this run has rows 0 to {run.ppo.rollout_batch_size - 1}")
    if is_rule(run.reward) and args.reward != run.reward:
        raise ValueError(f"--reward is missing: the run's reward is a rule, which is code: name it, --reward {run.reward}")
    steps = chosen(args.folder, ["all"] if args.out and not args.step else args.step, run)
    models, state = open_run(run)
    print("\n".join(models.notes))
    shown = worth_showing(steps, run)
    position = go_to(state, models, steps[shown])
    batch = next_batch(state, run, args.row, args.prompt, models.tokenizer)
    moments = []
    for step, folder in tqdm(steps.items(), desc="checkpoints", unit="step", disable=len(steps) < 2):
        load(run, models, state, folder, position, step)
        moments.append(take(models, state, run, batch))
    record = batch.records[batch.row]
    facts = {"run": str(args.folder), "row": args.row, "estimator": run.estimator, "tuning": run.tuning,
             "shown": list(steps).index(shown), "instruction": record["instruction"], "input": record.get("input", ""),
             **{name: getattr(run.ppo, name) for name in ("gamma", "lam", "cliprange", "whiten_rewards")}}
    print(table(facts, moments[facts["shown"]]))
    if args.out:
        write_text(args.out, page(facts, moments))
        print(f"written: {args.out}, which any browser opens ({len(moments)} checkpoint{'s' * (len(moments) > 1)})")


# ------------------------------------------------------------------------------------------------ where the run stands


def chosen(folder: Path, asked: Sequence[str], run: RunConfig) -> dict[int, Path | None]:
    """The checkpoints asked for by their steps, in order; 0, the start, has no folder."""
    there: dict[int, Path | None] = {0: None} | {int(p.name.removeprefix("step-")): p for p in checkpoints(folder)}
    if list(asked) == ["all"]:
        return dict(sorted(there.items()))
    for step in asked:
        if not step.isdigit() or int(step) not in there:
            raise ValueError(f"--step {step}: must be all or some of {', '.join(map(str, sorted(there)))}: the start, and the "
                             f"checkpoints in {folder}")
    return {step: there[step] for step in sorted(map(int, asked)) or [worth_showing(there, run)]}


def open_run(run: RunConfig) -> tuple[Models, State]:
    """Models and state as they were before the first step."""
    torch.manual_seed(run.seed)
    tokenizer = load_tokenizer(run.policy).for_template(run.prompt_template, run.system)
    prompts = tokenize_prompts(load_instructions(run.data), tokenizer, run.prompt_template, run.query_length, "--query-length")
    models = build_models(run, tokenizer)
    return models, State.at_start(run, models, prompts)


def worth_showing(steps: dict[int, Path | None], run: RunConfig) -> int:
    """The last of them whose next step moves the policy: behind the schedule's end the learning rate is 0."""
    return max((step for step in steps if ppo.learning_rate(step + 1, run.ppo) > 0), default=max(steps))


def go_to(state: State, models: Models, folder: Path | None) -> dict[str, Any]:
    """The position of a checkpoint, whose prompts and draws all others get, too."""
    position = state.position(models.policy_device)
    stored = read_state(require_whole(folder) / "trainer" / "state.pt") if folder else position
    if stored["random"].keys() != position["random"].keys():  # of a GPU's random states nothing can be made here
        print(f"{folder} was written on another kind of device: prompts are the run's, random draws are not")
        stored["random"] = position["random"]
    state.stream.load_state_dict(stored["stream"])
    return stored


def next_batch(state: State, run: RunConfig, row: int, prompt: str | None, tokenizer: Any) -> Batch:
    """The prompts of the next step, one of them perhaps the user's."""
    rows = state.stream.next_batch(run.ppo.rollout_batch_size)
    batch = Batch([state.prompts.ids[i] for i in rows], [state.prompts.examples[i] for i in rows], row)
    if prompt is not None:
        record = {"instruction": whole_characters(prompt).strip(), "input": ""}
        if not record["instruction"]:
            raise ValueError("--prompt is empty: give an instruction")
        ids = tokenizer.encode(format_prompt(record, run.prompt_template, tokenizer), bos=True)
        if len(ids) > run.query_length:
            raise ValueError(f"--prompt has {len(ids)} tokens as the policy reads it: at most {run.query_length} in this run")
        batch.ids[row], batch.records[row] = ids, record
    return batch


def load(run: RunConfig, models: Models, state: State, folder: Path | None, position: dict[str, Any], step: int) -> None:
    """Weights, optimiser, beta and step of a checkpoint, at the position of another."""
    state.go_to(position, models.policy_device)
    state.step, state.beta = step, run.ppo.beta
    if folder:
        stored = read_state(require_whole(folder) / "trainer" / "state.pt")
        load_weights(run, models, folder)
        state.optimizer.load_state_dict(stored["optimizer"])
        state.beta = stored["beta"]


# -------------------------------------------------------------------------------------------------- one step, looked at


def take(models: Models, state: State, run: RunConfig, batch: Batch) -> dict[str, Any]:
    """One PPO step of the batch, and what it did to one response; leaves the models as they are after it."""
    config, actors = run.ppo, models.actors(run.ppo, state.sampling)
    progress = StepProgress(config)
    models.asked.now(batch.ids, batch.records)
    prompts, prompt_mask = left_pad(batch.ids, actors.pad_token_id)
    models.mode(training=False)
    rollout = ppo.collect(actors, get_estimator(run.estimator), prompts, prompt_mask, config, state.beta, progress)
    one = rollout.micro_batch(torch.tensor([batch.row], device=rollout.mask.device))
    seen = looked_at(models, one, config.temperature)

    rate = ppo.learning_rate(state.step + 1, config)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    models.mode(training=True)
    ppo.update(actors, rollout, state.optimizer, config, state.shuffling, progress)
    models.mode(training=False)
    with torch.no_grad():
        new_logprobs = ppo.response_logprobs(models.policy_logits, one.packed(), config.temperature)[0]
    numbers = {"logprob": one.logprobs, "ref_logprob": one.ref_logprobs, "value": one.values, "new_logprob": new_logprobs,
               "ratio": (new_logprobs - one.logprobs).exp()}
    columns = {name: x[0].tolist() for name, x in numbers.items()} | seen
    judged = ppo.judged_scores(rollout.scores, rollout.finished, config.missing_eos_penalty)
    return {"step": state.step, "beta": state.beta, "learning_rate": rate, "score": one.scores.item(),
            "judged": judged[batch.row].item(), "finished": one.finished.item(),
            "tokens": [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
            "by": {name: credit(rollout, judged, name, state.beta, config, batch.row) for name in ESTIMATORS}}


@torch.no_grad()
def looked_at(models: Models, one: ppo.Rollout, temperature: float) -> dict[str, list]:
    """What takes the whole distribution to know, of each token of the one response: text, true_kl, others."""
    text = one.packed()
    logits = [ppo.response_logits(models.policy_logits, text)[0].float() / temperature,
              ppo.response_logits(models.reference_logits, text.to(models.reference_device))[0].float() / temperature]
    logits[1] = logits[1].to(logits[0].device)
    policy, reference = (x.softmax(-1) for x in logits)
    tokens = one.responses[0]
    likeliest = policy.scatter(1, tokens[:, None], -1.0).topk(OTHERS).indices  # -1: never the token itself
    others = [[(shown(models.tokenizer, tokens[:t].tolist(), i), policy[t, i].item(), reference[t, i].item())
               for i in likeliest[t].tolist()] for t in range(len(tokens))]
    return {"text": [shown(models.tokenizer, tokens[:t].tolist(), i) for t, i in enumerate(tokens.tolist())],
            "true_kl": true_kl(*logits).tolist(), "others": others}


def credit(rollout: ppo.Rollout, judged: Tensor, estimator: str, beta: float, config: ppo.PPOConfig, row: int) -> dict[str, Any]:
    """Rewards and advantages of the row as ppo.collect works them out, had this been the estimator of the run."""
    mask = rollout.mask
    penalties = ppo.real(get_estimator(estimator)(rollout.logprobs, rollout.ref_logprobs), mask)
    shaped = ppo.shape_rewards(judged, penalties, mask, beta)
    rewards = ppo.whiten(shaped, mask, shift_mean=False) if config.whiten_rewards else shaped
    raw, returns = ppo.gae(rewards, rollout.values, mask, config.gamma, config.lam)
    advantages = ppo.whiten(raw, mask)
    delta, _ = ppo.gae(rewards, rollout.values, mask, config.gamma, 0.0)  # λ 0: one step's surprise and nothing behind it
    largest = shaped.abs().argmax()
    columns = {"penalty": penalties, "shaped": shaped, "reward": rewards, "delta": delta, "gae": raw, "advantage": advantages,
               "returns": returns}
    return {"scale": (rewards.flatten()[largest] / shaped.flatten()[largest]).item() if shaped.any() else 1.0,
            "mean": ppo.masked_mean(raw, mask).item(), "deviation": ppo.masked_variance(raw, mask).sqrt().item(),
            **{name: x[row][mask[row]].tolist() for name, x in columns.items()}}


def shown(tokenizer: Any, before: list[int], token: int) -> str:
    """What the token adds to the text; of one that adds none (EOS), its name."""
    so_far, longer = tokenizer.decode(before), tokenizer.decode([*before, token])
    text = longer[len(os.path.commonprefix([so_far, longer])):]
    name = tokenizer.pieces([token])[0] if tokenizer.pieces else ""
    space = " " if not before and name.startswith("\N{LOWER ONE EIGHTH BLOCK}") else ""  # SentencePiece drops a text's first
    return space + text.lstrip(" ") if text and space else text or name or f"<{token}>"
