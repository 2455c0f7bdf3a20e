"""BREAD's corrections: a cheap update of the weights outside of the active block ("landscape correction").

Source: "Accelerating Block Coordinate Descent for LLM Finetuning via Landscape Correction", openreview zs6bRl05g8.  A
gradient is used and freed as soon as backward has made it, so that no more than a few exist at any time.  n: values of
data on this rank.

A `GradientSource` (hooks on one process, the reducer of an engine) brings gradients; a `CorrectionState` updates the
weights by them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.correction.rules import Correction
from colossal_bcd.optim.options import Rounding, plain_number
from colossal_bcd.optim.state.filed import FiledTensor, filed_like
from colossal_bcd.optim.state.rounding import (
    CPU_CHUNK,
    DEVICE_CHUNK,
    LOW_PRECISION,
    random_bits,
    stochastic_round,
    stream,
)
from colossal_bcd.sharding import Layout, Mesh, wide
from colossal_bcd.sharding.dtensor import is_dtensor, local_values

CorrectionMode: TypeAlias = Literal["all", "partial", "disabled"]

logger = logging.getLogger(__name__)


class CorrectionState(ABC):
    """A rule with its state, applied to whole local weights.

    Args:
        rule: what is subtracted; its `repr` says which it is.
        mode: of `inactive`.
        lr_scaling: learning rate, as a multiple of that of the parameter's group.
        rounding: of bfloat16 and float16 weights.
        accumulation_steps: micro-batches per step.
        seed: of stochastic rounding.

    Attributes:
        num_steps: applied steps of the optimizer; counts the streams of stochastic rounding.
    """

    by_bucket = False
    """Whether the weights of a bucket of gradients are updated together, which saves collectives and time."""

    def __init__(
        self, rule: Any, *, mode: str, lr_scaling: float, rounding: Rounding, accumulation_steps: int, seed: int
    ) -> None:
        self.rule, self.mode, self.lr_scaling, self.rounding = rule, mode, lr_scaling, rounding
        self.accumulation_steps, self.seed = accumulation_steps, seed
        self.num_steps = 0
        self._groups: dict[Parameter, dict[str, Any]] = {}
        self._keys: dict[Parameter, int] = {}
        self._layouts: Mapping[Parameter, Layout] = {}
        self._announced = False

    def adopt(
        self, named: Mapping[str, Parameter], groups: Sequence[tuple[dict[str, Any], Sequence[Parameter]]]
    ) -> None:
        """Note each parameter's number, and the param group that has its learning rate; all are whole, or DTensors."""
        self._keys = {param: key for key, param in enumerate(named.values())}
        self._layouts = {param: Layout.whole(tuple(param.shape)) for param in named.values() if not is_dtensor(param)}
        for group, params in groups:
            self._groups.update(dict.fromkeys(params, group))

    def bind(self, layouts: Mapping[Parameter, Layout], mesh: Mesh) -> None:
        """Say which part of which parameter this rank's weights are, the same on data-parallel ranks."""
        self._layouts = layouts

    def identity(self) -> dict[str, Any]:
        """What says how inactive parameters are updated: plain numbers and strings."""
        return {
            "mode": self.mode,
            "rule": repr(self.rule),
            "lr_scaling": self.lr_scaling,
            "rounding": self.rounding,
            "accumulation_steps": self.accumulation_steps,
        }

    def wait(self, grad: Tensor, waiting: Tensor | None) -> Tensor:
        """A gradient that waits for the next micro-batch's, in bfloat16, added to what waits already."""
        if not self._announced:
            self._announced = True
            logger.info("corrections wait for the last micro-batch: 2 bytes more for every corrected parameter")
        return grad.to(torch.bfloat16) if waiting is None else waiting.add_(grad)

    @property
    @abstractmethod
    def state(self) -> Mapping[Parameter, dict[str, Any]]:
        """Tensors and numbers of every parameter that was corrected; they stay while it is active."""

    @abstractmethod
    def filed_of(self, param: Parameter) -> list[FiledTensor]:
        """Description of the tensors in a parameter's state on this rank."""

    def filed(self) -> Iterator[tuple[Parameter, dict[str, Any], list[FiledTensor]]]:
        """The state, which is the same on all data-parallel ranks: that of whole local weights; see `Contributor`."""
        for param, state in self.state.items():
            yield param, state, self.filed_of(param)

    def numbers(self) -> dict[str, Any]:
        """See `Contributor`."""
        return {"num_steps": self.num_steps}

    def load(self, numbers: Mapping[str, Any], saved: Iterable[Parameter]) -> None:
        """See `Contributor`."""
        self.num_steps = numbers["num_steps"]
        self.allocate(saved)

    @abstractmethod
    def num_bytes(self, param: Parameter, layout: Layout) -> int:
        """Bytes of a parameter's state on a rank that holds the part that the layout says."""

    @abstractmethod
    def allocate(self, params: Iterable[Parameter]) -> None:
        """Give exactly these parameters state as before their first update."""

    @abstractmethod
    def restore(self, state: Mapping[Parameter, Mapping[str, Any]]) -> None:
        """Take over copies of saved entries: tensors as this rank holds them, numbers."""

    @abstractmethod
    def apply(
        self, gradients: Mapping[Parameter, Tensor], *, loss_scale: float = 1.0, finite: Tensor | None = None
    ) -> None:
        """Update weights.

        Args:
            gradients: [numel] averages by parameter, padding included.
            loss_scale: factor in them that is to be undone.
            finite: scalar bool; where it is False nothing changes.
        """


