"""The tools that other tests stand on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from colossal_bcd.testing import CollectiveCounter, PeakBytes, RankError, live_bytes, run_ranks, storages


def describe(*args):
    return dist.get_rank(), dist.get_world_size(), dist.get_backend(), torch.get_num_threads(), args


def note_pid(folder):
    Path(folder, str(os.getpid())).touch()


def raise_on_rank_1(folder):
    note_pid(folder)
    if dist.get_rank() == 1:
        raise ArithmeticError("the answer is not 42")
    dist.barrier()


def die_on_rank_1(folder):
    note_pid(folder)
    if dist.get_rank() == 1:
        os._exit(3)


def hang_on_rank_0(folder):
    note_pid(folder)
    if dist.get_rank() == 0:
        time.sleep(600)


def return_what_cannot_be_pickled(folder):
    note_pid(folder)
    return lambda: None


def assert_no_process_is_left(folder, num_ranks):
    pids = [int(path.name) for path in Path(folder).iterdir()]
    assert len(pids) == num_ranks
    deadline = time.monotonic() + 10
    while any(Path("/proc", str(pid)).exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived run_ranks"
        time.sleep(0.01)


def test_run_ranks_returns_results_by_rank():
    assert run_ranks(3, describe, "a", 1) == [(rank, 3, "gloo", 1, ("a", 1)) for rank in range(3)]


def test_run_ranks_runs_again_and_on_one_rank():
    assert run_ranks(1, describe) == run_ranks(1, describe) == [(0, 1, "gloo", 1, ())]


OLD = torch.ones(1000)
"""Older than any rank."""


def describe_server():
    """Threads of the process that this rank was forked from, what came with it, and whose tensors are found here."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{os.getppid()}/status").read_text().splitlines())
    mine = torch.ones(10)
    return int(status["Threads"]), "colossal_bcd.booster" in sys.modules, live_bytes(), mine.nbytes


def test_run_ranks_forks_from_one_thread_that_has_imported_everything():
    """Each rank imported this package anew, which took longer than what it then computed.

    A rank finds no tensors but its own, whatever the modules hold that came with it.
    """
    path = os.environ.get("PYTHONPATH")
    for threads, imported, found, mine in run_ranks(2, describe_server):
        assert threads == 1
        assert imported
        assert found == mine
    assert os.environ.get("PYTHONPATH") == path


def name_of_a_module_besides():
    return "block_net" in sys.modules


def test_start_server_imports_what_it_is_told():
    """In a process of its own, whose path the server has to be given."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import test_testing\n"
        "from colossal_bcd import testing\nfrom colossal_bcd.testing import run_ranks, start_server\n"
        "testing.PRELOAD = ('torch', 'colossal_bcd.testing')  # the others take long\n"
        "start_server('block_net')\nprint(run_ranks(1, test_testing.name_of_a_module_besides))"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(here), str(here / "support")], cwd=here.parent, capture_output=True, text=True
    )
    assert done.stdout == "[True]\n", done.stderr


def test_run_ranks_leaves_no_process_after_success(tmp_path):
    run_ranks(2, note_pid, str(tmp_path))
    assert_no_process_is_left(tmp_path, 2)


def test_run_ranks_reports_a_rank_that_raises(tmp_path):
    """The other rank waits in a barrier; it is ended with the one that failed."""
    with pytest.raises(RankError, match=r"(?s)rank 1\n.*raise_on_rank_1.*ArithmeticError: the answer is not 42"):
        run_ranks(2, raise_on_rank_1, str(tmp_path))
    assert_no_process_is_left(tmp_path, 2)


def test_run_ranks_reports_a_rank_that_dies(tmp_path):
    with pytest.raises(RankError, match="rank 1\nthe process ended without a result") as caught:
        run_ranks(2, die_on_rank_1, str(tmp_path))
    assert "rank 0" not in str(caught.value)
    assert_no_process_is_left(tmp_path, 2)


def test_run_ranks_reports_a_rank_that_hangs(tmp_path):
    run_ranks(1, describe)
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0\nstill running when time was up") as caught:
        run_ranks(2, hang_on_rank_0, str(tmp_path), timeout=3)
    assert time.monotonic() - start < 30
    assert "rank 1" not in str(caught.value)
    assert_no_process_is_left(tmp_path, 2)


def destroy_groups(num_groups: int) -> int:
    """Each as the tensors of its last collective are let go, here and in the group's threads."""
    for _ in range(num_groups):
        group = dist.new_group([0, 1])
        works = [dist.all_reduce(torch.ones(3), group=group, async_op=True) for _ in range(20)]
        for work in works:
            work.wait()
        del work, works
        dist.destroy_process_group(group)
        del group
    return num_groups


