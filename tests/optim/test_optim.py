"""The optimizers on one process: parity with torch and colossalai, dtypes, strides, and what a step touches."""

import copy

import pytest
import torch
from optim_cases import OPTIMIZERS, SHAPES, errors, make_params, set_grads, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from colossal_bcd import SGD, AdamW, Lamb
from colossal_bcd.optim import base, math, replaced
from colossal_bcd.optim.state import stack
from colossal_bcd.testing import PeakBytes


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ()], ids=["fused", "plain"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("hyper", [{}, {"betas": (0.5, 0.9), "eps": 1e-3, "lr": 0.1}], ids=["default", "other"])
def test_adamw_equals_torch_to_the_last_bits(monkeypatch, weight_decay, hyper, devices):
    monkeypatch.setattr(math, "FUSED_DEVICES", devices)
    ours, theirs = make_params(), make_params()
    one = train(AdamW(ours, weight_decay=weight_decay, **hyper), ours)
    other = train(torch.optim.AdamW(theirs, weight_decay=weight_decay, foreach=False, **hyper), theirs)
    # 2^-51 is one last bit of weights between 2 and 4, the largest of the table.
    assert max(errors(one, other)) <= 2**-51
    assert max(errors(one, make_params())) > 1e-3


def test_adamw_is_one_kernel_without_temporaries_in_each_group():
    params = make_params(torch.float32, [(6, 10)] * 20 + [(300,)] * 20)
    optimizer = AdamW([{"params": params[:25]}, {"params": params[25:], "lr": 0.5}])
    train(optimizer, params, num_steps=2)
    with Kernels() as kernels, PeakBytes() as peak:
        optimizer.step()
    assert kernels.names.count("_fused_adamw_") == 2
    assert peak.peak <= 64, "more than the number of the step"


def test_adamw_of_other_dtypes_or_orders_is_not_fused():
    for options, dtype, same in (
        ({"moment_bits": 32}, torch.float32, True),
        ({"order": "bitsandbytes"}, torch.float32, False),
        ({"correct_bias": False}, torch.float32, False),
        ({}, torch.bfloat16, False),
    ):
        params = make_params(dtype)
        optimizer = AdamW(params, **options)
        set_grads(params, 0)
        with Kernels() as kernels:
            optimizer.step()
        assert ("_fused_adamw_" in kernels.names) == same


def test_state_of_other_strides_goes_with_its_values():
    """torch's state lies as its channels_last weight does; the fused kernel took it by the order of memory."""
    make = lambda x: x.to(memory_format=torch.channels_last)  # noqa: E731
    params = [nn.Parameter(make(param.detach())) for param in make_params(shapes=[(8, 4, 3, 3)])]
    theirs = torch.optim.AdamW(params, lr=0.05, foreach=False)
    train(theirs, params, num_steps=3)
    others = [nn.Parameter(param.detach().clone()) for param in params]
    ours = AdamW(others, lr=0.05)
    saved = {name: int(value) if name == "step" else value for name, value in theirs.state[params[0]].items()}
    ours.load_state_dict({**ours.state_dict(), "state": {0: saved}})
    assert not ours.state[others[0]]["exp_avg"].is_contiguous()
    assert max(errors(train(ours, others, first=3), train(theirs, params, first=3))) <= 2**-51


def test_rule_of_a_subclass_is_not_replaced_by_the_fused_kernel():
    """A class that extended AdamW by a rule of its own was trained by torch's, without a word."""

    class Backwards(AdamW):
        def update(self, view, state, hyper):
            yield from view.subtract(view.grad, lr=-hyper.lr)

    params = make_params()
    before = [param.detach().clone() for param in params]
    train(Backwards(params, lr=0.5), params, num_steps=1)
    assert max(errors(params, [old + 0.5 * param.grad for old, param in zip(before, params, strict=True)])) == 0


def test_adamw_defaults_are_torchs():
    ours, theirs = AdamW(make_params()), torch.optim.AdamW(make_params())
    assert ours.defaults.items() <= theirs.defaults.items()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "hyper",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}],
    ids=["plain", "momentum", "dampening", "nesterov"],
)
def test_sgd_equals_torch_to_the_last_bits(weight_decay, hyper):
    """The decay shrank the weight after the step, under torch's names."""
    ours, theirs = make_params(), make_params()
    hyper = {"lr": 0.1, "weight_decay": weight_decay, **hyper}
    one = train(SGD(ours, **hyper), ours)
    other = train(torch.optim.SGD(theirs, foreach=False, **hyper), theirs)
    assert max(errors(one, other)) <= 2**-51
    assert max(errors(one, make_params())) > 1e-3


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("bias_correction", [False, "step_size"])
def test_lamb_equals_colossalais(bias_correction, weight_decay, adam):
    """Its True is our "step_size"; its class skips the ratio for a norm of zero as ours does."""
    optimizers = pytest.importorskip("colossalai.nn.optimizer.lamb")
    hyper = {"lr": 1e-2, "weight_decay": weight_decay, "adam": adam}
    ours, theirs = ([*make_params(torch.float32), nn.Parameter(torch.zeros(7))] for _ in range(2))
    one = train(Lamb(ours, bias_correction=bias_correction, **hyper), ours)
    other = train(optimizers.Lamb(theirs, bias_correction=bool(bias_correction), **hyper), theirs)
    # Six steps; each rounds the direction, its ratio and the weight a few times at 2^-24 of values below 4.
    assert max(errors(one, other)) <= 6 * 4 * 4 * 2**-24
    assert max(errors(one, [*make_params(torch.float32), torch.zeros(7)])) > 1e-2


