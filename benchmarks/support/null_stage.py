"""A stage that computes nothing, so that only the cost of moving steps to it and from it remains."""

import mmap
import struct
from pathlib import Path

from actors.stage.runner import OnProgress, StageRunner, WithoutBlocks
from stages.options import StageOptions
from stages.plan import StageSpec
from stages.step import Step, StepResult
from weights.model_config import ModelConfig

RUNNER = "benchmarks.support.null_stage:load"

TOKEN = 292
"""The token that every request gets: " is" in the sample model's vocabulary."""

COUNT = struct.Struct("<Q")
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


class NullStage(WithoutBlocks):
    """Passes hidden states on unchanged; those of the first stage are zeros, and the last stage samples TOKEN only."""

    def __init__(self, spec: StageSpec, bytes_per_token: int, steps: "StepCount | None" = None) -> None:
        self._spec = spec
        self._bytes_per_token = bytes_per_token
        self._steps = steps
        self._zeros = memoryview(b"")

    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        """See `StageRunner`."""
        if self._steps is not None:
            self._steps.add_one()
        if self._spec.is_last:
            tokens = [TOKEN for segment in step.segments if segment.sample]
            return StepResult(epoch=step.epoch, step_id=step.step_id, tokens=tokens)
        return hidden if hidden else self._first(step.token_count * self._bytes_per_token)

    def close(self) -> None:
        """See `StageRunner`. There is nothing to release."""

    def _first(self, size: int) -> memoryview:
        if len(self._zeros) < size:
            self._zeros = memoryview(bytearray(size))
        return self._zeros[:size]


class StepCount:
    """The number of steps that a stage has run, in a file, which another process reads at no cost to the stage."""

    def __init__(self, path: Path) -> None:
        """The file is created with a count of 0 if it does not exist."""
        with path.open("a+b") as file:
            file.truncate(COUNT.size)
            self._memory = mmap.mmap(file.fileno(), COUNT.size)

    @property
    def steps(self) -> int:
        """The number of steps so far."""
        (count,) = COUNT.unpack_from(self._memory)
        return int(count)

    def add_one(self) -> None:
        """Counts one more step."""
        COUNT.pack_into(self._memory, 0, self.steps + 1)


def step_count_file(model: Path, stage: int) -> Path:
    """The file in which a stage of the model in this directory counts its steps."""
    return model / f"stage{stage}.steps"


def load(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Loads a null stage, as a `RunnerFactory`; it reads only the model's config.json, and counts steps beside it."""
    model = Path(options.model_path)
    config = ModelConfig.from_file(model / "config.json")
    on_progress(len(spec.layers), len(spec.layers))
    steps = StepCount(step_count_file(model, spec.index))
    return NullStage(spec, config.hidden_size * ITEM_BYTES[options.dtype], steps)
