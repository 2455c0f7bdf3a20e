"""Corrections of BREAD that tests name, and that `plain_bread` knows, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from colossal_bcd import GaLoreSGD
from colossal_bcd.block import LionCorrection, MomentumCorrection, OptimizerCorrection, SignCorrection
from colossal_bcd.optim import ShardedOptimizer


@dataclass(frozen=True)
class DescentHyper:
    lr: float


class Descent(ShardedOptimizer[DescentHyper]):
    """Gradient descent, as an optimizer that corrects."""

    hyper_type = DescentHyper
    temporary_bytes = 0

    def state_spec(self, layout: Any, hyper: DescentHyper) -> dict[str, Any]:
        return {}

    def update(self, view: Any, state: Any, hyper: DescentHyper) -> Any:
        view.param.add_(view.grad, alpha=-hyper.lr)
        yield from ()


RULES: dict[str, Any] = {
    "sgd": None,
    "sign": SignCorrection(),
    "momentum": MomentumCorrection(),
    "lion": LionCorrection(),
    "descent": OptimizerCorrection(Descent),
    "galore": OptimizerCorrection(GaLoreSGD, rank=2, update_proj_gap=3, scale=0.7, momentum=0.5),
}
