"""The view of a pipeline that `GET /pipeline` returns and `galaxyline status` shows."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Literal, NamedTuple

import msgspec

from actors.stage.health import Phase, StageHealth, StageProgress, State
from stages.plan import StageSpec

ViewPhase = Literal["loading", "ready", "recovering", "failed", "stopping"]
"""The phase of an engine; "stopping" from the moment that the server was told to end."""

StageState = Literal["placing", Phase, State]

STATE_DETAILS: dict[State, str] = {
    "silent": "it does not answer",
    "dead": "its process died",
    "failed": "the engine's log has the cause",
}
"""What `StageView.detail` has of a stage in trouble. A stage's own report may name files, so it is not shown."""


class TierBytes(NamedTuple):
    """What a stage keeps of the KV cache beside its device: in its host's memory, and on disk."""

    host: int
    disk: int


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    """A stage of the pipeline of one `replica`: where it is, what it holds, and what it does.

    `host`, `rows` and `pid` are None until they are known. It holds the layers [first_layer, end_layer), of which
    `layers_done` are loaded. `state` is that of `StageProgress` until the pipeline is ready and that of `StageHealth`
    from then on, "placing" before either. `step_id` is the step it works on, since `step_seconds`. `busy_share` is the
    share of the last ten seconds that it computed in. `resident_bytes` is the memory of its process. `received_bytes`
    came by its link from the stage before, or from the engine, and `sent_bytes` went to the next one at `sent_to`.
    Beside its device it keeps `host_tier_bytes` and `disk_tier_bytes` of the KV cache.
    """

    replica: int = 0
    stage: int
    host: str | None
    rows: list[int] | None
    pid: int | None
    first_layer: int
    end_layer: int
    layers_done: int
    state: StageState
    detail: str
    step_id: int | None
    step_seconds: float
    steps_done: int
    busy_share: float
    restarts: int
    resident_bytes: int | None
    kv_cache_blocks_used: int
    received_bytes: int = 0
    sent_bytes: int = 0
    sent_to: str | None = None
    host_tier_bytes: int = 0
    disk_tier_bytes: int = 0


