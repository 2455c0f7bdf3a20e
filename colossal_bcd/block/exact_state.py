"""State of other packages' optimizers as it was saved, where torch's `load_state_dict` would change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def undo_casts(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give loaded state the types with which it was saved.

    `torch.optim.Optimizer.load_state_dict` casts every floating-point tensor to the parameter's dtype, and makes of a
    string the text of a generator.

    Args:
        optimizer: that has loaded the state.
        state_dict: what it has loaded, as it was saved.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for key, param in zip(keys, params, strict=True):
        loaded = optimizer.state.get(param, {})
        for name, value in state_dict["state"].get(key, {}).items():
            if name in loaded:
                loaded[name] = _as_saved(value, loaded[name])


def _as_saved(saved: Any, loaded: Any) -> Any:
    """The saved value on the device of the loaded one; the loaded one where its optimizer has made it another thing."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        same = saved.dtype == loaded.dtype or saved.shape != loaded.shape
        return loaded if same else saved.detach().to(loaded.device, copy=True)
    if isinstance(saved, str) and isinstance(loaded, str):
        return saved
    if type(saved) in (list, tuple) and type(loaded) is type(saved) and len(saved) == len(loaded):
        return type(saved)(_as_saved(*pair) for pair in zip(saved, loaded, strict=True))
    if type(saved) is dict and type(loaded) is dict and saved.keys() == loaded.keys():
        return {key: _as_saved(value, loaded[key]) for key, value in saved.items()}
    return loaded
