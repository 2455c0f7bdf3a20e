"""What ranks run in test_hooks.py: every class constructed in some order, and how often its hooks run."""

import random

import torch
from test_accepted import CLASSES, make
from torch import nn

from colossal_bcd import BlockOptimizer, compat
from colossal_bcd.booster.stock_plugins import distributed_class


def compat_lamb():
    return compat.DistributedLamb([nn.Parameter(torch.ones(4, 4))])


def compat_adafactor():
    return compat.DistributedAdaFactor([nn.Parameter(torch.ones(4, 4))])


def compat_came():
    return compat.DistributedCAME([nn.Parameter(torch.ones(4, 4))], lr=1e-2)


def compat_galore():
    return compat.DistGaloreAwamW([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2}])


def blocks():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
    return BlockOptimizer(torch.optim.AdamW(model.parameters()), list(model.named_parameters()), verbose=0)


def of_class(name):
    return lambda: make(name, [nn.Parameter(torch.ones(4, 4))])


def dynamic(name):
    def build():
        optimizer = make(name, [nn.Parameter(torch.ones(4, 4))])
        optimizer.__class__ = distributed_class(type(optimizer))
        return optimizer

    return build


BUILDERS = {
    **{name: of_class(name) for name in CLASSES},
    **{f"distributed {name}": dynamic(name) for name in CLASSES if name != "BlockOptimizerRatio"},
    **{build.__name__: build for build in (compat_lamb, compat_adafactor, compat_came, compat_galore, blocks)},
}


def counts(order):
    """By class how often a step hook of each kind runs in one step, each class built and stepped before the next."""
    names = sorted(BUILDERS)
    if order == "descending":
        names.reverse()
    elif order != "ascending":
        random.Random(order).shuffle(names)
    found = {}
    for _ in range(2):  # once while later classes have not been constructed, once when all have
        for name in names:
            optimizer, runs = BUILDERS[name](), []
            optimizer.register_step_pre_hook(lambda *_, runs=runs: runs.append("pre"))
            optimizer.register_step_post_hook(lambda *_, runs=runs: runs.append("post"))
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.ones_like(param)
            optimizer.step()
            found.setdefault(name, []).append(runs)
    return found
