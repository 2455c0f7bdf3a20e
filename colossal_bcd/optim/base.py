"""ShardedOptimizer: one rule per parameter, run on whatever part of the parameters this rank has."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.optim.math import is_fusable
from colossal_bcd.optim.metrics import Metered
from colossal_bcd.optim.options import (
    Storage,
    flat_options,
    keys_of,
    make_hyper,
    members_with_names,
    plain_number,
    require_keys,
    require_real,
    signature_of,
)
from colossal_bcd.optim.replaced import are_others, require_fits, require_in_model
from colossal_bcd.optim.state.spec import State, StateSpec
from colossal_bcd.optim.state.stack import COPIES, STACK_BYTES, Member, stacks
from colossal_bcd.optim.state.storage import (
    FusedBatches,
    StoredState,
    StoredWeights,
    count_step,
    require_storable,
    stored_temporaries,
    warn_not_rounded,
)
from colossal_bcd.optim.state.whole import local_state, whole_states
from colossal_bcd.sharding import WAVE_BYTES, Layout, Mesh, Rounds, ShardView, Task, run_rounds, wide
from colossal_bcd.sharding.dtensor import MeshAxes, is_dtensor, layout_of, local_values, placed_like
from colossal_bcd.sharding.lazy import compiled

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]
HyperT = TypeVar("HyperT")
"""Frozen dataclass of an optimizer's hyper-parameters (see `optim.options`)."""


