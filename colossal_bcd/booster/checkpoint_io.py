"""A plugin's checkpoint io, complete for what this package trains.

ColossalAI's writing of models has three faults that are mended here: an error on one rank would leave the others
waiting, one kind of weight fails, and so do tied ones in safetensors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPCheckpointIO
from colossalai.checkpoint_io import CheckpointIO, general_checkpoint_io, hybrid_parallel_checkpoint_io, utils
from colossalai.checkpoint_io.index_file import CheckpointIndexFile
from colossalai.interface.model import PeftUnwrapMixin
from colossalai.tensor.padded_tensor import api as padding
from safetensors import SafetensorError

from colossal_bcd.checkpoint.errors import CheckpointError, on_all_ranks, raise_on_all_ranks
from colossal_bcd.checkpoint.files import replacing
from colossal_bcd.checkpoint.load import check_path
from colossal_bcd.checkpoint.opened import read_torch
from colossal_bcd.checkpoint.save import index_name, save_file, save_folder
from colossal_bcd.checkpoint.trained import boosted_of
from colossal_bcd.engine.failures import require_finite, says_where
from colossal_bcd.fsdp.weights import WholeTensors, load_whole, require_names, reshard
from colossal_bcd.sharding.dtensor import is_dtensor

logger = logging.getLogger(__name__)

ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full or broken disk raises, in Python, in torch and in safetensors."""


class ShardedModelIO(TorchDDPCheckpointIO):
    """Files of a model whose weights FSDP2 has sharded: whole tensors, as other plugins and transformers read them."""

    def save_unsharded_model(
        self, model: Any, checkpoint: str, gather_dtensor: bool, use_safetensors: bool, use_async: bool = False
    ) -> None:
        state = self._whole(model, gather_dtensor, use_async)
        kept = {name: value for name, value in state.items() if self.coordinator.is_master()}
        if self.coordinator.is_master():
            utils.save_state_dict(kept, checkpoint, use_safetensors)

    def save_sharded_model(
        self,
        model: Any,
        checkpoint_path: str,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        max_shard_size: int = 1024,
        use_safetensors: bool = False,
        use_async: bool = False,
    ) -> None:
        folder, is_master = Path(checkpoint_path), self.coordinator.is_master()
        with on_all_ranks():
            if folder.is_file():
                raise CheckpointError(f"save_model(shard=True): {folder} is a file, expected a folder")
            folder.mkdir(parents=True, exist_ok=True)
        name, index_name = utils.get_model_base_filenames(prefix, use_safetensors)
        index = CheckpointIndexFile(str(folder))
        size = utils.save_state_dict_shards(
            utils.shard_model_checkpoint(self._whole(model, gather_dtensor, use_async), max_shard_size),
            str(folder),
            index,
            name,
            is_master,
            use_safetensors=use_safetensors,
        )
        if is_master:
            index.append_meta_data("total_size", size)
            index.write_index_file(index_name)
            utils.save_config_file(model.unwrap(), str(folder))

    def load_unsharded_model(
        self, model: Any, checkpoint: str, strict: bool = True, low_cpu_mem_mode: bool = True, num_threads: int = 1
    ) -> None:
        with on_all_ranks():
            state = utils.load_state_dict(checkpoint)
        self._load(model, state, strict)

    def load_sharded_model(
        self,
        model: Any,
        checkpoint_index_file: Path,
        strict: bool = False,
        use_safetensors: bool = False,
        load_sub_module: bool = True,
        low_cpu_mem_mode: bool = True,
        num_threads: int = 1,
    ) -> None:
        with on_all_ranks():
            index = CheckpointIndexFile.from_file(checkpoint_index_file)
            files, _ = index.get_checkpoint_filenames()
            if strict:
                require_names(model.unwrap().state_dict(), index.weight_map)
        for file in files:
            with on_all_ranks():
                state = utils.load_state_dict(str(file))
            self._load(model, state, False)

    def save_lora_as_pretrained(
        self, model: Any, checkpoint: str, use_safetensors: bool = False, state_dict: dict[str, Any] | None = None
    ) -> None:
        module = model.unwrap(unwrap_peft=False)
        if state_dict is None and hasattr(module, "peft_config"):
            marks = ("lora_", "modules_to_save", "bias")
            adapters = {name: each for name, each in module.state_dict().items() if any(mark in name for mark in marks)}
            state_dict = dict(WholeTensors(adapters))
        super().save_lora_as_pretrained(model, checkpoint, use_safetensors, state_dict=state_dict)

    def _whole(self, model: Any, gather_dtensor: bool, use_async: bool) -> WholeTensors:
        if not gather_dtensor:
            raise CheckpointError(
                "save_model(gather_dtensor=False): files here never depend on the mesh. Leave it at True."
            )
        if use_async:
            logger.warning("save_model(use_async=True): sharded weights are gathered and written at once")
        reshard(model.unwrap(unwrap_peft=False))
        return WholeTensors(model.unwrap().state_dict())

    def _load(self, model: Any, state: dict[str, Any], strict: bool) -> None:
        reshard(model.unwrap(unwrap_peft=False))
        with on_all_ranks():
            load_whole(model.unwrap(), state, strict=strict)


