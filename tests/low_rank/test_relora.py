"""GoLore's ReLoRA form on one process: against a plain loop, against GoLore, and where it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import plain_relora
import pytest
import torch
from torch import Tensor, nn

from colossal_bcd import AdamW, BlockOptimizer, GoLoreAdamW
from colossal_bcd.compat import ReLoRaLinear, ReLoRaModel

GAP, STEPS, RANK, SCALE = 3, 11, 2, 0.7


class Net(nn.Module):
    """A left (5 x 7), a right (9 x 5) and a square layer, and one that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 9, bias=False), nn.Tanh())
        self.mlp = nn.Linear(9, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(self.attn(x)))


NAMES = ("attn.0", "attn.2", "mlp")


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 7, generator=generator).double(), torch.randn(6, 3, generator=generator).double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return (model(x) - y).square().mean()


def wrapped(**options: Any) -> ReLoRaModel:
    defaults = {"r": RANK, "scale": SCALE, "lora_dropout": 0, "target_modules": ["attn", "mlp"]}
    return ReLoRaModel(Net().double(), **{**defaults, **options})


def layer(model: ReLoRaModel, name: str) -> ReLoRaLinear:
    found = model.wrapped_model.get_submodule(name)
    assert isinstance(found, ReLoRaLinear)
    return found


def train(model: ReLoRaModel, optimizer: Any, steps: range, random_from: int) -> list[float]:
    losses = []
    for step in steps:
        model._config.forward_type = step % GAP == 0
        loss = loss_of(model, step)
        loss.backward()
        if step % GAP == 0:
            model.merge_and_reinit(optimizer, step >= random_from)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def effective(model: ReLoRaModel) -> dict[str, Tensor]:
    return {name: layer(model, name).merged_weight() for name in NAMES}


