"""What a pipeline is told at its start."""

from typing import Literal

import msgspec

from stages.options import ITEM_BYTES, StageOptions
from stages.plan import StageSpec

Device = Literal["embedded", "ttnn"]

STAGE_RUNNER = "stages.stage:Stage.load"


class PipelineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `Pipeline.start` needs.

    `hidden_size` is the model's: hidden states are [tokens, hidden_size] in `stage.dtype`. Each stage owns
    `rows_per_stage` Galaxy rows of one host. `ray_address` is that of a running cluster; with None the environment's
    RAY_ADDRESS counts, and without it a cluster on this host alone is started. `runner` is the import path
    "module:attribute" of what makes a stage's runner (a `RunnerFactory`).
    """

    hidden_size: int
    specs: list[StageSpec]
    stage: StageOptions
    device: Device
    rows_per_stage: int
    ray_address: str | None
    start_timeout_s: float
    step_timeout_s: float
    runner: str = STAGE_RUNNER

    @property
    def bytes_per_token(self) -> int:
        """Length of one token's hidden state."""
        return self.hidden_size * ITEM_BYTES[self.stage.dtype]
