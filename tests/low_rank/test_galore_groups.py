"""Param groups from names, and ColossalAI's GaLore calls with only the import changed."""

from __future__ import annotations

import inspect
import logging
import re
from types import SimpleNamespace
from typing import Any

import colossalai.nn.optimizer.galore as theirs
import galore_torch
import models
import pytest
import torch
from support.signs import signed_svd
from torch import nn

import colossal_bcd
from colossal_bcd import GaLoreAdamW, compat, param_groups
from colossal_bcd.booster.casts.registry import cast


def names_of(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [group["param_names"] for group in groups]


def projected(model: nn.Module, *args: Any, **options: Any) -> set[str]:
    group = param_groups(model, *args, **{"rank": 2, **options})[0]
    assert group["rank"] == 2
    return set(group["param_names"])


def deep(layers: int = 12) -> nn.Module:
    """`layers.1` and `layers.10` in one model, with an embedding that is tied to the head, a bias and a norm."""
    model = nn.Module()
    model.embed_tokens = nn.Embedding(9, 4)
    model.layers = nn.ModuleList(
        nn.ModuleDict({"q_proj": nn.Linear(4, 4), "up_proj": nn.Linear(4, 6, bias=False), "norm": nn.LayerNorm(4)})
        for _ in range(layers)
    )
    model.lm_head = nn.Linear(4, 9, bias=False)
    model.lm_head.weight = model.embed_tokens.weight
    return model


def test_param_groups_hold_every_trainable_parameter_once_with_its_name() -> None:
    model = deep()
    model.layers[3]["up_proj"].weight.requires_grad_(False)
    groups = param_groups(model, rank=2, update_proj_gap=7, scale=0.5, proj_type="left")
    by_name = dict(model.named_parameters())
    listed = [(name, param) for group in groups for name, param in
              zip(group["param_names"], group["params"], strict=True)]  # fmt: skip
    assert {name: param for name, param in by_name.items() if param.requires_grad} == dict(listed)
    assert len(listed) == len(by_name) - 1
    assert {key: groups[0][key] for key in ("rank", "update_proj_gap", "scale", "proj_type")} == {
        "rank": 2, "update_proj_gap": 7, "scale": 0.5, "proj_type": "left"
    }  # fmt: skip
    assert all(param.dim() >= 2 for param in groups[0]["params"])
    assert "embed_tokens.weight" in groups[1]["param_names"]
    assert "rank" not in groups[1]
    GaLoreAdamW(groups)


def test_param_groups_project_embedding_and_head_only_if_asked() -> None:
    tied, llama = deep(1), models.llama()
    matrices = {"layers.0.q_proj.weight", "layers.0.up_proj.weight"}
    assert projected(tied) == matrices
    for asked in ({"include_embedding": True}, {"include_lm_head": True}):
        assert projected(tied, **asked) == {*matrices, "embed_tokens.weight"}
    assert projected(tied, "lm_head") == {"embed_tokens.weight"}
    layers = {name for name, param in llama.named_parameters() if param.dim() == 2 and "layers" in name}
    assert projected(llama) == layers
    assert projected(llama, include_lm_head=True) - layers == {"lm_head.weight"}
    assert projected(llama, include_embedding=True) - layers == {"model.embed_tokens.weight"}


def test_param_groups_find_an_embedding_by_its_type() -> None:
    model = nn.ModuleDict({"places": nn.Embedding(8, 4), "linear": nn.Linear(4, 4)})
    assert projected(model) == {"linear.weight"}


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        ("layers.1", {"layers.1.q_proj.weight", "layers.1.up_proj.weight"}),
        ("layers.1.", {"layers.1.q_proj.weight", "layers.1.up_proj.weight"}),
        ("1.q_proj", {"layers.1.q_proj.weight"}),
        (["layers.1.q_proj", "layers.11.up_proj"], {"layers.1.q_proj.weight", "layers.11.up_proj.weight"}),
        (r"layers\.1\d\.q_proj", {"layers.10.q_proj.weight", "layers.11.q_proj.weight"}),
        (re.compile(r"layers.1.up_proj.weight"), {"layers.1.up_proj.weight"}),
        ("q_proj", {f"layers.{layer}.q_proj.weight" for layer in range(12)}),
    ],
)
def test_param_groups_match_whole_components_or_whole_names(pattern: Any, want: set[str]) -> None:
    assert projected(deep(), pattern) == want


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer.1", r"'layer\.1' matches no parameter; closest names are .*layers\.1"),
        ("q_pro", r"matches no parameter; closest names are .*q_proj"),
        (["q_proj", "no_such"], "'no_such' matches no parameter"),
        (r"layers\.\d", r"matches no parameter"),
        ("norm", "fewer than two dims only"),
        ("up_proj", "frozen parameters only"),
    ],
)
def test_param_groups_refuse_patterns_that_find_no_matrix(pattern: Any, message: str) -> None:
    model = deep()
    for layer in model.layers:
        layer["up_proj"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        param_groups(model, pattern, rank=2)


def test_param_groups_refuse_what_cannot_be_projected() -> None:
    with pytest.raises(ValueError, match=r"rank=5 for parameter layers\.0\.q_proj\.weight of shape \(4, 4\)"):
        param_groups(deep(1), rank=5)
    assert param_groups(deep(1), rank=5, clamp=True)[0]["clamp"]
    with pytest.raises(TypeError, match="target_modules: got 3"):
        param_groups(deep(1), [3], rank=2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="has no trainable tensor of two or more dims besides embeddings"):
        param_groups(nn.LayerNorm(4), rank=2)
    with pytest.raises(ValueError, match="include_lm_head=True together with target_modules"):
        param_groups(deep(1), "q_proj", rank=2, include_lm_head=True)
    with pytest.raises(ValueError, match="proj_type"):
        param_groups(deep(1), rank=2, proj_type="diagonal")  # type: ignore[arg-type]


def test_param_groups_log_one_line_with_the_bytes_of_state(caplog: pytest.LogCaptureFixture) -> None:
    model = deep(2)
    with caplog.at_level(logging.INFO, "colossal_bcd"):
        groups = param_groups(model, rank=2)
    assert len(caplog.messages) == 1
    ours, plain = (GaLoreAdamW(groups), torch.optim.AdamW(model.parameters()))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    ours.step()
    plain.step()
    held = sum(v.nbytes for state in ours.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    # torch counts its step in a tensor.
    usual = sum(v.nbytes for state in plain.state.values() for name, v in state.items() if name != "step")
    matrices = sum(param.numel() for param in groups[0]["params"])
    total = sum(param.numel() for param in model.parameters())
    assert caplog.messages[0] == (
        f"param_groups: 4 matrices with {matrices} of {total} parameters are projected to rank 2; 7 tensors, 6 of them "
        f"of fewer than two dims, are not; GaLoreAdamW's state is {held} bytes, AdamW's {usual}"
    )


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_get_galore_param_groups_are_colossalais(kind: str) -> None:
    model = (
        models.llama() if kind == "llama" else nn.ModuleDict({"dense": nn.Linear(3, 3), "LayerNorm": nn.LayerNorm(3)})
    )
    ours = compat.get_galore_param_groups(model, 0.1, 8, 5, 0.5, "reverse_std")
    original = theirs.get_galore_param_groups(model, 0.1, 8, 5, 0.5, "reverse_std")
    assert len(ours) == sum(bool(group["params"]) for group in original)
    for mine, group in zip(ours, (group for group in original if group["params"]), strict=True):
        assert all(a is b for a, b in zip(mine.pop("params"), group.pop("params"), strict=True))
        mine.pop("param_names")
        assert mine.pop("clamp", True)
        assert mine == group


def test_get_galore_param_groups_take_the_tutorials_keyword() -> None:
    model = nn.Linear(3, 3)
    for options in ({"decay": 0.2}, {"weight_decay": 0.2}):
        assert compat.get_galore_param_groups(model, rank=2, **options)[0]["weight_decay"] == 0.2
    for options in ({}, {"decay": 0.1, "weight_decay": 0.1}):
        with pytest.raises(TypeError, match="expected exactly one of them"):
            compat.get_galore_param_groups(model, **options)


def test_compat_galore_has_colossalais_signature() -> None:
    original = inspect.signature(theirs.GaLoreAdamW8bit.__init__).parameters
    ours = inspect.signature(compat.DistGaloreAwamW.__init__).parameters
    assert list(ours) == list(original)
    assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in original.items()}


def test_compat_galore_keeps_8_bits_from_a_size_on() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(8, 8))

    def groups() -> list[dict[str, Any]]:
        return compat.get_galore_param_groups(model, decay=1e-2, rank=8)

    optimizer = compat.DistGaloreAwamW(groups(), lr=1e-2, min_8bit_size=512)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    dtypes = [optimizer.state[param]["exp_avg_sq"].dtype for param in model.parameters()]
    assert dtypes == [torch.uint8, torch.float32, torch.float32, torch.float32]
    exact = compat.DistGaloreAwamW(groups(), nbits=32, min_8bit_size=0)
    assert exact.param_groups[0]["state_bits"] == 32
    args = SimpleNamespace(optim_bits=32, min_8bit_size=7)
    assert compat.DistGaloreAwamW(groups(), args=args).param_groups[0]["min_8bit_size"] == 7
    assert compat.DistGaloreAwamW(groups(), args={"optim_bits": 32}).param_groups[0]["state_bits"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile_clipping": 99}, "DistGaloreAwamW: got percentile_clipping=99.*max_norm"),
        ({"block_wise": False}, "block_wise=False.*nbits=32"),
        ({"is_paged": True}, "is_paged=True.*cpu_offload=True"),
        ({"nbits": 4}, "nbits=4, expected 8 or 32"),
        ({"args": {"percentile_clipping": 5}}, "percentile_clipping=5"),
        ({"min_8bit_size": -1}, "min_8bit_size"),
    ],
)
def test_compat_galore_refuses_what_it_cannot_honour(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compat.DistGaloreAwamW([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2}], **options)


