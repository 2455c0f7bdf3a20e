"""The block part of colossal_bcd.compat: the calls of BAdam's and BREAD's documents with only the import changed."""

import models
import pytest
import torch
from block_net import Net, adamw, train

import colossal_bcd
from colossal_bcd.compat import BlockOptimizer, badam_partition


def names(model):
    return list(model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"switch_block_every": 100, "switch_mode": "random"},
        {"switch_block_every": 50, "switch_mode": "ascending", "verbose": 2},
        {"switch_block_every": 100, "switch_mode": "random", "verbose": 2, "ds_zero3_enabled": False},
    ],
)
def test_compat_block_optimizer_takes_the_documented_calls(options):
    model = models.llama()
    optimizer = BlockOptimizer(base_optimizer=adamw(model), named_parameters_list=names(model), **options)
    batch = models.tokens(0)
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    assert isinstance(optimizer, colossal_bcd.BlockOptimizer)


def test_compat_block_optimizer_takes_breads_call():
    model = Net()
    optimizer = BlockOptimizer(adamw(model), names(model), sgd_mode="all", sgd_lr_scaling=5.0, sgd_use_sign=False)
    before = model.lm_head.weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model.lm_head.weight, before)


def test_compat_block_optimizer_has_badams_order_of_arguments():
    model = Net()
    optimizer = BlockOptimizer(adamw(model), names(model), None, 7, 1, "fixed", ["norm"], True, True, 0, None, None)
    assert (optimizer.schedule.period, optimizer.schedule.start_block, optimizer.schedule.mode) == (7, 1, "fixed")
    assert optimizer.always_active == ("norm.weight", "norm.bias")
    assert len(optimizer.blocks) == 5


def test_compat_block_optimizer_takes_a_generator_and_misspelt_options_not():
    model = Net()
    BlockOptimizer(adamw(model), model.named_parameters())
    with pytest.raises(TypeError, match="switch_every"):
        BlockOptimizer(adamw(model), model.named_parameters(), switch_every=3)


def test_compat_log_fn_gets_every_line():
    model, lines = Net(), []
    optimizer = BlockOptimizer(adamw(model), names(model), switch_block_every=2, verbose=1, log_fn=lines.append)
    train(model, optimizer, 4)
    assert [line.split(":")[0] for line in lines if "is active" in line] == ["step 0", "step 2", "step 4"]
    with pytest.raises(TypeError, match="log_fn: got a int"):
        BlockOptimizer(adamw(Net()), names(model), log_fn=3)


def test_compat_refuses_parameters_of_deepspeed():
    partitioned = Net()
    partitioned.norm.weight.ds_id = 3
    with pytest.raises(ValueError, match=r"ZeRO-3 has partitioned.*LowLevelZeroPlugin.*HybridParallelPlugin"):
        BlockOptimizer(adamw(partitioned), names(partitioned))


def test_badam_partition_is_the_first_releases():
    """block 1: model.embed_tokens., one block a layer, last block: lm_head., model.norm."""
    model = models.llama(layers=3)
    blocks = badam_partition(model.named_parameters())
    assert blocks[0] == ["model.embed_tokens.weight"]
    assert sorted(blocks[-1]) == ["lm_head.weight", "model.norm.weight"]
    assert len(blocks) == 5
    assert sorted(name for block in blocks for name in block) == sorted(name for name, _ in model.named_parameters())
    optimizer = BlockOptimizer(adamw(model), names(model), badam_partition(names(model)), switch_mode="ascending")
    assert optimizer.active_names() == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_badam_partition_of_a_tied_model_and_of_frozen_parameters(remove_duplicate):
    model = models.llama(layers=2, tied=True)
    model.model.norm.requires_grad_(False)
    named = list(model.named_parameters(remove_duplicate=remove_duplicate))
    blocks = badam_partition(named)
    assert len(blocks) == 3
    BlockOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named, blocks)
