"""What ranks run in test_low_rank_gradients.py: GaLore where low-rank gradients were reduced instead of whole ones."""

from __future__ import annotations

from typing import Any

import torch
from conformance_cases import Sizes, process_mesh
from galore_cases import CASES, STEPS, gradient, one_process, optimizer_of, weight
from torch import Tensor

from colossal_bcd.sharding import Layout, LowRankGradient, TensorSplit, resolve
from support.errors import largest_error


def layout_of(index: int, sizes: Sizes, tp_rank: int, zero_rank: int, whole_rows: bool) -> Layout:
    case = CASES[index]
    split = None
    if case.dim is not None:
        split = TensorSplit(
            axis="tp", dim=case.dim, rank=tp_rank, size=sizes.tp, sections=case.sections, padded=case.padded
        )
    return Layout(shape=case.shape, split=split).sliced("zero", zero_rank, sizes.zero, whole_rows=whole_rows)


def local_gradient(index: int, step: int, rank: int, size: int) -> Tensor:
    """Gradients of the data-parallel ranks; their mean is `gradient`."""

    def noise(of: int) -> Tensor:
        generator = torch.Generator().manual_seed(10**6 + 100 * index + 10 * step + of % size)
        return torch.randn(CASES[index].shape, generator=generator, dtype=torch.float64)

    return gradient(index, step) + noise(rank) - noise(rank + 1)


def whole_image(image: LowRankGradient, grad: Tensor) -> Tensor:
    """The textbook's: of the global matrix."""
    matrix = grad.flatten(1)
    matrix = matrix if image.left is None else image.left.T @ matrix
    return matrix if image.right is None else matrix @ image.right


def sharded(sizes: Sizes, hyper: dict[str, Any], partitioned: bool, whole_rows: bool) -> dict[str, Any]:
    """Largest error against one process that sees whole gradients; parameters with an image by step; error of norms."""
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    layouts = [layout_of(i, sizes, tp_rank, zero_rank, whole_rows) for i in range(len(CASES))]
    params = [torch.nn.Parameter(layout.shard(weight(i))) for i, layout in enumerate(layouts)]
    optimizer = optimizer_of(params, hyper)
    optimizer.bind(dict(zip(params, layouts, strict=True)), mesh)
    counts, norm_error = [], 0.0
    for step in range(STEPS):
        wanted = optimizer.low_rank_wanted()
        counts.append(len(wanted))
        held: dict[Tensor, Tensor] = {}
        for index, (param, layout) in enumerate(zip(params, layouts, strict=True)):
            param.grad = layout.shard(gradient(index, step))
            if param not in wanted:
                continue
            image = wanted[param]
            mine = local_gradient(index, step, zero_rank, sizes.zero) / sizes.zero
            flat = image.of(Layout(shape=layout.shape, split=layout.split).shard(mine))
            sent = image.rows(flat) if partitioned and image.divided else flat
            if mesh.communicates(("zero",)):
                mesh.all_reduce(sent, "zero")
            part = sent[zero_rank] if partitioned and image.divided else sent
            held[param] = image.of_slice(part, partitioned=partitioned and image.divided)
            param.grad = param.new_zeros(()).expand_as(param)
        complete = resolve([wanted[param].complete(held[param]) for param in wanted], mesh)
        images = dict(zip(wanted, complete, strict=True))
        norms = resolve([wanted[param].square_sum(images[param]) for param in wanted], mesh)
        for param, norm in zip(wanted, norms, strict=True):
            index = next(i for i, other in enumerate(params) if other is param)
            exact = whole_image(wanted[param], gradient(index, step)).square().sum()
            norm_error = max(norm_error, largest_error(norm / exact, torch.ones_like(norm)))
        optimizer.give_low_rank(images)
        optimizer.step()
    worst = 0.0
    for param, layout, want in zip(params, layouts, one_process(hyper), strict=True):
        data = slice(0, layout.num_local)
        worst = max(worst, largest_error(param.detach().view(-1)[data], layout.shard(want).view(-1)[data]))
    return {"error": worst, "counts": counts, "norm_error": norm_error}


def sharded_by_projection(sizes: Sizes, partitioned: bool) -> dict[str, dict[str, Any]]:
    """`sharded` of every projection, with random bases; slices of "std" begin with a row."""
    return {
        projection: sharded(sizes, {"svd_method": "random", "proj_type": projection}, partitioned, projection == "std")
        for projection in ("std", "reverse_std", "full")
    }
