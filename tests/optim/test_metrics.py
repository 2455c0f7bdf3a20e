"""Metrics against references in float64, on one process and on every kind of mesh, and what they cost."""

from __future__ import annotations

import copy
import math
from typing import Any

import conformance_cases as conformance
import metrics_cases as cases
import models
import pytest
import torch
from conformance_cases import CASES, Sizes
from metrics_cases import STEPS, norm
from optim_cases import make_params, set_grads
from support.errors import largest_error
from torch import nn

from colossal_bcd import SGD, AdamW, BlockOptimizer, BlockOptimizerRatio, GaLoreAdamW, Lamb
from colossal_bcd.testing import PeakBytes, run_ranks

VARIANTS = ["adamw-decay", "lamb-decay", "lamb-v3-decay", "adafactor-decay", "came-no_decay", "galore-sgd-decay"]


def lamb_ratio(weight: torch.Tensor, state: dict[str, Any], hyper: dict[str, Any]) -> float:
    """Algorithm 2 of arXiv 1904.00962, lines 9 and 10, of moments after the update."""
    m, v = state["m"], state["v"]
    if hyper.get("bias_correction", True) is True:
        m, v = m / (1 - 0.9 ** state["t"]), v / (1 - 0.999 ** state["t"])
    direction = m / (v.sqrt() + 1e-6) + hyper["weight_decay"] * weight
    return norm(weight) / norm(direction) if norm(weight) and norm(direction) else 1.0


def expected(variant: str) -> list[dict[str, Any]]:
    """Norms by name after every step, of whole tensors."""
    row, hyper = conformance.hyper_of(variant)
    histories = conformance.train_by_reference(variant)
    groups = conformance.groups_of(range(len(CASES)), hyper["weight_decay"])
    decays = {index: {**hyper, **group}["weight_decay"] for group in groups for index in group["params"]}
    moments: dict[int, dict[str, Any]] = {index: {"t": 0, "m": 0.0, "v": 0.0} for index in range(len(CASES))}
    found = []
    for step in range(STEPS):
        now: dict[str, Any] = {"weight_norms": {}, "gradient_norms": {}, "update_rms": {}, "trust_ratios": {}}
        for name, index in cases.index_of_key().items():
            before = conformance.initial(index) if step == 0 else histories[index][step - 1]
            after, grad, state = histories[index][step], conformance.gradient(index, step), moments[index]
            now["weight_norms"][name] = norm(after)
            now["update_rms"][name] = norm(after - before) / math.sqrt(max(before.numel(), 1))
            if grad is None:
                continue
            now["gradient_norms"][name] = norm(grad)
            state.update(t=state["t"] + 1, m=0.9 * state["m"] + 0.1 * grad, v=0.999 * state["v"] + 0.001 * grad**2)
            if row.optimizer is Lamb:
                ratio = lamb_ratio(before, state, {**hyper, "weight_decay": decays[index]})
                now["trust_ratios"][name] = ratio
        found.append(now)
    return found


def require_equal(got: dict[str, float], want: dict[str, float], what: str) -> None:
    assert got.keys() == want.keys(), what
    # Norms are sums of squares: of values equal to 1e-12 they are so relatively, and differences of weights absolutely.
    assert largest_error(list(got.values()), list(want.values())) <= 1e-11 * max([1.0, *want.values()]), what


def check(variant: str, steps: list[dict[str, Any]], num_axes: int) -> None:
    for step, (got, want) in enumerate(zip(steps, expected(variant), strict=True)):
        assert got["same"], "a recorded step trains otherwise"
        for what in ("weight_norms", "gradient_norms", "update_rms", "trust_ratios"):
            require_equal(got[what], want[what], f"{variant} {what} after step {step}")
        unrecorded, with_recording, asking = got["calls"]
        assert (with_recording - unrecorded, asking) == (num_axes, num_axes)
        assert got["bytes_sent"] == got["sent"]
        if "galore" in variant:
            assert got["energy"].keys() <= got["weight_norms"].keys()
            assert all(0 < energy <= 1 + 1e-12 or math.isnan(energy) for energy in got["energy"].values())
            assert got["energy"]


