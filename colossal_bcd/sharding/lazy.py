"""Elementwise arithmetic between two rounds, as functions that run one chunk at a time or as one compiled kernel.

A rule says what it computes, `Lazy(square, grad, eps=1e-30)`, and what asks for it, a sum or the update of the weight,
evaluates it: nothing as large as a parameter is made in between.

    grad   |----|----|----|        a chunk stays in the core's cache while
    state  |----|----|----|   ->   all operations of the function, and what
    weight |----|----|----|        consumes its values, go over it

On accelerators there is one chunk.  With `compiled(True)` function and consumer are one kernel of `torch.compile`, for
each of them, dtype and number of dims, not for each shape.  n: values of data on this rank; b: members of a stack.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CHUNK = 2**18
"""Values of a chunk on a CPU: with its temporaries it stays in the cache, and is long beside a call's overhead."""
COMPILED_CHUNK = 2**20
"""The same of compiled kernels, which have no temporaries and cost more to call."""
SQUARED = 2**15
"""Values squared at once in float64 on a CPU."""
WHOLE = 2**62
"""On accelerators nothing is divided."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are computed and reduced: float64 stays, everything else is float32.

    Raises:
        TypeError: it is complex, and would lose its imaginary part.
    """
    if dtype.is_complex:
        raise TypeError(f"got a tensor of {dtype}, expected real numbers. Hold it as torch.view_as_real gives it.")
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Rows:
    """An operand with one value for each row."""

    values: Tensor
    """[k] or [b, k]."""


@dataclass(frozen=True)
class Columns:
    """An operand with one value for each column of each matrix."""

    values: Tensor
    """[m, c] or [b, m, c]."""


class Run(NamedTuple):
    """A range of a rank's flat values that has full structure."""

    values: slice
    shape: tuple[int, int, int]
    """Matrices, rows, columns."""
    rows: slice
    matrices: slice
    columns: slice
    """What it covers, counted on this rank."""


Operand: TypeAlias = Tensor | Rows | Columns
Runs: TypeAlias = Callable[[int], Sequence[Run]]
"""The runs of a tensor, in chunks of about so many values."""
Number: TypeAlias = float | Tensor


