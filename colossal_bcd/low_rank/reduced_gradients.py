"""Optimizers that take a low-rank image instead of a gradient.

An engine asks for `low_rank_wanted` before backward, reduces what it is told, and hands the images over with
`give_low_rank` before the step; the parameter's `grad` then only says that there is one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from colossal_bcd.optim.base import Hyper, Params, ShardedOptimizer, State
from colossal_bcd.optim.state.rounding import is_stochastic, stream
from colossal_bcd.sharding import WAVE_BYTES, Layout, LowRank, LowRankGradient, Request, ShardView, Sum


@dataclass(frozen=True)
class ReplicatedUpdate:
    """An update that an engine applies to whole shards, on every replica (see `replicated_updates`)."""

    image: LowRankGradient
    """Whose bases project the step back."""
    step: Tensor
    """What this rank holds of the step's image (see `LowRank.shape`)."""
    write: Callable[[Tensor, LowRank, Tensor], None]
    """Updates flat values, given the projection of their layout and the step's image as far as it concerns them."""

    def apply(self, weight: Tensor, step: Tensor) -> None:
        """Update a shard in place.

        Args:
            weight: [n] data of the whole shard, in the dtype of its arithmetic.
            step: whole image of the shard's step, of `image.shape`.
        """
        self.write(weight, self.image.of_shard, step)


class ReducedGradientOptimizer(ShardedOptimizer):
    """Base of optimizers whose rule needs an image of the gradient at most steps."""

    replicated_updates: dict[int, ReplicatedUpdate] | None = None
    """Where an engine wants to apply low-rank updates itself it puts a dict here, which a step fills by the parameters'
    numbers instead of changing their weights; None: a step updates all weights."""

    def __init__(self, params: Params, hyper: Hyper, wave_bytes: int = WAVE_BYTES) -> None:
        self._images: dict[int, Tensor] = {}
        super().__init__(params, hyper, wave_bytes)

    @abstractmethod
    def wants_low_rank(self, layout: Layout, state: State, hyper: Hyper, key: int) -> LowRankGradient | None:
        """What an update wants of a parameter's gradient: an image of it, or None for all of it.

        Args:
            layout: of the parameter.
            state: before the update, with `step` already the update's number.
            hyper: of its group.
            key: the parameter's number.
        """

    def low_rank_wanted(self) -> dict[Tensor, LowRankGradient]:
        """The parameters of whose gradient the next step wants an image only.

        The same on every rank, and until the next step: it follows from numbers and bases that all ranks hold alike.
        """
        wanted = {}
        for group in self.param_groups:
            hyper = self.hyper_of(group)
            for param in group["params"]:
                state = self.state.get(param)
                if state:
                    upcoming = {**state, "step": state["step"] + 1}
                    image = self.wants_low_rank(self._layouts[param], upcoming, hyper, self._keys[param])
                    if image is not None:
                        wanted[param] = image
        return wanted

    def give_low_rank(self, images: Mapping[Tensor, Tensor]) -> None:
        """Hand over what `low_rank_wanted` asked for; the next step takes it.

        Args:
            images: parameter -> complete image, as much of it as this rank holds (see `LowRank.shape`).
        """
        self._images = {self._keys[param]: image for param, image in images.items()}

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
        return key in self._images

    def take_low_rank(self, key: int) -> Tensor | None:
        """The image that was handed over for the parameter of this number, once; None: its gradient is whole."""
        return self._images.pop(key, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_images", {})


def low_rank_gradient_of(
    view: ShardView, image: Tensor | None, low_rank: LowRank, left: Tensor | None, right: Tensor | None
) -> Request:
    """Request the image of a parameter's gradient, which resolves at once where an engine has reduced it already."""
    return low_rank.project(view.grad, left, right) if image is None else Sum(image, ())
