"""What ColossalAI's modes and its users do to averaged gradients: loss scale, sequence-parallel sums, clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin
from colossalai.shardformer.layer.utils import SeqParallelUtils
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.engine.config import EngineConfig
from colossal_bcd.engine.masters import ShardedMasters
from colossal_bcd.engine.norm import total_of
from colossal_bcd.engine.reducer import GradientReducer
from colossal_bcd.sharding import Mesh, Request, Sum, resolve, sum_of_squares


class LossScaler(FP16MixedPrecisionMixin):
    """ColossalAI's dynamic loss scaling, looking for overflow in the engine's gradients."""

    def __init__(self, gradients: Callable[[], list[Tensor]], **kwargs: float) -> None:
        super().__init__(**kwargs)
        self._gradients = gradients

    def check_local_overflow(self) -> bool:
        grads = [grad for grad in self._gradients() if grad.numel()]
        return bool(grads) and not bool(torch.stack([grad.abs().amax().float() for grad in grads]).isfinite().all())


class SequenceSums:
    """Adds up gradients that sequence parallelism leaves partial on tensor-parallel ranks; pipelines do so."""

    def __init__(self, model: Any, tp_group: dist.ProcessGroup | None) -> None:
        shard_config = getattr(model, "shard_config", None)
        self._tp_group = tp_group
        self._wanted = (
            shard_config is not None
            and shard_config.enable_sequence_parallelism
            and model.stage_manager is None
            and shard_config.sequence_parallelism_mode in ("split_gather", "ring")
        )

    def add_up(self, params: Iterable[Parameter], grads: Mapping[Parameter, Tensor]) -> None:
        """Add the partial gradients of those of `params` that are replicated over the ranks, in place."""
        partial = self._partial(params, grads)
        if partial:
            SeqParallelUtils.allreduce_partial_data_grad(process_group=self._tp_group, grads=partial)

    def divide(self, params: Iterable[Parameter], grads: Mapping[Parameter, Tensor]) -> None:
        """Undo `add_up`: divide sums into equal shares, which it adds up again."""
        for grad in self._partial(params, grads):
            grad.div_(dist.get_world_size(self._tp_group))

    def _partial(self, params: Iterable[Parameter], grads: Mapping[Parameter, Tensor]) -> list[Tensor]:
        if not self._wanted:
            return []
        return [
            grads[param] for param in params if SeqParallelUtils.is_sp_partial_derived_param(param) and param in grads
        ]


class Clipping:
    """Mixin of `ZeroOptimizer`: clips averaged gradients between the last backward pass and `step`."""

    config: EngineConfig
    masters: ShardedMasters
    mixed_precision_mixin: Any
    require_grad_sync: bool
    settle: Callable[[], None]
    show_gradients: Callable[[], None]
    _reducer: GradientReducer
    _sequence: SequenceSums
    _mesh: Mesh
    _tied_elsewhere: Set[Parameter]

    @property
    def loss_scale(self) -> float:
        """By which gradients are too large until the step."""
        return 1.0 if self.mixed_precision_mixin is None else self.mixed_precision_mixin.loss_scale

    @property
    def _device(self) -> torch.device:
        """Where the process groups communicate."""
        return get_accelerator().get_current_device()

    def clip_grad_by_norm(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, **kwargs: Any
    ) -> Tensor:
        """Clip the averaged gradients of what trains, between the last backward pass and `step`.  All ranks must call.

        The plugin's `max_norm` clips in the step, too.

        Args:
            max_norm: largest Euclidean norm over all parameters and ranks.
            norm_type: 2.
            error_if_nonfinite: raise if the norm is infinite or not a number; waits for the device.
            kwargs: `foreach`, as of `torch.nn.utils.clip_grad_norm_`, changes nothing.
        Returns:
            Scalar: the norm before, without the loss scale.
        Raises:
            ValueError: another norm is asked for, or it comes within `no_sync`, or low-rank gradients have no norm.
            RuntimeError: see `error_if_nonfinite`.
        """
        _require_foreach("clip_grad_by_norm", kwargs)
        if float(norm_type) != 2:
            raise ValueError(f"clip_grad_by_norm: got norm_type={norm_type!r}, expected 2, the Euclidean norm")
        if not max_norm >= 0:
            raise ValueError(f"clip_grad_by_norm: got max_norm={max_norm!r}, expected a non-negative number")
        grads = self._averages("clip_grad_by_norm")
        total = total_of(resolve(self._square_sums(grads), self._mesh), self._device)
        (total,) = resolve([Sum(total, ("pp",))], self._mesh)
        norm: Tensor = total[0].sqrt() / self.loss_scale
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"clip_grad_by_norm: the gradients have norm {norm.item()}, expected a finite one. Pass "
                "error_if_nonfinite=False to leave them to the step, which stops or skips."
            )
        if grads:
            torch._foreach_mul_(list(grads.values()), (max_norm / (norm + 1e-6)).clamp(max=1.0))
        self._give_back()
        return norm

    def clip_grad_by_value(self, clip_value: float, **kwargs: Any) -> None:
        """Clamp the averaged gradients of what trains to [-clip_value, clip_value], as `clip_grad_by_norm` does."""
        _require_foreach("clip_grad_by_value", kwargs)
        if not clip_value >= 0:
            raise ValueError(f"clip_grad_by_value: got {clip_value!r}, expected a non-negative number")
        grads = self._averages("clip_grad_by_value")
        if any(param in self._reducer.low_rank for param in grads):
            self._give_back()
            raise ValueError(
                "clip_grad_by_value: got low-rank gradients, whose values are not the gradient's. Give the plugin "
                "low_rank=LowRankOptions(reduce=False)."
            )
        limit = clip_value * self.loss_scale
        for grad in grads.values():
            grad.clamp_(-limit, limit)
        self._give_back()

    def _square_sums(self, grads: Mapping[Parameter, Tensor]) -> list[Request]:
        """Requests for the squared norms, but for those that another pipeline stage counts; in the masters' order."""
        masters, partition = self.masters, self.config.partition_grad
        wanted = {param: of for param in masters.of if param in grads and (of := self._reducer.low_rank.get(param))}
        shares = {p: of.of_slice(grads[p], partitioned=partition and of.divided) for p, of in wanted.items()}
        whole = resolve([of.complete(shares[param]) for param, of in wanted.items()], self._mesh)
        squares: list[Request] = [of.square_sum(grad) for of, grad in zip(wanted.values(), whole, strict=True)]
        for param in masters.of:
            if param in grads and param not in wanted and param not in self._tied_elsewhere:
                layout = masters.layout(param) if partition else masters.shard_layout(param)
                squares.append(sum_of_squares(grads[param][: layout.num_local], layout.axes))
        return squares

    def _averages(self, caller: str) -> dict[Parameter, Tensor]:
        """The averaged gradients of the coming step, complete, as much of them as this rank has; written in place."""
        if not self.require_grad_sync:
            raise ValueError(
                f"{caller}: got it within no_sync, expected it after the last backward pass, outside of it"
            )
        self.settle()
        grads = self._reducer.grads
        if any(param in self._reducer.low_rank for param in grads) and not self.config.low_rank.clip_by_image:
            self.show_gradients()
            raise ValueError(
                f"{caller}: got low-rank gradients, which travel without the whole gradient's norm. Give the "
                "plugin low_rank=LowRankOptions(clip_by_image=True) to clip by the norm of the images, or "
                "LowRankOptions(reduce=False) to reduce whole gradients."
            )
        self._sequence.add_up(self.masters.of, grads)
        return grads

    def _give_back(self) -> None:
        self._sequence.divide(self.masters.of, self._reducer.grads)
        self.show_gradients()


def _require_foreach(caller: str, given: Mapping[str, object]) -> None:
    """Refuse what torch's functions take beside `foreach`, and what they do not take either."""
    other = [name for name in given if name != "foreach"]
    if other:
        raise TypeError(f"{caller}: got an argument {other[0]!r}, expected none but foreach. Leave it out.")
