"""Evaluation of what lies in a folder: the checkpoints of a run, or a policy adapter; `python evaluate.py FOLDER` calls this.

Builds the models as training had them, lets evaluate.py measure each policy beside SFT, lets judges.py decide who wins, and
writes into the folder, after every policy:

    evaluation.json                      figures, responses and preferences of every policy
    judgements.jsonl, facts.jsonl        every answer of a judge, as it came: read first, so that none is paid for twice
    outputs/<policy>/annotations.json    the judgements of one policy, in AlpacaEval's form
    outputs/<policy>/model_outputs.json  for the alpaca_eval tool, as is outputs/reference_outputs.json
    outputs/<policy>/factscore.jsonl     for FActScore, with --topics
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import train
from data import encode_pair, format_prompt, load_tokenizer
from divergences import ESTIMATORS
from evaluate import answer, load_benchmark, measure, measure_reward
from factuality import QUESTION, count_facts, fact_figures, load_passages, load_topics
from judges import Endpoint, LLMJudge, ScoreJudge, Verdict, compare, load_pool, summary, whole_instruction
from lora import load_lora, lora_disabled
from model import Llama
from reward import RewardModel
from runfolder import write_text


# -------------------------------------------------------------------------------------------------------- judgements


class Judging:
    """How the win rates of one evaluation are decided, and where its judgements are kept.

    judgements.jsonl of the folder gets each judgement as it comes, whatever it is about, and is read first: none is paid
    twice. outputs/<policy>/annotations.json holds those of one policy, in AlpacaEval's form.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, score: Callable | None = None):
        self.folder, self.seed, self.score = folder, args.judge_seed, score
        self.label, self.pool, self.endpoints, self.parallel = args.judge, {}, [], 1
        if args.judge == "annotators":
            from tiny.annotators import POOL, prefer

            self.pool = {a.name: lambda task, x, y, a=a: Verdict(prefer(a, task, x, y)) for a in POOL}
        elif args.judge == "openai":
            self.parallel = args.parallel

            def connect(model: str, **settings) -> Endpoint:
                self.endpoints.append(Endpoint(args.base_url, model, key=os.environ.get("OPENAI_API_KEY") or None,
                                               timeout=args.judge_timeout, **settings))
                return self.endpoints[-1]

            if args.judge_pool:
                self.pool = load_pool(args.judge_pool, connect)
            else:
                self.pool = {model: LLMJudge(connect(model)) for model in args.judge_model}
            self.label = ", ".join(self.pool)

    def of(self, policy: str) -> Callable[[Sequence[dict], Sequence[str]], list[float | None]]:
        """The judge of one policy's answers, as `measure` takes it."""
        def judge(tasks: Sequence[dict], texts: Sequence[str]) -> list[float | None]:
            without = next((i for i, task in enumerate(tasks) if not task.get("output")), None)
            if without is not None:
                raise ValueError(f"--data: evaluation instruction {without + 1} has no output to compare answers with")
            pool, references = self.pool, [task["output"] for task in tasks]
            if not pool:  # a reward model reads everything at once
                asked = [*tasks, *tasks], [*texts, *references]
                scores = self.score(*asked)
                pool = {"reward": ScoreJudge({(whole_instruction(task), text): score
                                              for task, text, score in zip(*asked, scores, strict=True)})}
            records = compare(tasks, texts, references, pool, seed=self.seed, file=self.folder / "judgements.jsonl" if self.pool
                              else None, parallel=self.parallel, names=(tasks[0].get("generator", "reference"), policy),
                              counts=self.counts, stop=lambda: [endpoint.stop() for endpoint in self.endpoints])
            write_json(self.folder / "outputs" / policy / "annotations.json", records)
            if self.endpoints:
                tqdm.write(f"{policy}: {summary(records, self.endpoints)}")
            return [record["preference"] for record in records]

        return judge

    def counts(self) -> dict[str, str]:
        """What calls cost, over all endpoints."""
        names = {"calls": "calls", "retries": "retries_made", "tokens in": "tokens_in", "out": "tokens_out"}
        return {shown: f"{sum(getattr(e, name) for e in self.endpoints):,}" for shown, name in names.items() if self.endpoints}


# -------------------------------------------------------------------------------------------------------------- files


