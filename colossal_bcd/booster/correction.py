"""How an engine brings its averages of gradients to the corrections of a BlockOptimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.nn import Parameter

from colossal_bcd.block.correction.correction import CorrectionState
from colossal_bcd.engine.correction import CorrectingReducer, CorrectionConfig


class EngineGradients:
    """The engine's side of a BlockOptimizer's corrections.

    Args:
        engine: a `ZeroOptimizer`, whose reducer is replaced at every switch.
        corrector: what updates the weights.
    Raises:
        ValueError: sequence parallelism leaves gradients that are parts of a sum.
    """

    def __init__(self, engine: Any, corrector: CorrectionState) -> None:
        shard_config = getattr(engine.model, "shard_config", None)
        if shard_config is not None and shard_config.enable_sequence_parallelism:
            raise ValueError(
                f"sgd_mode: got {corrector.mode!r} with sequence parallelism "
                f"({shard_config.sequence_parallelism_mode!r}), whose gradients are partial sums within backward. Use "
                "sgd_mode='disabled' or enable_sequence_parallelism=False."
            )
        self._engine = engine
        corrector.bind(engine.layouts, engine._mesh)
        scaler = engine.mixed_precision_mixin
        self._config = CorrectionConfig(
            corrector=corrector,
            by_pipeline=engine.pp_pg is not None,
            tied=frozenset(param for shared in engine.shared_params for param in shared.values()),
            loss_scale=None if scaler is None else lambda: scaler.loss_scale,
            tp_group=engine.tp_pg,
        )

    def activate(self, params: Sequence[Parameter]) -> None:
        engine = self._engine
        engine._reducer.detach()
        config = engine._reducer_config()
        asks = self._config.corrector.by_bucket and self._config.tp_group is not None
        if math.prod(config.sizes) == 1 and not asks:
            # Nothing is sent: no gradient needs to wait for a bucket to fill.
            config = replace(config, bucket_size=0)
        engine._reducer = CorrectingReducer(list(engine.masters.of), params, list(engine.layouts), config, self._config)

    def settle(self) -> None:
        self._engine._reducer.settle()

    def clear(self) -> None:
        self._engine._reducer.clear()


def corrections_of(engine: Any, corrector: CorrectionState | None) -> EngineGradients | None:
    """What brings an engine's averages to a corrector; None for none."""
    return None if corrector is None else EngineGradients(engine, corrector)
