"""Every rule on gradients and weights at the edges of their dtype is what the textbook in float64 is."""

import inspect

import edge_cases
import pytest
import torch
from conformance_cases import TABLE

import colossal_bcd
from colossal_bcd import (
    CAME,
    Adafactor,
    AdamW,
    BlockOptimizerRatio,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreLion,
    GaLoreSGD,
    GoLoreAdafactor,
    GoLoreAdamW,
    GoLoreAdamW8bit,
    GoLoreLion,
    GoLoreSGD,
    Lamb,
)
from colossal_bcd.block.correction.rules import LionCorrection, MomentumCorrection, SgdCorrection, SignCorrection
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh, square_sum
from colossal_bcd.testing import run_ranks

GALORE = (GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD, GaLoreLion, GaLoreAdafactor)
GOLORE = (GoLoreAdamW, GoLoreAdamW8bit, GoLoreSGD, GoLoreLion, GoLoreAdafactor)


def galore(cls, **options):
    def make(params):
        hyper = {"lr": 1e-2} | ({"relative_step": False} if "Adafactor" in cls.__name__ else {})
        hyper |= {"total_steps": 4, "rand_ratio": 0.5} if cls in GOLORE else {}
        return cls([{"params": params, "rank": 64, "update_proj_gap": 2, **options}], **hyper)

    return make


def ratio(params, **options):
    return BlockOptimizerRatio([{"params": params}], [("layers.0.up", params[0])], 0.25, lr=1e-2, verbose=0, **options)


MAKERS = {
    **{f"{cls.__name__}-exact": galore(cls, svd_method="exact") for cls in GALORE + GOLORE},
    **{f"{cls.__name__}-subspace": galore(cls, svd_method="subspace") for cls in GALORE + GOLORE},
    **{f"{cls.__name__}-full": galore(cls, proj_type="full") for cls in GALORE},
    **{f"{cls.__name__}-8": galore(cls, moment_bits=8) for cls in (GaLoreAdamW, GoLoreAdamW)},
    "AdamW-8": lambda params: AdamW(params, lr=1e-2, moment_bits=8),
    "AdamW-stochastic": lambda params: AdamW(params, lr=1e-2, rounding="stochastic"),
    "Lamb": Lamb,
    "Lamb-8": lambda params: Lamb(params, moment_bits=8),
    "CAME": lambda params: CAME(params, lr=1e-2),
    "CAME-8": lambda params: CAME(params, lr=1e-2, moment_bits=8),
    "CAME-whole": lambda params: CAME(params, lr=1e-2, min_dim_size_to_factor=500),
    "Adafactor": Adafactor,
    "Adafactor-8": lambda params: Adafactor(params, lr=1e-2, relative_step=False, beta1=0.9, moment_bits=8),
    "Adafactor-warmup": lambda params: Adafactor(params, warmup_init=True),
    "Adafactor-whole": lambda params: Adafactor(params, min_dim_size_to_factor=500),
    "ratio": ratio,
    "ratio-scatter": lambda params: ratio(params, mask_mode="scatter"),
}  # fmt: skip
"""What has no textbook in the conformance table: singular vectors, 8-bit moments, other options."""

GRADIENTS = {
    "zeros": (0.0,) * 4,
    "zeros after one": (1.0, 0.0, 0.0, 0.0),
    "1e-30": (1e-30,) * 3,
    "one of 1e-25": (1.0, 1e-25, 1.0, 1.0),
    "1e15": (1e15,) * 3,
    "1e25": (1e25,) * 3,
    "one of 1e25": (1.0, 1e25, 1.0, 1.0),
    "1e37": (1e37,) * 3,
}


@pytest.mark.parametrize("row", TABLE)
def test_edges_equal_the_textbook_in_float32(row):
    """LAMB divided squared norms, which overflow where the ratio of norms does not; Adafactor and CAME divided means of
    squares by one another, which is 0 / 0 for a row of zeros beside gradients of 1e12."""
    assert edge_cases.on_one_process(row, torch.float32, 0.1) == {}


