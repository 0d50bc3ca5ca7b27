"""The placement of stages on hosts and rows, and refusals that name what is missing. Nothing here uses Ray."""

import itertools
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from actors.errors import PlacementError
from stages.step import Host, Topology

ROWS = "galaxy_rows"
"""The custom resource by which a node offers its Galaxy rows."""

PREFIX = "galaxyline rows "
"""Begins the names of placement groups, which say which rows of which host belong to which pipeline."""

Rows = list[int]


class StagePlacement(msgspec.Struct, frozen=True, kw_only=True):
    """The place of one stage: a bundle of the placement group, and thereby a host, and the rows it owns there.

    It is the `neighbour`-th of the pipeline's `neighbours` stages on its host. A host's rows are numbered from 0;
    those of a stage follow each other, as a mesh has to be of chips that are linked.
    """

    bundle: int
    host: Host
    rows: Rows
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
    """Returns the beginning of a refusal."""
    return f"{stages} stages of {rows_per_stage} rows need {stages * rows_per_stage} Galaxy rows"


def hosts_sentence(topology: Topology, taken: Mapping[str, set[int]] | None = None) -> str:
    """Returns a sentence on the rows there are, and how many are `taken`, which has row numbers by node."""
    rows = ", ".join(_host_words(host, (taken or {}).get(host.node_id, set())) for host in topology.hosts if host.rows)
    total = sum(host.rows for host in topology.hosts)
    return f"the cluster has {total}: {rows}" if rows else f"no host of the cluster offers {ROWS}"


def _host_words(host: Host, taken: set[int]) -> str:
    return f"{host.name} ({host.rows}, {len(taken)} in use)" if taken else f"{host.name} ({host.rows})"


def plan_placements(
    topology: Topology, taken: Mapping[str, set[int]], first: str, stages: int, rows_per_stage: int
) -> list[StagePlacement] | None:
    """Returns placements for all stages on rows that are not `taken`; None where there are not enough such rows.

    `taken` has row numbers by node. The stages go on as few hosts as can hold them, the engine's host (`first`) among
    these if that needs no more of them. Each host holds a run of neighbours, the engine's host the first ones, so the
    chain crosses from host to host once for each host but the first. Stage i has bundle i.
    """
    runs = {host.node_id: _free_runs(host, taken.get(host.node_id, set()), rows_per_stage) for host in topology.hosts}
    room = {node: sum(map(len, of_node)) for node, of_node in runs.items() if of_node}
    if sum(room.values()) < stages:
        return None
    counts = _share_out(room, first, stages)
    placements: list[StagePlacement] = []
    for host in sorted(topology.hosts, key=lambda host: host.node_id != first):
        neighbours = counts[host.node_id]
        for neighbour, rows in enumerate(_choose_rows(runs[host.node_id], neighbours)):
            placements.append(
                StagePlacement(bundle=len(placements), host=host, rows=rows, neighbour=neighbour, neighbours=neighbours)
            )
    return placements


def placements_beside(kept: Sequence[StagePlacement], moved: Sequence[StagePlacement]) -> list[StagePlacement]:
    """Returns the placements `moved` to hosts where others were `kept`, numbered so that they share the cores."""
    filled = Counter(placed.host.node_id for placed in kept)
    sizes = filled + Counter(placed.host.node_id for placed in moved)
    return [
        msgspec.structs.replace(
            placed, neighbour=filled[placed.host.node_id] + placed.neighbour, neighbours=sizes[placed.host.node_id]
        )
        for placed in moved
    ]


def _free_runs(host: Host, taken: set[int], rows_per_stage: int) -> list[list[Rows]]:
    """The runs of adjacent free rows, each cut into parts of `rows_per_stage`; shorter runs are left out."""
    free = [row for row in range(host.rows) if row not in taken]
    numbered = itertools.groupby(enumerate(free), key=lambda place: place[1] - place[0])
    runs = ([row for _, row in run] for _, run in numbered)
    cut = ([run[at : at + rows_per_stage] for at in range(0, len(run), rows_per_stage)] for run in runs)
    whole = ([rows for rows in parts if len(rows) == rows_per_stage] for parts in cut)
    return [parts for parts in whole if parts]


def _choose_rows(runs: Sequence[list[Rows]], count: int) -> list[Rows]:
    """Rows for `count` neighbours: from the shortest run that holds all, so that they are linked, else from several."""
    fitting = [run for run in runs if len(run) >= count]
    chosen = min(fitting, key=len) if fitting else list(itertools.chain.from_iterable(runs))
    return chosen[:count]


def _share_out(room: Mapping[str, int], first: str, stages: int) -> Counter[str]:
    """How many stages each node gets of the `room` it has: as few nodes as possible, all of them full but the last."""
    largest = sorted(room, key=lambda node: -room[node])
    fewest = next(count for count in range(1, len(largest) + 1) if _sum(room, largest[:count]) >= stages)
    chosen = largest[:fewest]
    with_first = [first, *[node for node in largest if node != first][: fewest - 1]]
    if first in room and _sum(room, with_first) >= stages:
        chosen = with_first
    *full, last = chosen
    rest = stages - _sum(room, full)
    if last != first:
        # The node with the least room that suffices, so that free rows elsewhere stay together for others.
        last = min((node for node in largest if node not in full and room[node] >= rest), key=room.__getitem__)
    return Counter({**{node: room[node] for node in full}, last: rest})


def _sum(room: Mapping[str, int], nodes: Sequence[str]) -> int:
    return sum(room[node] for node in nodes)


class RowClaim(msgspec.Struct, frozen=True):
    """A claim to rows, by their numbers for each node id; `token` distinguishes claims to the same rows."""

    token: str
    rows: dict[str, list[int]]

    @classmethod
    def of(cls, placements: Sequence[StagePlacement]) -> "RowClaim":
        """Makes a new claim to the rows of all placements."""
        rows: dict[str, list[int]] = {}
        for placed in placements:
            rows.setdefault(placed.host.node_id, []).extend(placed.rows)
        return cls(secrets.token_hex(8), rows)

    @property
    def name(self) -> str:
        """The name of the placement group, which other pipelines read the claim from."""
        return PREFIX + msgspec.json.encode(self).decode()


def read_claims(names: Iterable[str]) -> list[RowClaim]:
    """Returns the claims among the names of placement groups."""
    written = (name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))
    return [msgspec.json.decode(claim, type=RowClaim) for claim in written]


def taken_rows(claims: Iterable[RowClaim]) -> dict[str, set[int]]:
    """Returns the row numbers that are claimed, by node id."""
    taken: dict[str, set[int]] = {}
    for claim in claims:
        for node, rows in claim.rows.items():
            taken.setdefault(node, set()).update(rows)
    return taken


def has_rival(claim: RowClaim, claims: Iterable[RowClaim]) -> bool:
    """Returns whether another claim has one of the same rows."""
    others = taken_rows(other for other in claims if other.token != claim.token)
    return any(others.get(node, set()).intersection(rows) for node, rows in claim.rows.items())
