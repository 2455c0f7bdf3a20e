"""Names and signatures of the packages that this one replaces: change the import line, keep the call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer as _BlockOptimizer
from colossal_bcd.block.partition import PrefixList, place
from colossal_bcd.block.roster import read_roster
from colossal_bcd.block.schedule import Mode
from colossal_bcd.optim import CAME, Adafactor, Lamb
from colossal_bcd.optim.base import Params

__all__ = ["BlockOptimizer", "DistributedAdaFactor", "DistributedCAME", "DistributedLamb", "badam_partition"]


class BlockOptimizer(_BlockOptimizer):
    """`colossal_bcd.BlockOptimizer` with the call of BAdam's and BREAD's class of that name.

    It behaves as ours where theirs differ from their documentation: it switches after `switch_block_every` steps from
    the first period on, keeps weight decay and learning rate of every group, matches whole name components, and its
    default order is random.  For the blocks of BAdam's first release pass `badam_partition(...)`.

    Args:
        log_fn: called with every line that is logged.
        ds_zero3_enabled: for DeepSpeed's ZeRO-3, which this package does not run under; None or False is right.
        options: every other argument of `colossal_bcd.BlockOptimizer`, by name.
    Raises:
        ValueError: also where the parameters are partitioned by DeepSpeed.
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

    def _report(self, message: str) -> None:
        super()._report(message)
        if self.log_fn is not None:
            self.log_fn(message)


class DistributedLamb(Lamb):
    """LAMB by the formula of ColossalAI's class of that name: the bias correction multiplies the step size.

    It runs under the plugins of `colossal_bcd.booster`, under ColossalAI's own after `colossal_bcd.booster.install()`,
    and on one process.

    Args:
        params: parameters, or param groups as plain dicts.
        lr, betas, eps, weight_decay: as of `colossal_bcd.Lamb`.
        bias_correction: multiply `lr` by sqrt(1 - beta2^t) / (1 - beta1^t) after the trust ratio.
    Raises:
        ValueError: a hyper-parameter is out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        bias_correction: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction)

    def _hyper(self, group: Mapping[str, Any]) -> Any:
        """The groups hold ColossalAI's values, so that groups and checkpoints of its class mean the same here."""
        correction = group["bias_correction"]
        return super()._hyper({**group, "bias_correction": "step_size" if correction is True else correction})


class DistributedAdaFactor(Adafactor):
    """`colossal_bcd.Adafactor` with the call of ColossalAI's class of that name.

    It differs from ColossalAI's where that one differs from the paper and from transformers.Adafactor: `lr` is used,
    and `scale_parameter` multiplies by the root mean square of the weight, which theirs takes for 0.

    Args:
        params: parameters, or param groups as plain dicts.
        lr: step size without `relative_step`; None where every group has its own.
        eps, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, relative_step, warmup_init: as of
            `colossal_bcd.Adafactor`.
    Raises:
        ValueError: a hyper-parameter is out of range, `lr` is given together with `relative_step`, or a group has
            neither.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        groups: list[Any] = list(params)
        super().__init__(
            groups,
            0.0 if lr is None and not relative_step and _bring_lr(groups) else lr,
            eps,
            clip_threshold,
            decay_rate,
            beta1,
            weight_decay,
            scale_parameter,
            relative_step,
            warmup_init,
        )
        self.defaults["lr"] = lr


class DistributedCAME(CAME):
    """`colossal_bcd.CAME` with the call of ColossalAI's class of that name, which is wrong from its second step on.

    Args:
        params: parameters, or param groups as plain dicts.
        lr: step size; None where every group has its own.
        eps, clip_threshold, betas, weight_decay: as of `colossal_bcd.CAME`.
    Raises:
        ValueError: a hyper-parameter is out of range, or a group has no `lr`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
    ) -> None:
        groups: list[Any] = list(params)
        if lr is None and not _bring_lr(groups):
            raise ValueError("DistributedCAME: got lr=None, expected a number, or one in every param group")
        super().__init__(groups, 0.0 if lr is None else lr, eps, clip_threshold, betas, weight_decay)
        self.defaults["lr"] = lr


def _bring_lr(groups: Sequence[Any]) -> bool:
    return bool(groups) and all(isinstance(group, Mapping) and group.get("lr") is not None for group in groups)


def badam_partition(named_parameters_list: Iterable[tuple[str, Parameter]]) -> list[list[str]]:
    """The default blocks of BAdam's first release, as a `block_prefix_list`.

    The embeddings are the first block, every layer is one, and the head, the final norm and all other parameters are
    the last one.  Only what may be trained is listed; a head tied to the embedding is in the embedding's block.

    Args:
        named_parameters_list: pairs as of `model.named_parameters()`.
    """
    roster = read_roster(named_parameters_list)
    embedding: list[str] = []
    layers: dict[str, list[str]] = {}
    others: list[str] = []
    for name in roster.parameters:
        if name not in roster.in_blocks:
            continue
        where = place(name)
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
            "ds_zero3_enabled: the parameters are partitioned by DeepSpeed, whose ZeRO-3 engine is not supported, "
            "expected a model that DeepSpeed has not taken over. Use booster.boost with a plugin of "
            "colossal_bcd.booster, stage 1 or 2."
        )
    if ds_zero3_enabled:
        warnings.warn(
            "ds_zero3_enabled=True has no effect: DeepSpeed's ZeRO-3 is not used here. To shard the training, boost "
            "the "
            "model and this optimizer with a plugin of colossal_bcd.booster.",
            stacklevel=3,
        )
