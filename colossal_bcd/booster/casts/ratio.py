"""The cast of BAdam's parameter-ratio form."""

from __future__ import annotations

import logging
from typing import Any

from colossal_bcd.block import BlockOptimizerRatio

logger = logging.getLogger(__name__)


def cast_ratio(theirs: Any) -> BlockOptimizerRatio:
    """Ours with hyper-parameters, names and param-group dicts of `badam.BlockOptimizerRatio`, whose hooks are removed.

    Raises:
        ValueError: it has taken steps.
    """
    if theirs.global_step:
        raise ValueError(
            f"BlockOptimizerRatio has taken {theirs.global_step} steps, whose moments a cast would lose, expected "
            "none. Boost before the first step."
        )
    named = list(theirs.named_parameters_list)
    for _, param in named:
        hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        for number in [number for number, hook in hooks.items() if hook is theirs.sparse_hook]:
            del hooks[number]
    ratios = {name: theirs.sparse_dict[param].get("update_ratio") for name, param in named}
    ours = BlockOptimizerRatio(
        theirs.param_groups,
        named,
        theirs.update_ratio,
        theirs.verbose,
        theirs.switch_every,
        theirs.preserve_threshold,
        {name: ratio for name, ratio in ratios.items() if ratio is not None},
        theirs.mask_mode,
        optimizer_defaults={name: theirs.defaults[name] for name in ("lr", "betas", "eps") if name in theirs.defaults},
        keep_mask=theirs.keep_mask,
        # Theirs has frozen already what it does not include.
        include_embedding=True,
        include_lm_head=True,
    )
    small = [name for name, param in named if param.requires_grad and param.numel() < theirs.preserve_threshold]
    if small:
        logger.warning(
            "badam's preserve_threshold has no effect; here tensors of fewer than %d values train whole, such as %s",
            theirs.preserve_threshold,
            small[0],
        )
    return ours
