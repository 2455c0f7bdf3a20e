"""State of blocks on sharded weights: in this package's files, which load under every engine, and for torch's own.

torch.distributed.checkpoint fills tensors that it is given.  Which ones there are depends on the block in which the
file was saved, so that `Checkpointable` reads what the file says about itself first, and gives tensors that fit it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from colossal_bcd.checkpoint.assembly import assembled
from colossal_bcd.checkpoint.errors import CheckpointError, on_all_ranks
from colossal_bcd.checkpoint.files import DTYPES
from colossal_bcd.checkpoint.load import Loading, check_path
from colossal_bcd.checkpoint.opened import Checkpoint, checked_manifest
from colossal_bcd.checkpoint.save import agreed_state, index_name, save_folder
from colossal_bcd.checkpoint.trained import EngineState
from colossal_bcd.engine.failures import require_finite, says_where
from colossal_bcd.fsdp.engine import FsdpEngine
from colossal_bcd.sharding.dtensor import is_dtensor, local_values
from colossal_bcd.sharding.regions import Region

MANIFEST = "colossal_bcd_manifest"
"""Name beside the tensors of what is said about them."""


@says_where("save of the optimizer")
def save_optimizer(engine: FsdpEngine, folder: str | Path, *, size_per_shard: float = 1024) -> None:
    """Write masters, state, progress, and what waits for its turn; all ranks must call.  The model is saved apart.

    Args:
        engine: what `attach` has returned.
        folder: made if need be; an earlier checkpoint in it is replaced when this one is complete.
        size_per_shard: MiB of tensors in one file.
    Raises:
        CheckpointError: on every rank, with the writer's reason.
        FloatingPointError: the last gradients were not finite, and so are the weights.
    """
    require_finite(engine)
    save_folder(EngineState(engine, engine.parameter_names), Path(folder), None, size_per_shard)


@says_where("load of the optimizer")
def load_optimizer(engine: FsdpEngine, folder: str | Path) -> None:
    """Go on where `save_optimizer`, or a plugin, has saved, on whatever mesh; all ranks must call, with weights loaded.

    Raises:
        CheckpointError: on every rank, it does not fit; nothing is changed then.
    """
    check_path(EngineState(engine, engine.parameter_names), Path(folder), index_name(None)).apply()


class Checkpointable(Stateful):
    """The state of blocks as torch.distributed.checkpoint saves and loads it, in the middle of a block, on any mesh.

        dcp.save({"model": weights, "optim": Checkpointable(engine)}, checkpoint_id=path)
        dcp.load({"model": weights, "optim": Checkpointable(engine, resume_from=path)}, checkpoint_id=path)

    Masters, moments, residuals and what else has a value for each of a weight's are DTensors like the weight, of which
    each rank writes and reads its rows; statistics, bases and counts are plain tensors.  All ranks must call.

    Args:
        engine: what `attach` has returned, or `optimizer.engine` under FSDP2Plugin.
        resume_from: of `dcp.load`: the same `checkpoint_id`, or its storage reader.
        key: name in the file, such as "app.optim", where it has the state of several optimizers.
    """

    def __init__(
        self, engine: FsdpEngine, resume_from: str | Path | StorageReader | None = None, *, key: str | None = None
    ) -> None:
        self._engine, self._resume_from, self._key = engine, resume_from, key

    @says_where("save of the optimizer")
    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and what is said about them; with `resume_from`, as many empty ones as the file has.

        Raises:
            CheckpointError: on every rank, the file does not fit; nothing is changed.
            FloatingPointError: the last gradients were not finite, and so are the weights.
        """
        if self._resume_from is not None:
            return self._empty(self._said())
        require_finite(self._engine)
        local, assembly, manifest = agreed_state(self._boosted())
        rows = [tensor for tensor in assembly.tensors if tensor.kind == "elementwise"]
        others = dataclasses.replace(assembly, tensors=[each for each in assembly.tensors if each not in rows])
        state: dict[str, Any] = {MANIFEST: json.dumps(manifest)}
        state.update({each.name: self._like(each.parameter, local.values(each.name)) for each in rows})
        for tensor, values in assembled(others, local, everywhere=True):
            state[tensor.name] = values
        return state

    @says_where("load of the optimizer")
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned, here or in the run that saved, with weights loaded.

        Raises:
            CheckpointError: on every rank, it does not fit, or has more than `state_dict` had room for; nothing is
                changed then.
        """
        tensors = {name: value for name, value in state_dict.items() if name != MANIFEST}
        with on_all_ranks():
            manifest = checked_manifest("state dict", json.loads(state_dict[MANIFEST]))
            differing = sorted(set(tensors) ^ set(manifest["entries"]))
            if differing:
                raise CheckpointError(
                    f"load of blocks: got a checkpoint and tensors that differ in {len(differing)}, such as "
                    f"{differing[0]!r}, expected those of the block in which it was saved. Use "
                    "colossal_bcd.fsdp.Checkpointable(engine, resume_from=checkpoint_id) with the checkpoint_id that "
                    "dcp.load gets."
                )
        Loading(self._boosted(), "state dict", _Rows("state dict", manifest, tensors)).apply()
        self._resume_from = None  # what it is asked for next is saved

    def _boosted(self) -> EngineState:
        return EngineState(self._engine, self._engine.parameter_names)

    def _said(self) -> dict[str, Any]:
        """What the file says about itself."""
        source = self._resume_from
        with on_all_ranks():
            reader = source if isinstance(source, StorageReader) else FileSystemReader(str(source))
            names = reader.read_metadata().state_dict_metadata
            found = [name for name in names if name.rpartition(".")[2] == MANIFEST]
            if self._key is not None:
                found = [name for name in found if name == f"{self._key}.{MANIFEST}"]
            if len(found) != 1:
                raise CheckpointError(
                    f"resume_from={source!r}: got a checkpoint with the state of {len(found)} optimizers with blocks "
                    f"({found[:3]}), expected one of Checkpointable(engine), or its key=... where there are several."
                )
        state: dict[str, Any] = {found[0]: ""}
        load(state, storage_reader=reader)
        with on_all_ranks():
            return checked_manifest(str(source), json.loads(state[found[0]]))

    def _empty(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Room for what a file has, if that fits."""
        Loading(self._boosted(), str(self._resume_from), Checkpoint(str(self._resume_from), manifest, {}))
        state: dict[str, Any] = {MANIFEST: ""}
        dtypes, params = {name: dtype for dtype, name in DTYPES.items()}, self._engine.trained.named_parameters
        with on_all_ranks():
            for name, said in manifest["entries"].items():
                dtype, shape = dtypes[said["dtype"]], tuple(said["shape"])
                param = params.get(said["parameter"])
                if param is None or (said["kind"] == "elementwise" and tuple(param.shape) != shape):
                    got = "no such parameter" if param is None else f"one of shape {tuple(param.shape)}"
                    raise CheckpointError(
                        f"resume_from={str(self._resume_from)!r}: it has {name!r} of shape {shape}; got {got}, "
                        "expected that of the run that saved. Build the same model."
                    )
                if said["kind"] == "elementwise":
                    state[name] = self._like(said["parameter"], torch.zeros_like(local_values(param), dtype=dtype))
                else:
                    state[name] = torch.zeros(shape, dtype=dtype)
        return state

    def _like(self, name: str, values: Tensor) -> DTensor:
        """A DTensor that lies as a parameter does."""
        param: Parameter = self._engine.trained.named_parameters[name]
        assert is_dtensor(param)
        return DTensor.from_local(
            values.reshape(local_values(param).shape),
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=torch.empty(param.shape, device="meta").stride(),
        )


class _Rows(Checkpoint):
    """One whose DTensors have no more on this rank than it will keep."""

    def pick(self, name: str, region: Region) -> Tensor:
        tensor = self._tensors[name]
        return local_values(tensor).reshape(-1) if is_dtensor(tensor) else super().pick(name, region)
