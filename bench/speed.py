"""What a PPO step takes on other cards and on more of them, foretold from what was measured on one (docs/speed.md).

    python bench/speed.py                # reads bench/results/gpu.json, writes bench/results/speed.md

A phase is its floor (gpu.md: weights and keys read in sampling, products in reading and updating), which grows as the card's
memory bandwidth or bf16 rate falls, both by the vendor's datasheets, and what it took beyond: elementwise work, which waits for
memory, in a large model, and Python, which no card makes faster, in small ones. Several GPUs are as many processes with a GPU
each (docs/scale.md): they divide reading, updating and the rounds in which 64 responses at a time are sampled, down to one.
"""

import datetime
import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
CARDS = {"H200": (4.8, 989), "H100": (3.35, 989), "A100 80 GB": (2.04, 312), "RTX 4090": (1.01, 165)}  # TB/s, bf16 TFLOP/s
AT_ONCE = 64  # rows of a round, as measured


def foretold(measured: dict, of: str, card: str, gpus: int = 1) -> float:
    """Seconds of the step that took `measured` on card `of`."""
    memory, products = (theirs / its for theirs, its in zip(CARDS[of], CARDS[card], strict=True))
    beyond = memory if measured["peak_gib"] > 24 else 1.0
    rounds = [max(1, -(-measured["batch"] // (AT_ONCE * n))) for n in (1, gpus)]
    seconds = 0.0
    for phase, took in measured["phases"].items():
        floor = min(took, measured["floor"].get(phase, 0.0))
        slower = memory if phase == "generate" else products
        share = rounds[1] / rounds[0] if phase == "generate" else 1 / gpus
        seconds += share * (floor * slower + (took - floor) * beyond)
    return seconds


def main() -> None:
    found = json.loads((RESULTS / "gpu.json").read_text(encoding="utf-8"))
    where = found["step"]["machine"]["machine"]
    [of] = [card for card in CARDS if card in where]
    commits = ", ".join(sorted({part["machine"]["commit"] for part in found.values()}))
    lines = ["# Seconds of a PPO step, measured and foretold", "",
             f"`python bench/speed.py`, {datetime.date.today().isoformat()}, commit of this file. Measured (gpu.md): {where}, "
             f"commits {commits}. Foretold by the formula of that script.", "",
             "| model, bf16 | responses, tokens | peak, GiB | card | GPUs | s a step | |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for values in (found["step"]["step"], *(found["small"][name] for name in ("tinyllama-1b", "smollm2-135m"))):
        what = (f"| {values['shape']} | {values['batch']} × {values['prompt_length']} + {values['response_length']} | "
                f"{values['peak_gib']:.1f} |")
        lines.append(f"{what} {of} | 1 | {values['seconds']:.1f} | measured |")
        cases = [("H100", 1), ("A100 80 GB", 1), ("H100", 2), ("H100", 8)] if values["peak_gib"] > 24 else [("RTX 4090", 1)]
        lines += [f"{what} {card} | {gpus} | {foretold(values, of, card, gpus):.1f} | foretold |" for card, gpus in cases]
    (RESULTS / "speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines) + f"\nwritten to {RESULTS / 'speed.md'}")


if __name__ == "__main__":
    main()
