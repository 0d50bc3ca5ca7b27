"""What the engine knows of the tiers beside the stages' devices, and the secret that keys begin with."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from api.errors import OptionError
from api.messages.pipeline_view import TierBytes
from api.scheduler.kv_cache import KVCache, new_secret
from stages.kv.inventory import Inventory
from stages.options import TierOptions

KEY_FILE = "key"
"""The file of the secret, in the directory of the disk tier."""


class HasInventories(Protocol):
    """What is asked for inventories: a pipeline."""

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        """Returns what each stage keeps beside its device since its version; None for one that does not answer."""


class OnAllStages:
    """The keys that all stages have."""

    def __init__(self, stages: Sequence[set[bytes]]) -> None:
        self._stages = stages

    def __contains__(self, key: object) -> bool:
        """Whether every stage has the key."""
        return bool(self._stages) and all(key in keys for keys in self._stages)


class KVTiers:
    """Keeps the scheduler's cache informed of what could be loaded.

    Keys follow from a secret and from the weights of all stages, so that blocks of other weights are never found. The
    secret is as old as the engine, or as old as the disk tier's directory, where it lies.
    """

    def __init__(self, options: TierOptions, stages: int, cache: KVCache) -> None:
        self._cache = cache
        self._are_any = options.are_any
        self._file = Path(options.disk_directory, KEY_FILE) if options.disk_directory else None
        self._secret = new_secret()
        self._keys: list[set[bytes]] = [set() for _ in range(stages)]
        self._versions = [0] * stages
        self._models = [""] * stages
        self.host_bytes = [0] * stages
        self.disk_bytes = [0] * stages

    @property
    def stage_bytes(self) -> list[TierBytes]:
        """What each stage keeps, as far as is known."""
        return [TierBytes(*each) for each in zip(self.host_bytes, self.disk_bytes, strict=True)]

    def open(self) -> None:
        """Takes the secret from the disk tier's directory, where there is one.

        Raises OptionError where the directory cannot be used.
        """
        if self._file is not None:
            self._secret = _kept_secret(self._file)

    async def refresh(self, pipeline: HasInventories) -> None:
        """Asks all stages what they have; what one does not answer stays as it was."""
        inventories = await pipeline.inventories(self._versions)
        for stage, inventory in enumerate(inventories):
            if inventory is not None:
                self._take_in(stage, inventory)
        self._cache.use_secret(self._root())
        self._cache.know_tiers(OnAllStages(self._keys) if self._are_any else None)

    def reset(self) -> None:
        """Lets nothing be found again that was kept before.

        Raises OptionError where that cannot be written down, so that it holds until the next start alone.
        """
        self._secret = new_secret()
        self._cache.use_secret(self._root())
        if self._file is not None:
            _write_secret(self._file, self._secret)

    def _take_in(self, stage: int, inventory: Inventory) -> None:
        keys = self._keys[stage]
        if inventory.is_whole:
            keys.clear()
        keys.update(inventory.added)
        keys.difference_update(inventory.removed)
        self._versions[stage] = inventory.version
        self._models[stage] = inventory.model
        self.host_bytes[stage] = inventory.host_bytes
        self.disk_bytes[stage] = inventory.disk_bytes

    def _root(self) -> bytes:
        return hashlib.blake2b("\n".join(self._models).encode(), digest_size=16, key=self._secret).digest()


def _kept_secret(file: Path) -> bytes:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        secret = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise OptionError(f"--kv-dir {file.parent} cannot be used: {error.strerror}.") from error
    if len(secret) != len(new_secret()):
        secret = new_secret()
        _write_secret(file, secret)
    return secret


def _write_secret(file: Path, secret: bytes) -> None:
    try:
        # Whoever can read it can tell whether a text was cached.
        file.touch(mode=0o600)
        file.write_bytes(secret)
    except OSError as error:
        raise OptionError(f"--kv-dir {file.parent} cannot be written: {error.strerror}.") from error
