"""What a process does ahead of being told its stage: it imports what its device needs.

Nothing here may import torch before the environment is set.
"""

import importlib
import os
import threading

import msgspec

from actors.stage.cores import set_thread_variables, share_cores
from actors.stage.runner import runner_factory
from stages.device import DEVICE_VARIABLE, Device

NICENESS = 5
"""Of the thread that imports, while stages serve: where both want a core it gets a quarter of it."""


class Preparation(msgspec.Struct, frozen=True, kw_only=True):
    """What stages of one host have in common, `neighbours` of them; see `StageSetup`."""

    device: Device
    runner: str
    neighbours: int
    environment: dict[str, str]


def prepare(preparation: Preparation) -> None:
    """Sets the environment that imports read, then imports. For a thread of its own, whose niceness it raises.

    ttnn looks for the chips that it may see when it is imported, which only a stage's own environment tells: it gets no
    further than torch. Raises StartError if there is no such runner.
    """
    os.environ[DEVICE_VARIABLE] = preparation.device
    os.environ.update(preparation.environment)
    # Cores are bound, and threads counted anew, when it is known which stage it is to be.
    share = share_cores(sorted(os.sched_getaffinity(0)), preparation.neighbours)[0]
    set_thread_variables(share.threads, os.environ)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    if preparation.device == "ttnn":
        importlib.import_module("torch")
    else:
        runner_factory(preparation.runner)