class Lazy:
    """What an elementwise function makes of tensors, without making it.

    Args:
        function: takes chunks of the operands, in float32 or wider, and the numbers, and returns new values.  One whose
            name ends with "_" writes operands in place, which are no wider then; it must be consumed once.
        operands: [n] or [b, n], at least one; `Rows` and `Columns` where a consumer knows the matrices.
        numbers: Python numbers, or tensors of one value for each parameter, [1] or [b, 1].
    """

    def __init__(self, function: Callable[..., Tensor], *operands: Operand, **numbers: Number) -> None:
        self.function, self.operands, self.numbers = function, operands, numbers
        self.first: Tensor = next(operand for operand in operands if isinstance(operand, Tensor))
        """The first operand that has all values."""
        self.has_structure = not all(isinstance(operand, Tensor) for operand in operands)
        """Whether it has rows or columns."""

    def each(
        self, consume: Callable[..., Any], runs: Runs, targets: Sequence[Tensor] = (), **numbers: Number
    ) -> Iterator[tuple[Run, Any]]:
        """Evaluate it chunk by chunk.

        Args:
            consume: takes the values of a chunk, those of the targets, which it may write, and its numbers.
            runs: of a tensor like the operands.
            targets: [n] or [b, n], of any dtype.
            numbers: as of the function; no name is among its own.
        Yields:
            each chunk and what `consume` returned.
        """
        kernel, size = self._kernel(consume, targets, numbers, 3)
        divided, count = runs(size), len(self.operands)
        chunk = _chunk if len(divided) > 1 else _whole
        for run in divided:
            xs = _each_once([*self.operands, *targets], partial(chunk, run=run))
            yield run, kernel(xs[:count], xs[count:])

    def each_flat(
        self, consume: Callable[..., Any], targets: Sequence[Tensor] = (), **numbers: Number
    ) -> Iterable[Any]:
        """What `consume` returns for each chunk, where no operand has rows or columns; see `each`."""
        kernel, size = self._kernel(consume, targets, numbers, 1)
        tensors: list[Any] = [*self.operands, *targets]
        count, length = len(self.operands), self.first.shape[-1]
        if length <= size:
            return [kernel(tensors[:count], tensors[count:])] if length else []
        chunks = zip(*_each_once(tensors, lambda x: x.split(size, -1)), strict=True)
        return (kernel(xs[:count], xs[count:]) for xs in chunks)

    def kept(self) -> Tensor | Lazy:
        """Its values, for what needs them twice, where they are one chunk or a stack; else itself."""
        if _is_compiled or self.has_structure or (self.first.dim() == 1 and self.first.numel() > CHUNK):
            return self
        numbers = {name: _expanded(x, 1) for name, x in self.numbers.items()}
        tensors = [operand for operand in self.operands if isinstance(operand, Tensor)]
        return self.function(*map(_widened, tensors), **numbers)

    def _kernel(
        self, consume: Callable[..., Any], targets: Sequence[Tensor], numbers: dict[str, Number], dims: int
    ) -> tuple[Kernel, int]:
        """What evaluates a chunk of operands and targets, and the number of values of one, by parameter of a stack."""
        first = self.first
        on_cpu, members = first.device.type == "cpu", math.prod(first.shape[:-1])
        given, own = self.numbers, numbers
        if first.dim() > 1:
            given, own = ({name: _expanded(x, dims) for name, x in of.items()} for of in (given, own))
        chunk = COMPILED_CHUNK if _is_compiled else CHUNK
        size = max((chunk if on_cpu else WHOLE) // max(members, 1), 1)
        if not _is_compiled:
            return _eager(self.function, consume, given, own), size
        tensors = [operand if isinstance(operand, Tensor) else operand.values for operand in self.operands]
        kind = tuple((tensor.dtype, tensor.dim()) for tensor in (*tensors, *targets))
        kernel = _compiled(self.function, consume, tuple(given), tuple(own), kind, dims)
        dtype, device = wide(first.dtype), first.device
        tensors_of = [[_as_tensor(name, x, dtype, device) for name, x in of.items()] for of in (given, own)]
        return lambda operands, targets: kernel(list(operands), list(targets), *tensors_of), size


def as_lazy(values: Tensor | Lazy) -> Lazy:
    """Values that are there already, as a function of themselves."""
    return values if isinstance(values, Lazy) else Lazy(unchanged, values)


def unchanged(x: Tensor) -> Tensor:
    """The values themselves."""
    return x


def _each_once(xs: Sequence[Any], make: Callable[[Any], Any]) -> list[Any]:
    """What is made of every one, once of what is there twice: the weight, as an operand and as the target.

    Two views of the same values, one of which is written, cost torch.compile a copy, and on torch 2.13 it computes with
    those of another chunk.
    """
    made: dict[int, Any] = {}
    return [made[id(x)] if id(x) in made else made.setdefault(id(x), make(x)) for x in xs]


def _chunk(operand: Operand, run: Run) -> Tensor:
    """An operand's part that belongs to a run, in the run's shape or of one that is expanded to it."""
    if isinstance(operand, Tensor):
        return operand[..., run.values].view(*operand.shape[:-1], *run.shape)
    if isinstance(operand, Rows):
        return operand.values[..., run.rows].view(*operand.values.shape[:-1], *run.shape[:2], 1)
    return operand.values[..., run.matrices, run.columns].unsqueeze(-2)


def _whole(operand: Operand, run: Run) -> Tensor:
    """`_chunk` of the only run, without slicing."""
    if isinstance(operand, Tensor):
        return operand.view(*operand.shape[:-1], *run.shape)
    if isinstance(operand, Rows):
        return operand.values.view(*operand.values.shape[:-1], *run.shape[:2], 1)
    return operand.values[..., run.columns].unsqueeze(-2)  # it may be part of a row


_is_compiled = False


@contextmanager
def compiled(on: bool) -> Iterator[None]:
    """Whether kernels are compiled meanwhile."""
    global _is_compiled
    before, _is_compiled = _is_compiled, on and not _failed
    try:
        yield
    finally:
        _is_compiled = before


Kernel: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]


def _eager(
    function: Callable[..., Tensor], consume: Callable[..., Any], given: dict[str, Number], own: dict[str, Number]
) -> Kernel:
    return lambda operands, targets: consume(function(*map(_widened, operands), **given), *targets, **own)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


BACKEND = "inductor"
"""The compiler, by the name that torch gives it."""
_failed = False


def _backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    # A library that gcc before 13 links by -ffast-math makes its thread take subnormal numbers for zeros, for good, so
    # that other code's residuals and masters would lose them.
    flushes = _subnormals_are_zeros()
    try:
        return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)
    finally:
        if _subnormals_are_zeros() != flushes:
            torch.set_flush_denormal(flushes)


def _subnormals_are_zeros() -> bool:
    return sys.float_info.min / 2 == 0.0


