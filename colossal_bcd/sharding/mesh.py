"""Axis name -> process group of this rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = "dist.ProcessGroup | tuple[dist.ProcessGroup, ...]"


class Mesh:
    """The process groups behind the axis names of layouts.

    Args:
        groups: one group per axis; a tuple where an axis is the product of several groups (ColossalAI's
            `extra_dp_size`), which are then reduced one after the other.
        device: where the groups communicate; tensors on another device (offloaded states) travel through it.
            None: wherever the tensor is.
    """

    def __init__(self, groups: Mapping[str, Group] | None = None, device: torch.device | None = None) -> None:
        self._device = device
        self._under_way: list[tuple[dist.ProcessGroup, dist.Work]] = []
        self._groups: dict[str, tuple[dist.ProcessGroup, ...]] = {}
        for axis, group in (groups or {}).items():
            members = group if isinstance(group, tuple) else (group,)
            self._groups[axis] = tuple(member for member in members if dist.get_world_size(member) > 1)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that logs for all: rank 0 of the job."""
        return not dist.is_initialized() or dist.get_rank() == 0

    def communicates(self, axes: tuple[str, ...]) -> bool:
        """Whether a sum over these axes needs another rank."""
        return any(self._members(axis) for axis in axes)

    def all_reduce(self, tensor: Tensor, axis: str) -> None:
        """Sum `tensor` in place over the ranks of `axis`."""
        self.begin_all_reduce(tensor, axis)()

    def begin_all_reduce(self, tensor: Tensor, axis: str) -> Callable[[], None]:
        """Begin `all_reduce` and return what ends it, before which nobody may read or write the tensor."""
        sent = tensor if self._device is None else tensor.to(self._device)
        begun: list[tuple[dist.ProcessGroup, dist.Work]] = []
        for group in self._members(axis):
            self._end_others(group)
            begun = [(group, dist.all_reduce(sent, group=group, async_op=True))]
            self._under_way += begun

        def end() -> None:
            for each in begun:
                each[1].wait()
                self._under_way = [other for other in self._under_way if other is not each]
            if sent is not tensor:
                tensor.copy_(sent)

        return end

    def _end_others(self, group: dist.ProcessGroup) -> None:
        """Wait for what travels over other groups: NCCL may wait for ever where two of them communicate at once."""
        for other, work in self._under_way:
            if other is not group:
                work.wait()
        self._under_way = [each for each in self._under_way if each[0] is group]

    def size(self, axis: str) -> int:
        """Number of ranks on `axis`."""
        return math.prod(dist.get_world_size(group) for group in self._members(axis))

    def rank(self, axis: str) -> int:
        """This rank's number on `axis`, from 0; of several groups, the last one counts fastest."""
        place = 0
        for group in self._members(axis):
            place = place * dist.get_world_size(group) + dist.get_rank(group)
        return place

    @staticmethod
    def has_world() -> bool:
        """Whether a process group was made, of several processes or of this one."""
        return dist.is_available() and dist.is_initialized()

    @classmethod
    def world(cls, axis: str) -> Mesh:
        """All processes on one axis; this one alone where no process group was made."""
        group = dist.group.WORLD if cls.has_world() else None
        return cls({axis: () if group is None else group})

    def all_to_all(self, tensor: Tensor, sent: list[int], received: list[int], axis: str) -> Tensor:
        """Send consecutive runs of a flat tensor to the ranks of `axis`, and return theirs in order.

        Args:
            tensor: flat.
            sent: lengths of the runs that leave, by rank.
            received: lengths of the runs that come, by rank.
            axis: of one process group.
        Raises:
            ValueError: the axis is a product of several groups.
        """
        members = self._members(axis)
        if len(members) != 1:
            raise ValueError(f"mesh axis {axis!r} is a product of {len(members)} groups, expected one to exchange over")
        outgoing = tensor if self._device is None else tensor.to(self._device)
        incoming = outgoing.new_empty(sum(received))
        self._end_others(members[0])
        dist.all_to_all_single(incoming, outgoing, received, sent, group=members[0])
        return incoming.to(tensor.device)

    def _members(self, axis: str) -> tuple[dist.ProcessGroup, ...]:
        try:
            return self._groups[axis]
        except KeyError:
            raise ValueError(
                f"mesh axis {axis!r} is in a layout but not in the mesh, which has {sorted(self._groups)}"
            ) from None
