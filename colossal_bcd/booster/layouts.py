"""From ColossalAI's sharded models to layouts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from colossalai.tensor.d_tensor import get_sharding_spec, is_distributed_tensor
from torch import nn

from colossal_bcd.sharding import Layout, TensorSplit


def shard_layouts(
    module: nn.Module,
    shapes: Mapping[int, tuple[int, ...]],
    tp_rank: int,
    tp_size: int,
    required: Collection[int] | None = None,
) -> dict[nn.Parameter, Layout]:
    """The tensor-parallel layout of each parameter that is in `shapes` and in `module`.

    Which dim is divided is read from ColossalAI's mark, or, for fused weights, which carry none, from the shapes; the
    fused sections are those of the module (`split_sizes`); a longer dim 0 than the global one is padding.

    Args:
        module: the model after ShardFormer.
        shapes: id of a parameter -> its global shape, taken before ShardFormer (which keeps the parameter objects).
        tp_rank: this rank in the tensor-parallel group.
        tp_size: number of ranks in it.
        required: ids of those that are to be trained; others are left out where their shard does not follow from the
            global shape.  None: all.
    Raises:
        ValueError: a required parameter's shard does not follow from its global shape.
    """
    sections = {
        param: tuple(child.split_sizes)
        for child in module.modules()
        if hasattr(child, "split_sizes")
        for param in child.parameters(recurse=False)
    }
    layouts = {}
    for name, param in module.named_parameters():
        if id(param) in shapes:
            shape = tuple(shapes[id(param)])
            if required is not None and id(param) not in required and not _follows(param, shape, tp_size):
                continue
            dim = _split_dim(param, shape)
            layouts[param] = _layout(name, param, shape, dim, tp_rank, tp_size, sections.get(param))
    return layouts


def _follows(param: nn.Parameter, shape: tuple[int, ...], tp_size: int) -> bool:
    """Whether a shard is the whole, or one of `tp_size` parts of it along one dim."""
    if len(shape) != param.dim():
        return False
    divided = [(whole, local) for whole, local in zip(shape, param.shape, strict=True) if whole != local]
    return not divided or (len(divided) == 1 and divided[0][1] * tp_size >= divided[0][0])


def _split_dim(param: nn.Parameter, shape: tuple[int, ...]) -> int | None:
    if is_distributed_tensor(param):
        divided = list(get_sharding_spec(param).dim_partition_dict)
    else:
        divided = [dim for dim, (whole, local) in enumerate(zip(shape, param.shape, strict=True)) if whole != local]
    assert len(divided) <= 1, f"a parameter divided along dims {divided}"
    return divided[0] if divided else None


def _layout(
    name: str,
    param: nn.Parameter,
    shape: tuple[int, ...],
    dim: int | None,
    tp_rank: int,
    tp_size: int,
    sections: tuple[int, ...] | None,
) -> Layout:
    if dim is None:
        layout = Layout.whole(shape)
    else:
        length = param.shape[dim] * tp_size
        split = TensorSplit(
            axis="tp",
            dim=dim,
            rank=tp_rank,
            size=tp_size,
            sections=sections if sections is not None and sum(sections) == shape[dim] else None,
            padded=length if length != shape[dim] else None,
        )
        layout = Layout(shape=shape, split=split)
    if layout.local_shape != tuple(param.shape):
        raise ValueError(
            f"parameter {name!r}: a shard of {tuple(param.shape)} does not follow from the global shape {shape} on "
            f"{tp_size} tensor-parallel ranks. Construct the optimizer from the parameters of the model that is "
            "boosted, before boosting."
        )
    return layout
