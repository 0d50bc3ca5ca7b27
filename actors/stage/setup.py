"""What a stage is: its identity among its neighbours, and all that its process is given. Nothing here imports torch."""

from collections import Counter
from collections.abc import Sequence

import msgspec

from actors.cluster.placement import StagePlacement
from actors.mpi.galaxy import VISIBLE_DEVICES, visible_devices
from actors.mpi.membership import Membership
from actors.options import PipelineOptions
from actors.sockets.host import SILENCE_SECONDS, Terms
from actors.sockets.link import EngineLinks
from stages.device import Device
from stages.mesh_spec import MeshSocketSpec
from stages.options import StageOptions
from stages.plan import StageSpec

ENGINE = "the engine"


def stage_name(index: int) -> str:
    """Returns the name of a stage in hellos, logs and errors."""
    return f"stage {index}"


class StageIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which stage of which pipeline this is; `bytes_per_token` is the length of one token's hidden state.

    A neighbour that sends nothing for `silence_s` seconds is considered dead.
    """

    index: int
    stages: int
    host: str
    epoch: int
    secret: bytes
    dtype: str
    bytes_per_token: int
    silence_s: float = SILENCE_SECONDS

    @property
    def is_last(self) -> bool:
        """Whether results rather than hidden states leave it."""
        return self.index == self.stages - 1

    def upstream_terms(self, mesh: MeshSocketSpec | None = None) -> Terms:
        """Returns the terms of the link by which steps come in.

        `mesh` is the socket beside it by which hidden states come in, where there is one.
        """
        if self.index == 0:
            return self._terms(ENGINE, 0, None)
        return self._terms(stage_name(self.index - 1), self.bytes_per_token, mesh)

    def downstream_terms(self, mesh: MeshSocketSpec | None = None) -> Terms:
        """Returns the terms of the link by which hidden states or results leave.

        `mesh` is the socket by which hidden states leave instead, where there is one.
        """
        if self.is_last:
            return self._terms(ENGINE, 0, None)
        return self._terms(stage_name(self.index + 1), self.bytes_per_token, mesh)

    def _terms(self, peer: str, bytes_per_token: int, mesh: MeshSocketSpec | None) -> Terms:
        return Terms(
            epoch=self.epoch,
            secret=self.secret,
            name=stage_name(self.index),
            peer=peer,
            dtype=self.dtype,
            bytes_per_token=bytes_per_token if mesh is None else 0,
            mesh=mesh,
            silence_s=self.silence_s,
        )


class StageSetup(msgspec.Struct, frozen=True, kw_only=True):
    """All that an actor is given. It is the `neighbour`-th of `neighbours` stages on its host and owns `rows` there.

    `membership` is its rank in the MPI world where hidden states pass from mesh to mesh, through sockets of
    `fifo_bytes`. `environment` is added to the process's own and replaces what stands there. `stderr` is that of
    `PipelineOptions`. The stages of its host have `layers_on_host` layers.
    """

    identity: StageIdentity
    spec: StageSpec
    options: StageOptions
    device: Device
    runner: str
    rows: list[int]
    neighbour: int
    neighbours: int
    environment: dict[str, str] = {}
    membership: Membership | None = None
    fifo_bytes: int = 0
    stderr: str | None = None
    layers_on_host: int = 0


def stage_setups(
    options: PipelineOptions,
    placements: Sequence[StagePlacement],
    links: EngineLinks,
    memberships: Sequence[Membership] = (),
) -> list[StageSetup]:
    """Returns the setups of all stages, in order; `memberships` are empty without an MPI world."""
    layers: Counter[str] = Counter()
    for spec, placed in zip(options.specs, placements, strict=True):
        layers[placed.host.node_id] += len(spec.layers)
    return [
        StageSetup(
            identity=StageIdentity(
                index=spec.index,
                stages=len(options.specs),
                host=placed.host.name,
                epoch=links.epoch,
                secret=links.secret,
                dtype=options.stage.dtype,
                bytes_per_token=options.bytes_per_token,
                silence_s=options.silence_s,
            ),
            spec=spec,
            options=options.stage,
            device=options.cluster.device,
            runner=options.runner,
            rows=placed.rows,
            neighbour=placed.neighbour,
            neighbours=placed.neighbours,
            environment=_environment(options, spec.index, placed),
            membership=memberships[spec.index] if memberships else None,
            fifo_bytes=options.fifo_bytes,
            stderr=options.stderr,
            layers_on_host=layers[placed.host.node_id],
        )
        for spec, placed in zip(options.specs, placements, strict=True)
    ]


def _environment(options: PipelineOptions, stage: int, placed: StagePlacement) -> dict[str, str]:
    """A stage's own environment: on chips it sees those of its rows alone, unless the user names others."""
    own = options.environment(stage)
    if not options.cluster.profile.has_chips or VISIBLE_DEVICES in own:
        return own
    return {VISIBLE_DEVICES: visible_devices(placed.rows), **own}
