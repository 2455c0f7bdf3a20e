"""8-bit first moments: errors within the bound of the code map, bytes as declared, math that never learns of it."""

import functools
import io
import itertools
import sys
from hashlib import sha256

import block_net
import pytest
import torch
from bitsandbytes import functional
from conformance_cases import CASES, Case, Sizes, gradient, initial, process_mesh
from optim_cases import SHAPES, make_params, set_grads, train
from support.errors import largest_error
from test_optim import NoHostSync
from torch import nn

from colossal_bcd import CAME, Adafactor, AdamW, Lamb
from colossal_bcd.booster.explanation import explain
from colossal_bcd.optim.state import quantized
from colossal_bcd.optim.state.quantized import dequantize, quantize_into
from colossal_bcd.optim.state.spec import CHUNK, StateSpec
from colossal_bcd.sharding import Layout
from colossal_bcd.testing import PeakBytes, live_bytes, run_ranks

BETA1 = 0.9
OPTIMIZERS = {
    "AdamW": functools.partial(AdamW, lr=1e-2),
    "Lamb": functools.partial(Lamb, lr=1e-2),
    # Updates that do not depend on the weights, so that moments can be compared step by step.
    "Adafactor": functools.partial(Adafactor, lr=1e-2, beta1=BETA1, relative_step=False, scale_parameter=False),
    "CAME": functools.partial(CAME, lr=1e-2),
}
CODES = functional.create_dynamic_map(signed=True)
# Of a value relative to the largest of its block: half the widest gap between codes, or the gap from -1 to the first
# code.  bitsandbytes finds the nearest code to a 2^-16th.
ERROR = max(CODES.diff().max().item() / 2, 1 + CODES[0].item()) + 2**-15


def absmax_of_values(absmax, count):
    """[count] scale of each value."""
    return absmax.repeat_interleave(CHUNK)[:count]


def stored(values):
    codes = torch.zeros(len(values), dtype=torch.uint8)
    absmax = torch.zeros(-(-len(values) // CHUNK))
    quantize_into(codes, absmax, values)
    return codes, absmax


def test_error_bound_is_the_documented_one():
    assert pytest.approx(0.0071, abs=1e-4) == ERROR


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 5000])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_values_come_back_within_the_bound(count, scale):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator) * torch.logspace(0, -6, max(count, 1))[:count] * scale
    codes, absmax = stored(values)
    assert dequantize(codes, absmax).shape == (count,)
    assert bool(((dequantize(codes, absmax) - values).abs() <= ERROR * absmax_of_values(absmax, count)).all())
    largest = [block.abs().max().item() for block in values.split(CHUNK)] if count else []
    assert absmax.tolist() == largest


def test_zeros_and_both_signs_of_the_largest_value_come_back():
    values = torch.tensor([0.0, 1.0, -1.0, 1e-9])
    assert dequantize(*stored(torch.zeros(300))).tolist() == [0] * 300
    zero, one, minus_one, tiny = dequantize(*stored(values)).tolist()
    assert (zero, one, tiny) == (0, 1, 0)
    assert abs(minus_one + 1) <= ERROR


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_small_values_are_stored_as_their_nearest_code(device):
    """bitsandbytes' CPU kernel is off by up to 2^-16 of the scale: far too much for values of 1e-7 of it."""
    values = torch.logspace(-9, 0, 700) * torch.tensor([1.0, -1.0]).repeat(350)
    values[::CHUNK] = 1.0
    codes = torch.zeros(700, dtype=torch.uint8, device=device)
    absmax = torch.zeros(3, device=device)
    quantize_into(codes, absmax, values.to(device))
    error = (dequantize(codes, absmax).cpu() - values).abs()
    nearest = (values.unsqueeze(1) - CODES).abs().amin(1)
    assert bool((error <= nearest + torch.where(values.abs() < 2**-10, 1e-9, 2**-15)).all())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_without_a_gradient_stay_where_they_are(name):
    """Rows of tokens that never come.  Where a zero of the first moment was stored as 2.1e-5 of the block's scale, over
    a second moment of zero, AdamW moved such weights eleven times as far as the others."""
    param = nn.Parameter(torch.ones(300))
    optimizer = OPTIMIZERS[name]([param], moment_bits=8, weight_decay=0.0)
    for _ in range(5):
        param.grad = torch.zeros(300)
        param.grad[:8] = 1e-2
        optimizer.step()
    assert bool((param[8:] == 1).all())
    assert bool((param[:8] != 1).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [3, 299])
