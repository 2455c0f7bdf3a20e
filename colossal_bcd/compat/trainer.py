"""For Hugging Face's Trainer: BAdam's callback and its clipping, and blocks by `optimizer_cls_and_kwargs`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from colossal_bcd.block import BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.block.gradient_checkpointing import prefer_non_reentrant
from colossal_bcd.compat.accelerated import REMEDY, blocks_of, enable_accelerate
from colossal_bcd.optim.adamw import AdamW

_clipped: weakref.WeakSet[BlockOptimizerRatio] = weakref.WeakSet()
"""Optimizers whose shares of gradients were clipped since their last step."""


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
        prefer_non_reentrant(model)
        _let_random_states_load()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises: ValueError: the trainer has clipped nothing, as gradients are kept elsewhere."""
        optimizer = blocks_of(kwargs["optimizer"])
        if not isinstance(optimizer, BlockOptimizerRatio) or optimizer.dense_gradients or not args.max_grad_norm:
            return
        if optimizer not in _clipped:
            raise ValueError(
                f"BAdamCallback: got max_grad_norm={args.max_grad_norm}, which has no effect on gradients that were "
                "cut down to a share. Pass dense_gradients=True to the optimizer, or max_grad_norm=0 to the trainer, "
                "or clip shares: trainer.accelerator.clip_grad_norm_ = MethodType(clip_grad_norm_old_version, "
                "trainer.accelerator), of types and colossal_bcd.compat."
            )
        _clipped.discard(optimizer)


def clip_grad_norm_old_version(
    self: Any, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
) -> Tensor | None:
    """Clip as accelerate does, and of a `BlockOptimizerRatio` the shares of gradients that it keeps; BAdam's name.

    A method for an `Accelerator`, in the place of its own.

    Args:
        self: the accelerator, which has prepared the optimizer.
        parameters: whose gradients are clipped together; shares are clipped by their own norm instead.
        max_norm: largest norm.
        norm_type: of the norm; of shares 2.
    Returns:
        The norm before clipping, where accelerate tells it.
    Raises:
        ValueError: shares are to be clipped by another norm.
    """
    found = (blocks_of(optimizer) for optimizer in self._optimizers)
    shares = [each for each in found if isinstance(each, BlockOptimizerRatio) and not each.dense_gradients]
    if not shares:
        norm: Tensor | None = type(self).clip_grad_norm_(self, parameters, max_norm, norm_type)
        return norm
    if len(shares) > 1 or norm_type != 2:
        raise ValueError(
            f"clip_grad_norm_old_version: got norm_type={norm_type} for {len(shares)} BlockOptimizerRatio, expected 2 "
            "for one. Pass dense_gradients=True to them to clip whole gradients by any norm."
        )
    _clipped.add(shares[0])
    return shares[0].clip_grad_norm_(max_norm)


def block_optimizer(
    given: Any = None,
    /,
    *,
    model: nn.Module | None = None,
    base: Callable[..., Optimizer] = AdamW,
    blocks: Mapping[str, Any] | None = None,
    **hyper: Any,
) -> Any:
    """A `BlockOptimizer` for a Trainer's `optimizer_cls_and_kwargs`, with FSDP2 and without.

        Trainer(..., optimizer_cls_and_kwargs=(block_optimizer, {"model": model, "lr": 1e-5,
                "blocks": {"switch_block_every": 100}}), callbacks=[BAdamCallback])

    transformers 5 takes it for a factory, which it calls twice, `block_optimizer()(model, **kwargs)`, so that "model"
    may be left out; transformers 4 calls it in the place of a class.

    Args:
        given: what the trainer gives.
        model: to be trained.
        base: class of the base optimizer.
        blocks: options of the BlockOptimizer by name.
        hyper: of the base optimizer.  A `weight_decay` is for tensors of two or more dims, not for biases and norms.
    Raises:
        ValueError: there is no model.
    """
    if given is None and model is None:
        return block_optimizer
    network = given if model is None else model
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"block_optimizer: got a {type(network).__name__}, expected a model, as transformers before 5 gives param "
            'groups without names. Put "model": model into the dict beside block_optimizer.'
        )
    trained = [param for param in network.parameters() if param.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained}]
    if "weight_decay" in hyper:
        decaying = [param for param in trained if param.dim() > 1]
        rest = [param for param in trained if param.dim() <= 1]
        groups = [{"params": decaying}, {"params": rest, "weight_decay": 0.0}]
    kept = [group for group in groups if group["params"]]
    return BlockOptimizer(base(kept, **hyper), network.named_parameters(), **(blocks or {}))


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
