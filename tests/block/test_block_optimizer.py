import copy

import models
import pytest
import torch
from block_net import Net, adamw, held, layer, same, tokens, train, trainable, weights, wrap
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import StepLR

from colossal_bcd import BlockOptimizer
from colossal_bcd.testing import live_bytes


def test_block_optimizer_trains_one_block_for_exactly_the_period():
    model = Net()
    optimizer = wrap(model)
    seen = []
    for step in range(7):
        before = dict(zip(optimizer.named_parameters, weights(model), strict=True))
        assert trainable(model) == list(optimizer.active_names())
        train(model, optimizer, 1, start=step)
        seen.append([name for name, param in model.named_parameters() if not torch.equal(param, before[name])])
    assert seen == [layer(0), layer(0), layer(1), layer(1), layer(2), layer(2), layer(0)]
    assert optimizer.num_steps == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_block_optimizer_clones_masters_of_low_precision_only(dtype):
    model = Net(dtype=dtype)
    optimizer = wrap(model)
    params = [param for param in model.parameters() if param.requires_grad]
    if dtype in (torch.float16, torch.bfloat16):
        assert [tensor.dtype for tensor in held(optimizer)] == [torch.float32] * 2
        assert same(held(optimizer), [param.float() for param in params])
    else:
        assert all(tensor is param for tensor, param in zip(held(optimizer), params, strict=True))


def test_block_optimizer_masters_gather_updates_below_the_step_of_bfloat16():
    model = Net(dtype=torch.bfloat16)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=1e-4), switch_block_every=500)
    with torch.no_grad():
        model.layers[0].weight.fill_(1.0)
    for _ in range(100):
        model.layers[0].weight.grad = torch.ones_like(model.layers[0].weight)
        optimizer.step()
    assert torch.allclose(held(optimizer)[0], torch.tensor(0.99), atol=1e-5)
    assert model.layers[0].weight[0, 0].item() == torch.tensor(0.99).bfloat16().item()


def test_block_optimizer_base_state_is_cleared_at_a_switch():
    model = Net()
    optimizer = wrap(model)
    train(model, optimizer, 1)
    assert len(optimizer.base_optimizer.state) == 2
    assert optimizer.state is optimizer.base_optimizer.state
    train(model, optimizer, 1)
    assert not optimizer.base_optimizer.state


@pytest.mark.parametrize("options", [{"switch_mode": "fixed", "start_block": 1}, {"block_prefix_list": ["layers.1"]}])
def test_block_optimizer_state_is_cleared_where_the_next_block_is_the_same(options):
    model = Net()
    optimizer = wrap(model, **options)
    train(model, optimizer, 2)
    assert list(optimizer.active_names()) == layer(1)
    assert not optimizer.base_optimizer.state


def test_block_optimizer_active_modules_keep_state_and_masters():
    """The original clears their state as well."""
    model = Net(dtype=torch.bfloat16)
    optimizer = wrap(model, active_modules=["lm_head", "norm."], verbose=0)
    always = ["norm.weight", "norm.bias", "lm_head.weight"]
    assert trainable(model) == [*layer(0), *always]
    masters = held(optimizer)[-3:]
    train(model, optimizer, 5)
    assert trainable(model) == [*layer(2), *always]
    assert all(ours is theirs for ours, theirs in zip(held(optimizer)[-3:], masters, strict=True))
    assert [optimizer.base_optimizer.state[master]["step"] for master in masters] == [5, 5, 5]
    assert not torch.equal(masters[-1], model.lm_head.weight.float())
    assert len(optimizer.base_optimizer.state) == 5


def test_block_optimizer_memory_is_that_of_the_paper():
    """2M + 14b bytes after backward, 2M + 16b in the step, 2M + 4b after a switch.

    M: parameters, bfloat16.  b: parameters of the active block, with float32 master, gradient and two moments.
    """
    before = live_bytes()
    model = Net(dtype=torch.bfloat16, width=128)
    total, block = (sum(p.numel() for p in part.parameters()) for part in (model, model.layers[0]))
    optimizer = wrap(model)
    seen = {"made": live_bytes() - before}
    train(model, optimizer, 1)
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.update(step=live_bytes() - before))
    model(tokens(1)).backward()
    gradients = [param.grad for param in model.parameters()]  # autograd's tensors are found only through Python objects
    seen["backward"] = live_bytes() - before
    del gradients
    optimizer.step()
    seen["switched"] = live_bytes() - before
    expected = {"made": 4 * block, "backward": 14 * block, "step": 16 * block, "switched": 4 * block}
    # Scalars: each parameter's step count is a float32 tensor.
    assert {name: value - 2 * total for name, value in seen.items()} == {
        name: value + (8 if name in ("backward", "step") else 0) for name, value in expected.items()
    }


