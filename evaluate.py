# SPDX-License-Identifier: MIT
"""Evaluation as the paper does it: win rate against reference outputs, true KL, response length, factuality.

    python evaluate.py runs/bregman-s0                 # the last checkpoint of a run, beside SFT
    python evaluate.py runs/bregman-s0 --step 20 40    # some of its checkpoints; --step all
    python evaluate.py runs/bregman-s0 --judge openai --judge-model NAME --base-url URL     # an LLM decides who wins
    python evaluate.py some/adapter --policy DIR       # an adapter folder in PEFT's layout, on its base model
    python evaluate.py winrate --annotations FILE      # from recorded judgements, AlpacaEval's or ours
    python evaluate.py report RUNS... --out DIR        # Tables 1 and 2, Figures 1 to 3 of finished runs
    python evaluate.py chat runs/bregman-s0            # your instructions, answered by SFT and policy side by side
    python evaluate.py rollout runs/bregman-s0         # what happens to each token of one response; --out FILE.html
    torchrun --standalone --nproc-per-node 4 evaluate.py runs/bregman-s0        # the same figures, by four processes

Win rate (section 2.1): each of the 805 evaluation instructions is answered by the policy and by a reference writer; one
judge of a pool compares the two, in the miniature world one of `tiny/annotators.py`'s. True KL: section 4, Figure 2.
Factuality (Table 2): the share of stated facts that are true. Here are the flags and the loop over policies; evaluation/ holds
the measuring, the judges and the reports.

Departures: answers are sampled at the training temperature instead of greedily; ties count half; unparsable judgements are
left out; every figure has a standard error.
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import format_prompt
from divergences import ESTIMATORS
from evaluation import chat, rollout
from evaluation.endpoint import Endpoint
from evaluation.factuality import QUESTION, check_topics, count_facts, fact_figures, load_passages, load_topics
from evaluation.judges import (EndpointError, Judge, LLMJudge, ScoreJudge, Verdict, compare, endpoints_of, load_pool,
                               read_annotations, summary, whole_instruction)
from evaluation.measure import Benchmark, evaluate_policy, judged, load_benchmark
from evaluation.results import measured_before, read_object, result_name, write_annotations, write_outputs, write_results
from evaluation.statistics import bootstrap, win_rate
from evaluation.tables import changes_in_words, format_table, quality_table
from formats.tokenizer import load_tokenizer
from formats.write import any_console
from lora import load_lora, lora_layers
from training import launch, ranks
from training.checkpoint import load_weights
from training.config import TINY_PRESET, Parser, RunConfig, stored_config
from training.folder import checkpoints, locked
from training.interrupts import exit_code
from training.models import Models, build_models
from training.origin import texts_digest, weights_digest
from training.plan import Shards, shards_of
from training.rewards import ScoreTexts, is_rule, open_reader

OPENAI = "https://api.openai.com/v1"


# ------------------------------------------------------------------------------------------------ what lies in a folder


@dataclass
class Policy:
    """One policy to evaluate: its name, its PPO step, and how its weights get into the models."""

    name: str
    step: int
    load: Callable[[Models], object]


def evaluate_folder(folder: Path, args: argparse.Namespace) -> dict[str, dict]:
    """Measures what the folder holds; writes evaluation.json and outputs/ after every policy; returns {name: figures}. Where
    several processes share it (docs/scale.md), the first of them asks the judges and writes."""
    asked = ranks.each(lambda: llm_judges(args)) if args.judge == "openai" else None  # a wrong address is said before all else
    run, policies = ranks.each(lambda: open_folder(folder, args))
    shards = ranks.each(lambda: shards_of(run))
    benchmark, passages, older, models, judges = ranks.each(lambda: prepare(folder, run, shards, args))
    judges = asked or judges
    settings = settings_of_this(args, run, benchmark, judges)
    ranks.require_equal("what is evaluated:", settings)

    def ask_all(prompts: Sequence[str], desc: str) -> list[str | None]:
        endpoint = endpoints_of(judges.pool)[0]
        return endpoint.ask_all(prompts, file=folder / "facts.jsonl", parallel=args.parallel, desc=desc)

    def finish(policy: Policy, result: dict, pool: dict[str, Judge]) -> dict[str, dict]:
        name = result_name(older, policy.name, settings)
        if judges:
            records = judge_answers(judges, pool, benchmark.tasks, result, folder, name)
            result |= {"judge": judges.label} | judged([record["preference"] for record in records])
        if passages is not None:
            result |= fact_figures(count_facts(benchmark.topics, result["about"], passages, ask_all))
        write_outputs(folder, name, benchmark, result)
        results[name] = {"step": policy.step, "data": str(run.evaluation), "policy": policy.name, "settings": settings} | result
        write_results(folder, results)
        return results

    results: dict[str, dict] = {}
    for policy in policies:
        ranks.each(lambda policy=policy: policy.load(models))
        if ranks.here().size > 1:
            ranks.require_equal("what is loaded:", {policy.name: weights_digest(models.policy.named_parameters())})
        trained = policy.step > 0  # else it is its own reference, and every KL zero
        result = evaluate_policy(models, run, benchmark, policy.name, args.kl_tokens if trained else 0,
                                 {name: f for name, f in ESTIMATORS.items() if name != "none"} if trained else None)
        pool = pool_of(judges, benchmark.tasks, result) if judges else {}
        results = ranks.first_at_leisure(finish, policy, result, pool)
    return results


def open_folder(folder: Path, args: argparse.Namespace) -> tuple[RunConfig, list[Policy]]:
    """What it holds, with the lengths that were asked for."""
    run, policies = (open_adapter if (folder / "adapter_config.json").is_file() else open_run)(folder, args)
    run.evaluation_length, run.query_length = args.max_tokens or run.evaluation_length, args.query_length or run.query_length
    run.compile = False  # what is read once isn't worth a minute
    return run, policies


def prepare(folder: Path, run: RunConfig, shards: Shards | None, args: argparse.Namespace) -> tuple:
    """Everything else before the first answer: benchmark, passages, what was measured before, models, judges."""
    tokenizer = load_tokenizer(run.policy).for_template(run.prompt_template, run.system)
    benchmark, passages, older = open_benchmark(args, run, tokenizer), None, measured_before(folder)
    if args.passages:
        check_topics(benchmark.topics, passages := load_passages(args.passages))
    print(benchmark.in_words(run.query_length))
    models = build_models(run, tokenizer, shards)
    for note in models.notes:
        if note.startswith(("reward: ", "warning: ")):
            print(note)
    return benchmark, passages, older, models, other_judges(args, models, run, benchmark)


def settings_of_this(args: argparse.Namespace, run: RunConfig, benchmark: Benchmark, judges: "Judges | None") -> dict[str, Any]:
    """Everything but the policy that decides an evaluation's figures."""
    judging = {"judge": judges.label, "judge_seed": args.judge_seed} if judges else {"judge": None}
    return {"n": len(benchmark.tasks)} | judging | {
        "data": str(run.evaluation), "digest": texts_digest(benchmark.prompts, benchmark.tasks), "seed": run.seed,
        "template": run.prompt_template, "temperature": run.ppo.temperature, "query_length": run.query_length,
        "max_tokens": run.evaluation_length or run.ppo.response_length, "kl_tokens": args.kl_tokens,
        "topics": str(args.topics) if args.topics else None, "passages": str(args.passages) if args.passages else None}


