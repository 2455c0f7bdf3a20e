"""Stochastic rounding: unbiased, exact where it can be, and the same bits for the same value on every mesh."""

import functools
import io
import itertools
import logging
import math

import block_net
import models
import plugin_cases
import pytest
import torch
from colossalai.booster import Booster
from conformance_cases import CASES, Case, Sizes, gradient, initial, process_mesh
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import make_params, set_grads, train
from test_layout import divisions
from test_optim import NoHostSync
from torch import nn

from colossal_bcd import CAME, Adafactor, AdamW, Lamb
from colossal_bcd.booster import LowLevelZeroPlugin
from colossal_bcd.optim.state import rounding
from colossal_bcd.optim.state.rounding import random_bits, round_into, stochastic_round, stream
from colossal_bcd.sharding import Layout, TensorSplit
from colossal_bcd.testing import PeakBytes, run_ranks

OPTIMIZERS = {
    "AdamW": functools.partial(AdamW, weight_decay=0.0),
    "Lamb": Lamb,
    "Adafactor": functools.partial(Adafactor, relative_step=False, scale_parameter=False),
    "CAME": CAME,
}
DTYPES = [torch.bfloat16, torch.float16]
DROPPED = {torch.bfloat16: 16, torch.float16: 24}
"""Random bits that a dtype's rounding reads."""


def every_number(dtype):
    """All 65536 bit patterns of a 16-bit dtype."""
    return torch.arange(2**16).to(torch.int16).view(dtype)


def random_words(count, seed=0):
    return torch.randint(0, 2**62, (count,), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=300, deadline=None)
@given(divisions(), st.data())
def test_positions_are_those_of_sharding_an_arange(division, data):
    places = torch.arange(math.prod(division.shape)).reshape(division.shape)
    for layout in itertools.chain(*division.layouts()):
        expected = layout.shard(places).view(-1)[: layout.num_local]
        assert torch.equal(layout.positions(0, layout.num_local), expected)
        start = data.draw(st.integers(0, layout.num_local))
        stop = data.draw(st.integers(start, layout.num_local))
        assert torch.equal(layout.positions(start, stop), expected[start:stop])


def test_positions_refuse_values_that_are_padding():
    layout = Layout(shape=(3, 2), split=TensorSplit(axis="tp", dim=0, rank=1, size=2, padded=4))
    assert layout.positions(0, 2).tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"got values \[0, 3\), expected some of 2"):
        layout.positions(0, 3)


def splitmix64(place, stream):
    """The published generator in Python's unbounded integers."""
    word = 2**64 - 1
    z = (stream + place * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=40), st.integers(-(2**63), 2**63 - 1))
def test_random_bits_are_splitmix64(places, stream):
    ours = random_bits(torch.tensor(places), stream).tolist()
    assert [bits % 2**64 for bits in ours] == [splitmix64(place, stream) for place in places]


def test_streams_differ_by_seed_parameter_and_step():
    names = list(itertools.product(range(5), range(5), range(5)))
    streams = [stream(*name) for name in names]
    assert len(set(streams)) == len(names)
    assert all(-(2**63) <= number < 2**63 for number in streams)
    # Pinned: a run that resumes with another version draws the same bits.
    assert stream(1, 2, 3) == 1466929338816962128


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_the_dtype_stay_bit_for_bit(dtype):
    """Infinities, NaN, subnormals and negative zero among them."""
    numbers = every_number(dtype)
    for seed in range(3):
        rounded = stochastic_round(numbers.float(), random_words(2**16, seed), dtype)
        assert rounded.dtype == dtype
        assert torch.equal(rounded.isnan(), numbers.isnan())
        kept = ~numbers.isnan()
        assert torch.equal(rounded[kept].view(torch.int16), numbers[kept].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.lists(st.floats(width=32), min_size=1, max_size=50), st.integers(0, 1000))
