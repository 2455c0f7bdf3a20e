"""What a user's type checker sees; `tests/test_types.py` compares it with the comments."""

from typing import Any, reveal_type

import torch
from torch import nn

from colossal_bcd import SGD, AdamW, BlockOptimizer, GaLoreAdamW, Lamb, Lion, estimate
from colossal_bcd.booster import LowLevelZeroPlugin, explain
from colossal_bcd.optim import ShardedOptimizer

model = nn.Linear(4, 2)
optimizer = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
reveal_type(optimizer)  # AdamW
reveal_type(optimizer.hyper_of(optimizer.param_groups[0]))  # AdamWHyper
reveal_type(optimizer.layout_of(model.weight))  # Layout
reveal_type(optimizer.key_of(model.weight))  # int
reveal_type(GaLoreAdamW)  # GaLoreAdamW
reveal_type(SGD(model.parameters()))  # SGD
reveal_type(Lion(model.parameters()))  # Lion
reveal_type(estimate(optimizer).peak)  # int

blocks = BlockOptimizer(
    base_optimizer=torch.optim.AdamW(model.parameters()),
    named_parameters_list=list(model.named_parameters()),
    switch_block_every=10,
)
reveal_type(blocks)  # BlockOptimizer
plugin = LowLevelZeroPlugin(stage=2, precision="bf16")
reveal_type(plugin)  # LowLevelZeroPlugin
reveal_type(explain(optimizer))  # str


def rate_of(trained: ShardedOptimizer[Any]) -> float:
    rate: float = trained.param_groups[0]["lr"]
    return rate


rate_of(Lamb(model.parameters()))
rate_of("adamw")  # error: arg-type
AdamW(model.parameters(), 1e-3, wave_bytes="8")  # error: arg-type
BlockOptimizer(base_optimizer=optimizer, switch_every=10)  # error: call-arg
