"""The devices that a process can compute on, and everything that differs between them outside `stages/backend/`."""

from typing import Literal

import msgspec

from stages.wormhole import GALAXY_COLUMNS, PREFILL_CHUNK

Device = Literal["embedded", "ttnn", "timed"]

DEVICE_VARIABLE = "GALAXYLINE_DEVICE"
"""The environment variable that names the device of a process; stages/backend/ reads it on import."""


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about one device.

    `hidden_dtype` is the dtype of what passes between modules and between stages, where the device leaves no choice.
    `columns` is the number of chips of a row. `transport` is how hidden states pass between several stages unless an
    option says otherwise. After `silence_s` without a heartbeat a stage is considered dead; None leaves the sockets'
    own limit. `computes` is False where stages only take time: they read no weights and keep no cache. `runner` is the
    import path "module:attribute" of what makes a stage's runner. `prefill_chunk` is the most tokens of a prefill step
    unless an option says otherwise: as vLLM's server has them, or fewer where chips keep memory for them.
    """

    prefill_chunk: int = 2048
    has_chips: bool = False
    computes: bool = True
    hidden_dtype: Literal["bfloat16"] | None = None
    columns: int = 1
    transport: Literal["host", "mesh"] = "host"
    silence_s: float | None = None
    runner: str = "stages.stage:Stage.load"

    def mesh_shape(self, rows: int) -> tuple[int, int]:
        """The rows and columns of the mesh of a stage that owns so many Galaxy rows."""
        return (rows, self.columns) if self.has_chips else (1, 1)


PROFILES: dict[Device, DeviceProfile] = {
    "embedded": DeviceProfile(),
    "ttnn": DeviceProfile(
        prefill_chunk=PREFILL_CHUNK,
        has_chips=True,
        hidden_dtype="bfloat16",
        columns=GALAXY_COLUMNS,
        transport="mesh",
        # While ttnn compiles kernels, no other thread of its process runs.
        silence_s=60.0,
    ),
    "timed": DeviceProfile(prefill_chunk=PREFILL_CHUNK, computes=False, runner="stages.timed.stage:TimedStage.load"),
}