@pytest.mark.parametrize("row", ["lamb", "lamb-v3", "lamb-step_size"])
def test_edges_equal_the_textbook_without_weight_decay(row):
    """Then the direction of LAMB is as small as the gradients are."""
    assert edge_cases.on_one_process(row, torch.float32, 0.0) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", TABLE)
def test_edges_equal_the_textbook_in_low_precision(row, dtype):
    assert edge_cases.on_one_process(row, dtype, 0.1, edge_cases.FEW) == {}


SUMMING = ("lamb", "adafactor", "came", "galore-adafactor")
"""Rows that add up norms or squares over ranks, one of each kind."""


@pytest.mark.parametrize("meshes", [[(2, 1), (1, 2)], [(2, 2)]], ids=["tp2 and zero2", "tp2-zero2"])
def test_edges_equal_the_textbook_on_every_mesh(meshes):
    """Norms are sums over ranks: their squares were added up in float32."""
    num_ranks = max(tp * zero for tp, zero in meshes)
    for found in run_ranks(num_ranks, edge_cases.on_mesh, meshes, SUMMING, edge_cases.FEW):
        assert found == {}


def test_sums_of_squares_of_any_magnitude_travel_in_float32():
    """A few beside many values do not double the bytes; alone they are float64."""
    (mixed, alone, exact), others, sent = run_ranks(2, edge_cases.mixed_on_the_wire)[0]
    assert others
    expected = [0.0, 2e-90, 2e-40, 2.0, 6e38, 2e77, float("inf"), 1e60]
    assert alone == pytest.approx(expected, rel=1e-15)
    assert exact == pytest.approx(expected, rel=1e-15)
    # Each rank rounds its value to float32.
    assert mixed == pytest.approx(expected, rel=2**-23)
    assert sent == [4 * 1000 + 4 * 6 * 8, 8 * 8, 8 * 1008]


@pytest.mark.parametrize("bias_correction", [True, False, "step_size"])
def test_lamb_on_zeros_for_long_is_the_textbook(bias_correction):
    """An expert whose gate is 0: NaN after about 440 steps, since |w|^2 / |r|^2 is infinite once |r| is below 1e-19."""
    hyper = {"bias_correction": bias_correction}
    history = edge_cases.train_on_zeros(Layout.whole((64, 64)), Mesh(), torch.float32, hyper)
    assert history.isfinite().all()
    weight, state = edge_cases.values((64, 64), 1.0, 1, torch.float32), {}
    edge = edge_cases.Edge(grads=(1e-2,) * 3)
    # A step is 1e-4 of the weight's norm, 64 * 0.66, times a unit vector that is off by no more than 64 roundings while
    # the larger values of the first moment, 1e-2 * 0.9^t, have 18 bits or more: until they are below 1e-39.
    limit = 800
    with edge_cases.stored_in_float32():
        for step in range(limit):
            grad = (
                edge_cases.gradient(edge, (64, 64), step, torch.float32) if step < 3 else torch.zeros(64, 64).double()
            )
            weight = TABLE["lamb"].reference(weight, grad, state, lr=1e-4, **hyper)
            error = (history[step] - weight).abs().max().item()
            assert error <= (step + 1) * (64 * 2**-24 * 1e-4 * 64 + 2**-24)
    # Afterwards a step still is a unit vector times 1e-4 of the norm.
    steps = history[limit:].double().diff(dim=0).flatten(1).norm(dim=1)
    assert (steps <= 1.01e-4 * history[limit:-1].double().flatten(1).norm(dim=1)).all()


