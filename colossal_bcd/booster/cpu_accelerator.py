"""A complete CPU accelerator: ColossalAI's own raises for streams, random state and device queries."""

from __future__ import annotations

import contextlib
import resource
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import CpuAccelerator, get_accelerator, set_accelerator
from colossalai.pipeline import p2p


class HostStream:
    """Stands in for a stream or an event: work on the host is complete when the call returns."""

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> HostStream:
        return self

    def query(self) -> bool:
        return True


class HostAccelerator(CpuAccelerator):
    """ColossalAI's CPU accelerator with the meaning that its unimplemented calls have on a host.

    What has none there (capability, properties and utilization of a device, statistics of its allocator) still raises.
    """

    def current_device(self) -> torch.device:
        """The device itself: a host has no index, and callers pass the result on as a device."""
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any = None) -> None: ...

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [torch.get_rng_state()]

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    def set_rng_state_all(self, new_states: list[torch.Tensor]) -> None:
        torch.set_rng_state(new_states[0])

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def seed(self) -> None:
        torch.seed()

    def seed_all(self) -> None:
        torch.seed()

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def memory_allocated(self, device: Any = None) -> int:
        """Resident bytes of this process now."""
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    def max_memory_allocated(self, device: Any = None) -> int:
        """Largest resident bytes of this process so far; it cannot be reset."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def memory_reserved(self, device: Any = None) -> int:
        return self.memory_allocated()

    def max_memory_reserved(self, device: Any = None) -> int:
        return self.max_memory_allocated()

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def reset_max_memory_allocated(self, device: Any = None) -> None: ...

    def reset_max_memory_cached(self, device: Any = None) -> None: ...

    def Stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> HostStream:
        return HostStream()

    def Event(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> HostStream:
        return HostStream()

    def current_stream(self, device: Any = None) -> HostStream:
        return HostStream()

    def default_stream(self, device: Any = None) -> HostStream:
        return HostStream()

    def set_stream(self, stream_: Any) -> None: ...

    def stream(self, stream_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def autocast(
        self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True
    ) -> torch.autocast:
        return torch.autocast("cpu", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


def install_cpu_accelerator() -> bool:
    """Use `HostAccelerator` where ColossalAI has found no device; whether this machine runs on its CPU.

    Pipeline parallelism needs one more thing there: ColossalAI asks torch for a backend that only vendor builds have
    (pipeline/p2p.py, `is_hccl_available`), so that question is answered from the group's own backend.
    """
    accelerator = get_accelerator()
    if accelerator.name != "cpu":
        return False
    if not isinstance(accelerator, HostAccelerator):
        set_accelerator(HostAccelerator())
    p2p._check_for_nccl_hccl_backend = _is_device_backend
    return True


def _is_device_backend(group: dist.ProcessGroup | None) -> bool:
    return dist.get_backend(group) in ("nccl", "hccl")
