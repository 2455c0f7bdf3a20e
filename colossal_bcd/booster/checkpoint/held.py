"""What a boosted optimizer holds on this rank, by names that every mesh shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from colossalai.interface import OptimizerWrapper
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer
from colossal_bcd.booster.masters import ShardedMasters
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout


@dataclass(frozen=True, kw_only=True)
class Held:
    """One trained parameter that is, at least in part, on this rank."""

    name: str
    """In the model before it was sharded; one name of a tied weight."""
    key: int
    """Number of the parameter: its place in the param groups as the user gave them."""
    group: int
    param: Parameter
    layout: Layout
    """Of the tensor in the param groups."""
    dtype: torch.dtype
    """Of that tensor."""
    has_master: bool
    """Whether that tensor is a master in a wider dtype than the parameter."""


class Boosted:
    """A boosted optimizer of any plugin.

    Args:
        wrapper: what `booster.boost` returned.
        names: name of every parameter by id.
    """

    def __init__(self, wrapper: Any, names: Mapping[int, str]) -> None:
        self.wrapper, self.names = wrapper, names
        self.block: BlockOptimizer | None = wrapper.optim if isinstance(wrapper.optim, BlockOptimizer) else None
        self.base: Optimizer = self.block.base_optimizer if self.block is not None else wrapper.optim

    @property
    def rule(self) -> str:
        """Name of the algorithm: that of the class, or of the class from which its update is."""
        if isinstance(self.base, ShardedOptimizer):
            rule = getattr(type(self.base), "inner", type(self.base).update)
            return str(rule.__qualname__.partition(".")[0])
        return type(self.base).__name__

    @property
    def scaler(self) -> Any:
        """ColossalAI's loss scaler, or None."""
        mixin = getattr(self.wrapper, "mixed_precision_mixin", None) or getattr(self.wrapper, "mixed_precision", None)
        return getattr(mixin, "grad_scaler", None)

    def groups(self) -> list[dict[str, Any]]:
        """The param groups."""
        return self.base.param_groups

    def held(self, names: list[list[str]] | None = None) -> list[Held]:
        """What is trained now, or what would be.

        Args:
            names: of each param group, the blocks' names of what trains; None: as it is now.
        """
        raise NotImplementedError

    def tensor(self, held: Held) -> Tensor:
        """The tensor in the param groups."""
        raise NotImplementedError

    def renew(self) -> None:
        """Let the optimizer forget what it has made from hyper-parameters that were replaced."""


class EngineState(Boosted):
    """Under the plugins of this package."""

    def held(self, names: list[list[str]] | None = None) -> list[Held]:
        engine, masters = self.wrapper, self.wrapper.masters
        groups: list[list[Parameter]] = list(engine._working_param_groups.values())
        if names is not None:
            assert self.block is not None
            groups = [[self.block.named_parameters[name] for name in group] for group in names]
        return [
            Held(
                name=self.names[id(param)],
                key=engine._keys[id(param)],
                group=index,
                param=param,
                layout=self._layout(param),
                dtype=masters.dtype(param),
                has_master=masters.dtype(param) != param.dtype,
            )
            for index, params in enumerate(groups)
            for param in params
        ]

    def tensor(self, held: Held) -> Tensor:
        master: Tensor = self.wrapper.masters.of[held.param]
        return master

    def renew(self) -> None:
        self.wrapper.bind()

    def _layout(self, param: Parameter) -> Layout:
        """As the optimizer was bound to it, where it is trained now: it may have a kind of its own."""
        layout: Layout = self.wrapper.masters.layout(param)
        master = self.wrapper.masters.of.get(param)
        if master is None or not isinstance(self.base, ShardedOptimizer):
            return layout
        return self.base._layouts.get(master, layout)


class OtherState(Boosted):
    """Under ColossalAI's own plugins and torch's DDP."""

    def held(self, names: list[list[str]] | None = None) -> list[Held]:
        assert names is None
        return [held for held, _ in self._pairs()]

    def tensor(self, held: Held) -> Tensor:
        return next(tensor for other, tensor in self._pairs() if other.param is held.param)

    def _pairs(self) -> list[tuple[Held, Tensor]]:
        of_master = self.wrapper.get_master_to_working_map() if hasattr(self.wrapper, "param_info") else None
        if of_master is None:
            of_master = getattr(self.wrapper, "master_to_working_param", {})
        numbers = (getattr(self.wrapper, "param_info", None) or {}).get("param2id", {})
        pairs: list[tuple[Held, Tensor]] = []
        for index, group in enumerate(self.base.param_groups):
            for tensor in group["params"]:
                param = of_master.get(id(tensor), tensor)
                layout = Layout.whole(tuple(tensor.shape))
                if isinstance(self.base, ShardedOptimizer):
                    layout = self.base._layouts[tensor]
                held = Held(
                    name=self.names[id(param)],
                    key=numbers.get(id(param), len(pairs)),
                    group=index,
                    param=param,
                    layout=layout,
                    dtype=tensor.dtype,
                    has_master=tensor.dtype != param.dtype,
                )
                pairs.append((held, tensor))
        return pairs


def boosted_of(wrapper: Any) -> Boosted | None:
    """What this package can save completely; None: ColossalAI's format is what there is."""
    names = getattr(wrapper, "parameter_names", None)
    if names is None or not isinstance(wrapper, OptimizerWrapper):
        return None
    if isinstance(getattr(wrapper, "masters", None), ShardedMasters):
        return EngineState(wrapper, names)
    return OtherState(wrapper, names) if isinstance(wrapper.optim, ShardedOptimizer) or _is_whole(wrapper) else None


def _is_whole(wrapper: Any) -> bool:
    """Whether every rank holds all of every parameter, as under torch's DDP."""
    return type(wrapper) is OptimizerWrapper
