"""What user code reads from ColossalAI's optimizer wrappers, with ColossalAI's meaning.

W: ranks that share masters.  n: values of a parameter on this tensor-parallel rank.  A master, and a slice of a
gradient, is ceil(n / W) values of the flattened parameter, the last rank's padded with zeros; optimizers that know rows
(all of this package but AdamW and Lamb) may have slices of whole rows, which are up to 1 % longer.  At stage 0 W is 1,
and a master has the shape of its parameter.  Under block coordinate descent all of it is about what is active now.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_mixin import BF16MixedPrecisionMixin
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from colossal_bcd.block.trained import Trained, trained_of
from colossal_bcd.booster.gradients import Clipping
from colossal_bcd.checkpoint.save import Pinned, state_shards
from colossal_bcd.checkpoint.trained import EngineState
from colossal_bcd.engine.masters import gather_rows

logger = logging.getLogger(__name__)

STORES = {
    "pg_to_grad_store": "get_param_grad(param) or get_partitioned_gradients_by_param_id(group_id, id(param))",
    "pid_to_grad_store": "get_param_grad(param) or get_working_grad_by_param_id(id(param))",
    "pg_to_bucket_store": "no_sync() to accumulate, and zero_grad() to forget",
    "pid_to_bucket_store": "no_sync() to accumulate, and zero_grad() to forget",
    "pg_to_tensor_bucket": "master_to_working_param to find the weight of a master",
}
"""ColossalAI's attributes for its bookkeeping, of which there is none here, and what to read instead."""

_STATE_HOOK = (
    "state is gathered from all ranks here, past the optimizer's own state_dict and load_state_dict. Do what the hook "
    "would do beside state_dict(), load_state_dict() and booster.save_optimizer."
)
REFUSED: dict[str, tuple[type[Exception], str]] = {
    "link_master_and_working_param": (
        ValueError,
        "masters are made here from the weights. Write the weight and call update_master_params(model).",
    ),
    "record_param_padding_size": (
        ValueError,
        "padding follows from a weight's shape and the number of ranks here. Read it with "
        "get_param_padding_size(param).",
    ),
    "scale_loss": (NotImplementedError, "backward(loss) of a boosted optimizer scales it. Call that alone."),
    "unscale_grad": (NotImplementedError, "step() undoes the loss scale. To clip before, use clip_grad_by_norm."),
    **{
        f"register_{which}_{when}_hook": (ValueError, _STATE_HOOK)
        for which in ("state_dict", "load_state_dict")
        for when in ("pre", "post")
    },
}
"""ColossalAI's and torch's methods that have no meaning here: the error of a call, and what to do instead."""


def _absent(name: str, instead: str) -> property:
    def refuse(_: Any) -> NoReturn:
        raise AttributeError(f"{name}: gradients are not kept in ColossalAI's stores here. Use {instead}.")

    return property(refuse, doc=f"Refused: use {instead}.")


