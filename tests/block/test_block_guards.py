"""Every refusal of the BlockOptimizer, and that it comes before anything is changed."""

import models
import pytest
import torch
from block_net import Net, adamw, held, train, trainable, weights, wrap
from torch import nn

from colossal_bcd import BlockOptimizer


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Embedding(5, 4, sparse=True)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"switch_mode": "sideways"}, ValueError, "switch_mode: got 'sideways', expected one of 'random', 'ascending'"),
        ({"start_block": 3}, ValueError, "start_block: got 3, expected an index of one of the 3 blocks, 0 to 2"),
        ({"start_block": -1}, ValueError, "start_block: got -1"),
        ({"switch_block_every": 0}, ValueError, "switch_block_every: got 0"),
        ({"switch_block_every": 1.5}, TypeError, "switch_block_every: got 1.5"),
        ({"verbose": "yes"}, TypeError, "verbose: got 'yes'"),
        ({"verbose": -1}, ValueError, "verbose: got -1"),
        ({"seed": "x"}, TypeError, "seed: got 'x'"),
        ({"block_ranges": [(0, 2)]}, ValueError, "block_ranges"),
        ({"block_prefix_list": [["layers.7."]]}, ValueError, "block prefix 'layers.7.' matches no parameter"),
        ({"n_layer_per_block": 0}, ValueError, "n_layer_per_block: got 0"),
        ({"active_modules": "norm"}, TypeError, "active_modules: got 'norm', expected a list"),
        ({"active_modules": ["layers.7"]}, ValueError, "active module 'layers.7' matches no parameter; closest"),
        ({"active_modules": ["head_of_nothing"]}, ValueError, "active module"),
        ({"sgd_use_sign": True}, ValueError, "sgd_use_sign: got it with sgd_mode='disabled'"),
        ({"lora_mode": "all"}, ValueError, "lora_mode: got 'all' and a model without trainable LoRA adapters"),
        ({"adapter_state": "lose"}, ValueError, "adapter_state: got 'lose', expected one of 'keep', 'reset'"),
        ({"residual": "double"}, ValueError, "residual: got 'double', expected one of 'drop', 'keep'"),
        ({"residual": "keep", "residual_bits": 4}, ValueError, "residual_bits: got 4, expected one of 8, 16"),
        ({"residual_bits": 8}, ValueError, "residual: got 'drop' with residual_bits=8 .* Set residual='keep'"),
        (
            {"residual_offload": True},
            ValueError,
            "residual: got 'drop' with residual_bits=16 and residual_offload=True",
        ),
        ({"residual": "keep", "residual_offload": "cpu"}, ValueError, "residual_offload: got 'cpu', expected one of"),
        ({"switch_mode": "importance", "importance": "loss"}, ValueError, "importance: got 'loss', expected one of"),
        (
            {"switch_mode": "importance", "importance_floor": 1.5},
            ValueError,
            "importance_floor: got 1.5, expected a nu",
        ),
        (
            {"switch_mode": "importance", "importance_floor": "0"},
            ValueError,
            "importance_floor: got '0', expected a nu",
        ),
        ({"importance": "weight"}, ValueError, "importance: got 'weight' .* switch_mode='ascending', expected"),
        ({"importance_floor": 0.5}, ValueError, "importance: got 'gradient' with importance_floor=0.5"),
        ({"lora_mode": "some"}, ValueError, "lora_mode: got 'some', expected one of None, 'all'"),
    ],
)
def test_block_optimizer_refuses_arguments_and_changes_nothing(options, error, message):
    model = Net()
    base = adamw(model)
    with pytest.raises(error, match=message):
        wrap(model, base, **options)
    assert len(trainable(model)) == len(list(model.parameters())) == len(base.param_groups[0]["params"])
    assert not any(hasattr(param, "_colossal_bcd_frozen") for param in model.parameters())


def refused(error, message, base, named):
    with pytest.raises(error, match=message):
        BlockOptimizer(base, named)


def test_block_optimizer_refuses_a_base_that_is_no_optimizer():
    model = Net()
    refused(TypeError, "base_optimizer: got a dict, expected a torch.optim.Optimizer", {}, model.named_parameters())


def test_block_optimizer_refuses_to_wrap_a_block_optimizer():
    model = Net()
    refused(
        ValueError, "got a BlockOptimizer, expected the optimizer that it wraps", wrap(model), model.named_parameters()
    )


def test_block_optimizer_refuses_to_wrap_a_base_twice():
    model = Net(dtype=torch.bfloat16)
    base = adamw(model)
    wrap(model, base)
    refused(ValueError, "2 of its 2 parameters are not in named_parameters_list", base, model.named_parameters())


def test_block_optimizer_refuses_lbfgs():
    model = Net()
    refused(ValueError, "base_optimizer: got LBFGS", torch.optim.LBFGS(model.parameters()), model.named_parameters())


