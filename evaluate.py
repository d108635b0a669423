"""Evaluation as the paper does it: win rate against reference outputs, true KL, response length, factuality.

    python evaluate.py runs/bregman-s0                 # the last checkpoint of a run, beside SFT
    python evaluate.py runs/bregman-s0 --step 20 40    # some of its checkpoints; --step all
    python evaluate.py runs/bregman-s0 --judge openai --judge-model NAME --base-url URL     # an LLM decides who wins
    python evaluate.py some/adapter --policy DIR       # an adapter folder in PEFT's layout, on its base model
    python evaluate.py winrate --annotations FILE      # from recorded judgements, AlpacaEval's or ours
    python evaluate.py report RUNS... --out DIR        # Tables 1 and 2, Figures 1 to 3 of finished runs
    python evaluate.py chat runs/bregman-s0            # your instructions, answered by SFT and policy side by side

Win rate (section 2.1): each of the 805 evaluation instructions is answered by the policy and by a reference writer; one
judge of a pool (judges.py) compares the two. In the miniature world the judges are `tiny/annotators.py`'s. True KL (section
4, Figure 2): the divergence of the full distributions over the vocabulary, per token, on 28K tokens of the policy's own
answers, not an estimate from the sampled tokens. Factuality (Table 2): the share of stated facts that are true.

Departures: the paper decodes greedily (its released code sets a temperature but does not sample); we sample at the
temperature that the policy was trained with, since that distribution is what PPO improves. Ties count half, unparsable
judgements are left out, and every figure has a standard error.

Shapes: B batch, P prompt (left-padded), T response (right-padded), V vocabulary, N tokens of all responses.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import left_pad, load_instructions, right_pad, tokenize_prompts
from divergences import true_kl
from factuality import FactCount, fact_figures
from judges import EndpointError, read_annotations
from model import generate

# ------------------------------------------------------------------------------------------------------ statistics


def win_rate(preferences: Sequence[float | None]) -> tuple[float, float]:
    """(mean in %, standard error in %) of the candidate's wins.

    A preference is 1 for the reference, 2 for the candidate, 0 or 1.5 for a tie, which counts half; values between 1
    and 2 are a weighted judge's. None (unparsable) is left out. As AlpacaEval: mean of preference − 1, and the sample
    deviation over sqrt(n). Raises ValueError when nothing is left or a value is neither.
    """
    kept = [half_for_tie(p) for p in preferences if p is not None]
    if not kept:
        raise ValueError("win_rate: no preference is left; None marks a judgement that could not be read")
    outside = [p for p in kept if not 1 <= p <= 2]
    if outside:
        raise ValueError(f"win_rate: preference {outside[0]} must be 0 (tie) or from 1 (reference) to 2 (candidate)")
    return mean_and_error([100 * (p - 1) for p in kept])


def half_for_tie(preference: float) -> float:
    """AlpacaEval writes a tie as 0, weighted judges as 1.5: both are half a win."""
    return 1.5 if preference == 0 else float(preference)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error of the mean); the error of a single value is 0."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def paired_difference(before: Sequence[float | None], after: Sequence[float | None]) -> tuple[float, float]:
    """(after − before in win-rate points, its standard error) over the examples that both judged.

    Both models answered the same instructions, so the difference example by example varies less than two win rates do.
    """
    both = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    return mean_and_error([100 * (half_for_tie(a) - half_for_tie(b)) for b, a in both])


def bootstrap(values_per_run: Sequence[float | Sequence[float]], n: int = 1000, seed: int = 0) -> tuple[float, float]:
    """(mean, standard error) over several runs, the paper's "mean and standard error with bootstrap sampling" (Table 1).

    values_per_run: a figure a run, such as its win rate, or a list of values a run, whose mean then stands for it. Runs
    are drawn with replacement n times; the error is the deviation of the drawn means.
    """
    if not values_per_run:
        raise ValueError("bootstrap: values_per_run is empty; give one value, or one list of values, for each run")
    means = [sum(v) / len(v) if isinstance(v, Sequence) else float(v) for v in values_per_run]
    rng = random.Random(seed)
    drawn = [sum(rng.choices(means, k=len(means))) / len(means) for _ in range(n)]
    centre = sum(drawn) / n
    return sum(means) / len(means), math.sqrt(sum((d - centre) ** 2 for d in drawn) / (n - 1))


def ratio_and_error(totals: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """(Σ totals / Σ counts, standard error): a mean per token or per fact, when examples have several each.

    Tokens of one response are not independent, so the error counts responses (the ratio estimator), not tokens.
    """
    m, n = len(counts), sum(counts)
    if n == 0:
        return math.nan, math.nan
    ratio = sum(totals) / n
    spread = sum((t - ratio * c) ** 2 for t, c in zip(totals, counts, strict=True))
    return ratio, math.sqrt(spread * m / max(1, m - 1)) / n


# -------------------------------------------------------------------------------------------------------- measuring


CACHE_BYTES = 4 * 2**30


def cache_bytes(policy, length: int) -> int:
    """Keys and values of one row of `length` tokens."""
    config, size = policy.config, policy.lm_head.weight.element_size()
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * size


def sample_responses(policy, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, eos_token_id: int,
                     pad_token_id: int, seed: int = 0, batch_size: int | None = None, desc: str = "sampling") -> list[list[int]]:
    """One response to each prompt: token ids through EOS, if there is one. Reproducible from the seed.

    batch_size None: 256 at once, or as many as have room for their keys and values in CACHE_BYTES.
    """
    device = next(policy.parameters()).device
    if batch_size is None:
        a_row = cache_bytes(policy, max(map(len, prompts), default=0) + max_new_tokens)
        batch_size = min(256, max(1, CACHE_BYTES // a_row))
    generator = torch.Generator(device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc=desc, unit="response", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            ids, mask = left_pad([prompts[i] for i in rows], pad_token_id)
            sampled = generate(policy, ids.to(device), mask.to(device), max_new_tokens, temperature=temperature,
                               eos_token_id=eos_token_id, pad_token_id=pad_token_id, generator=generator)
            for i, tokens in zip(rows, sampled.tolist(), strict=True):
                responses[i] = tokens[:tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens
            bar.update(len(rows))
    return responses


def join(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor, int]:
    """(input_ids, attention_mask, T): prompts padded on the left, then T positions of responses padded on the right."""
    ids, mask = left_pad(prompts, pad_token_id)
    tokens, real = right_pad(responses, pad_token_id)
    return torch.cat([ids, tokens], 1), torch.cat([mask, real], 1), tokens.shape[1]


def measure_true_kl(policy: Callable, reference: Callable, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
                    **settings) -> tuple[float, float]:
    """(true KL(π‖π_ref) per token in nats, standard error) on the policy's own responses; settings: token_divergences'."""
    lengths, values = token_divergences(policy, reference, prompts, responses, **settings)
    return per_token(lengths, values["true_kl"])


@torch.no_grad()
def token_divergences(policy: Callable, reference: Callable, prompts: Sequence[Sequence[int]],
                      responses: Sequence[Sequence[int]], *, pad_token_id: int, temperature: float, policy_device,
                      reference_device, estimators: dict[str, Callable] | None = None, max_tokens: int = 28_000,
                      batch_size: int = 16) -> tuple[list[int], dict[str, Tensor]]:
    """(tokens of each response, values at each token): values["true_kl"] is the KL over the whole vocabulary there and
    values[name] what that estimator of divergences.py says from the one sampled token; each (N,), nats, on the CPU.

    policy and reference: (input_ids, attention_mask, keep) → logits (B, keep, V), as in ppo.py. Responses are taken in order
    until max_tokens (the paper's 28K) are reached.
    """
    lengths: list[int] = []
    found: dict[str, list[Tensor]] = {name: [] for name in ("true_kl", *(estimators or {}))}
    with tqdm(total=min(max_tokens, sum(map(len, responses))), desc="true KL", unit="token", leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            if sum(lengths) >= max_tokens:
                break
            rows = slice(start, start + batch_size)
            sequence, attention, T = join(prompts[rows], responses[rows], pad_token_id)
            real, tokens = attention[:, -T:].bool(), sequence[:, -T:]
            sequence, attention = sequence[:, :-1], attention[:, :-1]  # the last token decides nothing
            values = divergences_of_batch(policy(sequence.to(policy_device), attention.to(policy_device), T),
                                          reference(sequence.to(reference_device), attention.to(reference_device), T),
                                          tokens, temperature, estimators or {})
            for name, value in values.items():
                found[name].append(value.view(real.shape)[real])
            lengths += real.sum(1).tolist()
            bar.update(int(real.sum()))
    return lengths, {name: torch.cat(parts) for name, parts in found.items()}


def divergences_of_batch(logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float,
                         estimators: dict[str, Callable]) -> dict[str, Tensor]:
    """(B, T, V) twice and tokens (B, T) → the true KL and each estimator at every position, (B · T,) on the CPU."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("true_kl", *estimators)}
    chunk = max(1, 2**20 // logits.shape[-1])  # never the whole of the largest tensors there are in float32
    for p, q, token in zip(logits.flatten(0, 1).split(chunk), ref_logits.flatten(0, 1).split(chunk),
                           tokens.flatten().split(chunk), strict=True):
        p, q = p.float() / temperature, q.to(logits.device).float() / temperature
        found["true_kl"].append(true_kl(p, q).cpu())
        if estimators:
            index = token.to(p.device)[:, None]
            sampled, ref_sampled = (x.log_softmax(-1).gather(1, index)[:, 0].cpu() for x in (p, q))
            for name, estimator in estimators.items():
                found[name].append(estimator(sampled, ref_sampled))
    return {name: torch.cat(parts) for name, parts in found.items()}


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
                             "deviation": error.std().item()}
    return quality


@torch.no_grad()
def measure_reward(reward: Callable, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *,
                   pad_token_id: int, device, batch_size: int = 128) -> list[float]:
    """The reward model's score of each response."""
    scores: list[float] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="reward", unit="batch", leave=False):
        rows = slice(start, start + batch_size)
        ids, mask, n = join(prompts[rows], responses[rows], pad_token_id)
        scores += reward(ids.to(device), mask.to(device), n).tolist()
    return scores


