"""What rounding cuts off masters: every bit of it, in 16 or 8 bits, across switches, ranks and files."""

import copy
import io
from pathlib import Path

import pytest
import residual_cases as cases
import test_checkpoints
import torch
from block_net import Net, same, train, weights, wrap
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from colossal_bcd.block.residual import CHUNK, ResidualOptions, Residuals
from colossal_bcd.testing import run_ranks


def round_trip(master, dtype, bits, weight=None):
    """The master that the next turn begins with, and the weight in between."""
    param = Parameter(master.to(dtype) if weight is None else weight)
    residuals = Residuals(ResidualOptions(bits=bits))
    residuals.keep(param, master, param.detach())
    again = param.detach().float()
    residuals.give_back(param, again)
    assert not residuals.of
    return again, param.detach()


def anywhere(bound):
    """Floats of all magnitudes, many of them near powers of two and near half way between 16-bit numbers."""
    bits = st.builds(
        lambda sign, exponent, high, low: sign * (2.0**exponent * (1 + high / 2**7 + low / 2**23)),
        st.sampled_from([-1.0, 1.0]),
        st.integers(-140, 127),
        st.sampled_from([0, 1, 2, 63, 126, 127]) | st.integers(0, 127),
        st.sampled_from([0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1]) | st.integers(0, 2**16 - 1),
    )
    values = bits | st.floats(width=32, allow_nan=False, allow_infinity=False)
    return st.lists(values.filter(lambda value: abs(value) < bound), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(anywhere(3.38e38))
def test_residual_of_16_bits_gives_masters_of_bfloat16_weights_back_bit_for_bit(values):
    master = torch.tensor(values, dtype=torch.float32)
    again, weight = round_trip(master, torch.bfloat16, 16)
    moved = (again.view(torch.int32) - master.view(torch.int32)).abs()
    tie = master.view(torch.int32).bitwise_and(0xFFFF) == 0x8000
    assert (moved <= tie.int()).all()
    assert torch.equal(again.bfloat16(), weight)


@settings(max_examples=150, deadline=None)
@given(anywhere(65504.0))
def test_residual_of_16_bits_gives_masters_of_float16_weights_back_bit_for_bit(values):
    """Below 2^-14 float16 has steps of 2^-24; there 2^-37 remain."""
    master = torch.tensor(values, dtype=torch.float32)
    again, weight = round_trip(master, torch.float16, 16)
    tie = master.view(torch.int32).bitwise_and(0x1FFF) == 0x1000
    exact = (again.view(torch.int32) - master.view(torch.int32)).abs() <= tie.int()
    assert (exact | (weight.abs() <= 2.0**-14)).all()
    assert ((again - master).abs()[weight.abs() <= 2.0**-14] <= 2.0**-37).all()
    assert torch.equal(again.half(), weight)


@settings(max_examples=150, deadline=None)
@given(anywhere(65504.0), st.sampled_from([torch.bfloat16, torch.float16]))
@example([-1.501757829203143e-08], torch.float16)  # just beyond half a unit, on an ordinal that is there
def test_residual_of_8_bits_is_right_to_a_512th_of_the_last_place(values, dtype):
    master = torch.tensor(values, dtype=torch.float32)
    again, weight = round_trip(master, dtype, 8)
    size, near = master.abs().double(), weight.abs()
    # The step of the weights on the master's side: from the weight to its neighbour there.
    beyond = torch.nextafter(near, torch.where(size > near.double(), torch.inf, 0.0).to(dtype))
    step = (beyond.double() - near.double()).abs()
    error = (again.double() - master.double()).abs()
    half_way = (size - near.double()).abs() >= step * (127.5 / 256)
    # What comes back is a float32 number: half a step of these is lost where a weight's steps are small, too.
    assert (error <= step * torch.where(half_way, 2.0**-8, 2.0**-9) + size * 2.0**-24).all()
    assert torch.equal(again.to(dtype), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 16])
def test_residual_leaves_weights_alone_that_are_no_finite_numbers(dtype, bits):
    master = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max, 0.0, -0.0, 1.0])
    again, weight = round_trip(master, dtype, bits)
    assert torch.equal(again.nan_to_num(7.0), weight.float().nan_to_num(7.0))
    assert again[4:6].signbit().tolist() == [False, True]


@pytest.mark.parametrize("bits", [8, 16])
def test_residual_is_nothing_where_the_weight_was_written_from_outside(bits):
    """What lies between the old master and the new weight is no rounding error."""
    master = torch.tensor([1 + 2.0**-10, 1 + 2.0**-10])
    again, _ = round_trip(master, torch.bfloat16, bits, weight=torch.tensor([1.0, 3.0]).bfloat16())
    assert again.tolist() == [1 + 2.0**-10, 3.0]


def test_residual_counts_from_the_weight_of_its_next_turn():
    """A correction moves weights that wait: their masters are as far from them as before, in steps of the new ones."""
    master = torch.tensor([1 + 2.0**-10, 1 + 2.0**-10, 1 + 2.0**-10, 1 - 2.0**-10])
    param = Parameter(torch.ones(4).bfloat16())
    residuals = Residuals(ResidualOptions())
    residuals.keep(param, master, param.detach())
    moved = torch.tensor([2.0, -1.0, 0.0, 0.0]).bfloat16()
    again = moved.float()
    residuals.give_back(param, again)
    # An eighth of a step of bfloat16: half as wide between -1 and 0, 2^-133 at zero, of which nothing is below.
    assert again.tolist() == [2 + 2.0**-9, -1 + 2.0**-11, 2.0**-136, 0.0]
    assert torch.equal(again.bfloat16(), moved)