def test_lamb_published_form_steps_by_lr_times_the_weight_norm():
    """With any direction, the first step moves by lr * |w|."""
    param = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    param.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
    Lamb([param], lr=0.1).step()
    moved = param.detach() - torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-14)


@pytest.mark.parametrize("hyper", [{}, {"adam": True}], ids=["ratio", "adam"])
@pytest.mark.parametrize(("weight", "grad"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_lamb_with_a_norm_of_zero_uses_a_ratio_of_one(hyper, weight, grad):
    param = nn.Parameter(torch.full((4,), weight, dtype=torch.float64))
    param.grad = torch.full((4,), grad, dtype=torch.float64)
    Lamb([param], lr=0.1, **hyper).step()
    expected = weight - 0.1 * grad / (grad + 1e-6)
    assert param.tolist() == pytest.approx([expected] * 4, rel=1e-12)


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_get_float32_state(optimizer_type, dtype):
    params = make_params(dtype)
    optimizer = optimizer_type(params, lr=1e-2)
    train(optimizer, params)
    for param in params:
        assert param.dtype == dtype
        assert {name: value.dtype for name, value in optimizer.state[param].items() if name != "step"} == {
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
        }


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_low_precision_step_is_the_float32_step_rounded(optimizer_type):
    """One step from the same values: a bf16 weight is the float32 result to the rounding of bf16."""
    half, single = make_params(torch.bfloat16), make_params(torch.bfloat16)
    single = [nn.Parameter(param.detach().float()) for param in single]
    set_grads(half, 0)
    for one, other in zip(single, half, strict=True):
        one.grad = other.grad.float()
    for params in (half, single):
        optimizer_type(params, lr=0.05, weight_decay=0.0).step()
    for one, other in zip(half, single, strict=True):
        # Half a unit in the last of 8 binary places.
        assert bool(((one.float() - other).abs() <= other.abs() * 2**-8 + 1e-30).all())


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
@pytest.mark.parametrize("make", [
    lambda x: x.to(memory_format=torch.channels_last),
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
], ids=["channels_last", "transposed"])  # fmt: skip
def test_non_contiguous_parameters_train_like_contiguous_ones(optimizer_type, make):
    dense = make_params(shapes=[(8, 4, 3, 3)])
    strided = [nn.Parameter(make(param.detach().clone())) for param in dense]
    before = strided[0].stride(), strided[0].data_ptr()
    assert not strided[0].is_contiguous()
    one = optimizer_type(dense, lr=0.05)
    other = optimizer_type(strided, lr=0.05)
    for step in range(6):
        for params in (dense, strided):
            set_grads(params, step)
        strided[0].grad = make(strided[0].grad) if step % 2 else strided[0].grad
        one.step()
        other.step()
    assert torch.equal(dense[0], strided[0])
    assert (strided[0].stride(), strided[0].data_ptr()) == before


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_step_evaluates_the_closure_with_gradients_and_returns_its_loss(optimizer_type):
    param = nn.Parameter(torch.ones(3))
    optimizer = optimizer_type([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 3
    assert param.grad.tolist() == [2, 2, 2]
    assert bool((param < 1).all())
    assert optimizer.step() is None


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_schedulers_change_the_step(optimizer_type):
    scheduled, by_hand = make_params(), make_params()
    optimizer, other = optimizer_type(scheduled, lr=0.1), optimizer_type(by_hand, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(4):
        train(optimizer, scheduled, 1, step)
        scheduler.step()
        other.param_groups[0]["lr"] = 0.1 * 0.5**step
        train(other, by_hand, 1, step)
    assert errors(scheduled, by_hand) == [0.0] * len(SHAPES)


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_groups_keep_their_own_hyper_parameters_and_foreign_keys(optimizer_type):
    params, alone = make_params(shapes=[(5,), (5,)]), make_params(shapes=[(5,), (5,)])
    groups = [{"params": params[:1], "lr": 0.5, "name": "first", "lr_mult": 2}, {"params": params[1:]}]
    optimizer = optimizer_type(groups, lr=0.1, weight_decay=0.3)
    train(optimizer, params)
    others = [
        optimizer_type([alone[0]], lr=0.5, weight_decay=0.3),
        optimizer_type([alone[1]], lr=0.1, weight_decay=0.3),
    ]
    for step in range(6):
        set_grads(alone, step)
        for other in others:
            other.step()
    assert errors(params, alone) == [0, 0]
    assert optimizer.param_groups[0]["name"] == "first"


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_parameters_without_a_gradient_are_left_alone(optimizer_type):
    params = make_params()
    optimizer = optimizer_type(params, lr=0.1)
    set_grads(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    train(optimizer, params, 1)
    assert (optimizer.state[params[0]]["step"], optimizer.state[params[1]]["step"]) == (2, 1)


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_changes_parameters_and_state_only(optimizer_type, dtype):
    params = make_params(dtype)
    optimizer = optimizer_type(params, lr=0.1)
    set_grads(params, 0)
    grads, addresses = [param.grad.clone() for param in params], [param.data_ptr() for param in params]
    objects = [param.grad for param in params]
    groups = copy.deepcopy([{**group, "params": None} for group in optimizer.param_groups])
    optimizer.step()
    for param, grad, address, same in zip(params, grads, addresses, objects, strict=True):
        assert param.grad is same
        assert torch.equal(param.grad, grad)
        assert param.data_ptr() == address
        assert param.requires_grad
    assert [{**group, "params": None} for group in optimizer.param_groups] == groups


class NoHostSync(TorchDispatchMode):
    """Fails on what reads a tensor's value on the host."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_host_sync_guard_trips():
    with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(1) > 0)
    with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(1).item()


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_step_reads_no_tensor_on_the_host(optimizer_type, dtype):
    params = make_params(dtype)
    optimizer = optimizer_type(params, lr=0.1, weight_decay=0.1)
    for step in range(2):
        set_grads(params, step)
        with NoHostSync():
            optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_step_does_not_wait_for_the_gpu(optimizer_type):
    params = make_params(torch.float32, device="cuda")
    optimizer = optimizer_type(params, lr=0.1, weight_decay=0.1)
    for step in range(2):
        set_grads(params, step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_step_on_the_gpu_equals_the_cpus(optimizer_type):
    params, others = make_params(device="cuda"), make_params()
    one, other = train(optimizer_type(params, lr=0.1), params), train(optimizer_type(others, lr=0.1), others)
    assert max(errors([weight.cpu() for weight in one], other)) <= 1e-12
    # A sum of ten million float32 squares: roundings at random in a row of 4096 values.
    many = [nn.Parameter(torch.full((10_000_000,), 0.1, device=device)) for device in ("cuda", "cpu")]
    for param in many:
        param.grad = torch.full_like(param, 0.3)
        optimizer_type([param], lr=0.1).step()
    assert (many[0].detach().cpu() - many[1].detach()).abs().max().item() <= 64 * 2**-24


def test_a_sharded_model_that_nobody_has_any_more_refuses_nothing(monkeypatch):
    """Until its garbage is collected, its modules are among the process's objects."""
    monkeypatch.setattr(replaced, "is_dtensor", lambda param: hasattr(param, "is_sharded"))
    model = nn.Linear(4, 4, bias=False)
    model.weight.is_sharded, model.cycle = True, [model]
    with pytest.raises(ValueError, match="in no module any more"):
        AdamW([nn.Parameter(torch.ones(4, 4))]).step()
    del model
    AdamW([nn.Parameter(torch.ones(4, 4))]).step()


@pytest.mark.parametrize("optimizer_type", [AdamW, Lamb])
@pytest.mark.parametrize("num_tensors", [1, 2, 5])
def test_step_needs_the_temporaries_of_one_stack_at_a_time(monkeypatch, optimizer_type, num_tensors):
    monkeypatch.setattr(base, "STACK_BYTES", num_tensors * stack.COPIES * 40_000)
    params = make_params(torch.float32, [(100, 100)] * 10)
    optimizer = optimizer_type(params, lr=0.1, weight_decay=0.1)
    train(optimizer, params, 1)
    set_grads(params, 1)
    with PeakBytes() as measured:
        optimizer.step()
    copies = stack.COPIES if num_tensors > 1 else 1
    # A sum of squares has one tensor of its parameter's size in float64.
    assert measured.peak <= num_tensors * copies * 40_000 + 80_000 + 1000
    assert measured.current <= 1000


def test_empty_parameters_train():
    empty = nn.Parameter(torch.zeros(0, 4))
    empty.grad = torch.zeros(0, 4)
    for optimizer_type in OPTIMIZERS:
        optimizer_type([empty], lr=0.1).step()
    assert empty.shape == (0, 4)
