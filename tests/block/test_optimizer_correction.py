"""Corrections by an optimizer of this package, on one process."""

import pytest
import torch
from block_net import Net, layer, tokens, train, weights, wrap

import colossal_bcd
from colossal_bcd import GaLoreSGD
from colossal_bcd.block import OptimizerCorrection

LR = 0.01


def test_correction_by_an_optimizer_refuses_what_is_said_elsewhere_or_unknown():
    with pytest.raises(TypeError, match="got <class 'torch.optim.sgd.SGD'>, expected a class of colossal_bcd.optim"):
        OptimizerCorrection(torch.optim.SGD)
    with pytest.raises(ValueError, match="got lr, expected it of the BlockOptimizer. Give that sgd_lr_scaling"):
        OptimizerCorrection(GaLoreSGD, lr=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momenta'"):
        OptimizerCorrection(GaLoreSGD, momenta=0.9)
    with pytest.raises(ValueError, match="momentum: got -1"):
        wrap(Net(), sgd_mode="all", correction=OptimizerCorrection(GaLoreSGD, momentum=-1))


def test_correction_by_an_optimizer_is_that_optimizer_on_what_is_inactive():
    """Weights of a run in which all but one layer are corrected, and of the optimizer alone on the same gradients."""
    ours, plain = Net(dtype=torch.float64), Net(dtype=torch.float64)
    rule = OptimizerCorrection(colossal_bcd.CAME, weight_decay=0.1)
    optimizer = wrap(
        ours, switch_block_every=100, switch_mode="fixed", sgd_mode="all", sgd_lr_scaling=0.5, correction=rule
    )
    corrected = [plain.get_parameter(name) for name in optimizer.corrected_names()]
    alone = colossal_bcd.CAME(corrected, lr=0.5 * LR, weight_decay=0.1)
    base = torch.optim.AdamW([param for name, param in plain.named_parameters() if name in layer(0)], lr=LR)
    for step in range(6):
        train(ours, optimizer, 1, start=step)
        plain(tokens(step)).backward()
        for other in (alone, base):
            other.step()
            other.zero_grad()
    for mine, theirs in zip(weights(ours), weights(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_correction_by_galore_keeps_images_only():
    model = Net(width=64)
    rule = OptimizerCorrection(GaLoreSGD, rank=2, momentum=0.5)
    optimizer = wrap(model, switch_mode="fixed", sgd_mode="all", correction=rule)
    train(model, optimizer, 1)
    weight = model.layers[1].weight
    entries = optimizer.corrector.state[weight]
    assert {name: tuple(value.shape) for name, value in entries.items() if name != "step"} == {
        "momentum_buffer": (64, 2),
        "right": (64, 2),
    }