def measure_facts(tasks: Sequence[dict], texts: Sequence[str]) -> dict[str, float]:
    """FActScore's figures (Table 2) with a known truth, and repeated facts an answer."""
    from tiny.annotators import facts_in

    counted = [facts_in(task, text) for task, text in zip(tasks, texts, strict=True)]
    figures = fact_figures([FactCount(true, stated, abstained=not stated) for true, stated, _ in counted])
    return figures | {"repeats": sum(again for _, _, again in counted) / len(counted)}


def answer(policy, tokenizer, benchmark: dict, *, max_new_tokens: int, temperature: float, seed: int = 0,
           label: str = "policy", kl_tokens: int = 0) -> dict:
    """The policy's responses, as token ids: {"responses": to benchmark["prompts"], "about": to benchmark["about_prompts"]}.

    kl_tokens: so many tokens are needed for the true KL; where the responses have fewer, "more" holds further ones and
    "more_prompts" what they answer.
    """
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id}
    prompts = benchmark["prompts"]
    responses = sample_responses(policy, prompts, desc=f"{label}: answers", seed=seed, **settings)
    about = sample_responses(policy, benchmark["about_prompts"], desc=f"{label}: facts", seed=seed, **settings)
    more_prompts, more, have = [], [], sum(map(len, responses))
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))
    while have < kl_tokens:
        short = math.ceil((kl_tokens - have) * len(prompts) / sum(map(len, responses)))
        asked = [prompts[order[i % len(order)]] for i in range(short)]
        new = sample_responses(policy, asked, desc=f"{label}: for KL", seed=seed + 1 + len(more), **settings)
        more_prompts, more, have = more_prompts + asked, more + new, have + sum(map(len, new))
    return {"responses": responses, "about": about, "more_prompts": more_prompts, "more": more}


