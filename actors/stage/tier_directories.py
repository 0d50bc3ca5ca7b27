"""The directories of a stage's tiers on its host, and how much they may hold."""

import contextlib
import os
import threading
from pathlib import Path

import msgspec
import structlog

from actors.run_directory import RunDirectory, remove_abandoned, remove_if_abandoned
from actors.stage.setup import StageSetup
from stages.options import TierOptions

HOST_SHARE = 0.05
"""The part of a host's memory that its stages' tiers take unless an option says otherwise."""

FREE_SHARE = 0.5
"""The part of what is free in the file system in memory that they take at most then."""

SIZE = "size"
"""The file in the directory in memory that says how much its stages take where no option does."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

log = structlog.get_logger()


class TierDirectories:
    """The directories of one stage, which are there from `enter` until `leave`.

    That of the tier in memory is shared by the stages of a pipeline on a host. Who leaves it last removes it.
    """

    def __init__(self, setup: StageSetup) -> None:
        self._setup = setup
        self._memory: RunDirectory | None = None

    def enter(self) -> TierOptions:
        """Makes the directories, and returns the tiers of this stage; without those that cannot be made."""
        tiers = self._setup.options.tiers
        host_bytes = 0
        if tiers.host_bytes != 0 and tiers.host_directory:
            host_bytes = self._enter_memory(Path(tiers.host_directory), tiers.host_bytes)
        disk_bytes = tiers.disk_bytes if tiers.disk_bytes and _make(Path(tiers.disk_directory)) else 0
        return msgspec.structs.replace(tiers, host_bytes=self._share(host_bytes), disk_bytes=self._share(disk_bytes))

    def leave(self, *, keeps_blocks: bool = False) -> None:
        """Leaves the directory in memory; the last one removes it, unless others are to come. May be repeated."""
        if self._memory is not None:
            path = self._memory.path
            self._memory.leave()
            self._memory = None
            if not keeps_blocks:
                remove_if_abandoned(path)

    def _enter_memory(self, path: Path, size: int | None) -> int:
        try:
            self._memory = RunDirectory.join(path)
            # Those of servers that were killed; on hosts where no server starts, nobody else would do it.
            remove_abandoned([path.parent])
            return _agreed_host_bytes(path) if size is None else size
        except OSError as error:
            log.warning("blocks are not kept beside the device", directory=str(path), cause=error.strerror)
            return 0

    def _share(self, size: int) -> int:
        return size * len(self._setup.spec.layers) // max(self._setup.layers_on_host, 1)


def default_host_bytes(directory: Path) -> int:
    """A share of the memory that this process may use, less where the file system of `directory` has less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    if limit.isdecimal():
        memory = min(memory, int(limit))
    system = os.statvfs(directory)
    return int(min(memory * HOST_SHARE, system.f_bavail * system.f_frsize * FREE_SHARE))


def _agreed_host_bytes(directory: Path) -> int:
    """What the first stage that came chose: files of another size would be begun anew, by one that replaces another."""
    agreed, own = directory / SIZE, directory / f"{SIZE}.{os.getpid()}.{threading.get_ident()}"
    own.write_text(str(default_host_bytes(directory)), encoding="ascii")
    try:
        with contextlib.suppress(FileExistsError):
            os.link(own, agreed)
    finally:
        own.unlink()
    try:
        return int(agreed.read_text(encoding="ascii"))
    except ValueError:
        return default_host_bytes(directory)


def _make(directory: Path) -> bool:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        log.warning("blocks are not kept on disk", directory=str(directory), cause=error.strerror)
        return False
    return True
