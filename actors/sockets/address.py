"""Where a link's listener is to be found: a unix socket on the same host, TCP from another."""

import msgspec


class UnixAddress(msgspec.Struct, frozen=True, tag="unix"):
    """A socket file in a private directory."""

    path: str

    def __str__(self) -> str:
        return self.path


class TcpAddress(msgspec.Struct, frozen=True, tag="tcp"):
    """A host's address and port; port 0 lets the kernel choose when listening."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Address = UnixAddress | TcpAddress
