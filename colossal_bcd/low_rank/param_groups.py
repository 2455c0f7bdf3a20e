"""Param groups for GaLore and GoLore from the names of a model's parameters."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn
from torch.nn import Parameter

from colossal_bcd.low_rank import GaLoreAdamW
from colossal_bcd.low_rank.projection import ProjectionType
from colossal_bcd.names import Pattern, plain_name, role_of
from colossal_bcd.optim import StateSpec

logger = logging.getLogger(__name__)

Text: TypeAlias = str | re.Pattern[str]
"""A pattern as the user writes it."""
Names: TypeAlias = Mapping[Parameter, Sequence[str]]
"""Every trainable tensor once, with all its names; the first one is canonical."""


def param_groups(
    model: nn.Module,
    target_modules: Text | Iterable[Text] | None = None,
    *,
    rank: int,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: ProjectionType = "std",
    include_embedding: bool = False,
    include_lm_head: bool = False,
    clamp: bool = False,
) -> list[dict[str, Any]]:
    """Param groups for the GaLore and GoLore optimizers: the matrices to project, and everything else.

    Patterns are whole components of names ("q_proj", "layers.1") or regular expressions (docs/names.md).  Tensors of
    fewer than two dims that a pattern matches are not projected.  Tied weights are one tensor under several names and
    come once.  One line with counts and bytes is logged.

    Args:
        model: its trainable parameters are in the groups, under their names in `param_names`.
        target_modules: patterns of what is projected; None: every tensor of two or more dims except embeddings and
            heads.  Embeddings and heads that a pattern matches are projected.
        rank: of the projection (see `Projection`).
        update_proj_gap: steps between refreshes of the projector.
        scale: factor of the projected update.
        proj_type: which dim is projected (see `Projection`).
        include_embedding: project embeddings, too; only without `target_modules`.
        include_lm_head: project the head, too; only without `target_modules`.
        clamp: project a matrix with a shorter side with that side as its rank.
    Returns:
        One or two groups, without empty ones.
    Raises:
        TypeError: a pattern is neither a string nor a compiled regular expression.
        ValueError: a pattern matches no trainable tensor of two or more dims, the rank is larger than a side of one
            that it matches, or there is nothing to project.
    """
    names = _trainable(model)
    if target_modules is None:
        chosen = _by_default(model, names, include_embedding, include_lm_head)
    else:
        if include_embedding or include_lm_head:
            raise ValueError(
                f"param_groups: got include_embedding={include_embedding}, include_lm_head={include_lm_head} together "
                "with target_modules, expected one or the other. Name embedding and head in target_modules."
            )
        chosen = _by_pattern(model, names, target_modules)
    if not chosen:
        raise ValueError(
            f"param_groups: {type(model).__name__} has no trainable tensor of two or more dims besides embeddings and "
            "heads, expected one to project. Pass include_embedding=True, or name it in target_modules."
        )
    projection = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    if clamp:
        projection["clamp"] = True
    groups = [
        {"params": members, "param_names": [names[param][0] for param in members], **options}
        for members, options in (
            (chosen, projection),
            ([param for param in names if param not in set(chosen)], {}),
        )
        if members
    ]
    _summarise(groups, rank)
    return groups


def _trainable(model: nn.Module) -> Names:
    names: dict[Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            names.setdefault(param, []).append(plain_name(name))
    return names


def _by_default(model: nn.Module, names: Names, embedding: bool, head: bool) -> list[Parameter]:
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    chosen = []
    for param, own in names.items():
        kinds = {role_of(name).kind for name in own}
        is_table, is_head = param in tables or "embedding" in kinds, "head" in kinds
        # A head that is tied to the embedding is both: either word asks for it.
        asked = (embedding and is_table) or (head and is_head) or not (is_table or is_head)
        if param.dim() >= 2 and asked:
            chosen.append(param)
    return chosen


def _by_pattern(model: nn.Module, names: Names, texts: Text | Iterable[Text]) -> list[Parameter]:
    listed = [texts] if isinstance(texts, (str, re.Pattern)) else texts
    chosen: set[Parameter] = set()
    for pattern in [Pattern(text, "expression", "target_modules") for text in listed]:
        found = {param for param, own in names.items() if any(map(pattern.matches, own))}
        matrices = {param for param in found if param.dim() >= 2}
        if not matrices:
            pattern.select(name for name, _ in model.named_parameters(remove_duplicate=False))
            what, expected = "frozen parameters only", "a trainable one"
            if found:
                what, expected = "tensors of fewer than two dims only, which are not projected", "a matrix"
            raise ValueError(f"{pattern} matches {what}, expected {expected}. Leave it out.")
        chosen |= matrices
    return [param for param in names if param in chosen]


def _summarise(groups: list[dict[str, Any]], rank: int) -> None:
    """Log one line; the optimizer that counts the bytes allocates nothing, and refuses a rank that is too large."""
    counter = GaLoreAdamW([dict(group) for group in groups])
    held = [(group, param) for group in counter.param_groups for param in group["params"]]
    ours = sum(
        spec.num_bytes(param.dtype)
        for group, param in held
        for spec in counter.state_spec(counter.layout_of(param), counter.hyper_of(group)).values()
    )
    plain = sum(2 * StateSpec.like(counter.layout_of(param)).num_bytes(param.dtype) for _, param in held)
    matrices, rest = groups[0]["params"], groups[1]["params"] if len(groups) > 1 else []
    logger.info(
        "param_groups: %d matrices with %d of %d parameters are projected to rank %d; %d tensors, %d of them of fewer "
        "than two dims, are not; GaLoreAdamW's state is %d bytes, AdamW's %d",
        len(matrices),
        sum(param.numel() for param in matrices),
        sum(param.numel() for _, param in held),
        rank,
        len(rest),
        sum(param.dim() < 2 for param in rest),
        ours,
        plain,
    )
