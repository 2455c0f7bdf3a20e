"""Ranks that die, stall or differ: the others end with an error that says where, instead of waiting for ever."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

logger = logging.getLogger(__name__)
TIMEOUT = "COLOSSAL_BCD_TIMEOUT"
"""Environment variable: seconds that a collective may wait for another rank; 0 leaves torch's own limits."""
DEFAULT_TIMEOUT = 50.0
PATIENCE = timedelta(minutes=30)
"""How long ranks wait for one that works alone: nobody can tell a rank that stalls from a slow disk."""
_patient: tuple[Any, dist.ProcessGroup] | None = None
"""The default group, and a group of the same ranks with that limit."""
_limited: tuple[Any, timedelta] | None = None
"""The default group whose connections were made with a limit, and the limit."""
_kept: list[Any] = []


def keep_groups(groups: Iterable[Any]) -> None:
    """Keep process groups, destroyed ones too, for as long as the process lives.

    Before torch 2.8 a group that is freed waits for its gloo threads while it has Python's lock, for which one of these
    threads waits where a tensor of the last collective is freed: neither goes on (pytorch/pytorch#154976).
    """
    _kept.extend(groups)


class RankFailureError(RuntimeError):
    """A collective ended because another rank died or did not come to it in time."""


@contextlib.contextmanager
def limit_waiting() -> Iterator[None]:
    """Give process groups that are made inside the time limit, and those that there are already.

    All ranks have to enter it, with the same environment variable.

    Raises:
        ValueError: the environment variable is no number of seconds.
    """
    text = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"environment variable {TIMEOUT}: got {text!r}, expected a number of seconds, 0 for no limit")
    if seconds == 0:
        yield
        return
    torch_defaults: Any = distributed_c10d
    before = torch_defaults.default_pg_timeout, torch_defaults.default_pg_nccl_timeout
    limit = timedelta(seconds=seconds)
    torch_defaults.default_pg_timeout = torch_defaults.default_pg_nccl_timeout = limit
    try:
        yield
    finally:
        torch_defaults.default_pg_timeout, torch_defaults.default_pg_nccl_timeout = before
    patient = patient_group()
    for group in list(distributed_c10d._world.pg_map):
        if group is not patient:
            distributed_c10d._set_pg_timeout(limit, group)
    if dist.is_initialized() and dist.get_world_size() > 1:
        _limit_default_group(limit)
        if patient is None and dist.is_gloo_available():
            _make_patient_group()


def wait_patiently() -> None:
    """Wait until all ranks are here, for one that writes or checks large files, too.

    The time limit of other groups begins after it.  A rank that dies is noticed at once.
    """
    group = patient_group()
    if group is not None:
        dist.barrier(group=group)


def patient_group() -> dist.ProcessGroup | None:
    """A group of all ranks with `PATIENCE`; None where no time limit was set."""
    if _patient is None or not dist.is_initialized() or _patient[0] is not dist.group.WORLD:
        return None
    return _patient[1]


def _make_patient_group() -> None:
    global _patient
    _patient = dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE)


def _limit_default_group(limit: timedelta) -> None:
    """Let the default group, which the launcher made, communicate by a gloo backend with the limit.

    Connections of gloo keep the limit with which they were made, whatever the group is told later.
    """
    global _limited
    group, cpu = dist.distributed_c10d._get_default_group(), torch.device("cpu")
    if cpu not in group._device_types or not dist.is_gloo_available():
        return
    if not isinstance(group._get_backend(cpu), dist.ProcessGroupGloo):
        return
    if _limited is None or _limited[0] is not group:
        fresh: Any = dist.new_group(backend="gloo", timeout=limit)
        group._register_backend(cpu, dist.ProcessGroup.BackendType.CUSTOM, fresh._get_backend(cpu))
        _limited = group, limit
    elif _limited[1] != limit:
        # A group takes one backend of a type.
        logger.warning("%s: the default group keeps its limit of %s, not %s", TIMEOUT, _limited[1], limit)


@contextlib.contextmanager
def says_where(round_name: str) -> Iterator[None]:
    """Raise, for a backend's error inside, RankFailureError, which says in which round a collective failed."""
    try:
        yield
    except RankFailureError:
        raise
    except RuntimeError as error:
        if not _is_of_backend(error):
            raise
        reason = str(error).partition("\n")[0]
        raise RankFailureError(
            f"rank {dist.get_rank()}, {round_name}: another rank died, or did not come within the time limit "
            f"({TIMEOUT} seconds). The backend says: {reason}. Start again from the last checkpoint."
        ) from error


def _is_of_backend(error: RuntimeError) -> bool:
    text = str(error)
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "Broken pipe", "Socket")
    return isinstance(error, dist.DistBackendError) or any(sign in text for sign in signs)


class Late:
    """A scalar that is found on the device during a step, and read on the host one step later, so that nobody waits."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def send(self, value: Tensor | None) -> None:
        """Take this step's on its way to the host; None: there is none."""
        self._value, self._arrived = value, None
        if value is not None and value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> float | None:
        """That of the step before."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return None if self._value is None else self._value.item()


class LateCheck:
    """Finds steps whose gradients were not finite one step later.

    Where no loss scaling skips such a step, its weights are lost: what follows must not train on, nor be saved.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._norm = Late()

    def note(self, norm: Tensor) -> None:
        """Take the norm of a step's gradients, the same number on every rank."""
        self._num_steps += 1
        self._norm.send(norm)

    def raise_if_bad(self) -> None:
        """Raise FloatingPointError, on every rank, if the gradients of the step before were not finite."""
        norm = self._norm.read()
        if norm is not None and not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradients of step {self._num_steps} were not finite (their norm is {norm}), and so are the "
                "weights since then. Start again from the last checkpoint, with a smaller step size or clipping "
                "(max_norm)."
            )


def require_finite(optimizer: Any) -> None:
    """Refuse to keep the weights of a boosted optimizer whose last gradients were not finite (see `LateCheck`)."""
    if hasattr(optimizer, "late_check"):
        optimizer.late_check.raise_if_bad()
