"""Who a stage is to its neighbours."""

import msgspec

from actors.sockets.host import SILENCE_SECONDS, Terms
from stages.mesh_spec import MeshSocketSpec

ENGINE = "the engine"


def stage_name(index: int) -> str:
    """How a stage is called in hellos, logs and errors."""
    return f"stage {index}"


class StageIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which stage of which pipeline this is; `bytes_per_token` is the length of one token's hidden state.

    A neighbour that says nothing for `silence_s` seconds is taken for dead.
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
        """The link that steps come in by; `mesh` is the socket beside it that hidden states come in by."""
        if self.index == 0:
            return self._terms(ENGINE, 0, None)
        return self._terms(stage_name(self.index - 1), self.bytes_per_token, mesh)

    def downstream_terms(self, mesh: MeshSocketSpec | None = None) -> Terms:
        """The link that hidden states or results leave by; `mesh` is the socket that hidden states leave by instead."""
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
