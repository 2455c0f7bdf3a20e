"""`partition` and `explain`: the blocks of a model, and what an optimizer does with each parameter."""

from __future__ import annotations

from typing import Any

from colossal_bcd.block.trained import trained_of
from colossal_bcd.cli.budget import Job
from colossal_bcd.cli.meshes import layouts_of
from colossal_bcd.memory.traffic import rounds_of
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout


def blocks_of(job: Job, *, embedding: bool = False, head: bool = False) -> dict[str, Any]:
    """The blocks that a BlockOptimizer makes of a model, and what is in none.

    Args:
        job: model, layers of a block (1 where the job says nothing) and precision count.
        embedding: also make a block of the embeddings.
        head: also make a block of the head.
    Raises:
        ValueError: the model's names show no layers, or it has no embedding or head of its own.
    """
    from colossal_bcd.block.partition import partition

    model = job.model.on_meta(job.dtype)
    every = list(model.named_parameters(remove_duplicate=False))
    first: dict[Any, str] = {}
    for name, param in every:
        first.setdefault(param, name)
    sizes = {name: param.numel() for param, name in first.items()}
    blocks = partition(
        sizes,
        aliases={name: first[param] for name, param in every if first[param] != name},
        num_layers_per_block=1 if job.blocks is None else job.blocks,
        include_embedding=embedding,
        include_lm_head=head,
    )
    found = [
        {
            "name": block.name,
            "tensors": len(block.parameters),
            "parameters": sum(map(sizes.__getitem__, block.parameters)),
        }
        for block in blocks
    ]
    inside = {name for block in blocks for name in block.parameters}
    frozen = {name: size for name, size in sizes.items() if name not in inside}
    return {
        "model": {"name": job.model.name, "parameters": sum(sizes.values())},
        "blocks": found,
        "largest": max(each["parameters"] for each in found),
        "in_no_block": frozen,
    }


def parameters_of(job: Job) -> list[dict[str, Any]]:
    """A row for every parameter that trains at once: rule, layout, rounds of a step, bytes of state and master, lr.

    Raises:
        ValueError: what is asked for does not go together.
    """
    model, optimizer = job.ready(job.model.on_meta(job.dtype))
    trained, layouts = trained_of(optimizer), layouts_of(model, job.mesh)
    base, rows = trained.base_optimizer, []
    names = {param: name for name, param in model.named_parameters()}
    assert isinstance(base, ShardedOptimizer)
    whole_rows, key = not base.is_elementwise, 0
    for group, members in zip(base.param_groups, trained.members, strict=True):
        for param in members:
            hyper, layout = base.hyper_of(group, key), layouts[param]
            key += 1
            if not param.requires_grad:
                continue
            if job.mesh.zero_ranks > 1:
                layout = layout.sliced("zero", 0, job.mesh.dp, whole_rows=whole_rows)
            wide = 4 if job.masters else param.itemsize
            has_master = wide != param.itemsize or job.mesh.zero_ranks > 1
            state = sum(spec.num_bytes(param.dtype) for spec in base.state_spec(layout, hyper).values())
            rows.append(
                {
                    "parameter": names[param],
                    "rule": base.rule_name,
                    "layout": text_of(layout),
                    "rounds": len(rounds_of(base, layout, hyper, job.mesh.communicates)),
                    "bytes": state + has_master * layout.max_local * wide,
                    "lr": float(group["lr"]),
                }
            )
    return rows


def text_of(layout: Layout) -> str:
    """The global shape and how it is divided."""
    shape, split, part = "x".join(map(str, layout.shape)) or "scalar", layout.split, layout.slice
    over = "" if split is None else f", dim {split.dim} / {split.size} {split.axis}"
    return shape + over + ("" if part is None else f", flat / {part.size} {part.axis}")