def checkpoint_io(stock: CheckpointIO) -> CheckpointIO:
    """A plugin's checkpoint io that saves and loads all state of the optimizers of this package, on any mesh.

    Masters follow a model that is loaded, under every plugin.  Optimizers that another library shards are left to
    ColossalAI's own format.
    """
    cls: Any = type(stock)
    if not getattr(cls, "is_complete", False):
        stock.__class__ = _complete(cls)
    return stock


@contextlib.contextmanager
def tied_apart(model: Any) -> Iterator[None]:
    """Within, what a model calls by two names is in its state dict twice, as safetensors refuses shared memory.

    Files have both names, as those of weights that FSDP2 has sharded do.
    """

    def copy(module: Any, state: dict[str, Any], *_: Any) -> None:
        seen = set()
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and not is_dtensor(value) and value.numel():
                state[name] = value.clone() if value.data_ptr() in seen else value
                seen.add(value.data_ptr())

    inner = model.unwrap() if hasattr(model, "unwrap") else model
    if isinstance(inner, PeftUnwrapMixin):  # ColossalAI's names for a model with adapters, and no module
        inner = inner.base_model
    handle = inner._register_state_dict_hook(copy)
    try:
        yield
    finally:
        handle.remove()


@functools.cache
def _complete(cls: Any) -> Any:
    class CompleteCheckpointIO(cls):
        is_complete = True

        @says_where("load of the model")
        def load_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().load_model(model, *args, **kwargs)
            if hasattr(model, "update_master_params"):
                model.update_master_params()
            return result

        @says_where("save of the model")
        def save_model(self, model: Any, *args: Any, **kwargs: Any) -> None:
            with writing_together(), tied_apart(model):
                super().save_model(model, *args, **kwargs)

        @says_where("save of the optimizer")
        def save_optimizer(
            self,
            optimizer: Any,
            checkpoint: str,
            shard: bool = False,
            gather_dtensor: bool = True,
            prefix: str | None = None,
            size_per_shard: int = 1024,
            use_async: bool = False,
        ) -> None:
            boosted = boosted_of(optimizer)
            require_finite(optimizer)
            if boosted is None:
                super().save_optimizer(
                    optimizer, checkpoint, shard, gather_dtensor, prefix, size_per_shard, use_async=use_async
                )
                return
            if not gather_dtensor:
                raise CheckpointError(
                    "save_optimizer(gather_dtensor=False): files here never depend on the mesh. Leave it at True."
                )
            if use_async:
                logger.warning("save_optimizer(use_async=True): this package's state is written at once")
            if shard:
                save_folder(boosted, Path(checkpoint), prefix, size_per_shard)
            else:
                save_file(boosted, Path(checkpoint))

        @says_where("load of the optimizer")
        def load_optimizer(
            self, optimizer: Any, checkpoint: str, prefix: str | None = None, *args: Any, **kwargs: Any
        ) -> None:
            boosted = boosted_of(optimizer)
            if boosted is None:
                super().load_optimizer(optimizer, checkpoint, prefix, *args, **kwargs)
                return
            check_path(boosted, Path(checkpoint), index_name(prefix)).apply()

        @says_where("save of the scheduler")
        def save_lr_scheduler(self, lr_scheduler: Any, checkpoint: str) -> None:
            with on_all_ranks():
                if dist.get_rank() == 0:
                    with replacing(Path(checkpoint)) as file:
                        torch.save(lr_scheduler.state_dict(), file)
                    # A file that cannot be read safely is found now, not when it is needed.
                    read_torch(Path(checkpoint), contents=False)

        @says_where("load of the scheduler")
        def load_lr_scheduler(self, lr_scheduler: Any, checkpoint: str) -> None:
            with on_all_ranks():
                state = read_torch(Path(checkpoint), contents=dist.get_rank() == 0)
            lr_scheduler.load_state_dict(state)

    return CompleteCheckpointIO


@contextlib.contextmanager
def writing_together() -> Iterator[None]:
    """Inside, ranks that cannot write go on with ColossalAI's collectives; at the end, all raise what the first met."""
    errors: list[Exception] = []
    owners: list[Any] = [utils, general_checkpoint_io, hybrid_parallel_checkpoint_io]
    places = [(owner, "save_state_dict") for owner in owners] + [(CheckpointIndexFile, "write_index_file")]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, function in before:
        setattr(owner, name, _holding(function, errors))
    unpad = padding._hijack_back_detach_and_clone
    before.append((padding, "_hijack_back_detach_and_clone", unpad))
    # Of a padded vocabulary that no tensor parallelism divides, ColossalAI unpads a detached copy, which lacks what it
    # would restore, and raises AttributeError.
    padding._hijack_back_detach_and_clone = lambda tensor: unpad(tensor) if hasattr(tensor, "_unpad_detach") else tensor
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
    raise_on_all_ranks(errors[0] if errors else None)


def _holding(function: Callable[..., Any], errors: list[Exception]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if errors:
            return None
        try:
            return function(*args, **kwargs)
        except ERRORS as error:
            errors.append(error)
            return None

    return guarded
