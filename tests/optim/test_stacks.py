"""Parameters of equal layout are updated together, with the numbers and the memory of one at a time."""

import pytest
import torch
from optim_cases import errors, make_params, set_grads, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from colossal_bcd import CAME, Adafactor, AdamW, BlockOptimizer, GaLoreAdafactor, GaLoreAdamW, GaLoreSGD, Lamb
from colossal_bcd.optim import base
from colossal_bcd.optim.state import stack
from colossal_bcd.sharding import Layout, Mesh
from colossal_bcd.testing import storages

SHAPES = [(6, 10), (5,), (6, 10), (5,), (6, 10), (4, 3, 3), (6, 10), (6, 10)]
OPTIMIZERS = {
    # Debiased, it is torch's fused kernel that updates all at once.
    "adamw": lambda params, **kwargs: AdamW(params, lr=0.1, correct_bias=False, **kwargs),
    "lamb": lambda params, **kwargs: Lamb(params, lr=0.1, weight_decay=0.1, **kwargs),
    "adafactor": lambda params, **kwargs: Adafactor(params, beta1=0.9, **kwargs),
    "came": lambda params, **kwargs: CAME(params, lr=0.1, **kwargs),
}
PROJECTION = {"rank": 3, "svd_method": "random", "update_proj_gap": 5}
GALORE = {
    "galore-adamw": lambda params, **kwargs: GaLoreAdamW(params, lr=0.1, eps=1e-3, **PROJECTION, **kwargs),
    "galore-sgd": lambda params, **kwargs: GaLoreSGD(params, lr=0.1, momentum=0.9, **PROJECTION, **kwargs),
    "galore-adafactor": lambda params, **kwargs: GaLoreAdafactor(params, beta1=0.9, **PROJECTION, **kwargs),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def step_with_gaps(optimizer, params, step):
    """Every step other parameters have no gradient."""
    set_grads(params, step)
    for index, param in enumerate(params):
        if (index + step) % 4 == 0 and step:
            param.grad = None
    optimizer.step()


@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), *GALORE.values()], ids=[*OPTIMIZERS, *GALORE])
@pytest.mark.parametrize("gaps", [False, True])
def test_stacks_give_the_numbers_of_one_at_a_time(monkeypatch, make, gaps):
    results = []
    for size in (1, stack.STACK_BYTES):
        monkeypatch.setattr(base, "STACK_BYTES", size)
        params = make_params(shapes=SHAPES)
        optimizer = make([{"params": params[:6]}, {"params": params[6:], "weight_decay": 0.01}])
        for step in range(8):
            step_with_gaps(optimizer, params, step if gaps else 0)
        results.append(params)
    assert max(errors(*results)) <= 1e-12


@every_optimizer
def test_stochastic_rounding_draws_the_same_bits_in_a_stack(monkeypatch, make):
    results = []
    for size in (1, stack.STACK_BYTES):
        monkeypatch.setattr(base, "STACK_BYTES", size)
        params = make_params(torch.bfloat16, shapes=SHAPES)
        train(make(params, rounding="stochastic", seed=3), params, num_steps=1)
        results.append(params)
    # Float32 sums in another order may move a value past its random threshold now and then.
    different = sum((one != other).sum().item() for one, other in zip(*results, strict=True))
    assert different <= sum(param.numel() for param in params) // 100


@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), *GALORE.values()], ids=[*OPTIMIZERS, *GALORE])
def test_operations_of_a_step_do_not_grow_with_the_tensors(make):
    counts = []
    for num_tensors in (10, 40):
        params = make_params(shapes=[(6, 10)] * num_tensors)
        optimizer = make(params)
        train(optimizer, params, num_steps=2)
        set_grads(params, 2)
        with Operations() as operations:
            optimizer.step()
        counts.append(operations.count)
    # Two per tensor: its view in the stack and the view that is written back.
    assert counts[1] - counts[0] <= 4 * 30
    assert counts[0] < 150


@every_optimizer
def test_state_lies_in_common_storages_and_does_not_grow_with_gaps(make):
    params = make_params(shapes=SHAPES)
    optimizer = make(params)
    step_with_gaps(optimizer, params, 0)
    first = storages(dict(optimizer.state))
    matrices = [optimizer.state[param] for param in params if param.shape == (6, 10)]
    for name, entry in matrices[0].items():
        if isinstance(entry, torch.Tensor):
            assert len({state[name].untyped_storage().data_ptr() for state in matrices}) == 1
    for step in range(1, 8):
        step_with_gaps(optimizer, params, step)
    assert storages(dict(optimizer.state)) == first
    alone = make(make_params(shapes=SHAPES))
    train(alone, alone.param_groups[0]["params"], num_steps=1)
    assert sum(first.values()) == sum(storages(dict(alone.state)).values())


@every_optimizer
def test_loaded_state_moves_into_common_storages(make):
    params, others = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    one, other = make(params), make(others)
    train(one, params, num_steps=3)
    train(other, others, num_steps=3)
    other.load_state_dict(one.state_dict())
    entries = [
        tensor for state in other.state.values() for tensor in state.values() if isinstance(tensor, torch.Tensor)
    ]
    assert len(storages(entries)) == len(entries)
    train(one, params, num_steps=3, first=3)
    train(other, others, num_steps=3, first=3)
    entries = [
        tensor for state in other.state.values() for tensor in state.values() if isinstance(tensor, torch.Tensor)
    ]
    assert len(storages(entries)) < len(entries)
    assert all(map(torch.equal, params, others))


def test_tensors_beyond_the_size_of_a_stack_are_alone():
    large = [nn.Parameter(torch.zeros(stack.STACK_BYTES // 16 + 1)) for _ in range(2)]
    optimizer = AdamW(large)
    for param in large:
        param.grad = torch.ones_like(param)
    optimizer.step()
    entries = [optimizer.state[param]["exp_avg"].untyped_storage() for param in large]
    assert all(entry.nbytes() == large[0].numel() * 4 for entry in entries)


def test_state_that_is_dropped_is_freed_though_others_shared_its_storage():
    params = make_params(shapes=[(6, 10)] * 4)
    optimizer = AdamW(params, correct_bias=False)
    train(optimizer, params, num_steps=2)
    assert len(storages(dict(optimizer.state))) == 2
    moment = optimizer.state[params[3]]["exp_avg"].clone()
    optimizer.param_groups[0]["params"] = params[3:]
    optimizer.bind({params[3]: Layout.whole((6, 10))}, Mesh())
    assert sum(storages(dict(optimizer.state)).values()) == 2 * 60 * 8
    assert torch.equal(optimizer.state[params[3]]["exp_avg"], moment)


def test_state_of_an_earlier_block_is_freed_though_what_stays_active_shared_its_storage():
    model = nn.Sequential(*(nn.Linear(6, 10, bias=False) for _ in range(4)))
    base_optimizer = AdamW(model.parameters())
    optimizer = BlockOptimizer(
        base_optimizer,
        model.named_parameters(),
        [["0."], ["1."], ["2."]],
        active_modules=["3."],
        switch_block_every=2,
        switch_mode="ascending",
    )
    for step in range(3):
        set_grads(list(model.parameters()), step)
        optimizer.step()
        assert sum(storages(dict(base_optimizer.state)).values()) == (4 if step != 1 else 2) * 60 * 4
