"""Who a stage is to its neighbours."""

import msgspec

from actors.sockets.host import Terms

ENGINE = "the engine"


def stage_name(index: int) -> str:
    """How a stage is called in hellos, logs and errors."""
    return f"stage {index}"


class StageIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which stage of which pipeline this is; `bytes_per_token` is the length of one token's hidden state."""

    index: int
    stages: int
    host: str
    epoch: int
    secret: bytes
    dtype: str
    bytes_per_token: int

    @property
    def is_last(self) -> bool:
        """Whether results rather than hidden states leave it."""
        return self.index == self.stages - 1

    def upstream_terms(self) -> Terms:
        """The link that steps come in by."""
        from_engine = self.index == 0
        peer = ENGINE if from_engine else stage_name(self.index - 1)
        return self._terms(peer, 0 if from_engine else self.bytes_per_token)

    def downstream_terms(self) -> Terms:
        """The link that hidden states or results leave by."""
        peer = ENGINE if self.is_last else stage_name(self.index + 1)
        return self._terms(peer, 0 if self.is_last else self.bytes_per_token)

    def _terms(self, peer: str, bytes_per_token: int) -> Terms:
        return Terms(
            epoch=self.epoch,
            secret=self.secret,
            name=stage_name(self.index),
            peer=peer,
            dtype=self.dtype,
            bytes_per_token=bytes_per_token,
        )
