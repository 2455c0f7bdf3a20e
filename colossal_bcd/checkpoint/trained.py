"""What a boosted optimizer trains on this rank, by names that every mesh shares."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizerRatio
from colossal_bcd.block.trained import Contributor, Trained, trained_of
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.state.filed import FiledTensor, filed_like
from colossal_bcd.sharding import Layout


@dataclass(frozen=True, kw_only=True)
class TrainedTensor:
    """One parameter that is, at least in part, on this rank, and trains or waits for its next turn."""

    name: str
    """In the model before it was sharded; one name of a tied weight."""
    key: int
    """Number of the parameter in the param groups as the user gave them."""
    group: int
    param: Parameter
    layout: Layout
    """Layout of the tensor in the param groups, or of the one that waits."""
    dtype: torch.dtype
    """Dtype of that tensor."""
    has_master: bool
    """Whether that tensor is a master in a wider dtype than the parameter."""


class Boosted:
    """What `booster.boost` returned, of any plugin; `names` are those of all parameters, by id."""

    def __init__(self, wrapper: Any, names: Mapping[int, str]) -> None:
        self.wrapper, self.names = wrapper, names
        self.trained = getattr(wrapper, "trained", None) or trained_of(wrapper.optim, names)
        self.base: Optimizer = self.trained.base_optimizer

    @property
    def rule(self) -> str:
        """Name of the algorithm, which subclasses share."""
        return self.base.rule_name if isinstance(self.base, ShardedOptimizer) else type(self.base).__name__

    @property
    def scaler(self) -> Any:
        """ColossalAI's loss scaler, or None."""
        mixin = getattr(self.wrapper, "mixed_precision_mixin", None) or getattr(self.wrapper, "mixed_precision", None)
        return getattr(mixin, "grad_scaler", None)

    def groups(self) -> list[dict[str, Any]]:
        """The param groups."""
        return self.base.param_groups

    def contributors(self) -> dict[str, Contributor]:
        """Find what else has tensors, by name: `optimizer.contributors`, corrections of inactive blocks, residuals."""
        found = dict(self.trained.contributors)
        if self.trained.corrector is not None:
            found["correction"] = self.trained.corrector
        if self.trained.residual is not None:
            found["residual"] = SavedResiduals(self.wrapper.masters)
        return found

    def active(self, names: list[list[str]] | None = None) -> list[TrainedTensor]:
        """List what is trained now, or what would be.

        Args:
            names: the blocks' names of what trains, for each param group; None: as it is now.
        """
        raise NotImplementedError

    def waiting(self, names: Collection[str] | None = None) -> list[TrainedTensor]:
        """List what does not train now, but keeps its master and its state until it does again.

        Args:
            names: names of what would wait, as far as it is on this rank; None: as it is now.
        """
        return []

    def tensor(self, trained: TrainedTensor) -> Tensor:
        """Find the tensor in the param groups, or the one that waits."""
        raise NotImplementedError

    def state(self, trained: TrainedTensor) -> Mapping[str, Any]:
        """Find the base optimizer's state of it; empty if there is none."""
        state: Mapping[str, Any] = self.base.state.get(self.tensor(trained), {})
        return state

    @contextlib.contextmanager
    def taking(self, waiting: list[TrainedTensor]) -> Iterator[None]:
        """Inside, the base optimizer has tensors of what will wait, too, new where there are none, to be written."""
        yield

    def follow(self) -> None:
        """Let masters follow weights that were written from outside since the last step."""

    def renew(self) -> None:
        """Let the optimizer forget what it has made from hyper-parameters that were replaced."""


class SavedResiduals:
    """What rounding has taken off the masters of inactive parameters, as a `Contributor`."""

    def __init__(self, masters: Any) -> None:
        self._residuals, self._layout, self._weight_of = masters.active_set.residuals, masters.layout, masters.weight_of

    def filed(self) -> Iterator[tuple[Parameter, dict[str, Any], Sequence[FiledTensor]]]:
        for param, tensor in self._residuals.of.items():
            yield param, {"value": tensor}, [filed_like("value", tensor, self._layout(param))]

    def numbers(self) -> dict[str, Any]:
        return {}

    def load(self, numbers: Mapping[str, Any], saved: Mapping[Parameter, Sequence[str]]) -> None:
        residuals = self._residuals
        residuals.of = {param: residuals.empty(param, tuple(self._weight_of(param).shape)) for param in saved}


