"""Binds the name `ttnn` once for the process: the embedded device, or the real package on a Galaxy.

GALAXYLINE_DEVICE chooses: "embedded" (the default) or "ttnn".
"""

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from stages.backend.embedded.dtype import set_float_dtype as _hold_floats_in
from stages.device import DEVICE_VARIABLE
from stages.errors import DeviceError
from stages.wormhole import USERS_PER_ROW

DEVICE = os.environ.get(DEVICE_VARIABLE, "embedded")
"""The device of this process."""

PADDED_USERS_PER_ROW = USERS_PER_ROW if DEVICE == "ttnn" else 0
"""The number of users that a decode step is padded to on every row, so that it has few shapes: chips compile a program
for each shape, need a tile for one user as for 32, and replay traces of fixed shapes only. 0: steps are not padded."""


def bind(device: str) -> ModuleType:
    """The module that `ttnn` means on `device`. Raises DeviceError for an unknown device or a missing package."""
    if device == "embedded":
        return importlib.import_module("stages.backend.embedded")
    if device != "ttnn":
        raise DeviceError(f"GALAXYLINE_DEVICE is {device!r}: choose 'embedded' or 'ttnn'.")
    try:
        return importlib.import_module("ttnn")
    except ImportError as error:
        raise DeviceError(
            f"GALAXYLINE_DEVICE is 'ttnn', but that package cannot be imported ({error}): install galaxyline[galaxy] "
            "under Python 3.10 or 3.12, or unset GALAXYLINE_DEVICE."
        ) from error


if TYPE_CHECKING:
    from stages.backend import embedded as ttnn
else:
    ttnn = bind(DEVICE)


def set_float_dtype(dtype: torch.dtype) -> None:
    """Sets the torch dtype in which the embedded device holds floats narrower than float32.

    On chips this does nothing, as every tensor is held in its own dtype.
    """
    if DEVICE == "embedded":
        _hold_floats_in(dtype)
