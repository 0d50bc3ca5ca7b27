"""How many stages the options ask for, which can say so in two ways."""

from typing import Annotated

import msgspec
from msgspec import Meta

from api.errors import OptionError


class SplitOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the model's layers are split into stages; None where the program decides."""

    stages: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="Pipeline stages; the layers are shared out so that they are equally fast.",
                extra={"flags": ("--stages", "--pipeline-parallel-size")},
            ),
        ]
        | None
    ) = None
    layers_per_stage: Annotated[
        list[int] | None, Meta(description="An explicit split, like 2,4, in place of --stages.")
    ] = None

    @property
    def count(self) -> int | None:
        """The number of stages; None where neither option gives it. Raises OptionError where they contradict each
        other."""
        if self.layers_per_stage is None:
            return self.stages
        if self.stages not in {None, len(self.layers_per_stage)}:
            raise OptionError(
                f"--layers-per-stage names {len(self.layers_per_stage)} stages and --stages {self.stages}: leave one "
                "of them out."
            )
        return len(self.layers_per_stage)
