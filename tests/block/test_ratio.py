"""The parameter-ratio form on one process and on every layout: against a plain loop and against badam."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import badam
import conformance_cases
import models
import plain_ratio
import pytest
import torch
from torch import Tensor, nn

from colossal_bcd import BlockOptimizer, BlockOptimizerRatio, compat, estimate
from colossal_bcd.block.ratio.selection import Selected, SelectedSpec, Selection
from colossal_bcd.booster import explain
from colossal_bcd.booster.casts.registry import cast
from colossal_bcd.sharding import Layout, Mesh, resolve
from colossal_bcd.sharding.regions import covers
from colossal_bcd.testing import live_bytes, storages

CPU = torch.device("cpu")
STEPS, PERIOD = 11, 3


class Net(nn.Module):
    """Shapes that no ratio divides, all different."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 11)
        self.second = nn.Linear(11, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(4, 7, generator=generator).double()).square().mean()


def made(model: nn.Module, **options: Any) -> BlockOptimizerRatio:
    defaults = {"update_ratio": 0.3, "switch_every": PERIOD, "preserve_threshold": 0, "lr": 1e-2, "verbose": 0}
    return BlockOptimizerRatio(
        [{"params": list(model.parameters())}], list(model.named_parameters()), **{**defaults, **options}
    )


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def places(optimizer: BlockOptimizerRatio, param: Tensor) -> Tensor:
    """What trains in the next step."""
    hyper = optimizer.hyper_of(optimizer.param_groups[0], optimizer.key_of(param))
    return hyper.selection(param.numel()).holds(torch.arange(param.numel())).nonzero().view(-1)


@pytest.mark.parametrize("mode", ["adjacent", "scatter"])
@pytest.mark.parametrize("dense", [False, True])
def test_ratio_equals_the_plain_rule(mode: Any, dense: bool) -> None:
    model, plain = Net().double(), Net().double()
    optimizer = made(model, mask_mode=mode, weight_decay=0.1, dense_gradients=dense, update_ratio=0.37)
    states: list[dict[str, Any]] = [{} for _ in plain.parameters()]
    for step in range(STEPS):
        if step % PERIOD == 0:
            states = [{} for _ in states]
        plain.zero_grad()
        loss_of(plain, step).backward()
        for param, ours, state in zip(plain.parameters(), model.parameters(), states, strict=True):
            chosen = places(optimizer, ours)
            if mode == "adjacent":
                window = plain_ratio.window(param.numel(), 0.37, step // PERIOD)
                assert set(chosen.tolist()) == set(window.tolist())
            assert len(chosen) == int(param.numel() * 0.37)
            assert param.grad is not None
            plain_ratio.ratio_adam(param.data, param.grad, chosen, state, lr=1e-2, decay=0.1)
        train(model, optimizer, range(step, step + 1))
        for param, ours in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours.detach(), param.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["adjacent", "scatter"])
