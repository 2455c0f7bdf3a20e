"""A linear layer of weight W_eff = W - s A B: GoLore in the form of ReLoRA (He et al., arXiv 2410.11289, section 5).

out, in: shape of a layer's weight W; q: rank.  A is [out, q], B is [q, in].  Where out >= in the rows of B are a basis
and A is trained, else the columns of A are and B is trained.  W itself is trained through merges only, so that neither
masters nor optimizer states of it exist.
"""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from colossal_bcd.low_rank.projector import random_bases
from colossal_bcd.optim.options import require
from colossal_bcd.sharding import wide

Quantize = Literal["4bit", "8bit"]


@dataclass
class ReLoRaConfig:
    """What a `ReLoRaModel` was made with, and `forward_type`, which a training loop writes."""

    r: int
    lora_dropout: float
    target_modules: list[str]
    keep_original_weights: bool = True
    lora_only: bool = False
    scale: float = 1.0
    quantize: Quantize | None = None
    use_double_quant: bool = False
    seed: int = 0
    forward_type: bool = False
    """Whether backward also collects the full gradients, of which `merge_and_reinit` makes the next bases."""

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        self.target_modules = list(self.target_modules)
        is_int = isinstance(self.r, int) and not isinstance(self.r, bool)
        require(is_int and self.r >= 1, "r", self.r, "a positive integer; for no low rank use the model as it is")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a probability in [0, 1)")
        require(self.scale > 0, "scale", self.scale, "a positive number")
        require(bool(self.target_modules), "target_modules", self.target_modules, "at least one part of a module name")
        refuse_unsupported(self.lora_only, self.quantize)


def refuse_unsupported(lora_only: bool, quantize: Any) -> None:
    """Refuse what a merge into full-precision weights cannot do: `lora_only`, and quantized weights."""
    if lora_only:
        raise ValueError(
            "lora_only=True: got a request to drop the full weights, expected False: without them there is no full "
            "gradient to make bases of and nothing to merge into. Set lora_only=False."
        )
    if quantize is not None and quantize is not False:
        raise ValueError(
            f"quantize={quantize!r}: expected None: a merge into quantized weights would lose most of what was learnt. "
            "Load the model in bfloat16 and set quantize=None; colossal_bcd.AdamW(moment_bits=8) makes states smaller."
        )


