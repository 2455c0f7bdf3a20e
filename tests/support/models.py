"""Small models and data for tests; the same on every rank and in every process."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def llama(vocab: int = 256, layers: int = 2, tied: bool = False, seed: int = 0, attention: str = "eager") -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocab,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        use_cache=False,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def gpt2(vocab: int = 256, layers: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=64,
        n_layer=layers,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


def tokens(index: int, batch: int = 2, length: int = 16, vocab: int = 256) -> Tensor:
    """[batch, length] random token ids, a pure function of `index`."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, vocab, (batch, length), generator=generator)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Language-modelling loss, or, of a model without a head, a mean over some of its outputs.

    ColossalAI's forward of a GPT-2 with a head asks for a CUDA device under tensor parallelism.
    """
    if "GPT2Model" in {type(module).__name__ for module in model.modules()}:
        return model(input_ids=batch).last_hidden_state[..., :7].float().mean()
    return model(input_ids=batch, labels=batch).loss