def test_ratio_equals_badam(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where badam's form is well defined: another seed's permutation aside, which is given to it."""
    ours, theirs = Net().double(), Net().double()
    optimizer = made(ours, mask_mode=mode)
    options = {"update_ratio": 0.3, "switch_every": PERIOD, "preserve_threshold": 0, "lr": 1e-2, "mask_mode": mode}
    original = badam.BlockOptimizerRatio(
        [{"params": list(theirs.parameters())}], list(theirs.named_parameters()), **options,
        include_embedding=True, include_lm_head=True,
    )  # fmt: skip
    partner = dict(zip(theirs.parameters(), ours.parameters(), strict=True))

    def given(param: Tensor, ratio: float, offset: int) -> Tensor:
        index = torch.vstack(torch.unravel_index(places(optimizer, partner[param]), param.size()))
        return torch.sparse_coo_tensor(index, torch.ones(index.shape[1], dtype=param.dtype), param.shape)

    if mode == "scatter":
        monkeypatch.setattr(original, "_generate_mask_scatter", given)
    for step in range(STEPS):
        train(theirs, original, range(step, step + 1))
        train(ours, optimizer, range(step, step + 1))
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", range(len(conformance_cases.CASES)), ids=lambda i: str(conformance_cases.CASES[i]))
@pytest.mark.parametrize("mode", ["adjacent", "scatter"])
def test_ratio_trains_the_same_entries_on_every_layout(mode: Any, index: int) -> None:
    """Each rank of each mesh with its part, in float64; nothing is communicated, so one process plays all ranks."""
    case = conformance_cases.CASES[index]
    full = conformance_cases.initial(index)
    options: dict[str, Any] = {
        "update_ratio": 0.4, "switch_every": 2, "preserve_threshold": 3, "lr": 1e-2, "mask_mode": mode,
        "weight_decay": 0.1, "verbose": 0,
    }  # fmt: skip

    def optimizer_of(param: nn.Parameter) -> BlockOptimizerRatio:
        return BlockOptimizerRatio([param], [("name", param)], **options)

    def gradient(step: int) -> Tensor:
        return torch.randn(case.shape, generator=torch.Generator().manual_seed(step)).double()

    whole = nn.Parameter(full.clone())
    alone = optimizer_of(whole)
    for step in range(7):
        whole.grad = gradient(step)
        alone.step()
    mesh = Mesh({"tp": (), "zero": ()})
    for sizes in conformance_cases.MESHES:
        for tp_rank in range(sizes.tp):
            for zero_rank in range(sizes.zero):
                layout = case.layout(sizes, tp_rank, zero_rank)
                param = nn.Parameter(layout.shard(full))
                optimizer = optimizer_of(param)
                optimizer.bind({param: layout}, mesh)
                for step in range(7):
                    param.grad = layout.shard(gradient(step))
                    optimizer.step()
                want, data = layout.shard(whole.detach()), layout.num_local
                got = param.detach().view(-1)
                torch.testing.assert_close(got[:data], want.view(-1)[:data], rtol=0, atol=1e-12)
                assert not got[data:].any()


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("mode", ["adjacent", "scatter"])
def test_ratio_images_are_the_entries_of_the_slices(mode: Any, whole_rows: bool) -> None:
    """What engines reduce instead of gradients: each rank's row is what its own entries are."""
    for index, case in enumerate(conformance_cases.CASES):
        full = conformance_cases.initial(index)
        selection = Selection(full.numel(), max(full.numel() // 3, 1), full.numel() // 2, mode, "some")
        for sizes in (conformance_cases.Sizes(tp, zero) for tp in (1, 2) for zero in (1, 3)):
            for tp_rank in range(sizes.tp):
                total = 0
                for zero_rank in range(sizes.zero):
                    base = case.layout(sizes, tp_rank, 0)
                    shard = Layout(shape=base.shape, split=base.split)
                    layout = shard.sliced("zero", zero_rank, sizes.zero, whole_rows=whole_rows)
                    image = Selected(layout, selection, CPU)
                    flat = image.of(shard.shard(full))
                    want = Selected(layout, selection, CPU).take(layout.shard(full).view(-1)[: layout.num_local])
                    rows = image.rows(flat)
                    assert rows.shape == (sizes.zero, image.part_numel)
                    assert torch.equal(image.of_slice(rows[zero_rank], partitioned=True), want)
                    assert torch.equal(image.of_slice(flat, partitioned=False), want)
                    assert torch.equal(resolve([image.complete(want)], Mesh())[0], want)
                    total += len(want)
                    assert image.numel == len(flat)
                assert total == image.numel


def test_ratio_shares_cover_a_tensor_before_any_comes_again() -> None:
    for mode in ("adjacent", "scatter"):
        for numel in (1, 2, 3, 10, 64, 1000, 1025):
            count = max(numel // 5, 1)
            seen = torch.zeros(numel, dtype=torch.int64)
            for epoch in range(numel // count):
                selection = Selection(numel, count, epoch * count, mode, "7 layers.0")
                here = selection.holds(torch.arange(numel))
                assert int(here.sum()) == count
                seen += here
            assert int(seen.max()) == 1
            assert int(seen.sum()) == numel // count * count


def test_ratio_scatter_depends_on_seed_and_name_and_looks_random() -> None:
    numel, count = 40_000, 4_000

    def chosen(stream: str) -> Tensor:
        return Selection(numel, count, 0, "scatter", stream).holds(torch.arange(numel))

    first = chosen("0 a")
    assert torch.equal(first, chosen("0 a"))
    for other in ("0 b", "1 a"):
        # Shared by chance: 400 of 4000, within six standard deviations (19 each).
        assert abs(int((first & chosen(other)).sum()) - 400) < 6 * 19
    # In each of 100 rows 40 are expected, with a deviation of 6; next to each other are 400, within 20.
    assert int((first.view(100, 400).sum(1) - 40).abs().max()) < 6 * 6
    assert abs(int((first[1:] & first[:-1]).sum()) - 400) < 6 * 20


def test_ratio_masks_of_large_tensors_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, selection = Layout.whole((100, 3)), Selection(300, 77, 250, "scatter", "x")
    values = torch.arange(300)
    whole = Selected(layout, selection, CPU).take(values)
    monkeypatch.setattr("colossal_bcd.block.ratio.selection.CHUNK", 7)
    assert torch.equal(Selected(layout, selection, CPU).take(values), whole)


def test_ratio_counts_a_step_after_micro_batches_once() -> None:
    """badam moves the window with every micro-batch of the last step of a period."""
    whole, parts = Net().double(), Net().double()
    one, two = made(whole), made(parts)
    for step in range(2 * PERIOD + 1):
        (sum(loss_of(whole, 3 * step + i) for i in range(3)) / 3).backward()
        for i in range(3):
            (loss_of(parts, 3 * step + i) / 3).backward()
            assert all(param.grad is None for param in parts.parameters())
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-13)


def test_ratio_holds_gradients_and_moments_of_the_share_alone() -> None:
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False))
    optimizer = made(model, update_ratio=0.1)
    before = live_bytes()
    model(torch.randn(2, 256)).sum().backward()
    share = 2 * int(256 * 512 * 0.1)
    assert live_bytes() - before <= 4 * share + 1024
    optimizer.step()
    assert live_bytes() - before <= 8 * share + 1024
    assert sum(storages(dict(optimizer.state)).values()) == 8 * share


def test_ratio_keep_mask_keeps_places_between_steps_only_if_asked() -> None:
    kept, made_anew = Net().double(), Net().double()
    one, other = made(kept, mask_mode="scatter"), made(made_anew, mask_mode="scatter", keep_mask=False)
    train(kept, one, range(1))
    train(made_anew, other, range(1))
    assert one._cache
    assert not other._cache
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), made_anew.parameters(), strict=True))


