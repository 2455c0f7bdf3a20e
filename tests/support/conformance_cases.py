"""The conformance table and what its ranks run.

A new optimizer is one row of `TABLE`; layouts, meshes, collectives, waves and padding are then tested for it.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import galore_references
import references
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from colossal_bcd import (
    CAME,
    SGD,
    Adafactor,
    AdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreLion,
    GaLoreSGD,
    Lamb,
    Lion,
)
from colossal_bcd.fsdp.torch_private import fully_shard
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh, TensorSplit
from colossal_bcd.sharding.dtensor import local_values
from colossal_bcd.testing import CollectiveCounter, PeakBytes
from support.errors import largest_error, worst

TOLERANCE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Row:
    optimizer: type[ShardedOptimizer]
    reference: Callable[..., torch.Tensor]
    hyper: dict = field(default_factory=dict)
    rounds: int = 0
    """Collectives per step and axis."""
    zero_rounds: int = 0
    """Collectives per step over the zero axis alone."""
    left_rounds: tuple[int, int] | None = None
    """Collectives over tp and over zero if all matrices are projected from the left and divided along dim 0."""
    num_steps: int = 7
    """Errors in state show late: more where the state feeds back into itself."""
    decays: tuple[str, ...] = ("decay", "no_decay")

    def calls(self, sizes):
        """Collectives of a step of all cases."""
        return self.rounds * sizes.num_axes + self.zero_rounds * (sizes.zero > 1)

    def calls_of_many(self, sizes):
        """Collectives of a step of `many`."""
        tp, zero = self.left_rounds or (self.rounds, self.rounds)
        return tp * (sizes.tp > 1) + zero * (sizes.zero > 1)


# The bases are drawn: what a decomposition costs at a refresh is counted in test_galore.py.
PROJECTION = {"rank": 3, "clamp": True, "update_proj_gap": 3, "svd_method": "random", "reproject_momentum": True}

TABLE = {
    "adamw": Row(optimizer=AdamW, reference=references.adamw),
    "sgd": Row(optimizer=SGD, reference=references.sgd, hyper={"momentum": 0.9}, decays=("decay",)),
    "lion": Row(optimizer=Lion, reference=references.lion, decays=("decay",)),
    "lamb": Row(optimizer=Lamb, reference=references.lamb, rounds=1),
    "lamb-v3": Row(
        optimizer=Lamb, reference=references.lamb, hyper={"bias_correction": False}, rounds=1, decays=("decay",)
    ),
    "lamb-step_size": Row(
        optimizer=Lamb, reference=references.lamb, hyper={"bias_correction": "step_size"}, rounds=1, decays=("decay",)
    ),
    "adafactor": Row(
        optimizer=Adafactor,
        reference=references.adafactor,
        hyper={"relative_step": False, "clip_threshold": 0.7},
        rounds=2,
        num_steps=20,
        decays=("decay",),
    ),
    "adafactor-momentum": Row(
        optimizer=Adafactor,
        reference=references.adafactor,
        hyper={"relative_step": False, "scale_parameter": False, "beta1": 0.9},
        rounds=2,
        num_steps=20,
        decays=("decay",),
    ),
    "came": Row(optimizer=CAME, reference=references.came, rounds=3, num_steps=20),
    "galore-adamw": Row(
        optimizer=GaLoreAdamW,
        reference=galore_references.galore_adamw,
        hyper=PROJECTION,
        rounds=1,
        zero_rounds=1,
        left_rounds=(1, 2),
        decays=("decay",),
    ),
    "galore-sgd": Row(
        optimizer=GaLoreSGD,
        reference=galore_references.galore_sgd,
        hyper={**PROJECTION, "momentum": 0.9, "nesterov": True},
        rounds=1,
        zero_rounds=1,
        left_rounds=(1, 2),
        decays=("decay",),
    ),
    "galore-lion": Row(
        optimizer=GaLoreLion,
        reference=galore_references.galore_lion,
        hyper=PROJECTION,
        rounds=1,
        zero_rounds=1,
        left_rounds=(1, 2),
        decays=("decay",),
    ),
    "galore-adafactor": Row(
        optimizer=GaLoreAdafactor,
        reference=galore_references.galore_adafactor,
        hyper={**PROJECTION, "relative_step": False, "beta1": 0.9, "clip_threshold": 0.7},
        rounds=3,
        zero_rounds=1,
        left_rounds=(2, 4),
        decays=("decay",),
    ),
    "lamb-adam": Row(optimizer=Lamb, reference=references.lamb, hyper={"adam": True}, decays=("decay",)),
}
DECAYS = {"decay": 0.1, "no_decay": 0.0}
VARIANTS = [f"{name}-{decay}" for name, row in TABLE.items() for decay in row.decays]


@dataclass(frozen=True)
class Sizes:
    tp: int
    zero: int
    replicas: int = 1
    dtensors: bool = False
    """The slices are torch's own, made by `fully_shard`."""

    @property
    def num_ranks(self):
        return self.tp * self.zero * self.replicas

    def __str__(self):
        if self.dtensors:
            kinds = (f"tp{self.tp}",) * (self.tp > 1), (f"replicas{self.replicas}",) * (self.replicas > 1)
            return "-".join((*kinds[0], *kinds[1], f"fsdp{self.zero}"))
        return f"tp{self.tp}-zero{self.zero}"

    @property
    def num_axes(self):
        return (self.tp > 1) + (self.zero > 1)


