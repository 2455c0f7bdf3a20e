"""ShardedOptimizer: one rule per parameter, run on whatever part of the parameters this rank holds."""

from __future__ import annotations

import dataclasses
import difflib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.optim.spec import StateSpec
from colossal_bcd.sharding import WAVE_BYTES, Layout, Mesh, Rounds, ShardView, Task, run_rounds

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]
Hyper: TypeAlias = Any
"""Frozen dataclass of an optimizer's hyper-parameters; its fields are the keys of a param group."""
State: TypeAlias = dict[str, Any]
"""What a rule sees: elementwise entries as [n] views of the data, `step` as the number of this update, from 1."""


class ShardedOptimizer(Optimizer):
    """Base of the optimizers of this package.

    Constructed like any `torch.optim.Optimizer`, it trains whole tensors on one process.  `bind` tells it which part of
    which parameter its tensors are; the same rule then runs on the parts.

    Args:
        params: parameters, or param groups as plain dicts.
        hyper: defaults of every group.
        wave_bytes: budget for temporaries of rules that communicate, in bytes; the same on every rank.
    """

    hyper_type: ClassVar[type]
    temporary_bytes: ClassVar[int]
    """Bytes per stored value that the rule keeps alive between rounds."""

    def __init__(self, params: Params, hyper: Hyper, wave_bytes: int = WAVE_BYTES) -> None:
        self._layouts: dict[Tensor, Layout] = {}
        self._mesh = Mesh()
        self.wave_bytes = wave_bytes
        super().__init__(params, dataclasses.asdict(hyper))

    @abstractmethod
    def state_spec(self, layout: Layout, hyper: Hyper) -> dict[str, StateSpec]:
        """Declare the state of one parameter; `step` is always there and need not be named."""

    @abstractmethod
    def update(self, view: ShardView, state: State, hyper: Hyper) -> Rounds:
        """The rule: one step of one parameter."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        fields = [field.name for field in dataclasses.fields(self.hyper_type)]
        for key in param_group:
            close = difflib.get_close_matches(key, fields, n=1, cutoff=0.8)
            if key not in fields and close:
                raise ValueError(
                    f"{type(self).__name__} param group has {key!r}, which is no hyper-parameter; did you mean "
                    f"{close[0]!r}? The hyper-parameters are {', '.join(fields)}."
                )
        super().add_param_group(param_group)
        self._hyper(self.param_groups[-1])
        for param in self.param_groups[-1]["params"]:
            self._layouts[param] = Layout.whole(tuple(param.shape))

    def bind(self, layouts: Mapping[Tensor, Layout], mesh: Mesh) -> None:
        """Say which part of which parameter each tensor of the param groups is.

        State of tensors that are no longer in a group is dropped; state of the others is kept.

        Args:
            layouts: one layout for every tensor in the param groups; the tensor has its `local_shape`.
            mesh: a group for every axis that the layouts name.
        Raises:
            ValueError: a tensor has no layout, or another shape than its layout, or an axis is not in the mesh.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in enumerate(params):
            if param not in layouts:
                raise ValueError(f"bind: parameter {index} of shape {tuple(param.shape)} has no layout")
            self._check(index, param, layouts[param])
            mesh.communicates(layouts[param].axes)
        self._layouts = {param: layouts[param] for param in params}
        self._mesh = mesh
        for param in [param for param in self.state if param not in self._layouts]:
            del self.state[param]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = self._closure_loss(closure)
        tasks = (self._task(param, group, hyper) for param, group, hyper in self._active())
        run_rounds(tasks, self._mesh, self.wave_bytes)
        return loss

    def _closure_loss(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _active(self) -> list[tuple[Tensor, Layout, Hyper]]:
        """Parameters with a gradient, checked before the first collective."""
        active, index = [], -1
        for group in self.param_groups:
            hyper = self._hyper(group)
            for param in group["params"]:
                index += 1
                if param.grad is None:
                    continue
                if param not in self._layouts:
                    raise ValueError(
                        f"{type(self).__name__}: parameter {index} of shape {tuple(param.shape)} was put into the "
                        "param groups by another library without a layout, so this optimizer cannot know which part "
                        "of which tensor it is. Use the plugins of colossal_bcd.booster, or call bind(layouts, mesh)."
                    )
                self._check(index, param, self._layouts[param])
                if param.grad.is_sparse:
                    raise ValueError(
                        f"{type(self).__name__}: parameter {index} of shape {tuple(param.shape)} has a sparse "
                        "gradient, expected a dense one. Build its embedding with sparse=False."
                    )
                active.append((param, self._layouts[param], hyper))
        return active

    def _check(self, index: int, param: Tensor, layout: Layout) -> None:
        if tuple(param.shape) != layout.local_shape:
            raise ValueError(
                f"{type(self).__name__}: parameter {index} has shape {tuple(param.shape)}, but its layout says "
                f"{layout.local_shape} (part of {layout.shape}). If another library sharded it after construction, use "
                "the plugins of colossal_bcd.booster, or call bind(layouts, mesh)."
            )

    def _hyper(self, group: Mapping[str, Any]) -> Hyper:
        return self.hyper_type(**{field.name: group[field.name] for field in dataclasses.fields(self.hyper_type)})

    def _task(self, param: Tensor, layout: Layout, hyper: Hyper) -> Task:
        return Task(self._rule(param, layout, hyper), layout.axes, layout.max_local * self.temporary_bytes)

    def _rule(self, param: Tensor, layout: Layout, hyper: Hyper) -> Rounds:
        """The update of one parameter with its state allocated, its tensors flat and its step counted."""
        assert param.grad is not None
        state, specs = self.state[param], self.state_spec(layout, hyper)
        if not state:
            state["step"] = 0
            state.update({name: spec.allocate(param) for name, spec in specs.items()})
        state["step"] += 1
        local = param.detach().contiguous()
        view = ShardView(layout, local, param.grad.contiguous())
        seen: State = {"step": state["step"]}
        for name, spec in specs.items():
            seen[name] = view.flat(state[name]) if spec.kind == "elementwise" else state[name]
        yield from self.update(view, seen, hyper)
        if not param.is_contiguous():
            param.copy_(local)