@cache
def _compiled(
    function: Callable[..., Tensor],
    consume: Callable[..., Any],
    names: tuple[str, ...],
    of_consumer: tuple[str, ...],
    *kind: Any,
) -> Callable[..., Any]:
    """Function and consumer as one kernel of torch.compile, for tensors of one kind."""

    def body(operands: list[Tensor], targets: list[Tensor], given: list[Tensor], own: list[Tensor]) -> Any:
        numbers = dict(zip(names, given, strict=True))
        return consume(
            function(*map(_widened, operands), **numbers), *targets, **dict(zip(of_consumer, own, strict=True))
        )

    # torch counts compilations, at most eight, by code object; this is one of its own, with a name for profiles.
    name = f"{function.__name__}_{consume.__name__}".replace("__", "_")
    one = FunctionType(body.__code__.replace(co_name=name), body.__globals__, name, None, body.__closure__)
    compiled: Callable[..., Any] = torch.compile(one, dynamic=True, backend=_backend)

    @torch.compiler.disable  # where the caller compiles the step itself, whose trace would run into this one
    def run(operands: list[Tensor], targets: list[Tensor], *numbers: list[Tensor]) -> Any:
        global _failed
        # Not views: torch compiles anew for other shapes of what they are views of.
        xs = _each_once([*operands, *targets], lambda x: x.data)
        arguments = xs[: len(operands)], xs[len(operands) :], *numbers
        if not _failed:
            try:
                return compiled(*arguments)
            except torch._dynamo.exc.TorchDynamoException as error:
                # All of these are errors of compilation, before which nothing has run.
                _failed = True
                logger.warning(
                    "compile=True: torch.compile failed, so that optimizers of this process go on without it. It needs "
                    "a C++ compiler (apt install g++) on CPUs and Triton on GPUs; compile=False does without it. %s",
                    str(getattr(error, "inner_exception", error)).strip().splitlines()[0],
                )
        return body(*arguments)

    return run


def _expanded(number: Number, dims: int) -> Number:
    """A number of each parameter of a stack, [b, 1], with as many dims as its chunks have."""
    if isinstance(number, Tensor) and number.dim() > 1:
        return number.view(-1, *[1] * dims)
    return number


