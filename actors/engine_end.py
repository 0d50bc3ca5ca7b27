"""The engine's side of its two links."""

import msgspec

from actors.sockets.link import LinkEvents


class EngineEnd(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the links of one epoch tell, and how they prove who they are."""

    epoch: int
    secret: bytes
    inlet: LinkEvents
    outlet: LinkEvents
