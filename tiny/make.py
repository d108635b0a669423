"""Builds the miniature world from a seed: data, tokenizer, SFT model, preferences and reward model.

    python tiny/make.py                      # rewrites tiny/{data,sft,reward} and tiny/report.json
    python tiny/make.py --out /tmp/world     # elsewhere, to compare two builds

The steps are AlpacaFarm's: supervised fine-tuning on 10K demonstrations (stage 1), a pool of annotators labels pairs of the
SFT model's own samples on another 10K instructions, a quarter of the labels flipped (stage 2's data), a reward model is
trained on them from the SFT weights, and evaluation instructions get their reference outputs. Departures:

  * There is no LLaMA to start from, so the model is first pretrained on plain texts of the world.
  * Each preference instruction has several candidates, all pairs of which are labelled and which are scored once each
    (InstructGPT's trick, Ouyang et al. 2022, section 3.5), because a small reward model needs more labels; ties are left out.

Weights are stored in bf16 and every stage starts from the stored, rounded weights: what is committed is what was measured.
"""

import argparse
import itertools
import json
import random
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sentencepiece  # noqa: E402
import torch  # noqa: E402

import reward as reward_module  # noqa: E402
from data import TEMPLATES, encode_pair, format_prompt  # noqa: E402
from evaluation.measure import measure_facts, sample_responses  # noqa: E402
from evaluation.statistics import mean_and_error, win_rate  # noqa: E402
from formats.tokenizer import load_tokenizer  # noqa: E402
from formats.write import any_console, write_json  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402
from reward import Group, RewardModel, TrainingConfig  # noqa: E402
from sft import train_sft  # noqa: E402
from tiny.annotators import (  # noqa: E402
    POOL,
    TIE,
    add_references,
    is_correct,
    judge,
    noisy,
    read,
)
from tiny.tasks import make_corpus, make_splits  # noqa: E402
from training.config import TINY_PRESET  # noqa: E402

TEMPERATURE, RESPONSE_LENGTH = TINY_PRESET["temperature"], TINY_PRESET["response_length"]  # as in PPO's rollouts
VOCABULARY = 2560      # pieces
CANDIDATES = [TEMPERATURE] * 5 + [1.0] * 4  # temperatures of the samples of an instruction in the preference data
COMMITTED = ("ppo", "validation", "evaluation", "about")  # splits that a later stage reads
CONFIG = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, tie_word_embeddings=True,
              max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.05)
CORPUS = 120_000       # pretraining texts, each read once
PRETRAIN = TrainingConfig(epochs=1, batch_size=32, learning_rate=4e-3, warmup=0.05)
SFT = TrainingConfig(epochs=2, batch_size=32, learning_rate=1e-3)
REWARD = TrainingConfig(epochs=1, batch_size=16, learning_rate=1e-3, warmup=0.05)


def public(task: dict) -> dict:
    """A record as it stands in a data file: AlpacaFarm's fields, then what the judges need, empty ones left out."""
    extra = {key: value for key, value in task.items() if value not in (None, (), "")}
    return {"instruction": task["instruction"], "input": task["input"], "output": task["output"]} | extra


def build_tokenizer(demonstrations: list[dict], file: Path) -> None:
    """SentencePiece with LLaMA's settings trained on the SFT split.

    The fixed parts of Alpaca's prompt are one piece each: a model of a million parameters has no words to waste.
    """
    template = TEMPLATES["tiny"]
    fixed = []
    for text in (template.with_input, template.without_input):
        for slot in ("{instruction}", "{input}"):
            text = text.replace(slot, "\0")
        fixed += [part for part in text.split("\0") if part]
    texts = [format_prompt(task, template) + template.before_response + task["output"] for task in demonstrations]
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True,
            split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, character_coverage=0.9999, num_threads=1, minloglevel=2,
            user_defined_symbols=[part.replace(" ", "\u2581") for part in dict.fromkeys(fixed)])


