"""The state of a boosted optimizer on its way out: into files, or into tensors in memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from colossal_bcd.checkpoint.assembly import Assembly, FullTensor, LocalTensors, assembled, is_writer, make_assembly
from colossal_bcd.checkpoint.errors import CheckpointError, on_all_ranks, raise_on_all_ranks
from colossal_bcd.checkpoint.files import (
    ASIDE,
    TensorFile,
    read_json,
    remove_leftovers,
    replacing,
    sync_folder,
    write_json,
)
from colossal_bcd.checkpoint.manifest import manifest_of
from colossal_bcd.checkpoint.trained import Boosted
from colossal_bcd.checkpoint.values import decode, plain_values, plainly, tensors_within
from colossal_bcd.engine.config import communication_device
from colossal_bcd.sharding.packing import pack

PROGRESS_DELAY = 5.0
"""Seconds after which a save shows its progress."""
MIB = 2**20

Pinned = MutableMapping[int, dict[str, Tensor]]
"""Number of a parameter -> name of its state -> buffer on the CPU, pinned where there is a device to copy from."""


def index_name(prefix: str | None) -> str:
    """Name of the index of a folder's checkpoint."""
    return f"{prefix}.optimizer_index.json" if prefix else "optimizer_index.json"


def save_folder(boosted: Boosted, folder: Path, prefix: str | None, size_per_shard: float) -> None:
    """Write an index and files of tensors; a tensor larger than a shard has a file to itself.

    The index is replaced last, and only then are the files of an earlier one deleted: whatever happens, the folder
    has one complete checkpoint.  The writing rank has one tensor in memory at a time.

    Args:
        boosted: the optimizer.
        folder: made if need be.
        prefix: beginning of the files' names.
        size_per_shard: MiB of tensors in one file.
    Raises:
        CheckpointError: on every rank, with the writer's reason.
    """
    local, assembly, manifest = agreed_state(boosted)
    with on_all_ranks():
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"save_optimizer(shard=True): {folder} is a file, expected a folder")
    writer = _FolderWriter(folder, prefix, manifest)
    shards = list(pack(assembly.tensors, lambda tensor: tensor.num_bytes, size_per_shard * MIB))
    stream = assembled(assembly, local)
    total = sum(tensor.num_bytes for tensor in assembly.tensors)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="optimizer", delay=PROGRESS_DELAY, disable=not is_writer()
    ) as bar:
        for number, shard in enumerate(shards, start=1):
            writer.attempt(writer.begin, number, shard)
            for _ in shard:
                tensor, values = next(stream)
                if values is not None:
                    writer.attempt(writer.add, values)
                bar.update(tensor.num_bytes)
            writer.attempt(writer.end, shard)
            writer.stop_if_failed()
    writer.attempt(writer.publish)
    writer.stop_if_failed()


def save_file(boosted: Boosted, path: Path) -> None:
    """Write one file that `torch.load(weights_only=True)` reads; all of it passes through the writer's memory.

    It is a state dict like torch's (parameters are numbered in the order of the param groups), with the masters and
    what else a run needs beside it.

    Raises:
        CheckpointError: on every rank, with the writer's reason.
    """
    state = whole_state(boosted, everywhere=False)
    with on_all_ranks():
        if is_writer():
            with replacing(path) as file:
                torch.save(state, file)


def whole_state(boosted: Boosted, *, everywhere: bool, pinned: Pinned | None = None) -> dict[str, Any]:
    """Collect all state, in tensors that do not depend on the mesh, on the writer or on all ranks.

    State by parameter is copied into the buffers of `pinned`, if they are given.
    """
    local, assembly, manifest = agreed_state(boosted)
    state: dict[int, dict[str, Any]] = {}
    others: dict[str, Tensor] = {}
    for name, numbers in assembly.numbers.items():
        state[assembly.keys[name]] = _plain_numbers(numbers)
    for tensor, values in assembled(assembly, local, everywhere=everywhere):
        if values is None:
            continue
        if tensor.in_state:
            key = assembly.keys[tensor.parameter]
            state[key][tensor.state] = _buffered(pinned, key, tensor.state, values)
        else:
            others[tensor.name] = values
    groups = [
        {**plain_values(group["hyper"]), "params": [assembly.keys[name] for name in group["parameters"]]}
        for group in manifest["groups"]
    ]
    everything: dict[Any, Any] = {**state, **{decode(key): plainly(decode(value)) for key, value in assembly.shared}}
    return {"state": everything, "param_groups": groups, "others": others, "manifest": manifest}


def _plain_numbers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return plain_values({name: value for name, value in numbers.items() if not tensors_within(value)})