def plain(update: Any, random_from: int, steps: int = STEPS) -> dict[str, Tensor]:
    """Weights after the rule; the random bases are those that `ReLoRaModel` draws."""
    net = Net().double()
    sides = {name: plain_relora.PlainReLoRA(net.get_parameter(f"{name}.weight").data, RANK, SCALE) for name in NAMES}
    others = {name: {} for name, _ in net.named_parameters() if name.removesuffix(".weight") not in NAMES}
    for step in range(steps):
        for name, side in sides.items():
            net.get_parameter(f"{name}.weight").data = side.effective
        net.zero_grad()
        loss_of(net, step).backward()
        for name, side in sides.items():
            grad = net.get_parameter(f"{name}.weight").grad
            assert grad is not None
            if step % GAP == 0:
                side.refresh(grad, drawn(name, step // GAP + 1) if step >= random_from else None)
            side.step(grad, update)
        for name, state in others.items():
            param = net.get_parameter(name)
            update(param.data, param.grad, state)
    return {name: side.effective for name, side in sides.items()}


def drawn(name: str, number: int) -> Tensor:
    """The basis of a layer's refresh, from a model that does nothing but refresh."""
    model = wrapped()
    model._config.forward_type = True
    for _ in range(number):
        model.zero_grad()
        loss_of(model, 0).backward()
        model.merge_and_reinit(None, True)
    return layer(model, name).basis.weight.detach().clone()


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "torch-adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, plain_relora.adamw),
    "adamw": (AdamW, {"lr": 1e-2, "weight_decay": 0.1}, plain_relora.adamw),
    "torch-sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}, plain_relora.sgd),
}


@pytest.mark.parametrize("random_from", [0, 2 * GAP, STEPS], ids=["random", "late", "singular"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_relora_equals_the_plain_rule(optimizer: str, random_from: int) -> None:
    cls, options, update = OPTIMIZERS[optimizer]
    model = wrapped()
    train(model, cls(model.parameters(), **options), range(STEPS), random_from)
    want = plain(update, random_from)
    for name, weight in effective(model).items():
        torch.testing.assert_close(weight, want[name], rtol=0, atol=1e-12)
    assert layer(model, "attn.2").right
    assert layer(model, "mlp").right
    assert not layer(model, "attn.0").right


def test_relora_refresh_changes_no_function_and_leaves_second_moments() -> None:
    model = wrapped()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(GAP), 0)
    before, weights = loss_of(model, 6).item(), effective(model)
    model._config.forward_type = True
    loss_of(model, 5).backward()
    second = {name: optimizer.state[layer(model, name).trained]["exp_avg_sq"].clone() for name in NAMES}
    count = optimizer.state[layer(model, "mlp").trained]["step"]
    model.merge_and_reinit(optimizer, False)
    assert loss_of(model, 6).item() == pytest.approx(before, abs=1e-14)
    for name in NAMES:
        torch.testing.assert_close(layer(model, name).weight.detach(), weights[name], rtol=0, atol=1e-15)
        assert not layer(model, name).trained.any()
        state = optimizer.state[layer(model, name).trained]
        assert torch.equal(state["exp_avg_sq"], second[name])
        assert state["step"] == count


def test_relora_with_adam_is_golore() -> None:
    """Adam does not see the factor s of the gradient where eps is 0, so that the step on W is s lr long."""
    model = wrapped()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=0, weight_decay=0), range(STEPS), STEPS)
    net = Net().double()
    matrices = [net.get_parameter(f"{name}.weight") for name in NAMES]
    others = [param for param in net.parameters() if all(param is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "rank": RANK, "update_proj_gap": GAP, "scale": SCALE}, {"params": others}]
    optimizer = GoLoreAdamW(groups, lr=1e-2, eps=0, random_from_step=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
    for name, weight in effective(model).items():
        torch.testing.assert_close(weight, net.get_parameter(f"{name}.weight").detach(), rtol=0, atol=1e-9)


def test_relora_with_sgd_is_galore_with_a_step_of_s_squared() -> None:
    model, lr = wrapped(), 0.3
    train(model, torch.optim.SGD(model.parameters(), lr=lr), range(STEPS), STEPS)
    net = Net().double()
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(STEPS):
        net.zero_grad()
        loss_of(net, step).backward()
        for name, param in net.named_parameters():
            assert param.grad is not None
            grad, scale = param.grad, 1.0
            if name.removesuffix(".weight") in NAMES:
                if step % GAP == 0:
                    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
                    bases[name] = u[:, :RANK], vh[:RANK].T
                left, right = bases[name]
                rows, columns = param.shape
                grad = grad @ right @ right.T if rows >= columns else left @ left.T @ grad
                scale = SCALE**2
            param.data -= lr * scale * grad
    for name, weight in effective(model).items():
        torch.testing.assert_close(weight, net.get_parameter(f"{name}.weight").detach(), rtol=0, atol=1e-12)


def test_relora_bases_are_orthonormal_functions_of_seed_name_and_refresh() -> None:
    first, again, other = wrapped(seed=1), wrapped(seed=1), wrapped(seed=2)
    seen = []
    for model in (first, again, other):
        model._config.forward_type = True
        torch.manual_seed(len(seen))  # a global generator has no say
        for _ in range(2):
            model.zero_grad()
            loss_of(model, 0).backward()
            model.merge_and_reinit(None, True)
            seen.append(layer(model, "mlp").basis.weight.detach().clone())
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[4])
    assert not torch.allclose(layer(first, "attn.2").basis.weight, seen[1][:, :5])
    torch.testing.assert_close(seen[0] @ seen[0].T, torch.eye(RANK).double(), rtol=0, atol=1e-14)
    assert int(first.num_refreshes) == 2


