"""Optimizers that take a low-rank gradient instead of a whole one.

An engine asks for `low_rank_wanted` before backward, reduces what it is told, and hands that over with `give_low_rank`
before the step; the parameter's `grad` then only says that there is one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.state.rounding import is_stochastic, stream
from colossal_bcd.sharding import Layout, LowRankGradient


@dataclass(frozen=True)
class ReplicatedUpdate:
    """An update that an engine applies to whole shards, on every replica (see `replicated_updates`)."""

    gradient: LowRankGradient
    """Its bases project the step back."""
    step: Tensor
    """[a, b] this rank's part of the low-rank step."""
    scale: float
    """Factor of the step that is projected back."""
    decay: float | Tensor
    """Part of the weight that vanishes."""
    decay_first: bool
    """Whether it vanishes before the step is subtracted."""

    def apply(self, weight: Tensor, step: Tensor) -> None:
        """Update a shard in place.

        Args:
            weight: [n] data of the whole shard, in the dtype of its arithmetic.
            step: the whole low-rank step of the shard, of `gradient.shape`.
        """
        bases = self.gradient.left, self.gradient.right
        self.gradient.of_shard.subtract_(weight, step, *bases, self.scale, self.decay, self.decay_first)


class ReducedGradientOptimizer(ShardedOptimizer[Any]):
    """Base of optimizers whose rule needs a low-rank gradient only at most steps."""

    replicated_updates: dict[int, ReplicatedUpdate] | None = None
    """Where an engine wants to apply low-rank updates itself it puts a dict here, which a step fills by the parameters'
    numbers instead of changing their weights; None: a step updates all weights."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._given: dict[int, Tensor] = {}
        super().__init__(*args, **options)

    @abstractmethod
    def wants_low_rank(self, layout: Layout, state: Mapping[str, Any], hyper: Any, key: int) -> LowRankGradient | None:
        """What an update wants of a parameter's gradient: its projection, or None for all of it.

        Args:
            layout: of the parameter.
            state: before the update, with `step` already the update's number.
            hyper: of its group.
            key: the parameter's number.
        """

    def low_rank_wanted(self) -> dict[Tensor, LowRankGradient]:
        """The parameters of whose gradient the next step wants the projection only.

        The same on every rank, and until the next step: it follows from numbers and bases that are alike on all ranks.
        """
        wanted = {}
        for group in self.param_groups:
            hyper = self.hyper_of(group)
            for param in group["params"]:
                state = self.state.get(param)
                if state:
                    upcoming = {**state, "step": state["step"] + 1}
                    gradient = self.wants_low_rank(self._layouts[param], upcoming, hyper, self._keys[param])
                    if gradient is not None:
                        wanted[param] = gradient
        return wanted

    def give_low_rank(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Hand over what `low_rank_wanted` asked for; the next step takes it.

        Args:
            gradients: parameter -> [a, b] this rank's part of the complete low-rank gradient (see `LowRank`).
        """
        self._given = {self._keys[param]: gradient for param, gradient in gradients.items()}

    def streams(self) -> dict[Tensor, int]:
        """Streams of the parameters whose last update is to be rounded stochastically."""
        found = {}
        for group in self.param_groups:
            hyper = self.hyper_of(group)
            for param in group["params"]:
                if is_stochastic(hyper, param.dtype):
                    # A step counts itself before it is over.
                    found[param] = stream(hyper.seed, self._keys[param], group["num_steps"] - 1)
        return found

    def has_low_rank(self, key: int) -> bool:
        return key in self._given

    def take_low_rank(self, key: int) -> Tensor | None:
        """The low-rank gradient that was handed over for the parameter of this number, once; None: it is whole."""
        return self._given.pop(key, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_given", {})