@pytest.mark.parametrize("sizes", [Sizes(1, 2), Sizes(2, 1), Sizes(1, 2, dtensors=True)], ids=str)
def test_metrics_equal_the_references_on_every_mesh(sizes: Sizes) -> None:
    """A step that is not recorded makes the collectives that it always made (`calls` of test_conformance.py)."""
    results = run_ranks(2, cases.many_recorded, sizes, VARIANTS)
    for variant in VARIANTS:
        for steps in (result[variant] for result in results):
            check(variant, steps, 1)
        for one, other in zip(*(result[variant] for result in results), strict=True):
            assert one["weight_norms"].keys() == other["weight_norms"].keys()


def test_metrics_equal_the_references_on_one_process() -> None:
    for variant in VARIANTS:
        row, hyper = conformance.hyper_of(variant)
        params = [nn.Parameter(conformance.initial(index).clone()) for index in range(len(CASES))]
        optimizer = row.optimizer(conformance.groups_of(params, hyper["weight_decay"]), **hyper)
        scheduler = conformance.schedule(optimizer)
        for step, want in enumerate(expected(variant)):
            for index, param in enumerate(params):
                param.grad = conformance.gradient(index, step)
            with optimizer.recording():
                optimizer.step()
            scheduler.step()
            metrics = optimizer.metrics()
            assert metrics.step is not None
            require_equal(dict(metrics.weight_norms), want["weight_norms"], variant)
            require_equal(dict(metrics.step.gradient_norms), want["gradient_norms"], variant)
            require_equal(dict(metrics.step.update_rms), want["update_rms"], variant)
            require_equal(dict(metrics.step.trust_ratios), want["trust_ratios"], variant)
            assert metrics.step.bytes_sent == 0
            assert metrics.weight_norm == pytest.approx(math.hypot(*want["weight_norms"].values()), rel=1e-12)


def test_a_recording_ends_with_its_block_and_leaves_nothing_behind() -> None:
    params = make_params()
    optimizer = Lamb(params)
    set_grads(params, 0)
    with optimizer.recording():
        optimizer.step()
        failing = optimizer.register_step_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in a step"):
            optimizer.step()
    failing.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert vars(optimizer.mesh).keys() == vars(Lamb(make_params()).mesh).keys()
    assert not optimizer._optimizer_step_post_hooks
    first = optimizer.metrics().step
    set_grads(params, 1)
    optimizer.step()
    assert optimizer.metrics().step == first, "a step outside of a recording was recorded"
    with optimizer.recording():
        pass
    assert optimizer.metrics().step is None


def fail(*_: Any) -> None:
    raise RuntimeError("in a step")


def test_a_step_that_is_not_recorded_keeps_no_tensor() -> None:
    params = make_params()
    optimizer = SGD(params, lr=0.1)
    for recorded in (False, True, False):
        set_grads(params, 0)
        with PeakBytes() as peak:
            if recorded:
                with optimizer.recording():
                    optimizer.step()
            else:
                optimizer.step()
        # A copy of the weights while the step runs, and four sums of each parameter after it.
        copy_bytes = sum(param.nbytes for param in params) if recorded else 0
        assert copy_bytes <= peak.peak <= 3 * copy_bytes + (2048 if recorded else 0)
        assert peak.current <= (2048 if recorded else 0)
        if not recorded:
            assert optimizer.recorded is None or peak.current == 0


def test_names_are_those_of_the_param_groups() -> None:
    params = make_params(shapes=[(3, 2), (4,)])
    optimizer = AdamW([{"params": params, "param_names": ["weight", "bias"]}])
    assert list(optimizer.metrics().weight_norms) == ["weight", "bias"]
    assert list(AdamW(params).metrics().weight_norms) == ["0", "1"]


