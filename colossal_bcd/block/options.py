"""Options of a BlockOptimizer as values, and the flat keywords that stand for their fields."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from colossal_bcd.block.checks import require_choice, require_int
from colossal_bcd.block.correction.by_optimizer import OptimizerCorrection, OptimizerState
from colossal_bcd.block.correction.correction import CorrectionMode, CorrectionState, ElementwiseState
from colossal_bcd.block.correction.rules import Correction, SgdCorrection, SignCorrection
from colossal_bcd.block.importance import ImportanceOptions
from colossal_bcd.block.residual import ResidualOptions
from colossal_bcd.block.schedule import Mode
from colossal_bcd.optim.options import Rounding

LoraMode: TypeAlias = Literal["all", "partial", "adapter_only"]


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Which blocks there are and what else a BlockOptimizer can be told, by these keywords alone."""

    start_block: int | None = None
    """Index of the first block; None: the first by the order, 0 for "fixed"."""
    include_embedding: bool = False
    """Also make a first block of the embeddings."""
    include_lm_head: bool = False
    """Also make a last block of the head."""
    n_layer_per_block: int = 1
    """Layers in a default block: neighbours, or in "random" mode drawn by `seed`."""
    block_ranges: Sequence[tuple[int, int]] | None = None
    """Half-open ranges of blocks, each with its own order and active block; None: one over all."""
    lr_warmup_step_afterswitch: int = 0
    """Steps in which the base optimizer's rate grows to its value after a switch."""
    verbose: int = 1
    """0 logs nothing, 1 a line per switch, 2 also the names of what trains; shown without logging set up."""
    data_group: Any = "auto"
    """On several processes without a booster, those whose gradients are averaged: "auto" (the group of torch's DDP
    around the model, else all), a process group, or None, with which each trains on its own."""

    def __post_init__(self) -> None:
        require_int("verbose", self.verbose, 0)
        require_int("lr_warmup_step_afterswitch", self.lr_warmup_step_afterswitch, 0)


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """How BREAD trains a model with LoRA adapters.

    Raises:
        ValueError: a value is unknown.
    """

    lora_mode: LoraMode | None = None
    """Blocks train the weights below the adapters, which peft has frozen, and besides "all" adapters, or, "partial",
    those from the active layer on; "adapter_only": blocks are the adapters alone.  None: the same, as BAdam does."""
    adapter_state: Literal["keep", "reset"] = "keep"
    """Whether adapters keep masters and state while they do not train."""

    def __post_init__(self) -> None:
        require_choice("lora_mode", self.lora_mode, (None, "all", "partial", "adapter_only"))
        require_choice("adapter_state", self.adapter_state, ("keep", "reset"))

    @property
    def keeps(self) -> bool:
        """Whether adapters survive a switch."""
        return self.lora_mode is not None and self.adapter_state == "keep"


