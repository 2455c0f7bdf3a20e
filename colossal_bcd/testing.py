"""Tools for tests and measurements: ranks as processes, counted collectives, live and peak bytes."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colossal_bcd.sharding.dtensor import is_dtensor, local_values

PRELOAD = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "colossalai.booster.plugin",
    "colossalai.shardformer.policies.llama",
    "rich.console",  # as the next one imported by ColossalAI when it first logs
    "rich.logging",
    "colossal_bcd.booster",
    "colossal_bcd.testing",
)
"""Imported once by the server process from which the ranks are forked."""


class RankError(AssertionError):
    """A rank failed or did not end in time; the message holds every rank's traceback."""


def start_server(*modules: str) -> Any:
    """Start the process from which ranks are forked, unless it runs; it imports while this one goes on.

    Args:
        modules: to be imported besides `PRELOAD`; what is not would be imported by every rank that needs it.
    Returns:
        The context that makes processes of it.
    """
    # Else importing ColossalAI starts processes that compile kernels, and a thread that listens to them.
    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *modules])
    path = os.environ.get("PYTHONPATH")
    # Before 3.13 the server is not told of sys.path.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    return context


def run_ranks(num_ranks: int, fn: Callable[..., Any], *args: Any, timeout: float = 900.0) -> list[Any]:
    """Run `fn(*args)` on `num_ranks` gloo ranks and return what each returned, by rank.

    The ranks are forked from a clean server process that has imported everything once and runs one thread; `fn` must be
    importable, and arguments and results must pickle.

    Args:
        num_ranks: number of processes.
        fn: function of a module.
        *args: its arguments.
        timeout: seconds after which ranks hang rather than work, on a machine that is busy with other things, too.
    Raises:
        RankError: a rank raised, died, or was still running after `timeout` seconds, where it then was in its code; all
            ranks are ended.
    """
    context = start_server()
    with tempfile.TemporaryDirectory() as folder:
        ranks, pipes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(theirs, rank, num_ranks, folder, fn, args), daemon=True)
            process.start()
            theirs.close()
            ranks.append(process)
            pipes.append(ours)
        outcomes = _outcomes(pipes, timeout)
        for rank, process in enumerate(ranks):
            if outcomes[rank][0] == "late":
                outcomes[rank] = ("late", outcomes[rank][1] + _stack_of(process, _stack_file(folder, rank)))
        for process in ranks:
            process.kill()
            process.join()
    failures = [f"--- rank {rank}\n{outcome[1]}" for rank, outcome in enumerate(outcomes) if outcome[0] != "ok"]
    if failures:
        raise RankError("\n".join(failures))
    return [outcome[1] for outcome in outcomes]


def _outcomes(pipes: list[Connection], timeout: float) -> list[tuple[str, Any]]:
    """One (status, value) per rank; after a failure the others get a few seconds to report theirs."""
    outcomes: dict[int, tuple[str, Any]] = {}
    deadline = time.monotonic() + timeout
    while len(outcomes) < len(pipes):
        left = deadline - time.monotonic()
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in outcomes], timeout=max(left, 0))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcomes[rank] = ("died", "the process ended without a result")
            if outcomes[rank][0] != "ok":
                deadline = min(deadline, time.monotonic() + 5)
    return [outcomes.get(rank, ("late", "still running when time was up")) for rank in range(len(pipes))]


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder, f"stack_of_rank_{rank}")


def _stack_of(process: Any, path: Path) -> str:
    """Python stacks of a process's threads; nothing if it ends meanwhile or hasn't come to its function yet."""
    if not path.exists():
        return ""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return "\n" + path.read_text()


