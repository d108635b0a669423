"""The house that README.md draws: who may import whom, no circle, no file or function that outgrows a reader.

Read from the source alone (ast); imports inside functions count.
"""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

LIBRARY = {"divergences", "ppo", "lora", "model", "reward", "data"}
PROGRAMS = {"sft", "train", "evaluate"}
FORMATS, TRAINING, EVALUATION, TINY = ({path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                                        for path in (ROOT / folder).glob("*.py")} - {f"{folder}.__init__"}
                                       for folder in ("formats", "training", "evaluation", "tiny"))
MAY_IMPORT = (  # of each storey: what of ours it may import
    {name: FORMATS for name in FORMATS}
    | {name: LIBRARY | FORMATS for name in LIBRARY}
    # its program, not the library: what it shares with sft.py's
    | {"reward": LIBRARY | FORMATS | {"training.stages", "training.calibrate"}}
    | {name: TRAINING | LIBRARY | FORMATS for name in TRAINING}
    | {name: EVALUATION | TRAINING | LIBRARY | FORMATS | {"tiny.annotators"} for name in EVALUATION}
    | {name: EVALUATION | TRAINING | LIBRARY | FORMATS | {"tiny.annotators"} for name in PROGRAMS}
    | {name: TINY | LIBRARY for name in TINY} | {"tiny.make": TINY | LIBRARY | FORMATS | TRAINING | EVALUATION | PROGRAMS})
# Lines, a little above what a file needs today: whoever wants more says why, in the same change.
BUDGET = {"divergences": 165, "ppo": 765, "lora": 630, "model": 730, "reward": 836, "data": 415, "sft": 235, "train": 330,
          "evaluate": 450, "formats.tokenizer": 398, "formats.tensors": 255, "evaluation.judges": 460, "evaluation.endpoint": 275,
          "evaluation.measure": 372, "evaluation.figures": 250, "evaluation.results": 275,
          "training.models": 308, "training.folder": 290, "training.config": 283,
          "training.stages": 345, "training.ranks": 245, "training.decode": 275}
USUAL = 235
# A public name whose callers rely on every parameter.
LONG_SIGNATURES = {"model.generate"}


def source(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def tree(module: str) -> ast.Module:
    return ast.parse(source(module).read_text(encoding="utf-8"))


def imports(module: str, node: ast.AST | None = None) -> set[str]:
    """Modules of ours that a module imports, anywhere in it."""
    named = set()
    for statement in ast.walk(node or tree(module)):
        if isinstance(statement, ast.Import):
            named |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            named |= {statement.module} | {f"{statement.module}.{alias.name}" for alias in statement.names}
    return named & MAY_IMPORT.keys()


def test_the_readme_names_every_file_of_the_house():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [module for module in MAY_IMPORT if not module.startswith("tiny.") and source(module).name not in readme] == []


def test_nine_files_stand_on_top_and_three_folders_below():
    assert {path.stem for path in ROOT.glob("*.py")} == LIBRARY | PROGRAMS
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"formats", "training", "evaluation", "tiny"}
    assert not list(ROOT.glob("*/utils.py"))  # no deeper: the environment may lie in .venv


@pytest.mark.parametrize("module", sorted(MAY_IMPORT))
def test_a_file_imports_what_stands_below_it(module):
    assert imports(module) <= MAY_IMPORT[module]


def test_no_circle():
    left = {module: imports(module) - {module} for module in MAY_IMPORT}
    left["reward"] = left["reward"] - {"training.calibrate"}  # a command of its program, which stands above all of the library
    while free := {module for module, needs in left.items() if not needs & left.keys()}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("module", sorted(LIBRARY))
def test_a_library_file_imports_nothing_of_ours_at_import_time(module):
    top = [statement for statement in tree(module).body if isinstance(statement, (ast.Import, ast.ImportFrom))]
    assert not imports(module, ast.Module(top, []))


@pytest.mark.parametrize("module", sorted(MAY_IMPORT))
def test_a_file_is_within_its_budget_has_a_licence_and_says_what_it_is_for(module):
    text = source(module).read_text(encoding="utf-8")
    assert text.count("\n") <= BUDGET.get(module, USUAL if not module.startswith("tiny.") else 500)
    assert len(ast.get_docstring(tree(module)) or "") > 60
    assert module.startswith("tiny.") or text.startswith("# SPDX-License-Identifier: MIT\n")


def functions(module: str):
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize("module", sorted(MAY_IMPORT))
def test_a_function_is_short_and_takes_few_parameters(module):
    for function in functions(module):
        lines = function.end_lineno - function.lineno + 1
        parameters = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
                      if a.arg not in ("self", "cls", "ctx")]
        where = f"{module}.{function.name}"
        assert lines <= 70, f"{where} has {lines} lines"
        assert len(parameters) <= 8 or where in LONG_SIGNATURES, f"{where} takes {len(parameters)} parameters"


def first_line(module: str, pattern: str) -> int:
    """Number of the first line that matches."""
    lines = source(module).read_text(encoding="utf-8").splitlines()
    return next(i for i, line in enumerate(lines, start=1) if re.match(pattern, line))


def test_the_algorithm_stands_before_the_bookkeeping():
    """A reader meets the equations first, in the order in which they run, and the packing last."""
    order = [first_line("ppo", rf"def {name}\(") for name in ("collect", "shape_rewards", "gae", "update", "policy_loss")]
    assert order == sorted(order) and order[1] < 225 and order[-1] < 330
    assert first_line("ppo", "class Packed") > first_line("ppo", r"def policy_loss\(")
    assert first_line("lora", r"class LoRALinear\(") < first_line("lora", r"class LowRank\(") < 140
    assert first_line("lora", r".*# Eq\. 1") < 120
    assert first_line("train", 'POLICY_DEVICE = "cuda:0"') < first_line("train", r"def train\(") < 60