def miniature_judge(tasks: Sequence[dict], texts: Sequence[str]) -> list[float]:
    """The preferences of the miniature world's annotators between the texts and the reference outputs."""
    from tiny.annotators import judge

    return judge(tasks, texts, [task["output"] for task in tasks])


def measure(sampled: dict, policy_logits: Callable, reference_logits: Callable, reward: Callable | None, tokenizer,
            benchmark: dict, *, temperature: float, policy_device, reference_device, judge: Callable | None = None,
            estimators: dict[str, Callable] | None = None, kl_tokens: int = 28_000) -> dict:
    """Everything the tables need about one policy, from what it answered, with responses and preferences example by example.

    sampled is `answer`'s, benchmark `load_benchmark`'s. judge: (tasks, texts) → preferences; None means the miniature
    world's annotators, or no win rate for other instructions. estimators: whose quality is measured beside the true KL.
    """
    prompts, tasks, responses = benchmark["prompts"], benchmark["tasks"], sampled["responses"]
    texts, pad = [tokenizer.decode(r) for r in responses], tokenizer.pad_token_id
    lengths, values = token_divergences(
        policy_logits, reference_logits, prompts + sampled["more_prompts"], responses + sampled["more"], pad_token_id=pad,
        temperature=temperature, policy_device=policy_device, reference_device=reference_device, estimators=estimators,
        max_tokens=kl_tokens)
    kl, kl_se = per_token(lengths, values["true_kl"])
    tokens, tokens_se = mean_and_error([len(r) for r in responses])
    finished = [100.0 * (tokenizer.eos_token_id in r) for r in responses]
    result = {"n": len(tasks), "true_kl": kl, "true_kl_se": kl_se, "kl_tokens": sum(lengths), "tokens": tokens,
              "tokens_se": tokens_se, "finished": mean_and_error(finished)[0]}
    if estimators:
        result["estimators"] = estimator_quality(lengths, values)
    if reward is not None:
        scores = measure_reward(reward, prompts, responses, pad_token_id=pad, device=reference_device)
        result["reward"], result["reward_se"] = mean_and_error(scores)
    judge = judge or (miniature_judge if benchmark["about"] else None)
    if judge:
        result["preferences"] = judge(tasks, texts)
        result["judged"] = sum(p is not None for p in result["preferences"])
        if result["judged"]:
            result["win_rate"], result["win_rate_se"] = win_rate(result["preferences"])
    about = [tokenizer.decode(r) for r in sampled["about"]]
    if about:
        result["about_tokens"], result["about_tokens_se"] = mean_and_error([len(r) for r in sampled["about"]])
    if benchmark["about"]:
        result |= measure_facts(benchmark["about"], about)
    elif about:
        result["about"] = about
    return result | {"responses": texts}