def test_relora_trains_before_its_first_refresh() -> None:
    """The original's factors are both zero until then, so that nothing in these layers would train."""
    model = wrapped()
    before = effective(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    optimizer.step()
    assert all(not torch.equal(weight, before[name]) for name, weight in effective(model).items())


def test_relora_collects_full_gradients_over_micro_batches() -> None:
    model, net = wrapped(), Net().double()
    model._config.forward_type = True
    for step in range(3):
        (loss_of(model, step) / 3).backward()
        (loss_of(net, step) / 3).backward()
    for name in NAMES:
        want = net.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(layer(model, name).full_gradient, want, rtol=0, atol=1e-15)
    assert all(layer(model, name).weight.grad is None for name in NAMES)


def test_relora_warns_of_micro_batches_that_a_refresh_drops() -> None:
    model = wrapped()
    loss_of(model, 0).backward()
    model._config.forward_type = True
    with pytest.warns(UserWarning, match="every micro-batch"):
        loss_of(model, 1).backward()


def test_relora_forgets_a_full_gradient_that_was_not_used() -> None:
    model = wrapped()
    model._config.forward_type = True
    loss_of(model, 0).backward()
    model._config.forward_type = False
    loss_of(model, 1).backward()
    assert layer(model, "mlp").full_gradient is None
    with pytest.raises(ValueError, match="forward_type = True"):
        model.merge_and_reinit(None)


def test_relora_evaluation_collects_nothing() -> None:
    model = wrapped().eval()
    model._config.forward_type = True
    with torch.no_grad():
        loss_of(model, 0)
    assert layer(model, "mlp")._leaf is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_relora_full_gradient_is_that_without_checkpointing(reentrant: bool) -> None:
    model, batch_ = ReLoRaModel(models.llama(), r=4, lora_dropout=0), models.tokens(0)
    model._config.forward_type = True
    model(input_ids=batch_, labels=batch_).loss.backward()
    want = {name: module.full_gradient for name, module in model.layers()}
    llama: Any = model.wrapped_model
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    llama.enable_input_require_grads()
    model.zero_grad()
    for _, module in model.layers():
        module.drop_gradient()
    model.train()
    model(input_ids=batch_, labels=batch_).loss.backward()
    for name, module in model.layers():
        torch.testing.assert_close(module.full_gradient, want[name])


def test_relora_optimizer_may_be_wrapped_as_accelerate_does() -> None:
    class Accelerated(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    results = []
    for outside in (False, True):
        model = wrapped()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(2 * GAP):
            model._config.forward_type = step % GAP == 0
            loss_of(model, step).backward()
            if step % GAP == 0:
                model.merge_and_reinit(Accelerated(optimizer) if outside else optimizer)
            optimizer.step()
            optimizer.zero_grad()
        results.append(effective(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in NAMES)


def test_relora_carries_8_bit_moments_over() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Tanh(), nn.Linear(96, 40, bias=False))
    model = ReLoRaModel(net, r=8, scale=1.0, lora_dropout=0, target_modules=["0", "2"])
    optimizer = AdamW(model.parameters(), lr=1e-3, moment_bits=8)
    from colossal_bcd.optim.state.quantized import dequantize

    def moments() -> dict[str, Tensor]:
        states = {name: optimizer.state[module.trained] for name, module in model.layers()}
        return {
            name: dequantize(state["exp_avg"].view(-1), state["exp_avg_absmax"]).view(state["exp_avg"].shape)
            for name, state in states.items()
        }

    model._config.forward_type = True
    for step in range(2):
        model(torch.randn(16, 64)).square().mean().backward()
        if step == 1:
            before, old = moments(), {name: module.basis.weight.detach().clone() for name, module in model.layers()}
            with torch.no_grad():
                model.merge_and_reinit(optimizer, True)
            after = moments()
            for name, module in model.layers():
                new = module.basis.weight
                right = before[name] @ (old[name] @ new.T) if module.right else None
                want = right if right is not None else (new.T @ old[name]) @ before[name]
                # Codes of a sign and 7 bits are within 1/64 of the largest value of their block.
                assert (after[name] - want).abs().max() <= want.abs().max() / 64
        else:
            model.merge_and_reinit(optimizer, True)
        optimizer.step()
        optimizer.zero_grad()


def up_proj(model: ReLoRaModel) -> ReLoRaLinear:
    return dict(model.layers())["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relora_inside_blocks_refreshes_the_active_layer_alone(dtype: torch.dtype) -> None:
    model = ReLoRaModel(models.llama(layers=2).to(dtype), r=4, lora_dropout=0)
    optimizer = BlockOptimizer(
        AdamW(model.parameters(), lr=1e-2), model.named_parameters(), switch_block_every=4, switch_mode="ascending"
    )
    before = {name: module.basis.weight.detach().clone() for name, module in model.layers()}
    model._config.forward_type = True
    for step in range(2):
        tokens = models.tokens(step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        if step == 1:
            factor = up_proj(model)
            state = optimizer.state[optimizer.active_set.masters[factor.trained]]
            moment, old = state["exp_avg"].clone(), factor.basis.weight.detach().clone()
        model.merge_and_reinit(optimizer)
        if step == 1:
            want = moment @ (old.float() @ factor.basis.weight.float().T)
            torch.testing.assert_close(state["exp_avg"], want, rtol=1e-5, atol=1e-9)
        optimizer.step()
    # From zero, its master too, one step of AdamW.
    first, second = state["exp_avg"] / (1 - 0.9**2), state["exp_avg_sq"] / (1 - 0.999**2)
    want = (-1e-2 * first / (second.sqrt() + 1e-8)).to(dtype)
    torch.testing.assert_close(up_proj(model).trained.detach(), want, rtol=2**-7, atol=1e-7)
    for name, module in model.layers():
        assert torch.equal(module.basis.weight, before[name]) == ("layers.1." in name)


def test_relora_of_a_gradient_that_is_not_finite_keeps_its_basis() -> None:
    model = wrapped()
    old = layer(model, "mlp").basis.weight.detach().clone()
    model._config.forward_type = True
    (loss_of(model, 0) * torch.nan).backward()
    model.merge_and_reinit(None)
    assert torch.equal(layer(model, "mlp").basis.weight, old)


def test_relora_state_dict_resumes_exactly() -> None:
    def make() -> tuple[ReLoRaModel, AdamW]:
        model = wrapped()
        return model, AdamW(model.parameters(), lr=1e-2)

    model, optimizer = make()
    train(model, optimizer, range(5), 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    want = train(model, optimizer, range(5, STEPS), 3)
    again, other = make()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert train(again, other, range(5, STEPS), 3) == want


@pytest.mark.parametrize("tied", [False, True])
def test_relora_save_pretrained_and_back(tied: bool, tmp_path: Path) -> None:
    model = ReLoRaModel(models.llama(tied=tied), r=4, scale=2.0, lora_dropout=0, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = models.tokens(0)
    model._config.forward_type = True
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.merge_and_reinit(optimizer)
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = ReLoRaModel.from_pretrained(tmp_path)
    llama: Any = again.wrapped_model
    llama.config._attn_implementation = "eager"  # a choice of the process, which no folder keeps
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert int(again.num_refreshes) == 1
    assert (again._config.r, again._config.scale, again._config.seed) == (4, 2.0, 3)
    assert not again._config.forward_type
    for one in (model, again):
        one._config.forward_type = True
        one.zero_grad()
        one(input_ids=tokens, labels=tokens).loss.backward()
        one.merge_and_reinit(None, True)
    for (name, ours), (_, theirs) in zip(model.layers(), again.layers(), strict=True):
        assert torch.equal(ours.basis.weight, theirs.basis.weight), name


def test_relora_from_a_folder_with_other_weights_says_so(tmp_path: Path) -> None:
    model = ReLoRaModel(models.llama(), r=4)
    model.save_pretrained(tmp_path)
    models.llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack .*lora_A"):
        ReLoRaModel.from_pretrained(tmp_path)


def test_relora_unload_gives_a_plain_model_of_the_same_function() -> None:
    model = wrapped()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(5), 0)
    want = loss_of(model, 0).item()
    net = model.merge_and_unload()
    assert not any(isinstance(module, ReLoRaLinear) for module in net.modules())
    assert loss_of(net, 0).item() == pytest.approx(want, abs=1e-14)
    assert set(net.state_dict()) == set(Net().state_dict())


def test_relora_without_original_weights_starts_at_zero() -> None:
    model = wrapped(keep_original_weights=False)
    assert not any(layer(model, name).weight.any() for name in NAMES)
    bias = layer(model, "mlp").bias
    assert bias is not None
    assert not bias.any()


def test_relora_dropout_is_on_the_low_rank_branch() -> None:
    model = wrapped(lora_dropout=0.5)
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), range(2), 0)
    x, _ = batch(0)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_relora_names_are_parts_that_cut_no_number() -> None:
    net = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("layers1", "layers10", "out")})
    model = ReLoRaModel(net, r=2, target_modules=["layers1"])
    assert [name for name, _ in model.layers()] == ["layers1"]


def test_relora_layer_that_is_used_twice_is_one_layer() -> None:
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": shared})
    model = ReLoRaModel(net, r=2, target_modules=["a", "b"])
    assert net["a"] is net["b"]
    assert len(model.layers()) == 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank zero": ({"r": 0}, "use the model as it is"),
    "rank of no integer": ({"r": 2.5}, "a positive integer"),
    "rank too large": ({"r": 6}, r"layer 'attn.0': got r=6 .* 5 x 7"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout"),
    "scale": ({"scale": 0}, "scale"),
    "lora_only": ({"lora_only": True}, "Set lora_only=False"),
    "4bit": ({"quantize": "4bit"}, "quantize=None"),
    "8bit": ({"quantize": "8bit", "use_double_quant": True}, "quantize=None"),
    "no layer": ({"target_modules": ["q_proj"]}, "no linear layer has such a part.*attn.0"),
    "no part": ({"target_modules": []}, "at least one part"),
}


@pytest.mark.parametrize("case", WRONG)
def test_relora_refuses_and_leaves_the_model(case: str) -> None:
    options, message = WRONG[case]
    net = Net().double()
    before = [(name, type(module)) for name, module in net.named_modules()]
    with pytest.raises(ValueError, match=message):
        ReLoRaModel(net, **{"r": RANK, "target_modules": ["attn", "mlp"], **options})
    assert [(name, type(module)) for name, module in net.named_modules()] == before
    assert all(param.requires_grad for param in net.parameters())


def test_relora_refuses_shared_weights_and_other_layers() -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="Wrap once"):
        ReLoRaModel(model, r=1, target_modules="mlp")
    tied = models.llama(tied=True)
    with pytest.raises(ValueError, match="shares its weight"):
        ReLoRaModel(tied, r=2, target_modules=["lm_head"])

    class Special(nn.Linear):
        pass

    with pytest.raises(ValueError, match="is a Special"):
        ReLoRaModel(nn.Sequential(Special(4, 4)), r=2, target_modules="0")


