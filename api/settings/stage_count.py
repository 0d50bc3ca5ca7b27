"""How many stages the options ask for, which can say so in two ways."""

from collections.abc import Sequence

from api.errors import OptionError


def stage_count(stages: int | None, layers_per_stage: Sequence[int] | None) -> int | None:
    """The number of stages; None where neither option says it. Raises OptionError where they contradict each other."""
    if layers_per_stage is None:
        return stages
    if stages not in {None, len(layers_per_stage)}:
        raise OptionError(
            f"--layers-per-stage names {len(layers_per_stage)} stages and --stages {stages}: leave one of them out."
        )
    return len(layers_per_stage)
