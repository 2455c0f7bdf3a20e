"""Names of optimizers on the command line, and the optimizers that they mean."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

import colossal_bcd
from colossal_bcd.low_rank import ReducedGradientOptimizer


@dataclass(frozen=True)
class Choice:
    """What a name means."""

    cls: str
    """Public name of the class."""
    blocks: int = 0
    """Layers of a block if the user says nothing; 0: all parameters train at once."""
    lora: bool = False
    """Whether adapters train instead of the weights."""
    options: Mapping[str, Any] | None = None


LATE = 10_000
"""Step from which GoLore draws its bases; bytes and traffic do not depend on it."""
SHORT: Mapping[str, Choice] = {
    "badam": Choice("AdamW", blocks=1),
    "galore": Choice("GaLoreAdamW"),
    "galore-8bit": Choice("GaLoreAdamW8bit"),
    "golore": Choice("GoLoreAdamW"),
    "adamw-8bit": Choice("AdamW", options={"moment_bits": 8}),
    "lora": Choice("AdamW", lora=True),
}


def choices() -> dict[str, Choice]:
    """All names: the short ones, and every class in lower case."""
    optimizers = [name for name in colossal_bcd.__all__ if _is_optimizer(name)]
    return {**SHORT, **{name.lower(): Choice(name) for name in optimizers}}


def choice_of(name: str) -> Choice:
    """What a name means.

    Raises:
        ValueError: nothing.
    """
    known = choices()
    if name.lower() not in known:
        closest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
        raise ValueError(f"--optimizer: got {name!r}, expected one of {', '.join(known)}. Closest is {closest}.")
    return known[name.lower()]


def ready(
    model: nn.Module, name: str, *, rank: int, blocks: int | None, lr: float, period: int = 50
) -> tuple[nn.Module, Optimizer]:
    """The optimizer of a name over a model, and the model, which LoRA wraps.

    Args:
        model: in whole parameters, with or without memory.
        name: see `choices`.
        rank: of low-rank projections and adapters; matrices with a shorter side are projected to that.
        blocks: layers of a block, 0 for none; None: as the name means.
        lr: of all parameters.
        period: steps of a block.
    Raises:
        ValueError: there is no such optimizer, or it does not go with blocks.
        ImportError: a library that it needs is missing.
    """
    choice = choice_of(name)
    size = choice.blocks if blocks is None else blocks
    cls: Any = getattr(colossal_bcd, choice.cls)
    if choice.lora:
        if size:
            raise ValueError("--blocks: got it with lora, expected one of the two. Leave --blocks out.")
        model = _with_adapters(model, rank)
    params: Any = [param for param in model.parameters() if param.requires_grad]
    if issubclass(cls, ReducedGradientOptimizer):
        said = logging.getLogger("colossal_bcd.low_rank.param_groups")
        level = said.level
        said.setLevel(logging.WARNING)
        try:
            params = colossal_bcd.param_groups(model, rank=rank, clamp=True)
        finally:
            said.setLevel(level)
    options = dict(choice.options or {})
    if "relative_step" in inspect.signature(cls).parameters:
        options["relative_step"] = False
    if choice.cls.startswith("GoLore"):
        options["random_from_step"] = LATE
    base: Optimizer = cls(params, lr=lr, **options)
    if size == 0:
        return model, base
    return model, colossal_bcd.BlockOptimizer(
        base, list(model.named_parameters()), switch_mode="ascending", switch_block_every=period,
        n_layer_per_block=size, verbose=0,
    )  # fmt: skip


def _is_optimizer(name: str) -> bool:
    cls = getattr(colossal_bcd, name)
    return isinstance(cls, type) and issubclass(cls, Optimizer) and not name.startswith("Block")


def _with_adapters(model: nn.Module, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model  # type: ignore[attr-defined]
    except ModuleNotFoundError:
        raise ImportError("lora needs peft. Run: pip install 'colossal_bcd[trainer]'") from None
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    return adapted
