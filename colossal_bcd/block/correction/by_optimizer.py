"""Corrections by an optimizer of this package: GaLore of rank k, Adafactor, and whatever else declares its state."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.correction.correction import CorrectionState, stored
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.options import Storage, plain_number
from colossal_bcd.optim.state.filed import FiledTensor, allocate, filed_tensors
from colossal_bcd.sharding import Layout, Mesh, wide


class OptimizerCorrection:
    """Correct with the rule of a `ShardedOptimizer`, such as `OptimizerCorrection(GaLoreSGD, rank=4, momentum=0.9)`.

    Its state is kept on every data-parallel rank, so that rules are worth it whose state is small; over tensor-parallel
    ranks it is sharded as under the optimizer itself.  A parameter's steps are those in which it was corrected.

    Args:
        optimizer: the class.
        options: its hyper-parameters, but for `lr`, which is that of the parameter's group times `sgd_lr_scaling`, and
            for `rounding` and `seed`, which the BlockOptimizer has.  Ranks are `clamp`ed to the sides of small matrices
            unless said otherwise.
    Raises:
        TypeError: it is not such a class, or has no such hyper-parameter.
        ValueError: an option is to be given elsewhere.
    """

    def __init__(self, optimizer: type[ShardedOptimizer[Any]], **options: Any) -> None:
        if not (isinstance(optimizer, type) and issubclass(optimizer, ShardedOptimizer)):
            raise TypeError(
                f"OptimizerCorrection: got {optimizer!r}, expected a class of colossal_bcd.optim, such as GaLoreSGD"
            )
        elsewhere = {"lr": "sgd_lr_scaling", "rounding": "correction_rounding", "seed": "seed"}
        for name in elsewhere.keys() & options.keys():
            raise ValueError(
                f"OptimizerCorrection: got {name}, expected it of the BlockOptimizer. Give that {elsewhere[name]}."
            )
        inspect.signature(optimizer).bind([], lr=0.0, **options)
        self.optimizer, self.options = optimizer, options

    def build(self, groups: Sequence[Sequence[Tensor]], rounding: str, seed: int) -> ShardedOptimizer[Any]:
        """The optimizer over these param groups.

        Raises:
            ValueError: an option is out of range.
        """
        options: dict[str, Any] = {**self.options, "lr": 0.0}
        if "clamp" in self.optimizer.hyper_keys():
            options.setdefault("clamp", True)
        if issubclass(self.optimizer.hyper_type, Storage):
            options.update(rounding=rounding, seed=seed)
        build: Any = self.optimizer
        made: ShardedOptimizer[Any] = build([{"params": list(params)} for params in groups], **options)
        return made

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in sorted(self.options.items()))
        return f"OptimizerCorrection({self.optimizer.__name__}{options})"


class OptimizerState(CorrectionState):
    """An `OptimizerCorrection`: its optimizer steps on every bucket of gradients."""

    rule: OptimizerCorrection
    by_bucket = True

    def adopt(
        self, named: Mapping[str, Parameter], groups: Sequence[tuple[dict[str, Any], Sequence[Parameter]]]
    ) -> None:
        super().adopt(named, groups)
        # Parameters may change their class (see `ElementwiseState`) and their data; these are always plain tensors.
        self._weights = {param: stored(param) for _, params in groups for param in params}
        made = self.rule.build([[self._weights[p] for p in params] for _, params in groups], self.rounding, self.seed)
        self._optimizer, self._sources = made, list(groups)
        self._group_of: dict[Parameter, dict[str, Any]] = {}
        self._bind(Mesh())

    def bind(self, layouts: Mapping[Parameter, Layout], mesh: Mesh) -> None:
        super().bind(layouts, mesh)
        self._bind(mesh)

    @property
    def state(self) -> Mapping[Parameter, dict[str, Any]]:
        state = self._optimizer.state
        return {param: state[weight] for param, weight in self._weights.items() if state.get(weight)}

    def filed_of(self, param: Parameter) -> list[FiledTensor]:
        return filed_tensors(self._optimizer, self._weights[param], self._layouts[param], self._group_of[param])

    def num_bytes(self, param: Parameter, layout: Layout) -> int:
        specs = self._optimizer.state_spec(layout, self._optimizer.hyper_of(self._group_of[param]))
        return sum(spec.num_bytes(param.dtype) for spec in specs.values())

    def allocate(self, params: Iterable[Parameter]) -> None:
        self._optimizer.state.clear()
        for param in params:
            allocate(self._optimizer, self._weights[param], self._layouts[param], self._group_of[param])

    def restore(self, state: Mapping[Parameter, Mapping[str, Any]]) -> None:
        self._optimizer.state.clear()
        for param, entries in state.items():
            self._optimizer.state[self._weights[param]] = {
                name: entry.to(param.device, copy=True) if isinstance(entry, Tensor) else entry
                for name, entry in entries.items()
            }

    @torch.no_grad()
    def apply(
        self, gradients: Mapping[Parameter, Tensor], *, loss_scale: float = 1.0, finite: Tensor | None = None
    ) -> None:
        # Steps are counted on the host, so that it must know; this is under loss scaling only.
        if finite is not None and not finite.item():
            return
        for (source, _), group in zip(self._sources, self._optimizer.param_groups, strict=True):
            group["lr"] = plain_number(source["lr"]) * self.lr_scaling
            if self.rounding == "stochastic":
                group["num_steps"] = self.num_steps
        handed = {}
        for param, grad in gradients.items():
            weight = self._weights[param]
            weight.data = self._part(param)
            grad = grad.view(weight.shape)
            handed[weight] = grad if loss_scale == 1 else grad.to(wide(grad.dtype)) / loss_scale
        self._optimizer.step_on(handed)

    def _bind(self, mesh: Mesh) -> None:
        held = {param: weight for param, weight in self._weights.items() if param in self._layouts}
        for (_, params), group in zip(self._sources, self._optimizer.param_groups, strict=True):
            group["params"] = [held[param] for param in params if param in held]
            self._group_of.update(dict.fromkeys(params, group))
        for param, weight in held.items():
            weight.data = self._part(param)
        layouts = {weight: self._layouts[param] for param, weight in held.items()}
        self._optimizer.bind(layouts, mesh, {weight: self._keys[param] for param, weight in held.items()})

    def _part(self, param: Parameter) -> Tensor:
        """The weight as the optimizer takes it: a slice is flat."""
        values = stored(param)
        return values if self._layouts[param].slice is None else values.view(-1)
