"""GoLore's ReLoRA form, with the call of peft_pretraining.GoLore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from colossal_bcd.low_rank.relora.layer import ReLoRaLinear
from colossal_bcd.low_rank.relora.model import ReLoRaModel as _ReLoRaModel

__all__ = ["ReLoRaLinear", "ReLoRaModel"]


class ReLoRaModel(_ReLoRaModel):
    """`colossal_bcd.low_rank.relora.model.ReLoRaModel`, which can also be made from a folder."""

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ReLoRaModel:
        """The model that `save_pretrained` wrote, its layers, bases and number of refreshes included.

        Args:
            path: folder.
        Raises:
            ValueError: the folder has other weights than the model.
        """
        import transformers
        from transformers.modeling_utils import load_state_dict

        folder = Path(path)
        saved = json.loads((folder / "relora_config.json").read_text(encoding="utf-8"))
        num_refreshes = saved.pop("num_refreshes")
        saved.pop("forward_type")
        config = transformers.AutoConfig.from_pretrained(folder)
        architecture: Any = getattr(transformers, config.architectures[0])
        dtype = config.torch_dtype or torch.get_default_dtype()
        model = cls(architecture(config).to(dtype), **saved)
        weights: dict[str, torch.Tensor] = {}
        for file in sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]):
            weights.update(load_state_dict(str(file)))
        missing, unexpected = model.wrapped_model.load_state_dict(weights, strict=False)
        # What is tied is saved once.
        tied = set(getattr(model.wrapped_model, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise ValueError(
                f"{folder}: the weights lack {sorted(set(missing) - tied)} and have {unexpected} besides, expected "
                "those that save_pretrained wrote"
            )
        model.num_refreshes.fill_(num_refreshes)
        return model
