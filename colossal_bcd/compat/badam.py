"""BlockOptimizer as BAdam and BREAD call it, and the blocks of BAdam's first release."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer as _BlockOptimizer
from colossal_bcd.block.parameters import read_parameters
from colossal_bcd.block.partition import PrefixList
from colossal_bcd.block.schedule import Mode
from colossal_bcd.names import role_of

_REMEDY = (
    "Boost the model and this optimizer with a plugin of colossal_bcd.booster: FSDP2Plugin() shards weights, gradients "
    "and states, which is ZeRO-3, LowLevelZeroPlugin(stage=2) the latter two, and HybridParallelPlugin(tp_size=..., "
    "pp_size=..., zero_stage=1) divides layers."
)


class BlockOptimizer(_BlockOptimizer):
    """`colossal_bcd.BlockOptimizer` with the call of BAdam's and BREAD's class of that name.

    It behaves as ours where theirs differ from their documentation: it switches after `switch_block_every` steps from
    the first period on, keeps weight decay and learning rate of every group, matches whole name components, and its
    default order is random.  For the blocks of BAdam's first release pass `badam_partition(...)`.

    Args:
        log_fn: called with every line that is logged.
        ds_zero3_enabled: for DeepSpeed's ZeRO-3, which this package does not run under; only None and False are taken.
        options: every other argument of `colossal_bcd.BlockOptimizer`, by name.
    Raises:
        ValueError: also where ZeRO-3 of DeepSpeed is asked for, or has partitioned the parameters.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        named_parameters_list: Iterable[tuple[str, Parameter]],
        block_prefix_list: PrefixList | None = None,
        switch_block_every: int = 50,
        start_block: int | None = None,
        switch_mode: Mode = "random",
        active_modules: Sequence[str] = (),
        include_embedding: bool = False,
        include_lm_head: bool = False,
        verbose: int = 1,
        log_fn: Callable[[str], Any] | None = None,
        ds_zero3_enabled: bool | None = None,
        **options: Any,
    ) -> None:
        named_parameters_list = _as_list(named_parameters_list)
        if log_fn is not None and not callable(log_fn):
            raise TypeError(f"log_fn: got a {type(log_fn).__name__}, expected a function of one string, or None")
        _check_zero3(ds_zero3_enabled, named_parameters_list)
        self.log_fn = log_fn
        super().__init__(
            base_optimizer,
            named_parameters_list,
            block_prefix_list,
            switch_block_every=switch_block_every,
            start_block=start_block,
            switch_mode=switch_mode,
            active_modules=active_modules,
            include_embedding=include_embedding,
            include_lm_head=include_lm_head,
            verbose=verbose,
            **options,
        )

    @property
    def ds_optimizer(self) -> None:
        """DeepSpeed's optimizer around this one: there is none, and one that is set raises ValueError."""

    @ds_optimizer.setter
    def ds_optimizer(self, value: Any) -> None:
        if value is not None:
            raise ValueError(
                f"ds_optimizer: got a {type(value).__name__}, expected None: DeepSpeed's engine is not supported. "
                f"{_REMEDY}"
            )

    def _report(self, message: str) -> None:
        super()._report(message)
        if self.log_fn is not None:
            self.log_fn(message)


def badam_partition(named_parameters_list: Iterable[tuple[str, Parameter]]) -> list[list[str]]:
    """The default blocks of BAdam's first release, as a `block_prefix_list`.

    The embeddings are the first block, every layer is one, and the head, the final norm and all other parameters are
    the last one.  Only what may be trained is listed; a head tied to the embedding is in the embedding's block.

    Args:
        named_parameters_list: pairs as of `model.named_parameters()`.
    """
    roster = read_parameters(named_parameters_list)
    embedding: list[str] = []
    layers: dict[str, list[str]] = {}
    others: list[str] = []
    for name in roster.parameters:
        if name not in roster.in_blocks:
            continue
        where = role_of(name)
        if where.layer is not None:
            layers.setdefault(where.layer, []).append(name)
        else:
            (embedding if where.kind == "embedding" else others).append(name)
    return [block for block in (embedding, *layers.values(), others) if block]


def _as_list(named_parameters: Any) -> Any:
    """What is read twice, as a list; what is no iterable is left to the check that names it."""
    return list(named_parameters) if isinstance(named_parameters, Iterable) else named_parameters


def _check_zero3(ds_zero3_enabled: bool | None, named_parameters: Any) -> None:
    items = named_parameters if isinstance(named_parameters, list) else []
    if any(hasattr(item[-1], "ds_id") for item in items if isinstance(item, tuple) and item):
        raise ValueError(
            "named_parameters_list: got parameters that DeepSpeed's ZeRO-3 has partitioned, expected those of a model "
            f"that it has not taken over. {_REMEDY}"
        )
    if ds_zero3_enabled:
        raise ValueError(
            f"ds_zero3_enabled: got {ds_zero3_enabled}, expected None or False: DeepSpeed's ZeRO-3 is not supported. "
            f"{_REMEDY}"
        )
