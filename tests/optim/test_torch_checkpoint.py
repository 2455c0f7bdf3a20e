"""torch.distributed.checkpoint.state_dict: a round trip of plain optimizers, a refusal of what it would lose."""

import copy

import pytest
import torch
from test_accepted import CLASSES
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.utils._pytree import tree_flatten

from colossal_bcd import BlockOptimizer, BlockOptimizerRatio


def net(seed, dtype):
    torch.manual_seed(seed)
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5)])}).to(dtype)


def make(name, model):
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() < 2]
    options = {"lr": 1e-2} | ({"relative_step": False} if "Adafactor" in name else {})
    options |= {"total_steps": 9} if name.startswith("GoLore") else {}
    projection = {"rank": 2, "update_proj_gap": 3} if "Lore" in name else {}
    return CLASSES[name]([{"params": matrices, **projection}, {"params": vectors, "lr": 3e-2}], **options)


def advance(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "BlockOptimizerRatio"])
def test_plain_optimizers_make_the_round_trip(name, dtype):
    model = net(0, dtype)
    optimizer = make(name, model)
    advance(model, optimizer, range(4))
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    twin = net(1, dtype)
    resumed = make(name, twin)
    set_state_dict(twin, resumed, model_state_dict=weights, optim_state_dict=state)
    for each in ((model, optimizer), (twin, resumed)):
        advance(*each, range(4, 9))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def blocks(dtype):
    model = net(0, dtype)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, BlockOptimizer(base, list(model.named_parameters()), switch_block_every=2, verbose=0)


def ratio(dtype):
    model = net(0, dtype)
    groups = [{"params": list(model.parameters())}]
    return model, BlockOptimizerRatio(groups, list(model.named_parameters()), 0.5, verbose=0, switch_every=2)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [blocks, ratio], ids=["BlockOptimizer", "BlockOptimizerRatio"])
def test_blocks_are_refused_before_anything_changes(build, dtype, num_steps):
    """After a switch, where there is no state yet, it took a step; "block" was dropped, and that was said when the run
    was loaded."""
    model, optimizer = build(dtype)
    for step in range(num_steps):
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.full_like(param, 1.0 + step)
                if build is ratio:
                    optimizer._keep_selected(param)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    for call in (
        lambda: get_optimizer_state_dict(model, optimizer),
        lambda: get_state_dict(model, optimizer),
        lambda: set_optimizer_state_dict(model, optimizer, {"state": {}, "param_groups": []}),
    ):
        with pytest.raises(ValueError, match=rf"{type(optimizer).__name__}: .*torch\.save\(optimizer\.state_dict\(\)"):
            call()
    (ours, kinds), (theirs, before_kinds) = map(tree_flatten, ((optimizer.state_dict(), model.state_dict()), before))
    assert kinds == before_kinds
    for now, then in zip(ours, theirs, strict=True):
        assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then
    assert all(param.grad is None for param in model.parameters())
