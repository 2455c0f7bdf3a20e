"""What pipeline parallelism needs so that a stage may train nothing, or something else than the other stages."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from colossal_bcd.block.trained import Trained
from colossal_bcd.engine.agreement import gathered
from colossal_bcd.engine.failures import says_where

logger = logging.getLogger(__name__)


class HybridModule(HybridParallelModule):
    """ColossalAI's module wrapper, for weights tied across stages that may be frozen.

    Attributes:
        engine: what averages the gradients; set by the plugin, if an optimizer is boosted with the model.
    """

    engine: Any = None

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate local gradients without communication."""
        with super().no_sync(), contextlib.nullcontext() if self.engine is None else self.engine.no_sync():
            yield

    def sync_dp_grads(self) -> None:
        """Average what `no_sync` has left over the data-parallel ranks."""
        if self.engine is None:
            super().sync_dp_grads()
        else:
            self.engine.sync_dp_grads()

    @says_where("forward")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def sync_shared_params(self) -> None:
        """Add the gradients of weights tied across stages, where they are trained now: on all their stages or none."""
        for shared, group in zip(self.shared_params, self.shared_param_process_groups, strict=True):
            param = shared.get(self.stage_manager.stage)
            if param is not None and param.requires_grad:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
                dist.all_reduce(param.grad, group=group)


def tied_elsewhere(model: HybridParallelModule) -> set[nn.Parameter]:
    """Parameters of this stage that an earlier stage holds, too: their gradient counts once, there."""
    if model.stage_manager is None:
        return set()
    stage = model.stage_manager.stage
    return {shared[stage] for shared in model.shared_params if stage in shared and stage != min(shared)}


def keep_output_differentiable(module: nn.Module) -> None:
    """Let backward reach this stage's output although nothing in or before the stage is trained now.

    The output is then a leaf that requires grad, so that the stage's backward pass ends there at no cost.
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        return tree_map(_differentiable, output)

    module.register_forward_hook(hook)


def _differentiable(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_(True)
    return value


def plan_stages(optimizer: Trained, held: set[nn.Parameter], pp_group: dist.ProcessGroup) -> None:
    """Give each pipeline stage blocks of its own, so that all stages train at all times, unless ranges were chosen.

    Where the blocks do not fall into stages (a block reaches over several stages, or the blocks are not in stage order)
    one block is active in the whole pipeline.
    """
    mine = [[optimizer.named_parameters[name] in held for name in block.parameters] for block in optimizer.blocks]
    everywhere = gathered(mine, pp_group)
    stages = [[stage for stage, has in enumerate(everywhere) if any(has[i])] for i in range(len(mine))]
    ranges: Sequence[tuple[int, int]] | None = optimizer.schedule.ranges
    if not optimizer.ranges_given:
        whole = [next((stage for stage, has in enumerate(everywhere) if all(has[i])), None) for i in range(len(mine))]
        ranges = _ranges_of(whole)
    if ranges is None:
        logger.warning("the blocks do not fall into pipeline stages; one block is active in the whole pipeline")
        ranges = optimizer.schedule.ranges
    optimizer.reschedule(ranges, stages)


def _ranges_of(owners: Sequence[int | None]) -> list[tuple[int, int]] | None:
    """Half-open ranges of blocks by stage, from the first stage that holds all of each block (None: there is none)."""
    known = [owner for owner in owners if owner is not None]
    if len(known) < len(owners) or known != sorted(known):
        return None
    return [(known.index(stage), known.index(stage) + known.count(stage)) for stage in sorted(set(known))]