def test_ratio_small_tensors_train_whole() -> None:
    """badam's threshold has no effect."""
    model = Net().double()
    before = [param.detach().clone() for param in model.parameters()]
    train(model, made(model, preserve_threshold=55), range(1))
    changed = [int((param != old).sum()) for param, old in zip(model.parameters(), before, strict=True)]
    assert changed == [int(77 * 0.3), 11, int(55 * 0.3)]


def test_ratio_one_trains_everything() -> None:
    """badam crashes."""
    model, whole = Net().double(), Net().double()
    train(model, made(model, update_ratio=1.0, switch_every=100, eps=0), range(5))
    train(whole, torch.optim.Adam(whole.parameters(), lr=1e-2, eps=0), range(5))
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-12)


def test_ratio_per_parameter_by_components_of_names() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleDict({str(i): nn.Linear(10, 10) for i in (1, 10)}), "b": nn.Linear(9, 9)})
    ratios = {"layers": 0.5, "layers.1": 0.2, "b.bias": 0}
    optimizer = made(model, param_update_ratios=ratios, update_ratio=0.4)
    counts = {name: len(places(optimizer, param)) for name, param in model.named_parameters()}
    assert counts == {
        "layers.1.weight": 20, "layers.1.bias": 2, "layers.10.weight": 50, "layers.10.bias": 5, "b.weight": 32,
        "b.bias": 0,
    }  # fmt: skip
    assert not model["b"].bias.requires_grad
    with pytest.raises(ValueError, match="'layers.2' matches no parameter"):
        made(model, param_update_ratios={"layers.2": 0.1})
    with pytest.raises(ValueError, match="number in"):
        made(model, param_update_ratios={"layers": 1.5})


