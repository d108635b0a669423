# SPDX-License-Identifier: MIT
"""What a policy's answers show: true KL, reward, length, facts; in the miniature world also who wins.

    benchmark = load_benchmark("evaluation.json", tokenizer, "alpaca", 192)
    result = evaluate_policy(models, run, benchmark, "step 25")

True KL (section 4, Figure 2) is the divergence of the full distributions over the vocabulary, per token, on 28K tokens of the
policy's own answers, not an estimate from the sampled tokens. Departs from the paper, which decodes greedily (its released code
sets a temperature but does not sample): we sample at the temperature that the policy was trained with, since that distribution
is what PPO improves.

Shapes: B batch, P prompt (left-padded), T response (right-padded), V vocabulary, N tokens of all responses.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data import left_pad, load_instructions, right_pad, tokenize_prompts
from divergences import true_kl
from evaluation.factuality import FactCount, fact_figures
from evaluation.statistics import mean_and_error, ratio_and_error, win_rate
from ppo import Actors, join, longest_row, pack, response_logits
from reward import shared
from training.config import RunConfig
from training.decode import rows_at_once
from training.folder import read_lines
from training.models import Models
from training.origin import texts_digest
from training.ranks import here
from training.shard import InStep, sample


@dataclass
class Benchmark:
    """Evaluation instructions with their prompts as token ids; the miniature world's also bring judges."""

    tasks: list[dict]                                            # records with instruction, input, output
    prompts: list[list[int]]
    about: list[dict] = field(default_factory=list)              # the miniature world's "Tell me about X", whose truth is known
    about_prompts: list[list[int]] = field(default_factory=list)  # what is asked about facts, here or of --topics
    topics: list[str] = field(default_factory=list)
    left_out: int = 0                                            # instructions of the file whose prompts are too long
    note: str = ""                                               # how many rows the file gave

    def in_words(self, max_tokens: int) -> str:
        """How much of the file it is, for whoever reads the win rate as the benchmark's."""
        line = f"evaluation: {len(self.tasks)} instructions"
        if self.left_out:
            line += (f", {self.left_out} more left out as longer than {max_tokens} tokens (--query-length): not the whole "
                     "benchmark")
        return f"{line}\nevaluation data: {self.note}" if self.note else line


@dataclass
class Answers:
    """A policy's responses to a benchmark, as token ids through EOS."""

    responses: list[list[int]]     # to the prompts
    about: list[list[int]]         # to the about_prompts
    more_prompts: list[list[int]]  # asked again, where the responses have too few tokens for the true KL
    more: list[list[int]]


def load_benchmark(path: str | Path, tokenizer: Any, template: str, max_tokens: int) -> Benchmark:
    """Evaluation instructions from a data file; longer prompts are left out. The miniature world's are known by their field
    "family" and the file about.json beside them."""
    rows = load_instructions(path)
    prompts = tokenize_prompts(rows, tokenizer, template, max_tokens, limit="--query-length")
    about_file = Path(path).with_name("about.json")
    miniature = all("family" in task for task in prompts.examples) and about_file.is_file()
    if not miniature:
        return Benchmark(prompts.examples, prompts.ids, left_out=prompts.dropped, note=rows.note)
    from tiny.annotators import with_blanks

    about = tokenize_prompts(load_instructions(about_file), tokenizer, template, max_tokens)
    return Benchmark([with_blanks(task) for task in prompts.examples], prompts.ids,
                     [with_blanks(task) for task in about.examples], about.ids, left_out=prompts.dropped, note=rows.note)


def evaluate_now(models: Models, run: RunConfig, benchmark: Benchmark, label: str) -> dict[str, Any]:
    """evaluate_policy during training: the true KL on the responses to the benchmark alone, and in the miniature world, whose
    annotators cost nothing, who wins. "before" is the policy as it started: with --baseline another run has measured it."""
    start = start_of(models, run, benchmark) if label == "before" else {}
    if start and run.baseline:
        return taken_over(Path(run.baseline), start)
    with models.as_it_started() if start else nullcontext():
        result = evaluate_policy(models, run, benchmark, label)
    if benchmark.about:
        result |= judged(miniature_judge(benchmark.tasks, result["responses"]))
    return result | ({"start": start} if start else {})


def start_of(models: Models, run: RunConfig, benchmark: Benchmark) -> dict[str, Any]:
    """Everything that decides the figures of a policy before its first step; how it will be tuned does not."""
    asked = texts_digest([*benchmark.prompts, *benchmark.about_prompts], [*benchmark.tasks, *benchmark.about])
    return models.origin | {"evaluation": asked, "seed": run.seed, "temperature": run.ppo.temperature, "dtype": run.dtype,
                            "length": run.evaluation_length or run.ppo.response_length}