class DraftView(msgspec.Struct, frozen=True, kw_only=True):
    """What drafts came to (see `DraftCounts`).

    `acceptance_rate` is the share of draft tokens that were right, and `tokens_per_draft` what a request got on average
    from a step that verified one; both are None before any was.
    """

    num_speculative_tokens: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_per_position: list[int]
    are_on: bool
    acceptance_rate: float | None
    tokens_per_draft: float | None

    @classmethod
    def of(
        cls,
        *,
        num_speculative_tokens: int,
        drafts: int,
        draft_tokens: int,
        accepted_tokens: int,
        accepted_per_position: list[int],
        are_on: bool,
    ) -> "DraftView":
        """The view of these counts, with what follows from them."""
        return cls(
            num_speculative_tokens=num_speculative_tokens,
            drafts=drafts,
            draft_tokens=draft_tokens,
            accepted_tokens=accepted_tokens,
            accepted_per_position=accepted_per_position,
            are_on=are_on,
            acceptance_rate=accepted_tokens / draft_tokens if draft_tokens else None,
            tokens_per_draft=1 + accepted_tokens / drafts if drafts else None,
        )


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of an engine (see `Counts` and `PrefixCounts`). `epoch` is None before the pipeline is ready.

    The bytes of tiers are those of all stages. `drafts` is None where none are asked for. `sampling_fallbacks` are the
    tokens that took logits of the whole vocabulary on the host.

    A view of several engines has sums; there `pid` and `epoch`, which cannot be added, are None.
    """

    pid: int | None
    epoch: int | None
    microbatches: int
    steps_in_flight: int
    requests_running: int
    requests_waiting: int
    preemptions: int
    slots: int
    slots_used: int
    kv_cache_blocks: int
    kv_cache_blocks_used: int
    prefix_cache_blocks: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    recomputed_tokens: int = 0
    host_tier_bytes: int = 0
    disk_tier_bytes: int = 0
    drafts: DraftView | None = None
    sampling_fallbacks: int = 0


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """One engine. `detail` is what is being loaded, or why it failed or does not answer: then `engine` is None."""

    replica: int
    phase: ViewPhase
    detail: str
    engine: EngineView | None


class PipelineView(msgspec.Struct, frozen=True, kw_only=True):
    """The body of `GET /pipeline`. `phase` and `detail` are those of all replicas together: see `common_state`.

    `engine` is the sum over those that answer, None where none does. `stages` are those of all replicas, in their
    order; an engine that has failed and is gone has none.
    """

    model: str
    phase: ViewPhase
    detail: str
    engine: EngineView | None
    replicas: list[ReplicaView]
    stages: list[StageView]


def total(engines: Sequence[EngineView]) -> EngineView | None:
    """The sum over several engines; that of a single one is its own view, and that of none is None."""
    if len(engines) <= 1:
        return engines[0] if engines else None
    return EngineView(
        pid=None,
        epoch=None,
        microbatches=sum(engine.microbatches for engine in engines),
        steps_in_flight=sum(engine.steps_in_flight for engine in engines),
        requests_running=sum(engine.requests_running for engine in engines),
        requests_waiting=sum(engine.requests_waiting for engine in engines),
        preemptions=sum(engine.preemptions for engine in engines),
        slots=sum(engine.slots for engine in engines),
        slots_used=sum(engine.slots_used for engine in engines),
        kv_cache_blocks=sum(engine.kv_cache_blocks for engine in engines),
        kv_cache_blocks_used=sum(engine.kv_cache_blocks_used for engine in engines),
        prefix_cache_blocks=sum(engine.prefix_cache_blocks for engine in engines),
        prefix_cache_queries=sum(engine.prefix_cache_queries for engine in engines),
        prefix_cache_hits=sum(engine.prefix_cache_hits for engine in engines),
        recomputed_tokens=sum(engine.recomputed_tokens for engine in engines),
        host_tier_bytes=sum(engine.host_tier_bytes for engine in engines),
        disk_tier_bytes=sum(engine.disk_tier_bytes for engine in engines),
        drafts=_all_drafts([engine.drafts for engine in engines if engine.drafts is not None]),
        sampling_fallbacks=sum(engine.sampling_fallbacks for engine in engines),
    )


def _all_drafts(views: Sequence[DraftView]) -> DraftView | None:
    """The sum over the engines that are asked for drafts, as all or none of them are."""
    if not views:
        return None
    return DraftView.of(
        num_speculative_tokens=max(view.num_speculative_tokens for view in views),
        drafts=sum(view.drafts for view in views),
        draft_tokens=sum(view.draft_tokens for view in views),
        accepted_tokens=sum(view.accepted_tokens for view in views),
        accepted_per_position=[
            sum(counts) for counts in zip_longest(*(view.accepted_per_position for view in views), fillvalue=0)
        ],
        are_on=any(view.are_on for view in views),
    )


class StageRoster:
    """The progress of every stage since its start: where it was placed, how far it has loaded, how often it began."""

    def __init__(self, specs: Sequence[StageSpec]) -> None:
        self._specs = specs
        self._last: dict[int, StageProgress] = {}
        self._starts: Counter[int] = Counter()

    def record_progress(self, progress: StageProgress) -> None:
        """Takes in how far a stage is in starting."""
        self._last[progress.stage] = progress
        if progress.phase == "starting":
            self._starts[progress.stage] += 1

    @property
    def hosts(self) -> list[str]:
        """The host of each stage; an empty name before it was placed."""
        places = [self._last.get(spec.index) for spec in self._specs]
        return ["" if progress is None else progress.host for progress in places]

    def views(
        self,
        healths: Sequence[StageHealth],
        busy_share: Callable[[int], float],
        kv_cache_blocks_used: int,
        tiers: Sequence[TierBytes],
    ) -> list[StageView]:
        """The views of all stages in order. `healths` has one entry for each, but none while the pipeline starts.

        `tiers` has what each stage keeps beside its device.
        """
        by_stage = {health.stage: health for health in healths}
        return [
            self._view(spec, by_stage.get(spec.index), busy_share(spec.index), kv_cache_blocks_used, tiers[spec.index])
            for spec in self._specs
        ]

    def _view(
        self,
        spec: StageSpec,
        health: StageHealth | None,
        busy_share: float,
        kv_cache_blocks_used: int,
        tier: TierBytes,
    ) -> StageView:
        progress = self._last.get(spec.index)
        return StageView(
            stage=spec.index,
            host=None if progress is None else progress.host,
            rows=None if progress is None else progress.rows,
            pid=None if health is None else health.pid or None,
            first_layer=spec.first_layer,
            end_layer=spec.end_layer,
            layers_done=0 if progress is None else progress.layers_done,
            state=_state(progress, health),
            detail="" if health is None else STATE_DETAILS.get(health.state, ""),
            step_id=None if health is None else health.step_id,
            step_seconds=0.0 if health is None else health.step_seconds,
            steps_done=0 if health is None else health.steps_done,
            busy_share=busy_share,
            restarts=max(self._starts[spec.index] - 1, 0),
            resident_bytes=None if health is None else health.resident_bytes or None,
            kv_cache_blocks_used=kv_cache_blocks_used,
            received_bytes=0 if health is None else health.received_bytes,
            sent_bytes=0 if health is None else health.sent_bytes,
            sent_to=None if health is None else health.sent_to or None,
            host_tier_bytes=tier.host,
            disk_tier_bytes=tier.disk,
        )


def _state(progress: StageProgress | None, health: StageHealth | None) -> StageState:
    if health is not None:
        return health.state
    return "placing" if progress is None else progress.phase