def test_scalars_are_what_is_known() -> None:
    params = make_params(shapes=[(6, 5), (4,)])
    optimizer = Lamb(params)
    assert optimizer.metrics().scalars().keys() == {"weight_norm"}
    set_grads(params, 0)
    with optimizer.recording():
        optimizer.step()
    metrics = optimizer.metrics()
    assert metrics.step is not None
    scalars, ratios = metrics.scalars(), metrics.step.trust_ratios.values()
    assert scalars["trust_ratio/min"] == min(ratios)
    assert scalars["trust_ratio/max"] == max(ratios)
    assert scalars["trust_ratio/median"] == pytest.approx(sum(ratios) / 2, rel=1e-12)
    squares = [30 * metrics.step.update_rms["0"] ** 2, 4 * metrics.step.update_rms["1"] ** 2]
    assert scalars["update_rms"] == pytest.approx(math.sqrt(sum(squares) / 34), rel=1e-12)
    galore = GaLoreAdamW([{"params": params[:1], "rank": 2}])
    set_grads(params, 0)
    galore.step()
    energy = galore.captured_energy()[params[0]]
    assert galore.metrics().scalars()["projection_energy/mean"] == energy
    assert 0 < energy < 1


@pytest.mark.parametrize("bits", [32, 8])
def test_trust_ratio_is_of_the_moments_as_stored(bits: Any) -> None:
    """8 bits change a moment by up to 0.71 % of the largest of 256, so the ratio is close to what was applied."""
    params = make_params(torch.float32, [(64, 32)])
    exact = make_params(torch.float32, [(64, 32)])
    found = []
    for each, options in ((params, {"moment_bits": bits}), (exact, {})):
        optimizer = Lamb(each, lr=1e-2, **options)
        for step in range(3):
            set_grads(each, step)
            with optimizer.recording():
                optimizer.step()
        step_metrics = optimizer.metrics().step
        assert step_metrics is not None
        found.append(step_metrics.trust_ratios["0"])
    assert found[0] == pytest.approx(found[1], rel=1e-6 if bits == 32 else 2e-2)
    adam = Lamb(make_params(shapes=[(4, 4)]), adam=True)
    set_grads(adam.param_groups[0]["params"], 0)
    with adam.recording():
        adam.step()
    step_metrics = adam.metrics().step
    assert step_metrics is not None
    assert step_metrics.trust_ratios == {"0": 1.0}


def test_gradients_that_are_handed_over_count() -> None:
    params = make_params(shapes=[(6, 5)])
    optimizer = AdamW(params)
    handed = torch.ones(6, 5, dtype=torch.float64)
    with optimizer.recording():
        optimizer.step_on({params[0]: handed})
    step_metrics = optimizer.metrics().step
    assert step_metrics is not None
    assert step_metrics.gradient_norms["0"] == pytest.approx(math.sqrt(30), rel=1e-15)


def plain_blocks(*batches: Any, dtype: torch.dtype = torch.float32, loss: Any = models.loss, **size: Any) -> list[Any]:
    """What metrics are of blocks, from weights and gradients before and after, by torch alone."""
    model: Any = models.llama(layers=2, **size).to(dtype)
    optimizer = cases.wrapped(model)
    found = []
    for step in range(4):
        for batch in batches:
            (loss(model, batch(step)) / len(batches)).backward()
        prefix = f"model.layers.{step // 2}."
        before = {name: copy.deepcopy(p.detach()) for name, p in model.named_parameters() if name.startswith(prefix)}
        grads = {name: norm(p.grad) for name, p in model.named_parameters() if name.startswith(prefix)}
        optimizer.step()
        optimizer.zero_grad()
        after = dict(model.named_parameters())
        changes = {name: norm(after[name].double() - old.double()) for name, old in before.items()}
        following = f"model.layers.{(step + 1) // 2 % 2}."
        found.append(
            {
                "blocks": (following.rstrip("."),),
                "step": (prefix.rstrip("."),),
                "weight_norms": {name: norm(p) for name, p in after.items() if name.startswith(following)},
                "gradient_norms": grads,
                "update_rms": {name: change / math.sqrt(before[name].numel()) for name, change in changes.items()},
            }
        )
    return found


