"""Weights as the command line names them: a directory, a load format and a seed."""

from pathlib import Path
from typing import Literal

from weights.checkpoint import Checkpoint, read_config
from weights.random import RandomCheckpoint
from weights.source import WeightSource


def open_weights(path: Path, *, load_format: Literal["auto", "dummy"], seed: int) -> WeightSource:
    """The checkpoint in the directory `path`, or, with "dummy", random weights from `seed` for its config.json.

    Raises CheckpointError where the directory, or what it must hold, will not do.
    """
    if load_format == "dummy":
        return RandomCheckpoint(read_config(path), seed)
    return Checkpoint.open(path)
