"""Checkpoints that hold everything a run needs, in files that do not depend on the mesh; see docs/checkpoints.md.

What is saved
    trained        the tensors that the engine trains on this rank, with their names and layouts
    contributors   what else has tensors of its own: masters of waiting blocks, residuals, corrections
    undeclared     state of optimizers of other packages, found by looking
    values         plain Python values among the state
    random_state   the states of random number generators
Where the bytes are
    assembly       which rank writes or reads which region of which full tensor
    files          one file of tensors, written and checked
    manifest       the index of a checkpoint: names, shapes, schedule
    folder         `CheckpointFolder`: checkpoints of a run, complete or not there
The two directions
    save, stream   from ranks to files, or to tensors in memory
    opened, verify, load, load_undeclared   from files to ranks: everything is checked on all ranks, then changed
    foreign        state that torch, the original block optimizer or ColossalAI wrote
    errors         `CheckpointError`, raised on all ranks together
"""

from colossal_bcd.checkpoint.errors import CheckpointError
from colossal_bcd.checkpoint.folder import CheckpointFolder, Resumed

__all__ = ["CheckpointError", "CheckpointFolder", "Resumed"]
