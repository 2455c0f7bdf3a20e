"""A model that tensor parallelism leaves as it is: ColossalAI has policies for models of libraries only."""

from __future__ import annotations

from typing import Any

from colossalai.shardformer.policies.base_policy import Policy
from torch import nn


class Undivided(Policy):
    """Divides nothing."""

    def config_sanity_check(self) -> None: ...

    def preprocess(self) -> nn.Module:
        return self.model

    def module_policy(self) -> dict[Any, Any]:
        return {}

    def postprocess(self) -> nn.Module:
        return self.model
