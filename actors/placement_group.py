"""Rows reserved for all stages of a pipeline together, within a deadline."""

import asyncio
from collections.abc import Mapping

from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from actors.cluster import Cluster
from actors.errors import PlacementError
from actors.placement import ROWS, Seat, assign_seats, hosts_sentence, needed_rows, refuse_impossible


class Placement:
    """A placement group that holds all stages; made by `place`."""

    def __init__(self, cluster: Cluster, group: PlacementGroup, seats: list[Seat]) -> None:
        self._cluster = cluster
        self.group = group
        self.seats = seats

    async def remove(self) -> None:
        """Gives the rows back; actors that are still on them end."""
        await _remove(self._cluster, self.group)


async def place(cluster: Cluster, stages: int, rows_per_stage: int, *, seconds: float) -> Placement:
    """Reserves rows for all stages.

    Raises PlacementError at once if the hosts could not hold the stages even if they were empty, and after `seconds`
    if the rows are in use.
    """
    topology = await cluster.topology()
    refuse_impossible(topology, stages, rows_per_stage)
    group = await cluster.call(_make_group, stages, rows_per_stage)
    try:
        is_free = await cluster.call(group.wait, max(1.0, seconds))
        if is_free:
            bundles = await cluster.call(_bundle_nodes, group)
            seats = assign_seats(bundles, topology, await cluster.node_id(), rows_per_stage)
            return Placement(cluster, group, seats)
    except BaseException:
        await asyncio.shield(_remove(cluster, group))
        raise
    await _remove(cluster, group)
    raise PlacementError(
        f"{needed_rows(stages, rows_per_stage)}, and they were not free within {seconds:g} s: "
        f"{hosts_sentence(topology)}, too many of them in use. End what uses them, or use fewer stages."
    )


def _make_group(stages: int, rows_per_stage: int) -> PlacementGroup:
    group: PlacementGroup = placement_group([{ROWS: rows_per_stage}] * stages, strategy="PACK")
    return group


def _bundle_nodes(group: PlacementGroup) -> list[str]:
    nodes: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return [nodes[bundle] for bundle in range(len(nodes))]


async def _remove(cluster: Cluster, group: PlacementGroup) -> None:
    await cluster.call(remove_placement_group, group)