def _as_tensor(name: str, number: Number, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as kernels take it: a tensor, as they are compiled for each Python number anew."""
    if isinstance(number, Tensor):
        return number
    captures = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    # What a CUDA graph fills has its value once it is replayed, and nobody else may use it.
    return (_scalar.__wrapped__ if captures else _scalar)(name, number, dtype, device)


@lru_cache(maxsize=1024)
def _scalar(name: str, number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # By name, too: torch compiles anew where two arguments are one tensor that were two before.
    # A fill on the device: a copy from the host would wait for it.
    return torch.full((), number, dtype=dtype, device=device)


def divided(runs: Sequence[Run], size: int) -> list[Run]:
    """Runs of matrices, rows and columns in chunks of about `size` values, of whole rows.

    Args:
        runs: each has a shape of three dims.
        size: values of a chunk; a longer row is a chunk of its own.
    """
    found: list[Run] = []
    for run in runs:
        matrices, rows, columns = run.shape
        if not rows * columns:
            continue
        of_matrices, of_rows = max(size // (rows * columns), 1), min(max(size // columns, 1), rows)
        for matrix in range(0, matrices, of_matrices):
            count = min(of_matrices, matrices - matrix)
            for row in range(0, rows, of_rows):
                height, first = min(of_rows, rows - row), matrix * rows + row
                start = run.values.start + first * columns
                row_start, matrix_start = run.rows.start + first, run.matrices.start + matrix
                found.append(
                    Run(
                        slice(start, start + count * height * columns),
                        (count, height, columns),
                        slice(row_start, row_start + count * height),
                        slice(matrix_start, matrix_start + count),
                        run.columns,
                    )
                )
    return found


def row_and_column_sums(values: Tensor | Lazy, runs: Runs, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Sums over the columns and over the rows of a rank's values.

    Args:
        values: [n] or [b, n].
        runs: of its rows, each of which is in one run only.
        shape: number of rows k, of matrices m, and of their columns c.
    Returns:
        [k] and [m, c], or [b, k] and [b, m, c].
    """
    lazy, (k, m, c) = as_lazy(values), shape
    # Two sums are two loops of a kernel, and on torch 2.5 the second one computes with what the first one has written.
    split = _is_compiled and lazy.function.__name__.endswith("_")
    parts = ((run, _both_sums(x)) for run, x in lazy.each(unchanged, runs)) if split else lazy.each(_both_sums, runs)
    lead, dtype = lazy.first.shape[:-1], wide(lazy.first.dtype)
    over_columns = lazy.first.new_zeros(*lead, k, dtype=dtype)
    over_rows = lazy.first.new_zeros(*lead, m, c, dtype=dtype)
    for run, (rows, columns) in parts:
        over_columns[..., run.rows] = rows.flatten(-2)
        over_rows[..., run.matrices, run.columns] += columns
    return over_columns, over_rows


def _both_sums(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.sum(-1), values.sum(-2)


def square_sum(values: Tensor | Lazy, runs: Runs | None = None) -> Tensor:
    """Squared Euclidean norm over the last dim, which stays with length 1, in float64.

    Squares of float32 values below 1e-23 are 0 in float32 and those above 1.8e19 infinite; in float64 all are what they
    are, so that a norm is zero for zeros only and finite for all finite values.

    Args:
        values: [n], or of more dims, of which the last counts.
        runs: of values that have rows or columns.
    """
    if isinstance(values, Tensor) and values.numel() and not _is_compiled:
        return _squares(values)
    lazy = as_lazy(values)
    if lazy.has_structure:
        assert runs is not None
        parts = [part for _, part in lazy.each(_squares_of_runs, runs)]
    else:
        parts = list(lazy.each_flat(_squares))
    return _total(parts) if parts else lazy.first.new_zeros(*lazy.first.shape[:-1], 1, dtype=torch.float64)


def square_sums(values: Tensor | Lazy, beside: Tensor) -> tuple[Tensor, Tensor]:
    """`square_sum` of values and of a tensor that they are computed with, which is read once for both.

    Args:
        values: [n] or [b, n], without rows and columns.
        beside: of the same shape, of any dtype; nothing that a function of the values writes.
    Returns:
        [1] or [b, 1] each, in float64.
    """
    if isinstance(values, Tensor) or not beside.numel():
        return square_sum(values), square_sum(beside)
    first, second = zip(*values.each_flat(_squares_of_both, (beside,)), strict=True)
    return _total(list(first)), _total(list(second))


def _squares_of_both(values: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    return _squares(values), _squares(beside)


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1).sum(-1, keepdim=True)


def _squares(values: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return values.to(torch.float64).square().sum(-1, keepdim=True)
    if values.device.type == "cpu":
        if values.numel() <= SQUARED:
            return _wide_squares(values)
        if values.dim() == 2 and values.shape[1] > SQUARED // 4:
            return torch.stack([_squares(row) for row in values])
        size = SQUARED // math.prod(values.shape[:-1])
        return _total([_wide_squares(part) for part in values.split(max(size, 1), -1)])
    # These kernels of accelerators widen values as they read them: one for all tensors, and no copy.
    norms = torch._foreach_norm(list(values.reshape(-1, values.shape[-1])), 2, dtype=torch.float64)
    return torch.stack(norms).square_().view(*values.shape[:-1], 1)


def _wide_squares(values: Tensor) -> Tensor:
    if values.dim() == 1 and values.dtype != torch.float64:
        # Of a fresh copy: of float64 values themselves the last bit would depend on where they lie in memory.
        widened = values.double()
        return widened.dot(widened).view(1)
    return torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float64).square_()


def _squares_of_runs(values: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        # Not flattened: compilers do not vectorize what divides an index by the number of columns.
        return values.to(torch.float64).square().sum((-3, -2, -1)).unsqueeze(-1)
    return _squares(values.flatten(-3))


def subtract_(
    weight: Tensor,
    step: Lazy,
    runs: Runs,
    *,
    lr: Number = 1.0,
    decay: float | Tensor = 0.0,
    decay_first: bool = True,
) -> None:
    """Subtract `lr * step` from a weight in place (see `View.subtract`).

    Args:
        weight: [n] or [b, n].
        step: of the weight's values.
        runs: of the step.
        lr: factor.
        decay: see `View.subtract`.
        decay_first: see `View.subtract`.
    """
    numbers: dict[str, float | Tensor] = {"scale": -lr}
    consume: Callable[..., Any] = add_
    if isinstance(decay, Tensor) or decay != 0:
        consume = shrink_and_add_ if decay_first else add_and_shrink_
        numbers["keep"] = 1 - decay
    chunks: Iterable[Any] = step.each(consume, runs, (weight,), **numbers)
    if not step.has_structure:
        chunks = step.each_flat(consume, (weight,), **numbers)
    for _ in chunks:
        pass


def add_(step: Tensor, weight: Tensor, *, scale: Number) -> Tensor:
    """weight + scale * step, in place."""
    return weight.addcmul_(step, scale) if isinstance(scale, Tensor) else weight.add_(step, alpha=scale)


def shrink_and_add_(step: Tensor, weight: Tensor, *, scale: Number, keep: Number) -> None:
    """keep * weight + scale * step, in place."""
    add_(step, weight.mul_(keep), scale=scale)


def add_and_shrink_(step: Tensor, weight: Tensor, *, scale: Number, keep: Number) -> None:
    """keep * (weight + scale * step), in place."""
    add_(step, weight, scale=scale)
    weight.mul_(keep)
