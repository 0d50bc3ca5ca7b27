"""What people have set for the tt-metal demo and for vLLM: variables that count here, and what has no effect."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from actors.log import LateLogger
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


class VainOption(NamedTuple):
    """An option of vLLM's server that is taken and has no effect; `why` is half a sentence.

    A switch takes no value, and may be turned off: --enable-x and --no-enable-x.
    """

    flags: tuple[str, ...]
    why: str
    is_switch: bool = False


_ALWAYS = "it is always on: see --reasoning-parser and --tool-call-parser"
_NO_GRAPHS = "chips capture steps with --enable-trace only, and the embedded device those that recur"
_LOGS = "requests are counted in /metrics, and --log-level says what is logged"
_MEMORY = "--num-blocks and --max-num-seqs say what the KV cache takes"

VAIN_OPTIONS = (
    VainOption(
        ("--tensor-parallel-size", "-tp"), "all chips of a stage's rows share its tensors: see --rows-per-stage"
    ),
    VainOption(("--enable-expert-parallel",), "experts are always shared out to the chips of a stage", is_switch=True),
    VainOption(("--distributed-executor-backend",), "stages are always Ray actors"),
    VainOption(("--gpu-memory-utilization",), _MEMORY),
    VainOption(("--swap-space",), _MEMORY),
    VainOption(("--cpu-offload-gb",), _MEMORY),
    VainOption(("--enforce-eager",), _NO_GRAPHS, is_switch=True),
    VainOption(("--max-seq-len-to-capture",), _NO_GRAPHS),
    VainOption(("--disable-custom-all-reduce",), "collectives are the device's own", is_switch=True),
    VainOption(("--max-parallel-loading-workers",), "every stage loads its own layers"),
    VainOption(("--trust-remote-code",), "code of a model is never run", is_switch=True),
    VainOption(("--download-dir",), "nothing is downloaded"),
    VainOption(("--enable-chunked-prefill",), "prompts are always computed in chunks", is_switch=True),
    VainOption(("--num-scheduler-steps",), "each token is scheduled when its step returns"),
    VainOption(("--scheduling-policy",), "requests run in the order of their arrival"),
    VainOption(("--enable-reasoning",), _ALWAYS, is_switch=True),
    VainOption(("--enable-auto-tool-choice",), _ALWAYS, is_switch=True),
    VainOption(("--enable-prompt-tokens-details",), "usage always says what was cached", is_switch=True),
    VainOption(("--chat-template-content-format",), "the content of messages is text"),
    VainOption(("--response-role",), "answers are the assistant's"),
    VainOption(("--uvicorn-log-level",), _LOGS),
    VainOption(("--disable-log-requests",), _LOGS, is_switch=True),
    VainOption(("--enable-log-requests",), _LOGS, is_switch=True),
    VainOption(("--disable-log-stats",), _LOGS, is_switch=True),
    VainOption(("--disable-uvicorn-access-log",), _LOGS, is_switch=True),
)
"""What command lines for vLLM have, and this server does without. Options that would change an answer are not here."""

log = LateLogger(__name__)


def note_environment(environment: Mapping[str, str]) -> None:
    """Logs, once, which variables are set in vain. Raises OptionError if MESH_DEVICE is not a mesh."""
    present = [name for name in WITHOUT_EFFECT if name in environment]
    if present:
        log.info("these environment variables have no effect here", variables=present)
    if mesh := environment.get(MESH_DEVICE_VARIABLE):
        rows, columns = parse_mesh_device(mesh)
        log.info("MESH_DEVICE has no effect on the embedded device", rows=rows, columns=columns)
