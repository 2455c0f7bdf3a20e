"""`shard`: groups of FSDP2 that are the blocks, so that a block gathers and reduces nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colossal_bcd.block.parameters import is_frozen_here, set_active
from colossal_bcd.engine.agreement import num_ranks
from colossal_bcd.engine.config import communication_device
from colossal_bcd.engine.failures import limit_waiting
from colossal_bcd.fsdp.cpu import enable_cpu
from colossal_bcd.fsdp.torch_private import FSDPModule, fully_shard
from colossal_bcd.names import EMBEDDING_NAMES, HEAD_NAMES, role_of


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    mp_policy: Any = None,
    offload_policy: Any = None,
    reshard_after_forward: bool | int | None = None,
) -> nn.Module:
    """Shard a model by torch's `fully_shard`: each layer, the embeddings and the head as a group, the rest as another.

    Layers, embeddings and heads are found by their names, as a `BlockOptimizer` finds them.  What is tied over several
    of them goes to the group of the rest, which is gathered as long as the model runs.

    Args:
        model: in whole parameters, or sharded by `parallelize_module`; sharded in place.
        mesh: one dim, or two: replicas, and ranks that share each of them.  None: all ranks share it.
        mp_policy: torch's MixedPrecisionPolicy; None: none.
        offload_policy: torch's CPUOffloadPolicy; None: none.
        reshard_after_forward: whether backward gathers again (True) or weights stay (False), or the number of ranks
            over which they stay.  None: backward gathers again what is not in the group of the rest.
    Returns:
        The model.
    Raises:
        ValueError: it is sharded already.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            "shard: the model is sharded by fully_shard already, expected whole parameters. Shard it once."
        )
    with limit_waiting():
        mesh = mesh or init_device_mesh(communication_device().type, (num_ranks(),))
    if mesh.device_type == "cpu":
        enable_cpu()
    given = {
        "mp_policy": mp_policy,
        "offload_policy": offload_policy,
        "reshard_after_forward": reshard_after_forward,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options["mesh"] = mesh
    frozen = {name for name, param in model.named_parameters() if is_frozen_here(param)}
    for module in separate_groups(model):
        fully_shard(module, **options)
    fully_shard(model, **options)
    for name, param in model.named_parameters():
        if name in frozen:  # by a block optimizer, not by the user
            set_active(param, False)
    return model


def separate_groups(model: nn.Module) -> Iterator[nn.Module]:
    """Layers, embeddings and heads that share no weight with the rest: each becomes a group, the rest another."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    prefixes = dict.fromkeys(_prefix(name) for every in names.values() for name in every)
    for prefix in prefixes:
        if prefix is None:
            continue
        inside = [[f"{name}.".startswith(f"{prefix}.") for name in every] for every in names.values()]
        if any(any(each) and not all(each) for each in inside):
            continue
        module = model.get_submodule(prefix)
        # Lists of modules have no forward pass that would gather.
        yield from module.children() if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else (module,)


def _prefix(name: str) -> str | None:
    """The layer, embedding or head that a parameter is in."""
    role, components = role_of(name), name.split(".")[:-1]
    if role.kind not in ("embedding", "head"):
        return role.layer
    known = EMBEDDING_NAMES if role.kind == "embedding" else HEAD_NAMES
    last = next((index for index, each in enumerate(components) if each in known), None)
    return None if last is None else ".".join(components[: last + 1])