GALORE = [
    "GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreSGD", "GaLoreAdafactor",
    "GoLoreAdamW", "GoLoreAdamW8bit", "GoLoreSGD", "GoLoreAdafactor",
]  # fmt: skip


@pytest.mark.parametrize("name", [*GALORE, "DistGaloreAwamW"])
def test_nothing_projected_at_all_is_an_error(name: str) -> None:
    """It was AdamW without a word, with AdamW's memory."""
    cls: Any = getattr(colossal_bcd, name, None) or getattr(compat, name)
    options: dict[str, Any] = {"total_steps": 10} if name.startswith("GoLore") else {}
    matrix, vector = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    for groups in ([matrix], [{"params": [matrix]}, {"params": [vector], "scale": 0.5}]):
        with pytest.raises(ValueError, match=rf"{name}: no param group has a rank, .* none of the \d parameters"):
            cls(groups, **options)
    cls([{"params": [vector]}, {"params": [matrix], "rank": 2}], **options)


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdafactor"])
def test_cast_of_galore_without_a_rank_is_an_error(name: str) -> None:
    source = getattr(galore_torch, name)([nn.Parameter(torch.ones(4, 4))], lr=1e-3, **RELATIVE.get(name, {}))
    with pytest.raises(ValueError, match="no param group has a rank"):
        cast(source)