def taken_over(folder: Path, start: dict[str, Any]) -> dict[str, Any]:
    """What that run measured before its first step. Raises ValueError unless it started as this one does."""
    first = next(iter(read_lines(folder / "evaluations.jsonl")), {})
    if "start" not in first:
        raise ValueError(f"--baseline {folder}: holds no evaluation from before a first step, or an older version's")
    for what, value in start.items():
        if first["start"].get(what) != value:
            raise ValueError(f"--baseline {folder}: its {what} is {first['start'].get(what)}, this run's {value}: its figures "
                             "are not this run's, leave the flag away")
    return {name: value for name, value in first.items() if name != "step"}


def evaluate_policy(models: Models, run: RunConfig, benchmark: Benchmark, label: str, kl_tokens: int = 0,
                    estimators: dict[str, Callable] | None = None) -> dict[str, Any]:
    """Figures and responses of the policy as it is; who wins is a judge's business.

    kl_tokens: on so many the true KL is measured; 0 means on the responses to the benchmark alone. estimators: whose quality is
    measured beside it. label: for the progress bars.
    """
    with models.to_sample():
        length = run.evaluation_length or run.ppo.response_length
        answers = answer(models.policy, models.tokenizer, benchmark, max_new_tokens=length, temperature=run.ppo.temperature,
                         seed=run.seed, label=label, kl_tokens=kl_tokens)
    return measure(models, run, benchmark, answers, estimators, kl_tokens or 28_000)


def judged(preferences: Sequence[float | None]) -> dict[str, Any]:
    """The figures that follow from a judge's preferences, one for each instruction."""
    result: dict[str, Any] = {"preferences": list(preferences), "judged": sum(p is not None for p in preferences)}
    if result["judged"]:
        result["win_rate"], result["win_rate_se"] = win_rate(preferences)
    return result


def measure(models: Models, run: RunConfig, benchmark: Benchmark, answers: Answers,
            estimators: dict[str, Callable] | None = None, kl_tokens: int = 28_000) -> dict[str, Any]:
    """The figures of one policy, from what it answered, with the responses as text; lengths, rewards and fact_counts stand
    example by example, so that two policies can be compared in pairs."""
    tokenizer, prompts, responses = models.tokenizer, benchmark.prompts, answers.responses
    asked, answered = prompts + answers.more_prompts, responses + answers.more
    order = random.Random(run.seed).sample(range(len(asked)), len(asked))  # the first tokens are then a sample of all
    lengths, values = token_divergences(models.actors(run.ppo), [asked[i] for i in order], [answered[i] for i in order],
                                        run.ppo.temperature, estimators, kl_tokens)
    kl, kl_se = per_token(lengths, values["true_kl"])
    own_lengths = [len(r) for r in responses]
    tokens, tokens_se = mean_and_error(own_lengths)
    ended = [r[-1] in tokenizer.stop_ids for r in responses]
    result = {"n": len(benchmark.tasks), "left_out": benchmark.left_out, "true_kl": kl, "true_kl_se": kl_se,
              "kl_tokens": sum(lengths), "tokens": tokens, "tokens_se": tokens_se,
              "finished": 100 * sum(ended) / len(ended), "lengths": own_lengths, "ended": ended}
    if estimators:
        result["estimators"] = estimator_quality(lengths, values)
    if models.rewards is not None:
        models.asked.now(prompts, benchmark.tasks)
        scores = measure_reward(models.reward, prompts, responses, pad_token_id=tokenizer.pad_token_id,
                                device=models.reference_device)
        result["reward"], result["reward_se"] = mean_and_error(scores)
        result["rewards"] = [round(score, 6) for score in scores]
    about = [tokenizer.decode(r) for r in answers.about]
    if about:
        result["about_tokens"], result["about_tokens_se"] = mean_and_error([len(r) for r in answers.about])
    if benchmark.about:
        result |= measure_facts(benchmark.about, about)
    elif about:
        result["about"] = about
    return result | {"responses": [tokenizer.decode(r) for r in responses]}


def answer(policy: Any, tokenizer: Any, benchmark: Benchmark, *, max_new_tokens: int, temperature: float, seed: int = 0,
           label: str = "policy", kl_tokens: int = 0) -> Answers:
    """The policy's responses; kl_tokens: so many tokens are needed for the true KL, and sampled where they are fewer."""
    def sample(prompts: Sequence[Sequence[int]], what: str, seed: int) -> list[list[int]]:
        return sample_responses(policy, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                                desc=f"{label}: {what}")

    prompts = benchmark.prompts
    responses, about = sample(prompts, "answers", seed), sample(benchmark.about_prompts, "facts", seed)
    more_prompts, more, have = [], [], sum(map(len, responses))
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))
    while have < kl_tokens:
        short = math.ceil((kl_tokens - have) * len(prompts) / sum(map(len, responses)))
        asked = [prompts[order[i % len(order)]] for i in range(short)]
        new = sample(asked, "for KL", seed + 1 + len(more))
        more_prompts, more, have = more_prompts + asked, more + new, have + sum(map(len, new))
    return Answers(responses, about, more_prompts, more)