def test_lamb_on_zeros_for_long_is_the_same_on_every_mesh():
    whole = edge_cases.train_on_zeros(Layout.whole((64, 64)), Mesh(), torch.float32, num_zeros=597)
    for found in run_ranks(2, edge_cases.zeros_for_long):
        for layout, history in found.values():
            assert history.isfinite().all()
            parts = torch.stack([layout.shard(weight).reshape(-1) for weight in whole[::100]])
            mine = history[::100].reshape(len(parts), -1)
            # As above, for 600 steps.
            torch.testing.assert_close(mine, parts, rtol=0, atol=600 * (64 * 2**-24 * 1e-4 * 64 + 2**-24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_edges_are_finite_without_a_textbook(maker, dtype):
    for name, scales in GRADIENTS.items():
        param = torch.nn.Parameter(edge_cases.values((96, 64), 1.0, 1, dtype).to(dtype))
        optimizer = MAKERS[maker]([param])
        for step, scale in enumerate(scales):
            before = param.detach().clone()
            param.grad = edge_cases.values((96, 64), scale, step, dtype).to(dtype)
            if maker.startswith("ratio"):
                optimizer._keep_selected(param)
            optimizer.step()
            assert param.isfinite().all(), name
            if not any(scales):
                decayed = before * (1 - 1e-2 * optimizer.param_groups[0].get("weight_decay", 0.0))
                torch.testing.assert_close(param.detach(), decayed, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_not_finite_is_not_hidden(maker, bad):
    """The textbook has no number there either; what no rule makes of it is a weight that looks trained."""
    param = torch.nn.Parameter(edge_cases.values((96, 64), 1.0, 1, torch.float32).float())
    optimizer = MAKERS[maker]([param])
    for step in range(3):
        param.grad = edge_cases.values((96, 64), 1.0, step, torch.float32).float()
        if step == 1:
            param.grad.view(-1)[5] = bad
        if maker.startswith("ratio"):
            param.grad[::3] = bad if step == 1 else 1.0
            optimizer._keep_selected(param)
        optimizer.step()
    assert param.isnan().any()


@pytest.mark.parametrize("rule", [SgdCorrection(), SignCorrection(), MomentumCorrection(), LionCorrection()], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e25, 1e37])
def test_corrections_at_the_edges(rule, scale):
    """A direction is the gradient, its sign or a mean of it: it is of its size."""
    grad = edge_cases.values((64,), scale, 1, torch.float32).float()
    state = {name: torch.zeros(64) for name in rule.state}
    for _ in range(3):
        direction = rule.direction(grad, state)
        assert direction.isfinite().all()
        assert torch.equal(direction.sign(), grad.sign())
        is_sign = isinstance(rule, (SignCorrection, LionCorrection))
        assert direction.abs().max().item() <= (1.0 if is_sign else 3 * scale)


def test_every_optimizer_is_walked():
    """A new optimizer cannot escape the edges."""
    walked = {row.optimizer for row in TABLE.values()} | {
        type(MAKERS[name]([torch.nn.Parameter(torch.ones(96, 64))])) for name in MAKERS
    }
    public = {cls for _, cls in inspect.getmembers(colossal_bcd, inspect.isclass)}
    known = {cls for cls in public if issubclass(cls, ShardedOptimizer) and hasattr(cls, "hyper_type")}
    assert len(known) >= 15
    assert known <= walked


def test_square_sum_neither_underflows_nor_overflows():
    for scale in (1e-44, 1e-30, 1.0, 1e30, 3e38):
        for shape in ((5,), (200_000,), (3, 70_000)):
            x = torch.full(shape, scale)
            want = shape[-1] * x.flatten()[0].double().item() ** 2
            torch.testing.assert_close(
                square_sum(x), torch.full((*shape[:-1], 1), want, dtype=torch.float64), rtol=1e-12, atol=0
            )
    assert square_sum(torch.zeros(0)).tolist() == [0.0]


def test_norm_and_clipping_of_a_plugin_at_the_edges():
    """The square of 1e25 is infinite in float32, so the factor was zero."""
    reports = run_ranks(2, edge_cases.boosts)
    for index, scale in enumerate((1e-25, 1.0, 1e25)):
        norm, _, finite = reports[0][0][index]
        # The loss is twice the sum of 4 outputs of ones, so every one of 16 weights and 4 biases has 2 * scale.
        assert norm == pytest.approx(2 * scale * 20**0.5, rel=1e-6)
        assert finite
        given = torch.cat([found[index][1] for found, _ in reports]).double()
        # Clipped to 1 by the factor max_norm / (norm + 1e-6), as torch's clip_grad_norm_ does.
        assert given.norm().item() == pytest.approx(min(norm, 1.0), rel=1e-5)
