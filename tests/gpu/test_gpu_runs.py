"""What surrounds a step on a GPU: streams, CUDA graphs, compiled and checkpointed models, nccl, pinned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import block_net
import models
import pytest
import torch
import torch.distributed as dist
from devices import CUDA, DEVICES, OPTIMIZERS, options_of
from support.errors import largest_error
from torch import Tensor, nn

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.optim.state import spec
from colossal_bcd.sharding import Mesh, Sum, Task, run_rounds
from colossal_bcd.sharding.dtensor import local_values

SHAPES = [(64, 48), (64, 48), (33, 7), (64,)]
DONE = "the steps on the side are not those of the stream"


def params_on(device: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
    return params


def weights(params: Any) -> list[Tensor]:
    return [param.detach().cpu().clone() for param in params]


CAPTURABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"momentum": 0.9}),
    "Lion": ("Lion", {}),
    "CAME": ("CAME", {}),
    "AdamW": ("AdamW", {"correct_bias": False}),
    "Lamb": ("Lamb", {"bias_correction": False}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CAPTURABLE)
def test_captured_step_replays_as_it_would_run(name: str) -> None:
    which, options = CAPTURABLE[name]
    runs = []
    for captured in (False, True):
        params = params_on("cuda")
        optimizer = OPTIMIZERS[which].cls(params, lr=1e-2, weight_decay=0.1, **options)
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(3):
            for param in params:
                param.grad.fill_(0.1 * (step + 1))
            if captured:
                graph.replay()
            else:
                optimizer.step()
        runs.append(weights(params))
    assert all(map(torch.equal, *runs))


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "Lamb": ("Lamb", {}),
    "Adafactor": ("Adafactor", {}),
    "GaLoreSGD": ("GaLoreSGD", {}),
    "rounded": ("Lion", {"rounding": "stochastic"}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", REFUSED)
def test_capture_of_what_the_host_counts_is_refused(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debiased by the same power of beta at every replay, AdamW would train wrongly and say nothing."""
    which, options = REFUSED[name]
    params = params_on(device, torch.bfloat16 if name == "rounded" else torch.float32)
    optimizer = OPTIMIZERS[which].cls(params, **{**options_of(which), **options})
    optimizer.step()
    if device == "cpu":
        monkeypatch.setattr(spec.torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(spec.torch.cuda, "is_current_stream_capturing", lambda: True)
        capture: Any = contextlib.nullcontext()
    else:
        capture = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="step: got the capture of a CUDA graph"), capture:
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_on_a_side_stream_is_the_same(name: str) -> None:
    if "8bit" in name and find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    runs = []
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        params = params_on("cuda")
        optimizer = OPTIMIZERS[name].cls(params, **options_of(name))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(5):
                # Long work before each step, which a step on another stream would not wait for.
                torch.cuda._sleep(2_000_000)
                for param in params:
                    param.grad.mul_(1.5)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        runs.append(weights(params))
    assert all(map(torch.equal, *runs)), DONE


def blocks_on(device: str, model: Any, **options: Any) -> BlockOptimizer:
    said = {"switch_block_every": 2, "switch_mode": "ascending", "verbose": 0, **options}
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return BlockOptimizer(base, list(model.named_parameters()), **said)


def train(model: Any, optimizer: Any, device: str, steps: int = 8) -> list[Tensor]:
    for step in range(steps):
        model(block_net.tokens(step).to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_on_the_device_equal_the_cpus(device: str) -> None:
    runs = []
    for where in ("cpu", device):
        model = block_net.Net(dtype=torch.float64).to(where)
        runs.append(train(model, blocks_on(where, model), where))
    assert largest_error(runs[1], runs[0]) <= 1e-12


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.full), CUDA])
def test_compiled_model_trains_its_blocks(device: str) -> None:
    runs = []
    for compiled in (False, True):
        model = block_net.Net(dtype=torch.float64).to(device)
        run: Any = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager") if compiled else model
        runs.append(train(run, blocks_on(device, run), device, steps=4))
    assert largest_error(runs[1], runs[0]) <= 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_model_trains_its_blocks(reentrant: bool, device: str) -> None:
    runs = []
    for checkpointed in (False, True):
        model: Any = models.llama(layers=3).to(device, torch.float64).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        optimizer = blocks_on(device, model, switch_block_every=1)
        for step in range(4):
            models.loss(model, models.tokens(step).to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(weights(model.parameters()))
    assert largest_error(runs[1], runs[0]) <= 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 16])
def test_offloaded_residuals_are_those_of_the_device(bits: int, device: str) -> None:
    runs = []
    for offload in (False, True):
        model = block_net.Net(dtype=torch.bfloat16).to(device)
        base = AdamW(model.parameters(), lr=1e-3)
        optimizer = BlockOptimizer(
            base, list(model.named_parameters()), switch_block_every=2, switch_mode="ascending", verbose=0,
            residual="keep", residual_bits=bits, residual_offload=offload,
        )  # fmt: skip
        runs.append(train(model, optimizer, device, steps=10))
        kept = list(optimizer.active_set.residuals.of.values())
        assert kept
        assert all(residual.is_pinned() == (offload and device == "cuda") for residual in kept)
        assert all(residual.device.type == ("cpu" if offload else device) for residual in kept)
    assert all(map(torch.equal, *runs))


