"""A model small enough to follow by hand, and steps with it, for tests of the BlockOptimizer on one process."""

import torch
from torch import nn

from colossal_bcd import BlockOptimizer


class Net(nn.Module):
    """Layers with a bias each, an embedding, a head; small enough to follow by hand."""

    def __init__(self, layers=3, dtype=torch.float32, tied=False, width=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed_tokens = nn.Embedding(5, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 5, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        self.to(dtype)

    def forward(self, tokens):
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return self.lm_head(self.norm(hidden)).float().square().mean()


def tokens(step):
    return torch.randint(0, 5, (2, 3), generator=torch.Generator().manual_seed(step))


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.01, **options})


def wrap(model, base=None, **options):
    options = {"switch_block_every": 2, "switch_mode": "ascending", **options}
    return BlockOptimizer(base or adamw(model), list(model.named_parameters()), **options)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        model(tokens(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model):
    return [name for name, param in model.named_parameters() if param.requires_grad]


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


def same(left, right):
    return all(map(torch.equal, left, right))


def held(optimizer):
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def layer(index):
    return [f"layers.{index}.weight", f"layers.{index}.bias"]