class EngineState(Boosted):
    """Under an engine of this package."""

    def active(self, names: list[list[str]] | None = None) -> list[TrainedTensor]:
        groups: list[list[Parameter]] = list(self.wrapper._working_param_groups.values())
        if names is not None:
            groups = [[self.trained.named_parameters[name] for name in group] for group in names]
        return [self._describe(index, param) for index, params in enumerate(groups) for param in params]

    def waiting(self, names: Collection[str] | None = None) -> list[TrainedTensor]:
        aside: Collection[Parameter] = self.trained.active_set.aside
        if names is not None:
            chosen = set(names)
            aside = {param for name, param in self.trained.named_parameters.items() if name in chosen}
        members = enumerate(self.trained.members)
        return [self._describe(index, param) for index, params in members for param in params if param in aside]

    def tensor(self, trained: TrainedTensor) -> Tensor:
        active_set = self.trained.active_set
        master = active_set.masters.get(trained.param)
        return active_set.aside[trained.param] if master is None else master

    def state(self, trained: TrainedTensor) -> Mapping[str, Any]:
        aside: Mapping[str, Any] | None = self.trained.active_set.states_aside.get(trained.param)
        return super().state(trained) if aside is None else aside

    @contextlib.contextmanager
    def taking(self, waiting: list[TrainedTensor]) -> Iterator[None]:
        active_set = self.trained.active_set
        active_set.states_aside = {}
        active_set.wait(trained.param for trained in waiting)
        try:
            yield
        finally:
            states = {param: self.base.state.pop(master, None) for param, master in active_set.aside.items()}
            active_set.states_aside = {param: state for param, state in states.items() if state}

    def _describe(self, group: int, param: Parameter) -> TrainedTensor:
        dtype = self.wrapper.masters.dtype(param)
        return TrainedTensor(
            name=self.names[id(param)],
            key=self.wrapper._keys[id(param)],
            group=group,
            param=param,
            layout=self.wrapper.masters.layout(param),
            dtype=dtype,
            has_master=dtype != param.dtype,
        )

    def follow(self) -> None:
        self.wrapper.follow_weights()

    def renew(self) -> None:
        self.wrapper.bind()


class OtherState(Boosted):
    """Under ColossalAI's own plugins and torch's DDP."""

    def renew(self) -> None:
        if isinstance(self.base, BlockOptimizerRatio):
            self.base.renew()

    def active(self, names: list[list[str]] | None = None) -> list[TrainedTensor]:
        assert names is None
        return [trained for trained, _ in self._by_param.values()]

    def tensor(self, trained: TrainedTensor) -> Tensor:
        return self._by_param[trained.param][1]

    @functools.cached_property
    def _by_param(self) -> dict[Parameter, tuple[TrainedTensor, Tensor]]:
        of_master = self.wrapper.get_master_to_working_map() if hasattr(self.wrapper, "param_info") else None
        if of_master is None:
            of_master = getattr(self.wrapper, "master_to_working_param", {})
        numbers = (getattr(self.wrapper, "param_info", None) or {}).get("param2id", {})
        found: dict[Parameter, tuple[TrainedTensor, Tensor]] = {}
        for index, group in enumerate(self.base.param_groups):
            for tensor in group["params"]:
                param = of_master.get(id(tensor), tensor)
                layout = Layout.whole(tuple(tensor.shape))
                if isinstance(self.base, ShardedOptimizer):
                    layout = self.base.layout_of(tensor)
                trained = TrainedTensor(
                    name=self.names[id(param)],
                    key=numbers.get(id(param), len(found)),
                    group=index,
                    param=param,
                    layout=layout,
                    dtype=tensor.dtype,
                    has_master=tensor.dtype != param.dtype,
                )
                found[param] = trained, tensor
        return found


def boosted_of(wrapper: Any) -> Boosted | None:
    """Find what this package can save completely, or None, where ColossalAI's format is used.  All ranks must call."""
    names = getattr(wrapper, "parameter_names", None)
    if names is None:
        return None
    engine = getattr(wrapper, "engine", wrapper)
    if isinstance(getattr(engine, "trained", None), Trained):
        engine.admit_newcomers()
        return EngineState(engine, names)
    return (
        OtherState(wrapper, names)
        if isinstance(wrapper.optim, ShardedOptimizer) or getattr(wrapper, "has_whole_state", False)
        else None
    )
