"""Whether an optimizer of another package is right on what an engine gives it: other tensors, or parts of tensors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch.distributed as dist
from torch.optim import Optimizer, SparseAdam

from colossal_bcd.block.trained import Trained, trained_of
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.contract import CLOSE, examine, update_apart
from colossal_bcd.optim.foreign.elementwise import is_known_elementwise
from colossal_bcd.optim.foreign.twin import TwinError

logger = logging.getLogger(__name__)

Given: TypeAlias = Literal["parts", "wholes", "parameters"]
"""What an optimizer's groups will hold: parts of tensors, other but whole tensors, or the model's own parameters."""


def require_fit(optimizer: Optimizer, given: Given, subject: str, remedy: str) -> None:
    """Refuse an optimizer that would train wrongly on what it will hold; the same on every rank.

    It does not bear other tensors, keeps what no checkpoint would have, or needs whole tensors.

    Args:
        optimizer: the user's.
        given: see `Given`.
        subject: what it was given to, for errors.
        remedy: what to do with one that needs whole tensors.
    """
    trained = trained_of(optimizer)
    base, plain = trained.base_optimizer, trained.plan.is_whole
    as_it_is = given == "parameters" and plain and not isinstance(base, SparseAdam)  # no gradients are sparse
    if isinstance(base, ShardedOptimizer) or as_it_is:
        return
    contract = examine(base) if plain else trained.active_set.contract
    contract.require_exchangeable(subject)
    if contract.attributes:
        raise ValueError(
            f"{subject}: got {contract.name}, whose steps change its attributes "
            f"{', '.join(map(repr, contract.attributes))}, expected an optimizer that keeps all it needs in its state "
            "and param groups, as only these are in a checkpoint. Take another one, such as torch.optim.AdamW."
        )
    if plain and base.state and not contract.is_new(base):
        raise ValueError(
            f"{subject}: got {contract.name} with state of {len(base.state)} parameters, expected none: it would be "
            "lost. Boost before the first step, and load a saved state afterwards."
        )
    if contract.draws and dist.get_world_size() > 1:
        raise ValueError(
            f"{subject}: got {contract.name}, whose steps draw random numbers, expected one that computes the same on "
            "every rank. Take another one, such as torch.optim.AdamW."
        )
    if given == "parts" and not is_known_elementwise(base):
        _require_elementwise(contract.name, trained, subject, remedy)


def _require_elementwise(name: str, trained: Trained, subject: str, remedy: str) -> None:
    try:
        with _members(trained):
            apart = update_apart(trained.base_optimizer)
    except TwinError as error:
        logger.warning(
            "%s could not be tried (%s): right only if its update of a value needs that value alone", name, error
        )
        return
    if not apart <= CLOSE:
        raise ValueError(
            f"{subject}: got {name}, whose update of a value needs more than that value and its gradient (steps on "
            f"halves of tensors are off by {apart:.1g}), expected an element-wise one, as its tensors are divided over "
            f"ranks. {remedy}"
        )
    logger.info("%s: tried on small tensors and their halves, its update is element-wise", name)


@contextlib.contextmanager
def _members(trained: Trained) -> Iterator[None]:
    """All parameters in the groups, not those of the active block alone."""
    groups = trained.base_optimizer.param_groups
    active = [group["params"] for group in groups]
    try:
        for group, members in zip(groups, trained.members, strict=True):
            group["params"] = members
        yield
    finally:
        for group, params in zip(groups, active, strict=True):
            group["params"] = params