def write_json(file: Path, content) -> None:
    """A JSON file, with its folder, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_outputs(folder: Path, policy: str, benchmark: dict, result: dict, generator: str) -> None:
    """What other evaluators read: alpaca_eval (its --model_outputs and --reference_outputs) and FActScore."""
    def entry(task: dict, output: str, generator: str) -> dict:
        return {"instruction": whole_instruction(task), "output": output, "generator": generator,
                "dataset": task.get("dataset", "evaluation")}

    tasks = benchmark["tasks"]
    write_json(folder / "outputs" / policy / "model_outputs.json",
               [entry(task, text, generator) for task, text in zip(tasks, result["responses"], strict=True)])
    if all(task.get("output") for task in tasks):
        write_json(folder / "outputs" / "reference_outputs.json",
                   [entry(task, task["output"], task.get("generator", "reference")) for task in tasks])
    if "about" in result:
        lines = [json.dumps({"topic": topic, "output": text}, ensure_ascii=False) + "\n"
                 for topic, text in zip(benchmark["topics"], result["about"], strict=True)]
        write_text(folder / "outputs" / policy / "factscore.jsonl", "".join(lines))


def keep(folder: Path, results: dict[str, dict]) -> Path:
    """evaluation.json with these results, and with older ones of other checkpoints that were measured alike."""
    file = folder / "evaluation.json"
    first = next(iter(results.values()))
    try:
        older = json.loads(file.read_text(encoding="utf-8"))
        alike = {name: r for name, r in older.items() if all(r.get(k) == first.get(k) for k in ("data", "n", "judge"))}
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        alike = {}
    write_json(file, alike | results)
    return file


# ------------------------------------------------------------------------------------------------- runs and adapters


@dataclass
class Policy:
    """One policy to evaluate: its name, its PPO step, and a function that measures it (settings as train.evaluate_now's)."""

    name: str
    step: int
    measured: Callable[..., dict]


def open_benchmark(args: argparse.Namespace, file: str, tokenizer, template: str, max_tokens: int) -> dict:
    """load_benchmark's, cut to --limit, with the questions about --topics in place of the miniature world's."""
    benchmark = load_benchmark(file, tokenizer, template, max_tokens)
    if args.limit:
        benchmark["tasks"], benchmark["prompts"] = benchmark["tasks"][:args.limit], benchmark["prompts"][:args.limit]
    if args.topics:
        topics = load_topics(args.topics)
        if args.passages:
            benchmark["passages"] = load_passages(args.passages)
        benchmark["topics"], benchmark["about"] = topics, []
        benchmark["about_prompts"] = [tokenizer.encode(format_prompt({"instruction": QUESTION.format(topic=topic)}, template,
                                                                     tokenizer)) for topic in topics]
    if args.judge == "auto":
        args.judge = "annotators" if benchmark["tasks"][0].get("family") else "none"
    return benchmark


def scorer_of_texts(reward: Callable, tokenizer, template: str, device) -> Callable[[Sequence[dict], Sequence[str]], list[float]]:
    """A reward on token ids, as one on (instruction, answer) texts."""
    def score(tasks: Sequence[dict], texts: Sequence[str]) -> list[float]:
        pairs = [encode_pair(task, text, tokenizer, template) for task, text in zip(tasks, texts, strict=True)]
        return measure_reward(reward, [p for p, _ in pairs], [r for _, r in pairs], pad_token_id=tokenizer.pad_token_id,
                              device=device)

    return score


def evaluate_folder(folder: Path, args: argparse.Namespace) -> dict[str, dict]:
    """Measures what the folder holds; writes evaluation.json and outputs/ after every policy; returns {name: figures}."""
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: neither a run folder (config.json) nor an adapter (adapter_config.json)")
    judging = Judging(args, folder) if args.judge == "openai" else None  # a wrong address is said before models are loaded
    benchmark, score, policies, data = (open_adapter if adapter else open_run)(folder, args)
    if args.judge in ("annotators", "reward"):
        judging = Judging(args, folder, score)
    results: dict[str, dict] = {}

    def ask_all(prompts: Sequence[str], desc: str) -> list[str]:
        return judging.endpoints[0].ask_all(prompts, file=folder / "facts.jsonl", parallel=args.parallel, desc=desc)

    for policy in policies:
        trained = policy.step > 0
        result = policy.measured(
            kl_tokens=args.kl_tokens if trained else 0, judge=judging.of(policy.name) if judging else None,
            estimators={k: f for k, f in ESTIMATORS.items() if k != "none"} if trained else None)
        if "passages" in benchmark:
            result |= fact_figures(count_facts(benchmark["topics"], result["about"], benchmark["passages"], ask_all))
        write_outputs(folder, policy.name, benchmark, result, f"{folder.resolve().name} {policy.name}")
        results[policy.name] = {"step": policy.step, "data": str(data)} | ({"judge": judging.label} if judging else {}) | result
        keep(folder, results)
    return results


def open_run(folder: Path, args: argparse.Namespace) -> tuple[dict, Callable, Sequence[Policy], str]:
    """(benchmark, how its reward model scores texts, SFT and the checkpoints, data file) of a run folder."""
    run, config = train.stored_config({"out": str(folder)})
    tokenizer = load_tokenizer(run.policy).for_template(run.prompt_template)
    file = args.data or run.evaluation
    if file is None:
        raise ValueError(f"--data is missing: the run in {folder} names no evaluation instructions")
    found = {int(p.name.removeprefix("step-")): p for p in train.checkpoints(folder)}
    steps = sorted(found) if args.step == ["all"] else [whole_number(step) for step in args.step] or sorted(found)[-1:]
    missing = [s for s in steps if s not in found]
    if missing or not found:
        raise ValueError(f"--step {missing or 'last'}: {folder} holds checkpoints {sorted(found)}")
    benchmark = open_benchmark(args, file, tokenizer, run.prompt_template, run.query_length)
    models = train.build_models(run, tokenizer, say=lambda _: None)

    def measured(name: str, checkpoint: Path | None, **settings) -> dict:
        if checkpoint:
            train.load_weights(run, models, checkpoint)
        return train.evaluate_now(models, run, config, tokenizer, benchmark, name, **settings)

    policies = [Policy("SFT", 0, lambda **settings: measured("SFT", None, **settings))]
    policies += [Policy(found[s].name, s, lambda s=s, **settings: measured(found[s].name, found[s], **settings)) for s in steps]
    template, device = run.prompt_template, models.reference_device
    score = other_reward(args, template, device) or scorer_of_texts(models.reward, tokenizer, template, device)
    return benchmark, score, policies, file


def open_adapter(folder: Path, args: argparse.Namespace) -> tuple[dict, Callable | None, Sequence[Policy], str]:
    """The same of a policy adapter in PEFT's layout. Where its base is the miniature world's model, what is not given comes
    from that world; the reward is left out, since an adapter names no reward model."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = args.policy or config.get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}/adapter_config.json: no JSON object ({error})") from None
    if not base:
        raise ValueError(f"--policy is missing: {folder}/adapter_config.json names no base model")
    preset = train.TINY_PRESET if Path(base).resolve() == Path(train.TINY_PRESET["policy"]).resolve() else {}
    data = args.data or preset.get("evaluation")
    if data is None:
        raise ValueError(f"--data is missing: name evaluation instructions for the base model {base}")
    temperature = preset.get("temperature", 1.0) if args.temperature is None else args.temperature
    template = args.prompt_template or preset.get("prompt_template", "alpaca")
    tokenizer = load_tokenizer(base).for_template(template)
    benchmark = open_benchmark(args, data, tokenizer, template, 192)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Llama.from_pretrained(base, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    load_lora(policy, folder)

    def policy_logits(ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        return policy(ids, mask, logits_to_keep=keep)

    def base_logits(ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        with lora_disabled(policy):
            return policy(ids, mask, logits_to_keep=keep)

    def measured(name: str, logits: Callable, adapter, kl_tokens: int, **settings) -> dict:
        with adapter:
            sampled = answer(policy, tokenizer, benchmark, max_new_tokens=preset.get("response_length", 300),
                             temperature=temperature, seed=args.seed, label=name, kl_tokens=kl_tokens)
        return measure(sampled, logits, base_logits, None, tokenizer, benchmark, temperature=temperature, policy_device=device,
                       reference_device=device, kl_tokens=kl_tokens or 28_000, **settings)

    policies = [Policy("base", 0, lambda **settings: measured("base", base_logits, lora_disabled(policy), **settings)),
                Policy(folder.name, 1, lambda **settings: measured(folder.name, policy_logits, nullcontext(), **settings))]
    score = other_reward(args, template, device)
    if args.judge == "reward" and score is None:
        raise ValueError("--judge-reward is missing: an adapter names no reward model")
    return benchmark, score, policies, data


def other_reward(args: argparse.Namespace, template: str, device: str) -> Callable | None:
    """The scores of --judge-reward's model, if that is given."""
    if not args.judge_reward:
        return None
    model = RewardModel.from_pretrained(args.judge_reward, device=device)
    tokenizer = load_tokenizer(args.judge_reward).for_template(template)
    return scorer_of_texts(lambda ids, mask, n: model(ids, mask), tokenizer, template, device)


def whole_number(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"--step {text}: must be a whole number, or all")
    return int(text)
