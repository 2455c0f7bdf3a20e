"""What the other examples train: a small Llama with random weights that learns to count; nothing is downloaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, LENGTH = 128, 16


def model(layers: int = 3) -> nn.Module:
    """Return the same weights on every rank and in every run."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, use_cache=False, **shape))


def batch(step: int, rank: int = 0, rows: int = 8) -> Tensor:
    """[rows, LENGTH] numbers that follow each other, each row from another one on; of a rank, in a step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    starts = torch.randint(0, VOCAB, (rows, 1), generator=generator)
    return (torch.arange(LENGTH) + starts) % VOCAB