def test_residual_of_tensors_in_several_chunks_and_any_memory_order():
    master = torch.randn(3, CHUNK // 2, generator=torch.Generator().manual_seed(0)).T
    param = Parameter(master.to(torch.bfloat16))
    assert not param.is_contiguous()
    residuals = Residuals(ResidualOptions())
    residuals.keep(param, master, param.detach())
    again = param.detach().float()
    residuals.give_back(param, again)
    # Of 6 million values about 100 lie half way.
    assert (again != master).float().mean() < 2.0**-14
    assert (again - master).abs().max() <= 2.0**-22


TINY = {16: 2.0**-20, 8: 2.0**-15}
"""Largest power of two that is 2^-12 of bfloat16's step below 1, and one that is 2^-7 of it."""


@pytest.mark.parametrize(("residual", "bits"), [("drop", 16), ("keep", 16), ("keep", 8)])
@pytest.mark.parametrize("offload", [False, True])
def test_block_optimizer_keeps_updates_below_the_step_of_16_bit_weights(residual, bits, offload):
    """Two layers take turns of one step at weights of 1, where bfloat16 has steps of 2^-8 below: 64 rounds."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2))).to(torch.bfloat16)
    for param in model.parameters():
        torch.nn.init.ones_(param)
    base = torch.optim.SGD(model.parameters(), lr=TINY[bits])
    options = {} if residual == "drop" else {"residual_bits": bits, "residual_offload": offload}
    optimizer = wrap(model, base, switch_block_every=1, residual=residual, **options)
    for step in range(64):
        for param in model.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None
        optimizer.step()
        if step == 20:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    want = 1.0 if residual == "drop" else 1 - 32 * TINY[bits]
    held = [value.untyped_storage().nbytes() for value in optimizer.active_set.residuals.of.values()]
    assert sum(held) == (0 if residual == "drop" else 16 * bits // 8)
    for num_steps in (64, 65):
        optimizer.resume_at(num_steps)
        (master,) = optimizer.param_groups[0]["params"]
        assert (master == want).all()


@pytest.mark.parametrize("options", [{}, {"residual_bits": 8, "residual_offload": True}], ids=["16", "8-offload"])
def test_block_optimizer_state_has_residuals(options):
    """A run that goes on from a file ends with the same bits, with and without an active block in between."""
    ends = []
    for resumed in (False, True):
        model = Net(dtype=torch.bfloat16)
        optimizer = wrap(model, residual="keep", switch_mode="random", **options)
        train(model, optimizer, 7)
        if resumed:
            buffer = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
            model = Net(dtype=torch.bfloat16)
            optimizer = wrap(model, residual="keep", switch_mode="random", **options)
            optimizer.load_state_dict(saved["optimizer"])
            model.load_state_dict(saved["model"])
        train(model, optimizer, 8, start=7)
        ends.append(weights(model))
    assert same(*ends)
    other = wrap(Net(dtype=torch.bfloat16), residual="keep", switch_mode="random", residual_bits=16)
    if options:
        with pytest.raises(ValueError, match=r"residual \['keep', 8\], expected \['keep', 16\]"):
            other.load_state_dict(saved["optimizer"])


@pytest.mark.parametrize(
    ("num_ranks", "plugin", "options"),
    [
        (2, {"stage": 2}, {}),
        (2, {"tp_size": 1, "pp_size": 1, "zero_stage": 0}, {"residual_bits": 8, "residual_offload": True}),
    ],
    ids=["zero2", "dp-8-offload"],
)
def test_residual_under_plugins_is_that_of_one_process(num_ranks, plugin, options):
    want = cases.weights(None, **options)
    assert not same(want, cases.weights(None, residual="drop"))
    for found in run_ranks(num_ranks, cases.weights_each, plugin, options):
        assert same(found, want)


def test_residuals_go_through_checkpoints_to_any_mesh(tmp_path):
    """Of 8 bits and on the CPU: bit for bit on the same mesh, and the same values in the file of another one."""
    folder, again = str(tmp_path / "saved"), str(tmp_path / "again")
    straight = run_ranks(2, cases.train_and_save, "zero2 x2", folder)
    assert run_ranks(2, cases.resume, "zero2 x2", folder) == straight
    losses = run_ranks(2, cases.resume, "tp2", folder, again)
    assert losses[0] == pytest.approx(straight[0], abs=test_checkpoints.TOLERANCE)
    before, after = (test_checkpoints.tensors_of(Path(name, "optimizer")) for name in (folder, again))
    residuals = {name: tensor for name, tensor in before[0].items() if name.endswith(".residual.value")}
    assert len(residuals) == 9
    assert all(tensor.dtype == torch.int8 and tensor.any() for tensor in residuals.values())
    test_checkpoints.compare("residuals", before, after)
