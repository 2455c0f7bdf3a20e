"""Models whose linear layers train in low rank: GoLore in the form of ReLoRA (arXiv 2410.11289, section 5)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colossal_bcd.low_rank.relora.layer import Quantize, ReLoRaConfig, ReLoRaLinear
from colossal_bcd.low_rank.relora.merge import refresh_layers, site_of
from colossal_bcd.names import Pattern

logger = logging.getLogger(__name__)


class ReLoRaModel(nn.Module):
    """A model whose linear layers train in low rank, with bases that are renewed by `merge_and_reinit`.

    Layers are found by parts of their names, as in the original: "attn" is in "layers.0.self_attn.q_proj" (see
    docs/names.md).  Before the first refresh the bases are random.

    Under a plugin or torch's DDP construct it before boosting or wrapping, from the same weights on every rank.

    Args:
        model: changed in place.
        target_modules: parts of the names of the layers to change; a single string is one part.
        r: rank of the products.
        lora_dropout: probability with which inputs of a product are dropped in training.
        keep_original_weights: False makes the layers' weights and biases zero.
        lora_only: only False is supported.
        scale: s; with SGD the step on W is s^2 lr long, with Adam s lr.
        quantize: only None is supported.
        use_double_quant: says how quantized weights are stored; there are none.
        seed: of random bases, the same on every rank.

    Attributes:
        num_refreshes: a buffer, so that it is saved with the weights; a random basis is a function of the seed, the
            layer's name and this number.
    Raises:
        ValueError: an argument is out of range or not supported, no layer matches, or one that matches is no plain
            linear layer or shares its weight; the model is then as before.
    """

    num_refreshes: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        target_modules: Sequence[str] = ("attn", "attention", "mlp"),
        r: int = 128,
        lora_dropout: float = 0.1,
        keep_original_weights: bool = True,
        lora_only: bool = False,
        scale: float = 1.0,
        quantize: Quantize | None = None,
        use_double_quant: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._config = ReLoRaConfig(
            r=r,
            lora_dropout=lora_dropout,
            target_modules=list([target_modules] if isinstance(target_modules, str) else target_modules),
            keep_original_weights=keep_original_weights,
            lora_only=lora_only,
            scale=scale,
            quantize=quantize,
            use_double_quant=use_double_quant,
            seed=seed,
        )
        self.wrapped_model = model
        found = self._find()
        made = {id(module): self._layer(names[0], module) for module, names in found.items()}
        for module, names in found.items():
            for name in names:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, made[id(module)])
        device = next(iter(made.values())).weight.device
        self.register_buffer("num_refreshes", torch.zeros((), dtype=torch.int64, device=device))
        logger.info("%d linear layers train in rank %d", len(made), r)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped_model(*args, **kwargs)

    def layers(self) -> list[tuple[str, ReLoRaLinear]]:
        """Name and layer of all that train in low rank, each once."""
        modules = self.wrapped_model.named_modules()
        return [(name, module) for name, module in modules if isinstance(module, ReLoRaLinear)]

    @torch.no_grad()
    def merge_and_reinit(self, optimizer: Any = None, use_rand: bool = False) -> None:
        """Merge the products into the weights and go on with new bases; between backward and the optimizer's step.

        The passes whose gradient the step takes must have run with `_config.forward_type = True`.  W becomes W - s A B;
        the new bases are singular vectors of the full gradient or random; first moments (`exp_avg`, `momentum_buffer`)
        are carried over, second ones are not touched; factors become zero and their gradients -s times the projected
        full gradient.  Gradients are to be clipped after it.  Where factors are frozen layers are left alone.

        On several ranks the full gradients are averaged in float32, in packed all-reduces, and each basis is computed
        by one rank; a plain optimizer is taken to train replicas on all processes.

        Args:
            optimizer: that trains the factors: torch's, ours, or what `booster.boost` or accelerate made of it.  None:
                carry no moments over.
            use_rand: draw random bases (GoLore) instead of computing singular vectors (GaLore).
        Raises:
            ValueError: no full gradient was collected, or the optimizer does not train the factors; on every rank.
        """
        layers = [(name, layer) for name, layer in self.layers() if layer.trained.requires_grad]
        if not layers:
            raise ValueError("merge_and_reinit: the factors of all layers are frozen, expected some that train")
        number = int(self.num_refreshes) + 1

        def draw(name: str, layer: ReLoRaLinear) -> Tensor:
            return layer.random_basis(name, self._config.seed, number)

        refresh_layers(layers, site_of(optimizer), draw if use_rand else None)
        self.num_refreshes.add_(1)

    @torch.no_grad()
    def merge_and_unload(self) -> nn.Module:
        """The model with plain linear layers of weight W - s A B in place of those that train in low rank."""
        for name, layer in self.layers():
            weight = layer.merged_weight().to(layer.weight.dtype)
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight)
            linear.register_parameter("bias", layer.bias)
            parent, _, last = name.rpartition(".")
            setattr(self.wrapped_model.get_submodule(parent), last, linear.train(layer.training))
        return self.wrapped_model

    def save_pretrained(self, path: str | Path) -> None:
        """Save the wrapped model as it does itself, and what this one adds in relora_config.json.

        Args:
            path: folder; `colossal_bcd.compat.ReLoRaModel.from_pretrained` reads it.
        """
        model: Any = self.wrapped_model
        model.save_pretrained(path)
        saved = {**asdict(self._config), "num_refreshes": int(self.num_refreshes)}
        Path(path, "relora_config.json").write_text(json.dumps(saved, indent=4) + "\n", encoding="utf-8")

    def _find(self) -> dict[nn.Linear, list[str]]:
        """Every layer to change, with all its names."""
        patterns = [Pattern(part, "part", "target_modules") for part in self._config.target_modules]
        named = list(self.wrapped_model.named_modules(remove_duplicate=False))
        if any(isinstance(module, ReLoRaLinear) for _, module in named):
            raise ValueError("model: got one whose layers train in low rank already, expected one without. Wrap once.")
        users: dict[int, set[int]] = {}
        for _, module in named:
            for param in module.parameters(recurse=False):
                users.setdefault(id(param), set()).add(id(module))
        found: dict[nn.Linear, list[str]] = {}
        for name, module in named:
            if not isinstance(module, nn.Linear) or not any(pattern.matches(name) for pattern in patterns):
                continue
            if type(module) is not nn.Linear:
                raise ValueError(
                    f"layer {name!r} is a {type(module).__name__}, expected a torch.nn.Linear. Choose target_modules "
                    "that leave it out."
                )
            if len(users[id(module.weight)]) > 1:
                raise ValueError(
                    f"layer {name!r} shares its weight with another module, expected a weight of its own: a merge "
                    "would change both. Choose target_modules that leave it out."
                )
            found.setdefault(module, []).append(name)
        if not found:
            linear = [name for name, module in named if isinstance(module, nn.Linear)]
            closest = [name for pattern in patterns for name in pattern.closest(linear)]
            raise ValueError(
                f"target_modules={self._config.target_modules}: no linear layer has such a part in its name, expected "
                f"some of {linear[:8]} to; closest names are {', '.join(dict.fromkeys(closest))}."
            )
        return found

    def _layer(self, name: str, module: nn.Linear) -> ReLoRaLinear:
        keep = self._config.keep_original_weights
        return ReLoRaLinear(
            module.in_features,
            module.out_features,
            self._config.r,
            self._config,
            scale=self._config.scale,
            lora_dropout=self._config.lora_dropout,
            weight_data=module.weight.data if keep else torch.zeros_like(module.weight.data),
            bias_data=None if module.bias is None else module.bias.data if keep else torch.zeros_like(module.bias.data),
            bias=module.bias is not None,
            name=name,
        ).train(module.training)
