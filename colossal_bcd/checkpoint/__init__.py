"""Checkpoints with everything that a run needs, in files that do not depend on the mesh; see docs/checkpoints.md.

A file has full tensors, and each rank has a region of a full tensor.  Here is a weight of shape (4, 6) on six ranks:
tensor parallelism halves its columns, and ZeRO gives slices of 5 values to three ranks of each half.

    (tp, zero)          (0,0)   (0,1)   (0,2)   (1,0)   (1,1)   (1,2)
    rank's tensor       aaaaa   bbbbb   cc...   ddddd   eeeee   ff...     . = padding, which is in no file

    full tensor         a a a | d d d       Every rank announces its tensors with their regions: rank (0,1) has
    in the file         a a b | d d e       values 5 to 10 of shard 0 of 2 along dim 1.  Of all ranks with one region
                        b b b | e e e       the first sends it to rank 0, which fills the full tensor and writes it.
                        b c c | e f f       Loading is the way back: each rank picks its region of the new mesh.

Saving, in the order of the calls
    save         `save_folder`, `save_file`, and state dicts in memory: follows the steps below
    trained      the tensors that the engine trains on this rank, with their names and layouts, and the contributors,
                 which are what else has tensors: residuals, corrections
    values       state that nobody declared, and plain Python values, as a manifest has them
    assembly     `LocalTensors` of a rank -> one exchange of names -> `Assembly`: who sends which region of what
    manifest     the index of a checkpoint: names, shapes, hyper-parameters, schedule
    files        one file of tensors, written aside, checked and renamed
Loading: everything is checked on all ranks before anything is changed
    opened       what a folder or a file has, tensors being read when they are asked for
    foreign      state that torch, the original block optimizer or ColossalAI wrote, as if it were ours
    load         compares it with the optimizer, then gives every rank its regions
Around both
    folder       `CheckpointFolder`: checkpoints of a run, each complete or not there
    errors       `CheckpointError`, raised on all ranks together
"""

from colossal_bcd.checkpoint.errors import CheckpointError
from colossal_bcd.checkpoint.folder import CheckpointFolder, Resumed

__all__ = ["CheckpointError", "CheckpointFolder", "Resumed"]
