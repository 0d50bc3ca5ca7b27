"""What stages on the timed device are told."""

import msgspec

from stages.errors import PlanError


class GivenTimes(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A step takes `step_s` seconds, of which there is one for each stage, or one for all, and beside that
    `prompt_token_s` for each token of a prompt in it."""

    step_s: list[float]
    prompt_token_s: float = 0.0

    def check(self, stages: int) -> None:
        """Raises PlanError where the times are not those of so many stages."""
        if len(self.step_s) not in {1, stages}:
            raise PlanError(
                f"--stage-time gives {len(self.step_s)} times for {stages} stages: give one for all, or one for each."
            )


class PredictedTimes(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A step takes as long as `stages.capacity` predicts for a stage of `rows` Galaxy rows."""

    rows: int


class TimedOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How long steps take, and the tokens that are made: ids below `vocabulary`, but for `never`, in rising order."""

    times: GivenTimes | PredictedTimes
    vocabulary: int
    never: list[int]
