"""BAdam's callback for Hugging Face's Trainer."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from colossal_bcd.block import BlockOptimizerRatio
from colossal_bcd.block.gradient_checkpointing import prefer_non_reentrant
from colossal_bcd.compat.accelerated import REMEDY, blocks_of, enable_accelerate


class BAdamCallback(TrainerCallback):
    """Prepares a `transformers.Trainer` for block coordinate descent when it begins to train.

    Gradient checkpointing becomes the kind that works above frozen layers, the embeddings' output needs no gradient any
    more, a run can be resumed on torch before 2.6, and what would train wrongly raises.  It may be given as a class or
    as an instance.

    Args:
        init_loss_scale: of DeepSpeed's fp16, as power of two; for calls that pass it, DeepSpeed is not supported.
    """

    def __init__(self, init_loss_scale: int = 12) -> None:
        self.init_loss_scale = init_loss_scale
        _let_numbered_cpus_load()
        enable_accelerate()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises: ValueError: see the messages."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        inner = getattr(optimizer, "optimizer", optimizer)
        if (optimizer := blocks_of(optimizer)) is None:
            raise ValueError(
                f"BAdamCallback: the trainer's optimizer is a {type(inner).__name__}, expected a BlockOptimizer. "
                "Pass Trainer(optimizers=(block_optimizer, None)), or with FSDP let its create_optimizer make one."
            )
        if args.fsdp and args.world_size > 1 and getattr(optimizer, "engine", None) is None:
            raise ValueError(
                "BAdamCallback: got fsdp, but the trainer's weights are not sharded by FSDP2, as by accelerate on CPUs "
                f"and before torch 2.6; expected them to be. On CPUs {REMEDY}"
            )
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "BAdamCallback: the trainer uses DeepSpeed's ZeRO-3, which is not supported, expected none. Use "
                "booster.boost with FSDP2Plugin of colossal_bcd.booster, which shards weights, too."
            )
        if args.fp16:
            raise ValueError(
                "BAdamCallback: got fp16=True, whose gradient scaler looks for gradients where a BlockOptimizer has "
                "none, expected False. Use bf16=True, or a plugin of colossal_bcd.booster, which scales the loss."
            )
        if isinstance(optimizer, BlockOptimizerRatio) and not optimizer.dense_gradients and args.max_grad_norm:
            raise ValueError(
                f"BAdamCallback: got max_grad_norm={args.max_grad_norm}, which has no effect on gradients that were "
                "cut down to a share. Pass dense_gradients=True to the optimizer, or max_grad_norm=0 to the trainer."
            )
        prefer_non_reentrant(model)
        _let_random_states_load()


@functools.cache
def _let_numbered_cpus_load() -> None:
    """On several processes without an accelerator Trainer loads onto "cpu:1", a name that torch.load does not know."""
    torch.serialization.register_package(
        30, lambda storage: None, lambda storage, location: storage if str(location).startswith("cpu:") else None
    )


def _let_random_states_load() -> None:
    """Trainer saves NumPy's random state, which torch before 2.6 refuses to load unless its types are named.

    transformers 4.51 names them for later versions of torch only, so that no run could be resumed.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6):
        return
    reconstruct = np.random.get_state()[1].__reduce__()[0]  # type: ignore[index]
    torch.serialization.add_safe_globals([reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))])
