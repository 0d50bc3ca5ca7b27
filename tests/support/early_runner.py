"""A runner that records the state of its process when this module was imported."""

import os
import sys

HAD_TORCH = "torch" in sys.modules
VARIABLE = "GALAXYLINE_EARLY"
NAMES = (VARIABLE, "GALAXYLINE_DEVICE", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
SEEN = {name: os.environ.get(name) for name in NAMES}

import torch  # noqa: E402 - the rest has to come first

from actors.stage.runner import OnProgress, StageRunner  # noqa: E402
from stages.options import StageOptions  # noqa: E402
from stages.plan import StageSpec  # noqa: E402
from tests.support.runners import EchoRunner  # noqa: E402
from weights.errors import CheckpointError  # noqa: E402


def load(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Makes an echo; raises unless everything that torch reads was set before it was imported."""
    if HAD_TORCH or None in SEEN.values():
        raise CheckpointError(f"torch was imported too early: {SEEN}")
    if torch.get_num_threads() != int(os.environ["OMP_NUM_THREADS"]):
        raise CheckpointError(f"torch has {torch.get_num_threads()} threads")
    return EchoRunner(spec)
