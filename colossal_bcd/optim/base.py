"""ShardedOptimizer: one rule per parameter, run on whatever part of the parameters this rank holds."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.optim.quantized import StorageHyper, dequantize, quantize_into, require_library, require_stored
from colossal_bcd.optim.rounding import LOW_PRECISION, is_stochastic, round_into, stream
from colossal_bcd.optim.spec import StateSpec
from colossal_bcd.sharding import WAVE_BYTES, Layout, Mesh, Rounds, ShardView, Task, run_rounds, wide

logger = logging.getLogger(__name__)

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

    hyper_type: ClassVar[Any]
    temporary_bytes: ClassVar[int]
    """Bytes per stored value that the rule keeps alive between rounds when it computes in float32."""

    def __init__(self, params: Params, hyper: Hyper, wave_bytes: int = WAVE_BYTES) -> None:
        self._layouts: dict[Tensor, Layout] = {}
        self._keys: dict[Tensor, int] = {}
        self._mesh = Mesh()
        self.wave_bytes = wave_bytes
        self._warned = False
        defaults = dataclasses.asdict(hyper)
        # Options of storage are in a group only where they are asked for: groups and checkpoints of everybody else stay
        # those of the originals.
        for name in self._optional():
            if defaults[name] == getattr(StorageHyper, name):
                del defaults[name]
        super().__init__(params, defaults)

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
        if getattr(self._hyper({**self.defaults, **param_group}), "moment_bits", 32) == 8:
            require_library()
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            self._layouts[param] = Layout.whole(tuple(param.shape))
            self._keys[param] = len(self._keys)

    def bind(self, layouts: Mapping[Tensor, Layout], mesh: Mesh, keys: Mapping[Tensor, int] | None = None) -> None:
        """Say which part of which parameter each tensor of the param groups is.

        State of tensors that are no longer in a group is dropped; state of the others is kept.

        Args:
            layouts: one layout for every tensor in the param groups; the tensor has its `local_shape`.
            mesh: a group for every axis that the layouts name.
            keys: number of each tensor's parameter, the same on every rank and mesh; None: its place in the groups.
        Raises:
            ValueError: a tensor has no layout, or another shape than its layout, or an axis is not in the mesh.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in enumerate(params):
            if param not in layouts:
                raise ValueError(f"bind: parameter {index} of shape {tuple(param.shape)} has no layout")
            self._check(index, param, layouts[param])
            for axis in layouts[param].axes:
                mesh.communicates((axis,))
        self._layouts = {param: layouts[param] for param in params}
        self._keys = {param: index if keys is None else keys[param] for index, param in enumerate(params)}
        self._mesh = mesh
        for param in [param for param in self.state if param not in self._layouts]:
            del self.state[param]

    @property
    def is_elementwise(self) -> bool:
        """Whether all state has one value per value of its parameter, so that it can be saved like the parameter."""
        return all(
            spec.kind == "elementwise" and spec.bits == 32
            for group in self.param_groups
            for param in group["params"]
            for spec in self.state_spec(self._layouts[param], self._hyper(group)).values()
        )

    def unbind(self) -> None:
        """Forget every tensor; their state goes with the next `bind`, before which a step raises."""
        self._layouts, self._keys = {}, {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = self._closure_loss(closure)
        active = self._active()
        for group in self.param_groups:
            if group.get("rounding") == "stochastic":
                # In the group, which outlives the state that a switch of blocks clears: no step repeats another's bits.
                group["num_steps"] = group.get("num_steps", 0) + 1
        self._warn_of_rounding(active)
        tasks = (self._task(param, layout, hyper, num_steps) for param, layout, hyper, num_steps in active)
        run_rounds(tasks, self._mesh, self.wave_bytes)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, tensors in the dtype in which they were saved."""
        seen: dict[str, Any] = {}
        # torch casts state to the parameter's dtype, which rounds the float32 state of a bf16 parameter.  A hook that
        # is registered last sees what is about to be cast.
        handle = self.register_load_state_dict_pre_hook(lambda _, state_dict: seen.update(state_dict))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        keys = [key for group in seen["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            for name, value in seen["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.to(param.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        # Process groups can't be copied: a copy of a sharded optimizer raises until it is bound.
        return {**super().__getstate__(), "_layouts": self._layouts, "_keys": self._keys, "wave_bytes": self.wave_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_mesh", Mesh())
        self.__dict__.setdefault("_warned", False)

    def has_image(self, key: int) -> bool:
        """Whether an engine has handed over an image of the gradient of this parameter (see `ImageOptimizer`)."""
        return False

    def _closure_loss(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _active(self) -> list[tuple[Tensor, Layout, Hyper, int]]:
        """Parameters with a gradient, checked before the first collective, and the steps that their group has taken."""
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
                active.append((param, self._layouts[param], hyper, group.get("num_steps", 0)))
        return active

    def _check(self, index: int, param: Tensor, layout: Layout) -> None:
        if tuple(param.shape) != layout.local_shape:
            raise ValueError(
                f"{type(self).__name__}: parameter {index} has shape {tuple(param.shape)}, but its layout says "
                f"{layout.local_shape} (part of {layout.shape}). If another library sharded it after construction, use "
                "the plugins of colossal_bcd.booster, or call bind(layouts, mesh)."
            )

    def _hyper(self, group: Mapping[str, Any]) -> Hyper:
        names, optional = [field.name for field in dataclasses.fields(self.hyper_type)], self._optional()
        return self.hyper_type(**{name: group[name] for name in names if name in group or name not in optional})

    def _optional(self) -> list[str]:
        """Hyper-parameters that a group need not have."""
        if not issubclass(self.hyper_type, StorageHyper):
            return []
        return [field.name for field in dataclasses.fields(StorageHyper)]

    def _warn_of_rounding(self, active: list[tuple[Tensor, Layout, Hyper, int]]) -> None:
        """Say once that there is nothing to round."""
        asked = [param for param, _, hyper, _ in active if getattr(hyper, "rounding", "nearest") == "stochastic"]
        if not asked or self._warned or any(param.dtype in LOW_PRECISION for param in asked):
            return
        self._warned = True
        logger.warning(
            '%s: rounding="stochastic" has no effect on %s weights, such as float32 masters, which are not rounded. '
            "Under a plugin pass master_weights=False.",
            type(self).__name__,
            asked[0].dtype,
        )

    def _task(self, param: Tensor, layout: Layout, hyper: Hyper, num_steps: int) -> Task:
        per_value = self.temporary_bytes * wide(param.dtype).itemsize // torch.float32.itemsize
        if is_stochastic(hyper, param.dtype):
            per_value += torch.float32.itemsize
        if getattr(hyper, "moment_bits", 32) == 8:
            per_value += wide(param.dtype).itemsize
        return Task(self._rule(param, layout, hyper, num_steps), layout.axes, layout.max_local * per_value)

    def _rule(self, param: Tensor, layout: Layout, hyper: Hyper, num_steps: int) -> Rounds:
        """The update of one parameter with its state allocated, its tensors flat and its step counted.

        Storage is settled here: the rule sees 8-bit entries and stochastically rounded weights as float32.
        """
        assert param.grad is not None
        state, specs = self.state[param], self.state_spec(layout, hyper)
        if not state:
            state["step"] = 0
            for name, spec in specs.items():
                state.update({part: stored.allocate(param) for part, stored in spec.stored(name).items()})
        for name, spec in specs.items():
            if spec.kind in ("elementwise", "low_rank"):
                require_stored(name, state[name], spec.bits)
        state["step"] += 1
        local = param.detach().contiguous()
        stochastic = is_stochastic(hyper, param.dtype)
        values = local.to(wide(local.dtype)) if stochastic else local
        grad = None if self.has_image(self._keys[param]) else param.grad.contiguous()
        view = ShardView(layout, values, grad, self._keys[param])
        seen: State = {"step": state["step"]}
        for name, spec in specs.items():
            seen[name] = view.flat(state[name]) if spec.kind == "elementwise" else state[name]
            if spec.bits == 8:
                seen[name] = dequantize(seen[name], state[f"{name}_absmax"], spec.signed).to(wide(param.dtype))
        yield from self.update(view, seen, hyper)
        for name, spec in specs.items():
            if spec.bits == 8:
                codes = view.flat(state[name]) if spec.kind == "elementwise" else state[name]
                quantize_into(codes, state[f"{name}_absmax"], seen[name], spec.signed)
        if stochastic:
            round_into(view.flat(local), view.param, layout, stream(hyper.seed, view.key, num_steps))
        if not param.is_contiguous():
            param.copy_(local)