def test_ranks_that_destroy_process_groups_do_not_hang():
    """Before torch 2.8 one of about a hundred such groups hung in its destructor."""
    assert run_ranks(2, destroy_groups, 400, timeout=120) == [400, 400]


def test_run_ranks_reports_a_result_that_cannot_be_pickled(tmp_path):
    with pytest.raises(RankError, match=r"rank 0\n(?s:.*)pickle"):
        run_ranks(1, return_what_cannot_be_pickled, str(tmp_path))
    assert_no_process_is_left(tmp_path, 1)


def count_every_collective():
    """Each kind once on two ranks, on ten float32 values or two tensors of five."""
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    ten, twenty = torch.ones(10), torch.ones(20)
    pair = [torch.ones(5), torch.ones(5)]
    received = torch.zeros(10)
    with CollectiveCounter() as counter:
        dist.all_reduce(ten)
        dist.all_reduce(op=dist.ReduceOp.MAX, tensor=ten)
        dist.broadcast(ten, src=0)
        dist.reduce(ten, 0)
        dist.gather(ten, [ten.clone(), ten.clone()] if rank == 0 else None, dst=0)
        dist.scatter(ten, [ten.clone(), ten.clone()] if rank == 0 else None, src=0)
        dist.all_gather(pair, torch.ones(5))
        dist.all_gather_into_tensor(twenty, ten)
        dist.reduce_scatter_tensor(output=torch.zeros(10), input=twenty)
        dist.all_to_all_single(ten, torch.ones(10))
        dist.barrier()
        objects = [None, None]
        dist.all_gather_object(objects, rank)
        dist.broadcast_object_list(objects, 0)
        if rank == 0:
            dist.send(ten, 1)
        else:
            dist.recv(received, 0)
        work = dist.isend(ten, other)
        dist.recv(received, other)
        work.wait()
    dist.all_reduce(ten)
    return dict(counter.calls), dict(counter.bytes), counter.total


def test_collective_counter_counts_calls_and_bytes():
    expected = {
        "all_reduce": (2, 80), "broadcast": (1, 40), "reduce": (1, 40), "gather": (1, 40), "scatter": (1, 40),
        "all_gather": (1, 40), "all_gather_into_tensor": (1, 80), "reduce_scatter_tensor": (1, 80),
        "all_to_all_single": (1, 40), "barrier": (1, None), "all_gather_object": (1, None),
        "broadcast_object_list": (1, None), "send": (1, 40), "isend": (1, 40),
    }  # fmt: skip
    for rank, (calls, num_bytes, total) in enumerate(run_ranks(2, count_every_collective)):
        sent = {name: counts for name, counts in expected.items() if rank == 0 or name != "send"}
        assert calls == {name: count for name, (count, _) in sent.items()}
        assert num_bytes == {name: size for name, (_, size) in sent.items() if size is not None}
        assert total == sum(calls.values())