def load_benchmark(path: Path, tokenizer, template: str, max_tokens: int) -> dict:
    """Evaluation instructions with their prompts; the miniature world's also bring judges and "Tell me about X".

    {"tasks": records, "prompts": token ids, "about": records, "about_prompts": token ids}; both about are empty for other data.
    """
    found = tokenize_prompts(load_instructions(path), tokenizer, template, max_tokens)
    about_file = Path(path).with_name("about.json")
    miniature = all("family" in task for task in found.examples) and about_file.is_file()
    if not miniature:
        return {"tasks": found.examples, "prompts": found.ids, "about": [], "about_prompts": []}
    from tiny.tasks import Task

    about = tokenize_prompts(load_instructions(about_file), tokenizer, template, max_tokens)
    blank = asdict(Task(family="", instruction=""))  # files leave empty fields out, the judges look at all of them
    return {"tasks": [blank | task for task in found.examples], "prompts": found.ids,
            "about": [blank | task for task in about.examples], "about_prompts": about.ids}


def read_lines(file: Path) -> list[dict]:
    """The records of a JSON-lines file; none when it isn't there. Raises ValueError naming file and line."""
    if not file.is_file():
        return []
    records = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            raise ValueError(f"{file}: line {number} is no JSON") from None
        if records and not isinstance(records[-1], dict):
            raise ValueError(f"{file}: line {number} is no object")
    return records


# ---------------------------------------------------------------------------------------------------------- program


