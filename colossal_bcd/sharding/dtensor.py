"""Which part of which tensor a DTensor is: what FSDP2 and `parallelize_module` have sharded, as a `Layout`.

A weight of shape (6, 4) on two by two ranks, sharded by rows over tp first and then by FSDP:

    placements  [_StridedShard(0, split_factor=2), Shard(0)]  on  [fsdp, tp]
    layout      split of dim 0 over "tp", flat slice of the shard over "zero"

    (tp, zero)   (0,0)   rows 0, 1      A slice of whole rows is as long as the longest; the last ranks store fewer rows
                 (0,1)   row  2         or none, and no padding, so that a local tensor has `num_local` values.
                 (1,0)   rows 3, 4
                 (1,1)   row  5

Replicas (HSDP) and meshes of one rank drop out.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from colossal_bcd.sharding.layout import FlatSlice, Layout, TensorSplit
from colossal_bcd.sharding.mesh import Mesh
from colossal_bcd.sharding.regions import Region
from colossal_bcd.sharding.rounds import Sum

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is one of torch's distributed tensors."""
    # Where nobody has imported them there are none; a torch without torch.distributed cannot.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_values(tensor: Tensor) -> Tensor:
    """What this rank stores of a tensor, detached and sharing memory.

    Returns:
        Of a DTensor the local one, in its own shape and without padding (`Layout.num_local` values); else the tensor.
    """
    if not is_dtensor(tensor):
        # ColossalAI's tensor-parallel weights have a method of their own that copies what they know of their mesh.
        return Tensor.detach(tensor)
    # With gradients enabled the local tensor would be a node of the graph.
    with torch.no_grad():
        return tensor.to_local().detach()


def placed_like(grad: Tensor, param: DTensor, subject: str) -> DTensor:
    """A gradient whose placements are those of its parameter, by one collective where they are others.

    Backward may leave partial sums, as sequence parallelism does of the weights of norms.  Placements are the same on
    all ranks of a mesh, so all of them redistribute, or none.

    Args:
        grad: of the parameter.
        param: the parameter.
        subject: for the error.
    Raises:
        ValueError: the gradient is a plain tensor, or lies on another mesh.
    """
    if not is_dtensor(grad) or grad.device_mesh != param.device_mesh:
        got = f"a DTensor on {grad.device_mesh}" if is_dtensor(grad) else f"a plain tensor of {tuple(grad.shape)}"
        raise ValueError(
            f"{subject}: got {got}, expected a DTensor on {param.device_mesh} as the parameter is. Assign "
            "DTensor.from_local(grad, param.device_mesh, param.placements)."
        )
    if grad.placements == param.placements:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


class MeshAxes:
    """Names for the process groups of device meshes: "zero" or "tp", by their ranks, in the order of appearance.

    Equal sets of ranks are one axis, whichever meshes they are of, so that a round is one collective for all of them.
    """

    def __init__(self) -> None:
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._names: dict[tuple[int, ...], str] = {}
        self._device: torch.device | None = None

    def name(self, kind: str, mesh: DeviceMesh, dim: int) -> str:
        """The axis of a dim of a device mesh.

        Args:
            kind: the name that it gets if its ranks are new; "zero" becomes "zero2" for another set of ranks.
            mesh: that this process is in.
            dim: of the mesh.
        """
        group = mesh.get_group(dim)
        ranks = tuple(dist.get_process_group_ranks(group))
        if ranks not in self._names:
            count = sum(name.rstrip("0123456789") == kind for name in self._groups)
            self._names[ranks] = kind if count == 0 else f"{kind}{count + 1}"
            self._groups[self._names[ranks]] = group
            if mesh.device_type != "cpu":
                index = torch.get_device_module(mesh.device_type).current_device()
                self._device = torch.device(mesh.device_type, index)
        return self._names[ranks]

    def mesh(self) -> Mesh:
        """The groups of all axes that were named; offloaded tensors travel through the device of their mesh."""
        return Mesh(self._groups, self._device)


