"""What a stage server needs of a stage: few enough methods for tests to run without a model."""

import importlib
from collections.abc import Callable
from typing import Protocol, cast

from actors.errors import StartError
from stages.options import StageOptions
from stages.plan import StageSpec
from stages.step import Step, StepResult

OnProgress = Callable[[int, int], None]
"""Called with (layers loaded, layers)."""


class StageRunner(Protocol):
    """Computes one stage's part of every step, always called by the same thread."""

    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        """Runs one step.

        `hidden` holds the bytes of [step.token_count, hidden_size], empty for the first stage; it may be written to
        and is valid during the call and while what is returned is sent. Returns the bytes to send on, which the
        runner must not write to again (`hidden` itself will do), or on the last stage the sampled tokens.
        """

    def close(self) -> None:
        """Gives up devices and memory."""


RunnerFactory = Callable[[StageSpec, StageOptions, OnProgress], StageRunner]


def runner_factory(path: str) -> RunnerFactory:
    """Imports "module:attribute", where the attribute may be dotted. Raises StartError if there is no such thing."""
    module_name, _, attributes = path.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for name in attributes.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise StartError(f"Cannot import the stage runner {path}: {error}.") from error
    return cast("RunnerFactory", found)
