"""Stages to hosts and rows: who sits where, and a refusal that says what is missing. Nothing here asks Ray."""

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from actors.errors import PlacementError
from stages.step import Host, Topology

ROWS = "galaxy_rows"
"""The custom resource by which a node says how many Galaxy rows it has."""


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """Where one stage goes: a bundle of the placement group, thereby a host, and the rows it owns there.

    It is the `neighbour`-th of `neighbours` stages on its host. A host's rows are numbered from 0 in the order of its
    stages.
    """

    bundle: int
    host: Host
    rows: list[int]
    neighbour: int
    neighbours: int


def refuse_impossible(topology: Topology, stages: int, rows_per_stage: int) -> None:
    """Raises PlacementError if the hosts, all their rows free, hold fewer than `stages` bundles of rows."""
    room = sum(host.rows // rows_per_stage for host in topology.hosts)
    if room < stages:
        raise PlacementError(
            f"{needed_rows(stages, rows_per_stage)}, each stage's on one host, but {hosts_sentence(topology)}: "
            f"there is room for {room} of them. Add hosts, or use fewer stages."
        )


def needed_rows(stages: int, rows_per_stage: int) -> str:
    """The beginning of a refusal."""
    return f"{stages} stages of {rows_per_stage} rows need {stages * rows_per_stage} Galaxy rows"


def hosts_sentence(topology: Topology) -> str:
    """What there is."""
    rows = ", ".join(f"{host.name} ({host.rows})" for host in topology.hosts if host.rows)
    total = sum(host.rows for host in topology.hosts)
    return f"the cluster has {total}: {rows}" if rows else f"no host of the cluster offers {ROWS}"


def assign_seats(bundles: Sequence[str], topology: Topology, first: str, rows_per_stage: int) -> list[Seat]:
    """Puts stages on bundles so that neighbours share a host where they can.

    `bundles[i]` is the node of bundle i; PACK promises no order. Hosts follow each other by name, that of the engine
    (`first`) ahead of all, so the chain crosses from host to host as seldom as there are hosts.
    """
    hosts: Mapping[str, Host] = {host.node_id: host for host in topology.hosts}

    def order(bundle: int) -> tuple[bool, str, str, int]:
        node = bundles[bundle]
        return node != first, hosts[node].name, node, bundle

    sizes = Counter(bundles)
    filled: Counter[str] = Counter()
    seats = []
    for bundle in sorted(range(len(bundles)), key=order):
        node = bundles[bundle]
        neighbour = filled[node]
        filled[node] += 1
        rows = list(range(neighbour * rows_per_stage, (neighbour + 1) * rows_per_stage))
        seats.append(Seat(bundle=bundle, host=hosts[node], rows=rows, neighbour=neighbour, neighbours=sizes[node]))
    return seats
