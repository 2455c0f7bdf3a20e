"""BREAD's corrections: a cheap update of the weights outside of the active block ("landscape correction").

Source: "Accelerating Block Coordinate Descent for LLM Finetuning via Landscape Correction", openreview zs6bRl05g8.  A
gradient is used and freed as soon as backward has made it, so that no more than a few exist at any time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.checks import require_choice, require_int
from colossal_bcd.block.correction.by_optimizer import OptimizerCorrection, OptimizerState
from colossal_bcd.block.correction.rules import Correction, SgdCorrection, SignCorrection
from colossal_bcd.block.correction.state import CorrectionState, ElementwiseState
from colossal_bcd.optim.state.rounding import Rounding

CorrectionMode: TypeAlias = Literal["all", "partial", "disabled"]


@dataclass(frozen=True, kw_only=True)
class CorrectionOptions:
    """Arguments of a BlockOptimizer that say how inactive blocks are corrected.

    Raises:
        TypeError, ValueError: one is wrong, or would be ignored.
    """

    sgd_mode: CorrectionMode = "disabled"
    sgd_lr_scaling: float = 1.0
    sgd_use_sign: bool = False
    correction: Correction | OptimizerCorrection | None = None
    correction_rounding: Rounding = "nearest"
    accumulation_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("sgd_mode", self.sgd_mode, ("disabled", "all", "partial"))
        require_choice("correction_rounding", self.correction_rounding, ("nearest", "stochastic"))
        require_int("accumulation_steps", self.accumulation_steps, 1)
        scaling = self.sgd_lr_scaling
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not 0 <= scaling < float("inf"):
            raise ValueError(f"sgd_lr_scaling: got {scaling!r}, expected a non-negative number")
        elementwise = callable(getattr(self.correction, "direction", None))
        if self.correction is not None and not elementwise and not isinstance(self.correction, OptimizerCorrection):
            raise TypeError(
                f"correction: got a {type(self.correction).__name__}, expected a Correction, such as LionCorrection(), "
                "or an OptimizerCorrection"
            )
        if self.sgd_mode == "disabled":
            given = {"sgd_use_sign": self.sgd_use_sign, "correction": self.correction is not None}
            given["correction_rounding"] = self.correction_rounding != "nearest"
            ignored = [name for name, is_given in given.items() if is_given]
            if ignored:
                raise ValueError(
                    f"{ignored[0]}: got it with sgd_mode='disabled', which corrects nothing. Set sgd_mode to 'all' or "
                    "'partial', or leave it out."
                )
            if scaling != 1:
                warnings.warn(
                    f"sgd_lr_scaling={scaling} has no effect with sgd_mode='disabled', which corrects nothing. Set "
                    "sgd_mode to 'all' or 'partial'.",
                    stacklevel=4,
                )
        if self.correction is not None and self.sgd_use_sign:
            raise ValueError("sgd_use_sign: got True and a correction, expected one of the two")

    def corrector(self) -> CorrectionState | None:
        """What these arguments ask for; None for nothing."""
        if self.sgd_mode == "disabled":
            return None
        said: dict[str, Any] = {
            "mode": self.sgd_mode,
            "lr_scaling": self.sgd_lr_scaling,
            "rounding": self.correction_rounding,
            "accumulation_steps": self.accumulation_steps,
            "seed": self.seed,
        }
        if isinstance(self.correction, OptimizerCorrection):
            return OptimizerState(self.correction, **said)
        rule = self.correction or (SignCorrection() if self.sgd_use_sign else SgdCorrection())
        return ElementwiseState(rule, **said)


def inactive(names: Sequence[str], active: Iterable[str], mode: CorrectionMode) -> list[str]:
    """Names that are corrected while `active` train.

    Args:
        names: trainable parameters in model order.
        active: those that the base optimizer trains.
        mode: "all" others; "partial": those after the first active one, whose gradient costs little more.
    """
    held = set(active)
    first = next((index for index, name in enumerate(names) if name in held), 0) if mode == "partial" else 0
    return [name for name in names[first:] if name not in held]


class GradientSource(Protocol):
    """Who brings gradients to the corrector."""

    def activate(self, params: Sequence[Parameter]) -> None:
        """Correct exactly these parameters from now on; gradients that wait are forgotten."""

    def settle(self) -> None:
        """Before a step: apply what waits for micro-batches that did not come."""

    def clear(self) -> None:
        """Forget gradients that wait."""


class LocalGradients:
    """Corrections of whole parameters on one process, from hooks in backward.

    With `accumulation_steps` above 1 gradients of the first micro-batches wait in bfloat16, 2 bytes per parameter, and
    the last micro-batch's makes the update, or the step if that comes before.
    """

    def __init__(self, corrector: CorrectionState, names: Mapping[Parameter, str]) -> None:
        self._corrector, self._names = corrector, names
        self._handles: list[Any] = []
        self._counts: dict[Parameter, int] = {}
        self._waiting: dict[Parameter, Tensor] = {}

    def activate(self, params: Sequence[Parameter]) -> None:
        for handle in self._handles:
            handle.remove()
        self.clear()
        self._handles = [param.register_post_accumulate_grad_hook(self._on_grad) for param in params]

    def settle(self) -> None:
        for param in list(self._waiting):
            grad = self._waiting.pop(param)
            self._corrector.apply({param: grad.view(-1)})
        self._counts.clear()

    def clear(self) -> None:
        self._counts.clear()
        self._waiting.clear()

    @torch.no_grad()
    def _on_grad(self, param: Parameter) -> None:
        grad, param.grad = param.grad, None
        assert grad is not None
        if grad.layout != torch.strided:
            raise ValueError(
                f"parameter {self._names[param]!r} has a sparse gradient, expected a dense one. Build its embedding "
                "with sparse=False."
            )
        count = self._counts[param] = self._counts.get(param, 0) + 1
        require_open(count, self._corrector.accumulation_steps, f"parameter {self._names[param]!r}")
        waiting = self._waiting.pop(param, None)
        if count < self._corrector.accumulation_steps:
            self._waiting[param] = self._corrector.wait(grad, waiting)
        else:
            total = grad if waiting is None else waiting.to(grad.dtype).add_(grad)
            self._corrector.apply({param: total.reshape(-1)})


def require_open(count: int, accumulation_steps: int, subject: str) -> None:
    """Refuse a gradient that comes after the update.

    Raises:
        ValueError: it is number `count` since the last step, above `accumulation_steps`.
    """
    if count > accumulation_steps:
        raise ValueError(
            f"sgd_mode: {subject} got gradient number {count} since the last step, expected {accumulation_steps}: "
            "corrections are made within backward, once per step. With gradient accumulation pass "
            f"accumulation_steps={count} or more to the BlockOptimizer; with reentrant gradient checkpointing of "
            "shared layers use use_reentrant=False."
        )
