"""The options that `Pipeline.start` is given."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from stages.device import PROFILES, Device, DeviceProfile
from stages.errors import PlanError
from stages.options import ITEM_BYTES, StageOptions
from stages.plan import StageSpec

Transport = Literal["host", "mesh"]

FIFO_BYTES = 1 << 14
"""What a mesh socket takes of each chip's L1: room for eight bfloat16 tiles."""


class ClusterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the stages of a pipeline run, and how long they may take. Times are in seconds.

    Without `ray_address` the environment's RAY_ADDRESS counts, and without that a cluster on this host alone is
    started.
    """

    device: Annotated[
        Device,
        Meta(
            description="What computes: this host's processor; the chips of Galaxies (needs galaxyline[galaxy] on "
            "their hosts); or nothing, in the time that chips are predicted to take, or that --stage-time gives."
        ),
    ] = "embedded"
    rows_per_stage: Annotated[int, Meta(ge=1, description="Galaxy rows of 8 chips that a stage owns.")] = 1
    ray_address: Annotated[
        str | None,
        Meta(description="A running Ray cluster.", extra={"default": "$RAY_ADDRESS, else one of our own"}),
    ] = None
    start_timeout_s: Annotated[float, Meta(gt=0, description="Seconds until all stages are ready.")] = 600.0
    placement_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds that Galaxy rows which others use are waited for.")
    ] = 30.0
    step_timeout_s: Annotated[float, Meta(gt=0, description="Seconds that one step may take.")] = 60.0
    spare: Annotated[
        bool,
        Meta(
            description="Keep a process on each host that has imported everything and takes the place of a stage that "
            "is lost."
        ),
    ] = True

    @property
    def profile(self) -> DeviceProfile:
        """The facts about the device."""
        return PROFILES[self.device]


class PipelineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `Pipeline.start` needs.

    `hidden_size` is the model's: hidden states are [tokens, hidden_size] in `stage.dtype`. Each stage owns
    `cluster.rows_per_stage` Galaxy rows of one host. `runner` is the import path "module:attribute" of what makes a
    stage's runner (a `RunnerFactory`).

    With the transport "host" hidden states travel beside steps, through host sockets; with "mesh", which needs the
    device "ttnn" and links between the stages' chips, they go from mesh to mesh, `fifo_bytes` of them at a time to each
    chip. `environments` is what is added to each stage's environment, nothing where it is empty. The cluster has to
    hold `pipelines` of this size, this one and others like it: it is refused at once where it cannot. `directory` is a
    `RunDirectory` that the caller has made; without one the pipeline makes its own. `stderr` is where stages write what
    they log, a `StderrRelay`'s pipe; without one it goes where Ray sends it.
    """

    hidden_size: int
    specs: list[StageSpec]
    stage: StageOptions
    cluster: ClusterOptions
    runner: str = PROFILES["embedded"].runner
    transport: Transport = "host"
    fifo_bytes: int = FIFO_BYTES
    environments: list[dict[str, str]] = []
    pipelines: int = 1
    directory: str | None = None
    stderr: str | None = None

    def __post_init__(self) -> None:
        if self.transport == "mesh" and not self.cluster.profile.has_chips:
            raise PlanError(
                f"The transport 'mesh' joins chips, and the {self.cluster.device} device has none: choose 'host'."
            )
        if self.environments and len(self.environments) != len(self.specs):
            raise PlanError(f"{len(self.environments)} environments were given for {len(self.specs)} stages.")

    def environment(self, stage: int) -> dict[str, str]:
        """Returns what is added to a stage's environment."""
        return self.environments[stage] if self.environments else {}

    @property
    def silence_s(self) -> float:
        """Seconds without a heartbeat after which a stage is considered dead."""
        # What reads options alone, as --help does, needs no sockets.
        from actors.sockets.host import SILENCE_SECONDS  # noqa: PLC0415

        return self.cluster.profile.silence_s or SILENCE_SECONDS

    @property
    def bytes_per_token(self) -> int:
        """The length of one token's hidden state."""
        return self.hidden_size * ITEM_BYTES[self.stage.dtype]