RELATIVE: dict[str, dict[str, Any]] = {"GaLoreAdafactor": {"relative_step": False}}


@pytest.mark.parametrize("shape", [(3, 3), (1, 64), (64, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdafactor"])
def test_cast_of_a_rank_above_a_side_is_galore_torch(
    name: str, shape: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """galore_torch takes as many singular vectors as there are; it is said in one line for a group."""
    hyper = {"lr": 1e-2, **RELATIVE.get(name, {})}
    projection = {"rank": 4, "update_proj_gap": 2, "scale": 0.5, "proj_type": "std"}
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for _ in range(2))
    original = getattr(galore_torch, name)([{"params": [theirs], **projection}], **hyper)
    source = getattr(galore_torch, name)([{"params": [mine], **projection}], **hyper)
    with caplog.at_level(logging.INFO, "colossal_bcd"):
        ours = cast(source)
    assert caplog.text.count("1 of the 1 parameters of a group with rank=4 have a side below it") == 1
    for step in range(5):
        for param in (mine, theirs):
            param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        with signed_svd():
            original.step()
        ours.step()
        # float32: a step of 1e-2 in fewer than 64 operations, five times; Adafactor divides by means of squares.
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=0, atol=(step + 1) * 64 * 2**-24)


def test_param_groups_is_exported() -> None:
    assert colossal_bcd.param_groups is param_groups
