"""What a booster uses of the BlockOptimizer: ranges, fingerprints, and masters that are not its own."""

import pytest
import torch
from block_net import Net, adamw, held, layer, same, train, trainable, weights, wrap
from torch.optim.lr_scheduler import LambdaLR

import colossal_bcd
from colossal_bcd.block.trained import Engine


def test_block_optimizer_order_needs_no_global_generator():
    """The original draws its order from each process's own generator; ranks would train different blocks."""
    torch.manual_seed(0)
    first = wrap(Net(layers=8), switch_mode="random", seed=4)
    torch.manual_seed(1)
    model = Net(layers=8)
    before = torch.get_rng_state()
    second = wrap(model, switch_mode="random", seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint() == second.fingerprint()
    assert [first.schedule.active(step) for step in range(40)] == [second.schedule.active(step) for step in range(40)]


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"switch_mode": "descending"}, {"switch_block_every": 3}, {"include_lm_head": True},
     {"active_modules": ["norm"]}, {"block_ranges": [(0, 1), (1, 3)]}],
)  # fmt: skip
def test_block_optimizer_fingerprint_tells_schedules_apart(options):
    plain, other = wrap(Net()).fingerprint(), wrap(Net(), **options).fingerprint()
    assert all(isinstance(value, int) and 0 <= value < 2**62 for value in plain)
    assert plain[0] != other[0]


def test_block_optimizer_fingerprint_tells_progress_apart():
    model = Net()
    optimizer = wrap(model)
    seen = [optimizer.fingerprint()]
    for step in range(4):
        train(model, optimizer, 1, start=step)
        seen.append(optimizer.fingerprint())
    assert len({value[0] for value in seen}) == 1
    assert len({value[1] for value in seen}) == 5


def test_block_optimizer_ranges_train_several_blocks_at_once():
    model = Net(layers=4)
    optimizer = wrap(model, block_ranges=[(0, 2), (2, 4)], switch_block_every=1)
    assert list(optimizer.active_names()) == [*layer(0), *layer(2)]
    assert [block.name for block in optimizer.active_blocks()] == ["layers.0", "layers.2"]
    train(model, optimizer, 1)
    assert trainable(model) == [*layer(1), *layer(3)]


def test_block_optimizer_reschedule_before_the_first_step_only():
    model = Net(layers=4)
    optimizer = wrap(model)
    assert not optimizer.ranges_given
    optimizer.reschedule([(0, 3), (3, 4)])
    assert trainable(model) == [*layer(0), *layer(3)]
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="reschedule: got it after 1 steps"):
        optimizer.reschedule([(0, 4)])


def test_block_optimizer_with_our_sharded_optimizers_on_one_process():
    model, plain = Net(dtype=torch.bfloat16), Net(dtype=torch.bfloat16)
    optimizer = wrap(model, colossal_bcd.AdamW(model.parameters(), lr=0.01))
    train(model, optimizer, 7)
    train(plain, wrap(plain), 7)
    for mine, theirs in zip(weights(model), weights(plain), strict=True):
        # Same formula in another order of operations: at most the last bit of bfloat16 (2^-8 of the value) differs.
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-3)


class FakeEngine:
    """What a booster does: masters of its own, gradients from elsewhere, switches by call."""

    def __init__(self):
        self.of, self.calls, self.masters = {}, [], self

    def release(self):
        self.calls.append("release")

    def adopt(self, groups):
        self.calls.append((len(groups), sum(map(len, groups))))

    def drive(self, update):
        update()

    def make_master(self, param):
        self.of[param] = param.detach().clone()
        return self.of[param]

    def weight_of(self, param):
        return param

    def follow(self, param, master):
        raise AssertionError

    def zero_grad(self, set_to_none=True):
        self.calls.append("zero")

    def squared_weights(self, blocks):
        raise AssertionError


def test_block_optimizer_attached_leaves_gradients_weights_and_switches_to_the_engine():
    model = Net(dtype=torch.bfloat16)
    optimizer = wrap(model, active_modules=["lm_head"])
    engine: Engine = FakeEngine()
    optimizer.attach(engine)
    before = weights(model)
    for _ in range(2):
        for tensor in held(optimizer):
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()
    optimizer.zero_grad()
    assert engine.calls == ["release", (1, 3), "zero"]
    assert same(weights(model), before)
    assert trainable(model) == [*layer(0), "lm_head.weight"]
    master = engine.of[model.lm_head.weight]
    assert optimizer.switch_if_due()
    assert engine.calls[-2:] == ["release", (1, 3)]
    assert engine.of[model.lm_head.weight] is master
    assert trainable(model) == [*layer(1), "lm_head.weight"]
    assert list(optimizer.base_optimizer.state) == [master]
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)


def test_block_optimizer_attached_activates_only_what_is_held():
    model = Net()
    optimizer = wrap(model)
    optimizer.attach(FakeEngine(), held=list(model.layers[1].parameters()))
    assert trainable(model) == []
    assert optimizer.param_groups[0]["params"] == []
    optimizer.step()
    optimizer.step()
    assert optimizer.switch_if_due()
    assert trainable(model) == layer(1)
    assert list(optimizer.active_names()) == layer(1)


def test_block_optimizer_replaces_its_base_over_the_same_groups():
    model = Net()
    optimizer = wrap(model, adamw(model, weight_decay=0.3))
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    other = colossal_bcd.AdamW(held(optimizer))
    other.param_groups[0] = optimizer.param_groups[0]
    optimizer.replace_base(other)
    train(model, optimizer, 3)
    scheduler.step()
    assert optimizer.base_optimizer is other
    assert other.param_groups[0]["lr"] == 0.005
    with pytest.raises(ValueError, match="replace_base: .* other param groups"):
        optimizer.replace_base(adamw(Net()))
