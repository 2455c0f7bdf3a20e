"""Clips averaged gradients before the step, where the user asks for that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.booster.sequence import add_sequence_parallel, part_of_sum
from colossal_bcd.sharding import Request, Sum, resolve, sum_of_squares


def clip_by_norm(engine: Any, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """Scale the averaged gradients so that their Euclidean norm over all ranks is at most `max_norm`.

    See `ZeroOptimizer.clip_grad_by_norm`.
    """
    if float(norm_type) != 2:
        raise ValueError(f"clip_grad_by_norm: got norm_type={norm_type!r}, expected 2, the Euclidean norm")
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_by_norm: got max_norm={max_norm!r}, expected a non-negative number")
    grads = _averages(engine, "clip_grad_by_norm")
    answers = resolve(_square_sums(engine, grads), engine._mesh)
    total = torch.stack(answers).sum() if answers else torch.zeros((), dtype=torch.float64, device=engine._device)
    (total,) = resolve([Sum(total.view(1), ("pp",))], engine._mesh)
    norm: Tensor = total[0].sqrt() / engine.loss_scale
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"clip_grad_by_norm: the gradients have norm {norm.item()}, expected a finite one. Pass "
            "error_if_nonfinite=False to leave them to the step, which stops or skips."
        )
    if grads:
        torch._foreach_mul_(list(grads.values()), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    _give_back(engine)
    return norm


def clip_by_value(engine: Any, clip_value: float) -> None:
    """Clamp the averaged gradients to [-clip_value, clip_value].

    See `ZeroOptimizer.clip_grad_by_value`.
    """
    if not clip_value >= 0:
        raise ValueError(f"clip_grad_by_value: got {clip_value!r}, expected a non-negative number")
    grads = _averages(engine, "clip_grad_by_value")
    if any(param in engine._reducer.images for param in grads):
        _give_back(engine)
        raise ValueError(
            "clip_grad_by_value: got low-rank gradients, whose values are not the gradient's. Give the plugin "
            "low_rank=LowRankOptions(reduce=False)."
        )
    limit = clip_value * engine.loss_scale
    for grad in grads.values():
        grad.clamp_(-limit, limit)
    _give_back(engine)


def require_foreach(caller: str, given: Mapping[str, object]) -> None:
    """Refuse what torch's functions take beside `foreach`, and what they do not take either.

    Raises:
        TypeError: there is another argument.
    """
    other = [name for name in given if name != "foreach"]
    if other:
        raise TypeError(f"{caller}: got an argument {other[0]!r}, expected none but foreach. Leave it out.")


def _square_sums(engine: Any, grads: Mapping[Parameter, Tensor]) -> list[Request]:
    """Requests for the squared norms, but for those that another pipeline stage counts; in the order of the masters."""
    masters, reducer, partition = engine.masters, engine._reducer, engine.config.partition_grad
    images = {param: reducer.images[param] for param in masters.of if param in grads and param in reducer.images}
    parts = {p: image.held(grads[p], partitioned=partition and image.divided) for p, image in images.items()}
    whole = resolve([image.complete(parts[param]) for param, image in images.items()], engine._mesh)
    squares: list[Request] = [image.square_sum(of) for image, of in zip(images.values(), whole, strict=True)]
    for param in masters.of:
        if param in grads and param not in images and param not in engine._tied_elsewhere:
            layout = masters.layout(param) if partition else masters.shard_layout(param)
            squares.append(sum_of_squares(grads[param][: layout.num_local], layout.axes))
    return squares


def _averages(engine: Any, caller: str) -> dict[Parameter, Tensor]:
    """The averaged gradients of the coming step, complete, as much of them as this rank has; written in place."""
    if not engine.require_grad_sync:
        raise ValueError(f"{caller}: got it within no_sync, expected it after the last backward pass, outside of it")
    engine.settle()
    reducer, options = engine._reducer, engine.config.low_rank
    if any(param in reducer.images for param in reducer.grads) and not options.clip_by_image:
        engine.show_gradients()
        raise ValueError(
            f"{caller}: got low-rank gradients, which travel as images without the whole gradient's norm. Give the "
            "plugin low_rank=LowRankOptions(clip_by_image=True) to clip by the norm of the images, or "
            "LowRankOptions(reduce=False) to reduce whole gradients."
        )
    add_sequence_parallel(engine.model, engine.tp_pg, engine.masters.of, reducer.grads)
    return reducer.grads


def _give_back(engine: Any) -> None:
    part_of_sum(engine.model, engine.tp_pg, engine.masters.of, engine._reducer.grads)
    engine.show_gradients()
