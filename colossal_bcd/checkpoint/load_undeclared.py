"""Reading state that no optimizer of this package has declared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.checkpoint.assembly import MASTER
from colossal_bcd.checkpoint.errors import CheckpointError
from colossal_bcd.checkpoint.opened import Checkpoint
from colossal_bcd.checkpoint.trained import TrainedTensor
from colossal_bcd.checkpoint.undeclared import MARK, put_together, region_of
from colossal_bcd.optim.foreign.bitsandbytes_states import CHUNK, completed, num_chunks
from colossal_bcd.sharding.regions import StackedRegion, chunks, elements


def require_parts_of(checkpoint: Checkpoint, held: TrainedTensor, states: Mapping[str, dict[str, Any]]) -> None:
    """Check that the file has state for this rank's part of one parameter.

    Args:
        checkpoint: the file.
        held: the parameter.
        states: what the manifest says of its state, without the master.
    Raises:
        CheckpointError: shapes are others, or the state is of other parts of the parameter.
    """
    region = region_of(held.layout)
    for name, said in states.items():
        shape, whole, kind = tuple(said["shape"]), held.layout.shape, said["kind"]
        if kind == "elementwise":
            check_shape(checkpoint, held, name, said, whole)
        elif kind == "stacked":
            check_shape(checkpoint, held, name, said, shape[: max(len(shape) - len(whole), 0)] + whole)
        elif kind == "chunks":
            cut = chunks(held.layout, CHUNK)
            if cut is None:
                raise _other_parts(checkpoint, held, name, "the whole parameter", region)
            check_shape(checkpoint, held, name, said, shape[: max(len(shape) - len(cut.shape), 0)] + cut.shape)
        elif kind not in ("whole", "part"):
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: state {name!r} of parameter {held.name!r} is not one value for each of "
                "its values. It is of another optimizer."
            )
    regions: dict[str, list[str]] = {}
    for name in states:
        state, mark, of = name.partition(MARK)
        if mark:
            regions.setdefault(state, []).append(of)
    regions.update({"": list(checkpoint.manifest.get("own_numbers", {}).get(held.name, {}))})
    for state, saved in regions.items():
        if saved and region not in saved:
            raise _other_parts(checkpoint, held, state or "numbers", " and ".join(sorted(saved)[:2]), region)


def check_shape(
    checkpoint: Checkpoint, held: TrainedTensor, name: str, said: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    """Refuse a tensor of another shape.

    Raises:
        CheckpointError: the manifest says that it has another one.
    """
    if tuple(said["shape"]) != shape:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: {name!r} of parameter {held.name!r} has shape {tuple(said['shape'])}, "
            f"expected {shape}. It is of another model or other hyper-parameters."
        )


def read_undeclared(
    optimizer: Optimizer,
    checkpoint: Checkpoint,
    held: TrainedTensor,
    tensor: Tensor,
    saved: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """The state of one parameter, with the types with which it was saved.

    Args:
        optimizer: whose it will be.
        checkpoint: the file.
        held: the parameter.
        tensor: what the optimizer holds of it.
        saved: what the manifest says of its state.
    """
    region, group = region_of(held.layout), _group_of(optimizer, held)
    numbers = checkpoint.manifest["numbers"][held.name]
    numbers = checkpoint.manifest.get("own_numbers", {}).get(held.name, {}).get(region, numbers)
    tensors: dict[str, Tensor] = {}
    for full, said in saved.items():
        name, mark, of = full.partition(MARK)
        if full == MASTER or (mark and of != region):
            continue
        read = checkpoint.tensor(f"{held.name}.{full}")
        if said["kind"] in ("whole", "part"):
            # torch's optimizers keep the step on the host unless a captured graph counts it.
            on_device = name != "step" or group.get("capturable") or group.get("fused")
            tensors[name] = read.to(tensor.device if on_device else "cpu", copy=True)
            continue
        cut, shape = elements(held.layout), tuple(tensor.shape)
        if said["kind"] == "chunks":
            of_chunks = chunks(held.layout, CHUNK)
            assert of_chunks is not None
            cut, shape = of_chunks, (num_chunks(held.layout),)
        lead = tuple(said["shape"])[: len(said["shape"]) - len(cut.shape)]
        cut = StackedRegion.of(cut, lead)
        tensors[name] = torch.zeros(lead + shape, dtype=read.dtype, device=tensor.device)
        cut.write(tensors[name], cut.pick(read))
    return completed(optimizer, put_together(tensors, numbers), held.layout)


def _group_of(optimizer: Optimizer, held: TrainedTensor) -> Mapping[str, Any]:
    group: Mapping[str, Any] = optimizer.param_groups[held.group]
    return group


def _other_parts(checkpoint: Checkpoint, held: TrainedTensor, state: str, saved: str, region: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {checkpoint.name}: {state!r} of parameter {held.name!r} is that of {saved}, and nothing says what "
        f"it is for another part, expected one of {region}. Load it under the plugin and on the number of ranks that "
        "saved it."
    )