def _rank_main(
    pipe: Connection, rank: int, size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    stack = _stack_file(folder, rank).open("w")  # open for as long as the process lives
    faulthandler.register(signal.SIGUSR1, stack)
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported: neither walked by collections nor among the tensors of this rank
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    try:
        _keep_destroyed_groups()
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        outcome: tuple[str, Any] = ("ok", fn(*args))
        message = pickle.dumps(outcome)
    except BaseException:
        message = pickle.dumps(("failed", traceback.format_exc()))
        pipe.send_bytes(message)
        os._exit(0)
    pipe.send_bytes(message)
    # Threads of gloo may still be sending to a slower rank, which would wait for ever if this one ended before it.
    with contextlib.suppress(EOFError):
        pipe.recv_bytes()
    os._exit(0)


def _keep_destroyed_groups() -> None:
    """What `engine.failures.keep_groups` does for the plugins, for everything that a rank destroys."""
    kept, destroy = [], dist.destroy_process_group

    def destroyed(group: Any = None) -> None:
        kept.append(group)
        destroy(group)

    dist.destroy_process_group = destroyed


_COUNTED = {
    "all_reduce": "tensor",
    "broadcast": "tensor",
    "reduce": "tensor",
    "gather": "tensor",
    "scatter": "tensor",
    "all_gather_into_tensor": "output_tensor",
    "reduce_scatter_tensor": "input",
    # torch 2.13's names for these two, which its FSDP2 calls.
    "all_gather_single": "output_tensor",
    "reduce_scatter_single": "input",
    "all_gather": "tensor_list",
    "reduce_scatter": "input_list",
    "all_to_all_single": "input",
    "all_to_all": "input_tensor_list",
    "send": "tensor",
    "isend": "tensor",
    "barrier": None,
    "all_gather_object": None,
    "gather_object": None,
    "broadcast_object_list": None,
    "scatter_object_list": None,
}
"""Functions of torch.distributed, each with the argument whose bytes count."""


class CollectiveCounter:
    """Count calls and payload bytes of torch.distributed inside a `with` block, on this rank.

    Attributes:
        calls: number of calls by function name.
        bytes: bytes of the larger buffer of each call by function name.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._originals: dict[str, Callable[..., Any]] = {}
        self._inside = False

    def __enter__(self) -> CollectiveCounter:
        for name, payload in _COUNTED.items():
            if not hasattr(dist, name):
                continue
            self._originals[name] = getattr(dist, name)
            self._replace(name, self._counting(self._originals[name], payload))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, original in self._originals.items():
            self._replace(name, original)

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        setattr(dist, name, function)
        if name == "isend":
            # dist.P2POp refuses operations other than its module's own isend and irecv.
            setattr(dist.distributed_c10d, name, function)

    @property
    def total(self) -> int:
        """Number of calls of any kind."""
        return self.calls.total()

    def _counting(self, original: Callable[..., Any], payload: str | None) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one of these functions calls another: send is isend in some versions of torch
                return original(*args, **kwargs)
            self.calls[original.__name__] += 1
            if payload is not None:
                buffers = signature.bind(*args, **kwargs).arguments[payload]
                tensors = buffers if isinstance(buffers, (list, tuple)) else [buffers]
                self.bytes[original.__name__] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        return counted


def storages(*roots: Any) -> dict[int, int]:
    """Storages behind the tensors in nested containers: address -> bytes, each storage once.

    DTensors count with what this rank stores of them.  Tensors of the device "meta", which those of torch's compiler
    are, occupy no memory and are left out.
    """
    found: dict[int, int] = {}
    for leaf in tree_leaves(roots):
        if isinstance(leaf, Tensor) and torch._C._has_storage(leaf):
            # A DTensor's own storage has no memory; the local tensor's has.
            storage = (local_values(leaf) if is_dtensor(leaf) else leaf).untyped_storage()
            if storage.device.type != "meta" and storage.nbytes() > 0:
                found[storage.data_ptr()] = storage.nbytes()
    return found


def live_bytes() -> int:
    """Bytes of all storages that some live tensor of this process refers to.

    Threads of gloo let go of what they have sent a moment after `wait` has returned, so where there are any this reads
    until it stays.
    """
    gc.collect()
    if not dist.is_initialized():
        return _live_bytes()
    found = -1
    while True:
        time.sleep(0.05)
        before, found = found, _live_bytes()
        if found == before:
            return found


def _live_bytes() -> int:
    held: dict[int, int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor):
            try:
                held |= storages(item)
            except NotImplementedError:  # freed by another thread since it was listed: it has no storage any more
                continue
    return sum(held.values())


class PeakBytes(TorchDispatchMode):
    """Largest number of bytes of new storages alive at once inside a `with` block.

    Attributes:
        current: bytes of storages created inside the block that are alive.
        peak: largest value of `current`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __enter__(self) -> PeakBytes:
        # A collection in the middle of the walk would take tensors away from under it.
        gc.collect()
        for item in gc.get_objects():
            if issubclass(type(item), Tensor) and item.layout == torch.strided and not is_dtensor(item):
                # As in `_live_bytes`: another thread may have freed it since it was listed.
                with contextlib.suppress(NotImplementedError):
                    self._watch(item.untyped_storage(), 0)
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not is_dtensor(leaf):
                storage = leaf.untyped_storage()
                self._watch(storage, storage.nbytes())
        return result

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage as `size` bytes until it is freed; its address may then be another's."""
        if storage.nbytes() == 0 or storage.device.type == "meta":
            return
        address = storage.data_ptr()
        if address in self._known:
            return
        self._known.add(address)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.current -= size
