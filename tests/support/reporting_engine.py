"""An engine that reports the stages that a test gives it."""

import msgspec

from actors.stage.health import Phase, StageHealth, StageProgress
from api.client.request_metrics import RequestMetrics
from api.errors import EngineError
from api.messages.engine import Counts, DraftCounts, EngineMetrics, PipelineReport, PrefixCounts
from api.messages.pipeline_view import StageRoster, StageView, TierBytes
from stages.plan import StageSpec
from tests.support.api_server import endless_text
from tests.support.engine_fakes import fake_health
from tests.support.fake_engine import FakeEngine

SPECS = [
    StageSpec(index=0, stages=2, first_layer=0, end_layer=4),
    StageSpec(index=1, stages=2, first_layer=4, end_layer=6),
]
COUNTS = Counts(waiting=2, running=5, steps_in_flight=2, free_slots=91, slots=96, free_blocks=70, blocks=100, tasks=0)

PREFIX = PrefixCounts(blocks=1234, queries=2000, hits=1740, recomputed_tokens=50)

DRAFTS = DraftCounts(
    num_speculative_tokens=2,
    drafts=1000,
    draft_tokens=2000,
    accepted_tokens=1500,
    accepted_per_position=[900, 600],
    are_on=True,
)


def progress(stage: int, phase: Phase, done: int = 0) -> StageProgress:
    return StageProgress(stage=stage, host=f"host-{stage}", rows=[stage], phase=phase, layers_done=done, layers=4)


def views(roster: StageRoster, *healths: StageHealth) -> list[StageView]:
    tiers = [TierBytes(stage << 20, stage << 30) for stage in range(len(SPECS))]
    return roster.views(healths, lambda stage: 0.25 * stage, kv_cache_blocks_used=30, tiers=tiers)


class ReportingEngine(FakeEngine):
    """An engine that reports the given stages, or fails to."""

    def __init__(self, stages: list[StageView]) -> None:
        super().__init__(endless_text)
        self.requests = RequestMetrics(256)
        self.pid = 4711
        self.stages = stages
        self.failure: EngineError | None = None
        self.drafts = DraftCounts()
        self.resets = 0

    async def metrics(self) -> EngineMetrics:
        raise EngineError("The engine did not answer within 5 s.")

    async def report(self) -> PipelineReport:
        if self.failure is not None:
            raise self.failure
        return PipelineReport(
            epoch=3,
            microbatches=4,
            counts=COUNTS,
            preemptions=6,
            sampling_fallbacks=8,
            stages=self.stages,
            prefix=PREFIX,
            drafts=self.drafts,
        )

    async def reset_prefix_cache(self) -> None:
        if self.failure is not None:
            raise self.failure
        self.resets += 1


def at_work() -> list[StageView]:
    roster = StageRoster(SPECS)
    for stage in (0, 1):
        roster.record_progress(progress(stage, "ready", done=len(SPECS[stage].layers)))
    running = msgspec.structs.replace(fake_health(0), state="running", step_id=12, step_seconds=0.34)
    dead = msgspec.structs.replace(
        fake_health(1), state="dead", pid=0, resident_bytes=0, detail="its process died in /srv/models/x.safetensors"
    )
    return views(roster, running, dead)
