"""Blocks drawn by their norms: the same on every mesh, for nothing, and from where a checkpoint was."""

import copy
from pathlib import Path

import block_cases
import importance_cases as cases
import models
import plain_importance
import pytest
import test_checkpoints
import torch
from block_net import Net, same, train, weights, wrap
from importance_cases import LAYERS, PERIOD, SEED
from test_optim import NoHostSync

from colossal_bcd import estimate
from colossal_bcd.testing import run_ranks

TURNS = 2 * LAYERS + 1
STEPS = PERIOD * TURNS
WHOLE, STAGES = [(0, LAYERS)], [(0, 2), (2, LAYERS)]


def reference(ranks, ranges=WHOLE, by="gradient", floor=0.1):
    return plain_importance.train(
        models.llama(layers=LAYERS),
        [f"model.layers.{i}." for i in range(LAYERS)],
        ranges,
        PERIOD,
        TURNS,
        lambda step: [block_cases.batch_of(step, rank, different=True) for rank in range(ranks)],
        lambda params: block_cases.base_optimizer("sgd", params),
        models.loss,
        by=by,
        floor=floor,
        seed=SEED,
    )


def by_step(turns):
    return [turn for turn in turns for _ in range(PERIOD)]


@pytest.mark.parametrize(("by", "floor"), [("gradient", 0.1), ("weight", 0.1), ("gradient", 0.0)])
def test_importance_on_one_process_equals_a_plain_loop(by, floor):
    turns, norms = reference(1, by=by, floor=floor)
    active, found = cases.alone(STEPS, 1, importance=by, importance_floor=floor)
    assert active == by_step(turns)
    assert sorted(turn[0] for turn in turns[:LAYERS]) == list(range(LAYERS))
    assert found == pytest.approx(norms, rel=1e-4)
    assert len(set(norms)) == LAYERS


def test_importance_on_every_mesh_draws_what_a_plain_loop_draws():
    """Each value counts once, whatever holds or computes it twice; no step has a collective more than others have."""
    names = ["zero2", "tp2", "pp2"]
    runs = [(name, STEPS, {"importance": by}) for name in names for by in ("gradient", "weight")]
    runs += [(name, STEPS, {"switch_mode": "random"}) for name in names]
    found = run_ranks(2, cases.under_each, runs)
    assert [[run["active"] for run in rank] for rank in found] == [[run["active"] for run in found[0]]] * 2
    for (name, _, options), run in zip(runs[: 2 * len(names)], found[0], strict=False):
        ranges = STAGES if name == "pp2" else WHOLE
        turns, norms = reference(run["ranks"], ranges, by=options["importance"])
        assert run["active"] == by_step(turns), (name, options)
        assert run["norms"] == pytest.approx(norms, rel=1e-4), (name, options)
    for rank in found:
        calls = {(run[0], run[2].get("importance")): result["calls"] for run, result in zip(runs, rank, strict=True)}
        for name in names:
            size = len(STAGES[0] if name == "pp2" else range(LAYERS))
            ends = [(step + 1) % (PERIOD * size) == 0 for step in range(STEPS)]
            plain = calls[name, None]
            assert calls[name, "gradient"] == plain
            assert calls[name, "weight"] == [count + end for count, end in zip(plain, ends, strict=True)]


def test_importance_on_four_ranks_counts_every_value_once():
    runs = [("tp2-zero2", False), ("pp2-tp2", False), ("tp2-dp2", False), ("pp2-tp2", True)]
    found = run_ranks(4, cases.norms_of_weights, runs)
    for index, (name, tied) in enumerate(runs):
        model = models.llama(vocab=250, layers=LAYERS, tied=tied)
        optimizer = cases.wrap(model, include_embedding=True, include_lm_head=not tied)
        want = [
            sum(model.get_parameter(parameter).double().square().sum().item() for parameter in block.parameters)
            for block in optimizer.blocks
        ]
        assert optimizer._weights(range(len(want))).tolist() == pytest.approx(want, rel=1e-6)
        for rank in found:
            assert rank[index] == pytest.approx(want, rel=1e-6), (name, tied)
            assert rank[index] == found[0][index]


@pytest.mark.parametrize("name", ["tp2-zero2", "pp2-tp2"])
def test_importance_on_four_ranks_draws_what_a_plain_loop_draws(name):
    found = run_ranks(4, cases.under, name, STEPS)
    turns, norms = reference(found[0]["ranks"], STAGES if name == "pp2-tp2" else WHOLE)
    for run in found:
        assert run["active"] == by_step(turns)
        assert run["norms"] == pytest.approx(norms, rel=1e-4)
        assert run["norms"] == found[0]["norms"]


def test_importance_of_scaled_gradients_is_that_without_the_scale():
    """The loss scale of fp16 is no part of a norm."""
    (fp16,) = run_ranks(1, cases.under_fp16, STEPS)
    _, norms = reference(1)
    assert fp16 == pytest.approx(norms, rel=0.05)


