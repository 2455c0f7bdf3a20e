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
    """Lines on which Python's `max` meets absolute values, which hides NaN."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "max":
            calls = [inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call)]
            if any(getattr(call, "attr", getattr(call, "id", None)) == "abs" for call in calls):
                found.append(node.lineno)
    return found


def test_folds_sees_every_form() -> None:
    """Guards the walk itself."""
    forms = ["max(0.0, abs(x))", "max([w, *x.abs().tolist()])", "max((a - b).abs().max() for a in c)", "max(1, 2)"]
    assert [bool(folds(form)) for form in forms] == [True, True, True, False]


def test_no_test_folds_errors_by_max() -> None:
    """A rule that returned NaN passed the tables of refreshes, of GaLore's rules and of `install()`."""
    files = Path(__file__).parent.rglob("*.py")
    # The largest weight and the largest step, from which a bound follows: NaN there makes the bound fail.
    bounds = {"install_cases.py", "plugin_cases.py", "setup_distributed_cases.py"}
    assert {path.name: lines for path in files if (lines := folds(path.read_text()))}.keys() <= bounds
