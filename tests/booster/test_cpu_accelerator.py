"""The CPU accelerator: what it answers, and when it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from colossalai import accelerator as accelerators
from colossalai.accelerator import BaseAccelerator, CpuAccelerator, get_accelerator, set_accelerator
from colossalai.accelerator import api as accelerator_api
from colossalai.pipeline import p2p

from colossal_bcd.booster import cpu_accelerator
from colossal_bcd.booster.cpu_accelerator import HostAccelerator, HostStream, install_cpu_accelerator
from colossal_bcd.testing import run_ranks

HOST = HostAccelerator()

RAISING = {"get_device_capability", "get_device_properties", "utilization"}
RAISING |= {"memory_stats", "memory_summary", "memory_snapshot"}
"""What a host has no answer to."""

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "set_rng_state": (torch.get_rng_state(),),
    "set_rng_state_all": ([torch.get_rng_state()],),
    "manual_seed": (3,),
    "manual_seed_all": (3,),
    "set_stream": (HostStream(),),
    "stream": (None,),
    "get_device_capability": (),
    "get_device_properties": (0,),
    "set_per_process_memory_fraction": (1.0,),
    "set_to_device": (torch.nn.Linear(1, 1),),
}


@pytest.fixture(autouse=True)
def untouched() -> Any:
    """Global state as before, whatever a test does to it."""
    before, check, state = accelerator_api._ACCELERATOR, p2p._check_for_nccl_hccl_backend, torch.get_rng_state()
    yield
    accelerator_api._ACCELERATOR, p2p._check_for_nccl_hccl_backend = before, check
    torch.set_rng_state(state)


def interface() -> list[str]:
    # It would limit this process's address space for good.
    methods = [name for name, value in vars(BaseAccelerator).items() if callable(value) and not name.startswith("_")]
    return [name for name in methods if name != "set_per_process_memory_fraction"]


@pytest.mark.parametrize("name", interface())
def test_host_accelerator_answers_every_call_but_those_without_meaning(name: str) -> None:
    call = getattr(HOST, name)
    if name in RAISING:
        with pytest.raises(RuntimeError, match="not supported for cpu"):
            call(*ARGUMENTS.get(name, ()))
    else:
        call(*ARGUMENTS.get(name, ()))


def test_host_accelerator_says_cpu_and_gloo() -> None:
    assert HOST.current_device() == HOST.get_current_device() == torch.device("cpu")
    assert (HOST.name, HOST.communication_backend, HOST.device_count(), HOST.get_device_name()) == (
        "cpu",
        "gloo",
        1,
        "cpu",
    )
    assert not HOST.support_set_device
    assert torch.zeros(1, device=HOST.current_device()).device.type == "cpu"


@pytest.mark.parametrize("seed", ["manual_seed", "manual_seed_all"])
@pytest.mark.parametrize("suffix", ["", "_all"])
def test_host_accelerator_random_state_round_trips(seed: str, suffix: str) -> None:
    getattr(HOST, seed)(17)
    assert HOST.initial_seed() == 17
    state = getattr(HOST, f"get_rng_state{suffix}")()
    first = torch.rand(3)
    HOST.seed()
    assert not torch.equal(torch.rand(3), first)
    getattr(HOST, f"set_rng_state{suffix}")(state)
    assert torch.equal(torch.rand(3), first)
    HOST.seed_all()
    assert HOST.initial_seed() != 17


def test_host_accelerator_counts_resident_bytes() -> None:
    """ColossalAI's own reports the peak in kilobytes."""
    before = HOST.memory_allocated()
    # Above 32 MiB the C library never reuses freed memory, which would not raise the resident bytes.
    block = torch.ones(128 * 2**20, dtype=torch.uint8)
    assert HOST.memory_allocated() - before > block.numel() // 2
    assert HOST.memory_reserved() > block.numel()
    HOST.reset_peak_memory_stats()
    for peak in (HOST.max_memory_allocated(), HOST.max_memory_reserved()):
        # The kernel updates the two counters at different moments.
        assert peak > 0.9 * HOST.memory_allocated()


def test_host_stream_is_always_done() -> None:
    stream, event = HOST.Stream(), HOST.Event(enable_timing=True)
    stream.wait_stream(HOST.current_stream())
    stream.wait_event(event)
    assert stream.record_event(event) is stream
    assert event.query()
    event.record(stream)
    event.wait()
    event.synchronize()
    with HOST.stream(HOST.default_stream()):
        assert torch.ones(2).sum() == 2


def test_host_autocast_is_a_context() -> None:
    """ColossalAI's own returns the class `nullcontext`, which `with` refuses."""
    with HOST.autocast(dtype=torch.bfloat16):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with HOST.autocast(enabled=False):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_install_replaces_the_cpu_accelerator_once() -> None:
    set_accelerator(CpuAccelerator())
    assert install_cpu_accelerator()
    installed = get_accelerator()
    assert isinstance(installed, HostAccelerator)
    assert p2p._check_for_nccl_hccl_backend is cpu_accelerator._is_device_backend
    assert install_cpu_accelerator()
    assert get_accelerator() is installed


def test_install_answers_the_pipelines_question_also_where_the_accelerator_is_there_already() -> None:
    """The question was only answered together with the replacement of the accelerator."""
    set_accelerator(HostAccelerator())
    assert install_cpu_accelerator()
    assert p2p._check_for_nccl_hccl_backend is cpu_accelerator._is_device_backend


@pytest.mark.parametrize("name", ["CudaAccelerator", "NpuAccelerator"])
def test_install_leaves_a_machine_with_a_device_alone(name: str) -> None:
    device = getattr(accelerators, name)()
    before = p2p._check_for_nccl_hccl_backend
    set_accelerator(device)
    assert not install_cpu_accelerator()
    assert get_accelerator() is device
    assert p2p._check_for_nccl_hccl_backend is before


def construct(plugin: str) -> dict[str, Any]:
    from colossal_bcd import booster

    answers: dict[str, Any] = {"imported": type(get_accelerator()).__name__}
    answers["p2p"] = p2p._check_for_nccl_hccl_backend.__module__
    options: dict[str, Any] = {"HybridParallelPlugin": {"tp_size": 1, "pp_size": 1}}.get(plugin, {})
    made = getattr(booster, plugin)(**options)
    answers["constructed"] = type(get_accelerator()).__name__
    answers["cpu"] = "cpu" in made.supported_devices()
    answers["device backend"] = p2p._check_for_nccl_hccl_backend(dist.group.WORLD)
    return answers


@pytest.mark.skipif(torch.cuda.is_available(), reason="the accelerator is that of a machine without a device")
@pytest.mark.parametrize("plugin", ["LowLevelZeroPlugin", "HybridParallelPlugin", "TorchDDPPlugin"])
def test_plugins_install_it_when_constructed_and_not_when_imported(plugin: str) -> None:
    (answers,) = run_ranks(1, construct, plugin)
    assert answers == {
        "imported": "CpuAccelerator",
        "p2p": "colossalai.pipeline.p2p",
        "constructed": "HostAccelerator",
        "cpu": True,
        "device backend": False,
    }
