"""The original package (badam, from PyPI) and a plain loop against BlockOptimizer: the same bits.

The original switches after K - 1 steps the first time and after K from then on.  `num_steps = 1` before the first step
gives BlockOptimizer that first period.
"""

import badam
import models
import plain_badam
import pytest
import torch

from colossal_bcd import BlockOptimizer

PERIOD = 3
BLOCKS = [
    ["model.embed_tokens."],
    ["model.layers.0."],
    ["model.layers.1.self_attn."],
    ["model.layers.1.mlp.", "model.layers.1.input_layernorm.", "model.norm."],
    ["lm_head."],
]


def base_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def train(model, optimizer, steps, scheduler=None, micro_batches=1):
    """Weights after every step."""
    history = []
    for step in range(steps):
        for micro in range(micro_batches):
            batch = models.tokens(step * micro_batches + micro)
            (model(input_ids=batch, labels=batch).loss / micro_batches).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        history.append([param.detach().clone() for param in model.parameters()])
    return history


def assert_same(ours, theirs):
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert all(map(torch.equal, mine, other)), f"step {step}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["ascending", "descending"])
def test_block_optimizer_equals_badam_bit_for_bit(dtype, mode):
    steps = PERIOD * len(BLOCKS) + 2
    histories = []
    for original in (True, False):
        model = models.llama().to(dtype)
        make = badam.BlockOptimizer if original else BlockOptimizer
        optimizer = make(
            base_optimizer(model),
            list(model.named_parameters()),
            block_prefix_list=BLOCKS,
            switch_block_every=PERIOD,
            switch_mode=mode,
        )
        if not original:
            optimizer.num_steps = 1
        histories.append(train(model, optimizer, steps))
    assert_same(histories[1], histories[0])
    start = models.llama().to(dtype).parameters()
    matrices = [(before, after) for before, after in zip(start, histories[1][-1], strict=True) if after.ndim == 2]
    assert not any(torch.equal(before, after) for before, after in matrices)


def test_block_optimizer_equals_badam_with_scheduler_and_accumulation():
    """On the wrapper, after wrapping: the one place where the original takes a scheduler."""
    histories = []
    for original in (True, False):
        model = models.llama().bfloat16()
        make = badam.BlockOptimizer if original else BlockOptimizer
        optimizer = make(
            base_optimizer(model),
            list(model.named_parameters()),
            block_prefix_list=BLOCKS,
            switch_block_every=PERIOD,
            switch_mode="ascending",
        )
        if not original:
            optimizer.num_steps = 1
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        histories.append(train(model, optimizer, 2 * PERIOD, scheduler, micro_batches=2))
    assert_same(histories[1], histories[0])


def test_block_optimizer_default_blocks_equal_those_of_badam_for_llama():
    model = models.llama(layers=3)
    theirs = badam.BlockOptimizer(base_optimizer(model), list(model.named_parameters())).block_prefix_list
    other = models.llama(layers=3)
    ours = BlockOptimizer(base_optimizer(other), other.named_parameters())
    assert [block.name + "." for block in ours.blocks] == [prefix for (prefix,) in theirs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["ascending", "descending", "random"])
def test_block_optimizer_equals_plain_loop_bit_for_bit(dtype, mode):
    """Every period has exactly K steps, for every precision; embedding and head have their blocks."""
    model, plain = models.llama().to(dtype), models.llama().to(dtype)
    optimizer = BlockOptimizer(
        base_optimizer(model),
        model.named_parameters(),
        switch_block_every=PERIOD,
        switch_mode=mode,
        include_embedding=True,
        include_lm_head=True,
        seed=3,
    )
    train(model, optimizer, 6 * PERIOD)
    order = [*optimizer.schedule.order(0, 0), *optimizer.schedule.order(0, 1)][:6]
    plain_badam.train(
        plain,
        ["model.embed_tokens.", "model.layers.0.", "model.layers.1.", "lm_head."],
        order,
        PERIOD,
        lambda step: [models.tokens(step)],
        lambda masters: torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.1),
        models.loss,
    )
    assert_same([list(model.parameters())], [list(plain.parameters())])
