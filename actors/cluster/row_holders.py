"""Whose stages are on the rows that somebody else waits for, as far as Ray tells. The module imports Ray."""

from collections import Counter
from typing import Any

from ray._private import state

ENTRYPOINT_CHARACTERS_MAX = 80


def row_holders(actor_class: str) -> str:
    """A sentence that names the processes that have stages in the cluster, and the hosts of these; or nothing.

    Spares are counted with them: Ray does not tell them apart.
    """
    stages = Counter(
        (actor["JobID"], actor["Address"]["IPAddress"])
        for actor in state.state.actor_table(None, actor_state_name="ALIVE").values()
        if actor["ActorClassName"] == actor_class
    )
    if not stages:
        return ""
    jobs = {job["JobID"]: job for job in state.state.job_table()}  # type: ignore[no-untyped-call]
    held = (f"{count} on {address} by {_process(jobs.get(job))}" for (job, address), count in sorted(stages.items()))
    return f" These processes of stages run: {', '.join(held)}."


def _process(job: dict[str, Any] | None) -> str:
    if job is None:
        return "a job that is gone"
    entrypoint = job["Entrypoint"]
    if len(entrypoint) > ENTRYPOINT_CHARACTERS_MAX:
        entrypoint = entrypoint[:ENTRYPOINT_CHARACTERS_MAX] + "..."
    return f"process {job['DriverPid']} on {job['DriverIPAddress']} ({entrypoint})"
