"""ColossalAI's GaLore: its names and calls, our rule."""

from __future__ import annotations

from typing import Any

from torch import nn

from colossal_bcd.low_rank.projection import ProjectionType
from colossal_bcd.names import Pattern, plain_name

_NO_DECAY = (Pattern("bias"), Pattern("LayerNorm.weight"))


def get_galore_param_groups(
    model: nn.Module,
    weight_decay: float | None = None,
    rank: int = 256,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: ProjectionType = "std",
    *,
    decay: float | None = None,
) -> list[dict[str, Any]]:
    """ColossalAI's param groups: all matrices are projected, embeddings and head included.

    Biases and parameters "LayerNorm.weight" are not decayed; both are matched as whole components of a name.  A matrix
    with a side below the rank is projected with that side as its rank, as there.  Empty groups are left out, which
    ColossalAI's plugins cannot take.  `colossal_bcd.param_groups` projects neither embeddings nor heads, takes patterns
    and refuses a rank that is too large.

    Args:
        model: all its parameters are in the groups, under their names in `param_names`.
        weight_decay: of everything but biases and LayerNorm weights.
        rank: of the projection (see `Projection`).
        update_proj_gap: steps between refreshes of the projector.
        scale: factor of the projected update.
        proj_type: which dim is projected (see `Projection`).
        decay: the name that ColossalAI's tutorial has for `weight_decay`.
    Raises:
        TypeError: not exactly one of `weight_decay` and `decay` is given.
    """
    if (weight_decay is None) == (decay is None):
        raise TypeError(
            f"get_galore_param_groups: got weight_decay={weight_decay} and decay={decay}, expected exactly one of them"
        )
    decayed = {"weight_decay": decay if weight_decay is None else weight_decay}
    projection = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    groups: list[dict[str, Any]] = [
        {**projection, "clamp": True, **decayed},
        {**decayed},
        {"weight_decay": 0.0},
    ]
    for group in groups:
        group.update(params=[], param_names=[])
    for name, param in model.named_parameters():
        group = groups[0 if param.dim() == 2 else 1]
        if any(pattern.matches(name) for pattern in _NO_DECAY):
            group = groups[2]
        group["params"].append(param)
        group["param_names"].append(plain_name(name))
    return [group for group in groups if group["params"]]
