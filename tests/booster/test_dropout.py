"""Dropout under tensor parallelism: one mask where ranks have the same values, others where they have parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.shardformer.layer import DropoutForParallelInput, DropoutForReplicatedInput
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from colossal_bcd.booster import HybridParallelPlugin
from colossal_bcd.testing import run_ranks

OPTIONS: dict[str, Any] = {"tp_size": 2, "pp_size": 1, "zero_stage": 0, "precision": "fp32", "max_norm": 0.0}
OF_PARTS = {
    "bert": {"attention.self.dropout"},
    "gpt2": {"attn.attn_dropout"},
    "t5": {"DenseReluDense.dropout"},
}
"""Ends of the names of what has heads or columns of a rank."""


def build(kind: str, hidden: float = 0.5, attention: float = 0.5) -> Any:
    torch.manual_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(
            BertConfig(
                num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=128,
                max_position_embeddings=32, hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention,
            )
        )  # fmt: skip
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=128, n_positions=32))
    return T5ForConditionalGeneration(
        T5Config(num_layers=2, d_model=32, d_kv=8, d_ff=64, num_heads=4, vocab_size=128, tie_word_embeddings=False)
    )


def masks(kind: str) -> dict[str, list[bool]]:
    """What the dropouts that ColossalAI knows draw for 200 values, by name; ranks are seeded apart."""
    model = build(kind)
    torch.manual_seed(7 * dist.get_rank())
    model, *_ = Booster(plugin=HybridParallelPlugin(**OPTIONS)).boost(model)
    known = (DropoutForParallelInput, DropoutForReplicatedInput)
    found = {name: module for name, module in model.unwrap().named_modules() if isinstance(module, known)}
    for module in found.values():
        module.p = 0.5
    return {name: (module(torch.ones(200)) > 0).tolist() for name, module in found.items()}


@pytest.mark.parametrize("kind", OF_PARTS)
def test_ranks_draw_one_mask_where_they_have_the_same_values(kind: str) -> None:
    first, second = run_ranks(2, masks, kind)
    differ = {name for name in first if first[name] != second[name]}
    assert len(first) >= 7
    assert differ == {name for name in first if name.endswith(tuple(OF_PARTS[kind]))}
    assert differ
    assert len({tuple(mask) for mask in first.values()}) == len(first)


def trained() -> tuple[float, dict[str, Any]]:
    """Loss of the last of three steps and LayerNorms after it."""
    model = build("bert", hidden=0.1, attention=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    booster = Booster(plugin=HybridParallelPlugin(**OPTIONS))
    model, engine, *_ = booster.boost(model, optimizer)
    ids = torch.arange(16).view(1, 16)
    for _ in range(3):
        loss = model(input_ids=ids, labels=torch.tensor([1]), attention_mask=torch.ones_like(ids)).loss
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
    norms = {name: param for name, param in model.unwrap().named_parameters() if "LayerNorm" in name}
    assert dist.get_world_size() == 2
    return loss.item(), {name: param.detach().numpy() for name, param in norms.items()}


def test_weights_that_all_ranks_have_stay_equal_with_dropout() -> None:
    (loss, norms), (other_loss, other_norms) = run_ranks(2, trained)
    assert loss == other_loss
    assert len(norms) == 10
    for name, values in norms.items():
        assert (values == other_norms[name]).all(), name