@dataclass(frozen=True, kw_only=True)
class CorrectionOptions:
    """How inactive blocks are corrected; every field is a keyword of a BlockOptimizer, too.

    Raises:
        TypeError, ValueError: one is wrong, or would be ignored.
    """

    sgd_mode: CorrectionMode = "disabled"
    """Which parameters are corrected within backward: "all" that are not active, embedding, head and norms included;
    "partial": those after the first active one, whose gradient costs little more.  Clipping leaves them alone."""
    sgd_lr_scaling: float = 1.0
    """Learning rate of the correction, as a multiple of that of the parameter's group."""
    sgd_use_sign: bool = False
    """Correct by the gradient's sign."""
    correction: Correction | OptimizerCorrection | None = None
    """Another rule; None: the gradient, or its sign."""
    correction_rounding: Rounding = "nearest"
    """Of corrected bfloat16 and float16 weights; "nearest" loses updates below half their step."""
    accumulation_steps: int = 1
    """Micro-batches per step, so that corrections wait for the last one; see `LocalGradients`."""

    def __post_init__(self) -> None:
        require_choice("sgd_mode", self.sgd_mode, ("disabled", "all", "partial"))
        require_choice("correction_rounding", self.correction_rounding, ("nearest", "stochastic"))
        require_int("accumulation_steps", self.accumulation_steps, 1)
        scaling = self.sgd_lr_scaling
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not 0 <= scaling < float("inf"):
            raise ValueError(f"sgd_lr_scaling: got {scaling!r}, expected a non-negative number")
        elementwise = callable(getattr(self.correction, "direction", None))
        if self.correction is not None and not elementwise and not isinstance(self.correction, OptimizerCorrection):
            raise TypeError(
                f"correction: got a {type(self.correction).__name__}, expected a Correction, such as LionCorrection(), "
                "or an OptimizerCorrection"
            )
        if self.sgd_mode == "disabled":
            given = {"sgd_use_sign": self.sgd_use_sign, "correction": self.correction is not None}
            given["correction_rounding"] = self.correction_rounding != "nearest"
            ignored = [name for name, is_given in given.items() if is_given]
            if ignored:
                raise ValueError(
                    f"{ignored[0]}: got it with sgd_mode='disabled', which corrects nothing. Set sgd_mode to 'all' or "
                    "'partial', or leave it out."
                )
            if scaling != 1:
                warnings.warn(
                    f"sgd_lr_scaling={scaling} has no effect with sgd_mode='disabled', which corrects nothing. Set "
                    "sgd_mode to 'all' or 'partial'.",
                    stacklevel=5,
                )
        if self.correction is not None and self.sgd_use_sign:
            raise ValueError("sgd_use_sign: got True and a correction, expected one of the two")

    def build(self, seed: int) -> CorrectionState | None:
        """What these options ask for, None for nothing; `seed` is that of stochastic rounding."""
        if self.sgd_mode == "disabled":
            return None
        said: dict[str, Any] = {
            "mode": self.sgd_mode,
            "lr_scaling": self.sgd_lr_scaling,
            "rounding": self.correction_rounding,
            "accumulation_steps": self.accumulation_steps,
            "seed": seed,
        }
        if isinstance(self.correction, OptimizerCorrection):
            return OptimizerState(self.correction, **said)
        rule = self.correction or (SignCorrection() if self.sgd_use_sign else SgdCorrection())
        return ElementwiseState(rule, **said)


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of a BlockOptimizer."""

    blocks: BlockOptions
    lora: LoraOptions
    correction: CorrectionOptions
    residual: ResidualOptions | None
    importance: ImportanceOptions | None

    @classmethod
    def read(
        cls,
        flat: Mapping[str, Any],
        *,
        lora: LoraOptions | None,
        correction: CorrectionOptions | Correction | OptimizerCorrection | None,
        residual: ResidualOptions | Literal["drop", "keep"],
        importance: ImportanceOptions | Literal["gradient", "weight"],
        switch_mode: Mode,
    ) -> Options:
        """Options from values and from flat keywords, each option from one of the two, as errors say."""
        fields = _by_class(flat)
        for name, value in {"lora": lora, "correction": correction, "residual": residual}.items():
            _require_once(name, value, fields)
        _require_once("importance", importance, fields)
        blocks = BlockOptions(**fields[BlockOptions])
        if not isinstance(lora, LoraOptions):
            lora = LoraOptions(**fields[LoraOptions])
        kept = residual if isinstance(residual, ResidualOptions) else None
        if not isinstance(residual, ResidualOptions):
            kept = ResidualOptions.asked(residual, **fields[ResidualOptions])
        if not isinstance(correction, CorrectionOptions):
            correction = CorrectionOptions(correction=correction, **fields[CorrectionOptions])
        if isinstance(importance, ImportanceOptions):
            fields[ImportanceOptions], importance = {"floor": importance.floor}, importance.by
        drawing = ImportanceOptions.asked(switch_mode, importance, **fields[ImportanceOptions])
        return cls(blocks=blocks, lora=lora, correction=correction, residual=kept, importance=drawing)

    def identity(self, corrector: CorrectionState | None) -> dict[str, Any]:
        """What must be the same in a run that is resumed, besides the blocks: plain numbers, strings, lists."""
        said: dict[str, Any] = {} if corrector is None else {"corrections": corrector.identity()}
        if self.blocks.lr_warmup_step_afterswitch:
            said["warm_up_steps"] = self.blocks.lr_warmup_step_afterswitch
        if self.lora.lora_mode is not None:
            said["lora"] = [self.lora.lora_mode, self.lora.adapter_state]
        if self.residual is not None:
            said["residual"] = ["keep", self.residual.bits]
        if self.importance is not None:
            said["importance"] = [self.importance.by, self.importance.floor]
        return said


ARGUMENTS = (
    "switch_block_every",
    "switch_mode",
    "active_modules",
    "seed",
    "lora",
    "correction",
    "residual",
    "importance",
)
"""Keywords of a BlockOptimizer that are no fields of options."""
KEYWORDS: dict[str, tuple[type, str]] = {
    **{field.name: (cls, field.name) for cls in (BlockOptions, LoraOptions) for field in dataclasses.fields(cls)},
    **{field.name: (CorrectionOptions, field.name) for field in dataclasses.fields(CorrectionOptions)},
    "residual_bits": (ResidualOptions, "bits"),
    "residual_offload": (ResidualOptions, "offload"),
    "importance_floor": (ImportanceOptions, "floor"),
}
"""Flat keyword -> class of options and its field."""


def _by_class(flat: Mapping[str, Any]) -> dict[type, dict[str, Any]]:
    """Values of fields, by class of options."""
    fields: dict[type, dict[str, Any]] = {cls: {} for cls, _ in KEYWORDS.values()}
    for keyword, value in flat.items():
        if keyword not in KEYWORDS:
            closest = difflib.get_close_matches(keyword, [*ARGUMENTS, *KEYWORDS], n=1, cutoff=0.0)[0]
            raise TypeError(
                f"BlockOptimizer: got an unexpected keyword argument {keyword!r}, expected one of its arguments, of "
                f"which {closest!r} is nearest."
            )
        cls, field = KEYWORDS[keyword]
        fields[cls][field] = value
    return fields


def _require_once(name: str, value: Any, fields: Mapping[type, Mapping[str, Any]]) -> None:
    """Refuse an option that is given as a value and by flat keywords."""
    if fields.get(type(value)):
        given = ", ".join(keyword for keyword, (cls, field) in KEYWORDS.items() if field in fields.get(cls, ()))
        raise ValueError(
            f"{name}: got a {type(value).__name__} and {given}, expected one of the two. Give them as its fields."
        )
