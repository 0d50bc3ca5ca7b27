"""A pipeline of real stages that loses one, whose blocks come back from the host's memory."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from actors.errors import PipelineError
from actors.options import ClusterOptions, PipelineOptions
from actors.pipeline import Pipeline
from actors.run_directory import RunDirectory
from stages.options import TierOptions
from stages.plan import plan_stages
from stages.step import Admission, BlockLoad, Mode, Segment, Step, StepResult
from tests.support.checkpoints import write_checkpoint
from tests.support.loops import on_uvloop
from tests.support.model_errors import TINY
from tests.support.pipelines import leftovers, receive, runs
from tests.support.ray_cluster import ray_of_this_process
from tests.support.stage_driver import GREEDY, cache_options, key_of, stage_options
from weights.model_config import ModelConfig

if TYPE_CHECKING:
    from actors.cluster.cluster import Cluster

STAGES = 2
SECONDS = 120
PROMPT = [(7 * at * at + 3 * at) % TINY["vocab_size"] for at in range(100)]
BLOCK = 32
FULL = len(PROMPT) // BLOCK
KEYS = [key_of(number) for number in range(FULL)]


@pytest.fixture(scope="module")
def cluster() -> "Iterator[Cluster]":
    """One Ray for all tests of this module."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        with ray_of_this_process(STAGES) as joined:
            yield joined


@pytest.fixture
def directory(cluster: "Cluster") -> Iterator[RunDirectory]:
    """The directory of the pipeline, which tells where its stages have theirs in memory."""
    made = RunDirectory.create()
    yield made
    made.remove()


def options(tmp_path: Path, directory: RunDirectory) -> PipelineOptions:
    model = write_checkpoint(tmp_path / "model", overrides=TINY)
    config = ModelConfig.from_file(model / "config.json")
    tiers = TierOptions(host_bytes=1 << 22)
    return PipelineOptions(
        hidden_size=config.hidden_size,
        specs=plan_stages(config, STAGES),
        stage=stage_options(model, tmp_path / "cache", cache=cache_options(), tiers=tiers),
        cluster=ClusterOptions(start_timeout_s=SECONDS, step_timeout_s=SECONDS, spare=False),
        directory=str(directory.path),
    )


class Steps:
    """Passes steps through a pipeline, one by one."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._step_id = 0

    async def run(
        self, mode: Mode, segment: Segment | None, cached: Sequence[int] | None = None, loads: Sequence[BlockLoad] = ()
    ) -> StepResult:
        """Passes a step of a segment or of loads, and with the admission of slot 0 where its `cached` are given."""
        self._step_id += 1
        admissions = [] if cached is None else [Admission(slot=0, sampling=GREEDY, cached=list(cached))]
        await self._pipeline.submit(
            Step(
                epoch=self._pipeline.epoch,
                step_id=self._step_id,
                mode=mode,
                segments=[] if segment is None else [segment],
                admissions=admissions,
                ended=[],
                loads=list(loads),
            )
        )
        result = await receive(self._pipeline)
        assert (result.epoch, result.step_id) == (self._pipeline.epoch, self._step_id)
        return result

    async def answer(self, cached: list[int], new: list[int]) -> list[int]:
        """The tokens after the prompt, of which the first blocks are in the cache."""
        start = BLOCK * len(cached)
        keys = KEYS[len(cached) :]
        prompt = Segment(slot=0, start=start, tokens=PROMPT[start:], new_blocks=new, sample=True, keys=keys)
        tokens = (await self.run("prefill", prompt, cached)).tokens
        for position in range(len(PROMPT), len(PROMPT) + 5):
            segment = Segment(slot=0, start=position, tokens=tokens[-1:], new_blocks=[], sample=True)
            tokens += (await self.run("decode", segment)).tokens
        return tokens

    async def load(self, blocks: Sequence[int], keys: Sequence[bytes]) -> list[int]:
        """What could not be loaded."""
        loads = [BlockLoad(pool=0, block=block, key=key) for block, key in zip(blocks, keys, strict=True)]
        return (await self.run("load", None, loads=loads)).missed


@pytest.mark.slow
@pytest.mark.parametrize("victims", [[0], [1], [0, 1]], ids=str)
@on_uvloop
async def test_blocks_of_a_lost_stage_come_back_from_memory(
    cluster: "Cluster", victims: list[int], tmp_path: Path, directory: RunDirectory
) -> None:
    pipeline = await Pipeline.start(options(tmp_path, directory), lambda _: None)
    try:
        steps = Steps(pipeline)
        blocks = [4, 1, 6, 3]
        expected = await steps.answer([], blocks)
        before = await pipeline.inventories([0] * STAGES)
        assert [sorted(each.added) for each in before if each] == [sorted(KEYS)] * STAGES
        pids = [health.pid for health in await pipeline.health()]
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        with pytest.raises(PipelineError):
            await receive(pipeline)
        await pipeline.recover()
        after = await pipeline.inventories([each.version if each else 0 for each in before])
        assert [each.is_whole for each in after if each] == [stage in victims for stage in range(STAGES)]
        assert [each.model for each in after if each] == [each.model for each in before if each]
        # Those that only nobody has are missing.
        assert await steps.load([*blocks[:FULL], 7], [*KEYS, key_of(99)]) == [FULL]
        assert await steps.answer(blocks[:FULL], blocks[FULL:]) == expected
        pids += [health.pid for health in await pipeline.health()]
        assert directory.memory.is_dir()
    finally:
        await pipeline.close()
    assert not any(runs(pid) for pid in pids)
    directory.remove()
    assert not directory.memory.exists()
    assert leftovers() == []