@pytest.fixture(params=DEVICES)
def group_of_one(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a process group of this process alone."""
    device: str = request.param
    if dist.is_initialized():
        pytest.fail("a process group is left from another test")
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield device
    dist.destroy_process_group()


class Communicating(Mesh):
    """A mesh that makes its collectives although its group has one member."""

    def __init__(self) -> None:
        super().__init__()
        self._groups = {"zero": (dist.group.WORLD,)}


def test_rounds_over_one_rank_are_sums_of_one(group_of_one: str) -> None:
    mesh = Communicating()
    torch.manual_seed(0)
    values = [torch.randn(70).to(group_of_one), torch.randn(3, dtype=torch.float64).to(group_of_one) * 1e-30]
    answers: list[Tensor] = []

    def rule(exact: bool) -> Any:
        answers.extend((yield tuple(Sum(value, ("zero",), exact=exact) for value in values)))

    run_rounds([Task(rule(exact), ("zero",), 0) for exact in (True, False)], mesh)
    # In float32 words a float64 value keeps float32's digits at any magnitude.
    assert largest_error([a.cpu() for a in answers[:2]], [value.cpu() for value in values]) == 0
    assert largest_error(answers[3].cpu() / values[1].cpu(), torch.ones(3)) <= 2**-23
    sent = torch.arange(5.0, device=group_of_one)
    assert torch.equal(mesh.all_to_all(sent, [5], [5], "zero"), sent)


def test_ddp_of_one_process_equals_none(group_of_one: str) -> None:
    """torch's DDP averages what required a gradient when it was made; where it was not put to rest it raised at the
    second step that parameters had no gradient."""
    runs = []
    for wrapped in (False, True):
        model: Any = block_net.Net(dtype=torch.float64).to(group_of_one)
        given = nn.parallel.DistributedDataParallel(model) if wrapped else model
        runs.append(train(given, blocks_on(group_of_one, given), group_of_one))
    assert largest_error(runs[1], runs[0]) == 0


@pytest.mark.parametrize("group_of_one", [CUDA], indirect=True)
@pytest.mark.parametrize("name", ["AdamW", "Lamb", "Adafactor", "CAME", "GaLoreAdamW"])
def test_fully_sharded_model_of_one_rank_trains_as_whole(name: str, group_of_one: str) -> None:
    """On CPUs tests/fsdp tries it on several ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    from colossal_bcd.fsdp.torch_private import fully_shard

    runs = []
    for sharded in (False, True):
        model: Any = block_net.Net(dtype=torch.float64).to(group_of_one)
        if sharded:
            fully_shard(model, mesh=init_device_mesh(group_of_one, (1,)))
        optimizer = OPTIMIZERS[name].cls(model.parameters(), **options_of(name))
        for step in range(4):
            model(block_net.tokens(step).to(group_of_one)).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([getattr(param, "full_tensor", lambda param=param: param)() for param in model.parameters()])
    assert largest_error([each.detach().cpu() for each in runs[1]], [each.detach().cpu() for each in runs[0]]) <= 1e-12


@pytest.mark.parametrize("group_of_one", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
def test_blocks_of_a_sharded_model_of_one_rank_train_as_whole(
    dtype: torch.dtype, offload: bool, group_of_one: str
) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from colossal_bcd import fsdp
    from colossal_bcd.fsdp.torch_private import CPUOffloadPolicy

    # torch clips gradients of bfloat16 weights in bfloat16, the engine those of their masters.
    max_norm, runs = 0.5 if dtype == torch.float64 else 0.0, []
    for sharded in (False, True):
        model: Any = block_net.Net(dtype=dtype).to(group_of_one)
        if sharded:
            # Copies to and from pinned memory go on beside the computation.
            policy = CPUOffloadPolicy(pin_memory=group_of_one == "cuda") if offload else None
            fsdp.shard(model, init_device_mesh(group_of_one, (1,)), offload_policy=policy)
        optimizer = BlockOptimizer(
            AdamW(model.parameters(), lr=1e-2), list(model.named_parameters()), switch_block_every=2, verbose=0
        )
        if sharded:
            fsdp.attach(model, optimizer, max_norm=max_norm)
        for step in range(7):
            model(block_net.tokens(step).to(group_of_one)).backward()
            if max_norm and not sharded:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
        runs.append([local_values(param).cpu() for param in model.parameters()])
    # The same kernels, but for offloaded updates on a GPU, which are the CPU's.
    bound = 1e-12 if max_norm else 2**-7 if offload and group_of_one == "cuda" else 0.0
    assert largest_error(runs[1], runs[0]) <= bound
