"""BREAD's corrections: a cheap update of the weights outside of the active block ("landscape correction").

Source: "Accelerating Block Coordinate Descent for LLM Finetuning via Landscape Correction", openreview zs6bRl05g8.  A
gradient is used and freed as soon as backward has made it, so that no more than a few exist at any time.
n: values of data on this rank.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.checks import require_choice, require_int
from colossal_bcd.block.rules import Correction, SgdCorrection, SignCorrection
from colossal_bcd.optim.rounding import (
    CPU_CHUNK,
    DEVICE_CHUNK,
    LOW_PRECISION,
    Rounding,
    random_bits,
    stochastic_round,
    stream,
)
from colossal_bcd.sharding import Layout, wide

logger = logging.getLogger(__name__)

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
    correction: Correction | None = None
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
        if self.correction is not None and not callable(getattr(self.correction, "direction", None)):
            raise TypeError(
                f"correction: got a {type(self.correction).__name__}, expected a Correction, such as LionCorrection()"
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

    def corrector(self) -> Corrector | None:
        """What these arguments ask for; None for nothing."""
        if self.sgd_mode == "disabled":
            return None
        return Corrector(self.correction or (SignCorrection() if self.sgd_use_sign else SgdCorrection()), self)


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


class Corrector:
    """A rule with its state, applied to whole local weights.

    Args:
        rule: what is subtracted.
        options: where, how strongly, and how it is rounded.

    Attributes:
        state: entries of each parameter, flat and in their storage dtype; they stay while the parameter is active.
        num_steps: applied steps of the optimizer; counts the streams of stochastic rounding.
    """

    def __init__(self, rule: Correction, options: CorrectionOptions) -> None:
        self.rule, self.options = rule, options
        self.state: dict[Parameter, dict[str, Tensor]] = {}
        self.num_steps = 0
        self._groups: dict[Parameter, dict[str, Any]] = {}
        self._keys: dict[Parameter, int] = {}
        self._announced = False

    def adopt(
        self, named: Mapping[str, Parameter], groups: Sequence[tuple[dict[str, Any], Sequence[Parameter]]]
    ) -> None:
        """Note each parameter's number and the param group that has its learning rate."""
        self._keys = {param: key for key, param in enumerate(named.values())}
        for group, params in groups:
            self._groups.update(dict.fromkeys(params, group))

    def identity(self) -> dict[str, Any]:
        """What says how inactive parameters are updated: plain numbers and strings."""
        options = self.options
        return {
            "mode": options.sgd_mode,
            "rule": repr(self.rule),
            "lr_scaling": options.sgd_lr_scaling,
            "rounding": options.correction_rounding,
            "accumulation_steps": options.accumulation_steps,
        }

    def wait(self, grad: Tensor, waiting: Tensor | None) -> Tensor:
        """A gradient that waits for the next micro-batch's, in bfloat16, added to what waits already."""
        if not self._announced:
            self._announced = True
            logger.info("corrections wait for the last micro-batch: 2 bytes more for every corrected parameter")
        return grad.to(torch.bfloat16) if waiting is None else waiting.add_(grad)

    def load(self, named: Mapping[str, Parameter], state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over copies of saved entries by canonical name."""
        self.state = {
            named[name]: {key: entry.to(named[name].device, copy=True) for key, entry in entries.items()}
            for name, entries in state.items()
        }

    @torch.no_grad()
    def apply(
        self, param: Parameter, grad: Tensor, layout: Layout, *, loss_scale: float = 1.0, finite: Tensor | None = None
    ) -> None:
        """Update one weight, in chunks, so that temporaries do not grow with it.

        Args:
            param: written; the whole local weight.
            grad: [numel] averaged gradient, padding included.
            layout: of the weight on this rank; stochastic rounding draws by the global place.
            loss_scale: factor in the gradient that is to be undone.
            finite: scalar bool; where it is False nothing changes.
        """
        # `data`: ColossalAI's own parameter classes have in-place operations that are not in place.
        weight = param.data.contiguous()
        values, n = weight.view(-1), layout.num_local
        if param not in self.state:
            entries = self.rule.state.items()
            self.state[param] = {name: values.new_zeros(n, dtype=dtype) for name, dtype in entries}
        stochastic = self.options.correction_rounding == "stochastic" and param.dtype in LOW_PRECISION
        numbers = stream(self.options.seed, self._keys[param], self.num_steps) if stochastic else None
        lr = self._groups[param]["lr"] * self.options.sgd_lr_scaling
        size = CPU_CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            new = values[part].to(wide(param.dtype))
            direction = self._direction(param, grad, part, loss_scale, finite)
            new = new.sub(direction * lr) if isinstance(lr, Tensor) else new.add_(direction, alpha=-lr)
            if numbers is not None:
                bits = random_bits(layout.positions(part.start, part.stop, weight.device), numbers)
                new = stochastic_round(new, bits, param.dtype)
            values[part] = new
        if not param.data.is_contiguous():
            param.data.copy_(weight)

    def _direction(
        self, param: Parameter, grad: Tensor, part: slice, loss_scale: float, finite: Tensor | None
    ) -> Tensor:
        """[n of the part] the rule's direction, with its state updated."""
        dtype = wide(param.dtype)
        values = grad[part].to(dtype)
        if loss_scale != 1:
            values = values / loss_scale
        stored = {name: entry[part] for name, entry in self.state[param].items()}
        entries = {name: entry.to(dtype, copy=True) for name, entry in stored.items()}
        direction = self.rule.direction(values, entries)
        for name, entry in entries.items():
            stored[name].copy_(entry if finite is None else torch.where(finite, entry, stored[name]))
        # Not a product: what is not finite times zero is not zero.
        return direction if finite is None else torch.where(finite, direction, 0)


class Corrections(Protocol):
    """Who brings gradients to the corrector."""

    def activate(self, params: Sequence[Parameter]) -> None:
        """Correct exactly these parameters from now on; gradients that wait are forgotten."""

    def settle(self) -> None:
        """Before a step: apply what waits for micro-batches that did not come."""

    def clear(self) -> None:
        """Forget gradients that wait."""


class LocalCorrections:
    """Corrections of whole parameters on one process, from hooks in backward.

    With `accumulation_steps` above 1 gradients of the first micro-batches wait in bfloat16, 2 bytes per parameter, and
    the last micro-batch's makes the update, or the step if that comes before.
    """

    def __init__(self, corrector: Corrector, names: Mapping[Parameter, str]) -> None:
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
            self._corrector.apply(param, grad.view(-1), Layout.whole(tuple(param.shape)))
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
        require_open(count, self._corrector.options.accumulation_steps, f"parameter {self._names[param]!r}")
        waiting = self._waiting.pop(param, None)
        if count < self._corrector.options.accumulation_steps:
            self._waiting[param] = self._corrector.wait(grad, waiting)
        else:
            total = grad if waiting is None else waiting.to(grad.dtype).add_(grad)
            self._corrector.apply(param, total.reshape(-1), Layout.whole(tuple(param.shape)))


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