def test_values_that_are_not_finite_are_not_lost(bad, place):
    """bitsandbytes' CPU kernel stores NaN as an ordinary number, so a run that had diverged looked sound."""
    values = torch.ones(300)
    values[place] = bad
    finite = dequantize(*stored(values)).isfinite()
    assert not finite[place]
    other = slice(256, 300) if place < 256 else slice(0, 256)
    assert bool(finite[other].all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_the_declaration_says(name, dtype):
    params = make_params(dtype)
    optimizer = OPTIMIZERS[name](params, moment_bits=8)
    train(optimizer, params, 1)
    for param in params:
        specs = optimizer.state_spec(Layout.whole(tuple(param.shape)), optimizer.hyper_of(optimizer.param_groups[0]))
        state = dict(optimizer.state[param])
        assert type(state.pop("step")) is int
        declared = {key: part for entry, spec in specs.items() for key, part in spec.stored(entry).items()}
        assert set(state) == set(declared)
        for key, spec in declared.items():
            assert tuple(state[key].shape) == spec.shape
            assert state[key].nbytes == spec.num_bytes(dtype)
        assert declared["exp_avg"].kind == "elementwise"
        assert declared["exp_avg_absmax"].kind == "block"
        assert (state["exp_avg"].dtype, state["exp_avg"].shape) == (torch.uint8, param.shape)
        assert state["exp_avg_absmax"].shape == (-(-param.numel() // CHUNK),)
        assert sum(value.nbytes for value in state.values()) == sum(spec.num_bytes(dtype) for spec in specs.values())


def bytes_of_a_step(name, **options):
    """Live bytes that the first step of a matrix of 2^20 values adds, beside maps that are made once."""
    small = nn.Parameter(torch.ones(2, 2))
    small.grad = torch.ones_like(small)
    OPTIMIZERS[name]([small], moment_bits=8).step()
    param = nn.Parameter(torch.ones(1024, 1024))
    optimizer = OPTIMIZERS[name]([param], **options)
    param.grad = torch.ones_like(param)
    quantized.require_library()
    before = live_bytes()
    optimizer.step()
    return live_bytes() - before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_moment_costs_one_byte_and_a_sixty_fourth_per_value(name):
    saved = bytes_of_a_step(name) - bytes_of_a_step(name, moment_bits=8)
    assert saved == 2**20 * (4 - 1) - 2**20 // CHUNK * 4


class Within:
    """The bound of the moment's error: each step adds that of storage and shrinks the old one by beta1."""

    def __init__(self, count):
        self.before = torch.zeros(count, dtype=torch.float64)
        """Bound at the end of the last step, which the next one starts from."""

    def holds(self, codes, absmax, expected):
        scale = absmax_of_values(absmax, len(expected)).double()
        # A few float32 roundings of values up to the scale on the way.
        bound = BETA1 * self.before + (ERROR + 2**-20) * scale
        self.before = bound
        return bool(((dequantize(codes, absmax).double() - expected.double()).abs() <= bound).all())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moment_follows_the_float32_one_within_the_bound(name, dtype):
    exact, small = make_params(dtype), make_params(dtype)
    one, other = OPTIMIZERS[name](exact), OPTIMIZERS[name](small, moment_bits=8)
    bounds = [Within(param.numel()) for param in exact]
    differs = False
    for step in range(20):
        for params, optimizer in ((exact, one), (small, other)):
            set_grads(params, step)
            optimizer.step()
        for param, twin, bound in zip(exact, small, bounds, strict=True):
            expected, state = one.state[param]["exp_avg"].view(-1), other.state[twin]
            assert bound.holds(state["exp_avg"].view(-1), state["exp_avg_absmax"], expected), (step, param.shape)
            differs |= not torch.equal(dequantize(state["exp_avg"].view(-1), state["exp_avg_absmax"]), expected)
    assert differs


def test_adamw_weights_follow_within_the_bound_of_their_moments():
    """A weight moves by lr * m^ / (sqrt(v^) + eps) with the moment before it is stored: the old error times beta1."""
    exact, small = make_params(), make_params()
    one, other = (OPTIMIZERS["AdamW"](exact, weight_decay=0.0), AdamW(small, lr=1e-2, weight_decay=0.0, moment_bits=8))
    bounds = [Within(param.numel()) for param in exact]
    allowed = [torch.zeros(param.numel(), dtype=torch.float64) for param in exact]
    for step in range(1, 21):
        for params, optimizer in ((exact, one), (small, other)):
            set_grads(params, step)
            optimizer.step()
        for index, (param, twin) in enumerate(zip(exact, small, strict=True)):
            root = (one.state[param]["exp_avg_sq"].view(-1) / (1 - 0.999**step)).sqrt() + 1e-8
            allowed[index] += 1e-2 * BETA1 * bounds[index].before / (1 - BETA1**step) / root
            difference = (param - twin).detach().abs().view(-1)
            assert bool((difference <= allowed[index] + 1e-14).all()), (step, param.shape)
            state = other.state[twin]
            assert bounds[index].holds(
                state["exp_avg"].view(-1), state["exp_avg_absmax"], one.state[param]["exp_avg"].view(-1)
            )
    assert 1e-5 < largest_error(list(exact), list(small)) < torch.inf


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rules_see_the_moment_in_the_dtype_of_the_math(name, monkeypatch):
    seen = []
    cls = OPTIMIZERS[name].func
    original = cls.update

    def update(self, view, state, hyper):
        seen.append((state["exp_avg"].dtype, set(state)))
        return original(self, view, state, hyper)

    monkeypatch.setattr(cls, "update", update)
    for dtype, math in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        params = make_params(dtype, [(8, 8)])
        train(OPTIMIZERS[name](params, moment_bits=8), params, 2)
        assert [kind for kind, _ in seen] == [math, math]
        assert not any("exp_avg_absmax" in names for _, names in seen)
        seen.clear()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_continues_bit_for_bit(name, dtype):
    straight = make_params(dtype)
    optimizer = OPTIMIZERS[name](straight, moment_bits=8)
    train(optimizer, straight, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = [nn.Parameter(param.detach().clone()) for param in straight]
    fresh = OPTIMIZERS[name](resumed, moment_bits=8)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert fresh.state[resumed[0]]["exp_avg"].dtype == torch.uint8
    train(optimizer, straight, 3, first=3)
    train(fresh, resumed, 3, first=3)
    assert all(map(torch.equal, straight, resumed))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bits", [16, 4, 0, True, "8", None])
def test_other_bits_are_refused(name, bits):
    message = f"moment_bits: got {bits!r}, expected 32 or 8"
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[name](make_params(), moment_bits=bits)
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[name]([{"params": make_params(), "moment_bits": bits}])


def test_adafactor_without_a_first_moment_refuses_8_bits():
    with pytest.raises(ValueError, match="moment_bits: got 8, expected 32 where beta1 is None"):
        Adafactor(make_params(), moment_bits=8)


@pytest.mark.parametrize(("bits", "got"), [(8, "torch.float64"), (32, "torch.uint8")])
def test_bits_that_change_after_the_first_step_are_refused(bits, got):
    params = make_params()
    optimizer = AdamW(params, moment_bits=40 - bits)
    train(optimizer, params, 1)
    before = params[0].detach().clone()
    optimizer.param_groups[0]["moment_bits"] = bits
    with pytest.raises(ValueError, match=f"moment_bits={bits}: got exp_avg stored as {got}.*before the first step"):
        train(optimizer, params, 1)
    assert torch.equal(params[0], before)
    assert optimizer.state[params[0]]["step"] == 1


def test_8_bits_without_bitsandbytes_are_refused_at_construction(monkeypatch):
    for cached in (quantized._functional, quantized._codes):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"moment_bits=8: got no bitsandbytes.*pip install 'bitsandbytes>=0.50'"):
        AdamW(make_params(), moment_bits=8)
    train(AdamW(params := make_params()), params, 1)


def test_only_elementwise_entries_can_be_stored_in_8_bits():
    with pytest.raises(AssertionError):
        StateSpec(kind="row", shape=(3,), bits=8)
    assert StateSpec(kind="elementwise", shape=(300,), bits=8).num_bytes(torch.float32) == 300 + 2 * 4
    assert StateSpec(kind="elementwise", shape=(300,)).stored("x") == {"x": StateSpec(kind="elementwise", shape=(300,))}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_reads_no_tensor_on_the_host(name):
    params = make_params(torch.float32)
    optimizer = OPTIMIZERS[name](params, moment_bits=8)
    for step in range(2):
        set_grads(params, step)
        with NoHostSync():
            optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_non_contiguous_parameters_train_like_contiguous_ones(name):
    dense = make_params(torch.float32, [(8, 4, 3, 3)])
    strided = [nn.Parameter(dense[0].detach().clone().to(memory_format=torch.channels_last))]
    for params in (dense, strided):
        train(OPTIMIZERS[name](params, moment_bits=8), params, 3)
    assert not strided[0].is_contiguous()
    assert torch.equal(dense[0], strided[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_explain_counts_the_bytes_that_are_stored(name):
    params = make_params(torch.float32)
    optimizer = OPTIMIZERS[name](params, moment_bits=8)
    said = explain(optimizer).splitlines()[-1]
    train(optimizer, params, 1)
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    assert said == f"{len(SHAPES)} parameters, {held} bytes of states and masters on this rank"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_block_optimizer_trains_and_resumes_in_the_middle_of_a_block(name):
    def make(bits):
        model = block_net.Net(dtype=torch.bfloat16, width=20)
        base = OPTIMIZERS[name](model.parameters(), moment_bits=bits)
        return model, block_net.wrap(model, base, switch_block_every=3)

    model, optimizer = make(8)
    block_net.train(model, optimizer, 5)
    entries = [state["exp_avg"].dtype for state in optimizer.base_optimizer.state.values()]
    assert entries == [torch.uint8] * 2
    buffer = io.BytesIO()
    torch.save((optimizer.state_dict(), model.state_dict()), buffer)
    buffer.seek(0)
    snapshot, weights = torch.load(buffer, weights_only=True)
    resumed, other = make(8)
    resumed.load_state_dict(weights)
    other.load_state_dict(snapshot)
    for each in ((model, optimizer), (resumed, other)):
        block_net.train(*each, 6, start=5)
    assert all(map(torch.equal, block_net.weights(model), block_net.weights(resumed)))
    exact = make(32)
    block_net.train(*exact, 11)
    assert not all(map(torch.equal, block_net.weights(model), block_net.weights(exact[0])))


def local_part(layout, full):
    part = layout.shard(full)
    part.view(-1)[layout.num_local :] = float("nan")
    return part


def sharded_run(sizes, name):
    """On this rank, of every case: whether the moment stayed within its bound of the whole float64 tensor's for 8
    steps, a digest of its codes, and whether padding is still what it was."""
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    layouts = [case.layout(sizes, tp_rank, zero_rank) for case in CASES]
    whole = [nn.Parameter(initial(index).clone()) for index in range(len(CASES))]
    parts = [nn.Parameter(local_part(layout, full.detach())) for layout, full in zip(layouts, whole, strict=True)]
    one, other = OPTIMIZERS[name](whole), OPTIMIZERS[name](parts, moment_bits=8)
    other.bind(dict(zip(parts, layouts, strict=True)), mesh)
    bounds = [Within(layout.num_local) for layout in layouts]
    outside = set()
    for step in range(8):
        for index, layout in enumerate(layouts):
            grad = gradient(index, step)
            whole[index].grad = grad
            parts[index].grad = None if grad is None else local_part(layout, grad)
        one.step()
        other.step()
        for index, layout in enumerate(layouts):
            if whole[index].grad is None:
                continue
            codes, absmax = other.state[parts[index]]["exp_avg"], other.state[parts[index]]["exp_avg_absmax"]
            assert codes.shape == layout.local_shape
            expected = layout.shard(one.state[whole[index]]["exp_avg"]).view(-1)[: layout.num_local]
            if not bounds[index].holds(codes.view(-1)[: layout.num_local], absmax, expected):
                outside.add(f"{CASES[index]} at step {step}")
    kept = [
        bool(part.detach().view(-1)[layout.num_local :].isnan().all())
        for part, layout in zip(parts, layouts, strict=True)
    ]
    digests = [
        [sha256(other.state[part][key].numpy().tobytes()).hexdigest() for key in ("exp_avg", "exp_avg_absmax")]
        for part in parts
    ]
    return sorted(outside), digests, all(kept)


def sharded_runs(sizes):
    return {name: sharded_run(sizes, name) for name in OPTIMIZERS}


@pytest.mark.parametrize("sizes", [Sizes(2, 2), Sizes(1, 3)], ids=str)
def test_moments_on_meshes_stay_within_the_bound_and_replicas_are_equal(sizes):
    """Blocks begin with the slice, so meshes differ within the bound; replicas have the same slice."""
    ranks = run_ranks(sizes.tp * sizes.zero, sharded_runs, sizes)
    for rank, name in itertools.product(range(len(ranks)), OPTIMIZERS):
        outside, digests, padding_is_kept = ranks[rank][name]
        assert outside == [], f"{name} on rank {rank}"
        assert padding_is_kept
        replica = ranks[rank // sizes.tp * sizes.tp][name][1]
        for index, case in enumerate(CASES):
            assert case.dim is not None or digests[index] == replica[index], f"{name}: {case} on rank {rank}"


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
            params = [nn.Parameter(torch.ones(layout.local_shape)) for _ in range(count)]
            optimizer = OPTIMIZERS[name](params, moment_bits=8, wave_bytes=budget)
            optimizer.bind(dict.fromkeys(params, layout), mesh)
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            with PeakBytes() as measured:
                optimizer.step()
            peaks.append(measured.peak)
        found[name] = budget, *peaks
    return found


def test_wave_counts_the_float32_copies_of_moments():
    for budget, peak, alone in run_ranks(2, wave_peaks)[0].values():
        # Rows, columns and scalars of twelve rules, as for the other temporaries.
        assert peak <= budget + alone + 12 * 16 * 8 + 12 * 4 * (64 + 64) * 8
        assert peak >= budget
