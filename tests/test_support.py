"""The tests' own tools: what folds errors must not lose one."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.errors import largest_error, worst

NAN, INF = math.nan, math.inf
TENSOR = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        (1.5, 1.0, 0.5),
        (TENSOR, TENSOR + 0.25, 0.25),
        ([TENSOR, TENSOR], [TENSOR, TENSOR - 3], 3.0),
        ({"a": 1.0, "b": [2.0]}, {"a": 1.0, "b": [4.0]}, 2.0),
        (torch.zeros(0, 3), torch.zeros(0, 3), 0.0),
        ([], [], 0.0),
        (TENSOR.bfloat16(), TENSOR.double(), 0.0),
        (torch.tensor([1 + 2j]), torch.tensor([1 - 1j]), 3.0),
        (NAN, 1.0, INF),
        (1.0, NAN, INF),
        (NAN, NAN, INF),
        (INF, INF, INF),
        (torch.tensor([0.0, NAN]), torch.zeros(2), INF),
        ([0.0, NAN, 0.0], [0.0, 0.0, 0.0], INF),
        ([NAN, 0.0], [0.0, 0.0], INF),
        (torch.zeros(2), torch.zeros(3), INF),
        (torch.zeros(3), torch.zeros(1, 3), INF),
        (torch.zeros(3), 0.0, INF),
        ([0.0], [0.0, 0.0], INF),
        ({"a": 0.0}, {"b": 0.0}, INF),
        (0.0, [0.0], INF),
    ],
)
def test_largest_error_is_infinite_for_what_is_no_number_or_of_another_shape(got: Any, want: Any, error: float) -> None:
    assert largest_error(got, want) == error


@pytest.mark.parametrize("errors", [[0.0, NAN], [NAN, 0.0], [NAN], [INF, 1.0]])
def test_worst_loses_no_nan(errors: list[float]) -> None:
    assert worst(errors) == INF
    assert worst([]) == 0.0


def folds(source: str) -> list[int]:
    """Lines that may hide NaN: `max` of absolute values, running maxima of anything but `largest_error`, and what is
    collected where it is above a bound.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if _is_max(node) and any(_is_abs(inner) for inner in ast.walk(node)):
            found.append(node.lineno)
        elif isinstance(node, ast.Assign) and _is_max(node.value):
            folded = {ast.unparse(value) for value in node.value.args}
            others = folded - {_target(node)}
            if others != folded and not all(text.startswith("largest_error(") for text in others):
                found.append(node.lineno)
        elif isinstance(node, ast.If) and _above(node.test):
            sides = {ast.unparse(node.test.left), ast.unparse(node.test.comparators[0])}
            sets = [line for line in node.body if isinstance(line, ast.Assign)]
            found += [node.lineno for line in sets if {_target(line), ast.unparse(line.value)} == sides]
        elif isinstance(node, ast.comprehension):
            tests = [test for test in node.ifs if _above(test)]
            found += [test.lineno for test in tests if ast.unparse(test.left) in ("error", "found", "worst")]
    return found


def _is_max(node: Any) -> bool:
    """Python's, not a tensor's, which keeps NaN."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "max"


def _is_abs(node: Any) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) == "abs"


def _target(node: ast.Assign) -> str:
    return ast.unparse(node.targets[0])


def _above(node: Any) -> bool:
    return isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Gt, ast.GtE, ast.Lt))


@pytest.mark.parametrize(
    ("form", "hides"),
    [
        ("max(0.0, abs(x))", True),
        ("max([w, *x.abs().tolist()])", True),
        ("max((a - b).abs().max() for a in c)", True),
        ("w = max(w, e)", True),
        ("w = max(e, w)", True),
        ("w[i] = max(w[i], e)", True),
        ("if e > w: w = e", True),
        ("if w < e: w = e", True),
        ("assert {k: error for k, error in r if error > 1e-12} == {}", True),
        ("max(1, 2)", False),
        ("w = max(w, largest_error(a, b))", False),
        ("assert {k: error for k, error in r if not error <= 1e-12} == {}", False),
    ],
)
def test_folds_sees_every_form(form: str, hides: bool) -> None:
    """Guards the walk itself."""
    assert bool(folds(form)) == hides


def test_no_test_folds_errors_by_max() -> None:
    """A rule that returned NaN passed the tables of refreshes, of GaLore's rules and of `install()`."""
    files = Path(__file__).parent.rglob("*.py")
    # The largest weight and the largest step, from which a bound follows: NaN there makes the bound fail.
    bounds = {"install_cases.py", "plugin_cases.py", "setup_distributed_cases.py"}
    assert {path.name: lines for path in files if (lines := folds(path.read_text()))}.keys() <= bounds
