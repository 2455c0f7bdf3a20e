"""Files that are complete or not there: written aside, synced, renamed, and checked by size and SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colossal_bcd.checkpoint.errors import CheckpointError, on_all_ranks
from colossal_bcd.engine.agreement import num_ranks

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of dtypes in safetensors files."""
ASIDE = ".incomplete-"
"""How the name of what is being written begins."""


class TensorFile:
    """A safetensors file that is written tensor by tensor, so that none but the present one is in memory.

    Args:
        path: of the new file.
        tensors: name, dtype and shape of each tensor, in the order in which they will come.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        header, offset = {}, 0
        for name, dtype, shape in tensors:
            end = offset + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # Readers map the file: the data begins at a multiple of eight bytes.
        text += b" " * (-len(text) % 8)
        self.path = path
        self._digest, self._size = hashlib.sha256(), 0
        self._file = path.open("wb")
        self._write(len(text).to_bytes(8, "little") + text)

    def add(self, tensor: Tensor) -> None:
        """Append the next tensor."""
        data: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._write(memoryview(data))

    def close(self) -> dict[str, Any]:
        """Sync; what a manifest says of the file."""
        with self._file:
            sync(self._file)
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        """Close without syncing."""
        self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)


def sync(file: Any) -> None:
    """Bring an open file onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring renames in a folder onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """An open file that takes the place of `path` once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{ASIDE}{path.name}")
    try:
        with aside.open("wb") as file:
            yield file
            sync(file)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one piece."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read an index; raises CheckpointError where it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"checkpoint file {path}: got no JSON ({error}), expected an index. It is damaged or foreign."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint file {path}: got a {type(value).__name__}, expected a JSON object")
    return value


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def check_file(path: Path, said: Mapping[str, Any], *, contents: bool) -> None:
    """Compare a file with what its manifest says, with `contents` all of it.

    Raises:
        CheckpointError: it is missing, truncated or corrupted.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint file {path} is missing, expected one of {said['bytes']} bytes")
    size = path.stat().st_size
    if size != said["bytes"]:
        raise CheckpointError(
            f"checkpoint file {path} has {size} bytes, expected {said['bytes']}: it is truncated or another one. "
            "Load an earlier checkpoint."
        )
    if contents and describe_file(path)["sha256"] != said["sha256"]:
        raise CheckpointError(
            f"checkpoint file {path} is corrupted: its SHA-256 is not that of its index. Load an earlier checkpoint."
        )


def verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare checksums: one rank reads all files, and the ranks meet after each, so that none waits for long.

    Raises:
        CheckpointError: on every rank, of the first file that is damaged.
    """
    names = [sorted(files)]
    if num_ranks() > 1:
        dist.broadcast_object_list(names, src=0)
    for name in names[0]:
        with on_all_ranks():
            if dist.get_rank() == 0:
                check_file(folder / name, files[name], contents=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save has left behind."""
    for path in folder.glob(f"{ASIDE}*") if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