def layout_of(tensor: Tensor, axes: MeshAxes) -> Layout:
    """Which part of a tensor this rank has.

    Args:
        tensor: a DTensor, or a plain tensor, which is whole.
        axes: names the axes of the layout.
    Raises:
        ValueError: the placements are partial sums, or divide the tensor in another way than one dim and then rows.
    """
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
        return Layout.whole(shape)
    mesh, coordinate, dims = tensor.device_mesh, tensor.device_mesh.get_coordinate(), _divided(tensor)
    if coordinate is None:
        raise ValueError(
            f"layout of a DTensor of shape {shape}: this process is not in its {mesh}. Give each process the "
            "parameters of its own mesh only."
        )
    split = piece = None
    for index in dims:
        dim, size, rank, shard = _dim(tensor.placements[index]), mesh.size(index), coordinate[index], list(shape)
        if split is not None:
            shard[split.dim] //= split.size
        if index == dims[-1] and dim == 0:
            length = -(-shard[0] // size) * math.prod(shard[1:])
            piece = FlatSlice(axis=axes.name("zero", mesh, index), rank=rank, size=size, length=length)
        elif shard[dim] % size:
            raise ValueError(
                f"{_subject(tensor)} divides {shard[dim]} along dim {dim} by {size} ranks, expected a multiple: "
                "only rows that nothing divides further may be uneven. Pad the dim, or leave the parameter whole."
            )
        else:
            split = TensorSplit(axis=axes.name("tp", mesh, index), dim=dim, rank=rank, size=size)
    return Layout(shape=shape, split=split, slice=piece)


@dataclass(frozen=True, kw_only=True)
class WholeTensor:
    """A tensor that belongs to a parameter, such as its state, as a DTensor of its whole shape on the parameter's mesh.

    Args:
        region_of: which part of the tensor a rank has whose layout of the parameter is given.
        param: the parameter.
        layout: of the parameter on this rank.
    """

    region_of: Callable[[Layout], Region]
    param: DTensor
    layout: Layout

    @property
    def region(self) -> Region:
        """This rank's part."""
        return self.region_of(self.layout)

    @cached_property
    def is_sliced(self) -> bool:
        """Whether the slices of the parameter divide the tensor, too, along the first dim of its region's layout.

        Raises:
            ValueError: they divide it in another way than `fully_shard` does.
        """
        regions = self._of_slices
        if all((each.start, each.stop) == (0, each.layout.shard_data) or not each.numel for each in regions):
            return False
        first = self._first
        length = -(-first // len(regions)) * (self.region.layout.shard_data // first)
        bounds = [min(rank * length, self.region.layout.shard_data) for rank in range(len(regions) + 1)]
        if [(each.start, each.stop) for each in regions if each.numel] != [
            pair for pair in itertools.pairwise(bounds) if pair[0] < pair[1]
        ]:
            raise ValueError(
                f"a tensor of {self.region.shape} that belongs to a parameter of {self.layout.shape} is not divided by "
                "rows, so torch.distributed.checkpoint cannot have it. Save it by colossal_bcd's own checkpoints."
            )
        return True

    @property
    def is_missing_somewhere(self) -> bool:
        """Whether ranks without data of the parameter lack what the others have alike."""
        return not self.is_sliced and any(not each.numel for each in self._of_slices)

    def sum_of_first(self, values: Tensor) -> Sum:
        """Request the values where some rank lacks them: replicas write into one file, so all must have them.

        Args:
            values: [n] data on this rank.
        """
        piece, total = self.layout.slice, self.region.layout.shard_data
        assert piece is not None
        sent = values if piece.rank == 0 else values.new_zeros(total)
        return Sum(sent, (piece.axis,), exact=True)

    def join(self, values: Tensor) -> DTensor:
        """The DTensor.

        Args:
            values: [n] data on this rank; of `sum_of_first` where some rank lacks it.
        """
        from torch.distributed.tensor import DTensor

        shape = list(self.region.layout.shard_shape)
        if self.is_sliced:
            shape[0] = len(values) // max(math.prod(shape[1:]), 1)
        local = values.reshape(shape)
        whole = torch.empty(self.region.shape, device="meta")
        return DTensor.from_local(
            (local.T if self.region.transposed else local).contiguous(),
            self.param.device_mesh,
            self._placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    def part(self, whole: Tensor) -> Tensor:
        """[n] this rank's data of a whole tensor, which may be a DTensor of any placements on the parameter's mesh."""
        if is_dtensor(whole):
            if tuple(whole.placements) == self._placements and whole.device_mesh == self.param.device_mesh:
                local = local_values(whole)
                return (local.T if self.region.transposed else local).reshape(-1)[: self.region.numel]
            whole = whole.full_tensor()
        return self.region.pick(whole)

    @cached_property
    def _of_slices(self) -> list[Region]:
        piece = self.layout.slice
        if piece is None:
            return [self.region]
        return [self.region_of(self.layout.at(slice_rank=rank)) for rank in range(piece.size)]

    @property
    def _first(self) -> int:
        shape = self.region.layout.shard_shape
        return shape[0] if shape else 1

    @cached_property
    def _placements(self) -> tuple[Placement, ...]:
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        placements: list[Placement] = [Replicate() for _ in self.param.placements]
        dims, split, last = _divided(self.param), self.region.layout.split, len(self.region.shape) - 1
        if split is not None and split.size > 1:
            placements[dims[0]] = Shard(last - split.dim if self.region.transposed else split.dim)
        if self.is_sliced:
            dim = last if self.region.transposed else 0
            behind = split.size if split is not None and split.dim == 0 and dims[-1] < dims[0] else 1
            placements[dims[-1]] = Shard(dim) if behind == 1 else _StridedShard(dim, split_factor=behind)
        return tuple(placements)


def refuse_broadcast(tensors: Iterable[tuple[str, DTensor]]) -> None:
    """Refuse torch's `broadcast_from_rank0` where it would scramble values; the same on every rank.

    torch puts a tensor together that ranks divide unevenly along another dim than the first as a view with gaps, and
    broadcasts its memory as if there were none.  What asks for a state dict says which options it was given.

    Args:
        tensors: that a state dict will have, by name.
    """
    for name, tensor in tensors if _is_for_broadcast() else ():
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            dim: int = getattr(placement, "dim", 0)
            if dim > 0 and tensor.shape[dim] % size:
                raise ValueError(
                    f"StateDictOptions(broadcast_from_rank0=True): got state {name!r} of shape {tuple(tensor.shape)}, "
                    f"whose dim {dim} is divided unevenly by {size} ranks, so that torch's broadcast would scramble "
                    "it. Give every rank the full state with full_state_dict=True alone, or use dcp.save and dcp.load."
                )


def _is_for_broadcast() -> bool:
    """Whether a caller, however far, is torch's function that was asked to broadcast."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict" and getattr(
            frame.f_locals.get("info"), "broadcast_from_rank0", False
        ):
            return True
        frame = frame.f_back
    return False


def _divided(tensor: DTensor) -> list[int]:
    """Dims of the device mesh that divide a tensor, in the order in which they do: at most two, rows last."""
    # A private name of torch, but the only one for what `fully_shard` makes of what tensor parallelism has sharded.
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    mesh, placements = tensor.device_mesh, tensor.placements
    found: list[int] = []
    for index, placement in enumerate(placements):
        if placement.is_partial():
            raise ValueError(
                f"{_subject(tensor)} is a sum that is not added up, expected parts or copies. "
                "Call redistribute(placements=...) with Shard or Replicate first."
            )
        if isinstance(placement, (Shard, _StridedShard)):
            if mesh.size(index) > 1:
                found.append(index)
        elif not placement.is_replicate():
            raise ValueError(f"{_subject(tensor)} has a {type(placement).__name__}, expected Shard or Replicate.")
    for index in found:
        # Parts are joined by the numbers of the ranks in their groups, which follow from the ranks alone.
        if not bool((mesh.mesh.diff(dim=index) > 0).all()):
            raise ValueError(
                f"{_subject(tensor)} is on a mesh of ranks {mesh.mesh.tolist()}, expected ascending ranks along dim "
                f"{index}. Make the mesh by init_device_mesh."
            )
    # A strided one divides what the other one of rows has left, if it is strided by that.
    strided = {
        i: each.split_factor for i, each in enumerate(placements) if i in found and isinstance(each, _StridedShard)
    }
    found.sort(key=lambda index: (_dim(placements[index]) == 0, index in strided))
    rows = [index for index in found if _dim(placements[index]) == 0]
    behind = math.prod(mesh.size(index) for index in rows if index not in strided)
    if (
        len(found) > 2
        or (len(found) == 2 and not rows)
        or any(index not in rows or factor != behind for index, factor in strided.items())
    ):
        raise ValueError(
            f"{_subject(tensor)} divides it in another way than one dim and then rows of what is left. Shard it over "
            "one tensor-parallel dim and one of fully_shard, or leave the parameter whole."
        )
    return found


def _dim(placement: Placement) -> int:
    """The dim of the tensor that a Shard divides."""
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim


def _subject(tensor: DTensor) -> str:
    return f"layout of a DTensor of shape {tuple(tensor.shape)}: {tuple(tensor.placements)}"
