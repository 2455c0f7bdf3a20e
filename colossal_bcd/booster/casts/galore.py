"""Casts from galore_torch's and ColossalAI's GaLore optimizers (see `registry`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from colossal_bcd.booster.distributed import require_options
from colossal_bcd.low_rank import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit

logger = logging.getLogger(__name__)

Group = Mapping[str, Any]

CLAMPED = {"clamp": True}
"""The originals take as many singular vectors as there are, if these are fewer than the rank."""


def _adamw(optimizer: Any, group: Group) -> dict[str, Any]:
    return CLAMPED


def _adafactor(optimizer: Any, group: Group) -> dict[str, Any]:
    """As for other Adafactors: relative_step ignores the group's lr, which may be a scheduler's."""
    if group["relative_step"]:
        return {"lr": None, **CLAMPED}
    return {"lr": 0.0, **CLAMPED} if group["lr"] is None and group is optimizer.defaults else CLAMPED


def _galore_torch_8bit(optimizer: Any, group: Group) -> dict[str, Any]:
    """It passes percentile_clipping and block_wise by place, where bitsandbytes 0.50 has max_unorm and skip_zeros."""
    args = vars(optimizer.args)
    return _bits(
        optimizer,
        {"percentile_clipping": args.get("max_unorm", 100), "block_wise": args.get("skip_zeros", True), **args},
    )


def _colossalai_8bit(optimizer: Any, group: Group) -> dict[str, Any]:
    if group is optimizer.defaults:  # once, not for every group
        logger.warning(
            "ColossalAI's GaLore multiplies every tensor-parallel shard by the first rows of the basis, trains without "
            "ZeRO and writes a gradient to grad.pt; it is cast to the GaLore of the paper, which projects the whole "
            "matrix and does neither"
        )
    return _bits(optimizer, {"percentile_clipping": 100, "block_wise": True, **vars(optimizer.args)})


def _bits(optimizer: Any, args: Group) -> dict[str, Any]:
    options = {"is_paged": optimizer.is_paged, **args}
    return {**require_options(type(optimizer).__name__, options), **CLAMPED}


CASTS: dict[str, tuple[Any, Callable[[Any, Group], dict[str, Any]]]] = {
    # The names of the classes themselves; the package exports them as GaLoreAdamW and so on.
    "galore_torch.AdamW": (GaLoreAdamW, _adamw),
    "galore_torch.AdamW8bit": (GaLoreAdamW8bit, _galore_torch_8bit),
    "galore_torch.Adafactor": (GaLoreAdafactor, _adafactor),
    "colossalai.nn.optimizer.GaLoreAdamW8bit": (GaLoreAdamW8bit, _colossalai_8bit),
    "colossalai.nn.optimizer.DistGaloreAwamW": (GaLoreAdamW8bit, _colossalai_8bit),
}
"""As `registry.CASTS`."""
