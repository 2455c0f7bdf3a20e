"""ColossalAI's distributed optimizers, its names and calls and our rules; and its call that says what is divided.

ColossalAI itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from colossal_bcd.booster.layouts import global_shape, is_divided, shard_layout
from colossal_bcd.low_rank import GaLoreAdamW8bit
from colossal_bcd.optim import CAME, Adafactor, Lamb, ShardedOptimizer
from colossal_bcd.optim.base import Params
from colossal_bcd.sharding import Layout, Mesh

RankOfSize = tuple[int, int]
"""This rank among those of an axis, and their number."""


class SetupDistributed:
    """Mixin of a `ShardedOptimizer` with ColossalAI's `setup_distributed`, to come before it in the order of bases."""

    original_groups: Sequence[dict[str, Any]] = ()
    """The param-group dicts before ColossalAI, which schedulers hold; a pipeline gets new ones from it."""

    def setup_distributed(
        self,
        tp_group: Any = None,
        dp_group: Any = None,
        shard_to_working_param: Mapping[int, Tensor] | None = None,
        padding_map: Mapping[int, int] | None = None,
        is_zero: bool = False,
    ) -> None:
        """Bind from what ColossalAI passes.

        Weights may have been divided before or after the optimizer was made; before, what ColossalAI's d_tensor has
        noted at them says how.

        Args:
            tp_group: ranks that divide weights, if any.
            dp_group: ranks that divide masters, if `is_zero`.
            shard_to_working_param: id of a master -> its weight, where ColossalAI says so.
            padding_map: not needed, it follows from the shapes.
            is_zero: masters are flat parts of the weights.
        Raises:
            ValueError: the part of a weight that a master is does not follow from these.
        """
        assert isinstance(self, ShardedOptimizer)
        if _is_bound(self, shard_to_working_param or {}):
            return
        for index, original in enumerate(self.original_groups):
            original.update(self.param_groups[index])
            self.param_groups[index] = original
        groups = {axis: group for axis, group in (("tp", tp_group), ("zero", dp_group)) if group is not None}
        places = Mesh(groups)
        tp = (places.rank("tp"), places.size("tp")) if "tp" in groups else (0, 1)
        data = (places.rank("zero"), places.size("zero")) if is_zero and "zero" in groups else (0, 1)
        layouts, device = {}, None
        for index, (param, weight) in enumerate(_weights(self, shard_to_working_param or {}).items()):
            shape = global_shape(weight, self._layouts[weight].shape, index)
            layouts[param] = _layout(index, param, weight, shape, tp, data, is_zero)
            device = weight.device if device is None else device
        # Masters may be offloaded, while the groups communicate where the weights are.
        self.bind(layouts, Mesh(groups, device))

    def _active(self) -> Any:
        """What the step updates; refuses shards of which nobody has said whose they are."""
        assert isinstance(self, ShardedOptimizer)
        for index, param in enumerate(param for group in self.param_groups for param in group["params"]):
            if is_divided(param) and self._layouts.get(param) == Layout.whole(tuple(param.shape)):
                raise ValueError(
                    f"{type(self).__name__}: parameter {index} of shape {tuple(param.shape)} is a shard, expected a "
                    "whole weight, or a call of setup_distributed(tp_group, ...) before the first step."
                )
        return super()._active()  # type: ignore[misc]


def _is_bound(optimizer: ShardedOptimizer[Any], working: Mapping[int, Tensor]) -> bool:
    """Whether an engine of this package has made the masters, and said what they are."""
    masters = [param for group in optimizer.param_groups for param in group["params"]]
    known = optimizer.layouts
    return bool(working) and all(param in known and working.get(id(param), param) not in known for param in masters)


