"""Options of the timed device."""

import msgspec

from stages.errors import PlanError


class GivenTimes(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Step times that the user gives: `step_s` seconds, one value for each stage or one for all, and `prompt_token_s`
    more for each token of a prompt in the step."""

    step_s: list[float]
    prompt_token_s: float = 0.0

    def check(self, stages: int) -> None:
        """Raises PlanError unless there is one time for all stages, or one for each of `stages`."""
        if len(self.step_s) not in {1, stages}:
            raise PlanError(
                f"--stage-time gives {len(self.step_s)} times for {stages} stages: give one for all, or one for each."
            )


class PredictedTimes(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Step times as `stages.capacity` predicts them for a stage of `rows` Galaxy rows."""

    rows: int


class TimedOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How long steps take, and which tokens come out: ids below `vocabulary` except `never` (in rising order)."""

    times: GivenTimes | PredictedTimes
    vocabulary: int
    never: list[int]