def open_run(folder: Path, args: argparse.Namespace) -> tuple[RunConfig, list[Policy]]:
    """A run folder's configuration, SFT and the checkpoints asked for."""
    run = stored_config({"out": str(folder)})
    run.evaluation = args.data or run.evaluation
    if run.evaluation is None:
        raise ValueError(f"--data is missing: the run in {folder} names no evaluation instructions")
    if is_rule(run.reward) and args.reward != run.reward:  # the folder may be a stranger's
        if args.judge == "reward" and not args.judge_reward:
            raise ValueError(f"--judge reward: the run's reward is a rule, which is code: name it, --reward {run.reward}")
        print(f"the run's reward is a rule, which is code and runs only when it is named: --reward {run.reward}")
        run.reward = None
    there = {int(p.name.removeprefix("step-")): p for p in checkpoints(folder)}
    steps = sorted(there) if args.step == ["all"] else [whole_number(step) for step in args.step] or sorted(there)[-1:]
    missing = [s for s in steps if s not in there]
    if missing or not there:
        raise ValueError(f"--step {missing or 'last'}: {folder} holds checkpoints {sorted(there)}")
    trained = [Policy(there[s].name, s, lambda models, s=s: load_weights(run, models, there[s])) for s in steps]
    return run, [Policy("SFT", 0, lambda models: None), *trained]


