"""What a pipeline has on its host before Ray is there: its private directory, and the fork server of its stages."""

import asyncio
import os
from pathlib import Path

from actors.cluster.environment import starts_cluster
from actors.options import PipelineOptions
from actors.run_directory import RunDirectory
from actors.stage.forks import ForkServer


class Workspace:
    """The directory and, where Ray is started for the pipeline, the fork server. Made by `open`; `close` ends both."""

    def __init__(self, directory: RunDirectory, forks: ForkServer | None) -> None:
        self.directory = directory
        self._forks = forks

    @classmethod
    def open(cls, options: PipelineOptions) -> "Workspace":
        """Enters or makes the directory. Raises ClusterError where none can be made, and OSError."""
        given = options.directory
        directory = RunDirectory.create() if given is None else RunDirectory.enter(Path(given))
        if not starts_cluster(options.cluster.ray_address, os.environ):
            return cls(directory, None)
        try:
            return cls(directory, ForkServer.start(options, directory.path))
        except BaseException:
            directory.remove()
            raise

    @property
    def fork_socket(self) -> Path | None:
        """The socket of the fork server, where there is one."""
        return None if self._forks is None else self._forks.socket

    async def close(self) -> None:
        """Ends the fork server, and whatever else was started in the directory, and removes it. May be repeated."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        if self._forks is not None:
            self._forks.close()
        self.directory.remove()
