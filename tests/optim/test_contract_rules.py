"""The contract with other packages' optimizers: what is reset, what is the user's, what is refused and why."""

from __future__ import annotations

import logging
import random
import warnings
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import pytorch_optimizer
import torch
from block_net import Net, tokens, train, weights, wrap
from foreign_optimizers import CLASSES, UNAVAILABLE, make, param_groups
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from colossal_bcd.optim.foreign import contract as contracts
from colossal_bcd.optim.foreign import twin
from colossal_bcd.optim.foreign.contract import CLOSE, examine, update_apart
from colossal_bcd.optim.foreign.twin import first_line


class Counting(Optimizer):
    """Divides by its count of steps, which it keeps where `place` says."""

    def __init__(self, params: Any, lr: float = 0.1, place: str = "group") -> None:
        self.place, self.count = place, 0
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += self.place == "object"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + (self.place == "group")
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"] / max(self.count, group["step"], 1))


class Remembering(Optimizer):
    """Steps a list of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.mine = [param for group in self.param_groups for param in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.mine:
            if param.grad is not None:
                param.sub_(param.grad, alpha=0.1)


class Still(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None: ...  # type: ignore[override]


class Pairwise(Optimizer):
    """Adds each parameter's mean gradient: one number from the whole tensor; its constructor cannot be called again."""

    def __init__(self, params: Any, secret: float) -> None:
        super().__init__(params, {"lr": 0.1})
        self.rate = 1 / secret

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad.mean(), alpha=self.rate)


class Wrapped(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.inner = [torch.optim.SGD(self.param_groups, lr=0.1)]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner[0].step()


class FusedAdam(Optimizer):
    """Its kernel is missing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("no kernel image is available")


REFUSED = {
    "inner optimizer": (lambda m: Wrapped(m.parameters()), r"holds another optimizer, a SGD in its attribute 'inner'"),
    "inner list": (lambda m: Remembering(m.parameters()), "remembers more of the tensors it had before"),
    "nothing moves": (lambda m: Still(m.parameters()), "has moved none of the tensors in its param groups"),
    "sparse": (lambda m: torch.optim.SparseAdam(list(m.parameters())), "cannot step tensors by their gradients alone"),
    "schedule-free": (lambda m: make("schedulefree.SGDScheduleFree", m), r"in train\(\) and eval\(\)"),
    "own rate": (lambda m: make("pytorch_optimizer.ASGD", m), "writes the learning rates of its param groups"),
    "closure": (lambda m: make("pytorch_optimizer.AliG", m), "NoClosureError"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrapping_refuses_by_name_and_changes_nothing(case: str) -> None:
    build, reason = REFUSED[case]
    model = Net()
    base = build(model)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"base_optimizer: got \w+'s {type(base).__name__}, which .*{reason}"):
        wrap(model, base)
    assert all(map(torch.equal, weights(model), before))
    assert all(param.requires_grad and param.grad is None for param in model.parameters())
    assert not base.state


@pytest.mark.parametrize("place", ["group", "object"])
def test_switch_sets_counts_again_and_leaves_the_users_values(place: str) -> None:
    """A learning rate that a scheduler has set must survive the switch that resets a count."""
    model = Net()
    optimizer = wrap(model, Counting(param_groups(model), place=place), verbose=0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    want = [param.detach().clone() for param in model.parameters()]
    for step in range(4):
        model(tokens(step)).backward()
        grads = [param.grad for param in model.parameters()]
        optimizer.step()
        scheduler.step()
        rate = 0.1 * 0.5**step / (step % 2 + 1)
        for param, grad in zip(want, grads, strict=True):
            if grad is not None:
                param.sub_(grad, alpha=rate)
        for got, expected in zip(weights(model), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * 0.5**4] * 2


KEPT = {"active_modules": ["lm_head."], "verbose": 0}


def head_apart(model: Net) -> list[dict[str, Any]]:
    head = [model.lm_head.weight]
    return [{"params": head}, {"params": [p for p in model.parameters() if p is not model.lm_head.weight]}]


@pytest.mark.parametrize(
    "make_base",
    [
        lambda groups: pytorch_optimizer.AdaBelief(groups, lr=0.01),
        lambda groups: torch.optim.Adagrad(groups, lr=0.01),
        lambda groups: bitsandbytes.optim.AdamW8bit(groups, lr=0.01),
        Counting,
    ],
    ids=["count in the group", "state of the constructor", "flags on the object", "count alone"],
)
def test_kept_parameters_in_a_group_of_their_own_count_on(make_base: Any) -> None:
    """The same as one optimizer for the head, and a new one for each block."""
    model, plain = Net(), Net()
    optimizer = wrap(model, make_base(head_apart(model)), **KEPT)
    plain.requires_grad_(False)
    plain.lm_head.requires_grad_(True)
    head = make_base([{"params": [plain.lm_head.weight]}])
    for step in range(5):
        if step % 2 == 0:
            plain.layers.requires_grad_(False)
            layer = plain.layers[step // 2 % 3].requires_grad_(True)
            block = make_base(layer.parameters())
        plain.zero_grad()
        plain(tokens(step)).backward()
        head.step()
        block.step()
        train(model, optimizer, 1, start=step)
        assert all(map(torch.equal, weights(model), weights(plain))), step


def test_kept_parameters_in_a_mixed_group_are_refused_where_it_counts() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"counts in the param group \('step'\), and in group 0 .*group of their own"):
        wrap(model, Counting(model.parameters()), **KEPT)
    with pytest.raises(
        ValueError, match="Counting, which keeps 'count' for all parameters together.*active_modules out"
    ):
        wrap(model, Counting(head_apart(model), place="object"), **KEPT)
    with pytest.raises(ValueError, match="which keeps entries of its state for all parameters"):
        wrap(model, pytorch_optimizer.MADGRAD(head_apart(model), lr=0.01), **KEPT)


def test_a_base_that_has_taken_steps_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    model, fresh = Net(), Net()
    base = pytorch_optimizer.AdaBelief(model.parameters(), lr=0.01)
    model(tokens(0)).backward()
    base.step()
    base.zero_grad()
    fresh.load_state_dict(model.state_dict())
    optimizer, other = (
        wrap(model, base, verbose=0),
        wrap(fresh, pytorch_optimizer.AdaBelief(fresh.parameters(), lr=0.01)),
    )
    assert "has taken steps" in caplog.text
    train(model, optimizer, 3)
    train(fresh, other, 3)
    assert all(map(torch.equal, weights(model), weights(fresh)))


def test_constructed_state_is_no_step(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    wrap(model, torch.optim.Adagrad(model.parameters()), verbose=0)
    assert "has taken steps" not in caplog.text


def test_one_number_from_a_whole_tensor_is_not_elementwise() -> None:
    """The twin is a copy, as the constructor's argument is found nowhere."""
    optimizer = Pairwise(Net(width=5).parameters(), 3.0)
    assert examine(optimizer).misfit is None
    assert update_apart(optimizer) > CLOSE
    assert update_apart(Counting(Net(width=5).parameters())) == 0


@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith("torch.optim.")])
def test_trial_is_the_same_at_a_rate_of_zero(name: str) -> None:
    """Schedulers with a warm-up set the rate to zero: twins did not move, so that torch's optimizers were refused."""
    usual, waiting = make(name, Net(width=5)), make(name, Net(width=5))
    for group in waiting.param_groups:
        group["lr"] = 0.0
    verdicts = [(examine(each).misfit, examine(each).counts) for each in (usual, waiting)]
    assert verdicts[0] == verdicts[1]
    if verdicts[0][0] is None:
        assert (update_apart(usual) <= CLOSE) == (update_apart(waiting) <= CLOSE)
    assert all(group["lr"] == 0 for group in waiting.param_groups)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD, pytorch_optimizer.AdaBelief])