class ElementwiseState(CorrectionState):
    """A `Correction`, in chunks, so that temporaries do not grow with the weight."""

    rule: Correction

    def __init__(self, rule: Correction, **options: Any) -> None:
        super().__init__(rule, **options)
        self._state: dict[Parameter, dict[str, Tensor]] = {}

    @property
    def state(self) -> Mapping[Parameter, dict[str, Tensor]]:
        return self._state

    def filed_of(self, param: Parameter) -> list[FiledTensor]:
        return [filed_like(name, tensor, self._layouts[param]) for name, tensor in self._state[param].items()]

    def num_bytes(self, param: Parameter, layout: Layout) -> int:
        return layout.num_local * sum(dtype.itemsize for dtype in self.rule.state.values())

    def allocate(self, params: Iterable[Parameter]) -> None:
        self._state = {param: self._new_state(param) for param in params}

    def restore(self, state: Mapping[Parameter, Mapping[str, Any]]) -> None:
        self._state = {
            param: {name: entry.to(param.device, copy=True) for name, entry in entries.items()}
            for param, entries in state.items()
        }

    @torch.no_grad()
    def apply(
        self, gradients: Mapping[Parameter, Tensor], *, loss_scale: float = 1.0, finite: Tensor | None = None
    ) -> None:
        for param, grad in gradients.items():
            self._apply(param, grad, loss_scale, finite)

    def _apply(self, param: Parameter, grad: Tensor, loss_scale: float, finite: Tensor | None) -> None:
        weight, layout = stored(param).contiguous(), self._layouts[param]
        values, n = weight.view(-1), layout.num_local
        if param not in self._state:
            self._state[param] = self._new_state(param)
        stochastic = self.rounding == "stochastic" and param.dtype in LOW_PRECISION
        numbers = stream(self.seed, self._keys[param], self.num_steps) if stochastic else None
        lr = self._groups[param]["lr"]
        # A rate on an accelerator is not waited for in the middle of backward.
        lr = (plain_number(lr) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else lr) * self.lr_scaling
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
        if not stored(param).is_contiguous():
            stored(param).copy_(weight)

    def _new_state(self, param: Parameter) -> dict[str, Tensor]:
        n = self._layouts[param].num_local
        return {name: torch.zeros(n, dtype=dtype, device=param.device) for name, dtype in self.rule.state.items()}

    def _direction(
        self, param: Parameter, grad: Tensor, part: slice, loss_scale: float, finite: Tensor | None
    ) -> Tensor:
        """[n of the part] the rule's direction, with its state updated."""
        dtype = wide(param.dtype)
        values = grad[part].to(dtype)
        if loss_scale != 1:
            values = values / loss_scale
        stored = {name: entry[part] for name, entry in self._state[param].items()}
        entries = {name: entry.to(dtype, copy=True) for name, entry in stored.items()}
        direction = self.rule.direction(values, entries)
        for name, entry in entries.items():
            stored[name].copy_(entry if finite is None else torch.where(finite, entry, stored[name]))
        # Not a product: what is not finite times zero is not zero.
        return direction if finite is None else torch.where(finite, direction, 0)


def stored(param: Parameter) -> Tensor:
    """The values of a weight on this rank, in a plain tensor."""
    # `data`: ColossalAI's own parameter classes have in-place operations that are not in place.
    return local_values(param) if is_dtensor(param) else param.data


class GradientSource(Protocol):
    """Who brings the gradients of inactive parameters to a `CorrectionState`."""

    def activate(self, params: Sequence[Parameter]) -> None:
        """Correct exactly these parameters from now on; gradients that wait are forgotten."""

    def settle(self) -> None:
        """Before a step: apply what waits for micro-batches that did not come."""

    def clear(self) -> None:
        """Forget gradients that wait."""


class LocalGradients:
    """Corrections from hooks in backward: of whole parameters on one process, or of this rank's part of a DTensor.

    With `accumulation_steps` above 1 gradients of the first micro-batches wait in bfloat16, 2 bytes per parameter, and
    the last micro-batch's makes the update, or the step if that comes before.
    """

    def __init__(self, correction: CorrectionState, names: Mapping[Parameter, str]) -> None:
        self._correction, self._names = correction, names
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
            self._correction.apply({param: grad.view(-1)})
        self._counts.clear()

    def clear(self) -> None:
        self._counts.clear()
        self._waiting.clear()

    def note_pass(self, params: Iterable[Parameter]) -> None:
        """Count a micro-batch whose gradients come together with the next one's."""
        for param in params:
            self._counts[param] = self._counts.get(param, 0) + 1

    @torch.no_grad()
    def _on_grad(self, param: Parameter) -> None:
        grad, param.grad = param.grad, None
        assert grad is not None
        grad = local_values(grad)
        if grad.layout != torch.strided:
            raise ValueError(
                f"parameter {self._names[param]!r} has a sparse gradient, expected a dense one. Build its embedding "
                "with sparse=False."
            )
        count = self._counts[param] = self._counts.get(param, 0) + 1
        require_open(count, self._correction.accumulation_steps, f"parameter {self._names[param]!r}")
        waiting = self._waiting.pop(param, None)
        if count < self._correction.accumulation_steps:
            self._waiting[param] = self._correction.wait(grad, waiting)
        else:
            total = grad if waiting is None else waiting.to(grad.dtype).add_(grad)
            self._correction.apply({param: total.reshape(-1)})


def require_open(count: int, accumulation_steps: int, subject: str) -> None:
    """Refuse a gradient that comes after the update: number `count` since the last step, above `accumulation_steps`."""
    if count > accumulation_steps:
        raise ValueError(
            f"sgd_mode: {subject} got gradient number {count} since the last step, expected {accumulation_steps}: "
            "corrections are made within backward, once per step. With gradient accumulation pass "
            f"accumulation_steps={count} or more to the BlockOptimizer; with reentrant gradient checkpointing of "
            "shared layers use use_reentrant=False."
        )
