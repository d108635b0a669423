"""Evaluation as the paper does it: win rate against reference outputs, true KL, response length, factuality.

    python evaluate.py runs/bregman-s0                 # the last checkpoint of a run, beside SFT
    python evaluate.py runs/bregman-s0 --step 20 40    # some of its checkpoints
    python evaluate.py some/adapter --policy DIR       # an adapter folder in PEFT's layout, on its base model

Win rate (section 2.1): each of the 805 evaluation instructions is answered by the policy and by a reference writer; one
annotator of a pool compares the two. Here the judges are the miniature world's (`tiny/annotators.py`). True KL (section 4,
Figure 2): the divergence of the full distributions over the vocabulary, per token, on the policy's own answers, not an
estimate from the sampled tokens. Fact precision (Table 2): the share of stated facts that are true, on "Tell me about X".

Departures: the paper decodes greedily (its released code sets a temperature but does not sample); we sample at the
temperature that the policy was trained with, since that distribution is what PPO improves. Ties count half, unparsable
judgements are left out, and every figure has a standard error.

Shapes: B batch, P prompt (left-padded), T response (right-padded), V vocabulary.
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import left_pad, load_instructions, load_tokenizer, right_pad, tokenize_prompts
from divergences import true_kl
from lora import load_lora, lora_disabled
from model import Llama, generate

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


@torch.no_grad()
def measure_true_kl(policy: Callable, reference: Callable, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
                    *, pad_token_id: int, temperature: float, policy_device, reference_device, max_tokens: int = 28_000,
                    batch_size: int = 16) -> tuple[float, float]:
    """(true KL(π‖π_ref) per token in nats, standard error) over up to max_tokens tokens of the policy's own responses.

    policy and reference: (input_ids, attention_mask, keep) → logits (B, keep, V), as in ppo.py.
    """
    totals, counts, tokens = [], [], 0
    with tqdm(total=min(max_tokens, sum(map(len, responses))), desc="true KL", unit="token", leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            if tokens >= max_tokens:
                break
            rows = slice(start, start + batch_size)
            sums, lengths = kl_of_batch(policy, reference, prompts[rows], responses[rows], pad_token_id, temperature,
                                        policy_device, reference_device)
            totals, counts, new = totals + sums.tolist(), counts + lengths, sum(lengths)
            tokens += new
            bar.update(new)
    return ratio_and_error(totals, counts)


def kl_of_batch(policy, reference, prompts, responses, pad_token_id: int, temperature: float, policy_device,
                reference_device) -> tuple[Tensor, list[int]]:
    """(sum of the true KL over each response (B,), the responses' lengths)."""
    sequence, attention, T = join(prompts, responses, pad_token_id)
    real = attention[:, -T:]
    sequence, attention = sequence[:, :-1], attention[:, :-1]  # the last token decides nothing
    logits = policy(sequence.to(policy_device), attention.to(policy_device), T).flatten(0, 1)  # (B · T, V)
    ref_logits = reference(sequence.to(reference_device), attention.to(reference_device), T).flatten(0, 1)
    chunk = max(1, 2**20 // logits.shape[1])  # never the whole of the largest tensors there are in float32
    kl = torch.cat([true_kl(p.float() / temperature, q.to(policy_device).float() / temperature)
                    for p, q in zip(logits.split(chunk), ref_logits.split(chunk), strict=True)]).cpu()
    return (kl.view(real.shape) * real).sum(1), real.sum(1).tolist()


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
    """FActScore's figures (Table 2) with a known truth: precision in %, facts and repeated facts a response."""
    from tiny.annotators import facts_in

    counted = [facts_in(task, text) for task, text in zip(tasks, texts, strict=True)]
    precision, error = ratio_and_error([true for true, _, _ in counted], [stated for _, stated, _ in counted])
    return {"fact_precision": 100 * precision, "fact_precision_se": 100 * error,
            "facts": sum(stated for _, stated, _ in counted) / len(counted),
            "repeats": sum(again for _, _, again in counted) / len(counted)}


def answer(policy, tokenizer, benchmark: dict, *, max_new_tokens: int, temperature: float, seed: int = 0,
           label: str = "policy") -> dict:
    """The policy's responses, as token ids: {"responses": to benchmark["prompts"], "about": to benchmark["about_prompts"]}."""
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id, "seed": seed}
    return {"responses": sample_responses(policy, benchmark["prompts"], desc=f"{label}: answers", **settings),
            "about": sample_responses(policy, benchmark["about_prompts"], desc=f"{label}: facts", **settings)}


def measure(sampled: dict, policy_logits: Callable, reference_logits: Callable, reward: Callable | None, tokenizer,
            benchmark: dict, *, temperature: float, policy_device, reference_device) -> dict:
    """Everything the tables need about one policy, from what it answered, with responses and preferences example by example.

    sampled is `answer`'s, benchmark `load_benchmark`'s. Without simulated annotators (real data) win_rate and facts are absent.
    """
    prompts, tasks, responses = benchmark["prompts"], benchmark["tasks"], sampled["responses"]
    texts, pad = [tokenizer.decode(r) for r in responses], tokenizer.pad_token_id
    kl, kl_se = measure_true_kl(policy_logits, reference_logits, prompts, responses, pad_token_id=pad, temperature=temperature,
                                policy_device=policy_device, reference_device=reference_device)
    tokens, tokens_se = mean_and_error([len(r) for r in responses])
    finished = [100.0 * (tokenizer.eos_token_id in r) for r in responses]
    result = {"n": len(tasks), "true_kl": kl, "true_kl_se": kl_se, "tokens": tokens, "tokens_se": tokens_se,
              "finished": mean_and_error(finished)[0]}
    if reward is not None:
        scores = measure_reward(reward, prompts, responses, pad_token_id=pad, device=reference_device)
        result["reward"], result["reward_se"] = mean_and_error(scores)
    if benchmark["about"]:
        from tiny.annotators import judge

        result["preferences"] = judge(tasks, texts, [task["output"] for task in tasks])
        result["win_rate"], result["win_rate_se"] = win_rate(result["preferences"])
        result |= measure_facts(benchmark["about"], [tokenizer.decode(r) for r in sampled["about"]])
    return result | {"responses": texts}


def load_benchmark(path: Path, tokenizer, template: str, max_tokens: int) -> dict:
    """Evaluation instructions with their prompts; the miniature world's also bring judges and "Tell me about X".

    {"tasks": records, "prompts": token ids, "about": records, "about_prompts": token ids}; about is empty for other data.
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


# ---------------------------------------------------------------------------------------------------------- showing

ROWS = [("win rate, %", "win_rate", 1), ("reward", "reward", 2), ("true KL, nats/token", "true_kl", 4), ("tokens", "tokens", 1),
        ("finished, %", "finished", 1), ("fact precision, %", "fact_precision", 1), ("facts per answer", "facts", 2),
        ("repeats per answer", "repeats", 2)]


def format_table(columns: dict[str, dict]) -> str:
    """A table with a column a policy and a row a figure, standard errors behind ±."""
    lines = [f"{'':<22}" + "".join(f"{name:>18}" for name in columns)]
    lines.append("-" * len(lines[0]))
    for title, key, digits in ROWS:
        cells = [format_cell(result, key, digits) for result in columns.values()]
        if any(cells):
            lines.append(f"{title:<22}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def format_cell(result: dict, key: str, digits: int) -> str:
    if key not in result:
        return ""
    error = result.get(key + "_se")
    return f"{result[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def before_after(before: dict, after: dict, tasks: Sequence[dict], pairs: int = 3) -> str:
    """The table of two evaluations, the paired difference of their win rates, and some answers side by side."""
    lines = [format_table({"before": before, f"step {after['step']}": after})]
    if "preferences" in before:
        difference, error = paired_difference(before["preferences"], after["preferences"])
        in_errors = f", {difference / error:.1f} standard errors" if error else ""
        lines.append(f"win rate after − before: {difference:+.1f} ± {error:.1f} points (paired over {before['n']}{in_errors})")
    changed = [i for i in range(len(tasks)) if before["responses"][i] != after["responses"][i]]
    if changed:
        lines += ["", f"{min(pairs, len(changed))} of the {len(changed)} answers that changed, of {len(tasks)} in all:"]
    for i in changed[::max(1, len(changed) // pairs)][:pairs]:
        asked = tasks[i]["instruction"] + (f" [{tasks[i]['input']}]" if tasks[i].get("input") else "")
        lines += ["", f"  {asked}", f"    before: {before['responses'][i]}", f"    after:  {after['responses'][i]}"]
    return "\n".join(lines)


def read_lines(file: Path) -> list[dict]:
    """The records of a JSON-lines file; none when it isn't there."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


PANELS = [
    ("reward model's score", [("score_mean", "score"), ("shaped_reward", "shaped (Eq. 3)")]),
    ("KL to the reference, nats/token", [("true_kl", "true KL"), ("kl_k1", "k1"), ("kl_k3", "k3")]),
    ("response length, tokens", [("length", "tokens")]),
    ("share clipped", [("clip_fraction", "policy"), ("value_clip_fraction", "value")]),
    ("value loss", [("value_loss", "value loss")]),
]
COLORS = ["#0072B2", "#D55E00", "#009E73"]  # Okabe and Ito: told apart by colour-blind readers too


def draw_curves(run: Path) -> Path | None:
    """curves.png of a run folder from its metrics.jsonl and evaluations.jsonl; None when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl")
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    steps = [m["step"] for m in metrics]
    for axis, (title, lines) in zip(axes.flat, PANELS):
        for (key, name), color in zip(lines, COLORS):
            axis.plot(steps, [m[key] for m in metrics], label=name, color=color, linewidth=1.4)
        axis.set(title=title, xlabel="PPO step")
        if len(lines) > 1:
            axis.legend(frameon=False)
    draw_win_rate(axes.flat[5], evaluations)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(run.name)
    part = run / ".curves.part.png"
    figure.savefig(part, dpi=110)
    pyplot.close(figure)
    os.replace(part, run / "curves.png")
    return run / "curves.png"


def draw_win_rate(axis, evaluations: list[dict]) -> None:
    """Win rate with its standard error where there are judges, else the reward on the evaluation instructions."""
    key, title = ("win_rate", "win rate, %") if all("win_rate" in e for e in evaluations) else ("reward", "evaluation reward")
    found = [e for e in evaluations if key in e]
    axis.errorbar([e["step"] for e in found], [e[key] for e in found], yerr=[e[key + "_se"] for e in found], marker="o",
                  color=COLORS[0], capsize=3, linewidth=1.4)
    axis.set(title=f"{title} (± standard error)", xlabel="PPO step")


# ---------------------------------------------------------------------------------------------------------- program


def evaluate_run(folder: Path, steps: list[int] | None, data: str | None) -> dict[str, dict]:
    """{"SFT": figures, "step-0020": figures, ...} of a run folder."""
    import train

    run, config = train.stored_config({"out": str(folder)})
    tokenizer = load_tokenizer(run.policy).for_template(run.prompt_template)
    file = data or run.evaluation
    if file is None:
        raise ValueError(f"--data is missing: the run in {folder} names no evaluation instructions")
    benchmark = load_benchmark(file, tokenizer, run.prompt_template, run.query_length)
    found = {int(p.name.removeprefix("step-")): p for p in train.checkpoints(folder)}
    missing = [s for s in steps or [] if s not in found]
    if missing or not found:
        raise ValueError(f"--step {missing or 'last'}: {folder} holds checkpoints {sorted(found)}")
    models = train.build_models(run, tokenizer, say=lambda _: None)
    results = {"SFT": train.evaluate_now(models, run, config, tokenizer, benchmark, "SFT")}
    for step in steps or [max(found)]:
        train.load_weights(run, models, found[step])
        results[found[step].name] = train.evaluate_now(models, run, config, tokenizer, benchmark, found[step].name)
    return results


def evaluate_adapter(folder: Path, args: argparse.Namespace) -> dict[str, dict]:
    """{"base": figures, folder's name: figures} of a policy adapter in PEFT's layout. Where its base is the miniature world's
    model, what is not given comes from that world; the reward is left out, since an adapter names no reward model."""
    from train import TINY_PRESET

    base = args.policy or json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"--policy is missing: {folder}/adapter_config.json names no base model")
    preset = TINY_PRESET if Path(base).resolve() == Path(TINY_PRESET["policy"]).resolve() else {}
    data = args.data or preset.get("evaluation")
    if data is None:
        raise ValueError(f"--data is missing: name evaluation instructions for the base model {base}")
    temperature = preset.get("temperature", 1.0) if args.temperature is None else args.temperature
    template = args.prompt_template or preset.get("prompt_template", "alpaca")
    tokenizer = load_tokenizer(base).for_template(template)
    benchmark = load_benchmark(data, tokenizer, template, 192)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Llama.from_pretrained(base, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    load_lora(policy, folder)

    def policy_logits(ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        return policy(ids, mask, logits_to_keep=keep)

    def base_logits(ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        with lora_disabled(policy):
            return policy(ids, mask, logits_to_keep=keep)

    results = {}
    for name, logits, adapter in (("base", base_logits, lora_disabled(policy)), (folder.name, policy_logits, nullcontext())):
        with adapter:
            sampled = answer(policy, tokenizer, benchmark, max_new_tokens=preset.get("response_length", 300),
                             temperature=temperature, seed=args.seed, label=name)
        results[name] = measure(sampled, logits, base_logits, None, tokenizer, benchmark, temperature=temperature,
                                policy_device=device, reference_device=device)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a run folder of train.py, or an adapter folder in PEFT's layout")
    parser.add_argument("--step", type=int, nargs="+", help="checkpoints of the run to evaluate (default: the last)")
    parser.add_argument("--data", help="evaluation instructions (default: the run's)")
    parser.add_argument("--policy", help="base model of an adapter folder (default: the one it names)")
    parser.add_argument("--prompt-template", help="prompt template for an adapter folder (default: alpaca)")
    parser.add_argument("--temperature", type=float, help="of the sampling, for an adapter folder (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, for an adapter folder (default: 0)")
    args = parser.parse_args()
    try:
        if (args.folder / "adapter_config.json").is_file():
            results = evaluate_adapter(args.folder, args)
        elif (args.folder / "config.json").is_file():
            results = evaluate_run(args.folder, args.step, args.data)
        else:
            raise FileNotFoundError(f"{args.folder}: neither a run folder (config.json) nor an adapter (adapter_config.json)")
    except (ValueError, FileNotFoundError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    print(format_table(results))
    file = args.folder / "evaluation.json"
    part = file.with_name(".evaluation.json.part")
    part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, file)
    print(f"written to {file}, with every response")
    return 0


if __name__ == "__main__":
    sys.exit(main())