def _refused(name: str, error: type[Exception], instead: str) -> Callable[..., NoReturn]:
    def refuse(_: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise error(f"{name}: {instead}")

    refuse.__name__, refuse.__doc__ = name, f"Refuse: {instead}"
    return refuse


class StockSurface(Clipping):
    """Mixin of `ZeroOptimizer`, before ColossalAI's class in the order of bases."""

    trained: Trained
    optim: Any
    model: Any
    layouts: Mapping[Parameter, Any]
    parameter_names: Mapping[int, str]
    tp_pg: dist.ProcessGroup | None
    pp_pg: dist.ProcessGroup | None
    param_to_pg: dict[Parameter, Any]
    _keys: dict[int, int]
    _working_param_groups: dict[int, list[Parameter]]

    def __del__(self) -> None:
        """Give the weights' hooks back, so that another optimizer can be made for the model."""
        reducer = vars(self).get("_reducer")
        if reducer is not None:
            reducer.detach()

    # Weights and masters

    @property
    def working_to_master_param(self) -> dict[int, Tensor]:
        """Id of a weight -> its master."""
        return {id(param): master for param, master in self.masters.of.items()}

    @property
    def working_to_master_map(self) -> dict[Parameter, Tensor]:
        """Weight -> its master."""
        return dict(self.masters.of)

    @property
    def master_to_working_map(self) -> dict[Tensor, Parameter]:
        """Master -> its weight."""
        return {master: param for param, master in self.masters.of.items()}

    def get_working_to_master_map(self) -> dict[int, Tensor]:
        """`working_to_master_param`; every rank's masters, side by side and cut to n values, are the whole weight."""
        return self.working_to_master_param

    def get_master_to_working_map(self) -> dict[int, Tensor]:
        """Id of a master -> its weight."""
        return {id(master): param for param, master in self.masters.of.items()}

    def get_master_params(self) -> Iterator[Tensor]:
        """All masters."""
        yield from self.masters.of.values()

    # Padding

    def get_param_padding_size(self, param: Tensor) -> int:
        """Zeros behind the n values of a weight in its W slices.

        Raises:
            ValueError: it does not train now.
        """
        return self.masters.num_shards * self._master_of(param).numel() - param.numel()

    def get_param_padding_map(self) -> dict[int, int]:
        """Id of a weight -> `get_param_padding_size`."""
        return {id(param): self.get_param_padding_size(param) for param in self.masters.of}

    def get_padding_map(self) -> dict[int, int]:
        """`get_param_padding_map`."""
        return self.get_param_padding_map()

    # Averaged gradients, between the end of a backward pass and the step; with loss scaling they have its factor

    def get_param_grad(self, working_param: Parameter) -> Tensor | None:
        """The averaged gradient of a weight in its shape, or None if it has none.  All ranks must call.

        Raises:
            ValueError: the weight is not of this optimizer, or only its low-rank gradient is reduced.
        """
        grad = self._average_of(working_param)
        if grad is None:
            return None
        if self.config.partition_grad:
            rows, work = gather_rows(grad, self.config.data_groups)
            if work is not None:
                work.wait()
            grad = rows.view(-1)
        whole = grad[: working_param.numel()].view(working_param.shape).clone()
        self._sequence.add_up([working_param], {working_param: whole})
        return whole

    def get_partitioned_gradients_by_param_id(self, group_id: int, param_id: int) -> list[Tensor]:
        """This rank's slice of an averaged gradient at stage 2, else those of all ranks; empty if there is none.

        What is written into the slices counts in the step.
        """
        param = self._param_of(param_id)
        in_group = any(other is param for other in self._working_param_groups.get(group_id, ()))
        if not in_group or self._average_of(param) is None:
            return []
        return self._slices(param)

    def get_working_grad_by_param_id(self, param_id: int) -> Tensor | None:
        """This rank's slice of an averaged gradient, or None."""
        param = self._param_of(param_id)
        return None if self._average_of(param) is None else self._slices(param)[self._this_slice]

    def get_working_grads_by_group_id(self, group_id: int) -> list[Tensor]:
        """This rank's slices of the averaged gradients in a param group."""
        params = self._working_param_groups[group_id]
        return [self._slices(param)[self._this_slice] for param in params if self._average_of(param) is not None]

    def get_param_id_for_grad(self, grad: Tensor) -> int | None:
        """Id of the weight of which a tensor is (part of) the averaged gradient, or None."""
        storage = grad.untyped_storage().data_ptr()
        for param, average in self._reducer.grads.items():
            if average.untyped_storage().data_ptr() == storage:
                return id(param)
        return None

    def zero_grad_stores(self) -> None:
        """Forget averaged gradients, not what `no_sync` has left to be averaged."""
        self._reducer.take_back()
        self._reducer.grads.clear()

    def zero_bucket_stores(self) -> None:
        """Forget gradients whose average is under way."""
        self._reducer.drop_buckets()

    # State dicts

    def state_dict_shard(
        self, max_shard_size: float = 1024, pinned_state_dicts: Pinned | None = None, only_on_master: bool = False
    ) -> Iterator[tuple[dict[int, dict[str, Any]], float]]:
        """The optimizer's state by number of the parameter, some parameters at a time; all ranks must exhaust it.

        Args:
            max_shard_size: MiB of tensors in a shard, unless a parameter has more.
            pinned_state_dicts: number -> name -> buffer on the CPU, filled, and made where there is none.
            only_on_master: the other ranks get numbers without tensors.
        Returns:
            Iterator over (state, its MiB).
        """
        return state_shards(
            EngineState(self, self.parameter_names),
            max_shard_size,
            everywhere=not only_on_master,
            pinned=pinned_state_dicts,
        )

    # What the plugin has decided

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(iter(self.layouts)).dtype if self.layouts else torch.float32

    @property
    def mixed_precision(self) -> Any:
        """The loss scaler in fp16, ColossalAI's mixin without one in bf16, else None."""
        if self.mixed_precision_mixin is None and self.dtype == torch.bfloat16:
            return BF16MixedPrecisionMixin()
        return self.mixed_precision_mixin

    @property
    def max_norm(self) -> float:
        """Largest norm of the gradients in a step, as the plugin was given it; 0: any."""
        return self.config.max_norm

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""
        return 1 if self.tp_pg is None else dist.get_world_size(self.tp_pg)

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""
        return 1 if self.pp_pg is None else dist.get_world_size(self.pp_pg)

    @property
    def pg_to_param_list(self) -> dict[Any, list[Parameter]]:
        """Process group that shares masters (several: a tuple; None: no ranks share them) -> weights."""
        lists: dict[Any, list[Parameter]] = {}
        for param, group in self.param_to_pg.items():
            lists.setdefault(group, []).append(param)
        return lists

    @property
    def grad_handles(self) -> list[RemovableHandle]:
        """Handles of the hooks on the weights."""
        return self._reducer.handles

    # torch.optim.Optimizer

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` before each step that is taken, on masters that have their gradients."""
        return self._base.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` after each step of the masters, before the weights are gathered."""
        return self._base.register_step_post_hook(hook)

    @property
    def _base(self) -> Any:
        """The optimizer whose `step` updates the masters."""
        return self.trained.base_optimizer

    @property
    def _this_slice(self) -> int:
        """Index of this rank's slice in what `_slices` returns."""
        return 0 if self.config.partition_grad or not self.config.zero_groups else self.masters.shard

    def _master_of(self, param: Any) -> Tensor:
        if param not in self.masters.of:
            raise ValueError(
                f"a tensor of shape {tuple(param.shape)} does not train now, expected a weight that this optimizer "
                "trains: a parameter of model.unwrap(), of the active block under block coordinate descent."
            )
        return self.masters.of[param]

    def _param_of(self, param_id: int) -> Parameter:
        for param in self.layouts:
            if id(param) == param_id:
                return param
        raise ValueError(f"parameter id {param_id}: got the id of no weight of this optimizer, expected id(param)")

    def _average_of(self, param: Any) -> Tensor | None:
        """Flat averaged gradient as it is kept; None if there is none."""
        if param not in self.layouts:
            raise ValueError(
                f"got a tensor of shape {tuple(param.shape)} that is no weight of this optimizer, expected a parameter "
                "of model.unwrap()"
            )
        if param in self._reducer.low_rank and param in self._reducer.grads:
            raise ValueError(
                f"the gradient of a projected weight of shape {tuple(param.shape)} is reduced as a low-rank one "
                "between refreshes. Give the plugin low_rank=LowRankOptions(reduce=False) to have whole ones."
            )
        return self._reducer.grads.get(param)

    def _slices(self, param: Parameter) -> list[Tensor]:
        """Views of the averaged gradient by rank, of this rank alone at stage 2."""
        average = self._reducer.grads[param]
        if self.config.partition_grad or not self.config.zero_groups:
            return [average]
        length, num_slices = self._master_of(param).numel(), self.masters.num_shards
        if average.untyped_storage().nbytes() < num_slices * length * average.itemsize:
            padded = torch.nn.functional.pad(average, (0, num_slices * length - average.numel()))
            self._reducer.grads[param] = padded[: average.numel()]
            if self._reducer.shown.get(param):
                param.grad = self._reducer.grads[param].view(param.shape)
            average = padded
        return list(average.as_strided((num_slices, length), (length, 1)).unbind())

    def _say_overflow(self) -> None:
        if self.config.verbose and dist.get_rank() == 0:
            scale = self.mixed_precision_mixin.loss_scale
            logger.info("overflow: this step is skipped, the loss scale is now %g", scale)


for _name, _instead in STORES.items():
    setattr(StockSurface, _name, _absent(_name, _instead))
for _name, (_error, _instead) in REFUSED.items():
    setattr(StockSurface, _name, _refused(_name, _error, _instead))


def param_info_of(optimizer: Any) -> dict[str, Any]:
    """What ColossalAI notes of an optimizer before it shards the model: numbers, ids and shapes of its parameters."""
    trained = trained_of(optimizer)
    numbers, groups = trained.keys(), []
    for group, params in zip(trained.base_optimizer.param_groups, trained.members, strict=True):
        packed = {name: value for name, value in group.items() if name != "params"}
        groups.append({**packed, "params": [numbers[id(param)] for param in params]})
    return {
        "param_groups": groups,
        "param2id": numbers,
        "id2param": {number: key for key, number in numbers.items()},
        "param2shape": {id(param): param.shape for param in trained.parameters()},
    }


def mend_state(optimizer: Optimizer) -> None:
    """Make state that was emptied by `optim.state = []` an empty table, which loading fills.

    Raises:
        TypeError: it is something else with values.
    """
    if isinstance(optimizer.state, Mapping):
        return
    if optimizer.state:
        raise TypeError(
            f"load_state_dict: got {type(optimizer.state).__name__} as the optimizer's state, expected a dict by "
            "tensor. Leave optimizer.state alone; load_state_dict replaces what is in it."
        )
    optimizer.state = defaultdict(dict)