def _weights(optimizer: ShardedOptimizer[Any], working: Mapping[int, Tensor]) -> dict[Tensor, Tensor]:
    """Weight of the model behind every tensor that ColossalAI has put into the param groups."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    known = optimizer.layouts
    weights = {param: working.get(id(param), param) for param in params}
    if any(weight not in known for weight in weights.values()):
        # Stage 0, or one data-parallel rank: ColossalAI passes no map.  Its masters are in the order of the weights.
        trained = [param for param in known if param.requires_grad]
        if working or len(trained) != len(params):
            raise ValueError(
                f"setup_distributed: got {len(params)} masters for {len(trained)} weights without a map between them, "
                "expected the map, or one master for each weight. ColossalAI's HybridParallelPlugin gives neither with "
                "pipeline parallelism at zero_stage=0 or on one data-parallel rank; use "
                "colossal_bcd.booster.HybridParallelPlugin."
            )
        weights = dict(zip(params, trained, strict=True))
    return weights


def _layout(
    index: int, param: Tensor, weight: Tensor, shape: tuple[int, ...], tp: RankOfSize, data: RankOfSize, is_zero: bool
) -> Layout:
    if is_divided(weight) and tp[1] == 1:
        raise ValueError(
            f"setup_distributed: parameter {index} is a shard of {tuple(weight.shape)} of a weight of {shape}, got no "
            "tp_group, expected the ranks that hold the other shards. Pass tp_group."
        )
    layout = shard_layout(weight, shape, *tp)
    if layout.local_shape != tuple(weight.shape):
        raise ValueError(
            f"parameter {index}: a shard of {tuple(weight.shape)} does not follow from the global shape {shape} on "
            f"{tp[1]} tensor-parallel ranks. Pass setup_distributed the tp_group that divides it, or use "
            "colossal_bcd.booster.HybridParallelPlugin."
        )
    if tuple(param.shape) == layout.local_shape and not is_zero:
        return layout
    # ColossalAI's ZeRO flattens masters on one data-parallel rank, too, and does not say so.  This package's engine
    # cuts those of some optimizers by whole rows.
    for whole_rows in (False, True):
        part = layout.sliced("zero", *data, whole_rows=whole_rows)
        if part.local_shape == tuple(param.shape):
            return part
    raise ValueError(
        f"parameter {index}: a master of {tuple(param.shape)} is no part of a shard of {tuple(weight.shape)} on "
        f"{data[1]} data-parallel ranks: ColossalAI divides it over other ranks (of sequence or expert "
        "parallelism) than it passes on. Use the plugins of colossal_bcd.booster."
    )


class DistributedLamb(SetupDistributed, Lamb):
    """LAMB by the formula of ColossalAI's class of that name: the bias correction multiplies the step size.

    It runs under the plugins of `colossal_bcd.booster`, under ColossalAI's own after `colossal_bcd.booster.install()`,
    on weights that were divided by hand, after `setup_distributed`, and on one process.

    Args:
        params: parameters, or param groups as plain dicts.
        lr, betas, eps, weight_decay: as of `colossal_bcd.Lamb`.
        bias_correction: multiply `lr` by sqrt(1 - beta2^t) / (1 - beta1^t) after the trust ratio.
    Raises:
        ValueError: a hyper-parameter is out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        bias_correction: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction)

    def hyper_of(self, group: Mapping[str, Any], key: int | None = None) -> Any:
        """The groups hold ColossalAI's values, so that groups and checkpoints of its class mean the same here."""
        correction = group["bias_correction"]
        return super().hyper_of({**group, "bias_correction": "step_size" if correction is True else correction})


class DistributedAdaFactor(SetupDistributed, Adafactor):
    """`colossal_bcd.Adafactor` with the call of ColossalAI's class of that name.

    It differs from ColossalAI's where that one differs from the paper and from transformers.Adafactor: `lr` is used,
    and `scale_parameter` multiplies by the root mean square of the weight, which theirs takes for 0.

    Args:
        params: parameters, or param groups as plain dicts.
        lr: step size without `relative_step`; None where every group has its own.
        eps, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, relative_step, warmup_init: as of
            `colossal_bcd.Adafactor`.
    Raises:
        ValueError: a hyper-parameter is out of range, `lr` is given together with `relative_step`, or a group has
            neither.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        groups: list[Any] = list(params)
        super().__init__(
            groups,
            0.0 if lr is None and not relative_step and _bring_lr(groups) else lr,
            eps,
            clip_threshold,
            decay_rate,
            beta1,
            weight_decay,
            scale_parameter,
            relative_step,
            warmup_init,
        )
        self.defaults["lr"] = lr


class DistributedCAME(SetupDistributed, CAME):
    """`colossal_bcd.CAME` with the call of ColossalAI's class of that name, which is wrong from its second step on.

    Args:
        params: parameters, or param groups as plain dicts.
        lr: step size; None where every group has its own.
        eps, clip_threshold, betas, weight_decay: as of `colossal_bcd.CAME`.
    Raises:
        ValueError: a hyper-parameter is out of range, or a group has no `lr`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
    ) -> None:
        groups: list[Any] = list(params)
        if lr is None and not _bring_lr(groups):
            raise ValueError("DistributedCAME: got lr=None, expected a number, or one in every param group")
        super().__init__(groups, 0.0 if lr is None else lr, eps, clip_threshold, betas, weight_decay)
        self.defaults["lr"] = lr


def _bring_lr(groups: Sequence[Any]) -> bool:
    return bool(groups) and all(isinstance(group, Mapping) and group.get("lr") is not None for group in groups)


class DistGaloreAwamW(SetupDistributed, GaLoreAdamW8bit):
    """`colossal_bcd.GaLoreAdamW8bit` with the call of ColossalAI's class of that name.

    It differs where ColossalAI's differs from the paper: the whole matrix is projected, where theirs multiplies every
    shard by the first rows of the basis; it trains under ZeRO; and it writes no gradient to a file.

    Args:
        params: parameters, or param groups as plain dicts; only groups with a `rank` are projected.
        lr, betas, eps, weight_decay: as of `colossal_bcd.GaLoreAdamW8bit`.
        nbits: bits of the moments between steps, 8 or 32.
        min_8bit_size: smaller tensors, or low-rank gradients, keep moments of 32 bits.
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
    """bitsandbytes' options as hyper-parameters of `GaLoreAdamW8bit`; refuses what cannot be honoured."""
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