@pytest.mark.parametrize(
    ("tied", "embedding", "head", "want"),
    [
        (False, False, False, (False, False)),
        (False, True, False, (True, False)),
        (False, False, True, (False, True)),
        (True, False, False, (False, False)),
        (True, False, True, (True, True)),
        (True, True, False, (True, True)),
    ],
)
def test_ratio_embedding_and_head_train_only_if_asked(
    tied: bool, embedding: bool, head: bool, want: tuple[bool, bool]
) -> None:
    """badam crashes where the two are tied."""
    model: Any = models.llama(tied=tied)
    named = list(model.named_parameters(remove_duplicate=False))
    optimizer = BlockOptimizerRatio(
        [{"params": list(model.parameters())}], named, include_embedding=embedding, include_lm_head=head
    )
    tokens = models.tokens(0)
    before = {name: param.detach().clone() for name, param in named}
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    changed = {name for name, param in named if not torch.equal(param, before[name])}
    assert ("model.embed_tokens.weight" in changed, "lm_head.weight" in changed) == want
    assert changed >= {name for name in before if "layers" in name}


def test_ratio_resumes_in_the_middle_of_a_period() -> None:
    model = Net().double()
    optimizer = made(model, mask_mode="scatter", seed=3)
    train(model, optimizer, range(PERIOD + 1))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(PERIOD + 1, STEPS))
    again = Net().double()
    other = made(again, mask_mode="scatter", seed=3)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(again, other, range(PERIOD + 1, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["adjacent", "scatter"])
def test_ratio_is_estimated_and_explained_between_backward_and_step(mode: Any) -> None:
    """Neither takes a gradient that waits for the step, and both know the parameter's own ratio."""
    model, untouched = Net().double(), Net().double()
    optimizer, other = (made(each, mask_mode=mode, param_update_ratios={"second": 0.5}) for each in (model, untouched))
    for each in (model, untouched):
        loss_of(each, 0).backward()
    share = 16 * (int(77 * 0.3) + int(11 * 0.3) + int(55 * 0.5))
    assert estimate(optimizer).state == share
    assert f" {16 * int(55 * 0.5)} " in explain(optimizer)
    optimizer.step()
    other.step()
    assert sum(storages(dict(optimizer.state)).values()) == share
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))


def test_ratio_code_of_the_page_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "ratio.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"model": nn.Linear(20, 20)}
    exec(code, names)
    before = names["model"].weight.detach().clone()
    names["model"](torch.ones(1, 20)).sum().backward()
    names["optimizer"].step()
    assert (names["model"].weight != before).view(-1).nonzero().view(-1).tolist() == list(range(40))


def test_ratio_arguments_in_the_original_order() -> None:
    model = Net().double()
    groups, named = [{"params": list(model.parameters())}], list(model.named_parameters())
    values = (0.3, 0, 5, 0, {"second": 0.5}, "scatter", 1e-2, (0.8, 0.9), 1e-7, {"eps": 1e-6}, False, True, True)
    ours = compat.BlockOptimizerRatio(groups, named, *values)
    group = ours.param_groups[0]
    assert (group["update_ratio"], group["switch_every"], group["betas"], group["eps"]) == (0.3, 5, (0.8, 0.9), 1e-6)
    assert not ours.keep_mask
    with pytest.raises(TypeError, match="'keep_masks'"):
        made(model, keep_masks=False)


def test_ratio_clips_by_the_norm_of_what_trains() -> None:
    model = Net().double()
    optimizer = made(model)
    loss_of(model, 0).backward()
    grads = [grad.clone() for grad in optimizer._given.values()]
    norm = optimizer.clip_grad_norm_(1e-3)
    want = torch.cat(grads).norm()
    torch.testing.assert_close(norm, want)
    for grad, old in zip(optimizer._given.values(), grads, strict=True):
        torch.testing.assert_close(grad, old * 1e-3 / (want + 1e-6))
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.clip_grad_norm_(1.0)


