"""ColossalAI's ZeRO optimizer without a booster: its constructor, this package's engine."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from colossalai.zero.low_level import LowLevelZeroOptimizer as StockLowLevelZeroOptimizer
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.trained import is_plain, trained_of
from colossal_bcd.booster.arguments import SCALER_ARGUMENTS, Arguments, arguments_of, refuse_fp8
from colossal_bcd.booster.boosting import require_same_options, same_start, thawed
from colossal_bcd.booster.casts.registry import cast
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.booster.layouts import global_shape, is_divided, shard_layout
from colossal_bcd.booster.stock_surface import param_info_of
from colossal_bcd.booster.zero import ZeroOptimizer
from colossal_bcd.engine.config import EngineConfig, LowRankOptions
from colossal_bcd.sharding import Layout, Mesh


class LowLevelZeroOptimizer(ZeroOptimizer):
    """ZeRO stage 1 and 2 around any optimizer; takes the arguments of colossalai.zero.LowLevelZeroOptimizer.

    The model stays as it is: weights are trained in the dtype that they have, and nothing casts its inputs.  Weights
    that ColossalAI's d_tensor has divided over tensor-parallel ranks stay divided.  Gradients of a plain optimizer
    accumulate over steps until `zero_grad`, as ColossalAI's do; under a booster a step uses them up.

    Args:
        low_rank: how gradients of projected parameters travel; see `LowRankOptions`.
    Raises:
        ValueError: fp8_communication is asked for, weights of several dtypes, or groups of ranks by parameter.
    """

    __signature__ = inspect.signature(StockLowLevelZeroOptimizer)

    def __init__(self, *args: Any, low_rank: LowRankOptions | None = None, **kwargs: Any) -> None:
        arguments = arguments_of(StockLowLevelZeroOptimizer, args, kwargs)
        refuse_fp8(arguments)
        install_cpu_accelerator()
        optimizer = arguments["optimizer"]
        params = _weights(optimizer, arguments["forced_dtype"])
        groups = _groups(arguments)
        # Without a model, weights are named by their place.
        names = {id(param): str(index) for index, param in enumerate(params)}
        require_same_options(nn.ParameterList(params), optimizer, groups[-1])
        optimizer = cast(optimizer)
        info = param_info_of(optimizer)
        layouts, tp_group = _layouts(params)
        if not is_plain(optimizer):
            with thawed(optimizer):
                for group in groups:
                    same_start(nn.ParameterList(params), group)
        config = EngineConfig(
            data_groups=groups,
            zero_groups=groups,
            tp_group=tp_group,
            partition_grad=arguments["partition_grad"],
            reduce_bucket_size=arguments["reduce_bucket_size"],
            communication_dtype=arguments["communication_dtype"],
            overlap_communication=arguments["overlap_communication"],
            overlap_allgather=arguments["overlap_allgather"],
            cpu_offload=arguments["cpu_offload"],
            master_weights=arguments["master_weights"],
            max_norm=arguments["clip_grad_norm"],
            low_rank=low_rank or LowRankOptions(),
            verbose=arguments["verbose"],
            keep_gradients=True,
            fp16={name: arguments[name] for name in SCALER_ARGUMENTS} if params[0].dtype == torch.float16 else None,
        )
        model = SimpleNamespace(_hook_context=arguments["backward_context"] or contextlib.nullcontext)
        super().__init__(optimizer, model, layouts, config, parameter_names=names)
        self.param_info = info


def _weights(optimizer: Any, forced_dtype: torch.dtype | None) -> list[Parameter]:
    """Every weight of the optimizer, in `forced_dtype` if there is one."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"LowLevelZeroOptimizer: got an optimizer of type {type(optimizer).__name__}, expected a "
            "torch.optim.Optimizer"
        )
    params = trained_of(optimizer).parameters()
    kinds = {type(param).__name__ for param in params if not isinstance(param, Parameter)}
    if kinds:
        raise TypeError(f"LowLevelZeroOptimizer: got {sorted(kinds)} in the param groups, expected torch.nn.Parameter")
    if forced_dtype is not None:
        for param in params:
            param.data = param.data.to(forced_dtype)
    dtypes = {str(param.dtype) for param in params}
    if len(dtypes) != 1:
        raise ValueError(
            f"LowLevelZeroOptimizer: got weights of {sorted(dtypes)}, expected one dtype. Cast the model, or pass "
            "forced_dtype."
        )
    return params


def _groups(arguments: Arguments) -> tuple[Any, ...]:
    """The process group of the data-parallel ranks, or the two whose product they are."""
    inner, outer = arguments["dp_process_group"], arguments["extra_dp_group"]
    lists = arguments["pg_to_param_list"]
    if inner is not None and lists is not None:
        raise ValueError("LowLevelZeroOptimizer: got dp_process_group and pg_to_param_list, expected one of the two")
    if outer is not None and inner is None and lists is None:
        raise ValueError("LowLevelZeroOptimizer: got extra_dp_group alone, expected dp_process_group beside it")
    if lists is not None:
        if len(lists) != 1:
            raise ValueError(
                f"LowLevelZeroOptimizer: got pg_to_param_list with {len(lists)} groups, expected one: all weights are "
                "divided over the same ranks here. Leave it out, or keep ColossalAI's class for experts."
            )
        (group,) = lists
        return group if isinstance(group, tuple) else (group,)
    inner = dist.group.WORLD if inner is None else inner
    return (inner,) if outer is None else (outer, inner)


def _layouts(params: list[Parameter]) -> tuple[dict[Parameter, Layout], Any]:
    """Layout of every weight, and the group of the ranks that d_tensor divides them over, if any."""
    tp_group = None
    weights: list[Any] = list(params)
    for weight in weights:
        if is_divided(weight):
            noted = weight.dist_layout
            axes = [axis for dims in noted.sharding_spec.dim_partition_dict.values() for axis in dims]
            tp_group = noted.device_mesh.get_process_group(axes[0])
            break
    mesh = Mesh({} if tp_group is None else {"tp": tp_group})
    place = (0, 1) if tp_group is None else (mesh.rank("tp"), mesh.size("tp"))
    layouts = {}
    for index, param in enumerate(params):
        layouts[param] = shard_layout(param, global_shape(param, tuple(param.shape), index), *place)
    return layouts, tp_group
