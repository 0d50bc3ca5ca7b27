"""What runs on the head where a host is lost: `python -m tests.hosts.moving`.

It prints where two pipelines were placed, waits for a line, and prints where the stages of the lost host went: first
why they have no room, then their rows once the other pipeline has gone. Each is a line of JSON after SAID, as Ray too
writes to standard output where a host is lost.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from actors.cluster.environment import prepare_environment
from actors.cluster.placement import StagePlacement
from actors.errors import PlacementError

if TYPE_CHECKING:
    from actors.cluster.cluster import Cluster

SECONDS = 30
STAGES = 2
SAID = "said "


def say(what: object) -> None:
    print(SAID + json.dumps(what), flush=True)  # noqa: T201


def places(placements: list[StagePlacement]) -> list[tuple[str, list[int]]]:
    return [(placed.host.name, placed.rows) for placed in placements]


async def hosts_when(cluster: "Cluster", count: int) -> None:
    for _ in range(10 * SECONDS):
        if len((await cluster.topology()).hosts) == count:
            return
        await asyncio.sleep(0.1)
    raise TimeoutError(str(await cluster.topology()))


async def move() -> None:
    prepare_environment(os.environ["RAY_ADDRESS"])
    from actors.cluster.cluster import Cluster  # noqa: PLC0415 - imports Ray, which reads what `prepare_environment` has set
    from actors.cluster.placement_group import place  # noqa: PLC0415

    cluster = await Cluster.join(None, 0, Path())
    hosts = len((await cluster.topology()).hosts)
    staying, moving = [await place(cluster, STAGES, 1, seconds=SECONDS, actor_class="StageActor") for _ in range(2)]
    await moving.settle(SECONDS)
    say([places(staying.stages), places(moving.stages)])
    await asyncio.to_thread(sys.stdin.readline)
    await hosts_when(cluster, hosts - 1)
    try:
        await moving.settle(1.0)
    except PlacementError as error:
        say(str(error))
    await staying.remove()
    await moving.settle(SECONDS)
    say(places(moving.stages))
    await moving.remove()
    await (await place(cluster, STAGES, 1, seconds=SECONDS, actor_class="StageActor")).remove()
    await cluster.leave()


if __name__ == "__main__":
    asyncio.run(move())
