"""Rules in chunks, and with `compile=True`: the same numbers, and one compilation for each kind, not for each shape."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.errors import largest_error
from torch import nn

from colossal_bcd import CAME, SGD, Adafactor, AdamW, GaLoreAdamW, GoLoreSGD, Lamb, Lion
from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh, lazy
from colossal_bcd.sharding.layout import FlatSlice

SHAPES = ((8, 6), (5, 16), (8, 6), (7,), (), (1, 4), (3, 1), (2, 3, 5), (0, 4), (7,))
STEPS = 5
LOW_RANK = {"rank": 2, "update_proj_gap": 3}


class RuledSGD(SGD):
    """By the rule, where torch's fused kernel would do the update."""

    def is_fused(self, hyper: Any, dtype: torch.dtype) -> bool:
        return False


CASES: dict[str, Callable[..., ShardedOptimizer[Any]]] = {
    "AdamW, galore's order": functools.partial(AdamW, lr=1e-2, order="galore", weight_decay=0.1),
    "AdamW, bitsandbytes' order": functools.partial(AdamW, lr=1e-2, order="bitsandbytes", weight_decay=0.1),
    "Lamb": functools.partial(Lamb, lr=1e-2, weight_decay=0.1),
    "Lamb without decay": functools.partial(Lamb, lr=1e-2, bias_correction="step_size"),
    "Lamb as Adam": functools.partial(Lamb, lr=1e-2, adam=True),
    "Adafactor": functools.partial(Adafactor, lr=1e-2, relative_step=False, weight_decay=0.1),
    "Adafactor with a moment": functools.partial(Adafactor, beta1=0.9),
    "CAME": functools.partial(CAME, lr=1e-2, weight_decay=0.1),
    "Lion": functools.partial(Lion, lr=1e-2, weight_decay=0.1),
    "SGD": functools.partial(RuledSGD, lr=1e-2, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "SGD, Nesterov": functools.partial(RuledSGD, lr=1e-2, momentum=0.9, nesterov=True),
    "GaLoreAdamW": functools.partial(GaLoreAdamW, lr=1e-2, weight_decay=0.1),
    "GoLoreSGD": functools.partial(GoLoreSGD, lr=1e-2, momentum=0.9, total_steps=6, rand_ratio=0.5),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel of another test, and none that is left behind."""
    monkeypatch.setattr(lazy, "_failed", False)
    lazy._compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    lazy._compiled.cache_clear()
    torch._dynamo.reset()


def weights(dtype: torch.dtype = torch.float64, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def groups(make: Callable[..., Any], params: list[nn.Parameter]) -> list[dict[str, Any]]:
    if not hasattr(make.func, "captured_energy"):  # type: ignore[attr-defined]
        return [{"params": params}]
    matrices = [param for param in params if param.dim() >= 2 and param.numel() and min(param.shape[-2:]) >= 2]
    others = [param for param in params if all(param is not matrix for matrix in matrices)]
    return [{"params": matrices, **LOW_RANK}, {"params": others, "rank": None}]


def both(
    make: Callable[..., Any], params: list[nn.Parameter], steps: int = STEPS, compiles: bool = True
) -> Iterator[tuple[list[Any], Any]]:
    """After each step, the compiled optimizer's weights and those of the eager one."""
    twins = copy.deepcopy(params)
    compiled = make(groups(make, params), compile=compiles)
    eager = make(groups(make, twins), compile=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param, twin in zip(params, twins, strict=True):
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad, twin.grad = grad.to(param.dtype), grad.to(param.dtype)
        compiled.step()
        eager.step()
        yield [param.detach() for param in params], [twin.detach() for twin in twins]


class Alone(Mesh):
    """A mesh whose other ranks have nothing to add."""

    def communicates(self, axes: tuple[str, ...]) -> bool:
        return False


def set_chunk(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let eager and compiled functions go over so many values at once."""
    for name in ("CHUNK", "COMPILED_CHUNK"):
        monkeypatch.setattr(lazy, name, size)


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", CASES)
def test_compiled_steps_have_the_numbers_of_eager_ones_and_compile_no_more_after_the_second(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By dynamo and functionalisation alone, for all; the test below has what a compiler makes of it."""
    monkeypatch.setattr(lazy, "BACKEND", "aot_eager")
    counts = []
    for got, want in both(CASES[name], weights()):
        assert largest_error(got, want) <= 1e-12
        counts.append(compilations())
    # GoLore's third refresh is the first random one, whose momentum is moved by the same kernels.
    assert counts[0] > 0
    assert counts[1] == counts[-1], counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kernels_of_the_compiler_have_the_numbers_of_eager_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of several chunks, and one whose rows are longer than a chunk."""
    set_chunk(monkeypatch, 32)
    shapes = ((6, 40), (40, 6), (11,))
    for name in ("Lamb", "CAME"):
        for got, want in both(CASES[name], weights(dtype, shapes), 3):
            # One rounding of a weight of less than 4, in each step, and of what its step is made of.
            bound = 1e-12 if dtype == torch.float64 else 3 * 4 * torch.finfo(dtype).eps
            assert largest_error(got, want) <= bound, name


@pytest.mark.parametrize("chunk", [7, 40])
@pytest.mark.parametrize("name", CASES)
def test_chunks_have_the_numbers_of_whole_tensors(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end within matrices and between them, of stacks and of single tensors, a row longer than a chunk."""
    shapes = (*SHAPES, (4, 3, 5), (9, 12))
    found = []
    for size in (chunk, lazy.WHOLE):
        set_chunk(monkeypatch, size)
        found.append([want for _, want in both(CASES[name], weights(shapes=shapes), compiles=False)][-1])
    assert largest_error(*found) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_kernels_get_every_value_once_and_no_views(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is operand and target: on torch 2.13 a second view of its later chunks was read from the first one."""
    calls = []

    def eager(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(operands: list[torch.Tensor], targets: list[torch.Tensor], *numbers: Any) -> Any:
            calls.append([*operands, *targets])
            return function(operands, targets, *numbers)

        return run

    monkeypatch.setattr(torch, "compile", eager)
    set_chunk(monkeypatch, 7)
    for got, want in both(CASES[name], weights()):
        assert largest_error(got, want) <= 1e-12
    assert calls
    for tensors in calls:
        assert all(each._base is None for each in tensors)
        distinct = {id(each): each for each in tensors if each.numel()}.values()
        assert len({each.data_ptr() for each in distinct}) == len(distinct)


def test_what_writes_in_place_is_summed_outside_of_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.5 computes the sums over rows, a second loop, with what the loop before has written."""
    made: list[tuple[str, str]] = []
    make = lazy._compiled

    def record(function: Callable[..., Any], consume: Callable[..., Any], *kind: Any) -> Callable[..., Any]:
        made.append((function.__name__, consume.__name__))
        return make(function, consume, *kind)

    monkeypatch.setattr(lazy, "_compiled", functools.cache(record))
    list(both(CASES["CAME"], weights(), 1))
    assert ("square", "_both_sums") in made
    assert ("instability_", "unchanged") in made
    assert not [kind for kind in made if kind[0].endswith("_") and kind[1] == "_both_sums"]


def test_one_compilation_serves_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "BACKEND", "aot_eager")
    before = compilations()
    list(both(CASES["CAME"], weights(shapes=((8, 6), (9, 5))), 2))
    first = compilations() - before
    list(both(CASES["CAME"], weights(shapes=tuple((rows, 3 + rows % 7) for rows in range(5, 25))), 2))
    assert 0 < first == compilations() - before


def test_equal_numbers_need_no_compilation_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that keeps as much as a moment: one tensor in two places of a kernel would be another kind of call."""
    monkeypatch.setattr(lazy, "BACKEND", "aot_eager")
    make = functools.partial(AdamW, lr=1e-2, betas=(0.9, 0.999), correct_bias=False)
    before = compilations()
    list(both(functools.partial(make, weight_decay=0.2), weights(), 2))
    first = compilations() - before
    list(both(functools.partial(make, weight_decay=0.1), weights(), 2))
    assert 0 < first == compilations() - before


def test_ragged_slices_have_the_numbers_of_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice that begins and ends within rows of several matrices; alone, so that sums over ranks are its own."""
    whole = lazy.CHUNK
    monkeypatch.setattr(lazy, "BACKEND", "aot_eager")
    layout = Layout(shape=(3, 4, 5), slice=FlatSlice(axis="zero", rank=1, size=3, length=23))
    found = []
    for compile, chunk in ((True, whole), (False, whole), (True, 6), (False, 6)):
        set_chunk(monkeypatch, chunk)
        param = weights(shapes=((23,),))[0]
        optimizer = CAME([param], lr=1e-2, compile=compile)
        optimizer.bind({param: layout}, Alone())
        for step in range(STEPS):
            param.grad = torch.sin(torch.arange(23, dtype=torch.float64) + step)
            optimizer.step()
        found.append(param.detach())
    assert all(largest_error([each], found[1:2]) <= 1e-12 for each in found)


def test_step_that_the_caller_compiles_has_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "BACKEND", "aot_eager")
    params = weights(shapes=((8, 6), (7,)))
    twins = copy.deepcopy(params)
    compiled, eager = CAME(params, lr=1e-2, compile=True), CAME(twins, lr=1e-2, compile=False)
    step = torch.compile(compiled.step)
    for number in range(1, 4):
        for param, twin in zip(params, twins, strict=True):
            param.grad, twin.grad = torch.sin(param.detach() * number), torch.sin(twin.detach() * number)
        step()
        eager.step()
    assert largest_error([param.detach() for param in params], [twin.detach() for twin in twins]) <= 1e-12
    assert compilations() > 0


@pytest.mark.parametrize("error", [RuntimeError, torch._dynamo.exc.TorchDynamoException])
def test_missing_compiler_is_said_once_and_steps_go_on(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch wraps most errors of a backend; a missing Triton leaves newer ones as it is."""

    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise error("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: no_compiler)
    with caplog.at_level(logging.WARNING):
        for got, want in both(CASES["CAME"], weights()):
            assert largest_error(got, want) == 0
    said = [record.getMessage() for record in caplog.records if "torch.compile failed" in record.getMessage()]
    assert len(said) == 1
    assert "apt install g++" in said[0]
    assert "No working C++ compiler found" in said[0]


def test_subnormal_numbers_stay_what_they_are() -> None:
    """What gcc 12 links makes zeros of them, in all that the thread computes from then on."""
    tiny = torch.tensor(1e-40)
    for flushes in (False, True):
        lazy._compiled.cache_clear()
        torch._dynamo.reset()
        torch.set_flush_denormal(flushes)
        try:
            for _ in both(CASES["Lion"], weights(torch.float32), 2):
                assert ((tiny * 1.0).item() == 0) == flushes
        finally:
            torch.set_flush_denormal(False)


def test_compile_is_off_on_cpus_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refused)
    for compile in (None, False):
        params = weights()
        for param in params:
            param.grad = torch.ones_like(param)
        CAME(params, lr=1e-2, compile=compile).step()
    optimizer = CAME(params, lr=1e-2, compile=True)
    with pytest.raises(AssertionError, match="compiled"):
        optimizer.step()
    assert copy.deepcopy(optimizer).compile is True
