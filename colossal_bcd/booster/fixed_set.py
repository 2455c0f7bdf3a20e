"""Engines of torch and ColossalAI that train what required grad when they were made, and nothing that comes later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

REMEDY = (
    "Boost with them trainable and freeze them afterwards (torch's DDP then asks for find_unused_parameters=True), or "
    "use LowLevelZeroPlugin or HybridParallelPlugin of colossal_bcd.booster, which follow."
)


def frozen_in(model: Any, optimizer: Any, *, sharded: bool) -> list[Parameter]:
    """Parameters that an engine about to be made will not average because they are frozen.

    Args:
        model: before the engine is made.
        optimizer: of it.
        sharded: see `refuse_newcomers`; those of the optimizer are asked for then, else those of the model.
    """
    if not isinstance(optimizer, Optimizer):
        return []
    module: nn.Module = model.unwrap(unwrap_peft=False) if hasattr(model, "unwrap") else model
    held = [param for group in optimizer.param_groups for param in group["params"]]
    return [param for param in (held if sharded else module.parameters()) if not param.requires_grad]


def refuse_newcomers(
    optimizer: Optimizer, frozen: Iterable[Parameter], names: Mapping[int, str], *, sharded: bool
) -> None:
    """Let every step look for weights that were thawed or added since the engine was made.

    Their gradients would be those of one rank's batch alone, or be used by nobody.  The step raises ValueError on every
    rank where they are found.

    Args:
        optimizer: that makes the steps; its groups are the engine's.
        frozen: see `frozen_in`.
        names: of all parameters, by id.
        sharded: the groups hold tensors of the engine's own, to which no others may come.
    """
    frozen = list(frozen)
    members = {param for group in optimizer.param_groups for param in group["params"]} if sharded else None

    def look(stepped: Optimizer, _args: Any, _kwargs: Any) -> None:
        held = {param for group in stepped.param_groups for param in group["params"]}
        late = [param for param in frozen if param.requires_grad and (sharded or param in held)]
        if members is not None:
            late += [param for param in held - members if param not in late]
        if late:
            listed = [names.get(id(param), f"one of shape {tuple(param.shape)}") for param in late]
            raise ValueError(
                f"{len(late)} weights were thawed or added after boosting, such as {listed[0]}; got them in a step of "
                f"an engine that trains only what required grad when it was made, expected none. {REMEDY}"
            )

    optimizer.register_step_pre_hook(look)
