"""state_dict and load_state_dict of the BlockOptimizer: exact in the middle of a block, or refused."""

import copy
import io
import types

import pytest
import torch
from block_net import Net, adamw, held, same, train, trainable, weights, wrap
from torch.optim.lr_scheduler import StepLR

import colossal_bcd


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "make", [adamw, lambda model: colossal_bcd.Lamb(model.parameters(), lr=0.01)], ids=["adamw", "lamb"]
)
@pytest.mark.parametrize("steps", [0, 1, 5, 9], ids="step{}".format)
def test_block_optimizer_resumes_bit_for_bit(dtype, make, steps):
    """The original's state has no step, block, order or masters, and loads into another block silently."""
    options = {"switch_block_every": 4, "switch_mode": "random", "active_modules": ["lm_head"]}
    model = Net(dtype=dtype)
    optimizer = wrap(model, make(model), **options)
    train(model, optimizer, steps)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 8, start=steps)

    other = Net(dtype=dtype)
    resumed = wrap(other, make(other), **options)
    resumed.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["model"])
    assert resumed.num_steps == steps
    train(other, resumed, 8, start=steps)
    assert same(weights(other), weights(model))
    assert same(held(resumed), held(optimizer))
    assert trainable(other) == trainable(model)


@pytest.mark.parametrize("model_first", [True, False])
def test_block_optimizer_state_has_the_masters_whatever_is_loaded_first(model_first):
    model, other = Net(dtype=torch.bfloat16), Net(dtype=torch.bfloat16)
    optimizer, resumed = wrap(model, switch_block_every=9), wrap(other, switch_block_every=9)
    train(model, optimizer, 3)
    weights_state, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    if model_first:
        other.load_state_dict(weights_state)
    resumed.load_state_dict(state)
    if not model_first:
        other.load_state_dict(weights_state)
    assert not torch.equal(held(resumed)[0], other.layers[0].weight.float())
    train(model, optimizer, 3, start=3)
    train(other, resumed, 3, start=3)
    assert same(held(resumed), held(optimizer))


def test_block_optimizer_load_shares_no_memory_with_the_state():
    model, other = Net(dtype=torch.bfloat16), Net(dtype=torch.bfloat16)
    optimizer, resumed = wrap(model, switch_block_every=9), wrap(other, switch_block_every=9)
    train(model, optimizer, 2)
    resumed.load_state_dict(optimizer.state_dict())
    expected = copy.deepcopy(resumed.state_dict())
    train(model, optimizer, 2)
    found = resumed.state_dict()
    assert same(found["block"]["masters"].values(), expected["block"]["masters"].values())
    assert all(same(found["state"][i].values(), expected["state"][i].values()) for i in expected["state"])


def test_block_optimizer_load_keeps_group_dicts_and_schedulers():
    model = Net()
    base = adamw(model)
    scheduler = StepLR(base, 1, gamma=0.5)
    optimizer = wrap(model, base)
    group = optimizer.param_groups[0]
    train(model, optimizer, 1)
    scheduler.step()
    saved = copy.deepcopy(optimizer.state_dict())
    scheduler.step()
    assert group["lr"] == 0.0025
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.param_groups[0] is group
    assert optimizer.state is base.state
    assert group["lr"] == 0.005
    scheduler.step()
    assert group["lr"] == 0.0025


def assert_refused(optimizer, model, state, message):
    before = copy.deepcopy((optimizer.state_dict(), weights(model), trainable(model)))
    tensors = held(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = (optimizer.state_dict(), weights(model), trainable(model))
    assert repr(after) == repr(before)
    assert all(ours is theirs for ours, theirs in zip(held(optimizer), tensors, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include_lm_head": True}, r"got a state of blocks \['layers.0', .* 'head'\], expected \['layers.0',"),
        ({"block_prefix_list": [["layers.0"], ["layers.1"], ["layers.2.weight"]]}, "got a state of blocks"),
        ({"block_prefix_list": ["layers.0", "layers.1", "layers.2"], "active_modules": ["norm"]}, "always_active"),
        ({"switch_block_every": 7}, "switch_block_every 7, expected 2"),
        ({"switch_mode": "descending"}, "switch_mode 'descending', expected 'ascending'"),
        ({"seed": 1}, "seed 1, expected 0"),
        ({"block_ranges": [(0, 2), (2, 3)]}, r"block_ranges \[\[0, 2\], \[2, 3\]\], expected \[\[0, 3\]\]"),
        ({"start_block": 1}, "start_block 1, expected None"),
    ],
)
def test_block_optimizer_refuses_the_state_of_another_schedule_and_changes_nothing(options, message):
    model, other = Net(dtype=torch.bfloat16), Net(dtype=torch.bfloat16)
    optimizer = wrap(model)
    train(model, optimizer, 3)
    theirs = wrap(other, **options)
    train(other, theirs, 5)
    assert_refused(optimizer, model, copy.deepcopy(theirs.state_dict()), message)


def test_block_optimizer_refuses_blocks_of_the_same_names_and_other_parameters():
    model, other = Net(), Net()
    other.layers[2].bias.requires_grad_(False)
    assert_refused(wrap(model), model, wrap(other).state_dict(), "with other parameters")


def test_block_optimizer_refuses_the_state_of_other_groups():
    model, other = Net(), Net()
    optimizer = wrap(model)
    two = [{"params": list(other.layers.parameters())}, {"params": list(other.norm.parameters())}]
    assert_refused(optimizer, model, wrap(other, torch.optim.AdamW(two)).state_dict(), "got a state of 2 param groups")
    third = Net()
    turned = torch.optim.AdamW(reversed(list(third.parameters())))
    message = r"got a state with \['layers.0.bias', 'layers.0.weight'\] active in param group 0"
    assert_refused(optimizer, model, wrap(third, turned).state_dict(), message)


def test_block_optimizer_refuses_the_state_of_another_precision():
    model, other = Net(), Net(dtype=torch.bfloat16)
    message = r"float32 master of shape \(4,\) for parameter 'layers.0.bias', expected None"
    assert_refused(wrap(model), model, wrap(other).state_dict(), message)


def test_block_optimizer_refuses_the_state_of_a_plain_optimizer():
    model = Net()
    state = adamw(Net()).state_dict()
    assert_refused(wrap(model), model, state, "got a state with 'state', 'param_groups', expected also 'block'")


def test_block_optimizer_state_is_the_boosters_under_an_engine():
    class Engine:
        masters = types.SimpleNamespace(make_master=lambda param: param.detach(), weight_of=lambda param: param)

        def release(self):
            pass

        def adopt(self, groups):
            pass

    optimizer = wrap(Net())
    optimizer.attach(Engine())
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(ValueError, match="an engine holds the masters"):
            call()


def test_block_optimizer_state_reads_like_that_of_a_torch_optimizer():
    model = Net()
    optimizer = wrap(model)
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "block"}
    assert state["param_groups"][0]["params"] == [0, 1]
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
