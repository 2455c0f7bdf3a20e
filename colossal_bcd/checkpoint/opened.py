"""What a checkpoint has, checked before anything of it is used."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from colossal_bcd.checkpoint.errors import CheckpointError
from colossal_bcd.checkpoint.files import check_file, read_json
from colossal_bcd.checkpoint.manifest import FORMAT, OLD_VERSIONS, VERSION, upgraded
from colossal_bcd.sharding.regions import Region

TORCH_INDEX = ".index.json"
"""How the name of ColossalAI's index of a folder ends."""


class Checkpoint:
    """What `manifest_of` has made, tensors in memory by name, and others, which are read when they are asked for.

    Args:
        name: name of the file or folder, for errors.
        manifest: of this version.
        tensors: that are in memory already.
        folder: of the files with the other tensors.

    Attributes:
        index: what the manifest says of each tensor, by name.
    """

    def __init__(
        self, name: str, manifest: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path | None = None
    ) -> None:
        self.name, self.manifest = name, manifest
        self._tensors, self.folder = tensors, folder
        self._open: dict[str, Any] = {}

        self.index: dict[str, dict[str, Any]] = manifest["entries"]
        self._states: dict[str, dict[str, dict[str, Any]]] = {}
        for said in self.index.values():
            if said["part"] is None:
                self._states.setdefault(said["parameter"], {})[said["state"]] = said

    def states_of(self, parameter: str) -> dict[str, dict[str, Any]]:
        """What the manifest says of the master and of the base optimizer's state of a parameter, by name."""
        return dict(self._states.get(parameter, {}))

    def error(self, text: str) -> CheckpointError:
        """Make an error about this checkpoint."""
        return CheckpointError(f"checkpoint {self.name}: {text}")

    def tensor(self, name: str) -> Tensor:
        """Read a full tensor."""
        if name in self._tensors:
            return self._tensors[name]
        assert self.folder is not None
        file = self.index[name]["file"]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt", device="cpu")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def pick(self, name: str, region: Region) -> Tensor:
        """Read a region of a tensor, [n]."""
        return region.pick(self.tensor(name))


def open_checkpoint(path: Path, index: str, *, contents: bool) -> Checkpoint | dict[str, Any]:
    """Find out what a folder, an index or a file is.

    Args:
        path: of it.
        index: name of the index in a folder.
        contents: compare the checksums within a file of `torch.save`; those of a manifest are compared by `verify`.
    Returns:
        A checkpoint of this package, or a state dict of torch's kind with another origin.
    Raises:
        CheckpointError: a file is missing, truncated, corrupted or foreign.
    """
    if path.is_dir():
        if (path / index).is_file():
            return _from_index(path / index)
        torch_like = sorted(path.glob(f"*optim*{TORCH_INDEX}"))
        if len(torch_like) == 1:
            return _torch_shards(torch_like[0])
        raise CheckpointError(
            f"checkpoint folder {path} has no {index}, expected what save_optimizer(shard=True) writes"
        )
    if not path.is_file():
        raise CheckpointError(f"checkpoint file {path} is missing")
    if path.name.endswith(TORCH_INDEX):
        return _torch_shards(path)
    if path.suffix == ".json":
        return _from_index(path)
    return opened_state(read_torch(path, contents=contents), str(path))


def checked_manifest(name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest of this version, or of one that loads, too, as one of this version."""
    if manifest.get("format") != FORMAT or manifest.get("version") not in (VERSION, *OLD_VERSIONS):
        raise CheckpointError(
            f"checkpoint {name}: got format {manifest.get('format')!r}, version {manifest.get('version')!r}, expected "
            f"{FORMAT!r}, version {VERSION}. It is foreign, or written by another version of colossal_bcd."
        )
    return upgraded(manifest)


def _from_index(index: Path) -> Checkpoint:
    manifest = checked_manifest(str(index), read_json(index))
    for name, said in manifest["files"].items():
        check_file(index.parent / name, said, contents=False)
    return Checkpoint(str(index), manifest, {}, index.parent)


def opened_state(state: dict[str, Any], name: str = "state dict") -> Checkpoint | dict[str, Any]:
    """Turn a state dict into what `open_checkpoint` returns; refuses what is not an optimizer's."""
    if "manifest" not in state:
        if not {"state", "param_groups"} <= set(state):
            raise CheckpointError(
                f"checkpoint {name}: got {sorted(map(str, state))[:5]}, expected an optimizer's state ('state' and "
                "'param_groups'). It is something else."
            )
        return state
    manifest = checked_manifest(name, state["manifest"])
    names = {key: name for name, key in manifest["keys"].items()}
    tensors = {
        f"{names[key]}.{name_in_state}": value
        for key, values in state["state"].items()
        if key in names
        for name_in_state, value in values.items()
        if isinstance(value, Tensor)
    }
    return Checkpoint(name, manifest, {**tensors, **state["others"]})


def read_torch(path: Path, *, contents: bool) -> dict[str, Any]:
    """Read a file of `torch.save`; refuses what is damaged, or has more than tensors and plain values."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint file {path} is missing")
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and contents:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"checkpoint file {path} is corrupted: the checksum of {damaged} is wrong")
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"checkpoint file {path} cannot be read ({type(error).__name__}: {reason}): it is truncated, corrupted, or "
            "holds more than tensors and plain values."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint file {path}: got a {type(value).__name__}, expected a state dict")
    return value


def _torch_shards(index: Path) -> dict[str, Any]:
    """Read ColossalAI's sharded format: states by number of the parameter, param groups in another file."""
    said = read_json(index)
    try:
        groups_file, weight_map = said["metadata"]["param_groups"], said["weight_map"]
    except (KeyError, TypeError):
        raise CheckpointError(
            f"checkpoint file {index}: got keys {sorted(said)}, expected an optimizer's index with 'param_groups'"
        ) from None
    state: dict[int, Any] = {}
    for file in sorted(set(weight_map.values())):
        state.update({int(key): value for key, value in read_torch(index.parent / file, contents=False).items()})
    path = index.parent / groups_file
    try:
        groups = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"checkpoint file {path} cannot be read ({type(error).__name__})") from error
    return {"state": state, "param_groups": groups}
