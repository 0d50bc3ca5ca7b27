"""The links of one epoch: from the engine to the first stage, from stage to stage, and from the last one back."""

from collections.abc import Sequence
from pathlib import Path

from actors.errors import LinkError, ProtocolError, StartError
from actors.options import PipelineOptions
from actors.sockets.host import HostLink, Terms
from actors.sockets.link import EngineLinks
from actors.sockets.listener import Address, HostListener, TcpAddress, UnixAddress, connect
from actors.stage.group import StageGroup
from actors.stage.setup import ENGINE, stage_name
from stages.step import Host


class Chain:
    """The engine's ends of a chain that is joined: `downstream` leads to the first stage. Made by `join`."""

    def __init__(self, downstream: HostLink, upstream: HostLink) -> None:
        self.downstream = downstream
        self._upstream = upstream

    @classmethod
    async def join(
        cls,
        group: StageGroup,
        hosts: Sequence[Host],
        links: EngineLinks,
        options: PipelineOptions,
        directory: Path,
        deadline: float,
    ) -> "Chain":
        """Opens every stage's socket, then joins each stage to the next, until the loop's clock shows `deadline`.

        `hosts` are the engine's and those of the stages, in order; the engine is before the first stage and after the
        last. Unix sockets are made in `directory`. Raises StartError.
        """
        around = [*hosts, hosts[0]]
        names = [f"{links.epoch}-{index}.sock" for index in range(len(around) - 1)]
        addresses = [
            _address(directory / name, sender, receiver)
            for name, sender, receiver in zip(names, around[:-1], around[1:], strict=True)
        ]
        ends: list[HostListener | HostLink] = []
        try:
            listener = HostListener.open(
                addresses[-1], _engine_terms(links, options, stage_name(len(hosts) - 2)), links.upstream
            )
            ends.append(listener)
            bound = await group.listen(addresses[:-1], deadline)
            downstream = await connect(bound[0], _engine_terms(links, options, stage_name(0)), links.downstream)
            ends.append(downstream)
            await group.connect([*bound[1:], listener.address], deadline)
            return cls(downstream, await listener.accepted())
        except BaseException as error:
            for end in ends:
                end.close()
            if isinstance(error, LinkError | ProtocolError):
                raise StartError(f"The engine could not join its stages: {error}") from error
            raise

    def close(self) -> None:
        """Ends the engine's links. May be repeated."""
        self.downstream.close()
        self._upstream.close()


def _address(path: Path, sender: Host, receiver: Host) -> Address:
    """Within a host a unix socket at `path`, else a TCP port of the receiver's that the kernel chooses."""
    return UnixAddress(str(path)) if sender.node_id == receiver.node_id else TcpAddress(receiver.address, 0)


def _engine_terms(links: EngineLinks, options: PipelineOptions, peer: str) -> Terms:
    return Terms(
        epoch=links.epoch,
        secret=links.secret,
        name=ENGINE,
        peer=peer,
        dtype=options.stage.dtype,
        bytes_per_token=0,
        silence_s=options.silence_s,
    )