def open_adapter(folder: Path, args: argparse.Namespace) -> tuple[RunConfig, list[Policy]]:
    """The same of a policy adapter in PEFT's layout: a run without a reward, as an adapter names no reward model. Where its base
    is the miniature world's model, what is not given comes from that world."""
    base = args.policy or read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not (base and isinstance(base, str)):
        raise ValueError(f"--policy is missing: {folder}/adapter_config.json names no base model")
    preset = TINY_PRESET if Path(base).resolve() == Path(TINY_PRESET["policy"]).resolve() else {}
    asked = {"evaluation": args.data, "prompt_template": args.prompt_template, "temperature": args.temperature}
    run = RunConfig.from_dict(preset | {name: value for name, value in asked.items() if value is not None}
                              | {"policy": base, "reward": None, "adapter": str(folder), "seed": args.seed})
    if run.evaluation is None:
        raise ValueError(f"--data is missing: name evaluation instructions for the base model {base}")
    if args.judge == "reward" and not args.judge_reward:
        raise ValueError("--judge-reward is missing: an adapter names no reward model")
    return run, [Policy("base", 0, take_adapter_away), Policy(folder.name, 1, lambda models: load_lora(models.policy, folder))]


@torch.no_grad()
def take_adapter_away(models: Models) -> None:
    """Policy and reference are then the base model."""
    models.start = {}
    for layer in lora_layers(models.policy).values():
        layer.lora_B.zero_()


def open_benchmark(args: argparse.Namespace, run: RunConfig, tokenizer: Any) -> Benchmark:
    """The run's evaluation instructions, cut to --limit, with the questions about --topics in place of the miniature world's."""
    benchmark = load_benchmark(run.evaluation, tokenizer, run.prompt_template, run.query_length)
    if args.limit:
        benchmark.tasks, benchmark.prompts = benchmark.tasks[:args.limit], benchmark.prompts[:args.limit]
    miniature = bool(benchmark.tasks[0].get("family"))
    without = next((i for i, task in enumerate(benchmark.tasks) if not task.get("output")), None)
    if without is not None and (args.judge not in ("auto", "none") or args.judge == "auto" and miniature):
        raise ValueError(f"--data: evaluation instruction {without + 1} has no output to compare answers with")
    if args.topics:
        benchmark.topics, benchmark.about = load_topics(args.topics), []
        questions = [{"instruction": QUESTION.format(topic=topic)} for topic in benchmark.topics]
        benchmark.about_prompts = [tokenizer.encode(format_prompt(q, run.prompt_template, tokenizer)) for q in questions]
    return benchmark


def whole_number(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"--step {text}: must be a whole number, or all")
    return int(text)


# ----------------------------------------------------------------------------------------------------------- judgements

@dataclass
class Judges:
    """Who decides: a pool of which one judges each pair, or a reward model, which reads everything at once."""

    label: str
    pool: dict[str, Judge] = field(default_factory=dict)
    score: ScoreTexts | None = None
    seed: int = 0
    parallel: int = 1


def llm_judges(args: argparse.Namespace) -> Judges:
    """--judge openai."""
    key = os.environ.get("OPENAI_API_KEY") or None

    def connect(model: str, **settings: Any) -> Endpoint:
        return Endpoint(args.base_url, model, key=key, timeout=args.judge_timeout, **settings)

    if args.judge_pool:
        pool = load_pool(args.judge_pool, connect)
    else:
        pool = {model: LLMJudge(connect(model)) for model in args.judge_model}
    if key is None and args.base_url == OPENAI:  # before any answer is sampled
        raise ValueError(f"--judge openai: {OPENAI} wants a key, in OPENAI_API_KEY; another server is named by --base-url")
    return Judges(", ".join(pool), pool, seed=args.judge_seed, parallel=args.parallel)


