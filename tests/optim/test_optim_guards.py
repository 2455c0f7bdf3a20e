"""Every guard of the optimizers is tripped."""

import pytest
import torch
from optim_cases import OPTIMIZERS, make_params, train
from torch import nn

from colossal_bcd import AdamW, Lamb
from colossal_bcd.sharding import Layout, Mesh, TensorSplit


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"lr": -1.0}, "lr: got -1.0, expected a non-negative number"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"betas": (1.0, 0.9)}, r"betas: got \(1.0, 0.9\), expected two numbers in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"betas": (0.9, 0.99, 0.999)}, "betas"),
        ({"eps": -1e-8}, "eps: got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_constructor_refuses_hyper_parameters_out_of_range(optimizer_type, hyper, message):
    with pytest.raises(ValueError, match=message):
        optimizer_type(make_params(), **hyper)
    with pytest.raises(ValueError, match=message):
        optimizer_type([{"params": make_params(), **hyper}])


def test_lamb_refuses_an_unknown_bias_correction():
    with pytest.raises(ValueError, match="bias_correction: got 'debias', expected True, False or \"step_size\""):
        Lamb(make_params(), bias_correction="debias")


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_unknown_hyper_parameters_are_errors(optimizer_type):
    with pytest.raises(TypeError, match="weight_dekay"):
        optimizer_type(make_params(), weight_dekay=0.1)
    with pytest.raises(ValueError, match="'weight_dekay', which is no hyper-parameter; did you mean 'weight_decay'"):
        optimizer_type([{"params": make_params(), "weight_dekay": 0.1}])


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_refused_group_is_not_added(optimizer_type):
    optimizer = optimizer_type(make_params())
    for group in ({"lr": -1.0}, {"bettas": (0.9, 0.9)}):
        with pytest.raises(ValueError, match="hyper-parameter"):
            optimizer.add_param_group({"params": make_params(), **group})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_group_changed_out_of_range_is_refused_at_the_step(optimizer_type):
    params = make_params()
    optimizer = optimizer_type(params)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr: got -1\.0"):
        train(optimizer, params, 1)


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_flat_shards_without_a_bind_are_refused_at_the_first_step(optimizer_type):
    params = make_params()
    optimizer = optimizer_type(params)
    flat = [nn.Parameter(param.detach().reshape(-1)) for param in params]
    optimizer.param_groups[0]["params"] = flat
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(3072,\).*call bind\(layouts, mesh\)"):
        train(optimizer, flat, 1)
    assert not optimizer.state


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_parameter_resized_without_a_bind_is_refused_at_the_step(optimizer_type):
    params = make_params()
    optimizer = optimizer_type(params)
    params[1].data = params[1].data.view(-1)[:100]
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"parameter 1 has shape \(100,\), but its layout says \(33, 7\)"):
        train(optimizer, params, 1)
    assert torch.equal(params[0], before)


def test_bind_refuses_a_tensor_without_a_layout():
    params = make_params(shapes=[(4,), (5,)])
    with pytest.raises(ValueError, match=r"bind: parameter 1 of shape \(5,\) has no layout"):
        AdamW(params).bind({params[0]: Layout.whole((4,))}, Mesh())


def test_bind_refuses_a_shape_that_is_not_the_layouts():
    params = make_params(shapes=[(4, 3)])
    layout = Layout(shape=(4, 3), split=TensorSplit(axis="tp", dim=0, rank=0, size=2))
    with pytest.raises(ValueError, match=r"has shape \(4, 3\), but its layout says \(2, 3\) \(part of \(4, 3\)\)"):
        AdamW(params).bind({params[0]: layout}, Mesh({"tp": ()}))


class OneCommunicatingAxis(Mesh):
    def __init__(self):
        super().__init__()
        self._groups = {"zero": ("a group",)}


@pytest.mark.parametrize("mesh", [Mesh(), OneCommunicatingAxis()], ids=["no axis", "another axis"])
def test_bind_refuses_an_axis_that_the_mesh_lacks(mesh):
    """An axis that communicates hid that the second one was missing; the step then failed after a collective."""
    layout = Layout(shape=(4, 3), split=TensorSplit(axis="tp", dim=0, rank=0, size=2)).sliced("zero", 0, 2)
    param = nn.Parameter(torch.zeros(layout.local_shape))
    with pytest.raises(ValueError, match="is in a layout but not in the mesh"):
        AdamW([param]).bind({param: layout}, mesh)


def test_refused_bind_changes_nothing():
    params = make_params(shapes=[(4,), (5,)])
    optimizer = AdamW(params)
    train(optimizer, params, 1)
    with pytest.raises(ValueError, match="no layout"):
        optimizer.bind({params[0]: Layout.whole((4,))}, Mesh())
    train(optimizer, params, 1)
    assert [optimizer.state[param]["step"] for param in params] == [2, 2]


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_sparse_gradients_are_refused_before_anything_changes(optimizer_type):
    dense, sparse = nn.Linear(4, 4), nn.Embedding(10, 4, sparse=True)
    sparse(torch.tensor([1, 2])).sum().backward()
    dense.weight.grad = torch.ones_like(dense.weight)
    before = dense.weight.detach().clone()
    optimizer = optimizer_type([dense.weight, sparse.weight])
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(10, 4\) has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense.weight, before)
    assert not optimizer.state
