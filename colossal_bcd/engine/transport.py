"""How gradients travel from backward to the step, and updated weights to replicas; chosen once per engine.

    WholeGradients     the gradient is averaged, and masters get this rank's part of it
    KeptGradients      so is it, and the averages accumulate over steps until `zero_grad`
    LowRankGradients   a low-rank gradient is averaged instead between refreshes; low-rank updates may be gathered
                       instead of weights

W: ranks that share masters and states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.engine.config import EngineConfig
from colossal_bcd.engine.masters import ShardedMasters, gather_rows
from colossal_bcd.engine.reducer import GradientReducer
from colossal_bcd.low_rank import ReducedGradientOptimizer, ReplicatedUpdate
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.state.rounding import LOW_PRECISION, round_into
from colossal_bcd.sharding import Layout, LowRankGradient, Mesh, Request, resolve, sum_of_squares, wide
from colossal_bcd.sharding.packing import pack

logger = logging.getLogger(__name__)


class WholeGradients:
    """Every gradient travels whole, and every weight is gathered; the others do all of this with exceptions.

    Args:
        config: of the engine.
        accumulates: weights that are their own masters keep their gradients, on which the next backward pass adds.
        replicates: makes low-rank updates that are gathered instead of weights; None: there are none.
    """

    def __init__(self, config: EngineConfig, *, accumulates: bool, replicates: ReducedGradientOptimizer | None) -> None:
        self._partition, self._accumulates, self._replicates = config.partition_grad, accumulates, replicates
        if replicates is not None:
            _require_replicas(replicates, config)
            replicates.replicated_updates = {}

    def expect(self, reducer: GradientReducer, masters: Mapping[Parameter, Tensor]) -> None:
        """Tell the reducer what the next step wants, unless gradients of that step are under way already."""

    def rescale(self, reducer: GradientReducer, loss_scale: float) -> None:
        """Start of a backward pass: averages that stay from earlier passes get its loss scale."""

    def load(self, reducer: GradientReducer, masters: ShardedMasters, mesh: Mesh) -> None:
        """Move the averages, which the reducer gives up, to where the rule finds them."""
        masters.load_gradients(reducer.grads, partitioned=self._partition)

    def gradient(self, param: Parameter, master: Tensor) -> Tensor | None:
        """What the rule takes of a parameter in this step, to be scaled in place; None if it has no gradient."""
        return master.grad

    def square_sum(self, param: Parameter, grad: Tensor, layout: Layout) -> Request:
        """Request the squared norm of a whole gradient; `grad` is what `gradient` returned, `layout` its master's."""
        return sum_of_squares(grad.view(-1)[: layout.num_local], layout.axes)

    def drop(self, reducer: GradientReducer, masters: ShardedMasters, norm: Tensor | None) -> bool:
        """Free the masters' gradients after the rule; zeros without memory go on saying which parameters had one.

        torch keeps gradients until `zero_grad`, and transformers' AdafactorSchedule looks for them.

        Args:
            reducer: whose `grads` the step has emptied; gets those that stay.
            masters: of the engine.
            norm: scalar, of the step's gradients before clipping.
        Returns:
            Whether some are used up.
        """
        consumed = False
        for param, master in masters.of.items():
            if master.grad is None:
                continue
            if self._accumulates and master.data_ptr() == param.data_ptr():
                reducer.grads[param] = master.grad.view(-1)
            else:
                consumed = True
            master.grad = says_there_is_one(master)
        return consumed

    def replicate(self, masters: ShardedMasters, bucket_size: int) -> set[Parameter]:
        """Apply low-rank updates on all replicas where that was asked for; the parameters that are done."""
        if self._replicates is None:
            return set()
        return _replicate(self._replicates, masters, max(bucket_size // masters.num_shards, 1))


class KeptGradients(WholeGradients):
    """A step leaves averages where they are, as ColossalAI's gradient store and torch do."""

    def __init__(self, config: EngineConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._max_norm = config.max_norm
        self._averages: dict[Parameter, Tensor] = {}
        self._scale = 1.0

    def rescale(self, reducer: GradientReducer, loss_scale: float) -> None:
        if loss_scale != self._scale and reducer.grads:
            torch._foreach_mul_(list(reducer.grads.values()), loss_scale / self._scale)
        self._scale = loss_scale

    def load(self, reducer: GradientReducer, masters: ShardedMasters, mesh: Mesh) -> None:
        self._averages = dict(reducer.grads)
        super().load(reducer, masters, mesh)

    @torch.no_grad()
    def drop(self, reducer: GradientReducer, masters: ShardedMasters, norm: Tensor | None) -> bool:
        """Put the averages back, clipped where masters have the gradients' dtype, as ColossalAI does."""
        averages, self._averages = self._averages, {}
        shared, others = list[Tensor](), list[Tensor]()
        for param, average in averages.items():
            grad = masters.of[param].grad
            if grad is None or grad.dtype != average.dtype:
                continue
            same = grad.untyped_storage().data_ptr() == average.untyped_storage().data_ptr()
            (shared if same else others).append(average)
        if shared and self._scale != 1:
            torch._foreach_mul_(shared, self._scale)
        if others and self._max_norm > 0 and norm is not None:
            torch._foreach_mul_(others, (self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        reducer.grads.update(averages)
        super().drop(reducer, masters, norm)
        return False


class LowRankGradients(WholeGradients):
    """Low-rank gradients travel where the optimizer wants them.

    Gradients of `excluded` parameters travel whole in any case, because other ranks have yet to add to them.
    """

    def __init__(
        self,
        optimizer: ReducedGradientOptimizer,
        excluded: Callable[[Parameter], bool],
        config: EngineConfig,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        self._optimizer, self._excluded = optimizer, excluded
        self._wanted: dict[Parameter, LowRankGradient] = {}
        self._grads: dict[Parameter, Tensor] = {}
        """Complete low-rank gradients of the coming step, as much of them as this rank has."""

    def expect(self, reducer: GradientReducer, masters: Mapping[Parameter, Tensor]) -> None:
        if reducer.pristine:
            wanted = self._optimizer.low_rank_wanted()
            chosen = [(param, of) for param, of in masters.items() if of in wanted and not self._excluded(param)]
            reducer.expect({param: wanted[of] for param, of in chosen})

    def load(self, reducer: GradientReducer, masters: ShardedMasters, mesh: Mesh) -> None:
        """Add up low-rank gradients over shards and hand them to the optimizer; masters say only that there is one."""
        self._wanted = {param: low_rank for param, low_rank in reducer.low_rank.items() if param in reducer.grads}
        shares = {
            param: low_rank.of_slice(reducer.grads.pop(param), partitioned=self._partition and low_rank.divided)
            for param, low_rank in self._wanted.items()
        }
        super().load(reducer, masters, mesh)
        requests = []
        for param, share in shares.items():
            master = masters.of[param]
            master.grad = says_there_is_one(master)
            requests.append(self._wanted[param].complete(share.to(master.device)))
        self._grads = dict(zip(shares, resolve(requests, mesh), strict=True))
        self._optimizer.give_low_rank({masters.of[param]: grad for param, grad in self._grads.items()})

    def gradient(self, param: Parameter, master: Tensor) -> Tensor | None:
        return self._grads.get(param, master.grad)

    def square_sum(self, param: Parameter, grad: Tensor, layout: Layout) -> Request:
        if param in self._grads:
            return self._wanted[param].square_sum(grad)
        return super().square_sum(param, grad, layout)

    def drop(self, reducer: GradientReducer, masters: ShardedMasters, norm: Tensor | None) -> bool:
        self._grads.clear()
        return super().drop(reducer, masters, norm)


def transport_of(
    optimizer: Optimizer,
    config: EngineConfig,
    tied: Sequence[Mapping[int, Parameter]],
    is_partial: Callable[[Parameter], bool] = lambda param: False,
    *,
    plain: bool,
) -> WholeGradients:
    """How the gradients of an optimizer travel.

    Args:
        optimizer: that makes the steps.
        config: of the engine.
        tied: parameters by pipeline stage, to whose gradients other stages add between backward and reduction.
        is_partial: whether tensor-parallel ranks have yet to add up what each has of a parameter's gradient.
        plain: the optimizer trains the same parameters all the time, so that gradients may stay until `zero_grad`.
    Raises:
        ValueError: low-rank updates are to be gathered, and replicas could not apply them.
    """
    projecting = optimizer if isinstance(optimizer, ReducedGradientOptimizer) else None
    asked = projecting is not None and config.low_rank.reduce
    exact = config.max_norm == 0 or config.low_rank.clip_by_image
    if asked and not exact and dist.get_rank() == 0:
        logger.warning(
            "whole gradients are reduced, because max_norm=%s clips by their norm. Low-rank gradients travel with "
            "max_norm=0 or low_rank=LowRankOptions(clip_by_image=True).",
            config.max_norm,
        )
    replicates = projecting if config.low_rank.gather else None
    if projecting is not None and asked and exact:
        shared = {param for stages in tied for param in stages.values()}

        def excluded(param: Parameter) -> bool:
            return param in shared or is_partial(param)

        return LowRankGradients(projecting, excluded, config, accumulates=False, replicates=replicates)
    kind = KeptGradients if plain and config.keep_gradients else WholeGradients
    return kind(config, accumulates=plain and not config.zero_groups, replicates=replicates)


def prefers_whole_rows(optimizer: Optimizer) -> bool:
    """Whether the optimizer gains from slices that begin with a row: it has state of rows, columns or projections.

    State that has one value per value of the parameter gains nothing, and ColossalAI's checkpoints slice it evenly.
    """
    return isinstance(optimizer, ShardedOptimizer) and not optimizer.is_elementwise


def says_there_is_one(master: Tensor) -> Tensor:
    """A gradient of zeros without memory, for a master whose gradient a step has used up."""
    return master.new_zeros(()).expand_as(master)


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


@torch.no_grad()
def _replicate(optimizer: ReducedGradientOptimizer, masters: ShardedMasters, bucket_size: int) -> set[Parameter]:
    """Apply the low-rank updates of the step just made to whole shards, the same on all W ranks; what is done.

    Every rank computes from the same gathered values by the same operations and rounds with the same random stream, so
    replicas stay bitwise equal.  A float32 copy of one shard at a time exists.  Masters get their parts of the weights.
    `bucket_size` is the largest number of values that a rank sends in one collective.
    """
    made, optimizer.replicated_updates = optimizer.replicated_updates or {}, {}
    updates = {
        param: made[optimizer.key_of(master)]
        for param, master in masters.of.items()
        if optimizer.key_of(master) in made
    }
    streams = optimizer.streams()

    def numel(param: Parameter) -> int:
        return updates[param].gradient.part_numel

    for bucket in pack(updates, numel, bucket_size, lambda param: param.dtype):
        steps = _gather({param: updates[param] for param in bucket}, masters.groups)
        for param, step in zip(bucket, steps, strict=True):
            _update(param, masters.shard_layout(param), updates[param], step, streams.get(masters.of[param]))
    masters.active_set.follow(updates)
    return set(updates)


def _gather(bucket: dict[Parameter, ReplicatedUpdate], groups: Sequence[dist.ProcessGroup]) -> list[Tensor]:
    """Whole low-rank updates of the shards, in the dtype of their arithmetic.

    16-bit weights are updated by steps rounded to bfloat16, 2^-9 of themselves at most: float16 would flush small ones.
    What all ranks have in full does not travel, but is rounded alike.
    """
    first = next(iter(bucket))
    dtype = torch.bfloat16 if first.dtype in LOW_PRECISION else first.dtype
    shares = [update.gradient.padded(update.step) for update in bucket.values() if update.gradient.divided]
    row = torch.cat(
        [torch.empty(0, dtype=dtype, device=first.device), *(share.to(first.device, dtype) for share in shares)]
    )
    rows = iter(())
    if shares:
        buffer, work = gather_rows(row, groups)
        if work is not None:
            work.wait()
        rows = iter(buffer.split([len(share) for share in shares], dim=1))
    return [
        (u.gradient.joined(next(rows)) if u.gradient.divided else u.step.to(first.device, dtype)).to(wide(first.dtype))
        for u in bucket.values()
    ]


def _update(param: Parameter, layout: Layout, update: ReplicatedUpdate, step: Tensor, stream: int | None) -> None:
    target = param.data.view(-1)[: layout.num_local]
    weight = target.to(wide(target.dtype))
    update.apply(weight, step)
    if stream is not None:
        round_into(target, weight, layout, stream)
    elif weight is not target:
        target.copy_(weight)