MESHES = [Sizes(tp, zero) for tp in (1, 2) for zero in (1, 2, 3, 4)]
SHARDED_BY_TORCH = [
    *(Sizes(1, zero, dtensors=True) for zero in (2, 3, 4)),
    Sizes(1, 2, replicas=2, dtensors=True),
    Sizes(2, 2, dtensors=True),
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One parameter: its global shape and how tensor parallelism divides it."""

    shape: tuple[int, ...]
    dim: int | None = None
    sections: tuple[int, ...] | None = None
    padded: int | None = None
    zeros: bool = False
    """Starts at zero, as biases do: a weight norm of zero."""

    def __str__(self):
        kind = "".join(
            f"-{name}{value}"
            for name, value in [("dim", self.dim), ("fused", self.sections), ("padded", self.padded)]
            if value is not None
        )
        return "x".join(map(str, self.shape)) + kind + ("-zeros" if self.zeros else "")

    def layout(self, sizes, tp_rank, zero_rank):
        split = None
        if self.dim is not None:
            split = TensorSplit(
                axis="tp", dim=self.dim, rank=tp_rank, size=sizes.tp, sections=self.sections, padded=self.padded
            )
        return Layout(shape=self.shape, split=split).sliced("zero", zero_rank, sizes.zero)


SHAPES = [(64, 48), (30, 50), (1023, 64), (3, 3), (1, 64), (33, 7), (64,), (7,), (1,), (8, 4, 3, 3), ()]
CASES = [
    *(Case(shape=shape) for shape in SHAPES),
    *(Case(shape=shape, dim=dim) for shape in SHAPES for dim in (0, 1) if dim < len(shape) and shape[dim] % 2 == 0),
    Case(shape=(7,), zeros=True),
    Case(shape=(64,), dim=0, zeros=True),
    Case(shape=(96, 48), dim=0, sections=(32, 32, 32)),
    Case(shape=(48, 96), dim=1, sections=(32, 32, 32)),
    Case(shape=(40, 12), dim=0, sections=(24, 8, 8)),
    Case(shape=(1000, 16), dim=0, padded=1024),
    Case(shape=(10, 16), dim=0, padded=64),
]


def hyper_of(variant):
    row, decay = variant.rsplit("-", 1)
    return TABLE[row], {"lr": 1e-2, **TABLE[row].hyper, "weight_decay": DECAYS[decay]}


def groups_of(params, weight_decay):
    """Three param groups: the defaults, another lr, another weight decay."""
    own = [{}, {"lr": 3e-2}, {"weight_decay": weight_decay / 3}]
    return [{"params": params[i::3], **own[i]} for i in range(3)]


@functools.cache
def initial(index):
    case = CASES[index]
    generator = torch.Generator().manual_seed(index)
    return torch.zeros(case.shape).double() if case.zeros else torch.randn(case.shape, generator=generator).double()


@functools.cache
def gradient(index, step):
    """None now and then, from the first step on for some; all zero once."""
    if (index + step) % 5 == 0:
        return None
    grad = torch.randn(CASES[index].shape, generator=torch.Generator().manual_seed(1000 * step + index)).double()
    return grad * (step != 4 or index % 4 != 0)


def schedule(optimizer):
    """Halves every group's lr in the run."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def factor(step):
    return 1.0 if step < 3 else 0.5


def train_by_reference(variant):
    """The weights of every case after every step."""
    return reference_weights(*hyper_of(variant))


def reference_weights(row, hyper):
    """`train_by_reference` of a row that need not be in the table."""
    groups = groups_of(range(len(CASES)), hyper["weight_decay"])
    numbers = {index: key for key, index in enumerate(index for group in groups for index in group["params"])}
    result = {}
    for group in groups:
        own = {**hyper, **{key: value for key, value in group.items() if key != "params"}}
        for index in group["params"]:
            weight, state, history = initial(index), {"key": numbers[index]}, []
            for step in range(row.num_steps):
                grad = gradient(index, step)
                if grad is not None:
                    now = {**own, "lr": own["lr"] * factor(step)}
                    weight = row.reference(weight, grad, state, **now)
                history.append(weight)
            result[index] = history
    return [torch.stack(result[index]) for index in range(len(CASES))]


def train_on_one_process(variant):
    """The weights of every case after the last step."""
    return weights_on(torch.device("cpu"), *hyper_of(variant))


def weights_on(device, row, hyper):
    """`train_on_one_process` on any device, of a row that need not be in the table."""
    params = [torch.nn.Parameter(initial(index).to(device, copy=True)) for index in range(len(CASES))]
    optimizer = row.optimizer(groups_of(params, hyper["weight_decay"]), **hyper)
    scheduler = schedule(optimizer)
    for step in range(row.num_steps):
        for index, param in enumerate(params):
            grad = gradient(index, step)
            param.grad = None if grad is None else grad.to(device)
        optimizer.step()
        scheduler.step()
    return [param.detach() for param in params]


@functools.cache
def process_mesh(sizes):
    """The mesh of this rank with its tp and zero ranks; ranks of one tp group are neighbours."""
    tp_rank, zero_rank = dist.get_rank() % sizes.tp, dist.get_rank() // sizes.tp
    tp = [dist.new_group([z * sizes.tp + t for t in range(sizes.tp)]) for z in range(sizes.zero)]
    zero = [dist.new_group([z * sizes.tp + t for z in range(sizes.zero)]) for t in range(sizes.tp)]
    return Mesh({"tp": tp[zero_rank], "zero": zero[tp_rank]}), tp_rank, zero_rank


class ShardedRun:
    """One optimizer over shards of the cases, on this rank."""

    def __init__(self, sizes, variant, garbage=float("nan"), **options):
        row, hyper = hyper_of(variant)
        mesh, tp_rank, zero_rank = process_mesh(sizes)
        self.garbage = garbage
        self.layouts = [case.layout(sizes, tp_rank, zero_rank) for case in CASES]
        self.params = [torch.nn.Parameter(self.local(index, initial(index))) for index in range(len(CASES))]
        self.optimizer = row.optimizer(groups_of(self.params, hyper["weight_decay"]), **hyper, **options)
        self.optimizer.bind(dict(zip(self.params, self.layouts, strict=True)), mesh)
        self.scheduler = schedule(self.optimizer)

    def local(self, index, full):
        """This rank's part with garbage in its padding."""
        part = self.layouts[index].shard(full)
        part.view(-1)[self.layouts[index].num_local :] = self.garbage
        return part

    def data(self, index):
        return local_values(self.params[index]).view(-1)[: self.layouts[index].num_local].clone()

    def step(self, step):
        for index, param in enumerate(self.params):
            grad = gradient(index, step)
            param.grad = None if grad is None else self.local(index, grad)
        self.optimizer.step()
        self.scheduler.step()

    def errors(self, step, expected):
        """Largest error of each case after `step` against whole tensors; an empty part has none."""
        result = []
        for index, layout in enumerate(self.layouts):
            target = layout.shard(expected[index][step]).view(-1)[: layout.num_local]
            result.append(largest_error(self.data(index), target))
        return result

    def padding_is_untouched(self):
        return all(
            bool((local_values(param).view(-1)[layout.num_local :].isnan()).all())
            for param, layout in zip(self.params, self.layouts, strict=True)
        )


class DTensorRun(ShardedRun):
    """The same over DTensors, which the optimizer finds by itself."""

    def __init__(self, sizes, variant, **options):
        row, hyper = hyper_of(variant)
        self.params = dtensors(sizes, CASES, [initial(index) for index in range(len(CASES))])
        self.optimizer = row.optimizer(groups_of(self.params, hyper["weight_decay"]), **hyper, **options)
        self.layouts = [self.optimizer.layouts[param] for param in self.params]
        self.scheduler = schedule(self.optimizer)

    def local(self, index, full):
        return like(self.params[index], self.layouts[index], full)


def dtensors(sizes, cases, values):
    """Parameters that tensor parallelism divides where it can, and then `fully_shard`.

    Sections and padding of dims are none of torch's, and torch 2.5 shards no rows that do not divide by all ranks.
    """
    names = ("replicas",) * (sizes.replicas > 1) + ("fsdp",)
    shape = (sizes.replicas,) * (sizes.replicas > 1) + (sizes.zero,)
    mesh = data = init_device_mesh("cpu", (*shape, sizes.tp), mesh_dim_names=(*names, "tp"))
    data, module = mesh[names] if len(names) > 1 else mesh["fsdp"], torch.nn.Module()
    params = []
    for index, (case, value) in enumerate(zip(cases, values, strict=True)):
        tensor = value.clone()
        if not case.shape:  # `fully_shard` refuses scalars
            params.append(torch.nn.Parameter(distribute_tensor(tensor, data, [Replicate()] * data.ndim)))
            continue
        if sizes.tp > 1 and case.dim is not None and (case.dim or case.shape[0] % (sizes.tp * sizes.zero) == 0):
            tensor = distribute_tensor(tensor, mesh["tp"], [Shard(case.dim)])
        module.register_parameter(f"p{index}", torch.nn.Parameter(tensor))
        params.append(f"p{index}")
    fully_shard(module, mesh=data)
    return [getattr(module, param) if isinstance(param, str) else param for param in params]


def like(param, layout, full):
    """This rank's part of a whole tensor as a DTensor."""
    local = layout.shard(full).view(-1)[: layout.num_local].view(local_values(param).shape)
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def run_of(sizes, variant, **options):
    return (DTensorRun if sizes.dtensors else ShardedRun)(sizes, variant, **options)


def largest_errors(sizes, path, variants):
    """Of all cases and steps of some variants, against the reference."""
    expected, found = torch.load(path, mmap=True, weights_only=True), {}
    for variant in variants:
        run, steps = run_of(sizes, variant), range(hyper_of(variant)[0].num_steps)
        errors = []
        for step in steps:
            run.step(step)
            errors += run.errors(step, expected[variant]["reference"])
        found[variant] = worst(errors)
    return found


def conform(sizes, path):
    """Everything about one mesh that needs ranks; runs on every rank, returns JSON of {variant or row: findings}."""
    expected = torch.load(path, mmap=True, weights_only=True)
    report = {}
    for variant in VARIANTS:
        found = {"errors": [0.0] * len(CASES), "calls": []}
        run = run_of(sizes, variant)
        for step in range(hyper_of(variant)[0].num_steps):
            with CollectiveCounter() as counter:
                run.step(step)
            found["calls"].append([counter.total, counter.calls["all_reduce"]])
            now = run.errors(step, expected[variant]["reference"])
            found["errors"] = [max(pair) for pair in zip(found["errors"], now, strict=True)]
        one_process = [weight[None] for weight in expected[variant]["one process"]]
        found["errors_to_one_process"] = run.errors(0, one_process)
        found["padding_is_untouched"] = run.padding_is_untouched()
        found["replicated"] = {
            str(case): hashlib.sha256(run.data(index).numpy().tobytes()).hexdigest()
            for index, case in enumerate(CASES)
            if case.dim is None
        }
        report[variant] = found | waves(sizes, variant, expected)
    for row in TABLE:
        report[row] = {"padding_counts": False} if sizes.dtensors else padding(sizes, f"{row}-decay")
        if sizes.zero <= 2:
            report[row] |= many(sizes, f"{row}-decay")
    return json.dumps(report)


def padding(sizes, variant):
    """Whether other garbage in the padding of weights and gradients leaves every bit of the data alone."""
    runs = [ShardedRun(sizes, variant, garbage=garbage) for garbage in (0.0, 1e30)]
    for step, run in itertools.product(range(2), runs):
        run.step(step)
    return {"padding_counts": not all(map(torch.equal, *([run.data(i) for i in range(len(CASES))] for run in runs)))}


def waves(sizes, variant, expected):
    """Collectives and errors of three steps with a budget that is smaller than all rules together."""
    run = run_of(sizes, variant, wave_bytes=50_000)
    errors = [0.0] * len(CASES)
    with CollectiveCounter() as counter:
        for step in range(3):
            run.step(step)
            now = run.errors(step, expected[variant]["reference"])
            errors = [max(pair) for pair in zip(errors, now, strict=True)]
    return {"wave_errors": errors, "wave_calls": counter.total}


def many(sizes, variant):
    """Collectives of one step with few tensors and with fifteen times as many."""
    row, hyper = hyper_of(variant)
    case, calls = Case(shape=(4, 6), dim=0), []
    for num_tensors in (10, 150):
        if sizes.dtensors:
            params = dtensors(sizes, [case] * num_tensors, [torch.ones(case.shape)] * num_tensors)
            optimizer = row.optimizer(params, **hyper)
        else:
            mesh, tp_rank, zero_rank = process_mesh(sizes)
            layout = case.layout(sizes, tp_rank, zero_rank)
            params = [torch.nn.Parameter(torch.ones(layout.local_shape)) for _ in range(num_tensors)]
            optimizer = row.optimizer(params, **hyper)
            optimizer.bind(dict.fromkeys(params, layout), mesh)
        for param in params:
            param.grad = torch.ones_like(param)
        with CollectiveCounter() as counter:
            optimizer.step()
        calls.append(counter.total)
    return {"calls_of_many": calls}


def measure_wave(optimizer_type, dtype, num_rules):
    """Peak bytes of a step of twelve rules with a budget for `num_rules`, and of one rule alone."""
    sizes = Sizes(2, 1)
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    layout = Case(shape=(128, 64), dim=0).layout(sizes, tp_rank, zero_rank)
    options = {"relative_step": False} if optimizer_type is Adafactor else {}
    wide_bytes = 8 if dtype == torch.float64 else 4

    def peak(num_params, bound, wave_bytes):
        params = [torch.nn.Parameter(torch.ones(layout.local_shape, dtype=dtype)) for _ in range(num_params)]
        optimizer = optimizer_type(params, lr=1e-3, wave_bytes=wave_bytes, **options)
        optimizer.bind(dict.fromkeys(params, layout), mesh if bound else Mesh({"tp": (), "zero": ()}))
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        with PeakBytes() as measured:
            optimizer.step()
        return measured.peak

    rule = layout.max_local * wide_bytes
    return peak(12, True, num_rules * rule), peak(1, False, 0), rule


def measure_all_waves():
    return {
        (optimizer_type.__name__, dtype, num_rules): measure_wave(optimizer_type, dtype, num_rules)
        for optimizer_type in (Lamb, Adafactor, CAME)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        for num_rules in (1, 3, 12)
    }