def build_sft(tokenizer, splits: dict, out: Path, seed: int) -> list[dict]:
    """Stage 1: a small LLaMA, pretrained on the world's plain texts, then tuned on the demonstrations; stored in bf16.

    Without the pretraining it learns ten thousand demonstrations by heart instead of how to follow instructions.
    """
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                              eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **CONFIG))
    print(f"SFT: {sum(p.numel() for p in model.parameters()):,} parameters")
    texts = make_corpus(CORPUS, seed, splits)
    documents = [([tokenizer.bos_token_id], tokenizer.encode(text, bos=True, eos=True)[1:]) for text in texts]
    train_sft(model, documents, replace(PRETRAIN, seed=seed), pad_token_id=tokenizer.pad_token_id, progress="pretraining")
    pairs = [encode_pair(task, task["output"], tokenizer, "tiny") for task in splits["sft"]]
    validation = [encode_pair(task, task["output"], tokenizer, "tiny") for task in splits["validation"][:500]]
    history = train_sft(model, pairs, replace(SFT, seed=seed), validation=validation, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(out)
    return history


def load_sft(folder: Path) -> Llama:
    return Llama.from_pretrained(folder, dtype=torch.float32)


def sample_texts(model: Llama, tokenizer, tasks: list[dict], seed: int, desc: str,
                 temperature: float = TEMPERATURE) -> list[list[int]]:
    """One response (token ids) to each task."""
    prompts = [tokenizer.encode(format_prompt(task, "tiny"), bos=True) for task in tasks]
    return sample_responses(model, tokenizer, prompts, max_new_tokens=RESPONSE_LENGTH, temperature=temperature, seed=seed,
                            desc=desc, batch_size=512)


# Preferences ----------------------------------------------------------------------------------------------------------


def candidates(model: Llama, tokenizer, tasks: list[dict], temperatures: list[float], seed: int) -> list[list[list[int]]]:
    """A sample (token ids) at each of the temperatures for each task."""
    columns = [sample_texts(model, tokenizer, tasks, seed + i, f"candidate {i + 1} of {len(temperatures)}", temperature)
               for i, temperature in enumerate(temperatures)]
    return [list(group) for group in zip(*columns)]


def label(task: dict, texts: list[str], rng: random.Random, noise: bool) -> list[tuple[int, int]]:
    """(winner, loser) for all pairs of texts, each judged by one annotator drawn from the pool; ties are left out."""
    utilities = {annotator.name: [annotator.utility(task, text) for text in texts] for annotator in POOL}
    pairs = []
    for i, j in itertools.combinations(range(len(texts)), 2):
        scores = utilities[rng.choice(POOL).name]
        if abs(scores[j] - scores[i]) < TIE:
            continue
        preference = 1 + (scores[j] > scores[i])
        pairs.append((i, j) if (noisy(preference, rng) if noise else preference) == 1 else (j, i))
    return pairs


def make_groups(tokenizer, tasks: list[dict], samples: list[list[list[int]]], seed: int, noise: bool) -> list[Group]:
    rng = random.Random(seed)
    groups = []
    for task, group in zip(tasks, samples):
        prompt = tokenizer.encode(format_prompt(task, "tiny"), bos=True)
        pairs = label(task, [tokenizer.decode(ids) for ids in group], rng, noise)
        groups.append(Group([prompt + ids for ids in group], pairs))
    return groups


def preference_file(tokenizer, tasks: list[dict], groups: list[Group]) -> list[dict]:
    """The first labelled pair of each task as AlpacaFarm's preference record, the order of the two outputs stable-random."""
    records = []
    for task, group in zip(tasks, groups):
        if group.pairs:
            prompt = len(tokenizer.encode(format_prompt(task, "tiny"), bos=True))
            winner, loser = (tokenizer.decode(group.sequences[i][prompt:]) for i in group.pairs[0])
            first, second = sorted((winner, loser), key=lambda text: zlib.crc32(text.encode()))
            records.append({"instruction": task["instruction"], "input": task["input"], "output_1": first, "output_2": second,
                            "preference": 1 if first == winner else 2})
    return records


def build_reward(tokenizer, groups: list[Group], held_out: list[Group], sft: Path, out: Path, seed: int) -> list[dict]:
    """Stage 2: the reward model from the SFT weights, standardised on SFT samples, stored in bf16."""
    torch.manual_seed(seed)
    model = RewardModel(load_sft(sft))
    model.prompt_template = "tiny"
    history = reward_module.train_reward(model, groups, replace(REWARD, seed=seed), held_out=held_out,
                                         pad_token_id=tokenizer.pad_token_id)
    samples = [ids for group in held_out for ids in group.sequences[:2]]
    model.save_pretrained(out, dtype=torch.bfloat16)
    stored = RewardModel.from_pretrained(out, dtype=torch.float32)
    reward_module.standardise(stored, samples, tokenizer.pad_token_id, batch_size=128)
    stored.save_pretrained(out, dtype=torch.bfloat16)
    return history


# Report ---------------------------------------------------------------------------------------------------------------


def kind_of_difference(task: dict, better: str, worse: str) -> str:
    """What a reader would point at first: where two responses to one task differ."""
    if task["answer"] is not None:
        return "right answer" if is_correct(task, better) != is_correct(task, worse) else "extra words"
    a, b = read(task, better), read(task, worse)
    if a.off_topic != b.off_topic or a.named != b.named:
        return "topic"
    if a.repeats != b.repeats:
        return "repeats"
    if a.unreadable != b.unreadable or a.finished != b.finished:
        return "form"
    if a.claims != b.claims or a.aspects != b.aspects:
        return "number of facts"
    return "truth" if a.true != b.true else "length"


def reward_report(model: RewardModel, tokenizer, tasks: list[dict], samples: list[list[list[int]]], seed: int) -> dict:
    """Accuracy on held-out SFT pairs against noise-free and noisy labels, and by kind of difference."""
    clean = make_groups(tokenizer, tasks, samples, seed, noise=False)
    pad = tokenizer.pad_token_id
    total = reward_module.accuracy(model, clean, pad, 128)
    noisy_total = reward_module.accuracy(model, make_groups(tokenizer, tasks, samples, seed, noise=True), pad, 128)
    kinds: dict[str, list[Group]] = {}
    for task, group, ids in zip(tasks, clean, samples):
        texts = [tokenizer.decode(i) for i in ids]
        for winner, loser in group.pairs:
            kind = kind_of_difference(task, texts[winner], texts[loser])
            kinds.setdefault(kind, []).append(Group([group.sequences[winner], group.sequences[loser]], [(0, 1)]))
    by_kind = {kind: reward_module.accuracy(model, found, pad, 256) for kind, found in sorted(kinds.items())}

    def show(a: reward_module.Accuracy) -> dict:
        return {"accuracy": round(a.value, 4), "se": round(a.standard_error, 4), "pairs": a.n}

    return {"noise_free": show(total), "noisy": show(noisy_total), "by_kind": {k: show(a) for k, a in by_kind.items()},
            "mean": model.mean.item(), "std": model.std.item()}


def sft_report(model: Llama, tokenizer, splits: dict, seed: int, temperature: float = TEMPERATURE) -> dict:
    """Win rate against the reference outputs, fact precision, repeats, length of the SFT model."""
    tasks = splits["evaluation"]
    ids = sample_texts(model, tokenizer, tasks, seed, "evaluation", temperature)
    texts = [tokenizer.decode(i) for i in ids]
    preferences = judge(tasks, texts, [task["output"] for task in tasks])
    rate, error = win_rate(preferences)
    closed = [is_correct(task, text) for task, text in zip(tasks, texts) if task["answer"] is not None]
    is_open = [task["answer"] is None for task in tasks]
    about = sample_texts(model, tokenizer, splits["about"], seed, "about", temperature)
    readings = [read(task, text) for task, text in zip(tasks, texts) if task["answer"] is None]
    facts = measure_facts(splits["about"], [tokenizer.decode(i) for i in about])
    del facts["fact_counts"]  # one by one, for comparisons
    return {"win_rate": rate, "win_rate_se": error,
            "win_rate_open": win_rate([p for p, o in zip(preferences, is_open) if o])[0],
            "win_rate_closed": win_rate([p for p, o in zip(preferences, is_open) if not o])[0],
            "closed_correct_percent": 100 * mean_and_error(closed)[0],
            "tokens": mean_and_error([len(i) for i in ids])[0],
            "unreadable_per_answer": mean_and_error([r.unreadable for r in readings])[0],
            "claims_per_answer": mean_and_error([r.claims for r in readings])[0]} | facts


def build(out: Path, seed: int) -> dict:
    """The whole world under `out`; returns the report."""
    start = time.time()
    splits = make_splits(seed)
    for name in ("validation", "evaluation", "about"):
        splits[name] = add_references(splits[name], seed)
    (out / "data").mkdir(parents=True, exist_ok=True), (out / "build").mkdir(parents=True, exist_ok=True)
    for name in COMMITTED:
        write_json(out / "data" / f"{name}.json", [public(task) for task in splits[name]], indent=None)
    build_tokenizer(splits["sft"], out / "sft" / "tokenizer.model")
    tokenizer = load_tokenizer(out / "sft")
    report = {"seed": seed, "sft_training": build_sft(tokenizer, splits, out / "sft", seed)}
    sft = load_sft(out / "sft")
    report["sft"] = sft_report(sft, tokenizer, splits, seed)
    print(json.dumps(report["sft"], indent=1))

    samples = candidates(sft, tokenizer, splits["preference"], CANDIDATES, seed + 100)
    held_tasks = splits["validation"]
    held_samples = candidates(sft, tokenizer, held_tasks, [TEMPERATURE] * 4, seed + 200)
    groups = make_groups(tokenizer, splits["preference"], samples, seed, noise=True)
    write_json(out / "build" / "preference.json", preference_file(tokenizer, splits["preference"], groups), indent=None)
    held_out = make_groups(tokenizer, held_tasks, held_samples, seed, noise=False)
    history = build_reward(tokenizer, groups, held_out, out / "sft", out / "reward", seed)
    for epoch in history:
        print(epoch)
    model = RewardModel.from_pretrained(out / "reward", dtype=torch.float32)
    report["reward"] = reward_report(model, tokenizer, held_tasks, held_samples, seed)
    print(json.dumps(report["reward"], indent=1))
    report["seconds"] = round(time.time() - start)
    (out / "reward" / "tokenizer.model").write_bytes((out / "sft" / "tokenizer.model").read_bytes())
    write_json(out / "report.json", report)
    return report


def main() -> None:
    any_console()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where data, checkpoints and report go")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = build(args.out, args.seed)
    print(f"written to {args.out}: data/, sft/, reward/, report.json ({report['seconds']} s)")


if __name__ == "__main__":
    main()
