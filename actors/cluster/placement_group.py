"""The reservation of rows for all stages of a pipeline together, within a deadline. The module imports Ray."""

import asyncio
import random
from collections.abc import Sequence

import structlog
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from actors.cluster.cluster import Cluster
from actors.cluster.placement import (
    ROWS,
    RowClaim,
    StagePlacement,
    has_rival,
    hosts_sentence,
    needed_rows,
    placements_beside,
    plan_placements,
    read_claims,
    refuse_impossible,
    taken_rows,
)
from actors.cluster.ray_private import actor_holders
from actors.errors import PlacementError

NODE_LABEL = "ray.io/node-id"
"""The label by which Ray names every node."""
RETRY_SECONDS = 0.3
GRANT_SECONDS = 5.0
"""Rows that nobody claims are granted within this time; otherwise the hosts are looked at again."""


_log = structlog.get_logger()


class Placement:
    """The rows of all stages, in one placement group, and in others for stages that had to move; made by `place`.

    `stages` has the placement of each stage, in order.
    """

    def __init__(
        self, cluster: Cluster, group: PlacementGroup, placements: list[StagePlacement], actor_class: str
    ) -> None:
        """`actor_class` is the name of the class whose actors use such rows: a refusal names the processes of these."""
        self._cluster = cluster
        self._actor_class = actor_class
        self._groups = [group] * len(placements)
        self._all_groups = [group]
        self.stages = placements

    def group_of(self, stage: int) -> PlacementGroup:
        """Returns the group that has the bundle of the stage."""
        return self._groups[stage]

    async def settle(self, seconds: float) -> None:
        """Reserves other rows for the stages of hosts that are gone, on as few hosts as can hold them.

        Raises PlacementError where none are free within `seconds`.
        """
        alive = {host.node_id for host in (await self._cluster.topology()).hosts}
        lost = [stage for stage, placed in enumerate(self.stages) if placed.host.node_id not in alive]
        if not lost:
            return
        names = sorted({self.stages[stage].host.name for stage in lost})
        _log.error("hosts have left the cluster: their stages need rows elsewhere", hosts=names, stages=lost)
        before = self.stages[max(0, lost[0] - 1)]
        group, moved = await _reserve(
            self._cluster, len(lost), len(before.rows), before.host.node_id, seconds, self._actor_class
        )
        self._all_groups.append(group)
        kept = [placed for stage, placed in enumerate(self.stages) if stage not in lost]
        replaced = dict(zip(lost, placements_beside(kept, moved), strict=True))
        self.stages = [replaced.get(stage, placed) for stage, placed in enumerate(self.stages)]
        self._groups = [group if stage in replaced else old for stage, old in enumerate(self._groups)]

    async def remove(self) -> None:
        """Gives the rows back; actors that are still on them end. May be repeated."""
        groups, self._all_groups = self._all_groups, []
        for group in groups:
            await _remove(self._cluster, group)


async def place(
    cluster: Cluster, stages: int, rows_per_stage: int, pipelines: int = 1, *, seconds: float, actor_class: str
) -> Placement:
    """Reserves rows for all stages of one pipeline, or for none: no other pipeline of the cluster has the same ones.

    `actor_class` is the name of the class whose actors use such rows. Raises PlacementError at once if the hosts could
    not hold so many `pipelines` even if they were empty, and after `seconds` if the rows are in use.
    """
    refuse_impossible(await cluster.topology(), stages * pipelines, rows_per_stage)
    group, placements = await _reserve(cluster, stages, rows_per_stage, await cluster.node_id(), seconds, actor_class)
    return Placement(cluster, group, placements, actor_class)


async def _reserve(
    cluster: Cluster, stages: int, rows_per_stage: int, first: str, seconds: float, actor_class: str
) -> tuple[PlacementGroup, list[StagePlacement]]:
    """Makes a placement group with a bundle for each stage, those of node `first` ahead; retries for `seconds`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + max(1.0, seconds)
    while True:
        topology = await cluster.topology()
        taken = taken_rows(await cluster.call(_claims))
        placements = plan_placements(topology, taken, first, stages, rows_per_stage)
        if placements is not None:
            group = await _try_placements(cluster, placements, min(deadline - loop.time(), GRANT_SECONDS))
            if group is not None:
                return group, placements
        # Two pipelines that gave way to each other must not meet again and again.
        pause = RETRY_SECONDS * (0.5 + random.random())  # noqa: S311 - no secret
        if loop.time() + pause > deadline:
            holders = await cluster.call(actor_holders, actor_class)
            raise PlacementError(
                f"{needed_rows(stages, rows_per_stage)}, and they were not free within {seconds:g} s: "
                f"{hosts_sentence(topology, taken)}, too many of them in use.{holders} "
                "End what uses them, or use fewer stages."
            )
        await asyncio.sleep(pause)


async def _try_placements(cluster: Cluster, placements: list[StagePlacement], seconds: float) -> PlacementGroup | None:
    """Reserves the rows of all placements; None where another pipeline claims one, or they are not granted in time."""
    claim = RowClaim.of(placements)
    group = await cluster.call(_make_group, placements, claim.name)
    is_ours = False
    try:
        if not has_rival(claim, await cluster.call(_claims)):
            is_ours = await cluster.call(group.wait, seconds)
    finally:
        if not is_ours:
            await asyncio.shield(_remove(cluster, group))
    return group if is_ours else None


def _make_group(placements: Sequence[StagePlacement], name: str) -> PlacementGroup:
    """Makes a group whose bundles name their hosts: PACK alone keeps neither neighbours together nor to few hosts."""
    group: PlacementGroup = placement_group(
        [{ROWS: len(placed.rows)} for placed in placements],
        strategy="PACK",
        name=name,
        bundle_label_selector=[{NODE_LABEL: placed.host.node_id} for placed in placements],
    )
    return group


def _claims() -> list[RowClaim]:
    """The claims of all placement groups that have or await rows."""
    groups = placement_group_table().values()
    return read_claims(group["name"] for group in groups if group["state"] != "REMOVED")


async def _remove(cluster: Cluster, group: PlacementGroup) -> None:
    await cluster.end(remove_placement_group, group)