def exchange_in_a_batch():
    other = 1 - dist.get_rank()
    received = torch.zeros(10)
    with CollectiveCounter() as counter:
        operations = [
            dist.P2POp(dist.isend, torch.full((10,), float(dist.get_rank())), other),
            dist.P2POp(dist.irecv, received, other),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received.tolist(), dict(counter.calls), dict(counter.bytes)


def test_collective_counter_lets_batches_of_sends_through():
    """P2POp compares its operation with the module's own isend: a pipeline could not run inside the counter."""
    assert run_ranks(2, exchange_in_a_batch) == [
        ([float(1 - rank)] * 10, {"isend": 1}, {"isend": 40}) for rank in range(2)
    ]


def test_collective_counter_restores_the_functions_after_an_error():
    names = ["all_reduce", "isend", "barrier"]
    before = [getattr(dist, name) for name in names], dist.distributed_c10d.isend
    with pytest.raises(ArithmeticError), CollectiveCounter():
        raise ArithmeticError
    assert before == ([getattr(dist, name) for name in names], dist.distributed_c10d.isend)


def test_peak_bytes_counts_what_is_alive_at_once():
    with PeakBytes() as measured:
        x = torch.ones(100)
        y = x * 2
        del x
        z = torch.ones(50)
        assert measured.current == 600
    assert measured.peak == 800
    del y, z
    assert measured.current == 0


def test_peak_bytes_counts_no_views_updates_or_older_tensors():
    old = torch.ones(1000)
    with PeakBytes() as measured:
        view = old[10:].view(-1, 10).t()
        view.mul_(2)
        old.add_(1)
    assert measured.peak == 0


def test_peak_bytes_counts_temporaries_inside_an_expression():
    x = torch.ones(100)
    with PeakBytes() as measured:
        x.copy_((x * 2) + (x * 3))
    assert measured.peak == 3 * 400
    assert measured.current == 0


def test_peak_bytes_counts_a_storage_at_the_address_of_a_freed_one():
    """The addresses of tensors older than the block were remembered after these had been freed, and new tensors in the
    same memory went uncounted."""
    for _ in range(100):
        old = torch.ones(1000)
        address = old.data_ptr()
        with PeakBytes() as measured:
            del old
            new = torch.ones(1000)
        assert measured.peak == 4000
        if new.data_ptr() == address:
            return
    pytest.skip("the allocator never reused the address")


def test_peak_bytes_sees_backward():
    layer = nn.Linear(10, 10, bias=False)
    with PeakBytes() as measured:
        layer(torch.ones(1, 10)).sum().backward()
    assert measured.current == 400
    assert measured.peak >= 400
    layer.weight.grad = None
    assert measured.current == 0


def test_storages_counts_each_storage_once_and_whole():
    base, other = torch.ones(100), torch.ones(10).double()
    found = storages({"a": base, "b": [base[:5], (other, "text", None)]})
    assert found == {base.data_ptr(): 400, other.data_ptr(): 80}


def test_live_bytes_follows_tensors():
    before = live_bytes()
    x = torch.ones(1000)
    views = [x[:1], x.view(10, 100)]
    assert live_bytes() == before + 4000
    del x, views
    assert live_bytes() == before


def test_bytes_are_counted_beside_tensors_of_the_compiler():
    """Compiled code of an earlier test keeps fake tensors alive, whose storages have no address."""
    with FakeTensorMode():
        fake = torch.ones(3, 5)
    before = live_bytes()
    with PeakBytes() as measured:
        x = torch.ones(1000)
    assert live_bytes() == before + 4000
    assert measured.peak == 4000
    assert storages([fake, torch.ones(7, device="meta"), x]) == {x.data_ptr(): 4000}


SENT = []


def _ends_before_its_last_message_is_read(size):
    if dist.get_rank() == 0:
        SENT.append(dist.isend(torch.ones(size), 1))
        return 0
    time.sleep(1)
    received = torch.zeros(size)
    dist.recv(received, 0)
    return int(received.double().sum())


def test_a_rank_stays_until_the_others_have_what_it_sends():
    size = 10_000_000
    assert run_ranks(2, _ends_before_its_last_message_is_read, size) == [0, size]


def _waits_for_ever_on_rank_1():
    if dist.get_rank() == 1:
        time.sleep(1000)


def test_a_rank_that_is_late_says_where_it_waits():
    with pytest.raises(RankError, match=r"rank 1\nstill running when time was up(.|\n)*_waits_for_ever_on_rank_1"):
        run_ranks(2, _waits_for_ever_on_rank_1, timeout=3)