def other_judges(args: argparse.Namespace, models: Models, run: RunConfig, benchmark: Benchmark) -> Judges | None:
    """The miniature world's annotators, or a reward model, the run's own or --judge-reward; None where nobody judges."""
    miniature = bool(benchmark.tasks[0].get("family"))
    if args.judge == "annotators" or args.judge == "auto" and miniature:
        from tiny.annotators import POOL, prefer

        pool = {a.name: lambda task, x, y, a=a: Verdict(prefer(a, task, x, y)) for a in POOL}
        return Judges("annotators", pool, seed=args.judge_seed)
    if args.judge != "reward":
        return None
    if not args.judge_reward:
        return Judges("reward", score=models.score_texts, seed=args.judge_seed)
    reader, note = open_reader(args.judge_reward, "--judge-reward", run.prompt_template, args.reward_eos,
                               device=models.reference_device)
    print(f"judge: {args.judge_reward} reads instruction and answer as texts, {note}")
    return Judges(f"reward {args.judge_reward}", score=reader.score_texts, seed=args.judge_seed)


def pool_of(judges: Judges, tasks: Sequence[dict], result: dict) -> dict[str, Judge]:
    """Who judges these answers beside the reference outputs; a reward model reads all of both now, shared by the processes."""
    if not judges.score:
        return judges.pool
    both = [*tasks, *tasks], [*result["responses"], *(task["output"] for task in tasks)]
    scores = judges.score(*both, [*result["ended"], *[True] * len(tasks)])
    scored = {(whole_instruction(task), text): score for task, text, score in zip(*both, scores, strict=True)}
    return {"reward": ScoreJudge(scored)}


def judge_answers(judges: Judges, pool: dict[str, Judge], tasks: Sequence[dict], result: dict, folder: Path, policy: str
                  ) -> list[dict]:
    """A judgement of each answer beside the reference output, in AlpacaEval's form; what LLMs say is kept as it comes."""
    records = compare(tasks, result["responses"], [task["output"] for task in tasks], pool, seed=judges.seed,
                      file=None if judges.score else folder / "judgements.jsonl", parallel=judges.parallel,
                      names=(tasks[0].get("generator", "reference"), policy))
    write_annotations(folder, policy, records)
    if endpoints := endpoints_of(pool):
        tqdm.write(f"{policy}: {summary(records, endpoints)}")
    return records


