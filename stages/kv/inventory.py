"""What a stage reports of the blocks that it keeps beside its device."""

import msgspec


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """What a stage keeps beside its device, or what changed of that since a former `version`.

    `added` are all keys where it `is_whole`. The stage has `host_bytes` and `disk_bytes` of blocks now. `model` names
    the weights of the stage: blocks of others are of no use.
    """

    version: int
    is_whole: bool
    added: list[bytes]
    removed: list[bytes]
    model: str = ""
    host_bytes: int = 0
    disk_bytes: int = 0