def test_relora_refresh_refuses_an_optimizer_that_does_not_train_the_factors() -> None:
    net = Net().double()
    early = torch.optim.SGD(net.parameters(), lr=0.1)
    model = ReLoRaModel(net, r=RANK, target_modules=["mlp"])
    model._config.forward_type = True
    loss_of(model, 0).backward()
    weight = layer(model, "mlp").weight.detach().clone()
    with pytest.raises(ValueError, match=r"does not train mlp\.lora_A\.weight"):
        model.merge_and_reinit(early)
    with pytest.raises(TypeError, match="got a int"):
        model.merge_and_reinit(3)
    assert torch.equal(layer(model, "mlp").weight, weight)
    assert layer(model, "mlp").full_gradient is not None
    for param in model.parameters():
        param.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        model.merge_and_reinit(early)


def test_relora_refresh_refuses_moments_of_bitsandbytes() -> None:
    import bitsandbytes

    model = wrapped()
    optimizer = bitsandbytes.optim.AdamW(model.parameters(), lr=1e-3)
    model._config.forward_type = True
    loss_of(model, 0).backward()
    optimizer.state[layer(model, "mlp").trained]["state1"] = torch.zeros(1)
    with pytest.raises(ValueError, match="moment_bits=8"):
        model.merge_and_reinit(optimizer)


def test_relora_layer_alone_and_its_options() -> None:
    made = ReLoRaLinear(4, 6, 2, lora_dropout=0, bias=False, dtype=torch.float64)
    assert made.bias is None
    assert made.weight.shape == (6, 4)
    assert made.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="lora_only"):
        ReLoRaLinear(4, 6, 2, lora_only=True)
    with pytest.raises(ValueError, match="quantize"):
        ReLoRaLinear(4, 6, 2, quantize="8bit")
