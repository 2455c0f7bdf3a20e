"""What the stock plugins' constructors are asked for: refused, or said to be without effect, where it is not done."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

Arguments = dict[str, Any]

SCALER_ARGUMENTS = (
    "initial_scale", "min_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis", "max_scale",
)  # fmt: skip

REDUCER_OF_TORCH = ("static_graph", "check_reduction", "gradient_as_bucket_view")
"""What configures nothing but the reducer of torch's DDP."""


def arguments_of(stock: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a stock plugin by name, defaults filled in; a wrong name raises TypeError."""
    bound = inspect.signature(stock).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def refuse_fp8(arguments: Arguments) -> None:
    """Refuse what would round to 8 bits."""
    if arguments["fp8_communication"]:
        raise ValueError(
            "fp8_communication=True is not supported: it loses what float32 averages keep. Set it to False."
        )
    if arguments.get("use_fp8"):
        raise ValueError(
            "use_fp8=True is not supported: ColossalAI's fp8 products flatten activations and run on few devices. Set "
            'it to False and train with precision="bf16".'
        )


def check_hybrid(arguments: Arguments, stock: type, *, on_cpu: bool) -> None:
    """Refuse what HybridParallelPlugin of this package does not do, and say what has no effect.

    Args:
        arguments: see `arguments_of`; `overlap_p2p` is switched off here where a CPU lacks it.
        stock: ColossalAI's plugin, whose defaults need no word.
        on_cpu: this machine has no accelerator.
    """
    refuse_fp8(arguments)
    if arguments["overlap_allgather"] and arguments["tp_size"] > 1:
        raise ValueError(
            f"overlap_allgather=True with tp_size={arguments['tp_size']}: ColossalAI's hooks then multiply "
            "gradients; expected at most one of the two. Set overlap_allgather=False."
        )
    if arguments["pp_style"] == "zbv":
        raise ValueError(
            "pp_style='zbv' is not supported: its two backward passes give a weight its gradient outside of the first, "
            "where this package's averages begin; expected '1f1b' or 'interleaved'."
        )
    mode = arguments["sequence_parallelism_mode"]
    if arguments["enable_sequence_parallelism"] and mode == "ring":
        raise ValueError(
            "sequence_parallelism_mode='ring': ColossalAI computes wrong gradients in this mode; expected "
            "'split_gather', which divides the same activations, or 'all_to_all'."
        )
    if arguments["enable_sequence_parallelism"] and mode == "ring_attn" and on_cpu:
        raise ValueError(
            "sequence_parallelism_mode='ring_attn' needs flash attention, which this machine without an accelerator "
            "lacks; expected 'all_to_all' or 'split_gather'."
        )
    if arguments["zero_stage"] == 0:
        refuse_torch_reducer("HybridParallelPlugin", arguments, "at zero_stage=0", "gradients are averaged by hooks")
    if on_cpu and arguments["pp_style"] == "interleaved" and arguments["overlap_p2p"]:
        arguments["overlap_p2p"] = False
        _say("overlap_p2p switched off: this machine has no accelerator whose streams could overlap")
    _say_without_effect(stock, arguments, _idle_in_hybrid(arguments))


def check_zero(arguments: Arguments, stock: type) -> None:
    """Refuse what LowLevelZeroPlugin of this package does not do, and say what has no effect."""
    refuse_fp8(arguments)
    _say_without_effect(stock, arguments, _idle_scaling(arguments))


def check_fsdp(arguments: Mapping[str, Any], num_ranks: int) -> None:
    """Refuse arguments of FSDP2Plugin that would have no effect, or another one than they say."""
    if arguments["precision"] not in ("bf16", "fp32"):
        raise ValueError(
            f"FSDP2Plugin: got precision={arguments['precision']!r}, expected 'bf16' or 'fp32': losses are not scaled "
            "here. Use 'bf16', or LowLevelZeroPlugin(precision='fp16')."
        )
    norm, dtype = arguments["max_norm"], arguments["reduce_dtype"]
    if isinstance(norm, bool) or not isinstance(norm, (int, float)) or not 0 <= norm < math.inf:
        raise ValueError(f"FSDP2Plugin: got max_norm={norm!r}, expected a number of at least 0, which does not clip")
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise ValueError(f"FSDP2Plugin: got reduce_dtype={dtype!r}, expected a floating torch.dtype, or None")
    for name in ("tp_size", "replicate_size"):
        size = arguments[name]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"FSDP2Plugin: got {name}={size!r}, expected a number of ranks, 1 for none")
    tp_size, copies = arguments["tp_size"], arguments["replicate_size"]
    if num_ranks % (tp_size * copies):
        raise ValueError(
            f"FSDP2Plugin: got tp_size={tp_size} and replicate_size={copies} on {num_ranks} ranks, expected their "
            "product to divide these. Start another number of ranks."
        )
    if arguments["tp_plan"] is not None and tp_size == 1:
        raise ValueError("FSDP2Plugin: got a tp_plan with tp_size=1, which divides nothing. Pass tp_size, too.")
    keep, ranks = arguments["reshard_after_forward"], num_ranks // (tp_size * copies)
    if not isinstance(keep, bool) and not (isinstance(keep, int) and 1 < keep < ranks and ranks % keep == 0):
        raise ValueError(
            f"FSDP2Plugin: got reshard_after_forward={keep!r} and {ranks} ranks that share a model, expected True, "
            "False, or a number between that divides them."
        )


def refuse_torch_reducer(plugin: str, arguments: Arguments, when: str, why: str) -> None:
    """Refuse what configures torch's DDP where it does not average gradients."""
    for name in REDUCER_OF_TORCH:
        if arguments[name]:
            raise ValueError(
                f"{plugin}({name}=True) {when}: torch's DDP, which that configures, is not used, because {why}. Set "
                f"{name}=False."
            )


def _idle_scaling(arguments: Arguments) -> Iterable[tuple[str, str]]:
    if arguments["precision"] != "fp16":
        yield from ((name, f"precision={arguments['precision']!r}") for name in SCALER_ARGUMENTS)


def _idle_in_hybrid(arguments: Arguments) -> Iterable[tuple[str, str]]:
    """Arguments that mean nothing beside the others, and beside which."""
    yield from _idle_scaling(arguments)
    if arguments["pp_size"] == 1:
        pipeline = ("num_microbatches", "microbatch_size", "pp_style", "num_model_chunks", "scheduler_nodes")
        for name in (*pipeline, "num_layers_per_stage", "enable_metadata_cache"):
            yield name, "pp_size=1"
    elif arguments["num_microbatches"] is not None:
        yield "microbatch_size", "num_microbatches"
    if arguments["pp_style"] != "interleaved":
        yield "overlap_p2p", f"pp_style={arguments['pp_style']!r}"
    if not arguments["enable_sequence_parallelism"]:
        yield "sequence_parallelism_mode", "enable_sequence_parallelism=False"
    if arguments["sequence_parallelism_mode"] != "ring_attn":
        yield "inner_ring_size", f"sequence_parallelism_mode={arguments['sequence_parallelism_mode']!r}"
    if arguments["zero_stage"] == 0:
        yield from ((name, "zero_stage=0") for name in ("zero_bucket_size_in_m", "overlap_allgather"))
    else:
        names = ("ddp_bucket_cap_mb", *REDUCER_OF_TORCH)
        yield from ((name, f"zero_stage={arguments['zero_stage']}") for name in names)


def _say_without_effect(stock: type, arguments: Arguments, idle: Iterable[tuple[str, str]]) -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(stock).parameters.items()}
    asked = [f"{name} (with {why})" for name, why in idle if arguments[name] != defaults[name]]
    if asked:
        _say(f"{stock.__name__.partition('_')[0]}: {', '.join(asked)} without effect")


def _say(message: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(message)