# -------------------------------------------------------------------------------------------------------------- program


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="Without a command, run is meant: python evaluate.py "
                    "runs/bregman-s0")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a run folder or an adapter")
    run.add_argument("folder", type=Path, help="a run folder of train.py, or an adapter folder in PEFT's layout")
    run.add_argument("--step", nargs="+", default=[], help="checkpoints of the run to evaluate, or all (default: the last)")
    run.add_argument("--data", help="evaluation instructions with reference outputs (default: the run's)")
    run.add_argument("--reward", metavar="FILE.py:RULE", help="the run's own rule, which is code and runs only when it is named")
    run.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N of them")
    run.add_argument("--query-length", type=int, metavar="N", help="tokens of the longest prompt, longer ones are left out "
                     "(default: the run's, an adapter's 192)")
    run.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: as in training; the released code: 512)")
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
    judge.add_argument("--base-url", default=OPENAI, metavar="URL",
                       help="of the endpoint (default: %(default)s)")
    judge.add_argument("--judge-reward", metavar="DIR", help="the reward model that judges (default: the run's own)")
    judge.add_argument("--reward-eos", choices=("yes", "no"), help="whether that model was trained on sequences that end in EOS, "
                       "where its folder doesn't say")
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
    report.add_argument("--judge", metavar="NAME", help="show what this judge said, as evaluation.json names it (default: the "
                        "fullest evaluation of each run)")
    report.add_argument("--out", type=Path, required=True, help="folder for report.html, report.md and the pictures")
    chat.add_flags(commands.add_parser("chat", help="answers to your instructions, SFT and policy side by side"))
    rollout.add_flags(commands.add_parser("rollout", help="what happens to each token of one response, as table and page"))
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Contradictions between the flags of `run`."""
    for name, low in (("limit", 0), ("kl_tokens", 1), ("parallel", 1), ("max_tokens", 1), ("query_length", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    if not args.judge_timeout > 0:
        raise ValueError(f"--judge-timeout {args.judge_timeout}: must be above 0")
    if args.judge == "openai" and bool(args.judge_model) == bool(args.judge_pool):
        raise ValueError("--judge openai needs --judge-model NAME or --judge-pool FILE, one of them")
    if args.judge != "openai":
        for flag in ("judge_model", "judge_pool", "passages"):
            if getattr(args, flag):
                raise ValueError(f"--{flag.replace('_', '-')} goes with --judge openai, not {args.judge}")
    if args.reward_eos and not args.judge_reward:
        raise ValueError("--reward-eos goes with --judge-reward: of the run's own reward model its training decided")
    if args.judge_reward and args.judge != "reward":
        raise ValueError(f"--judge-reward goes with --judge reward, not {args.judge}")
    if args.passages and not args.topics:
        raise ValueError("--passages needs --topics: what to ask about, one a line")
    if not any((args.folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"{args.folder}: neither a run folder (config.json) nor an adapter (adapter_config.json)")


def run_command(args: argparse.Namespace) -> None:
    ranks.each(lambda: check_options(args))
    ranks.require_equal("flag", vars(args))
    with contextlib.ExitStack() as until_the_end:  # beside a run that is going on, but not beside another evaluation
        ranks.first(until_the_end.enter_context, locked(args.folder, ".evaluating.lock", "folder"))
        results = evaluate_folder(args.folder, args)
    print(format_table({result["policy"]: result for result in results.values()}))
    first, *others = ((result["policy"], result) for result in results.values())
    for name, result in others:
        print(f"{name} − {first[0]}, paired: {changes_in_words(first[1], result)}")
    last = list(results.values())[-1]
    if "estimators" in last:
        print("\n" + quality_table(last))
    unread = {name: r["n"] - r["judged"] for name, r in results.items() if r.get("judged", r["n"]) < r["n"]}
    if unread:
        print("judgements that could not be read or were refused, left out: "
              + ", ".join(f"{name} {n}" for name, n in unread.items()))
    if facts := {name: r["unread"] for name, r in results.items() if r.get("unread")}:
        print("facts, or lists of them, that could not be read, left out: " + ", ".join(f"{k} {n}" for k, n in facts.items()))
    beside = [name for name, result in results.items() if name != result["policy"]]
    print(f"written to {args.folder}: evaluation.json, with every response, and outputs/ for other evaluators"
          + (f"; under {', '.join(beside)}, beside what was measured with other settings" if beside else ""))


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


def report_command(args: argparse.Namespace) -> None:
    from evaluation.report import write_report

    write_report(args.folders, args.out, args.judge)


def alone(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """A command of one process."""
    def checked(args: argparse.Namespace) -> None:
        if ranks.here().size > 1:
            raise ValueError(f"{args.command} is with one process: start it with python, without torchrun")
        command(args)
    return checked


COMMANDS = {"run": run_command, "winrate": winrate_command, "report": report_command, "rollout": alone(rollout.show),
            "chat": alone(lambda args: chat.chat(args.folder, args.step, args.temperature, args.max_tokens, args.seed))}


def complain(error: BaseException) -> tuple[int, str]:
    """(exit code, what to say): 2 for bad input, 1 for what it met on its way."""
    match error:
        case KeyboardInterrupt():
            return 130, "evaluate.py: interrupted; what was judged is kept, the same command goes on from there"
        case ValueError() | OSError() | EndpointError():  # raised: by a rule
            return 1 if getattr(error, "raised", False) or isinstance(error, launch.Lost) else 2, f"evaluate.py: {error}"
    return 1, "".join(traceback.format_exception(error))


def main() -> int:
    any_console()
    argv = sys.argv[1:]
    if argv and argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = ["run", *argv]
    with ranks.one_voice():
        args = build_parser().parse_args(argv)
    # All processes measure; what needs no model, the first does.
    work = COMMANDS[args.command] if args.command == "run" else lambda args: ranks.first(COMMANDS[args.command], args)
    return exit_code(lambda: work(args), complain)


if __name__ == "__main__":
    sys.exit(main())
