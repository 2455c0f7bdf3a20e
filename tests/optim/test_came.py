"""CAME against came_pytorch.CAME itself, and its refusals; on meshes it is tested together with Adafactor."""

from __future__ import annotations

import json
from typing import Any

import factored_cases
import pytest
import torch
from test_adafactor import TOLERANCE

from colossal_bcd import CAME


@pytest.mark.parametrize("options", factored_cases.OPTIONS["CAME"], ids=json.dumps)
def test_came_equals_came_pytorch(options: dict[str, Any]) -> None:
    assert factored_cases.on_one_process("CAME", options) <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": None}, "lr: got None, expected a non-negative number"),
        ({"lr": -1e-3}, "lr: got -0.001"),
        ({"lr": 1e-3, "eps": (1e-30, -1e-16)}, "eps: got .*expected two non-negative numbers"),
        ({"lr": 1e-3, "betas": (0.9, 0.999)}, "betas: got .*expected three numbers"),
        ({"lr": 1e-3, "betas": (0.9, 0.999, 1.0)}, "betas: got .*expected three numbers"),
        ({"lr": 1e-3, "clip_threshold": 0.0}, "clip_threshold: got 0.0"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay: got -0.1"),
        ({"lr": 1e-3, "min_dim_size_to_factor": -1}, "min_dim_size_to_factor: got -1"),
    ],
)
def test_came_refuses(options: dict[str, Any], message: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=message):
        CAME([weight], **options)
    with pytest.raises(ValueError, match=message):
        CAME([{"params": [weight], **options}], lr=1e-3)
