"""Packing, ordering, dtypes and waves of rounds."""

import weakref

import pytest
import torch
import torch.distributed as dist

from colossal_bcd.sharding import Mesh, Sum, Task, resolve, run_rounds
from colossal_bcd.testing import CollectiveCounter, run_ranks


class MirrorMesh(Mesh):
    """A mesh whose other ranks hold what this one holds: a sum over an axis is a product with its size."""

    def __init__(self, **sizes):
        super().__init__()
        self._groups = {axis: (axis,) * (size > 1) for axis, size in sizes.items()}
        self.sizes = sizes
        self.sent = []
        self.travelling, self.at_once = 0, []

    def begin_all_reduce(self, tensor, axis):
        self.sent.append((axis, tensor.dtype, tensor.tolist()))
        self.travelling += 1
        self.at_once.append(self.travelling)

        def end():
            self.travelling -= 1
            tensor.mul_(self.sizes[axis])

        return end


def asking(values, axes, log=None):
    """A rule that makes one request per value, one after the other, and logs the answers."""
    for value in values:
        (answer,) = yield (Sum(torch.as_tensor(value), axes),)
        if log is not None:
            log.append(answer)


def task(rule, axes=("tp",), num_bytes=1):
    return Task(rule, axes, num_bytes)


def test_resolve_packs_a_round_into_one_collective_per_axis():
    mesh = MirrorMesh(tp=2, zero=3)
    requests = [
        Sum(torch.tensor([1.0, 2.0]), ("zero", "tp")),
        Sum(torch.tensor(3.0), ("tp",)),
        Sum(torch.tensor([[4.0], [5.0]]), ("zero",)),
        Sum(torch.tensor(6.0), ()),
    ]
    answers = resolve(requests, mesh)
    assert mesh.sent == [("zero", torch.float32, [1, 2, 4, 5]), ("tp", torch.float32, [3, 6, 3])]
    assert [answer.tolist() for answer in answers] == [[6, 12], 6, [[12], [15]], 6]
    assert [answer.shape for answer in answers] == [request.value.shape for request in requests]


def test_resolve_leaves_the_requested_values_alone():
    values = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    resolve([Sum(value, ("tp",)) for value in values], MirrorMesh(tp=2))
    assert [value.tolist() for value in values] == [[1, 2], 3]


def test_resolve_reduces_in_float32_or_wider_and_answers_in_the_dtype_asked():
    single, double, half = torch.tensor(1.0), torch.tensor(2.0).double(), torch.tensor(3.0).bfloat16()
    mesh = MirrorMesh(tp=2, zero=2, pp=2)
    answers = resolve([Sum(single, ("tp", "zero")), Sum(double, ("tp",)), Sum(half, ("zero", "pp"))], mesh)
    assert mesh.sent == [
        ("tp", torch.float64, [1, 2]),
        ("zero", torch.float32, [2, 3]),
        ("pp", torch.float32, [6]),
    ]
    assert [answer.dtype for answer in answers] == [torch.float32, torch.float64, torch.bfloat16]
    assert [answer.item() for answer in answers] == [4, 4, 12]


def test_resolve_skips_an_axis_of_one_rank_and_takes_empty_values():
    mesh = MirrorMesh(tp=1, zero=2)
    answers = resolve([Sum(torch.zeros(0), ("zero",)), Sum(torch.tensor(2.0), ("tp", "zero"))], mesh)
    assert mesh.sent == [("zero", torch.float32, [2])]
    assert [answer.tolist() for answer in answers] == [[], 4]


def test_resolve_refuses_an_axis_that_the_mesh_lacks():
    with pytest.raises(ValueError, match=r"mesh axis 'pp' is in a layout but not in the mesh, which has \['tp'\]"):
        resolve([Sum(torch.tensor(1.0), ("pp",))], MirrorMesh(tp=2))


def test_run_rounds_refuses_an_axis_that_the_mesh_lacks():
    with pytest.raises(ValueError, match="mesh axis 'pp'"):
        run_rounds([task(asking([1.0], ("pp",)), ("pp",))], MirrorMesh(tp=2))


def test_run_rounds_answers_each_rule_its_own_requests():
    mesh, logs = MirrorMesh(tp=2), [[], [], []]
    rules = [asking([10.0 * i + j for j in range(i)], ("tp",), logs[i]) for i in range(3)]
    run_rounds([task(rule) for rule in rules], mesh)
    assert [[answer.item() for answer in log] for log in logs] == [[], [20], [40, 42]]
    # Rule 0 asks for nothing; rules 1 and 2 share the first round; the second is rule 2's alone.
    assert mesh.sent == [("tp", torch.float32, [10, 20]), ("tp", torch.float32, [21])]


def test_run_rounds_gives_a_tuple_of_requests_a_tuple_of_answers():
    answers = []

    def rule():
        answers.extend((yield (Sum(torch.tensor(1.0), ("tp",)), Sum(torch.tensor(2.0), ()))))
        answers.extend((yield ()))
        answers.extend((yield (Sum(torch.tensor(3.0), ("tp",)),)))

    run_rounds([task(rule())], MirrorMesh(tp=2))
    assert [answer.item() for answer in answers] == [2, 2, 6]