class ReLoRaLinear(nn.Module):
    """A linear layer whose weight is W - s A B.

    Args:
        in_features, out_features: as of `torch.nn.Linear`.
        r: rank q.
        relora_config: of the model; None: one of its own.
        scale: s.
        lora_dropout: probability with which inputs of A B are dropped in training.
        lora_only, quantize: only the defaults are supported.
        weight_data: [out, in]; None: zeros.
        bias_data: [out]; None: zeros.
        bias: whether there is one.
        device, dtype: of the weights where none are given.
        bnb_4bit_use_double_quant, bnb_4bit_quant_type: say how quantized weights are stored; there are none.
        name: of the layer in its model; random bases are a function of it.

    Attributes:
        right: whether A is trained and B is the basis; the other way round where rows are fewer than columns.
        full_gradient: [out, in] sum of the full gradients since the last refresh, of this rank's passes that ran with
            `forward_type`; None without such a pass.
    Raises:
        ValueError: `r` is larger than a side of the weight, or an argument is not supported.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        relora_config: ReLoRaConfig | None = None,
        *,
        scale: float = 1.0,
        lora_dropout: float = 0.1,
        lora_only: bool = False,
        weight_data: Tensor | None = None,
        bias_data: Tensor | None = None,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        quantize: Quantize | Literal[False] | None = None,
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_quant_type: str = "nf4",
        name: str = "",
    ) -> None:
        super().__init__()
        refuse_unsupported(lora_only, quantize)
        if relora_config is None:
            relora_config = ReLoRaConfig(r=r, lora_dropout=lora_dropout, target_modules=["self"], scale=scale)
        if not 1 <= r <= min(in_features, out_features):
            raise ValueError(
                f"layer {name!r}: got r={r} for a weight of {out_features} x {in_features}, expected between 1 and "
                f"{min(in_features, out_features)}. Use a smaller r, or leave the layer out of target_modules."
            )
        self.in_features, self.out_features, self.r, self.scale = in_features, out_features, r, scale
        self.relora_config, self.name = relora_config, name
        if weight_data is None:
            weight_data = torch.zeros(out_features, in_features, device=device, dtype=dtype)
        place: dict[str, Any] = {"device": weight_data.device, "dtype": weight_data.dtype}
        if bias_data is None and bias:
            bias_data = torch.zeros(out_features, **place)
        self.weight = nn.Parameter(weight_data, requires_grad=False)
        self.bias = nn.Parameter(bias_data) if bias and bias_data is not None else None
        self.right = out_features >= in_features
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.lora_B = nn.Linear(in_features, r, bias=False, **place)
        self.lora_A = nn.Linear(r, out_features, bias=False, **place)
        self.basis.requires_grad_(False)
        with torch.no_grad():
            self.trained.zero_()
            self.basis.weight.copy_(self.random_basis(name, relora_config.seed, 0))
        self._leaf: Tensor | None = None
        """Shares the weight's memory and takes its gradient, so that no optimizer can mistake W for trained."""

    @property
    def factor_name(self) -> str:
        return "lora_A" if self.right else "lora_B"

    @property
    def factor(self) -> nn.Linear:
        """The side of A B that is trained."""
        return self.lora_A if self.right else self.lora_B

    @property
    def trained(self) -> nn.Parameter:
        """The factor's weight: A or B."""
        return self.factor.get_parameter("weight")

    @property
    def basis(self) -> nn.Linear:
        """The side of A B that has orthonormal rows (B) or columns (A)."""
        return self.lora_B if self.right else self.lora_A

    @property
    def side(self) -> str:
        """Of the weight, on which the basis is."""
        return "right" if self.right else "left"

    def random_basis(self, name: str, seed: int, number: int) -> Tensor:
        """A random basis in its layer's shape: a pure function of the seed, the layer's name and the refresh."""
        draw = zlib.crc32(repr((seed, name, number)).encode()) * 4
        like = self.weight.data.to(wide(self.weight.dtype))
        return self.basis_of(random_bases(tuple(self.weight.shape), self.r, self.side, draw, like))

    def basis_of(self, bases: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """The right basis [in, q] as B [q, in], or the left one [out, q] as A."""
        left, right = bases
        basis = right.T if self.right and right is not None else left
        assert basis is not None
        return basis

    @property
    def full_gradient(self) -> Tensor | None:
        return None if self._leaf is None else self._leaf.grad

    def drop_gradient(self) -> None:
        """Forget the full gradient."""
        self._leaf = None

    def merged_weight(self) -> Tensor:
        """[out, in] W - s A B in a new tensor, computed in float32 or wider."""
        dtype = wide(self.weight.dtype)
        weight, left, right = (part.data.to(dtype) for part in (self.weight, self.lora_A.weight, self.lora_B.weight))
        return torch.addmm(weight, left, right, alpha=-self.scale)

    def forward(self, x: Tensor) -> Tensor:
        result = functional.linear(x, self._weight(), self.bias)
        return result - self.lora_A(self.lora_B(self.lora_dropout(x))) * self.scale

    def _weight(self) -> Tensor:
        """W, or a leaf on its memory where this pass is to give its gradient."""
        if not torch.is_grad_enabled() or not self.trained.requires_grad:
            return self.weight
        if not self.relora_config.forward_type:
            if self.training:
                self.drop_gradient()
            return self.weight
        if self._leaf is None or self._leaf.data_ptr() != self.weight.data_ptr():
            if self.trained.grad is not None:
                warnings.warn(
                    "forward_type was set after gradients of the same step had been accumulated; the refresh replaces "
                    "them by the full gradient of the passes that follow. Set it for every micro-batch of the step.",
                    stacklevel=2,
                )
            self._leaf = self.weight.data.requires_grad_()
        return self._leaf
