"""Numbers at the edge of a dtype: gradients and weights of any magnitude, and what is right for them.

The reference is the textbook in float64 on values of the weights' dtype, with its state rounded to float32 after every
update, as it is stored: a second moment of 1e-50 is 0 there and one of 1e50 infinite, or capped.
"""

import contextlib
from dataclasses import dataclass

import pytest
import references
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from conformance_cases import TABLE, Sizes, process_mesh
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from colossal_bcd import AdamW, Lamb
from colossal_bcd.booster import LowLevelZeroPlugin
from colossal_bcd.sharding import Layout, Mesh, Sum, TensorSplit, resolve

SHAPES = [(64, 64), (12, 6), (1, 1), (1, 64), (7,), (), (2, 4, 3)]
FEW = [(12, 6), (1, 1), (7,)]
LARGEST = torch.finfo(torch.float32).max / 2


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One kind of input."""

    grads: tuple[float, ...]
    """Magnitude of the gradients at each step."""
    weights: float = 1.0
    """Magnitude of the weights."""
    first_row_only: bool = False
    """Whether all other rows have gradients of zero."""


EDGES = {
    "zeros after three": Edge(grads=(1.0,) * 3 + (0.0,) * 9),
    "one step of 1e-25": Edge(grads=(1.0, 1.0, 1e-25, 1.0, 1.0)),
    "1e-25 first": Edge(grads=(1e-25, 1.0, 1.0)),
    "1e-30": Edge(grads=(1e-30,) * 4),
    "1e25": Edge(grads=(1e25,) * 4),
    "one step of 1e25": Edge(grads=(1.0, 1e25, 1.0, 1.0)),
    "1e37": Edge(grads=(1e37,) * 3),
    "first row of 1e12": Edge(grads=(1e12,) * 4, first_row_only=True),
    "zero weights": Edge(grads=(1.0,) * 4, weights=0.0),
    "zero weights and gradients": Edge(grads=(0.0,) * 4, weights=0.0),
    "weights of 1e-30": Edge(grads=(1.0,) * 4, weights=1e-30),
    "weights of 1e30": Edge(grads=(1.0,) * 4, weights=1e30),
    "weights of 1e30, gradients of 1e-30": Edge(grads=(1e-30,) * 4, weights=1e30),
}
HALF_EDGES = {
    "zeros after three": EDGES["zeros after three"],
    "least": Edge(grads=(6e-8,) * 4),
    "largest": Edge(grads=(6e4,) * 4),
    "large weights": Edge(grads=(1.0,) * 4, weights=3e4),
    "least weights": Edge(grads=(1.0,) * 4, weights=6e-8),
}
"""The same for float16, whose numbers end at 6.5e4 and 6e-8."""


def edges_of(dtype):
    return HALF_EDGES if dtype == torch.float16 else EDGES


def values(shape, scale, seed, dtype):
    """[*shape] float64 numbers of `dtype`, between scale / 4 and scale, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.75 + 0.25
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.float64) * 2 - 1
    return (draw * signs * scale).to(dtype).double()


def gradient(edge, shape, step, dtype):
    grad = values(shape, edge.grads[step], 100 + step, dtype)
    if edge.first_row_only and len(shape) > 1:
        grad[1:] = 0
    return grad


@contextlib.contextmanager
def stored_in_float32():
    """References whose averages are rounded to float32, those of factored second moments to at most `LARGEST`."""
    moments, average = references.moments, references.average

    def rounded_moments(grad, state, betas):
        m, v, t = moments(grad, state, betas)
        state["m"], state["v"] = m.float().double(), v.float().double()
        return state["m"], state["v"], t

    def rounded_average(state, name, value, decay):
        average(state, name, value if name == "m" else value.clamp(max=LARGEST), decay)
        state[name] = state[name].float().double()
        return state[name]

    references.moments, references.average = rounded_moments, rounded_average
    try:
        yield
    finally:
        references.moments, references.average = moments, average