def options(**more):
    return {"switch_mode": "importance", "switch_block_every": 2, "seed": 5, **more}


@pytest.mark.parametrize("by", ["gradient", "weight"])
@pytest.mark.parametrize("steps", [3, 9, 12])
def test_importance_state_goes_on_bit_for_bit(by, steps):
    """In the first epoch, in the middle of a block of the second, and between two epochs."""
    model = Net(dtype=torch.bfloat16)
    optimizer = wrap(model, **options(importance=by))
    train(model, optimizer, steps)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    active = []
    other = Net(dtype=torch.bfloat16)
    other.load_state_dict(state[0])
    resumed = wrap(other, **options(importance=by))
    resumed.load_state_dict(state[1])
    for step in range(steps, steps + 20):
        active.append(optimizer.schedule.active(step))
        assert resumed.schedule.active(step) == active[-1]
        train(model, optimizer, 1, start=step)
        train(other, resumed, 1, start=step)
    assert same(weights(other), weights(model))
    assert resumed.fingerprint() == optimizer.fingerprint()


def test_importance_fingerprint_tells_draws_apart():
    optimizers = [wrap(Net(), **options()) for _ in range(2)]
    for optimizer, norms in zip(optimizers, ([1.0, 1.0, 1.0], [1.0, 1.0, 1000.0]), strict=True):
        optimizer.num_steps = 6
        optimizer.importance.norms = norms
        optimizer.switch_if_due()
    assert optimizers[0].schedule.drawn != optimizers[1].schedule.drawn
    first, second = (optimizer.fingerprint() for optimizer in optimizers)
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_importance_is_agreed_upon_before_it_switches():
    optimizer = wrap(Net(), **options())
    optimizer.num_steps = 6
    seen = []
    assert optimizer.switch_if_due(lambda: seen.append((optimizer.schedule.drawn[0][0], optimizer.active_names())))
    assert seen == [(1, optimizer.active_names())]


def test_importance_resumes_only_where_an_order_was_drawn():
    model = Net()
    optimizer = wrap(model, **options())
    optimizer.resume_at(5)
    before = optimizer.active_names()
    with pytest.raises(ValueError, match="a step in epoch 2 of blocks 0 to 2, expected one in epoch 0"):
        optimizer.resume_at(12)
    assert (optimizer.num_steps, optimizer.active_names()) == (5, before)


def test_importance_without_gradients_draws_all_blocks_alike():
    """Norms of zero, and of a block that did not train, are probabilities like any other."""
    model = Net()
    optimizer = wrap(model, **options())
    for _ in range(12):
        optimizer.step()
    assert optimizer.importance.norms == [0.0, 0.0, 0.0]
    assert optimizer.schedule.drawn[0][0] == 2


def test_importance_forgets_norms_that_are_no_numbers():
    model = Net()
    optimizer = wrap(model, **options(switch_block_every=1))
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.inf) if param.requires_grad else None
    first = optimizer.schedule.active(0)[0]
    optimizer.step()
    assert optimizer.importance.norms[first] is None
    for _ in range(3):
        optimizer.step()


def test_importance_goes_through_checkpoints_to_any_mesh(tmp_path):
    folder, again = str(tmp_path / "saved"), str(tmp_path / "again")
    straight = run_ranks(2, cases.train_and_save, "zero2 x2", folder)[0]
    assert len(set(map(tuple, straight["active"]))) > 1
    assert run_ranks(2, cases.resume, "zero2 x2", folder)[0] == straight
    for mesh, ranks in (("tp2", 2), ("pp2", 2), ("1 rank", 1)):
        resumed = run_ranks(ranks, cases.resume, mesh, folder, again)[-1]
        assert resumed["active"] == straight["active"], mesh
        bound = test_checkpoints.PIPELINE if mesh == "pp2" else test_checkpoints.TOLERANCE
        assert resumed["losses"] == pytest.approx(straight["losses"], abs=bound)
        before, after = (test_checkpoints.tensors_of(Path(name, "optimizer")) for name in (folder, again))
        test_checkpoints.compare("importance", before, after)


@pytest.mark.parametrize("steps", [0, 7])
def test_importance_leaves_the_estimate_of_memory_as_it_is(steps):
    """It asks about blocks that are not drawn yet, and about ranges whose epochs end earlier than others'."""
    estimates = []
    for mode in ("importance", "random"):
        model = Net(layers=5)
        optimizer = wrap(model, **options(switch_mode=mode, block_ranges=[(0, 2), (2, 5)]))
        train(model, optimizer, steps)
        estimates.append(estimate(optimizer))
    assert estimates[0] == estimates[1]


def test_importance_notes_norms_without_waiting_for_the_device():
    """A step copies nothing to the host: of tensors on the meta device that would raise."""
    with torch.device("meta"):
        optimizer = wrap(Net(), **options())
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    with NoHostSync():
        for _ in range(2):
            optimizer.importance.note_local(optimizer.active_set.masters)
    assert optimizer.importance._squares.device.type == "meta"
    assert optimizer.importance._num_steps == 2