# ------------------------------------------------------------------------------------------------------------- sampling

def sample_responses(policy: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
                     temperature: float, seed: int = 0, batch_size: int | None = None, desc: str = "sampling"
                     ) -> list[list[int]]:
    """One response to each prompt: token ids through EOS, if there is one. Reproducible from the seed, and the same where several
    processes share the prompts.

    batch_size None: as many at once as have room (decode.rows_at_once); draws come in blocks of 256 then, whatever that is.
    """
    stops, pad_token_id = tokenizer.stop_ids, tokenizer.pad_token_id
    device = next(policy.parameters()).device
    draws = drawn_in_blocks(max_new_tokens, len(prompts), batch_size or 256, torch.Generator(device).manual_seed(seed))
    if batch_size is None:
        length = max(map(len, prompts), default=0) + max_new_tokens
        batch_size = min(here().gather(lambda: rows_at_once(policy, length)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    team, bar = here(), tqdm(total=len(prompts), desc=desc, unit="response", leave=False)

    def sample_mine() -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            uniforms, mine = draws[:, start:start + batch_size], team.rows(len(rows))
            if rows[mine]:
                ids, mask = left_pad([prompts[i] for i in rows[mine]], pad_token_id)
                sampled = sample(policy, ids.to(device), mask.to(device), max_new_tokens, temperature=temperature,
                                 eos_token_id=stops, pad_token_id=pad_token_id, generator=uniforms[:, mine])
                for i, tokens in zip(rows[mine], sampled.tolist(), strict=True):
                    end = next((t for t, token in enumerate(tokens) if token in stops), len(tokens))
                    found[i] = tokens[:end + 1]
            else:
                InStep(policy, max_new_tokens).to_the_end()
            bar.update(len(rows))
        return found

    with bar:
        responses = {i: response for part in team.gather(sample_mine) for i, response in part.items()}
    return [responses[i] for i in range(len(prompts))]


def drawn_in_blocks(tokens: int, rows: int, block: int, generator: torch.Generator) -> Tensor:
    """What decides each row's answer, (tokens, rows) in [0, 1): block by block, as the miniature world was made."""
    blocks = [torch.rand(tokens, min(block, rows - start), generator=generator, device=generator.device)
              for start in range(0, rows, block)]
    return torch.cat(blocks or [torch.empty(tokens, 0, device=generator.device)], dim=1)


# -------------------------------------------------------------------------------------------- true KL and its estimates


def measure_true_kl(actors: Actors, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], temperature: float
                    ) -> tuple[float, float]:
    """(true KL(π‖π_ref) per token in nats, standard error) on the policy's own responses."""
    lengths, values = token_divergences(actors, prompts, responses, temperature)
    return per_token(lengths, values["true_kl"])


@torch.no_grad()
def token_divergences(actors: Actors, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], temperature: float,
                      estimators: dict[str, Callable] | None = None, max_tokens: int = 28_000, batch_size: int = 16
                      ) -> tuple[list[int], dict[str, Tensor]]:
    """(tokens of each response, values at each token): values["true_kl"] is the KL over the whole vocabulary there and
    values[name] what that estimator of divergences.py says from the one sampled token; each (N,), nats, on the CPU.

    Policy and reference read each on their device. Responses are taken in order until max_tokens (the paper's 28K) are reached.
    """
    first, second = actors.policy_device, actors.reference_device
    taken, n = [], 0
    for start in range(0, len(prompts), batch_size):
        if n < max_tokens:
            taken += range(start, min(start + batch_size, len(prompts)))
            n += sum(map(len, responses[start:start + batch_size]))
    bar = tqdm(total=n, desc="true KL", unit="token", leave=False)

    def read(rows: list[int]) -> dict[int, dict[str, Tensor]]:
        (ids, prompt_mask), (tokens, mask) = padded([prompts[i] for i in rows], [responses[i] for i in rows], actors.pad_token_id)
        text = pack(ids, prompt_mask, tokens, mask, width=longest_row(prompt_mask, mask))
        logits, ref_logits = response_logits(actors.policy, text.to(first)), response_logits(actors.reference, text.to(second))
        values = divergences_of_batch(logits, ref_logits, text.sequence[:, -mask.shape[1]:], temperature, estimators or {})
        bar.update(min(actors.team.size * int(mask.sum()), bar.total - bar.n))
        values = {name: value.view(mask.shape).gather(1, text.back) for name, value in values.items()}
        return {row: {name: value[k][mask[k]] for name, value in values.items()} for k, row in enumerate(rows)}

    with bar:
        parts = shared(actors.team, read, by_length(taken, prompts, responses, batch_size))
    found = {row: values for part in parts for row, values in part.items()}
    return ([len(responses[row]) for row in taken],
            {name: torch.cat([found[row][name] for row in taken]) for name in ("true_kl", *(estimators or {}))})


