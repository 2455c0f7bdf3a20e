"""State: its declaration, checkpoints, copies, and what `bind` keeps."""

import copy
import io

import pytest
import torch
from optim_cases import OPTIMIZERS, make_params, set_grads, train
from torch import nn

from colossal_bcd import AdamW, Lamb
from colossal_bcd.optim import StateSpec
from colossal_bcd.sharding import Layout, Mesh, TensorSplit


def saved_and_loaded(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_state_dict_round_trip_continues_bit_for_bit(optimizer_type, dtype):
    """torch casts loaded state to the parameter's dtype, which rounded the float32 moments of bf16 parameters."""
    straight = make_params(dtype)
    optimizer = optimizer_type(straight, lr=1e-2)
    train(optimizer, straight, 3)
    resumed = [nn.Parameter(param.detach().clone()) for param in straight]
    state_dict = saved_and_loaded(optimizer.state_dict())
    fresh = optimizer_type(resumed, lr=0.5)
    fresh.load_state_dict(state_dict)
    for param, other in zip(straight, resumed, strict=True):
        assert optimizer.state[param].keys() == fresh.state[other].keys()
        for name, value in optimizer.state[param].items():
            loaded = fresh.state[other][name]
            assert type(loaded) is type(value)
            assert name == "step" or (loaded.dtype == value.dtype and torch.equal(loaded, value)), name
    train(optimizer, straight, 3, first=3)
    train(fresh, resumed, 3, first=3)
    assert all(map(torch.equal, straight, resumed))


def test_load_state_dict_copies_and_runs_hooks():
    params = make_params(torch.bfloat16)
    optimizer = AdamW(params)
    train(optimizer, params, 1)
    state_dict = copy.deepcopy(optimizer.state_dict())

    def double(_, state_dict):
        state = {key: {**entry, "exp_avg": entry["exp_avg"] * 2} for key, entry in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other = AdamW(make_params(torch.bfloat16))
    other.register_load_state_dict_pre_hook(double)
    other.load_state_dict(state_dict)
    loaded = other.state[other.param_groups[0]["params"][0]]
    assert torch.equal(loaded["exp_avg"], state_dict["state"][0]["exp_avg"] * 2)
    assert loaded["exp_avg_sq"].data_ptr() != state_dict["state"][0]["exp_avg_sq"].data_ptr()
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


def test_load_state_dict_refuses_other_groups_and_leaves_no_hook():
    optimizer = AdamW(make_params())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(AdamW(make_params()[:2]).state_dict())
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_copy_trains_like_the_original():
    """torch's Optimizer copies its groups and state only, so a copy had no layouts and failed at its first step."""
    model = nn.Linear(3, 3).double()
    optimizer = Lamb(model.parameters(), lr=0.1)
    train(optimizer, list(model.parameters()), 2)
    other_model, other = copy.deepcopy((model, optimizer))
    one, two = (train(o, list(m.parameters()), 2, 2) for m, o in ((model, optimizer), (other_model, other)))
    assert all(map(torch.equal, one, two))


def test_copy_of_a_sharded_optimizer_has_to_be_bound():
    params = make_params(shapes=[(2, 3)])
    optimizer = Lamb(params)
    layout = Layout(shape=(4, 3), split=TensorSplit(axis="tp", dim=0, rank=0, size=2))
    optimizer.bind({params[0]: layout}, Mesh({"tp": ()}))
    train(optimizer, params, 1)
    (other_param,), other = copy.deepcopy((params, optimizer))
    set_grads([other_param], 1)
    with pytest.raises(ValueError, match="mesh axis 'tp' is in a layout but not in the mesh"):
        other.step()


def test_bind_drops_the_state_of_tensors_that_left_and_keeps_the_others():
    params = make_params(shapes=[(4,), (4,)])
    optimizer = AdamW(params)
    train(optimizer, params, 2)
    new = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer.param_groups[0]["params"] = [params[1], new]
    optimizer.bind({params[1]: Layout.whole((4,)), new: Layout.whole((4,))}, Mesh())
    assert list(optimizer.state) == [params[1]]
    train(optimizer, [params[1], new], 1)
    assert (optimizer.state[params[1]]["step"], optimizer.state[new]["step"]) == (3, 1)


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_state_is_what_the_declaration_says(optimizer_type):
    params = make_params(torch.bfloat16)
    optimizer = optimizer_type(params)
    train(optimizer, params, 1)
    for param in params:
        layout = Layout.whole(tuple(param.shape))
        specs = optimizer.state_spec(layout, optimizer.hyper_type())
        state = optimizer.state[param]
        assert set(state) == {"step", *specs}
        assert type(state["step"]) is int
        for name, spec in specs.items():
            assert tuple(state[name].shape) == spec.shape
            assert state[name].nbytes == spec.num_bytes(param.dtype)


def test_scalar_state_is_an_integer_without_bytes():
    spec = StateSpec(kind="scalar")
    assert spec.allocate(torch.zeros(3)) == 0
    assert spec.num_bytes(torch.float32) == 0
