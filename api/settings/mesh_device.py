"""MESH_DEVICE: the shape of the Galaxy's mesh, as tt-metal's scripts set it."""

import re

from api.errors import OptionError

MESH_DEVICE_VARIABLE = "MESH_DEVICE"
CHIPS_MAX = 4096

_SHAPE = re.compile(r"\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)")


def parse_mesh_device(value: str) -> tuple[int, int]:
    """Rows and columns of "(4,8)". Raises OptionError for anything else."""
    match = _SHAPE.fullmatch(value.strip())
    rows, columns = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= rows * columns <= CHIPS_MAX:
        raise OptionError(f'{MESH_DEVICE_VARIABLE} is {value!r}: write it as rows and columns, like "(4,8)".')
    return rows, columns
