"""Checkpoints that hold everything a run needs, in files that do not depend on the mesh; see docs/checkpoints.md."""

from colossal_bcd.booster.checkpoint.errors import CheckpointError
from colossal_bcd.booster.checkpoint.folder import CheckpointFolder, Resumed
from colossal_bcd.booster.checkpoint.io import checkpoint_io

__all__ = ["CheckpointError", "CheckpointFolder", "Resumed", "checkpoint_io"]
