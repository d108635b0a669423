"""Table 1 in miniature: every estimator, several seeds, one table with win rates and what else changed.

    python bench/table1.py                                   # all estimators, seeds 0 1 2
    python bench/table1.py --only bregman none --seeds 0     # some of it; finished runs are not run again

Each cell is one `python train.py` on the miniature world; flags behind `--` go to every run. The table goes to
<out>/table1.md, and the runs lie beside it. Win rates are means over seeds with the paper's bootstrap error, in brackets the
error over seeds and instructions both; "gain" is the paired difference to SFT on the 805 evaluation instructions, seed by seed,
in points and in its standard errors. SFT is sampled once with each seed; the change of fact precision is paired by seed and
question, its error is that over the seeds. A second table sets every row beside no regularization, paired by seed.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ppo_step import command_line, machine  # noqa: E402

from evaluation.results import paired_changes  # noqa: E402
from evaluation.statistics import bootstrap, bootstrap_crossed, mean_and_error  # noqa: E402
from training.folder import read_lines  # noqa: E402

ROWS = {  # name: (what Table 1 calls it, flags)
    "clamped_kl": ("clamped KL", ["--estimator", "clamped_kl"]),
    "kl": ("KL", ["--estimator", "kl"]),
    "bregman": ("Bregman", ["--estimator", "bregman"]),
    "squared_error": ("squared error", ["--estimator", "squared_error"]),
    "jensen_shannon": ("Jensen-Shannon", ["--estimator", "jensen_shannon"]),
    "none": ("no regularization, dropout 0.1 as in the released command", ["--estimator", "none"]),
    "nothing": ("no regularization at all, dropout 0", ["--estimator", "none", "--lora-dropout", "0"]),
    "dropout_only": ("dropout only (p = 0.5)", ["--estimator", "none", "--lora-dropout", "0.5"]),
    "negative_kl": ("negative KL (section 4's probe)", ["--estimator", "negative_kl"]),
}


def finished(folder: Path) -> bool:
    """Whether a run got as far as its last evaluation."""
    return len(read_lines(folder / "evaluations.jsonl")) >= 2


def run(name: str, seed: int, out: Path, extra: list[str]) -> None:
    """Trains one cell, unless it is there already; its output goes to a log beside it."""
    folder = out / f"{name}-s{seed}"
    if finished(folder):
        return
    out.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if any(folder.glob("step-*")) else []
    command = [sys.executable, str(ROOT / "train.py"), *ROWS[name][1], "--seed", str(seed), "--out", str(folder), *extra, *resume]
    print(" ".join(command[1:]), flush=True)
    with open(out / f"{name}-s{seed}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


def figures(evaluations: list[dict], changes: list[dict]) -> str:
    """The columns that SFT and the policies share: means over seeds."""
    rate, error = bootstrap([e["win_rate"] for e in evaluations])
    honest = bootstrap_crossed([e["preferences"] for e in evaluations])[1]
    gains = [f"{c['win_rate']:+.1f} ({c['win_rate'] / c['win_rate_se']:.1f})" for c in changes]
    facts = mean_and_error([c["fact_precision"] for c in changes]) if changes else None

    def mean(key: str, digits: int) -> str:
        return f"{sum(e[key] for e in evaluations) / len(evaluations):.{digits}f}"

    return (f"{rate:.1f} ± {error:.1f} ({honest:.1f}) | {', '.join(gains)} | {mean('true_kl', 3)} | {mean('reward', 2)} | "
            f"{mean('tokens', 1)} | {mean('fact_precision', 1)} | {f'{facts[0]:+.1f} ± {facts[1]:.1f}' if facts else ''} | "
            f"{mean('repeats', 2)} |")


def summarise(name: str, folders: list[Path]) -> str:
    """One row of the table."""
    pairs = [read_lines(folder / "evaluations.jsonl") for folder in folders]
    changes = [paired_changes(lines[0], lines[-1]) for lines in pairs]
    return f"| {ROWS[name][0]} | {figures([lines[-1] for lines in pairs], changes)}"


def beside(name: str, folders: list[Path], others: list[Path]) -> str:
    """One row of the second table: this row less the others, over the seeds that both have."""
    last = {folder.name.rpartition("-s")[2]: read_lines(folder / "evaluations.jsonl")[-1] for folder in others}
    pairs = [(read_lines(folder / "evaluations.jsonl")[-1], last[seed]) for folder in folders
             if (seed := folder.name.rpartition("-s")[2]) in last]

    def difference(key: str, digits: int) -> str:
        mean, error = mean_and_error([ours[key] - theirs[key] for ours, theirs in pairs])
        return f"{mean:+.{digits}f} ± {error:.{digits}f}"

    return f"| {ROWS[name][0]} | {difference('win_rate', 1)} | {difference('true_kl', 3)} | {difference('tokens', 1)} |"


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    argv, extra = sys.argv[1:split], sys.argv[split + 1:]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("runs/table1"))
    parser.add_argument("--finished", action="store_true", help="run nothing, tabulate the runs that are finished")
    args = parser.parse_args(argv)
    folders: dict[str, list[Path]] = {name: [] for name in args.only}
    for seed in args.seeds:  # seed by seed, so that an interrupted study has whole seeds
        for name in args.only:
            if not args.finished:
                run(name, seed, args.out, extra)
            if finished(folder := args.out / f"{name}-s{seed}"):
                folders[name].append(folder)
    folders = {name: found for name, found in folders.items() if found}
    if not folders:
        sys.exit(f"table1.py: no finished run in {args.out}")
    before = [read_lines(folder / "evaluations.jsonl")[0] for folder in next(iter(folders.values()))]
    lines = ["| divergence estimator | win rate, % | gain over SFT by seed, points (standard errors) | true KL | reward | tokens "
             "| fact precision, % | its change | repeats |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
             f"| *SFT* | {figures(before, [])}"]
    lines += [summarise(name, found) for name, found in folders.items()]
    if others := folders.get("none"):
        lines += ["", "| minus no regularization (dropout 0.1), paired by seed | win rate, points | true KL | tokens |",
                  "| --- | --- | --- | --- |"]
        lines += [beside(name, found, others) for name, found in folders.items() if name != "none"]
    text = f"`{command_line()}`\n\n{machine()}.\n\n" + "\n".join(lines) + "\n"
    (args.out / "table1.md").write_text(text, encoding="utf-8")
    print(text + f"\nwritten to {args.out / 'table1.md'}")


if __name__ == "__main__":
    main()
