"""The pipelines whose scaling is measured: the options of the server, and the ideal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from api.engine.options import EngineOptions
from api.settings.engine import EngineSettings
from api.text.model_source import ModelSource
from benchmarks.scaling.ideal import Ideal
from benchmarks.support.null_model import write_null_model
from stages.device import Device
from stages.plan import default_microbatches
from stages.step import Segment, Step
from stages.timed.stage import durations
from weights.model_config import ModelConfig
from weights.presets import preset_directory
from weights.sample import SAMPLE_DIR

EQUAL, R1, SAMPLE = "equal", "R1", "sample"
"""The beginnings of the names of cases."""
USERS = 4
"""The users of a microbatch: few, so that clients and front end leave the processor to the pipeline."""
SLOTS = 8
"""The slots of a microbatch: as few as chips allow, and more than USERS, so that probes find a free one."""
EQUAL_MS = {4: 10.0, 8: 10.0, 16: 10.0, 32: 20.0, 64: 20.0}
"""The milliseconds of each stage, by the number of stages."""
FEWEST_MICROBATCHES = (16,)
"""The numbers of stages that are also run with as many microbatches, and not one more, which shortens the latency."""
R1_STAGES = (8, 16, 32, 61)
SAMPLE_STAGES = (1, 2, 4)
SHORT_EQUAL_MS = {4: 10.0}
SHORT_R1_STAGES = (8,)
SHORT_SAMPLE_STAGES = (2,)
R1_MAX_MODEL_LEN = 4096
CONTEXT = 256
"""The cached tokens of a user for which R1's steps are predicted, about as many as in the measured time."""
PROMPT_TOKENS = 10
"""The tokens of every prompt."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline; `ideal` is None if the time of a step has to be measured. A microbatch has `users` at its slots."""

    name: str
    model: str
    stages: int
    tokens: int
    microbatches: int
    options: list[str]
    ideal: Ideal | None
    users: int = USERS

    @property
    def streams(self) -> int:
        """The number of requests at once."""
        return self.users * self.microbatches


def cases(device: Device, directory: Path, *, short: bool) -> Iterator[Case]:
    """The cases of a device; synthetic models are written to `directory`."""
    if device != "timed":
        for stages in SHORT_SAMPLE_STAGES if short else SAMPLE_STAGES:
            yield Case(
                name=SAMPLE,
                model=str(SAMPLE_DIR),
                stages=stages,
                tokens=2000,
                microbatches=default_microbatches(stages),
                options=[],
                ideal=None,
            )
        return
    for stages, milliseconds in (SHORT_EQUAL_MS if short else EQUAL_MS).items():
        yield equal_case(stages, milliseconds, directory)
        if stages in FEWEST_MICROBATCHES:
            yield equal_case(stages, milliseconds, directory, microbatches=stages)
    for stages in SHORT_R1_STAGES if short else R1_STAGES:
        yield r1_case(stages)


def equal_case(stages: int, milliseconds: float, directory: Path, microbatches: int | None = None) -> Case:
    """A synthetic model of as many layers as stages, each of which takes `milliseconds` for every step.

    There is one microbatch more than stages unless `microbatches` is given.
    """
    microbatches = microbatches or default_microbatches(stages)
    model = directory / f"equal-{stages}"
    model.mkdir(exist_ok=True)
    write_null_model(model, stages)
    times = [milliseconds * 1e-3] * stages
    return Case(
        name=f"{EQUAL}, {milliseconds:g} ms",
        model=str(model),
        stages=stages,
        tokens=2000,
        microbatches=microbatches,
        options=["--stage-time", f"{milliseconds:g}"],
        ideal=Ideal(decode_s=times, prefill_s=times, microbatches=microbatches, users=USERS),
    )


def r1_case(stages: int) -> Case:
    """DeepSeek-R1 on stages of one row, with predicted times."""
    pipeline = r1_options(stages).pipeline
    microbatches = default_microbatches(stages)
    of_stages = [durations(r1_config(), spec, pipeline.stage) for spec in pipeline.specs]
    decode, prefill = _decode(USERS), _prefill(PROMPT_TOKENS)
    return Case(
        name=R1,
        model="r1",
        stages=stages,
        tokens=R1_MAX_MODEL_LEN - 2 * PROMPT_TOKENS,
        microbatches=microbatches,
        options=["--max-model-len", str(R1_MAX_MODEL_LEN), "--enable-trace"],
        ideal=Ideal(
            decode_s=[stage.seconds(decode) for stage in of_stages],
            prefill_s=[stage.seconds(prefill) for stage in of_stages],
            microbatches=microbatches,
            users=USERS,
        ),
    )


def r1_config() -> ModelConfig:
    """DeepSeek-R1's configuration."""
    return ModelConfig.from_file(preset_directory("r1") / "config.json")


def r1_options(stages: int, users: int = SLOTS, **given: Any) -> EngineOptions:
    """What the engine is told for DeepSeek-R1 on stages of one row in predicted times; `given` are more options.

    A microbatch has slots for so many `users`.
    """
    path = preset_directory("r1")
    settings = EngineSettings.of(
        cache_dir=path,
        device="timed",
        stages=stages,
        max_model_len=R1_MAX_MODEL_LEN,
        max_num_seqs=users * default_microbatches(stages),
        enable_trace=True,
        **given,
    )
    source = ModelSource(path=path, name="r1", root="r1", tokenizer=SAMPLE_DIR)
    return settings.engine_options(source, r1_config())


def _decode(users: int) -> Step:
    tokens = [Segment(slot=slot, start=CONTEXT, tokens=[0], new_blocks=[], sample=True) for slot in range(users)]
    return Step(epoch=0, step_id=0, mode="decode", segments=tokens, admissions=[], ended=[])


def _prefill(tokens: int) -> Step:
    prompt = Segment(slot=0, start=0, tokens=[0] * tokens, new_blocks=[], sample=True)
    return Step(epoch=0, step_id=0, mode="prefill", segments=[prompt], admissions=[], ended=[])
