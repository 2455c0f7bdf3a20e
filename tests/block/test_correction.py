"""BREAD's corrections on one process against a plain loop, and what they keep alive."""

import contextlib
import copy
import logging

import plain_bread
import pytest
import torch
from block_net import Net, adamw, layer, same, tokens, train, weights, wrap

import colossal_bcd
from colossal_bcd import GaLoreSGD
from colossal_bcd.block import LionCorrection, MomentumCorrection, OptimizerCorrection
from colossal_bcd.testing import PeakBytes

RULES = {
    "sgd": {},
    "sign": {"sgd_use_sign": True},
    "momentum": {"correction": MomentumCorrection()},
    "lion": {"correction": LionCorrection()},
    "galore": {"correction": OptimizerCorrection(GaLoreSGD, rank=2, update_proj_gap=3, scale=0.7, momentum=0.5)},
}
PERIOD, LR, SCALING = 2, 0.01, 5.0


def loss_of(model, batch):
    return model(batch)


def run(dtype, rule, mode, steps=8, accumulate=1, **options):
    """Weights of ours and of the loop after `steps` steps over 3 blocks, ascending."""
    options = {"sgd_mode": mode, "sgd_lr_scaling": SCALING, "accumulation_steps": accumulate, **RULES[rule], **options}
    ours, plain = Net(dtype=dtype), Net(dtype=dtype)
    optimizer = wrap(ours, switch_block_every=PERIOD, **options)
    for step in range(steps):
        for micro in range(accumulate):
            (ours(tokens(step * accumulate + micro)) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    plain_bread.train(
        plain,
        [f"layers.{index}." for index in range(3)],
        [index % 3 for index in range(steps // PERIOD)],
        PERIOD,
        lambda step: [tokens(step * accumulate + micro) for micro in range(accumulate)],
        lambda masters: torch.optim.AdamW(masters, lr=LR),
        loss_of,
        rule=rule,
        mode=mode,
        lr=LR * SCALING,
        accumulate=accumulate,
    )
    return weights(ours), weights(plain)


@pytest.mark.parametrize("mode", ["all", "partial"])
@pytest.mark.parametrize("rule", RULES)
def test_correction_equals_loop_in_float64(rule, mode):
    for mine, theirs in zip(*run(torch.float64, rule, mode), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_correction_of_bfloat16_equals_loop(rule):
    """The same operations in float32, so that not even rounding differs."""
    for mine, theirs in zip(*run(torch.bfloat16, rule, "all"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("rule", ["sgd", "sign", "lion"])
def test_correction_with_accumulation_is_one_update_a_step(rule):
    """The original updates per micro-batch by sign, so that weights move four times as far."""
    for mine, theirs in zip(*run(torch.float64, rule, "all", accumulate=4), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_correction_leaves_nothing_where_it_was_not_asked_for():
    model, plain = Net(), Net()
    train(model, wrap(model, sgd_mode="disabled"), 5)
    train(plain, wrap(plain), 5)
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize(
    ("mode", "step", "corrected"),
    [
        ("all", 0, ["embed_tokens.weight", *layer(1), *layer(2), "norm.weight", "norm.bias", "lm_head.weight"]),
        ("partial", 2, [*layer(2), "norm.weight", "norm.bias", "lm_head.weight"]),
    ],
)
def test_correction_requires_gradients_of_what_it_corrects_only(mode, step, corrected):
    model = Net()
    model.norm.bias.requires_grad_(False)
    corrected = [name for name in corrected if name != "norm.bias"]
    optimizer = wrap(model, sgd_mode=mode)
    train(model, optimizer, step)
    assert list(optimizer.corrected_names()) == corrected
    assert [name for name, param in model.named_parameters() if param.requires_grad] == [
        name for name, _ in model.named_parameters() if name in {*corrected, *optimizer.active_names()}
    ]
    before = model.norm.bias.detach().clone()
    train(model, optimizer, 1, start=step)
    assert torch.equal(model.norm.bias, before)


def test_correction_leaves_active_modules_to_the_base_optimizer():
    model = Net()
    optimizer = wrap(model, sgd_mode="all", active_modules=["lm_head"])
    assert "lm_head.weight" not in optimizer.corrected_names()
    assert "lm_head.weight" in optimizer.active_names()


def test_correction_has_the_learning_rate_of_the_group_as_schedulers_leave_it():
    model = Net(dtype=torch.float64)
    head = [model.lm_head.weight]
    rest = [param for name, param in model.named_parameters() if name != "lm_head.weight"]
    base = torch.optim.SGD([{"params": rest}, {"params": head, "lr": 0.5}], lr=0.1)
    optimizer = wrap(model, base, sgd_mode="all", sgd_lr_scaling=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(2):
        twin = copy.deepcopy(model).requires_grad_()
        twin(tokens(step)).backward()
        before = copy.deepcopy(model.state_dict())
        train(model, optimizer, 1, start=step)
        scheduler.step()
        for name, lr in (("lm_head.weight", 0.5), ("norm.weight", 0.1)):
            want = before[name] - 2 * lr * 0.5**step * twin.get_parameter(name).grad
            torch.testing.assert_close(model.state_dict()[name], want, rtol=0, atol=1e-12)


def peak(**options):
    """Largest bytes alive in three steps, weights and state included, and how many gradients wait for the step."""
    model = Net(layers=8, width=256)
    optimizer = wrap(model, **options)
    with PeakBytes() as bytes_alive:
        for step in range(3):
            model(tokens(step)).backward()
            waiting = sum(param.grad is not None for param in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    return bytes_alive.peak, waiting


def test_correction_frees_gradients_within_backward():
    """All gradients of the 8 matrices at once would be 2.1 MB on top of the 3.7 MB of BAdam."""
    badam, (bread, waiting) = peak()[0], peak(sgd_mode="all")
    assert waiting == 2, "a corrected parameter kept its gradient"
    assert bread <= 1.05 * badam


def test_correction_refuses_a_second_backward_that_was_not_declared():
    model = Net()
    optimizer = wrap(model, sgd_mode="all")
    model(tokens(0)).backward()
    with pytest.raises(
        ValueError, match="got gradient number 2 since the last step, expected 1: .*accumulation_steps=2"
    ):
        model(tokens(1)).backward()
    optimizer.zero_grad()
    train(model, optimizer, 2)


def test_correction_of_fewer_micro_batches_than_declared_is_made_by_the_step():
    model, plain = Net(dtype=torch.float64), Net(dtype=torch.float64)
    optimizer = wrap(model, sgd_mode="all", accumulation_steps=4)
    other = wrap(plain, sgd_mode="all")
    model(tokens(0)).backward()
    assert same(weights(model), weights(plain)), "micro-batches were expected"
    optimizer.step()
    train(plain, other, 1)
    for mine, theirs in zip(weights(model), weights(plain), strict=True):
        # The gradient waited in bfloat16.
        torch.testing.assert_close(mine, theirs, rtol=2**-8, atol=2**-8)


def test_correction_of_abandoned_micro_batches_is_forgotten():
    model = Net()
    optimizer = wrap(model, sgd_mode="all", accumulation_steps=2)
    before = weights(model)
    model(tokens(0)).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert same(weights(model), before)


def test_correction_waiting_takes_two_bytes_a_parameter(caplog):
    model = Net()
    optimizer = wrap(model, sgd_mode="all", accumulation_steps=3)
    with caplog.at_level(logging.INFO):
        model(tokens(0)).backward()
        model(tokens(1)).backward()
    assert sum("2 bytes more for every corrected parameter" in message for message in caplog.messages) == 1
    waiting = optimizer._corrections._waiting
    corrected = [optimizer.named_parameters[name] for name in optimizer.corrected_names()]
    assert sum(grad.untyped_storage().nbytes() for grad in waiting.values()) == 2 * sum(p.numel() for p in corrected)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_correction_rounding_of_updates_below_the_step_of_bfloat16(rounding):
    """Steps of 2^-12 on weights of 1, where bfloat16 has steps of 2^-8 below: nearest loses them all."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    base = torch.optim.SGD(model.parameters(), lr=2.0**-12)
    optimizer = colossal_bcd.BlockOptimizer(
        base, list(model.named_parameters()), switch_mode="fixed", sgd_mode="all", sgd_use_sign=True,
        correction_rounding=rounding, verbose=0,
    )  # fmt: skip
    steps = 64
    for _ in range(steps):
        (
            model[1](torch.ones(1, 64, dtype=torch.bfloat16)).sum() + 0 * model(torch.ones(1, 64).bfloat16()).sum()
        ).backward()
        optimizer.step()
    moved = 1 - model[1].weight.float().mean().item()
    if rounding == "nearest":
        assert moved == 0
    else:
        # 4096 weights, each off by at most a step of 2^-8 at the end: the mean's deviation is below 2^-8 / 64.
        assert abs(moved - steps * 2**-12) < 5 * 2**-8 / 64


def test_correction_rounding_depends_on_the_seed_alone():
    results = []
    for seed in (0, 0, 1):
        model = Net(dtype=torch.bfloat16)
        train(model, wrap(model, sgd_mode="all", correction_rounding="stochastic", seed=seed), 4)
        results.append(weights(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_correction_of_tied_and_unused_parameters():
    """A tied head is one parameter with one gradient; a layer without a gradient stays as it is."""
    model = Net(tied=True)
    model.layers.append(torch.nn.Linear(4, 4))
    unused = model.layers[3]
    optimizer = wrap(model, sgd_mode="all", sgd_lr_scaling=1.0)
    forward = model.layers
    before = [unused.weight.detach().clone(), model.embed_tokens.weight.detach().clone()]
    model.layers = forward[:3]
    train(model, optimizer, 1)
    assert torch.equal(unused.weight, before[0])
    assert not torch.equal(model.embed_tokens.weight, before[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sgd_mode": "some"}, ValueError, "sgd_mode: got 'some', expected one of 'disabled', 'all', 'partial'"),
        ({"sgd_lr_scaling": -1.0}, ValueError, "sgd_lr_scaling: got -1.0"),
        ({"sgd_lr_scaling": float("nan")}, ValueError, "sgd_lr_scaling: got nan"),
        ({"sgd_use_sign": True}, ValueError, "sgd_use_sign: got it with sgd_mode='disabled'.* Set sgd_mode to 'all'"),
        ({"correction": LionCorrection()}, ValueError, "correction: got it with sgd_mode='disabled'"),
        ({"correction_rounding": "stochastic"}, ValueError, "correction_rounding: got it with sgd_mode='disabled'"),
        ({"sgd_mode": "all", "correction": "lion"}, TypeError, "correction: got a str, expected a Correction"),
        (
            {"sgd_mode": "all", "correction": LionCorrection(), "sgd_use_sign": True},
            ValueError,
            "sgd_use_sign: got True",
        ),
        ({"sgd_mode": "all", "correction_rounding": "up"}, ValueError, "correction_rounding: got 'up'"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps: got 0"),
    ],
)
def test_correction_refuses_arguments(options, error, message):
    with pytest.raises(error, match=message):
        wrap(Net(), **options)


def test_correction_scaling_without_a_mode_warns():
    with pytest.warns(UserWarning, match="sgd_lr_scaling=5.0 has no effect with sgd_mode='disabled'"):
        wrap(Net(), sgd_lr_scaling=5.0)


def test_correction_refuses_hyper_parameters():
    with pytest.raises(ValueError, match="momentum: got 1.5"):
        MomentumCorrection(momentum=1.5)
    with pytest.raises(ValueError, match="betas"):
        LionCorrection(betas=(0.9, 1.0))


def test_correction_refuses_a_base_without_what_it_corrects():
    model = Net()
    base = torch.optim.AdamW(model.layers.parameters())
    with pytest.raises(ValueError, match="it lacks 4 parameters of blocks or active_modules or corrections"):
        wrap(model, base, sgd_mode="all")
    wrap(model, base)
    without = colossal_bcd.Adafactor(model.parameters(), lr=None, relative_step=True)
    with pytest.raises(ValueError, match="sgd_mode: got a base optimizer whose param group 0 has lr=None"):
        wrap(model, without, sgd_mode="all")


def test_correction_refuses_a_gradient_scaler():
    """It scales the loss, and hears of gradients only after the hooks have applied them."""
    for mode, refused in (("disabled", False), ("all", True)):
        model, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = wrap(model, sgd_mode=mode)
        scaler.scale(model(tokens(0))).backward()
        with pytest.raises(ValueError, match="torch.amp.GradScaler") if refused else contextlib.nullcontext():
            scaler.step(optimizer)


def test_correction_refuses_an_engine_that_does_not_correct():
    optimizer = wrap(Net(), sgd_mode="all")
    with pytest.raises(ValueError, match="attach: got an engine without corrections"):
        optimizer.attach(object())


@pytest.mark.parametrize("rule", ["momentum", "galore"])
def test_correction_resumes_in_the_middle_of_a_block(rule):
    """State of what is corrected, and of what was corrected before it trained, is in the state dict."""
    options = {"sgd_mode": "all", **RULES[rule], "correction_rounding": "stochastic"}
    model = Net(dtype=torch.bfloat16)
    optimizer = wrap(model, switch_block_every=3, **options)
    train(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 5, start=4)
    again = Net(dtype=torch.bfloat16)
    resumed = wrap(again, switch_block_every=3, **options)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, 5, start=4)
    assert same(weights(model), weights(again))
    with pytest.raises(ValueError, match="corrections"):
        wrap(Net(dtype=torch.bfloat16), switch_block_every=3).load_state_dict(saved[1])
    with pytest.raises(ValueError, match="corrections"):
        wrap(Net(dtype=torch.bfloat16), switch_block_every=3, sgd_mode="all").load_state_dict(saved[1])


@pytest.mark.parametrize("warm", [1, 2, 3, 5])
def test_warm_up_after_a_switch_follows_the_rule(warm):
    """Factor 1 in the first `warm` steps of the run, then min(1, (c + 1) / warm) with c steps into the period."""
    model = Net()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = wrap(model, base, switch_block_every=4, lr_warmup_step_afterswitch=warm)
    seen, step = [], base.step
    base.step = lambda *args: (seen.append(base.param_groups[0]["lr"]), step(*args))
    train(model, optimizer, 10)
    assert seen == [1.0 if index < warm else min(1.0, (index % 4 + 1) / warm) for index in range(10)]
    assert base.param_groups[0]["lr"] == 1.0
    assert wrap(Net(), lr_warmup_step_afterswitch=warm).fingerprint() != wrap(Net()).fingerprint()


def test_warm_up_refuses_what_it_cannot_multiply():
    model = Net()
    with pytest.raises(ValueError, match="lr_warmup_step_afterswitch: got a base optimizer .* lr=None"):
        wrap(model, colossal_bcd.Adafactor(model.parameters(), lr=None), lr_warmup_step_afterswitch=2)
    with pytest.raises(ValueError, match="lr_warmup_step_afterswitch: got -1"):
        wrap(model, adamw(model), lr_warmup_step_afterswitch=-1)
