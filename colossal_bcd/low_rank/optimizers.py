"""The optimizers that GaLore and GoLore make of AdamW, SGD and Adafactor: the rows of a table.

Each takes the hyper-parameters of its rule, those of `Projection`, and those of `Storage`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from colossal_bcd.low_rank.galore import GaLore, GoLore
from colossal_bcd.low_rank.projection import Projection
from colossal_bcd.optim.adafactor import Adafactor
from colossal_bcd.optim.adamw import AdamW, AdamWHyper, AdamWRule, Order, adamw
from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.options import OPTIONAL, Bits, require
from colossal_bcd.optim.register import register, registered
from colossal_bcd.optim.sgd import SGD, SGDHyper
from colossal_bcd.optim.state.quantized import require_library
from colossal_bcd.optim.state.spec import Shaped, State, StateSpec
from colossal_bcd.sharding import Rounds, View


@dataclass(frozen=True)
class GaLoreAdamWHyper(Projection, AdamWHyper):
    """Hyper-parameters of one param group; defaults and order of operations are galore_torch's."""

    eps: float = 1e-6
    """Added to the root of the second moment, before it is debiased."""
    weight_decay: float = 0.0
    """Decoupled: after the update the weight shrinks by lr * weight_decay."""
    _: KW_ONLY
    correct_bias: bool = True
    """Debias both moments."""
    order: Order = field(default="galore", metadata=OPTIONAL)
    """As of `AdamWHyper`."""


@dataclass(frozen=True)
class GaLoreSGDHyper(Projection, SGDHyper):
    """Hyper-parameters of one param group."""

    _: KW_ONLY
    decoupled_weight_decay: bool = field(default=True, metadata=OPTIONAL)
    """As of `SGDHyper`; True."""

    def __post_init__(self) -> None:
        super().__post_init__()
        decoupled = self.decoupled_weight_decay
        require(decoupled, "decoupled_weight_decay", decoupled, "True where gradients are projected")


@dataclass(frozen=True)
class AdamW8bitHyper(AdamWRule):
    """Hyper-parameters of one param group; the order of operations is bitsandbytes'."""

    _: KW_ONLY
    min_8bit_size: int = 4096
    """Moments with fewer values, of the whole parameter or of its whole low-rank gradient, are kept in float32."""
    state_bits: Bits = 8
    """Bits of a value of both moments between steps; 32 keeps all in float32."""
    order: Order = field(default="bitsandbytes", metadata=OPTIONAL)
    """As of `AdamWHyper`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.min_8bit_size >= 0, "min_8bit_size", self.min_8bit_size, "a number of values, 0 or more")
        require(self.state_bits in (8, 32), "state_bits", self.state_bits, "8 or 32")


@register("GaLoreAdamW")
class GaLoreAdamW(GaLore, AdamW):
    """AdamW on low-rank projections of the gradients, on any mesh (see `GaLore`, `GaLoreAdamWHyper`)."""

    hyper_type = GaLoreAdamWHyper


@register("GaLoreSGD")
class GaLoreSGD(GaLore, SGD):
    """SGD with momentum on low-rank projections of the gradients, on any mesh (see `GaLore`, `GaLoreSGDHyper`)."""

    hyper_type = GaLoreSGDHyper


@register("GaLoreAdafactor")
class GaLoreAdafactor(GaLore, Adafactor):
    """Adafactor on low-rank projections of the gradients, on any mesh (see `GaLore`, `AdafactorHyper`).

    As in galore_torch: rows, columns and root mean square are the low-rank gradient's, the scale is the weight's.
    """


class AdamW8bit(ShardedOptimizer[AdamW8bitHyper]):
    """AdamW whose moments are kept in 8 bits: the first one by the signed map, the second by the unsigned one.

    Raises:
        ImportError: bitsandbytes is missing and `state_bits` is 8.
    """

    hyper_type = AdamW8bitHyper
    temporary_bytes = 8
    stacks = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.hyper_of(self.param_groups[-1]).state_bits == 8:
            require_library()

    def state_spec(self, layout: Shaped, hyper: AdamW8bitHyper) -> dict[str, StateSpec]:
        bits: Bits = hyper.state_bits if layout.numel >= hyper.min_8bit_size else 32
        moment = replace(StateSpec.like(layout), bits=bits)
        return {"exp_avg": moment, "exp_avg_sq": replace(moment, signed=False)}

    def update(self, view: View, state: State, hyper: AdamW8bitHyper) -> Rounds:
        return adamw(view, state, hyper)


@register("GaLoreAdamW8bit")
class GaLoreAdamW8bit(GaLore, AdamW8bit):
    """AdamW with 8-bit moments on low-rank projections of the gradients, as galore_torch's (see `GaLore`).

    Raises:
        ImportError: bitsandbytes is missing and `state_bits` is 8.
    """

    temporary_bytes = 12


@register("GoLoreAdamW")
class GoLoreAdamW(GoLore, GaLoreAdamW):
    """`GaLoreAdamW` with late random bases (see `GoLore`)."""


@register("GoLoreSGD")
class GoLoreSGD(GoLore, GaLoreSGD):
    """`GaLoreSGD` with late random bases (see `GoLore`)."""


@register("GoLoreAdafactor")
class GoLoreAdafactor(GoLore, GaLoreAdafactor):
    """`GaLoreAdafactor` with late random bases (see `GoLore`)."""


@register("GoLoreAdamW8bit")
class GoLoreAdamW8bit(GoLore, GaLoreAdamW8bit):
    """`GaLoreAdamW8bit` with late random bases (see `GoLore`)."""


def _make_forms() -> None:
    """Make the two forms of optimizers whose own files ask for them (`register(..., low_rank=True)`)."""
    for name, each in registered("colossal_bcd.optim").items():
        if not each.low_rank:
            continue
        base = each.cls
        for form, transformation in (("GaLore", GaLore), ("GoLore", GoLore)):
            text = f"{name} on low-rank projections of the gradients, on any mesh (see `{form}`, `{name}Hyper`)."
            made: Any = type(f"{form}{name}", (transformation, base), {"__module__": __name__, "__doc__": text})
            globals()[made.__name__] = base = register(made.__name__)(made)


_make_forms()