def test_result_is_one_of_the_two_neighbours(dtype, values, seed):
    """The smallest numbers of float16 and what is below them included; what overflows is as `to` converts it."""
    values = torch.tensor(values, dtype=torch.float32)
    limit = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.cat([values, values.clamp(-limit, limit), values.clamp(-tiny, tiny), values.clamp(-1e-7, 1e-7)])
    rounded = stochastic_round(values, random_words(len(values), seed), dtype)
    inside = values.abs() <= limit
    table = every_number(dtype)
    table = table[table.isfinite()].double().unique()
    exact, got = values[inside].double(), rounded[inside].double()
    upper = table[torch.searchsorted(table, exact).clamp(max=len(table) - 1)]
    lower = table[(torch.searchsorted(table, exact, right=True) - 1).clamp(min=0)]
    assert bool(((got == upper) | (got == lower)).all())
    outside = ~inside
    assert torch.equal(rounded[outside].isnan(), values[outside].isnan())
    assert torch.equal(rounded[outside].nan_to_num(7), values[outside].to(dtype).nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_beyond_the_largest_number_overflow_as_to_converts_them(dtype):
    """Less than half a step beyond is the largest number, never infinity by chance; more is infinity."""
    largest, eps = torch.finfo(dtype).max, torch.finfo(dtype).eps
    for part, expected in ((0.2, largest), (0.4, largest), (0.9, torch.inf)):
        # Halved for the last binade: its step is eps / 2 relative to its upper end.
        values = torch.full((1000,), largest * (1 + part * eps / 2), dtype=torch.float32)
        for sign in (1, -1):
            rounded = stochastic_round(sign * values, random_words(1000), dtype)
            assert bool((rounded == sign * expected).all())


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((torch.bfloat16, value) for value in (1.001, -1.003, 3.14159, 1e-3, -2.7e30, 1e-39, 5e-45)),
        # Fractions of a step of float16 that are multiples of 2^-13: normal numbers, subnormal ones, and below them.
        *(
            (torch.float16, value)
            for value in (1.001, -3.14159, 60001.0, 2**-24 * (3 + 5 / 4096), -(2**-24) * 77 / 8192)
        ),
    ],
    ids=str,
)
def test_expectation_is_the_value_exactly(dtype, value):
    """Over all random bits, each once."""
    bits = torch.arange(2**16) if dtype == torch.bfloat16 else torch.arange(2**13) << 11
    values = torch.full((len(bits),), value, dtype=torch.float32)
    rounded = stochastic_round(values, bits, dtype).double()
    assert rounded.mean().item() == values[0].double().item()
    assert len(rounded.unique()) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_above_those_that_count_are_ignored(dtype):
    values, bits = torch.randn(1000), random_words(1000)
    same = stochastic_round(values, bits % 2 ** DROPPED[dtype], dtype)
    assert torch.equal(stochastic_round(values, bits, dtype), same)
    assert torch.equal(stochastic_round(values, bits - 2**62, dtype), same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_over_places_is_the_value(dtype):
    count, value = 200_000, 1.0 + 0.3 * 2**-10
    target = torch.empty(count, dtype=dtype)
    round_into(target, torch.full((count,), value), Layout.whole((count,)), stream(0, 0, 0))
    step = torch.finfo(dtype).eps
    # Five standard deviations of a mean of steps that are taken with some probability.
    assert abs(target.double().mean().item() - value) <= 5 * 0.5 * step / count**0.5
    # Neighbours are independent: half of the pairs of an even chance would agree.
    round_into(target, torch.full((count,), 1 + step / 2), Layout.whole((count,)), stream(0, 0, 1))
    agree = (target[1:] == target[:-1]).double().mean().item()
    assert abs(agree - 0.5) <= 5 * 0.5 / count**0.5


@settings(max_examples=50, deadline=None)
@given(divisions(), st.sampled_from(DTYPES))
def test_every_division_of_a_tensor_rounds_each_value_alike(division, dtype):
    values = torch.randn(division.shape, generator=torch.Generator().manual_seed(1))
    whole = torch.empty(division.shape, dtype=dtype)
    round_into(whole.view(-1), values.view(-1), Layout.whole(division.shape), 17)
    for layout in itertools.chain(*division.layouts()):
        data = layout.shard(values).view(-1)[: layout.num_local]
        part = torch.empty(layout.num_local, dtype=dtype)
        round_into(part, data, layout, 17)
        assert torch.equal(part, layout.shard(whole).view(-1)[: layout.num_local])


def test_chunks_change_nothing_and_bound_the_temporaries(monkeypatch):
    values, layout = torch.randn(300_000), Layout.whole((300_000,))
    targets = [torch.empty(300_000, dtype=torch.bfloat16) for _ in range(2)]
    with PeakBytes() as measured:
        round_into(targets[0], values, layout, 5)
    # A few int64 tensors of a chunk.
    assert measured.peak <= 6 * 8 * rounding.CPU_CHUNK
    monkeypatch.setattr(rounding, "CPU_CHUNK", 1000)
    round_into(targets[1], values, layout, 5)
    assert torch.equal(*targets)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_on_the_gpu_are_the_cpus(dtype):
    values = torch.randn(100_000)
    layout = Layout(shape=(200, 1000), split=TensorSplit(axis="tp", dim=1, rank=1, size=2, sections=(600, 400)))
    targets = [torch.empty(100_000, dtype=dtype, device=device) for device in ("cpu", "cuda")]
    for target in targets:
        torch.cuda.set_sync_debug_mode("error" if target.is_cuda else "default")
        round_into(target, values.to(target.device, non_blocking=True), layout, -5)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(targets[0], targets[1].cpu())


def drift(name, dtype, **options):
    """Weights of 1 after 100 steps of a constant gradient whose updates are a fortieth of bfloat16's step."""
    # One dim: CAME's confidence in a matrix whose gradient never changes would make its steps long.
    param = nn.Parameter(torch.ones(4096, dtype=dtype))
    optimizer = OPTIMIZERS[name]([param], lr=1e-4, **options)
    for _ in range(100):
        param.grad = torch.ones_like(param)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_below_half_a_step_survive_on_average(name):
    lost, kept = drift(name, torch.bfloat16), drift(name, torch.bfloat16, rounding="stochastic")
    exact = drift(name, torch.float32)
    assert bool((lost == 1).all())
    assert exact.mean().item() < 0.995
    # A value takes a step of 2^-8 with probability 0.0256, a hundred times; the mean of 4096, five deviations.
    deviation = (100 * 0.0256) ** 0.5 * 2**-8 / 4096**0.5
    assert abs(kept.double().mean().item() - exact.double().mean().item()) <= 5 * deviation


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_is_the_float32_step_to_one_unit(name, dtype):
    half = make_params(dtype)
    single = [nn.Parameter(param.detach().float()) for param in half]
    before = half[0].detach().clone()
    set_grads(half, 0)
    for one, other in zip(single, half, strict=True):
        one.grad = other.grad.float()
    OPTIMIZERS[name](half, lr=0.05, rounding="stochastic").step()
    OPTIMIZERS[name](single, lr=0.05).step()
    assert not torch.equal(half[0], before)
    for one, other in zip(half, single, strict=True):
        # The two neighbours of a value are less than a unit in the last place away.
        spacing = other.abs().clamp(min=torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
        assert bool(((one.float() - other).abs() < spacing).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_parameters_are_not_rounded_and_the_log_says_so_once(dtype, caplog):
    plain, asked = make_params(dtype), make_params(dtype)
    train(AdamW(plain, lr=0.1), plain, 3)
    with caplog.at_level(logging.WARNING):
        train(AdamW(asked, lr=0.1, rounding="stochastic"), asked, 3)
    assert all(map(torch.equal, plain, asked))
    assert [record.message for record in caplog.records] == [
        f'AdamW: rounding="stochastic" has no effect on {dtype} weights, such as float32 masters, which are not '
        "rounded. Under a plugin pass master_weights=False."
    ]


def test_mixed_dtypes_round_what_is_low_and_warn_of_nothing(caplog):
    params = [*make_params(torch.float32, [(40,)]), *make_params(torch.bfloat16, [(40,)])]
    others = [nn.Parameter(param.detach().clone()) for param in params]
    train(AdamW(params, lr=0.1, rounding="stochastic"), params, 3)
    train(AdamW(others, lr=0.1), others, 3)
    assert torch.equal(params[0], others[0])
    assert not torch.equal(params[1], others[1])
    assert not caplog.records


def rounded_run(seed=0, shapes=((500,), (500,)), steps=2, optimizer_type=AdamW):
    params = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
    optimizer = optimizer_type(params, lr=1e-3, rounding="stochastic", seed=seed)
    history = []
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        history.append([param.detach().clone() for param in params])
    return history


def test_bits_follow_the_seed_the_parameter_and_the_step_and_no_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = rounded_run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again, other = rounded_run(), rounded_run(seed=1)
    assert all(map(torch.equal, itertools.chain(*first), itertools.chain(*again)))
    assert not torch.equal(first[0][0], other[0][0])
    assert not torch.equal(first[0][0], first[0][1])
    assert not torch.equal(first[0][0] == 1, first[1][0] - first[0][0] == 0)


def test_bits_do_not_repeat_when_state_is_cleared():
    """A switch of blocks clears the state and its step: with K=1 every visit of a block would draw the bits of step 1,
    and a value that they round down would never move."""
    param = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    optimizer = AdamW([param], lr=1e-3, weight_decay=0.0, rounding="stochastic")
    moved = torch.zeros(2000, dtype=torch.bool)
    for _ in range(20):
        param.grad = torch.ones_like(param)
        optimizer.step()
        moved |= param != 1
        param.data.fill_(1)
        optimizer.state.clear()
    # Moved with probability 1/4 each time.
    assert moved.float().mean().item() > 0.98


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_continues_bit_for_bit(name):
    straight = make_params(torch.bfloat16)
    optimizer = OPTIMIZERS[name](straight, lr=1e-2, rounding="stochastic", seed=3)
    train(optimizer, straight, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = [nn.Parameter(param.detach().clone()) for param in straight]
    fresh = OPTIMIZERS[name](resumed, lr=1e-2, rounding="stochastic", seed=3)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    train(optimizer, straight, 3, first=3)
    train(fresh, resumed, 3, first=3)
    assert all(map(torch.equal, straight, resumed))


def test_state_dict_without_the_options_means_their_defaults():
    """Groups of optimizers that do not use the options are those of the originals."""
    params = make_params()
    optimizer = AdamW(params)
    assert not {"rounding", "seed", "moment_bits", "num_steps"} & set(optimizer.param_groups[0])
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    optimizer = AdamW(params, rounding="stochastic", seed=4)
    assert (optimizer.param_groups[0]["rounding"], optimizer.param_groups[0]["seed"]) == ("stochastic", 4)
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1)
    assert "num_steps" not in optimizer.param_groups[0]


def test_non_contiguous_parameters_round_like_contiguous_ones():
    dense = make_params(torch.bfloat16, [(8, 4, 3, 3)])
    strided = [nn.Parameter(dense[0].detach().clone().to(memory_format=torch.channels_last))]
    for params in (dense, strided):
        train(CAME(params, lr=1e-2, rounding="stochastic"), params, 3)
    assert not strided[0].is_contiguous()
    assert torch.equal(dense[0], strided[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_reads_no_tensor_on_the_host(name):
    params = make_params(torch.bfloat16)
    optimizer = OPTIMIZERS[name](params, lr=0.1, rounding="stochastic")
    for step in range(2):
        set_grads(params, step)
        with NoHostSync():
            optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, 'rounding: got \'up\', expected "nearest" or "stochastic"'),
        ({"rounding": None}, "rounding: got None"),
        ({"seed": 1.5}, "seed: got 1.5, expected an integer"),
        ({"seed": True}, "seed: got True"),
    ],
    ids=str,
)
def test_unknown_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[name](make_params(), lr=0.1, **options)
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[name]([{"params": make_params(), **options}], lr=0.1)
    with pytest.raises(ValueError, match="did you mean 'rounding'"):
        OPTIMIZERS[name]([{"params": make_params(), "roundin": "stochastic"}], lr=0.1)


def test_groups_round_by_their_own_options():
    params, alone = make_params(torch.bfloat16, [(90,), (90,)]), make_params(torch.bfloat16, [(90,), (90,)])
    groups = [{"params": params[:1], "rounding": "stochastic"}, {"params": params[1:]}]
    train(AdamW(groups, lr=0.01), params, 3)
    train(AdamW(alone, lr=0.01), alone, 3)
    assert not torch.equal(params[0], alone[0])
    assert torch.equal(params[1], alone[1])


def test_block_optimizer_has_float32_masters_which_are_not_rounded(caplog):
    runs = []
    for options in ({}, {"rounding": "stochastic"}):
        model = block_net.Net(dtype=torch.bfloat16)
        optimizer = block_net.wrap(model, AdamW(model.parameters(), lr=0.01, **options), verbose=0)
        block_net.train(model, optimizer, 8)
        runs.append(block_net.weights(model))
    assert all(map(torch.equal, *runs))
    assert ["no effect on torch.float32" in record.message for record in caplog.records] == [True]


HYPER = {"lr": 1e-3, "rounding": "stochastic", "seed": 7}
STEPS = 5


def low_precision_grad(index, step):
    grad = gradient(index, step)
    return None if grad is None else grad.bfloat16()


class Sharded:
    """bfloat16 parts of the cases on this rank, with NaN in their padding."""

    def __init__(self, sizes, name):
        mesh, tp_rank, zero_rank = process_mesh(sizes)
        self.layouts = [case.layout(sizes, tp_rank, zero_rank) for case in CASES]
        self.params = [nn.Parameter(self.local(index, initial(index).bfloat16())) for index in range(len(CASES))]
        self.optimizer = OPTIMIZERS[name](self.params, **HYPER)
        self.optimizer.bind(dict(zip(self.params, self.layouts, strict=True)), mesh)

    def local(self, index, full):
        part = self.layouts[index].shard(full)
        part.view(-1)[self.layouts[index].num_local :] = float("nan")
        return part

    def train(self):
        for step in range(STEPS):
            for index, param in enumerate(self.params):
                grad = low_precision_grad(index, step)
                param.grad = None if grad is None else self.local(index, grad)
            self.optimizer.step()
        return [
            (param.detach().view(-1)[: layout.num_local].float(), param.detach().view(-1)[layout.num_local :].float())
            for param, layout in zip(self.params, self.layouts, strict=True)
        ]


def sharded_weights(sizes):
    return {name: Sharded(sizes, name).train() for name in OPTIMIZERS}


@functools.cache
def whole_weights():
    params = [nn.Parameter(initial(index).bfloat16()) for index in range(len(CASES))]
    optimizer = AdamW(params, weight_decay=0.0, **HYPER)
    for step in range(STEPS):
        for index, param in enumerate(params):
            param.grad = low_precision_grad(index, step)
        optimizer.step()
    return [param.detach().float() for param in params]


@pytest.mark.parametrize("sizes", [Sizes(2, 2), Sizes(2, 1), Sizes(1, 3)], ids=str)
def test_meshes_and_replicas_draw_the_same_bits(sizes):
    ranks = run_ranks(sizes.tp * sizes.zero, sharded_weights, sizes)
    for rank, weights in enumerate(ranks):
        tp_rank, zero_rank = rank % sizes.tp, rank // sizes.tp
        for index, (case, (data, padding)) in enumerate(zip(CASES, weights["AdamW"], strict=True)):
            layout = case.layout(sizes, tp_rank, zero_rank)
            expected = layout.shard(whole_weights()[index]).view(-1)[: layout.num_local]
            assert torch.equal(data, expected), f"{case} on rank {rank}"
            assert bool(padding.isnan().all())
        for name, index in itertools.product(OPTIMIZERS, range(len(CASES))):
            if CASES[index].dim is None:
                replica = ranks[zero_rank * sizes.tp][name][index][0]
                assert torch.equal(weights[name][index][0], replica), f"{name}: {CASES[index]} on rank {rank}"


def wave_peaks():
    """By optimizer: bytes of temporaries of a step of twelve rules in waves of three, and of one rule alone."""
    sizes = Sizes(2, 1)
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    layout = Case(shape=(128, 64), dim=0).layout(sizes, tp_rank, zero_rank)
    found = {}
    for name in ("Lamb", "Adafactor", "CAME"):
        budget = 3 * layout.max_local * 8
        peaks = []
        for count in (12, 1):
            params = [nn.Parameter(torch.ones(layout.local_shape, dtype=torch.bfloat16)) for _ in range(count)]
            optimizer = OPTIMIZERS[name](params, lr=1e-3, rounding="stochastic", wave_bytes=budget)
            optimizer.bind(dict.fromkeys(params, layout), mesh)
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            with PeakBytes() as measured:
                optimizer.step()
            peaks.append(measured.peak)
        found[name] = budget, *peaks
    return found


def test_wave_counts_the_float32_copies_of_weights():
    for budget, peak, alone in run_ranks(2, wave_peaks)[0].values():
        # Rows, columns and scalars of twelve rules, as for the other temporaries.
        assert peak <= budget + alone + 12 * 16 * 8 + 12 * 4 * (64 + 64) * 8
        assert peak >= budget


def plugin_weights(options):
    """Weights, and dtype and size of the masters, after some steps of two ranks without float32 masters."""
    model = models.llama().bfloat16()
    names = {id(param): name for name, param in model.named_parameters()}
    optimizer = AdamW(model.parameters(), lr=1e-3, **options)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=1, precision="bf16", master_weights=False))
    model, engine, *_ = booster.boost(model, optimizer)
    for step in range(4):
        for param in engine.layouts:
            grad = plugin_cases.gradient(names[id(param)], tuple(param.shape), step)
            param.grad = None if grad is None else grad.to(param.dtype)
        engine.sync_dp_grads()
        engine.step()
    masters = [(master.dtype, master.numel()) for master in engine.masters.of.values()]
    return {names[id(param)]: param.detach().float().clone() for param in engine.layouts}, masters


def one_process_weights(options):
    model = models.llama().bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-3, **options)
    for step in range(4):
        for name, param in model.named_parameters():
            grad = plugin_cases.gradient(name, tuple(param.shape), step)
            param.grad = None if grad is None else grad.to(param.dtype)
        optimizer.step()
    return {name: param.detach().float() for name, param in model.named_parameters()}


def test_low_level_zero_without_masters_rounds_as_one_process():
    options = {"rounding": "stochastic", "seed": 11}
    expected, nearest = one_process_weights(options), one_process_weights({})
    for weights, masters in run_ranks(2, plugin_weights, options):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert any(not torch.equal(weights[name], nearest[name]) for name in expected)
        assert {dtype for dtype, _ in masters} == {torch.bfloat16}
        assert sum(numel for _, numel in masters) == sum(weight.numel() for weight in expected.values()) // 2
