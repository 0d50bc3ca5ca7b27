"""From what the engine noticed and what the stages say to the one sentence that names the culprit."""

from collections.abc import Sequence

import msgspec

from actors.health import StageHealth
from stages.step import StageFailure


class Symptom(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine noticed first: a stage's own report, or a lost link or passed deadline (`failure` is None).

    `step_id` is None where no step is outstanding.
    """

    step_id: int | None
    cause: str
    failure: StageFailure | None


def verdict(symptom: Symptom, healths: Sequence[StageHealth]) -> str:
    """Names stage, host, step and cause.

    A stage whose process is dead explains every lost link around it, so it comes first; then one that does not
    answer; then the report; then a stage that says it failed, before one that merely lost its neighbour; and last,
    where a step is late, the one that works on its step the longest.
    """
    step = "between steps" if symptom.step_id is None else f"at step {symptom.step_id}"
    for state in ("dead", "silent"):
        for health in healths:
            if health.state == state:
                return f"Stage {health.stage} on {health.host} failed {step}: {health.detail} ({symptom.cause})."
    failure = symptom.failure
    failed = sorted((health for health in healths if health.state == "failed"), key=_is_follow_up)
    if failed and (failure is None or failure.cause.startswith(LOST)) and not _is_follow_up(failed[0]):
        return f"Stage {failed[0].stage} on {failed[0].host} failed {step}: {failed[0].detail}."
    if failure is not None:
        return f"Stage {failure.stage} on {failure.host} failed {step}: {failure.cause}."
    if failed:
        return f"Stage {failed[0].stage} on {failed[0].host} failed {step}: {failed[0].detail}."
    running = [health for health in healths if health.state == "running"]
    if running:
        stuck = max(running, key=lambda health: health.step_seconds)
        return (
            f"Stage {stuck.stage} on {stuck.host} failed {step}: {symptom.cause}, and the stage has been computing "
            f"step {stuck.step_id} for {stuck.step_seconds:.1f} s."
        )
    return f"The pipeline failed {step}: {symptom.cause}; no stage reports a failure."


LOST = "lost the link"
"""How a stage's report begins that says no more than that its neighbour is gone."""


def _is_follow_up(health: StageHealth) -> bool:
    return health.detail.startswith(LOST)
