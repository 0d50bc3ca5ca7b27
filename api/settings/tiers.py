"""The options that keep parts of the KV cache beside the devices, in memory and on disk."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from api.errors import OptionError
from api.text.model_source import at_home
from stages.options import TierOptions
from weights.sizes import parse_size


class KVOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where full blocks of the KV cache are kept that fall out of the devices, or whose stage is lost."""

    kv_host_memory: (
        Annotated[
            str,
            Meta(
                description="Memory of each host for copies of the KV cache, like 20G; 0 for none. A lost stage's part "
                "is brought back from there.",
                extra={"default": "a twentieth of the host's"},
            ),
        ]
        | None
    ) = None
    kv_dir: Annotated[
        Path | None,
        Meta(
            description="A directory on each host for more of them, which outlive the server. Nobody else may read it.",
            extra={"path": "directory"},
        ),
    ] = None
    kv_disk: Annotated[str, Meta(description="What --kv-dir may hold, like 200G.")] = "10G"

    def tiers(self, sharers: int) -> TierOptions:
        """The tiers of each host for one of so many engines that share it.

        Raises OptionError for what is not a size.
        """
        memory = None if self.kv_host_memory is None else size_of("--kv-host-memory", self.kv_host_memory) // sharers
        disk = size_of("--kv-disk", self.kv_disk) // sharers
        if self.kv_dir is None:
            return TierOptions(host_bytes=memory)
        if self.kv_dir == Path():
            raise OptionError("--kv-dir is empty: name a directory, or leave it out.")
        directory = str(at_home(self.kv_dir).absolute())
        return TierOptions(host_bytes=memory, disk_directory=directory, disk_bytes=disk, disk_sharers=sharers)


def size_of(flag: str, text: str) -> int:
    """The bytes that an option gives in words. Raises OptionError for what is not a size."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise OptionError(f"{flag}: {error}.") from error