def test_block_optimizer_keeps_lr_and_weight_decay_of_each_group():
    """The original gives every group the base's defaults: 0.1 and 0 were asked, 0.01 and 0.01 trained."""
    model, plain = Net(layers=1), Net(layers=1)

    def groups(net):
        return [
            {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.1, "lr": 0.02},
            {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]

    optimizer = wrap(model, torch.optim.AdamW(groups(model), lr=0.01), switch_block_every=50)
    only = [
        {**group, "params": [p for p in group["params"] if any(p is q for q in plain.layers.parameters())]}
        for group in groups(plain)
    ]
    train(model, optimizer, 4)
    train(plain, torch.optim.AdamW(only, lr=0.01), 4)
    assert same(weights(model), weights(plain))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("place", ["base before", "base after", "wrapper"])
def test_block_optimizer_follows_schedulers_wherever_they_were_made(place):
    """The original takes the wrapper's first lr for every group, and raises for a scheduler on the base optimizer."""
    model = Net()
    base = torch.optim.SGD(
        [{"params": list(model.layers.parameters())}, {"params": [model.lm_head.weight], "lr": 0.5}], lr=1.0
    )
    groups = base.param_groups
    scheduler = StepLR(base, 1, gamma=0.5) if place == "base before" else None
    optimizer = wrap(model, base)
    if scheduler is None:
        scheduler = StepLR(base if place == "base after" else optimizer, 1, gamma=0.5)
    for step in range(3):
        train(model, optimizer, 1, start=step)
        scheduler.step()
    assert [group["lr"] for group in base.param_groups] == [0.125, 0.0625]
    assert optimizer.param_groups is base.param_groups is groups
    before = model.layers[1].bias.detach().clone()
    model.layers[1].bias.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(model.layers[1].bias, before - 0.125)


def test_block_optimizer_groups_may_be_empty():
    model = Net()
    base = torch.optim.AdamW(
        [{"params": [layer.weight for layer in model.layers]}, {"params": list(model.norm.parameters())}]
    )
    optimizer = wrap(model, base, block_prefix_list=[[f"layers.{i}.weight"] for i in range(3)])
    train(model, optimizer, 5)
    assert [len(group["params"]) for group in base.param_groups] == [1, 0]


def test_block_optimizer_skips_parameters_without_gradient():
    """An unused parameter trips an assertion in the original."""
    model = Net(dtype=torch.bfloat16)
    model.layers[0].unused = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = wrap(model)
    train(model, optimizer, 4)
    assert torch.equal(model.layers[0].unused, torch.ones(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_block_optimizer_step_consumes_gradients(dtype):
    """A gradient that stayed on a master would be applied again by the next step, which has none."""
    model = Net(dtype=dtype)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=1.0))
    model.layers[0].bias.grad = torch.ones(4, dtype=dtype)
    optimizer.step()
    before = weights(model)
    optimizer.step()
    assert same(weights(model), before)


def test_block_optimizer_frees_gradients_of_what_it_freezes():
    model = Net()
    model(tokens(0)).backward()
    wrap(model)
    assert [name for name, param in model.named_parameters() if param.grad is not None] == layer(0)


def test_block_optimizer_accumulates_gradients():
    model, plain = Net(dtype=torch.bfloat16), Net(dtype=torch.bfloat16)
    optimizer, other = wrap(model), wrap(plain)
    for step in range(4):
        for micro in range(3):
            model(tokens(3 * step + micro)).backward()
        optimizer.step()
        active = [param for param in plain.parameters() if param.requires_grad]
        sums = [torch.zeros_like(param) for param in active]
        for micro in range(3):
            for total, grad in zip(sums, torch.autograd.grad(plain(tokens(3 * step + micro)), active), strict=True):
                total += grad
        for param, total in zip(active, sums, strict=True):
            param.grad = total
        other.step()
    assert optimizer.num_steps == 4
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_block_optimizer_zero_grad_clears_working_and_master_gradients(dtype, set_to_none):
    model = Net(dtype=dtype)
    optimizer = wrap(model)
    model(tokens(0)).backward()
    held(optimizer)[0].grad = torch.ones(4, 4)
    optimizer.zero_grad(set_to_none)
    gradients = [param.grad for param in model.layers[0].parameters()]
    assert all(grad is None for grad in gradients) if set_to_none else not any(grad.any() for grad in gradients)
    assert dtype == torch.float32 or held(optimizer)[0].grad is None


def test_block_optimizer_step_takes_a_closure():
    model, plain = Net(), Net()
    optimizer, other = wrap(model), wrap(plain)

    def closure():
        optimizer.zero_grad()
        loss = model(tokens(0))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == plain(tokens(0)).item()
    train(plain, other, 1)
    assert same(weights(model), weights(plain))


def test_block_optimizer_leaves_frozen_what_the_user_froze():
    model = Net()
    model.layers[1].bias.requires_grad_(False)
    model.layers[2].requires_grad_(False)
    optimizer = wrap(model)
    assert [block.parameters for block in optimizer.blocks] == [tuple(layer(0)), ("layers.1.weight",)]
    train(model, optimizer, 9)
    assert same([model.layers[1].bias], [Net().layers[1].bias])


def test_block_optimizer_wraps_a_model_again_without_losing_what_it_froze_itself():
    model = Net()
    model.layers[2].bias.requires_grad_(False)
    blocks = wrap(model).blocks
    assert wrap(model).blocks == blocks
    assert len(blocks) == 3


def test_block_optimizer_tied_weight_trains_only_when_asked():
    model = Net(tied=True)
    optimizer = BlockOptimizer(
        adamw(model),
        model.named_parameters(remove_duplicate=False),
        switch_mode="fixed",
        include_lm_head=True,
        start_block=3,
    )
    assert optimizer.active_names() == ("embed_tokens.weight",)
    start = weights(other := Net(tied=True))
    train(other, wrap(other), 6)
    assert torch.equal(other.embed_tokens.weight, start[0])


def test_block_optimizer_include_lm_head_trains_no_embedding():
    """In the original, include_lm_head also trains the embeddings and the final norm."""
    model = Net()
    optimizer = wrap(model, include_lm_head=True)
    train(model, optimizer, 8)
    fresh = Net()
    assert torch.equal(model.embed_tokens.weight, fresh.embed_tokens.weight)
    assert torch.equal(model.norm.weight, fresh.norm.weight)
    assert not torch.equal(model.lm_head.weight, fresh.lm_head.weight)


def test_block_optimizer_lora_trains_adapters_of_the_block_only():
    model = get_peft_model(models.llama(layers=2), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    optimizer = BlockOptimizer(adamw(model), model.named_parameters(), switch_block_every=1, switch_mode="ascending")
    for index in (0, 1, 0):
        expected = [name for name, _ in model.named_parameters() if f"layers.{index}." in name and "lora_" in name]
        assert trainable(model) == expected
        batch = models.tokens(0)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ["random", "fixed"])
def test_block_optimizer_start_block_works_in_every_mode(mode):
    """random with start_block, and fixed, raise in the original."""
    optimizer = wrap(Net(), switch_mode=mode, start_block=2)
    assert list(optimizer.active_names()) == layer(2)


def test_block_optimizer_runs_hooks_of_both_optimizers():
    model = Net()
    optimizer = wrap(model)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("wrapper"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: calls.append("base"))
    train(model, optimizer, 1)
    assert calls == ["base", "wrapper"]


def test_block_optimizer_takes_over_weights_that_are_loaded_later():
    """Masters cloned before `model.load_state_dict` would write the old weights back at the first step."""
    model, source = Net(dtype=torch.bfloat16), Net(dtype=torch.bfloat16)
    with torch.no_grad():
        for param in source.parameters():
            param.mul_(-2)
    optimizer = wrap(model)
    model.load_state_dict(source.state_dict())
    train(model, optimizer, 5)
    train(source, wrap(source), 5)
    assert same(weights(model), weights(source))


def test_block_optimizer_takes_over_weights_of_active_modules_loaded_at_a_switch():
    model = Net(dtype=torch.bfloat16)
    optimizer = wrap(model, active_modules=["lm_head"])
    train(model, optimizer, 1)
    optimizer.num_steps = 2
    nn.init.ones_(model.lm_head.weight)
    assert optimizer.switch_if_due()
    optimizer._local.load_gradients(optimizer.active_set)
    assert torch.equal(held(optimizer)[-1], torch.ones(5, 4))


def test_block_optimizer_keeps_the_residual_of_weights_that_are_loaded_unchanged():
    model, twin = Net(dtype=torch.bfloat16), Net(dtype=torch.bfloat16)
    optimizers = [wrap(net, torch.optim.SGD(net.parameters(), lr=1e-4)) for net in (model, twin)]
    train(model, optimizers[0], 1)
    train(twin, optimizers[1], 1)
    master = held(optimizers[0])[0].clone()
    assert not torch.equal(master, model.layers[0].weight.float())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    optimizers[0]._local.load_gradients(optimizers[0].active_set)
    assert torch.equal(held(optimizers[0])[0], master)


@pytest.mark.parametrize(("verbose", "switches", "lists"), [(0, 0, 0), (1, 3, 0), (2, 3, 3)])
def test_block_optimizer_logs_by_verbosity(caplog, verbose, switches, lists):
    model = Net()
    train(model, wrap(model, verbose=verbose), 4)
    assert sum("is active" in message for message in caplog.messages) == switches
    assert sum("layers.1.bias" in message for message in caplog.messages) == lists // 3
    assert sum(message.startswith("trainable:") for message in caplog.messages) == lists