def test_block_optimizer_refuses_base_parameters_without_names():
    model = Net()
    named = [(name, param) for name, param in model.named_parameters() if name != "norm.bias"]
    refused(ValueError, "1 of its 10 parameters are not in named_parameters_list", adamw(model), named)


def test_block_optimizer_refuses_block_parameters_outside_the_base():
    model = Net()
    base = torch.optim.AdamW(model.layers[:2].parameters())
    refused(ValueError, "it lacks 2 parameters of blocks .* such as 'layers.2.weight'", base, model.named_parameters())


def test_block_optimizer_accepts_base_without_what_is_in_no_block():
    model = Net()
    train(model, wrap(model, torch.optim.AdamW(model.layers.parameters())), 1)


@pytest.mark.parametrize("again", ["same tensor", "other tensor", "alias"])
def test_block_optimizer_refuses_a_name_twice(again):
    model = Net()
    named = list(model.named_parameters())
    if again == "same tensor":
        named.append(named[0])
    elif again == "other tensor":
        named.append((named[0][0], named[1][1]))
    else:
        named += [("alias", named[0][1])] * 2
    refused(ValueError, "comes twice, expected every name once", adamw(model), named)


def test_block_optimizer_accepts_two_names_for_one_tensor():
    model = Net(tied=True)
    optimizer = BlockOptimizer(adamw(model), model.named_parameters(remove_duplicate=False))
    assert len(optimizer.blocks) == 3


@pytest.mark.parametrize("named", [None, 3, "weights", [("a",)], [torch.ones(2)], {"a": 1}])
def test_block_optimizer_refuses_names_that_are_no_pairs(named):
    refused(TypeError, r"named_parameters_list: .* list\(model.named_parameters\(\)\)", adamw(Net()), named)


def test_block_optimizer_refuses_the_method_instead_of_its_result():
    model = Net()
    refused(TypeError, "named_parameters_list: got a method", adamw(model), model.named_parameters)


def test_block_optimizer_refuses_active_modules_that_are_frozen():
    model = Net()
    model.norm.requires_grad_(False)
    with pytest.raises(ValueError, match="active_modules: 'norm' matches 2 parameters, all frozen before"):
        wrap(model, active_modules=["norm"])


def test_block_optimizer_refuses_sparse_gradients_before_the_step():
    model = Sparse()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = weights(model)
    model.layers[0](torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="parameter 'layers.0.weight' has a sparse gradient, expected a dense one"):
        optimizer.step()
    assert torch.equal(model.layers[0].weight, before[0])
    assert optimizer.num_steps == 0


def test_block_optimizer_refuses_a_model_that_was_converted_afterwards():
    model = Net()
    optimizer = wrap(model)
    model.bfloat16()
    with pytest.raises(ValueError, match="is now torch.bfloat16 on cpu, .* converted after the optimizer was made"):
        optimizer.step()


def test_block_optimizer_refuses_a_model_that_was_moved_afterwards():
    model = Net(dtype=torch.bfloat16)
    optimizer = wrap(model)
    optimizer.active_set.masters[model.layers[0].weight] = torch.empty(4, 4, device="meta")
    optimizer.param_groups[0]["params"] = list(optimizer.active_set.masters.values())
    with pytest.raises(ValueError, match="'layers.0.weight' .* was moved or converted"):
        optimizer.step()


def test_block_optimizer_refuses_new_param_groups():
    optimizer = wrap(Net())
    with pytest.raises(ValueError, match="add_param_group: got parameters after the blocks were made"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_block_optimizer_refuses_positional_options():
    """badam has start_block where this signature has switch_mode; compat keeps badam's order."""
    model = Net()
    with pytest.raises(TypeError, match="positional"):
        BlockOptimizer(adamw(model), model.named_parameters(), None, 50, 1)


def test_block_optimizer_refuses_to_attach_after_steps():
    model = Net()
    optimizer = wrap(model)
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="attach: the optimizer has taken 1 steps"):
        optimizer.attach(object())


def test_block_optimizer_refuses_another_base_after_steps():
    model = Net()
    optimizer = wrap(model)
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="replace_base: .* has state of 2 parameters and the same param groups"):
        optimizer.replace_base(optimizer.base_optimizer)


def test_block_optimizer_warns_when_a_used_base_loses_its_state(caplog):
    model = Net()
    base = adamw(model)
    model.layers[0].weight.grad = torch.ones(4, 4)
    base.step()
    optimizer = wrap(model, base)
    assert "has taken steps; its state is cleared" in caplog.text
    assert not base.state
    assert len(held(optimizer)) == 2


def test_block_optimizer_refuses_a_model_without_layers():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="none of the 2 names shows a layer .* block_prefix_list"):
        wrap(model)


def test_block_optimizer_names_the_tie_that_hides_a_head():
    model = models.llama(tied=True)
    with pytest.raises(ValueError, match="include_lm_head: got True, .*remove_duplicate=False"):
        wrap(model, include_lm_head=True)
