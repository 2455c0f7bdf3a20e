"""Parameters, gradients and training loops for tests of optimizers on one process."""

import torch
from torch import nn

from colossal_bcd import AdamW, Lamb
from support.errors import largest_error

SHAPES = [(64, 48), (33, 7), (8, 4, 3, 3), (64,), (1,), ()]
OPTIMIZERS = [AdamW, Lamb]


def make_params(dtype=torch.float64, shapes=SHAPES, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


def train(optimizer, params, num_steps=6, first=0):
    for step in range(first, first + num_steps):
        set_grads(params, step)
        optimizer.step()
    return [param.detach().clone() for param in params]


def errors(some, others):
    return [largest_error(one, other) for one, other in zip(some, others, strict=True)]