COMMANDS = ("run", "winrate", "report", "chat")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, instead of after a page of all that there are."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; --help lists every flag\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="Without a command, run is meant: python "
                                     "evaluate.py runs/bregman-s0")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a run folder or an adapter")
    run.add_argument("folder", type=Path, help="a run folder of train.py, or an adapter folder in PEFT's layout")
    run.add_argument("--step", nargs="+", default=[], help="checkpoints of the run to evaluate, or all (default: the last)")
    run.add_argument("--data", help="evaluation instructions with reference outputs (default: the run's)")
    run.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N of them")
    run.add_argument("--kl-tokens", type=int, default=28_000, metavar="N", help="tokens on which the true KL is measured, in the "
                     "policy's own answers (default: %(default)s, the paper's)")
    judge = run.add_argument_group("win rate")
    judge.add_argument("--judge", choices=("auto", "annotators", "reward", "openai", "none"), default="auto",
                       help="annotators: the miniature world's; reward: a reward model; openai: an LLM behind an "
                       "OpenAI-compatible endpoint, whose key is read from OPENAI_API_KEY (default auto: annotators in the "
                       "miniature world, else none)")
    judge.add_argument("--judge-model", nargs="+", default=[], metavar="NAME", help="the LLM; several are a pool, of which one "
                       "judges each pair")
    judge.add_argument("--judge-pool", type=Path, metavar="FILE", help="a pool with prompts of its own: JSON list of {model, "
                       "name, prompt, temperature, max_tokens}")
    judge.add_argument("--base-url", default="https://api.openai.com/v1", metavar="URL",
                       help="of the endpoint (default: %(default)s)")
    judge.add_argument("--judge-reward", metavar="DIR", help="the reward model that judges (default: the run's own)")
    judge.add_argument("--judge-seed", type=int, default=0, help="draws judge and order of each pair (default: 0)")
    judge.add_argument("--judge-timeout", type=float, default=120.0, metavar="SECONDS", help="for an answer (default: 120)")
    judge.add_argument("--parallel", type=int, default=8, metavar="N", help="calls at once (default: 8)")
    facts = run.add_argument_group("factuality")
    facts.add_argument("--topics", type=Path, metavar="FILE", help='one a line, each asked "Tell me a bio of ..."; the answers '
                       "go to factscore.jsonl")
    facts.add_argument("--passages", type=Path, metavar="FILE", help="JSON lines {title, text} that the LLM judge checks facts "
                       "against")
    adapter = run.add_argument_group("an adapter folder")
    adapter.add_argument("--policy", help="base model (default: the one it names)")
    adapter.add_argument("--prompt-template", help="prompt template (default: alpaca)")
    adapter.add_argument("--temperature", type=float, help="of the sampling (default: 1)")
    adapter.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    winrate = commands.add_parser("winrate", help="win rate from recorded judgements")
    winrate.add_argument("--annotations", type=Path, nargs="+", required=True, metavar="FILE", help="AlpacaEval's "
                         "annotations.json, or JSON lines with a preference; several are runs of one configuration")
    report = commands.add_parser("report", help="the paper's tables and figures from finished runs")
    report.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folders of train.py")
    report.add_argument("--out", type=Path, required=True, help="folder for report.html, report.md and the pictures")
    chat = commands.add_parser("chat", help="answers to your instructions, SFT and policy side by side")
    chat.add_argument("folder", type=Path, metavar="RUN", help="a run folder of train.py")
    chat.add_argument("--step", type=int, help="checkpoint (default: the last)")
    chat.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: the run's)")
    chat.add_argument("--max-tokens", type=int, help="of an answer (default: the run's)")
    chat.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Contradictions between the flags of `run`."""
    for name, low in (("limit", 0), ("kl_tokens", 1), ("parallel", 1)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    if not args.judge_timeout > 0:
        raise ValueError(f"--judge-timeout {args.judge_timeout}: must be above 0")
    if args.judge == "openai" and bool(args.judge_model) == bool(args.judge_pool):
        raise ValueError("--judge openai needs --judge-model NAME or --judge-pool FILE, one of them")
    if args.judge != "openai":
        for flag in ("judge_model", "judge_pool", "passages"):
            if getattr(args, flag):
                raise ValueError(f"--{flag.replace('_', '-')} goes with --judge openai, not {args.judge}")
    if args.judge_reward and args.judge != "reward":
        raise ValueError(f"--judge-reward goes with --judge reward, not {args.judge}")
    if args.passages and not args.topics:
        raise ValueError("--passages needs --topics: what to ask about, one a line")


def run_command(args: argparse.Namespace) -> None:
    check_options(args)
    import folders
    import show

    results = folders.evaluate_folder(args.folder, args)
    print(show.format_table(results))
    last = list(results.values())[-1]
    if "estimators" in last:
        print("\n" + show.quality_table(last))
    unread = {name: r["n"] - r["judged"] for name, r in results.items() if r.get("judged", r["n"]) < r["n"]}
    if unread:
        print("judgements that could not be read, left out: " + ", ".join(f"{name} {n}" for name, n in unread.items()))
    print(f"written to {args.folder}: evaluation.json, with every response, and outputs/ for other evaluators")


def winrate_command(args: argparse.Namespace) -> None:
    rates = []
    for file in args.annotations:
        preferences, names = read_annotations(file)
        try:
            rate, error = win_rate(preferences)
        except ValueError as trouble:
            raise ValueError(f"--annotations {file}: {trouble}") from None
        n, ties = sum(p is not None for p in preferences), sum(p in (0, 1.5) for p in preferences)
        print(f"{rate:.2f} ± {error:.2f} %  {names}: n = {n}, {ties} ties (half each), {len(preferences) - n} without a readable "
              f"preference left out  ({file})")
        rates.append(rate)
    if len(rates) > 1:
        mean, error = bootstrap(rates)
        print(f"{mean:.2f} ± {error:.2f} %  mean and bootstrap standard error over {len(rates)} files")


def main() -> int:
    argv = sys.argv[1:]
    if argv and argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = ["run", *argv]
    args = build_parser().parse_args(argv)
    try:
        if args.command == "run":
            run_command(args)
        elif args.command == "winrate":
            winrate_command(args)
        elif args.command == "report":
            import report

            report.write(args.folders, args.out)
        else:
            import chat

            chat.chat(args.folder, args.step, args.temperature, args.max_tokens, args.seed)
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; what was judged is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError, EndpointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
