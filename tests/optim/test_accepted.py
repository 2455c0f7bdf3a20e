"""Parameters and keys of param groups that every optimizer takes or refuses by name."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn

import colossal_bcd
from colossal_bcd import BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.optim import ShardedOptimizer

CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(colossal_bcd, inspect.isclass)
    if issubclass(cls, ShardedOptimizer) and hasattr(cls, "hyper_type")
}


def make(name, params, /, **group):
    """An optimizer over one group; GaLore's have a matrix of their own to project."""
    cls = CLASSES[name]
    group = {"params": params, **group}
    if cls is BlockOptimizerRatio:
        named = [(f"layers.0.{index}", param) for index, param in enumerate(params)]
        return cls([group], named, 1.0, lr=1e-2, verbose=0)
    options = {"lr": 1e-2}
    if "Adafactor" in name:
        options["relative_step"] = False
    if name.startswith("GoLore"):
        options["total_steps"] = 10
    if "Lore" in name:
        # Of no shape that a sharded model of another test has, whose parameter this one would be taken for.
        return cls([group, {"params": [nn.Parameter(torch.ones(11, 13))], "rank": 2}], **options)
    return cls([group], **options)


UNTRAINABLE = [torch.complex64, torch.complex128, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", UNTRAINABLE, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_parameters_that_cannot_be_trained_are_refused_by_name(name, dtype):
    """AdamW trained the real part of complex parameters."""
    bad = nn.Parameter(torch.ones(3, 4).to(dtype))
    remedy = "view_as_real" if dtype.is_complex else "freeze"
    with pytest.raises(ValueError, match=rf"{name}: parameter number 1 of shape \(3, 4\) is {dtype}.*{remedy}"):
        make(name, [nn.Parameter(torch.ones(3, 4)), bad])
    with pytest.raises(ValueError, match=r"parameter layers\.0\.up of shape"):
        make(name, [bad], param_names=["layers.0.up"])
    optimizer = make(name, [nn.Parameter(torch.ones(3, 4))])
    if name != "BlockOptimizerRatio":
        with pytest.raises(ValueError, match="number"):
            optimizer.add_param_group({"params": [bad]})
        assert all(bad is not param for group in optimizer.param_groups for param in group["params"])
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_frozen_parameters_may_be_of_any_dtype(name, dtype):
    """Packed weights of 4-bit models are in the groups, too."""
    frozen = nn.Parameter(torch.ones(3, 4).to(dtype), requires_grad=False)
    before, trained = frozen.detach().clone(), nn.Parameter(torch.ones(3, 4))
    optimizer = make(name, [frozen, trained])
    trained.grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("name", CLASSES)
def test_a_complex_parameter_that_thaws_is_refused(name):
    frozen = nn.Parameter(torch.ones(3, 4, dtype=torch.complex64), requires_grad=False)
    optimizer = make(name, [frozen, nn.Parameter(torch.ones(3, 4))])
    frozen.requires_grad_()
    frozen.grad = torch.ones(3, 4, dtype=torch.complex64)
    with pytest.raises(ValueError, match="complex64"):
        optimizer.step()


def test_blocks_of_torchs_adam_train_complex_parameters():
    def net():
        layers = nn.ModuleList([nn.ParameterList([nn.Parameter(torch.full((2, 3), 1 + 2j))]) for _ in range(2)])
        return nn.ModuleDict({"layers": layers})

    blocks, plain = net(), net()
    wrapped = BlockOptimizer(
        torch.optim.AdamW(blocks.parameters(), lr=0.1), list(blocks.named_parameters()), switch_block_every=1,
        switch_mode="ascending", verbose=0,
    )  # fmt: skip
    for layer in range(2):
        optimizer = torch.optim.AdamW(plain["layers"][layer].parameters(), lr=0.1)
        for model in (blocks, plain):
            model["layers"][layer][0].grad = torch.full((2, 3), 3 - 1j)
        wrapped.step()
        optimizer.step()
    for ours, theirs in zip(blocks.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.imag.ne(2).all()


LAYOUTS = {
    "channels_last": lambda: torch.arange(48.0).view(2, 4, 3, 2).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.arange(24.0).view(4, 6).T,
    "strided": lambda: torch.arange(48.0).view(4, 12)[:, ::2],
    "scalar": lambda: torch.tensor(2.0),
    "empty": lambda: torch.zeros(0, 4),
    "empty columns": lambda: torch.zeros(4, 0),
    "double": lambda: torch.arange(24.0, dtype=torch.float64).view(4, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CLASSES)
def test_strides_do_not_change_the_numbers(name, layout):
    start = LAYOUTS[layout]() / 7 + 1
    params = [nn.Parameter(start.clone(memory_format=torch.preserve_format)), nn.Parameter(start.clone().contiguous())]
    optimizers = [make(name, [param]) for param in params]
    for step in range(3):
        for param, optimizer in zip(params, optimizers, strict=True):
            grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(step), dtype=start.dtype)
            param.grad = torch.empty_like(param).copy_(grad)
            optimizer.step()
    assert params[0].stride() == start.clone(memory_format=torch.preserve_format).stride()
    torch.testing.assert_close(params[0].detach(), params[1].detach().view(start.shape), rtol=0, atol=0)
    assert params[0].isfinite().all()
    assert start.numel() == 0 or not torch.equal(params[0].detach(), start)


@pytest.mark.parametrize("name", CLASSES)
def test_expanded_parameters_raise(name):
    """Their values share memory: torch's in-place operations refuse them, too."""
    param = nn.Parameter(torch.ones(1, 4).expand(3, 4))
    optimizer = make(name, [param])
    param.grad = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        optimizer.step()


@pytest.mark.parametrize("name", CLASSES)
def test_misspelt_keys_are_refused_with_the_right_ones(name):
    """`rnak` and `r` were kept as keys of the user, and nothing was projected."""
    build = partial(make, name, [nn.Parameter(torch.ones(4, 4))])
    typos = {"weight_dekay": "weight_decay", "wd": "weight_decay", "learning_rate": "lr"}
    if "Lore" in name:
        typos |= {"rnak": "rank", "r": "rank", "ranks": "rank", "update_gap": "update_proj_gap", "scal": "scale"}
    for key, meant in typos.items():
        if meant in CLASSES[name].hyper_keys():
            with pytest.raises(ValueError, match=rf"{name} param group has '{key}', .*did you mean '{meant}'\?"):
                build(**{key: 1e-3})


@pytest.mark.parametrize("name", CLASSES)
def test_keys_of_the_user_stay(name):
    """Those that libraries put into groups: timm, peft, schedulers, users."""
    keys = ("name", "lr_scale", "initial_lr", "max_lr", "min_lr", "layer_name", "group_name", "note", "lr_mult", "tag")
    optimizer = make(name, [nn.Parameter(torch.ones(4, 4))], **dict.fromkeys(keys, 1.0))
    assert all(optimizer.param_groups[0][key] == 1.0 for key in keys)