def test_scheduler_with_a_warm_up_may_be_made_before_the_blocks(base: Any) -> None:
    runs = []
    for early in (True, False):
        model = Net()
        inner = base(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: step / 4) if early else None
        optimizer = wrap(model, inner, verbose=0, switch_block_every=2)
        scheduler = scheduler or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
        for step in range(6):
            train(model, optimizer, 1, start=step)
            scheduler.step()
        runs.append(weights(model))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("name", ["torch.optim.Adam", "torch.optim.Adagrad", "pytorch_optimizer.SOAP"])
def test_trial_leaves_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "_MEASURED", {})
    model = Net()
    optimizer = make(name, model)
    called = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: called.append("global")),
        optimizer.register_step_post_hook(lambda *_: called.append("own")),
    ]

    def world() -> list[Any]:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return [
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), repr(groups),
            {k: repr(v) for k, v in optimizer.state.items()}, logging.root.manager.disable, list(warnings.filters),
            torch.is_grad_enabled(), repr(bitsandbytes.optim.GlobalOptimManager.get_instance().pid2config),
            [param.tolist() for param in model.parameters()], [param.grad for param in model.parameters()],
        ]  # fmt: skip

    before = world()
    examine(optimizer)
    update_apart(optimizer)
    assert world() == before
    assert called == []
    for handle in handles:
        handle.remove()


def test_trial_is_made_once_for_equal_options(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    measured = contracts._measured
    monkeypatch.setattr(twin, "_MEASURED", {})
    monkeypatch.setattr(contracts, "_measured", lambda optimizer: made.append(optimizer) or measured(optimizer))
    for rate in (0.1, 0.1, 0.2):
        examine(torch.optim.AdamW(Net().parameters(), lr=rate))
    assert len(made) == 2


def test_kernel_that_cannot_be_tried_is_taken_as_known(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = FusedAdam([torch.nn.Parameter(torch.empty(3, 2, device="meta"))])
    contract = examine(optimizer)
    assert "FusedAdam could not be tried (cannot step tensors" in caplog.text
    optimizer.param_groups[0]["step"] = 1000
    contract.begin(optimizer)
    assert "step" not in optimizer.param_groups[0]
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.filterwarnings("ignore")  # of destructors of what was never made
@pytest.mark.parametrize("name", UNAVAILABLE)
def test_what_cannot_be_made_here_is_refused_by_its_own_constructor(name: str) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011
        make(name, Net(width=5))
    assert UNAVAILABLE[name] in first_line(raised.value)
