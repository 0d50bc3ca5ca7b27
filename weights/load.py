"""Weights as the command line names them: a directory, a load format and a seed."""

from pathlib import Path
from typing import Literal

from weights.checkpoint import Checkpoint, read_config
from weights.model_config import UNCHANGED, ConfigChanges
from weights.random import RandomCheckpoint
from weights.source import WeightSource


def open_weights(
    path: Path, *, load_format: Literal["auto", "dummy"], seed: int, changes: ConfigChanges = UNCHANGED
) -> WeightSource:
    """The checkpoint in the directory `path`, or, with "dummy", random weights from `seed` for its config.json.

    Only the layers that `changes` leave are there. Raises CheckpointError where the directory, or what it must hold,
    will not do.
    """
    if load_format == "dummy":
        return RandomCheckpoint(read_config(path).changed(changes), seed)
    return Checkpoint.open(path, changes)
