"""What each `--method` makes of a model, and the plugins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from predecessors import original_of
from records import DataError
from torch import nn
from torch.optim import Optimizer

from colossal_bcd import (
    CAME,
    SGD,
    Adafactor,
    AdamW,
    BlockOptimizer,
    BlockOptimizerRatio,
    GaLoreAdamW,
    GaLoreSGD,
    GoLoreAdamW,
    GoLoreSGD,
    Lamb,
    param_groups,
)

BLOCKWISE = ("badam", "bread-sgd", "bread-sign", "bread-lora")
GOLORE = ("golore", "golore-sgd")
PROJECTED = ("galore", "galore-sgd", *GOLORE)
WITH_MOMENTUM = ("sgd", "galore-sgd", "golore-sgd")
ADAPTED = ("lora", "bread-lora")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hyper-parameters of all methods; each takes those that it has."""

    lr: float
    steps: int
    """Of the whole run: GoLore's bases are random from a fraction of it on."""
    period: int
    """Steps on one block, on one share, and between refreshes of projectors."""
    rank: int = 16
    """Of projections."""
    scale: float = 1.0
    """Factor of projected updates."""
    rand_ratio: float = 0.8
    """Fraction of the steps after which GoLore's bases are random."""
    targets: list[str] | None = None
    """What is projected, as of `param_groups`; None: every matrix but embeddings and head."""
    switch_mode: Any = "random"
    """Order of blocks."""
    blocks: list[list[str]] | None = None
    """Blocks as of `BlockOptimizer`; None: one for each layer."""
    always: tuple[str, ...] = ()
    """Prefixes of what trains beside every block."""
    momentum: float = 0.9
    """Of SGD and its low-rank forms."""
    dampening: float = 0.0
    """Of the same."""
    weight_decay: float = 0.0
    seed: int = 0
    implementation: str = "ours"
    """Or "original": the package that ours replaces, as of `predecessors.py`."""


def or_else(flags: Mapping[str, Any], flag: str, otherwise: Any) -> Any:
    """A flag, or what a program takes for it where it is left out."""
    return otherwise if flags[flag] is None else flags[flag]


def refuse_flags(
    method: str, flags: Mapping[str, Any], only: Mapping[str, tuple[str, ...]], offered: Iterable[str]
) -> None:
    """Refuse flags that are about other methods.

    Args:
        method: what trains.
        flags: by name; None: left out.
        only: the methods that a flag is about.
        offered: methods of the program.
    Raises:
        DataError: one was given.
    """
    for flag, methods in only.items():
        if flags[flag] is not None and method not in methods:
            raise DataError(
                f"--{flag} is about {', '.join(each for each in offered if each in methods)}, got {method}. Leave it "
                "out."
            )


def with_adapters(method: str, model: Any, rank: int) -> Any:
    """The model, with adapters where the method trains them."""
    if method not in ADAPTED:
        return model
    from peft.mapping import get_peft_model
    from peft.tuners.lora import LoraConfig

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    dtype = next(model.parameters()).dtype
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)).to(dtype)


def optimizer_of(method: str, model: nn.Module, options: Options) -> Optimizer:
    """The optimizer of a method.

    Args:
        method: "badam", "bread-sgd", "bread-sign", "bread-lora", "ratio", "galore", "galore-sgd", "golore",
            "golore-sgd", "lora", "adamw", "sgd", "came", "adafactor" or "lamb".
        model: with adapters, where the method has some.
        options: its hyper-parameters.
    """
    if options.implementation == "original":
        return original_of(method, model, options)
    if method in BLOCKWISE:
        return _blockwise(method, model, options)
    if method == "ratio":
        named = list(model.named_parameters())
        groups = [{"params": [param for _, param in named]}]
        return BlockOptimizerRatio(
            groups, named, update_ratio=0.1, switch_every=options.period, lr=options.lr, verbose=0
        )
    given: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if method in WITH_MOMENTUM:
        given.update(momentum=options.momentum, dampening=options.dampening)
    if method in GOLORE:
        given.update(total_steps=options.steps, rand_ratio=options.rand_ratio)
    params: Iterable[Any] = [param for param in model.parameters() if param.requires_grad]
    if method in PROJECTED:
        params = param_groups(
            model,
            options.targets,
            rank=options.rank,
            update_proj_gap=options.period,
            scale=options.scale,
            clamp=True,
        )
        given["seed"] = options.seed
    makers: dict[str, Any] = {
        "adamw": AdamW,
        "lora": AdamW,
        "sgd": SGD,
        "came": CAME,
        "adafactor": partial(Adafactor, relative_step=False),
        "lamb": Lamb,
        "galore": GaLoreAdamW,
        "galore-sgd": GaLoreSGD,
        "golore": GoLoreAdamW,
        "golore-sgd": GoLoreSGD,
    }
    made: Optimizer = makers[method](params, **given)
    return made


def _blockwise(method: str, model: nn.Module, options: Options) -> BlockOptimizer:
    forms: dict[str, dict[str, Any]] = {
        "badam": {},
        "bread-sgd": {"sgd_mode": "all", "sgd_lr_scaling": 1.0},
        "bread-sign": {"sgd_mode": "all", "sgd_lr_scaling": 0.01, "sgd_use_sign": True},
        "bread-lora": {"lora_mode": "all"},
    }
    return BlockOptimizer(
        AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay),
        list(model.named_parameters()),
        options.blocks,
        switch_block_every=options.period,
        switch_mode=options.switch_mode,
        active_modules=options.always,
        seed=options.seed,
        verbose=0,
        **forms[method],
    )


def plugin_of(name: str, precision: str, tp: int) -> Any:
    """A plugin of ColossalAI's names, or FSDP2's; "fp64" weights stay as they are, as "fp32" ones do."""
    from colossal_bcd.booster import FSDP2Plugin, HybridParallelPlugin, LowLevelZeroPlugin

    precision = "fp32" if precision == "fp64" else precision
    if name == "zero":
        return LowLevelZeroPlugin(stage=2, precision=precision)
    if name == "hybrid":
        stage = 0 if precision == "fp32" else 1
        # Every rank has the logits of all words, which programs compare.
        return HybridParallelPlugin(tp_size=tp, pp_size=1, zero_stage=stage, precision=precision, parallel_output=False)
    fsdp: Any = FSDP2Plugin
    return fsdp(precision=precision)
