"""Gradient checkpointing of every kind trains what no checkpointing trains, to the bit."""

from __future__ import annotations

import functools

import graph_cases
import pytest
import torch

WAYS = ("reentrant", "sequential", "nested", "wrapper", "hf_before", "hf_after")


@functools.cache
def unchecked(optimizer: str, llama: bool) -> list[torch.Tensor]:
    """Weights after training without checkpointing."""
    model, made = graph_cases.prepared(optimizer, "hf" if llama else "none")
    graph_cases.train(model, made)
    return graph_cases.weights(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", graph_cases.OPTIMIZERS)
def test_checkpointing_trains_the_same_weights(optimizer: str, way: str) -> None:
    model, made = graph_cases.prepared(optimizer, way)
    before = graph_cases.weights(model)
    graph_cases.enable_after(way, model)
    graph_cases.train(model, made)
    want, got = unchecked(optimizer, way.startswith("hf")), graph_cases.weights(model)
    assert all(map(torch.equal, got, want))
    adapters = optimizer in ("lora", "lora_adapter_only")
    for (name, _), old, new in zip(model.named_parameters(), before, got, strict=True):
        if "layers." in name and (not adapters or "lora_" in name):
            assert not torch.equal(old, new), name
