"""Environment variables of the tt-metal demo and its vLLM server: which count here, and which have no effect."""

import re
from collections.abc import Mapping

import structlog

from api.errors import OptionError

MESH_DEVICE_VARIABLE = "MESH_DEVICE"

CHIPS_MAX = 4096

_SHAPE = re.compile(r"\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)")


def parse_mesh_device(value: str) -> tuple[int, int]:
    """Reads the rows and columns of "(4,8)". Raises OptionError for anything else."""
    match = _SHAPE.fullmatch(value.strip())
    rows, columns = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= rows * columns <= CHIPS_MAX:
        raise OptionError(f'{MESH_DEVICE_VARIABLE} is {value!r}: write it as rows and columns, like "(4,8)".')
    return rows, columns


CACHE_VARIABLE = "DEEPSEEK_V3_CACHE"

WITHOUT_EFFECT = (
    "ARCH_NAME",
    "HF_TOKEN",
    "PYTHON_ENV_DIR",
    "TT_METAL_HOME",
    "VLLM_DIR",
    "VLLM_RPC_TIMEOUT",
    "VLLM_TARGET_DEVICE",
    "VLLM_USE_V1",
)
"""Variables that people have set for those programs and that this one does not need."""

log = structlog.get_logger()


def note_environment(environment: Mapping[str, str]) -> None:
    """Logs, once, which variables are set in vain. Raises OptionError if MESH_DEVICE is not a mesh."""
    present = [name for name in WITHOUT_EFFECT if name in environment]
    if present:
        log.info("these environment variables have no effect here", variables=present)
    if mesh := environment.get(MESH_DEVICE_VARIABLE):
        rows, columns = parse_mesh_device(mesh)
        log.info("MESH_DEVICE has no effect on the embedded device", rows=rows, columns=columns)