class ShardedOptimizer(Metered, Optimizer, Generic[HyperT]):
    """Base of the optimizers of this package.

    Constructed like any `torch.optim.Optimizer`, it trains whole tensors on one process, and DTensors over their mesh:
    `fully_shard` the model first, then make the optimizer of its parameters.  Of other tensors `bind` tells it which
    part of which parameter they are; the same rule then runs on the parts.

    Args:
        params: parameters, or param groups as plain dicts.
        values: hyper-parameters of every group in the order of `hyper_type`.
        storage: how weights and the first moment are stored, in place of the keys `rounding`, `seed`, `moment_bits`.
        wave_bytes: budget for temporaries of the waves of rules that communicate, in bytes; the same on every rank.
        compile: whether torch.compile makes one kernel of what the rule computes between two rounds, which takes its
            time in the first steps; None: on accelerators only.
        flat: hyper-parameters of every group by their keys in a param group.
    Raises:
        TypeError: an argument is no hyper-parameter of this optimizer, or is given twice.
        ValueError: a hyper-parameter is out of range.
    """

    hyper_type: ClassVar[Any]
    fixed: ClassVar[tuple[str, ...]] = ()
    """Hyper-parameters that the class sets itself, so that its constructor does not take them."""
    temporary_bytes: ClassVar[int]
    """Bytes per stored value that the rule allocates and keeps alive, between rounds or to its end, when it computes in
    float32."""
    stacks: ClassVar[bool] = False
    """Whether the rule can update b parameters of equal layout at once: everything it sees then has a leading dim."""
    momentum_entry: ClassVar[str] = "exp_avg"
    """State entry that is the first moment, an average of gradients."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "hyper_type"):
            signature = signature_of(cls, cls.fixed)
            cls.__signature__ = signature  # type: ignore[attr-defined]
            if cls.__dict__.get("__doc__"):
                names = [name for name in signature.parameters if name in cls.hyper_keys()]
                cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nHyper-parameters: {', '.join(names)}."

    def __init__(
        self,
        params: Params,
        *values: Any,
        storage: Storage | None = None,
        wave_bytes: int = WAVE_BYTES,
        compile: bool | None = None,
        **flat: Any,
    ) -> None:
        name = type(self).__name__
        hyper = make_hyper(name, self.hyper_type, values, {**flat, **flat_options(name, "storage", storage, flat)})
        self._layouts: dict[Tensor, Layout] = {}
        self._keys: dict[Tensor, int] = {}
        self._mesh = Mesh()
        self._axes = MeshAxes()
        self._in_model = False
        self.wave_bytes = wave_bytes
        self.compile = compile
        self._specs: dict[tuple[Layout, int], dict[str, StateSpec]] = {}
        self._hypers: list[HyperT] = []
        self._members: dict[Tensor, Member] = {}
        self._warned = False
        self._handed: Mapping[Tensor, Tensor] | None = None
        # Not copies: a learning rate that is a tensor stays the user's own, as under torch's optimizers.
        defaults = {key.name: getattr(hyper, key.field) for key in keys_of(self.hyper_type)}
        for key in keys_of(self.hyper_type):
            if key.optional and defaults[key.name] == key.default:
                del defaults[key.name]
        super().__init__(params, defaults)

    @classmethod
    def hyper_keys(cls) -> list[str]:
        """Keys of the hyper-parameters in param groups."""
        return [key.name for key in keys_of(cls.hyper_type)]

    @abstractmethod
    def state_spec(self, layout: Layout, hyper: HyperT) -> dict[str, StateSpec]:
        """Declare the state of one parameter; `step` is always there and need not be named."""

    @abstractmethod
    def update(self, view: ShardView, state: State, hyper: HyperT) -> Rounds:
        """The rule: one step of one parameter."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        require_keys(type(self).__name__, param_group, [*self.hyper_keys(), "params", "param_names"])
        require_storable(self.hyper_of({**self.defaults, **param_group}))
        super().add_param_group(param_group)
        try:
            require_real(type(self).__name__, members_with_names(self.param_groups[-1], len(self._keys)))
            self._read_layouts(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise
        for param in self.param_groups[-1]["params"]:
            self._keys[param] = len(self._keys)

    def extend_group(self, index: int, params: Sequence[Tensor]) -> None:
        """Add whole parameters, or DTensors, to the end of a param group, before a `bind` and the first step."""
        self._read_layouts(params)
        self.param_groups[index]["params"].extend(params)
        self._keys = {param: key for key, param in enumerate(p for group in self.param_groups for p in group["params"])}

    def _read_layouts(self, params: Sequence[Tensor]) -> None:
        """Take note of which part of a parameter each tensor is: of DTensors what they say, all of others."""
        self._members.clear()
        self._layouts.update({param: layout_of(param, self._axes) for param in params})
        if any(map(is_dtensor, params)):
            self._mesh = self._axes.mesh()

    def bind(self, layouts: Mapping[Tensor, Layout], mesh: Mesh, keys: Mapping[Tensor, int] | None = None) -> None:
        """Say which part of which parameter each tensor of the param groups is.

        State of tensors that are no longer in a group is dropped; state of the others is kept.

        Args:
            layouts: one layout for every tensor in the param groups; the tensor has its `local_shape`, or is a slice's
                data alone, flat.
            mesh: a group for every axis that the layouts name.
            keys: number of each tensor's parameter, the same on every rank and mesh; None: its index in the groups.
        Raises:
            ValueError: a tensor has no layout, or another shape than its layout, or an axis is not in the mesh.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in enumerate(params):
            if param not in layouts:
                raise ValueError(f"bind: parameter {index} of shape {tuple(param.shape)} has no layout")
            require_fits(type(self).__name__, index, param, layouts[param])
            for axis in layouts[param].axes:
                mesh.communicates((axis,))
        self._members.clear()
        self._layouts = {param: layouts[param] for param in params}
        self._keys = {param: index if keys is None else keys[param] for index, param in enumerate(params)}
        self._mesh, self._in_model = mesh, True
        for param in [param for param in self.state if param not in self._layouts]:
            del self.state[param]
        for state in self.state.values():
            for name, value in state.items():
                # What shares a storage with state that was dropped (see `Stack.of_state`) must not keep it alive.
                if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
                    state[name] = value.clone()

    @property
    def layouts(self) -> Mapping[Tensor, Layout]:
        """Layout of every tensor in the param groups; empty after `unbind`."""
        return self._layouts

    @property
    def mesh(self) -> Mesh:
        """The groups over which rules communicate."""
        return self._mesh

    @property
    def rule_name(self) -> str:
        """Name of the algorithm, as checkpoints have it: the class that defines the update."""
        return type(self).update.__qualname__.split(".")[-2]

    def layout_of(self, param: Tensor) -> Layout:
        """Which part of its parameter a tensor of the param groups is."""
        return self._layouts[param]

    def key_of(self, param: Tensor) -> int:
        """Number of a tensor's parameter, the same on every rank and mesh."""
        return self._keys[param]

    @property
    def is_elementwise(self) -> bool:
        """Whether all state has one value per value of its parameter, so that it can be saved like the parameter."""
        return all(
            spec.kind == "elementwise" and spec.bits == 32
            for group in self.param_groups
            for param in group["params"]
            for spec in self.state_spec(self._layouts[param], self.hyper_of(group)).values()
        )

    def unbind(self) -> None:
        """Forget every tensor; their state goes with the next `bind`, before which a step raises."""
        self._layouts, self._keys, self._members = {}, {}, {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = self._closure_loss(closure)
        self._update()
        return loss

    def _update(self) -> None:
        """The update itself.

        Subclasses extend this and not `step`: torch runs hooks in the `step` of every class that was constructed, so
        one that calls another's would run them twice.
        """
        self._follow_groups()
        if not self._in_model and self._handed is None:
            require_in_model(type(self).__name__, self.param_groups)
            self._in_model = True
        self._specs.clear()
        active = self._active()
        for group in self.param_groups:
            count_step(group)
        self._warned = self._warned or warn_not_rounded(type(self).__name__, active)
        on_accelerator = any(member.param.device.type != "cpu" for member in active[:1])
        with compiled(on_accelerator if self.compile is None else self.compile):
            run_rounds(map(self._task, self.stacked(self._unfused(active))), self._mesh, self.wave_bytes)

    def step_on(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """One step of some parameters on gradients that are handed over; `param.grad` is neither read nor written.

        Args:
            gradients: by parameter, in its shape, of any floating dtype.
        """
        self._handed = gradients
        try:
            self.step()
        finally:
            self._handed = None

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; state of DTensors as DTensors of whole shapes, for which all ranks must call."""
        self._follow_groups()
        found = super().state_dict()
        states = {
            key: (param, self._layouts[param], self._specs_of(param, group), found["state"][key])
            for group, saved in zip(self.param_groups, found["param_groups"], strict=True)
            for param, key in zip(group["params"], saved["params"], strict=True)
            if found["state"].get(key) and is_dtensor(param)
        }
        found["state"] |= dict(zip(states, whole_states(list(states.values()), self._mesh), strict=True))
        return found

    def _specs_of(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, StateSpec]:
        return self.state_spec(self._layouts[param], self.hyper_of(group, self._keys[param]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, tensors in the dtype in which they were saved."""
        self._follow_groups()
        seen: dict[str, Any] = {}

        def localise(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            seen.update(state_dict, state=dict(state_dict["state"]))
            # Not strict: torch refuses other groups after this, and says how they differ.
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
                for param, key in zip(group["params"], saved["params"], strict=False):
                    if key in seen["state"] and is_dtensor(param):
                        specs = self._specs_of(param, {**group, **saved})
                        seen["state"][key] = local_state(param, self._layouts[param], specs, seen["state"][key])
            return seen

        # torch casts state to the parameter's dtype, which rounds the float32 state of a bf16 parameter.  A hook that
        # is registered last sees what is about to be cast.
        handle = self.register_load_state_dict_pre_hook(localise)
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
        own = {"_layouts": self._layouts, "_keys": self._keys, "wave_bytes": self.wave_bytes, "compile": self.compile}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        made = {"_mesh": Mesh(), "_axes": MeshAxes(), "_in_model": False, "_warned": False, "_handed": None}
        # Optimizers that were saved by an older version have no `compile`.
        made |= {"_specs": {}, "_hypers": [], "_members": {}, "compile": None}
        self.__dict__.update({**made, **self.__dict__})

    def task_bytes(self, layout: Layout, hyper: HyperT, dtype: torch.dtype, num_members: int = 1) -> int:
        """Temporaries that one rule keeps alive between rounds, in bytes.

        Args:
            layout: of each parameter.
            hyper: of its group.
            dtype: of the weights.
            num_members: parameters that the rule updates at once.
        """
        if self.is_fused(hyper, dtype):
            return 0
        per_value = self.temporary_bytes * wide(dtype).itemsize // torch.float32.itemsize
        per_value += stored_temporaries(hyper, dtype)
        if num_members > 1:
            per_value = COPIES * wide(dtype).itemsize
        return layout.max_local * per_value * num_members

    def has_low_rank(self, key: int) -> bool:
        """Whether an engine has handed over a low-rank gradient of this parameter (see `ReducedGradientOptimizer`)."""
        return False

    def _closure_loss(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _active(self) -> list[Member]:
        """Parameters with a gradient, checked before the first collective; those that look as before were checked."""
        active, index = [], -1
        for number, group in enumerate(self.param_groups):
            hyper, num_steps = self._hyper(number, group), group.get("num_steps", 0)
            for param in group["params"]:
                index += 1
                grad = self._grad(param)
                if grad is None:
                    continue
                member = self._members.get(param)
                if member is None or not member.is_as_it_was(grad):
                    member = self._members[param] = self._checked(index, param, grad, hyper)
                state = self.state.get(param)
                active.append(member.count(hyper, state["step"] + 1 if state else 1, number, num_steps))
        if len(self._members) > index + 1:
            self._members = {member.param: member for member in active}  # some are in no group any more
        return active

    def _hyper(self, number: int, group: Mapping[str, Any]) -> HyperT:
        """Hyper-parameters of a group: the object of the step before, where they are equal."""
        made = self.hyper_of(group)
        del self._hypers[len(self.param_groups) :]
        if number >= len(self._hypers):
            self._hypers.append(made)
        elif self._hypers[number] != made:
            self._hypers[number] = made
        return self._hypers[number]

    def _checked(self, index: int, param: Tensor, grad: Tensor, hyper: HyperT) -> Member:
        name = type(self).__name__
        if param not in self._layouts:
            raise ValueError(
                f"{name}: parameter {index} of shape {tuple(param.shape)} was put into the param groups by another "
                "library without a layout, so this optimizer cannot know which part of which tensor it is. Use the "
                "plugins of colossal_bcd.booster, or call bind(layouts, mesh)."
            )
        require_fits(name, index, param, self._layouts[param])
        if is_dtensor(param) and self._handed is None:
            param.grad = placed_like(grad, param, f"{name}: the gradient of parameter {index}")
        require_real(name, [(f"number {index}", param)])
        if grad.is_sparse:
            raise ValueError(
                f"{name}: parameter {index} of shape {tuple(param.shape)} has a sparse gradient, expected a dense one. "
                "Build its embedding with sparse=False."
            )
        return Member(param, self._layouts[param], hyper, self._keys[param], 1, 0, 0)

    def is_fused(self, hyper: HyperT, dtype: torch.dtype) -> bool:
        """Whether `update_fused` does the whole update of weights of `dtype`, without temporaries."""
        return False

    def update_fused(self, values: Mapping[str, list[Tensor]], step: int, hyper: HyperT) -> None:
        """The rule as one of torch's kernels, for many parameters; without communication.

        Args:
            values: lists of tensors of equal length, one tensor per parameter and all of its sizes equal: `weight` and
                `grad`, and the state by name.
            step: number of this update, from 1.
            hyper: of all of them.
        """
        raise NotImplementedError

    def _unfused(self, active: list[Member]) -> list[Member]:
        """Update what torch's kernels do in one go, and return the rest."""
        rest, batches = [], FusedBatches()
        for member in active:
            grad = self._grad(member.param)
            if member.is_fused is None:
                member.is_fused = self.is_fused(member.hyper, member.param.dtype)
            if grad is not None and member.is_fused and is_fusable(member.param, grad):
                batches.add(member, grad, self.state[member.param], self._spec(member))
            else:
                rest.append(member)
        batches.update(self.update_fused)
        return rest

    def _spec(self, member: Member) -> Mapping[str, StateSpec]:
        """The declared state of a parameter, made once in a step for all of its layout and hyper-parameters."""
        if member.spec is None:
            kind = member.layout, id(member.hyper)
            if kind not in self._specs:
                self._specs[kind] = self.state_spec(member.layout, member.hyper)
            member.spec = self._specs[kind]
        return member.spec

    def _follow_groups(self) -> None:
        """Until the first step, read anew what accelerate has put into the groups."""
        if self._in_model:
            return
        params = [param for group in self.param_groups for param in group["params"]]
        if are_others(type(self).__name__, params, self._layouts, self.state):
            self._layouts, self._axes, self._keys = {}, MeshAxes(), {param: key for key, param in enumerate(params)}
            self._read_layouts(params)

    def _grad(self, param: Tensor) -> Tensor | None:
        return param.grad if self._handed is None else self._handed.get(param)

    def hyper_of(self, group: Mapping[str, Any], key: int | None = None) -> HyperT:
        """Hyper-parameters of a param group, checked.

        Args:
            group: a param group, or what may become one.
            key: number of one of its parameters, where what its name adds to them matters, as to its state.
        Raises:
            ValueError: one is out of range.
        """
        made: HyperT = self.hyper_type(
            **{
                key.field: plain_number(group[key.name])
                for key in keys_of(self.hyper_type)
                if key.name in group or not key.optional
            }
        )
        return made

    def stack_kind(self, member: Member) -> Hashable:
        """What tells stacks apart beside what `stacks` compares; None: the parameter is updated alone."""
        return self.stacks

    def stacked(self, active: list[Member]) -> list[list[Member]]:
        """What is updated together."""
        if not self.stacks:
            return [[member] for member in active]
        return stacks(active, min(STACK_BYTES, self.wave_bytes), self.stack_kind, self._spec)

    def _task(self, members: list[Member]) -> Task:
        first = members[0]
        num_bytes = self.task_bytes(first.layout, first.hyper, first.param.dtype, len(members))
        return Task(self._rule(members), first.layout.axes, num_bytes)

    def _rule(self, members: list[Member]) -> Rounds:
        """The update of a stack, from what is stored to what is stored."""
        first = members[0]
        states = [self.state[member.param] for member in members]
        stacked = len(members) > 1
        weights = StoredWeights(members, stacked)
        stored = StoredState(members, states, self._spec(first), stacked)
        keys = tuple(member.key for member in members)
        lead = (len(members),) if stacked else ()
        view = ShardView(first.layout, weights.values, self._gradients(members), keys, lead)
        seen = stored.seen(view)
        yield from self.update(view, seen, first.hyper)
        stored.write_back(view, seen)
        weights.write_back(view)

    def _gradients(self, members: list[Member]) -> list[Tensor]:
        """Whole gradients; none where an engine has handed over a low-rank one instead."""
        grads = [self._grad(member.param) for member in members if not self.has_low_rank(member.key)]
        stored = [local_values(grad) if is_dtensor(grad) else grad for grad in grads if grad is not None]
        return [grad.contiguous() for grad in stored]
