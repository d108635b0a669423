"""The tables of bench/gpu.py."""

from ppo_step import PHASES

def in_words(found: dict) -> str:
    """gpu.md: a table a part, and where and when each was measured."""
    text = ["# First contact with a GPU", "", "`python bench/gpu.py`, part by part; the .json beside this file holds all of it."]
    for name, part in found.items():
        about = part["machine"]
        figures = {key: value for key, value in part.items() if key not in ("machine", "part_seconds", "ended")}
        where = [about["machine"], *([f"driver {about['driver']}"] if "driver" in about else []), f"commit {about['commit']}",
                 about["date"], *(["a rehearsal at toy sizes"] if about["rehearsal"] else [])]
        text += ["", f"## {name}", "", ", ".join(where), ""]
        if figures:
            text += TABLES[name](figures)
        if "ended" in part:
            text += ["", f"Ended early: {part['ended'][-1]}"]
    return "\n".join(text) + "\n"


def tests_table(found: dict) -> list[str]:
    lines = []
    for name, run in found.items():
        lines += ["", f"{name}: {run['summary']}", *(f"- {failed}" for failed in run["failed"])]
    return lines[1:]


def step_table(found: dict) -> list[str]:
    """Seconds by phase over what the arithmetic and the traffic alone would take at this card's measured speeds."""
    lines = ["| shape, bf16 | responses | tokens | step, s | generate | score | update | rest | peak, GiB | plan | sampled / s |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    floors = ["", "| seconds over their floor | generate | score | update | products, TFLOP/s | weights read, GB/s |",
              "| --- | --- | --- | --- | --- | --- |"]
    for values in found.values():
        phases, floor = values["phases"], values["floor"]
        lines.append(f"| {values['shape']} | {values['batch']} | {values['prompt_length']} + {values['response_length']} | "
                     f"{values['seconds']:.1f} | " + " | ".join(f"{seconds:.1f}" for seconds in phases.values())
                     + f" | {values['peak_gib']:.1f} | {values['plan_gib']:.1f} | {values['sampled_per_second']:.0f} |")
        floors.append(f"| {values['shape']} | " + " | ".join(f"{phases[p]:.1f} / {floor[p]:.1f} = {phases[p] / floor[p]:.2f}"
                                                             for p in PHASES)
                      + f" | {floor['matmul'] / 1e12:.0f} | {floor['read'] / 1e9:.0f} |")
    return lines + floors


def compiled_table(found: dict) -> list[str]:
    first = found["compiled"]["first_seconds"]
    return [*step_table(found), "", f"The first small step, in which torch.compile works: {first:.0f} s."]


def sampling_table(found: dict) -> list[str]:
    size = next(iter(found.values()))
    theirs = found.get("transformers", size)["tokens_per_second"]
    lines = [f"LLaMA-7B shapes, bf16, {size['rows']} rows of {size['prompt']} + {size['response']} tokens, prompts included:", "",
             "| | tokens / s | ms a token of all rows | over transformers | first call, s |", "| --- | --- | --- | --- | --- |"]
    for name, x in found.items():
        speed, first = x["tokens_per_second"], x["first_seconds"]
        lines.append(f"| {name} | {speed:.0f} | {x['ms_per_token']:.1f} | {speed / theirs:.2f} | {first:.1f} |")
    return lines


def profile_table(found: dict) -> list[str]:
    lines = ["| | launches | of them a layer | kernels, ms | from start to end, ms |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {name} | {x['launches']} | {x['launches'] / x['layers']:.1f} | {x['kernels_ms']:.1f} | {x['wall_ms']:.1f} |"
              for name, x in found.items()]
    for name, x in found.items():
        lines += ["", f"The ten heaviest of {name}:", "", "| kernel | times | ms |", "| --- | --- | --- |"]
        lines += [f"| `{each['name'].replace('|', ' ')}` | {each['count']} | {each['ms']:.2f} |" for each in x["heaviest"]]
    return lines


def miniature_table(found: dict) -> list[str]:
    x = found["miniature"]
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in x["phases"].items())
    lines = [f"`python train.py --estimator bregman`: {x['seconds']:.0f} s for {x['steps']} steps and two evaluations; {phases}.",
             *x["self_check"], "", "| | before | after |", "| --- | --- | --- |"]
    return lines + [f"| {name} | {x['before'][name]:.3f} | {value:.3f} |" for name, value in x["after"].items()]


TABLES = {"tests": tests_table, "step": step_table, "compiled": compiled_table, "sampling": sampling_table,
          "profile": profile_table, "small": step_table, "miniature": miniature_table}