def check_blocks(got: list[dict[str, Any]], want: list[dict[str, Any]], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one["blocks"], one["step"]) == (other["blocks"], other["step"])
        for what in ("weight_norms", "gradient_norms", "update_rms"):
            assert one[what].keys() == other[what].keys()
            for name, value in other[what].items():
                assert one[what][name] == pytest.approx(value, rel=tolerance), (what, name)
        assert one["scalars"]["weight_norm"] == pytest.approx(math.hypot(*other["weight_norms"].values()), rel=1e-3)


@pytest.mark.parametrize("base", [AdamW, torch.optim.AdamW])
def test_metrics_of_blocks_on_one_process(base: Any) -> None:
    model: Any = models.llama(layers=2)
    optimizer = cases.wrapped(model)
    optimizer = BlockOptimizer(
        base(model.parameters(), lr=1e-3, weight_decay=0.1), model.named_parameters(), switch_block_every=2,
        switch_mode="ascending", verbose=0,
    )  # fmt: skip
    found = []
    for step in range(4):
        models.loss(model, models.tokens(step)).backward()
        with optimizer.recording():
            optimizer.step()
        optimizer.zero_grad()
        found.append(cases.of_blocks(optimizer.metrics()))
    check_blocks(found, plain_blocks(models.tokens), 1e-4)


@pytest.mark.parametrize(
    ("plugin", "options"),
    [("zero", {"stage": 2}), ("hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 0})],
    ids=["zero2", "tp2"],
)
def test_metrics_of_blocks_under_plugins(plugin: str, options: dict[str, Any]) -> None:
    """In float32; Adam makes up to 1e-3 of a rounding error where a gradient is close to zero."""
    pytest.importorskip("colossalai")
    for found in run_ranks(2, cases.boosted_blocks, plugin, options):
        check_blocks(found, plain_blocks(models.tokens), 1e-3)


def test_metrics_of_blocks_on_sharded_weights() -> None:
    loss = pytest.importorskip("fsdp_block_cases").loss_of
    batches = [lambda step, rank=rank: models.tokens(2 * step + rank, vocab=250) for rank in range(2)]
    for found in run_ranks(2, cases.fsdp_blocks):
        check_blocks(found, plain_blocks(*batches, dtype=torch.float64, loss=loss, vocab=250), 1e-9)


@pytest.mark.parametrize("gather", [False, True])
def test_what_an_engine_keeps_to_itself_is_missing(gather: bool) -> None:
    """Between refreshes whole gradients of the 14 projected matrices do not exist, and replicas may apply updates."""
    pytest.importorskip("colossalai")
    one, other = run_ranks(2, cases.projected, gather)
    assert one == other
    (total,) = set(one["all"])
    assert one["gradients"] == [total, total - 14, total]
    assert one["updates"] == [total - 14 * gather] * 3
    assert [len(energies) for energies in one["energies"]] == [14] * 3
    assert one["energies"][0] == one["energies"][1] != one["energies"][2]


def test_metrics_of_a_foreign_optimizer_on_parts_are_refused() -> None:
    model: Any = models.llama()
    optimizer = BlockOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), verbose=0)
    optimizer.engine = object()  # type: ignore[assignment]
    for call in (optimizer.metrics, lambda: optimizer.recording().__enter__()):
        with pytest.raises(ValueError, match=r"got a SGD.*Wrap colossal_bcd"):
            call()


def test_metrics_of_shares_have_names_and_no_whole_gradients() -> None:
    for dense in (False, True):
        model: Any = models.llama()
        named = list(model.named_parameters())
        ratio = BlockOptimizerRatio(
            [{"params": [param for _, param in named]}], named, 0.3, verbose=0, dense_gradients=dense
        )
        models.loss(model, models.tokens(0)).backward()
        with ratio.recording():
            ratio.step()
        metrics = ratio.metrics()
        assert metrics.step is not None
        assert metrics.weight_norms.keys() == {name for name, _ in named}
        assert bool(metrics.step.gradient_norms) == dense
        assert metrics.step.update_rms["model.layers.0.mlp.up_proj.weight"] > 0
        assert metrics.step.update_rms["lm_head.weight"] == 0
