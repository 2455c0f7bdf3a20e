"""Learning rates that grow to their value after a switch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch.optim import Optimizer


def require_rates(base_optimizer: Optimizer, option: str) -> None:
    """Refuse a base optimizer with a param group that has no learning rate, where rates are to be multiplied."""
    for index, group in enumerate(base_optimizer.param_groups):
        if group.get("lr") is None:
            raise ValueError(
                f"{option}: got a base optimizer whose param group {index} has lr=None, expected a number, which is "
                f"multiplied. Give the {type(base_optimizer).__name__} an lr."
            )


def warm_up(num_steps: int, period: int, num_warm: int) -> float:
    """Factor of the learning rate in the step that follows `num_steps` applied ones.

    The first `num_warm` steps of a run have factor 1; after every switch the factor grows linearly to 1 over as many.
    """
    return 1.0 if num_steps < num_warm else min(1.0, (num_steps % period + 1) / max(num_warm, 1))


@contextlib.contextmanager
def scaled_rates(groups: Sequence[dict[str, Any]], factor: float) -> Iterator[None]:
    """Param groups with learning rates times `factor`; schedulers see the old ones afterwards."""
    if factor == 1:
        yield
        return
    rates = [group["lr"] for group in groups]
    try:
        for group in groups:
            group["lr"] = group["lr"] * factor
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