def expected(row, edge, shape, key, dtype, hyper):
    """[steps + 1, *shape] weights before and after every step."""
    weight, state = values(shape, edge.weights, 1, dtype), {"key": key}
    history = [weight]
    with contextlib.nullcontext() if dtype == torch.float64 else stored_in_float32():
        for step in range(len(edge.grads)):
            weight = TABLE[row].reference(weight, gradient(edge, shape, step, dtype), state, **hyper)
            weight = weight.to(dtype).double()
            history.append(weight)
    return torch.stack(history)


def bound(history, dtype):
    """Largest error after every step that rounding explains.

    A step is fewer than 64 operations in float32 on numbers that are at most of the size of its terms, which are at
    most as large as the largest change so far times 4 (an edge's gradients differ by a factor of four, and moments may
    cancel); each operation is off by 2^-24.  Besides, decay, step and reference round the weight once each.
    """
    history = history.reshape(len(history), -1)
    largest = history.abs().amax(1)
    change = history.diff(dim=0).abs().amax(1).cummax(0).values
    info = torch.finfo(dtype)
    return (64 * 4 * 2**-24 * change).cumsum(0) + (3 * info.eps / 2 * largest[1:]).cumsum(0) + info.tiny


def hyper_of(row, decay):
    return {"lr": 1e-2, **TABLE[row].hyper, "weight_decay": decay}


def failures(row, dtype, decay, mesh, layout_of, shapes=SHAPES):
    """{"edge shape": largest error as a multiple of the bound}, of those above it; inf for what is not a number.

    Where the textbook leaves the dtype, so must the optimizer: a weight of 1e30 whose decay is 1e28 times itself.
    """
    found, hyper = {}, hyper_of(row, decay)
    for name, edge in edges_of(dtype).items():
        histories = [expected(row, edge, shape, key, dtype, hyper) for key, shape in enumerate(shapes)]
        layouts = list(map(layout_of, shapes))
        params = [
            torch.nn.Parameter(layout.shard(history[0]).to(dtype))
            for layout, history in zip(layouts, histories, strict=True)
        ]
        optimizer = TABLE[row].optimizer(params, **hyper)
        optimizer.bind(dict(zip(params, layouts, strict=True)), mesh)
        limits = [bound(history, dtype) for history in histories]
        for step in range(len(edge.grads)):
            for param, layout, shape in zip(params, layouts, shapes, strict=True):
                param.grad = layout.shard(gradient(edge, shape, step, dtype)).to(dtype)
            optimizer.step()
            for param, layout, history, limit in zip(params, layouts, histories, limits, strict=True):
                worst = excess(param, layout, history[step + 1], limit[step])
                if not worst <= 1:
                    found[f"{name} {layout.shape}"] = max(worst, found.get(f"{name} {layout.shape}", 0.0))
    return found


def excess(param, layout, whole, limit):
    """Largest error as a multiple of the limit."""
    data = param.detach().reshape(-1)[: layout.num_local].double()
    target = layout.shard(whole).reshape(-1)[: layout.num_local]
    if not data.numel():
        return 0.0
    if not whole.isfinite().all():
        return float("inf") if data.isfinite().all() else 0.0
    error = (data - target).abs() / limit
    return torch.where(error.isnan(), torch.inf, error).max().item()


def on_mesh(sizes_list, rows, shapes):
    """`failures` of float32 on this rank, by mesh and row."""
    found = {}
    for sizes in (Sizes(*pair) for pair in sizes_list):
        mesh, tp, zero = process_mesh(sizes)

        def layout_of(shape, sizes=sizes, tp=tp, zero=zero):
            dim = next((dim for dim in (1, 0) if dim < len(shape) and shape[dim] % sizes.tp == 0), None)
            split = None if dim is None else TensorSplit(axis="tp", dim=dim, rank=tp, size=sizes.tp)
            return Layout(shape=shape, split=split).sliced("zero", zero, sizes.zero)

        for row in rows:
            failed = failures(row, torch.float32, 0.1, mesh, layout_of, shapes)
            if failed:
                found[f"{sizes} {row}"] = failed
    return found


def on_one_process(row, dtype, decay, shapes=SHAPES):
    return failures(row, dtype, decay, Mesh(), Layout.whole, shapes)