def test_ratio_updates_low_precision_in_float32() -> None:
    model = Net().bfloat16()
    optimizer = made(model)
    want = {name: param.detach().float() for name, param in model.named_parameters()}
    model(torch.ones(1, 7).bfloat16()).sum().backward()
    for key, (name, param) in enumerate(model.named_parameters()):
        grad = optimizer._given[key]
        assert grad.dtype == torch.float32
        chosen = places(optimizer, param)
        spread = torch.zeros(param.numel())
        spread[chosen] = grad
        plain_ratio.ratio_adam(want[name], spread, chosen, {}, lr=1e-2)
    optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param.detach(), want[name].bfloat16())


def test_ratio_schedulers_and_maximize() -> None:
    model = Net().double()
    optimizer = made(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(model, optimizer, range(1))
    scheduler.step()
    before = [param.detach().clone() for param in model.parameters()]
    train(model, optimizer, range(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    down, up = Net().double(), Net().double()
    start = [param.detach().clone() for param in up.parameters()]
    train(down, made(down), range(1))
    climbing = BlockOptimizerRatio(
        [{"params": list(up.parameters()), "maximize": True}], up.named_parameters(), 0.3, preserve_threshold=0, lr=1e-2
    )
    train(up, climbing, range(1))
    for a, b, old in zip(down.parameters(), up.parameters(), start, strict=True):
        torch.testing.assert_close(a - old, old - b)


def test_ratio_gradient_that_another_writes_is_noticed() -> None:
    model = Net().double()
    optimizer = made(model)
    loss_of(model, 0).backward()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    with pytest.raises(ValueError, match=r"first\.weight.*dense_gradients=True"):
        optimizer.step()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "ratio": ({"update_ratio": 1.1}, "update_ratio"),
    "period": ({"switch_every": 0}, "switch_every"),
    "mode": ({"mask_mode": "random"}, '"adjacent" or "scatter"'),
    "threshold": ({"preserve_threshold": -1}, "preserve_threshold"),
    "no value": ({"update_ratio": 0.05}, "'first.bias' is less than one"),
    "defaults": ({"optimizer_defaults": {"momentum": 0.9}}, "momentum"),
}


@pytest.mark.parametrize("case", WRONG)
def test_ratio_refuses_and_leaves_the_model(case: str) -> None:
    options, message = WRONG[case]
    model = Net()
    with pytest.raises(ValueError, match=message):
        made(model, **options)
    assert all(param.requires_grad and not param._post_accumulate_grad_hooks for param in model.parameters())


def test_ratio_refuses_unnamed_parameters_and_amsgrad() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"not in.*named_parameters_list"):
        BlockOptimizerRatio([{"params": list(model.parameters())}], list(model.named_parameters())[:1])
    groups = torch.optim.AdamW(model.parameters(), amsgrad=True).param_groups
    with pytest.raises(ValueError, match="amsgrad"):
        BlockOptimizerRatio(groups, list(model.named_parameters()))


def test_ratio_says_when_it_switches(caplog: pytest.LogCaptureFixture) -> None:
    model = Net().double()
    with caplog.at_level(logging.INFO):
        train(model, made(model, verbose=1), range(2 * PERIOD))
    assert [message for message in caplog.messages if "share" in message] == [
        f"step {step}: the next share of every tensor trains" for step in (PERIOD, 2 * PERIOD)
    ]


def theirs(model: nn.Module, **options: Any) -> Any:
    return badam.BlockOptimizerRatio(
        [{"params": list(model.parameters()), "lr": 3e-2}], list(model.named_parameters()), update_ratio=0.3,
        switch_every=PERIOD, include_embedding=True, include_lm_head=True, **options,
    )  # fmt: skip


def hooks(model: nn.Module) -> Iterator[int]:
    return (len(param._post_accumulate_grad_hooks or {}) for param in model.parameters())


def test_ratio_cast_from_badam_carries_everything(caplog: pytest.LogCaptureFixture) -> None:
    model, other = Net().double(), Net().double()
    original = theirs(model, preserve_threshold=20, param_update_ratios={"second": 0.5}, eps=1e-6, betas=(0.8, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(original, lambda step: 0.5)
    with caplog.at_level(logging.WARNING):
        ours = cast(original)
    assert isinstance(ours, BlockOptimizerRatio)
    assert "first.bias" in caplog.text
    assert ours.param_groups[0] is original.param_groups[0]
    assert list(hooks(model)) == [1, 1, 1]
    want = made(
        other, preserve_threshold=20, param_update_ratios={"second": 0.5}, eps=1e-6, betas=(0.8, 0.99), lr=1.5e-2
    )
    train(model, ours, range(STEPS))
    train(other, want, range(STEPS))
    scheduler.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-15)


def test_ratio_cast_of_a_trained_optimizer_is_refused() -> None:
    model = Net().double()
    original = theirs(model, preserve_threshold=0)
    train(model, original, range(1))
    with pytest.raises(ValueError, match="taken 1 steps"):
        cast(original)


def test_ratio_state_in_files_does_not_depend_on_the_slices() -> None:
    """Files number the entries by the selection, which all meshes share; slices and shards hold them as memory does."""
    values = torch.arange(30 * 8).double().view(30, 8)
    for mode, count in [("adjacent", 61), ("scatter", 61), ("scatter", 240)]:
        selection = Selection(240, count, 200 if count < 240 else 0, mode, "x")
        numbers = selection.numbers(torch.arange(240))
        want = torch.full((count,), -1.0).double()
        want[numbers[numbers < count]] = values.view(-1)[numbers < count]
        assert len(want.unique()) == count
        for dim, sections in [(None, None), (0, None), (0, (12, 12, 6)), (1, None)]:
            case = conformance_cases.Case(shape=(30, 8), dim=dim, sections=sections)
            for tp, zero in [(1, 1), (1, 3), (2, 1), (2, 2), (2, 7)]:
                sizes = conformance_cases.Sizes(tp, zero)
                whole = torch.full((count,), -1.0).double()
                cuts = []
                for rank in range(tp * zero):
                    layout = case.layout(sizes, rank // zero, rank % zero)
                    held = Selected(layout, selection, CPU).take(layout.shard(values).view(-1)[: layout.num_local])
                    cuts.append(SelectedSpec(kind="entries", shape=(len(held),), selection=selection).region(layout))
                    assert cuts[-1].shape == (count,)
                    assert torch.equal(cuts[-1].pick(want), held)
                    cuts[-1].fill(whole, cuts[-1].values(held))
                assert covers(cuts)
                assert torch.equal(whole, want)


def test_ratio_copy_goes_on_with_whole_gradients() -> None:
    model = Net().double()
    optimizer = made(model, mask_mode="scatter", param_update_ratios={"second": 0.5})
    train(model, optimizer, range(PERIOD + 1))
    again, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(PERIOD + 1, STEPS))
    train(again, other, range(PERIOD + 1, STEPS))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(param.grad is None for param in again.parameters())


def test_ratio_inside_blocks_trains_a_share_of_the_active_block() -> None:
    model: Any = models.llama()
    base = BlockOptimizerRatio(
        [{"params": list(model.parameters())}], list(model.named_parameters()), 0.25, switch_every=2, verbose=0, lr=1e-2
    )
    wrapped = BlockOptimizer(base, model.named_parameters(), switch_block_every=4, switch_mode="ascending", verbose=0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    tokens = models.tokens(0)
    for _ in range(4):
        model(input_ids=tokens, labels=tokens).loss.backward()
        wrapped.step()
    for name, param in model.named_parameters():
        # Two shares of a quarter; norms are below the threshold.
        want = 0.0 if "layers.0." not in name else 1.0 if "norm" in name else 0.5
        assert float((param.detach() != before[name]).float().mean()) == pytest.approx(want, abs=0.01), name
