"""Copies of a BlockOptimizer go on as the original does, with their own model, or are refused at once."""

import copy
import pickle

import bitsandbytes.optim
import pytest
import pytorch_optimizer
import torch
from block_net import Net, adamw, held, same, train, trainable, weights, wrap

import colossal_bcd
from colossal_bcd.block import MomentumCorrection

BASES = {
    "adamw": adamw,
    "lamb": lambda model: colossal_bcd.Lamb(model.parameters(), lr=0.01),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01),
    "counts in its groups": lambda model: pytorch_optimizer.AdaBelief(model.parameters(), lr=0.01),
    "has attributes": lambda model: bitsandbytes.optim.AdamW8bit(model.parameters(), lr=0.01),
}
OPTIONS = {
    "plain": {},
    "kept": {"active_modules": ["lm_head."]},
    "corrected": {"sgd_mode": "all", "correction": MomentumCorrection()},
    "residuals": {"residual": "keep"},
    "importance": {"switch_mode": "importance"},
}
CASES = [("adamw", options) for options in OPTIONS] + [(base, "plain") for base in BASES]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("base", "options"), CASES, ids=" ".join)
def test_copy_of_model_and_optimizer_goes_on_apart_from_them(dtype, base, options):
    """A copy by itself raised AttributeError 'attached' at its next use."""
    model = Net(dtype=dtype)
    optimizer = wrap(model, BASES[base](model), **OPTIONS[options])
    train(model, optimizer, 3)
    twin, theirs = copy.deepcopy((model, optimizer))
    assert theirs.base_optimizer.param_groups is theirs.param_groups
    assert not {id(param) for param in model.parameters()} & {id(p) for p in theirs.named_parameters.values()}
    before, ours = weights(twin), weights(model)
    train(model, optimizer, 4, start=3)
    assert same(weights(twin), before), "the original moved the copy"
    went = weights(model)
    train(twin, theirs, 4, start=3)
    assert same(weights(model), went), "the copy moved the original"
    assert not same(went, ours)
    assert same(weights(twin), went)
    assert same(held(theirs), held(optimizer))
    assert trainable(twin) == trainable(model)


def test_copy_of_a_model_remembers_who_froze_what():
    model = Net()
    twin, _ = copy.deepcopy((model, wrap(model)))
    assert len(wrap(twin).blocks) == len(wrap(model).blocks)


def test_copy_leaves_hooks_and_schedulers_of_the_original():
    model = Net()
    optimizer = wrap(model)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    twin, theirs = copy.deepcopy((model, optimizer))
    train(twin, theirs, 1)
    assert seen == []
    assert optimizer.num_steps == 0


@pytest.mark.parametrize("together", [lambda m, o: o, lambda m, o: (o, m)], ids=["alone", "before its model"])
def test_copy_without_the_model_is_refused(together):
    model = Net()
    with pytest.raises(ValueError, match=r"without its model.* copy.deepcopy\(\(model, optimizer\)\)"):
        copy.deepcopy(together(model, wrap(model)))


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy], ids=["pickle", "copy"])
def test_pickle_and_shallow_copy_are_refused(copied):
    model = Net()
    with pytest.raises(TypeError, match=r"cannot be pickled or copied by itself.*state_dict"):
        copied(wrap(model))


@pytest.mark.parametrize("base", [adamw, BASES["lamb"]], ids=["torch", "ours"])
@pytest.mark.parametrize("whose", ["base_optimizer", None])
def test_load_state_dict_mends_a_state_that_was_overwritten(whose, base):
    """torch's tests assign a list to `state` before they load; the base's made it an AttributeError."""
    model, other = Net(), Net()
    optimizer, resumed = wrap(model, base(model)), wrap(other, base(other))
    train(model, optimizer, 3)
    (resumed if whose is None else resumed.base_optimizer).state = []
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state is resumed.base_optimizer.state
    other.load_state_dict(model.state_dict())
    train(model, optimizer, 3, start=3)
    train(other, resumed, 3, start=3)
    assert same(weights(other), weights(model))
