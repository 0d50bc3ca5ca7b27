"""Which device a process computes on, and what the devices differ in."""

from typing import Literal

Device = Literal["embedded", "ttnn", "timed"]

DEVICE_VARIABLE = "GALAXYLINE_DEVICE"
"""The environment variable that names the device of a process; stages/backend/ reads it on import."""