@pytest.mark.parametrize(
    ("num_bytes", "budget", "waves", "at_once"),
    [
        ([1] * 6, 6, [6], 1),
        ([1] * 6, 5, [2, 2, 2], 2),
        ([1] * 5, 4, [2, 2, 1], 2),
        ([5, 1, 1, 5, 1], 4, [1, 2, 1, 1], 1),
        ([1, 1, 1, 5, 1], 4, [2, 1, 1, 1], 2),
        ([1] * 3, 0, [1, 1, 1], 1),
        ([0] * 4, 0, [4], 1),
    ],
    ids=["one", "two at once", "short last", "larger than the budget", "larger behind two", "no budget", "free"],
)
def test_run_rounds_makes_waves_within_the_budget(num_bytes, budget, waves, at_once):
    """Where there are several, the sums of one travel while the next one computes what it asks for."""
    mesh, count, logs = MirrorMesh(tp=2), len(num_bytes), [[] for _ in num_bytes]
    rules = [asking([1.0 + i, -1.0 - i], ("tp",), log) for i, log in enumerate(logs)]
    run_rounds([task(rule, num_bytes=size) for rule, size in zip(rules, num_bytes, strict=True)], mesh, budget)
    sent = [values for _, _, values in mesh.sent]
    for sign in (1, -1):
        of_round = [values for values in sent if values[0] * sign > 0]
        assert [len(values) for values in of_round] == waves
        assert [value for values in of_round for value in values] == [sign * (1.0 + i) for i in range(count)]
    assert [[answer.item() for answer in log] for log in logs] == [[2.0 + 2 * i, -2.0 - 2 * i] for i in range(count)]
    assert (max(mesh.at_once), mesh.travelling) == (at_once, 0)


class Temporary:
    """Stands for a rule's temporaries; counts how many are alive."""

    def __init__(self, alive):
        alive.add(self)


def holding(alive, peaks, axes):
    temporary = Temporary(alive)
    (answer,) = yield (Sum(torch.tensor(1.0), axes),)
    peaks.append(len(alive))
    assert answer.item() == (2 if axes else 1)
    del temporary


@pytest.mark.parametrize(
    ("axes", "budget", "peak"), [((), 100, 1), (("zero",), 100, 1), (("tp",), 3, 3), (("tp",), 100, 10)], ids=str
)
def test_run_rounds_keeps_only_a_wave_of_temporaries_alive(axes, budget, peak):
    """`zero` has one rank: without another rank to ask, rules run one at a time."""
    mesh, alive, peaks = MirrorMesh(tp=2, zero=1), weakref.WeakSet(), []
    value_axes = axes if axes != ("zero",) else ()
    tasks = (task(holding(alive, peaks, value_axes), axes) for _ in range(10))
    run_rounds(tasks, mesh, budget)
    assert max(peaks) == peak
    assert len(peaks) == 10
    assert not alive


def test_run_rounds_takes_tasks_lazily():
    """A task whose construction allocates is built when its turn comes."""
    finished, taken = [], []

    def rule(i):
        yield from ()
        finished.append(i)

    def tasks():
        for i in range(4):
            taken.append(len(finished))
            yield task(rule(i), ())

    run_rounds(tasks(), Mesh())
    assert taken == [0, 1, 2, 3]


def test_run_rounds_lets_an_error_of_a_rule_through():
    def rule():
        yield (Sum(torch.tensor(1.0), ("tp",)),)
        raise ArithmeticError("rule")

    with pytest.raises(ArithmeticError, match="rule"):
        run_rounds([task(rule())], MirrorMesh(tp=2))


def sum_over_two_groups():
    rank = dist.get_rank()
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    alone = [dist.new_group([i]) for i in range(4)]
    mesh = Mesh({"zero": (rows[rank // 2], columns[rank % 2]), "tp": rows[rank // 2], "pp": alone[rank]})
    log = []
    with CollectiveCounter() as counter:
        run_rounds([task(asking([10.0**rank], axes, log), axes) for axes in (("zero",), ("tp",), ("pp",))], mesh)
    assert not mesh.communicates(("pp",))
    return [answer.item() for answer in log], counter.total


def test_mesh_axis_of_two_groups_sums_over_their_product():
    (first, calls), *_, (last, _) = run_ranks(4, sum_over_two_groups)
    # "pp" has one rank and is answered at once; "zero" is two all-reduces, one per group, and "tp" one.
    assert first == [1, 1111, 11]
    assert last == [1000, 1111, 1100]
    assert calls == 3


class Travelling:
    """What is under way of torch's all-reduces, by group, whenever another one begins."""

    def __init__(self):
        self.seen, self._begin, self._now = [], dist.all_reduce, []

    def __call__(self, tensor, group=None, async_op=False):
        self._now = [each for each in self._now if not each.ended]
        self.seen.append([each.group is group for each in self._now])
        self._now.append(Ended(self._begin(tensor, group=group, async_op=async_op), group))
        return self._now[-1]


class Ended:
    """A collective, and whether it was waited for."""

    def __init__(self, work, group):
        self.group, self.ended, self._work = group, False, work

    def wait(self):
        self.ended = True
        return self._work.wait()


def waves_over(*axes):
    rank = dist.get_rank()
    rows, columns = [dist.new_group([0, 1]), dist.new_group([2, 3])], [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mesh, logs, dist.all_reduce = Mesh({"tp": rows[rank // 2], "zero": columns[rank % 2]}), [[], [], []], Travelling()
    run_rounds([task(asking([i + rank, 1.0], axes, log), axes) for i, log in enumerate(logs)], mesh, wave_bytes=2)
    return [[answer.item() for answer in log] for log in logs], dist.all_reduce.seen


@pytest.mark.parametrize("axes", [("tp",), ("tp", "zero")], ids=str)
def test_two_groups_never_communicate_at_once(axes):
    """NCCL may wait for ever for two communicators; sums over one group travel while others of it begin."""
    for rank, (answers, seen) in enumerate(run_ranks(4, waves_over, *axes)):
        of_ranks = [rank // 2 * 2, rank // 2 * 2 + 1] if axes == ("tp",) else range(4)
        assert answers == [[sum(i + other for other in of_ranks), len(of_ranks)] for i in range(3)]
        assert all(map(all, seen))
        assert [True] in seen
