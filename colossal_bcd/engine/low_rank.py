"""Low-rank gradient reduction: what an engine does for optimizers that want images of gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.engine.config import EngineConfig
from colossal_bcd.engine.masters import ShardedMasters
from colossal_bcd.engine.reducer import GradientReducer
from colossal_bcd.engine.replicated_update import replicate
from colossal_bcd.low_rank import ReducedGradientOptimizer
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.state.rounding import LOW_PRECISION
from colossal_bcd.sharding import LowRankGradient, Mesh, Sum, resolve

logger = logging.getLogger(__name__)


class LowRankGradients:
    """Images on their way from backward to the step.

    Args:
        optimizer: that makes the steps; anything but an `ReducedGradientOptimizer` wants no images.
        config: of the engine.
        tied: parameters by pipeline stage, to whose gradients other stages add between backward and reduction.
        is_partial: whether tensor-parallel ranks have yet to add up what each has of a parameter's gradient.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        config: EngineConfig,
        tied: Sequence[Mapping[int, Parameter]],
        is_partial: Callable[[Parameter], bool] = lambda param: False,
    ) -> None:
        self._is_partial = is_partial
        options, max_norm = config.low_rank, config.max_norm
        exact = max_norm == 0 or options.clip_by_image
        self._optimizer = (
            optimizer if isinstance(optimizer, ReducedGradientOptimizer) and options.reduce and exact else None
        )
        if isinstance(optimizer, ReducedGradientOptimizer) and options.reduce and not exact and dist.get_rank() == 0:
            logger.warning(
                "whole gradients are reduced, because max_norm=%s clips by their norm. Low-rank images travel with "
                "max_norm=0 or low_rank=LowRankOptions(clip_by_image=True).",
                max_norm,
            )
        self._replicating: ReducedGradientOptimizer | None = None
        if isinstance(optimizer, ReducedGradientOptimizer) and options.gather:
            _require_replicas(optimizer, config)
            optimizer.replicated_updates = {}
            self._replicating = optimizer
        self._excluded = {param for stages in tied for param in stages.values()}
        self._images: dict[Parameter, LowRankGradient] = {}
        self.held: dict[Parameter, Tensor] = {}
        """Complete images of the coming step, as much of them as this rank holds; to be scaled in place."""

    @property
    def wanted(self) -> bool:
        """Whether images may travel instead of gradients."""
        return self._optimizer is not None

    def expect(self, reducer: GradientReducer, masters: Mapping[Parameter, Tensor]) -> None:
        """Tell the reducer what the next step wants, unless gradients of that step are under way already."""
        if self._optimizer is None or not reducer.pristine:
            return
        wanted = self._optimizer.low_rank_wanted()
        reducer.expect(
            {
                param: wanted[master]
                for param, master in masters.items()
                if master in wanted and param not in self._excluded and not self._is_partial(param)
            }
        )

    def take(self, reducer: GradientReducer) -> dict[Parameter, Tensor]:
        """This rank's part of the reduced images, which the reducer gives up."""
        self._images = {param: image for param, image in reducer.images.items() if param in reducer.grads}
        return {
            param: image.held(reducer.grads.pop(param), partitioned=reducer.config.partition and image.divided)
            for param, image in self._images.items()
        }

    def hand_over(self, parts: Mapping[Parameter, Tensor], masters: ShardedMasters, mesh: Mesh) -> None:
        """Add up images over shards and hand them to the optimizer.

        Args:
            parts: what `take` returned.
            masters: get a gradient of zeros without memory, which says that there is one.
            mesh: of the optimizer.
        """
        requests = []
        for param, part in parts.items():
            master = masters.of[param]
            master.grad = master.new_zeros(()).expand_as(master)
            requests.append(self._images[param].complete(part.to(master.device)))
        self.held = dict(zip(parts, resolve(requests, mesh), strict=True))
        if self._optimizer is not None:
            self._optimizer.give_low_rank({masters.of[param]: image for param, image in self.held.items()})

    def replicate(self, masters: ShardedMasters, bucket_size: int) -> set[Parameter]:
        """Apply low-rank updates on all replicas where that was asked for; the parameters that are done."""
        if self._replicating is None:
            return set()
        return replicate(self._replicating, masters, max(bucket_size // masters.num_shards, 1))

    def square_sum(self, param: Parameter) -> Sum:
        """Request the squared norm of a held image."""
        return self._images[param].square_sum(self.held[param])


def _require_replicas(optimizer: ReducedGradientOptimizer, config: EngineConfig) -> None:
    """Refuse what would gather weights all the same, or lose small updates."""
    if not config.zero_groups or config.master_weights or config.cpu_offload:
        raise ValueError(
            f"LowRankOptions(gather=True): got {len(config.zero_groups)} ZeRO groups, master_weights="
            f"{config.master_weights} and cpu_offload={config.cpu_offload}, expected ZeRO without master weights, on "
            "the device: replicas update their own weights. Use LowLevelZeroPlugin(stage=..., master_weights=False)."
        )
    for index, group in enumerate(optimizer.param_groups):
        low = any(param.dtype in LOW_PRECISION for param in group["params"])
        if low and group.get("rank") is not None and group.get("rounding", "nearest") != "stochastic":
            raise ValueError(
                f"LowRankOptions(gather=True): param group {index} rounds its 16-bit weights to nearest, expected "
                'rounding="stochastic". Without float32 masters small updates would be lost.'
            )


def prefers_whole_rows(optimizer: Optimizer) -> bool:
    """Whether the optimizer gains from slices that begin with a row: it has state of rows, columns or projections.

    State that has one value per value of the parameter gains nothing, and ColossalAI's checkpoints cut it evenly.
    """
    return isinstance(optimizer, ShardedOptimizer) and not optimizer.is_elementwise
