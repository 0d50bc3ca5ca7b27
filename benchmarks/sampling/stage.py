"""A last stage that takes a given time for each step, as chips would, and then draws tokens of given logits."""

import logging
from typing import Literal

import msgspec
import numpy as np
import structlog
import torch

from actors.sockets.listener import Address
from actors.stage.runner import WithoutBlocks
from actors.stage.server import StageServer
from actors.stage.setup import StageIdentity
from benchmarks.support.peer import START_SECONDS, Pipe, wait_for_end
from stages.backend import ttnn
from stages.candidates import CandidateFinder, CandidateRows
from stages.pending import OnDevice, PendingResult, StageOutput
from stages.sampling.logprobs import Floats
from stages.sampling.rows import LogitRows, WholeRows
from stages.sampling.sampler import Sampler
from stages.step import Step, StepResult
from stages.timed.stage import Alarm

Way = Literal["nothing drawn", "in line, whole logits", "beside, whole logits", "beside, candidates"]
"""What follows a step: nothing, or a draw of each user's token, by which thread and from what."""

VOCABULARY = 129280
"""The tokens of DeepSeek-R1."""

MESH = (4, 8)
"""The chips of a last stage for 128 users, 32 a row."""

LIKELY = 40


def model_like(users: int, seed: int = 0) -> torch.Tensor:
    """Logits [users, VOCABULARY] like a model's, rounded to bfloat16: few likely tokens, and a long tail."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((users, VOCABULARY), dtype=np.float32) * 2
    for row in values:
        row[random.integers(0, VOCABULARY, LIKELY)] += random.exponential(4.0, LIKELY).astype(np.float32) + 8
    return torch.from_numpy(values).bfloat16().float()


class LogitsOnMesh:
    """Logits as a head leaves them on a mesh, with their candidates found, which is the chips' work."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._mesh = ttnn.open_mesh_device(ttnn.MeshShape(*MESH))
        self._users = len(logits)
        mapper = ttnn.ShardTensor2dMesh(self._mesh, MESH, (2, 3))
        self._logits = ttnn.from_torch(
            logits[None, None], dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=self._mesh, mesh_mapper=mapper
        )
        self._finder = CandidateFinder(self._mesh, VOCABULARY)
        self._found = self._finder.find(self._logits)

    def whole(self) -> WholeRows:
        """Reads all logits."""
        composer = ttnn.ConcatMesh2dToTensor(self._mesh, MESH, (2, 3))
        host: Floats = ttnn.to_torch(self._logits, mesh_composer=composer)[0, 0].float().numpy()
        return WholeRows(host)

    def candidates(self) -> CandidateRows:
        """Reads the candidates."""
        host = self._finder.read(self._logits, self._found, {})
        return CandidateRows(self._finder, host, self._logits, range(self._users))


class SampledStage(WithoutBlocks):
    """A `StageRunner` whose steps take a given time, and end in one of several ways."""

    def __init__(self, way: Way, step_s: float, users: int) -> None:
        self._way = way
        self._step_s = step_s
        self._logits = LogitsOnMesh(model_like(users))
        self._sampler = Sampler(VOCABULARY)
        self._alarm = Alarm()

    def step(self, step: Step, hidden: memoryview) -> StageOutput:
        """See `StageRunner`."""
        self._alarm.set(self._step_s)
        changes = self._sampler.prepare(step)
        self._alarm.wait()
        if self._way == "nothing drawn":
            return StepResult(epoch=step.epoch, step_id=step.step_id, tokens=[0] * len(step.segments))
        rows: LogitRows = self._logits.candidates() if self._way == "beside, candidates" else self._logits.whole()

        def draw(on_device: OnDevice) -> StepResult:
            self._sampler.apply(changes)
            sampled = self._sampler.sample(step, rows.through(on_device))
            return StepResult(
                epoch=step.epoch, step_id=step.step_id, tokens=sampled.tokens, fallbacks=sampled.fallbacks
            )

        return PendingResult(draw, needs_device=self._way == "in line, whole logits")

    def close(self) -> None:
        """See `StageRunner`."""
        self._sampler.close()


class StageCase(msgspec.Struct, frozen=True):
    """What a stage is to do with each step."""

    way: Way
    step_s: float
    users: int


def run_stage(pipe: Pipe, case: StageCase, identity: StageIdentity, address: Address, downstream: Address) -> None:
    """Runs a stage between two links until the benchmark ends."""
    # The benchmark gets failures as messages, and a neighbour that leaves at the end is not one.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    torch.set_num_threads(1)
    server = StageServer(identity)
    server.load(lambda _: SampledStage(case.way, case.step_s, case.users)).result(START_SECONDS)
    server.listen(address).result(START_SECONDS)
    server.connect(downstream).result(START_SECONDS)
    pipe.send("ready")
    wait_for_end(pipe)
    server.close()
