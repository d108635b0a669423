"""Every measured figure of the README and of docs/ stands in a file of bench/results/ or in tiny/report.json."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r"\d[\d,]*(?:\.\d+)?"
UNITS = r"%|s|ms|min|MiB|GiB|points|nats|tokens|kills|runs|mutations|calls|pairs|steps|answers|instructions|pieces"
SECTIONS = r"(?:section|sections|version) \d\.\d|\(\d\.\d\)"
NOT_MEASURED = {  # AlpacaFarm's and AlpacaEval's sizes; settings of ours, of the paper and of its release
    "805", "0.1", "0.5", "0.02", "10", "25", "128", "180", "300", "512", "781", "2,560", "20,000"}


def figures(text: str) -> set[str]:
    """Numbers with a decimal point or in front of a unit; what stands in code, links and section numbers is no figure."""
    text = re.sub(r"^    .*$|`[^`]*`|\]\([^)]*\)|" + SECTIONS, " ", text, flags=re.MULTILINE)
    text = re.sub(r"^## A class path.*?(?=^.Three sittings)", " ", text, flags=re.MULTILINE | re.DOTALL)  # test_readme.py's
    return set(re.findall(rf"(?<![\w.,])(?:{NUMBER}(?= (?:{UNITS})\b| %)|\d[\d,]*\.\d+)(?![\w.]*\d)", text))


def recorded() -> set[str]:
    """All numbers of the results files as they are written there, and those of the report rounded to up to three digits."""
    found: set[str] = set()
    for file in (ROOT / "bench" / "results").rglob("*.md"):
        found.update(re.findall(NUMBER, file.read_text(encoding="utf-8")))

    def walk(value) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)
        else:
            found.update(f"{scaled:,.{digits}f}" for scaled in (value, 100 * value) for digits in range(4))

    walk(json.loads((ROOT / "tiny" / "report.json").read_text(encoding="utf-8")))
    return found


def test_a_figure_is_told_from_code_links_and_sections():
    text = "It takes 3.5 s and 40 % of 2 cores (2.1), section 3.1, `0.77` and [a](b/1.25.md) 1,000 steps.\n    code 9.99\n"
    assert figures(text) == {"3.5", "40", "1,000"}


@pytest.mark.parametrize("page", ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))])
def test_every_figure_has_a_results_file(page):
    missing = figures((ROOT / page).read_text(encoding="utf-8")) - recorded() - NOT_MEASURED
    assert not missing, f"{page}: in no file of bench/results/: {sorted(missing)}"


@pytest.mark.parametrize("file", sorted((ROOT / "bench" / "results").glob("*.md")), ids=lambda file: file.name)
def test_a_results_file_names_its_command_and_its_machine(file):
    text = file.read_text(encoding="utf-8")
    assert re.search(r"python (\w+/)?\w+\.py", text) and re.search(r"\bcores\b", text), file.name
    assert re.search(r"20\d\d-\d\d-\d\d", text) and re.search(r"ommit [0-9a-f]{7}|commit of this file", text), file.name