def state_shards(
    boosted: Boosted, limit: float, *, everywhere: bool, pinned: Pinned | None
) -> Iterator[tuple[dict[int, dict[str, Any]], float]]:
    """Give state by number, with its MiB of tensors: at most `limit` of them at a time, or one parameter's."""
    local, assembly, _ = agreed_state(boosted)
    sizes = dict.fromkeys(assembly.keys, 0.0)
    for tensor in assembly.tensors:
        if tensor.in_state and tensor.state != "step":
            sizes[tensor.parameter] += tensor.num_bytes / MIB
    shard: dict[int, dict[str, Any]] = {}
    filled, current = 0.0, None
    numbered = {name: _plain_numbers(numbers) for name, numbers in assembly.numbers.items()}
    for tensor, values in assembled(assembly, local, everywhere=everywhere):
        if not tensor.in_state:
            continue
        name, key = tensor.parameter, assembly.keys[tensor.parameter]
        if name != current:
            current = name
            if shard and filled + sizes[name] > limit:
                yield shard, filled
                shard, filled = {}, 0.0
            shard[key] = numbered.pop(name, {})
            filled += sizes[name]
        if values is not None:
            shard[key][tensor.state] = _buffered(pinned, key, tensor.state, values)
    shard.update({assembly.keys[name]: numbers for name, numbers in numbered.items()})
    yield shard, filled


def _buffered(pinned: Pinned | None, key: int, name: str, value: Any) -> Any:
    if pinned is None or not isinstance(value, Tensor):
        return value
    buffers = pinned.setdefault(key, {})
    if name not in buffers:
        # Memory is pinned for a device, and a host has none.
        buffers[name] = torch.empty_like(value, device="cpu", pin_memory=communication_device().type == "cuda")
    return buffers[name].copy_(value)


class _FolderWriter:
    """The writing rank's files; on other ranks nothing is attempted."""

    def __init__(self, folder: Path, prefix: str | None, manifest: dict[str, Any]) -> None:
        self._folder, self._prefix, self._manifest = folder, prefix, manifest
        self._aside: Path | None = None
        self._file: TensorFile | None = None
        self._files: dict[str, dict[str, Any]] = {}
        self._error: Exception | None = None

    def attempt(self, action: Callable[..., None], *args: Any) -> None:
        """Do what follows, unless something failed: the other ranks go on sending until all can stop together."""
        if is_writer() and self._error is None:
            try:
                action(*args)
            except (OSError, CheckpointError) as error:
                self._error = error

    def stop_if_failed(self) -> None:
        """Raise on all ranks what has failed, after what is not published was removed."""
        if self._error is not None:
            self.clean()
        raise_on_all_ranks(self._error)

    def begin(self, number: int, shard: Sequence[FullTensor]) -> None:
        if self._aside is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._folder)
            self._aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=self._folder))
        described = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]
        self._file = TensorFile(self._aside / f"{number:05}.safetensors", described)

    def add(self, values: Tensor) -> None:
        assert self._file is not None
        self._file.add(values)

    def end(self, shard: Sequence[FullTensor]) -> None:
        assert self._file is not None
        self._files[self._file.path.name] = self._file.close()
        for tensor in shard:
            self._manifest["entries"][tensor.name]["file"] = self._file.path.name

    def publish(self) -> None:
        """Give the files names that no earlier checkpoint in the folder has, and let the index point to them."""
        self._rename()
        index = self._folder / index_name(self._prefix)
        before = set(read_json(index).get("files", {})) if index.exists() else set()
        write_json(index, self._manifest)
        for name in before - set(self._manifest["files"]):
            (self._folder / name).unlink(missing_ok=True)
        self.clean()

    def clean(self) -> None:
        """Remove what is not published."""
        if self._file is not None:
            self._file.abandon()
        remove_leftovers(self._folder)

    def _rename(self) -> None:
        sums = "".join(said["sha256"] for said in self._files.values())
        stem = f"{self._prefix + '.' if self._prefix else ''}optimizer-{hashlib.sha256(sums.encode()).hexdigest()[:8]}"
        names = {name: f"{stem}-{name}" for name in self._files}
        for name, final in names.items():
            assert self._aside is not None
            (self._aside / name).replace(self._folder / final)
        if names:
            sync_folder(self._folder)
        self._manifest["files"] = {names[name]: said for name, said in self._files.items()}
        for said in self._manifest["entries"].values():
            said["file"] = names[said["file"]]


def agreed_state(boosted: Boosted) -> tuple[LocalTensors, Assembly, dict[str, Any]]:
    """Find this rank's tensors, those of all ranks, and what the file says of them; all ranks must call."""
    boosted.follow()
    with on_all_ranks():
        local = LocalTensors(boosted)
    assembly = make_assembly(local)
    with on_all_ranks():
        manifest = manifest_of(boosted, assembly)
    return local, assembly, manifest
