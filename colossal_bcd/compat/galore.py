"""ColossalAI's GaLore: its names and calls, our rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from colossal_bcd.block.names import plain_name
from colossal_bcd.compat.setup_distributed import SetupDistributed
from colossal_bcd.optim import GaLoreAdamW8bit
from colossal_bcd.optim.base import Params
from colossal_bcd.optim.galore import Projection

_NO_DECAY = ("bias", "LayerNorm.weight")


def get_galore_param_groups(
    model: nn.Module,
    weight_decay: float | None = None,
    rank: int = 256,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: Projection = "std",
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
        rank: see `GaLoreHyper`, as of the next three.
        update_proj_gap: see `rank`.
        scale: see `rank`.
        proj_type: see `rank`.
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
        place = 0 if param.dim() == 2 else 1
        if any(f".{ending}." in f".{name}." for ending in _NO_DECAY):
            place = 2
        groups[place]["params"].append(param)
        groups[place]["param_names"].append(plain_name(name))
    return [group for group in groups if group["params"]]


class DistGaloreAwamW(SetupDistributed, GaLoreAdamW8bit):
    """`colossal_bcd.GaLoreAdamW8bit` with the call of ColossalAI's class of that name.

    It differs where ColossalAI's differs from the paper: the whole matrix is projected, where theirs multiplies every
    shard by the first rows of the basis; it trains under ZeRO; and it writes no gradient to a file.

    Args:
        params: parameters, or param groups as plain dicts; only groups with a `rank` are projected.
        lr, betas, eps, weight_decay: as of `colossal_bcd.GaLoreAdamW8bit`.
        nbits: bits of the moments between steps, 8 or 32.
        min_8bit_size: smaller tensors, or images of them, keep moments of 32 bits.
        percentile_clipping: 100, which clips nothing.
        block_wise: True; moments are quantised in blocks of 256 values.
        is_paged: False; states stay where the parameter is.
        args: bitsandbytes' options, an object or a mapping with `optim_bits`, `min_8bit_size` and so on, in place of
            the five arguments above.
    Raises:
        ImportError: bitsandbytes is missing and `nbits` is 8.
        ValueError: a hyper-parameter is out of range, an option cannot be honoured, or no group has a rank, so that
            nothing would be projected.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        nbits: int = 8,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        args: Any = None,
    ) -> None:
        options = {
            "optim_bits": nbits,
            "min_8bit_size": min_8bit_size,
            "percentile_clipping": percentile_clipping,
            "block_wise": block_wise,
            "is_paged": is_paged,
        }
        if args is not None:
            own = args if isinstance(args, Mapping) else vars(args)
            options = {name: own.get(name, value) for name, value in options.items()}
        honoured = require_options(type(self).__name__, options)
        super().__init__(params, lr, betas, eps, weight_decay, clamp=True, **honoured)


def require_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """bitsandbytes' options as hyper-parameters of `GaLoreAdamW8bit`.

    Args:
        name: of the optimizer, for errors.
        options: `optim_bits`, `min_8bit_size`, `percentile_clipping`, `block_wise`, `is_paged`.
    Raises:
        ValueError: one cannot be honoured.
    """
    remedies = {
        "percentile_clipping": (100, "Clip by the norm with the plugin's max_norm."),
        "block_wise": (True, "Moments of 8 bits are quantised in blocks here; use nbits=32 for exact ones."),
        "is_paged": (False, "Use a plugin with cpu_offload=True."),
    }
    for option, (value, remedy) in remedies.items():
        if options[option] != value:
            raise ValueError(
                f"{name}: got {option}={options[option]!r}, which has no equal here, expected {value}. {remedy}"
            )
    bits = options["optim_bits"]
    if bits not in (8, 32):
        raise ValueError(f"{name}: got nbits={bits!r}, expected 8 or 32")
    return {"state_bits": bits, "min_8bit_size": options["min_8bit_size"]}