def zeros_for_long():
    """The weights of a 64x64 LAMB after 3 gradients and zeros, by this rank's part."""
    found = {}
    for sizes in (Sizes(2, 1), Sizes(1, 2)):
        mesh, tp, zero = process_mesh(sizes)
        split = TensorSplit(axis="tp", dim=0, rank=tp, size=sizes.tp)
        layout = Layout(shape=(64, 64), split=split).sliced("zero", zero, sizes.zero)
        found[str(sizes)] = (layout, train_on_zeros(layout, mesh, torch.float32, num_zeros=597))
    return found


def train_on_zeros(layout, mesh, dtype, hyper=None, num_zeros=1000):
    """[steps, local] weights after every step of LAMB: three gradients, then zeros."""
    edge = Edge(grads=(1e-2,) * 3)
    param = torch.nn.Parameter(layout.shard(values(layout.shape, 1.0, 1, dtype)).to(dtype))
    optimizer = Lamb([param], lr=1e-4, **(hyper or {}))
    optimizer.bind({param: layout}, mesh)
    history = []
    for step in range(3 + num_zeros):
        whole = gradient(edge, layout.shape, step, dtype) if step < 3 else torch.zeros(layout.shape).double()
        param.grad = layout.shard(whole).to(dtype)
        optimizer.step()
        history.append(param.detach().clone())
    return torch.stack(history)


def mixed_on_the_wire():
    """Sums of squares of any magnitude beside many float32 values, and their bytes."""
    mesh = Mesh({"tp": dist.group.WORLD})
    rank = dist.get_rank()
    norms = [torch.tensor([scale], dtype=torch.float64) for scale in (0.0, 1e-90, 1e-40, 1.0, 3e38, 1e77, float("inf"))]
    norms.append(torch.tensor([(1e-60, 1e60)[rank]], dtype=torch.float64))
    many = torch.full((1000,), float(rank + 1))
    with WireBytes() as wire:
        answers = resolve([Sum(norm, ("tp",), exact=False) for norm in norms] + [Sum(many, ("tp",))], mesh)
        alone = resolve([Sum(norm, ("tp",), exact=False) for norm in norms], mesh)
        exact = resolve([Sum(norm, ("tp",)) for norm in norms] + [Sum(many, ("tp",))], mesh)
    flat = [[answer.tolist()[0] for answer in found[: len(norms)]] for found in (answers, alone, exact)]
    return flat, bool((answers[-1] == 3).all()), wire.sent


class WireBytes:
    """Bytes of each all-reduce."""

    def __enter__(self):
        self.sent, self._before = [], dist.all_reduce

        def counted(tensor, *args, **kwargs):
            self.sent.append(tensor.nbytes)
            return self._before(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_):
        dist.all_reduce = self._before


def boosted(scale):
    """Norm of gradients of a magnitude, what clipping leaves of them, and what refuses torch's checkpoint."""
    model = torch.nn.Linear(4, 4)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=1, precision="fp32", max_norm=1.0))
    model, optimizer, *_ = booster.boost(model, AdamW(model.parameters(), lr=1e-2))
    booster.backward((model(torch.ones(2, 4)) * scale).sum(), optimizer)
    given = []
    optimizer.optim.register_step_pre_hook(
        lambda inner, *_: given.extend(param.grad.clone() for group in inner.param_groups for param in group["params"])
    )
    optimizer.step()
    with pytest.raises(ValueError, match="a boosted optimizer: .*booster.save_optimizer"):
        get_optimizer_state_dict(model, optimizer)
    return optimizer.get_grad_norm(), torch.cat(given), all(param.isfinite().all() for param in model.parameters())


def boost_complex():
    """The error of boosting torch's AdamW on a complex parameter."""
    model = torch.nn.Linear(2, 2)
    model.phase = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    plugin = LowLevelZeroPlugin(stage=1, precision="fp32")
    with pytest.raises(ValueError, match=r"parameter phase of shape \(2, 2\) is torch.complex64"):
        Booster(plugin=plugin).boost(model, torch.optim.AdamW(model.parameters()))
    return True


def boosts():
    return [boosted(scale) for scale in (1e-25, 1.0, 1e25)], boost_complex()
