"""`python -m tests.support.poisoned_serve serve OPTIONS`: the server, with stages that fail at certain tokens.

POISON in the environment lists what happens, on which stage, and at which token: "raise:1:509,kill:0:510". The token
"all" stands for any token.
"""

import os
import signal

import msgspec

from actors.stage.runner import OnProgress, StageRunner
from api.cli import group
from api.engine.options import EngineOptions
from api.settings.engine import EngineSettings
from api.text.model_source import ModelSource
from stages.kv.inventory import Inventory
from stages.options import StageOptions
from stages.pending import StageOutput
from stages.plan import StageSpec
from stages.stage import Stage
from stages.step import Step
from tests import ROOT
from weights.model_config import UNCHANGED, ConfigChanges, ModelConfig

VARIABLE = "POISON"
PROGRAM = ("tests.support.poisoned_serve",)


class PoisonError(Exception):
    """The failure that the stage raises."""


class PoisonedStage:
    """A stage that fails at each step with one of its tokens."""

    def __init__(self, runner: StageRunner, poisons: str, stage: int) -> None:
        self._runner = runner
        listed = [poison.split(":") for poison in poisons.split(",")]
        self._acts = {token: act for act, where, token in listed if int(where) == stage}

    def step(self, step: Step, hidden: memoryview) -> StageOutput:
        tokens = ["all", *(str(token) for segment in step.segments for token in segment.tokens)]
        acts = [self._acts[token] for token in tokens if token in self._acts]
        if acts:
            if "kill" in acts:
                os.kill(os.getpid(), signal.SIGKILL)
            raise PoisonError("the device chokes on it")
        return self._runner.step(step, hidden)

    def load_blocks(self, step: Step) -> list[int]:
        return self._runner.load_blocks(step)

    def inventory(self, version: int) -> Inventory:
        return self._runner.inventory(version)

    def close(self) -> None:
        self._runner.close()


def load(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    return PoisonedStage(Stage.load(spec, options, on_progress), os.environ[VARIABLE], spec.index)


def environment(poison: str) -> dict[str, str]:
    """The variables of such a server; Ray's workers have to find this package."""
    return {VARIABLE: poison, "PYTHONPATH": str(ROOT)}


def main() -> None:
    """The command line, but for what the stages run."""
    engine_options = EngineSettings.engine_options

    def poisoned(
        self: EngineSettings,
        source: ModelSource,
        config: ModelConfig,
        changes: ConfigChanges = UNCHANGED,
        *,
        sharers: int = 1,
    ) -> EngineOptions:
        options = engine_options(self, source, config, changes, sharers=sharers)
        pipeline = msgspec.structs.replace(
            options.pipeline,
            runner="tests.support.poisoned_serve:load",
            environments=[{VARIABLE: os.environ[VARIABLE]}] * len(options.pipeline.specs),
        )
        return msgspec.structs.replace(options, pipeline=pipeline)

    EngineSettings.engine_options = poisoned  # type: ignore[method-assign]
    group.main()


if __name__ == "__main__":
    main()
