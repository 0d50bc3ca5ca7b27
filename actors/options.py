"""The options of a pipeline."""

from typing import Literal

import msgspec

from actors.sockets.host import SILENCE_SECONDS
from stages.device import Device
from stages.errors import PlanError
from stages.options import ITEM_BYTES, StageOptions
from stages.plan import StageSpec

Transport = Literal["host", "mesh"]

STAGE_RUNNER = "stages.stage:Stage.load"
TIMED_RUNNER = "stages.timed.stage:TimedStage.load"
COMPILING_SECONDS = 60.0
"""How long a process on chips may be silent: while ttnn compiles kernels, none of its other threads runs."""
FIFO_BYTES = 1 << 14
"""Bytes of each chip's L1 that a mesh socket takes: room for eight bfloat16 tiles."""


class PipelineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `Pipeline.start` needs.

    `hidden_size` is the model's: hidden states are [tokens, hidden_size] in `stage.dtype`. Each stage owns
    `rows_per_stage` Galaxy rows of one host. `ray_address` is that of a running cluster; with None it is RAY_ADDRESS of
    the environment, and without that a cluster on this host alone is started. Rows that others use are waited for
    `placement_timeout_s`. `runner` is the import path "module:attribute" of what makes a stage's runner (a
    `RunnerFactory`).

    With the transport "host" hidden states are sent with the steps, through host sockets; with "mesh", which needs the
    device "ttnn" and links between the stages' chips, they go from mesh to mesh, `fifo_bytes` of them at a time to each
    chip. `environments` has what is added to the environment of each stage; where it is empty, nothing is. A start is
    refused at once where the cluster could not hold `pipelines` of this size, this one and others like it. With `spare`
    a process on each host waits to take the place of a stage that is lost.
    """

    hidden_size: int
    specs: list[StageSpec]
    stage: StageOptions
    device: Device
    rows_per_stage: int
    ray_address: str | None
    start_timeout_s: float
    step_timeout_s: float
    placement_timeout_s: float = 30.0
    runner: str = STAGE_RUNNER
    transport: Transport = "host"
    fifo_bytes: int = FIFO_BYTES
    environments: list[dict[str, str]] = []
    pipelines: int = 1
    spare: bool = True

    def __post_init__(self) -> None:
        if self.transport == "mesh" and self.device != "ttnn":
            raise PlanError(f"The transport 'mesh' joins chips, and the {self.device} device has none: choose 'host'.")
        if self.environments and len(self.environments) != len(self.specs):
            raise PlanError(f"{len(self.environments)} environments were given for {len(self.specs)} stages.")

    def environment(self, stage: int) -> dict[str, str]:
        """Returns what is added to a stage's environment."""
        return self.environments[stage] if self.environments else {}

    @property
    def silence_s(self) -> float:
        """Seconds without a heartbeat after which a stage is considered dead."""
        return COMPILING_SECONDS if self.device == "ttnn" else SILENCE_SECONDS

    @property
    def bytes_per_token(self) -> int:
        """Length of one token's hidden state."""
        return self.hidden_size * ITEM_BYTES[self.stage.dtype]