def by_length(rows: Iterable[int], prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], size: int
              ) -> list[list[int]]:
    """The rows in batches of like length: what is read at once is padded to its longest."""
    order = sorted(rows, key=lambda i: len(prompts[i]) + len(responses[i]))
    return [order[start:start + size] for start in range(0, len(order), size)]


def divergences_of_batch(logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float,
                         estimators: dict[str, Callable]) -> dict[str, Tensor]:
    """(B, T, V) twice and tokens (B, T) → the true KL and each estimator at every position, (B · T,) on the CPU."""
    chunks: dict[str, list[Tensor]] = {name: [] for name in ("true_kl", *estimators)}
    chunk = max(1, 2**20 // logits.shape[-1])  # never the whole of the largest tensors there are in float32
    for p, q, token in zip(logits.flatten(0, 1).split(chunk), ref_logits.flatten(0, 1).split(chunk),
                           tokens.flatten().split(chunk), strict=True):
        p, q = p.float() / temperature, q.to(logits.device).float() / temperature
        chunks["true_kl"].append(true_kl(p, q).cpu())
        if estimators:
            index = token.to(p.device)[:, None]
            sampled, ref_sampled = (x.log_softmax(-1).gather(1, index)[:, 0].cpu() for x in (p, q))
            for name, estimator in estimators.items():
                chunks[name].append(estimator(sampled, ref_sampled))
    return {name: torch.cat(parts) for name, parts in chunks.items()}


def per_token(lengths: Sequence[int], values: Tensor) -> tuple[float, float]:
    """(mean over tokens, standard error that counts responses) of values (N,) in the order of the responses."""
    return ratio_and_error([part.sum().item() for part in values.double().split(list(lengths))], lengths)


def estimator_quality(lengths: Sequence[int], values: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """How well each estimator guesses the true KL on the same tokens, the paper's open question (section 4).

    mean, bias (mean − true KL) and their standard errors; deviation: of estimate − true KL at single tokens, the noise that
    one token's penalty brings into the reward. All in nats.
    """
    quality = {}
    for name, estimates in values.items():
        if name != "true_kl":
            error = (estimates - values["true_kl"]).double()
            mean, bias = per_token(lengths, estimates), per_token(lengths, error)
            quality[name] = {"mean": mean[0], "mean_se": mean[1], "bias": bias[0], "bias_se": bias[1],
                             "deviation": error.std(correction=min(1, len(error) - 1)).item()}
    return quality


# ---------------------------------------------------------------------------------------------------- rewards and facts


@torch.no_grad()
def measure_reward(reward: Callable, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *,
                   pad_token_id: int, device, batch_size: int = 64) -> list[float]:
    """The reward model's score of each response."""
    batches = by_length(range(len(prompts)), prompts, responses, batch_size)
    bar = tqdm(total=len(batches), desc="reward", unit="batch", leave=False)

    def score(rows: list[int]) -> list[tuple[int, float]]:
        (ids, prompt_mask), (tokens, mask) = padded([prompts[i] for i in rows], [responses[i] for i in rows], pad_token_id)
        bar.update(min(here().size, bar.total - bar.n))
        scores = reward(*(x.to(device) for x in join(ids, prompt_mask, tokens, mask)), tokens.shape[1])
        return list(zip(rows, scores.tolist(), strict=True))

    with bar:
        found = dict(pair for pairs in shared(here(), score, batches) for pair in pairs)
    return [found[row] for row in range(len(prompts))]


def padded(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int
           ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(ids, mask) of prompts, padded on the left, and of responses, padded on the right, as ppo.py's rollouts hold them."""
    return left_pad(prompts, pad_token_id), right_pad(responses, pad_token_id)


def measure_facts(tasks: Sequence[dict], texts: Sequence[str]) -> dict[str, Any]:
    """FActScore's figures (Table 2) with a known truth, and repeated facts an answer."""
    from tiny.annotators import facts_in

    counted = [facts_in(task, text) for task, text in zip(tasks, texts, strict=True)]
    figures = fact_figures([FactCount(true, stated, abstained=not stated) for true, stated, _ in counted])
    return figures | {"repeats": sum(again for _, _, again in counted) / len(counted)}


def miniature_judge(tasks: Sequence[dict], texts: Sequence[str]) -> list[float]:
    """The preferences of the miniature world's annotators between the texts and the reference outputs."""
    from tiny.annotators import judge

    return judge(tasks, texts, [task["output"] for task in tasks])
