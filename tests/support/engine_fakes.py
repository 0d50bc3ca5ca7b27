"""A stage and a pipeline without a model, for tests of the scheduler and the engine.

The stage knows nothing but the steps it is sent. It keeps page tables and a paged cache of token ids as a real stage
keeps keys and values, refuses any step that would corrupt them, and reads its answers back through the page table: a
block that is written while another request reads it, or found by a wrong key, shows as a refusal or as a wrong token.
"""

import asyncio
import math
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from actors.clock import now_ns
from actors.errors import PipelineError, PlacementError
from actors.options import ClusterOptions, PipelineOptions
from actors.stage.health import StageHealth, StageProgress
from api.engine.options import EngineOptions
from stages.kv.inventory import Inventory
from stages.options import CacheOptions, StageOptions, WeightOptions
from stages.plan import StageSpec
from stages.step import Admission, BlockLoad, Mode, Segment, StageTiming, Step, StepResult, TokenLogprobs

VOCABULARY = 16


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: returns the token after `tokens`, in [0, VOCABULARY), which depends on all of them."""
    return zlib.crc32(array("I", tokens).tobytes()) % VOCABULARY


def reference_answer(prompt: Sequence[int], max_tokens: int, stop_token_ids: Sequence[int]) -> tuple[list[int], str]:
    """Returns a request's tokens, and why it ends, when nothing else runs."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_token_ids:
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"


class CorruptStepError(Exception):
    """A step that no stage could run."""


def demand(condition: bool, message: str) -> None:
    """Raises CorruptStepError unless `condition`."""
    if not condition:
        raise CorruptStepError(message)


def scores(tokens: Sequence[int], start: int, end: int) -> list[TokenLogprobs]:
    """Returns the fake model's scores of the tokens at positions start + 1 to end, or to the last one."""
    return [
        TokenLogprobs(logprob=-float(token), rank=1 + position, top_tokens=[], top_logprobs=[])
        for position, token in enumerate(tokens[start + 1 : end + 1], start + 1)
    ]


def step_seconds(step: Step) -> float:
    """Returns the time of a step in the fake stage: 1 ms, and 20 for a decode step or 1 for each prompt token."""
    return 0.021 if step.mode == "decode" else 0.001 * (1 + step.token_count)


class FakeStage:
    """A stand-in for all stages of a pipeline, which run the same steps in the same order.

    It makes as many drafts as a segment asks for, of which one in four is wrong.
    """

    def __init__(self, cache: CacheOptions, prefill_chunk: int) -> None:
        self._cache = cache
        self._prefill_chunk = prefill_chunk
        self._admitted: dict[int, Admission] = {}
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._keyed: dict[int, int] = {}
        self._next_tokens: dict[int, int] = {}
        self._holders: Counter[tuple[int, int]] = Counter()
        self._keys: dict[tuple[int, int], bytes] = {}
        self.tier: dict[bytes, list[int]] | None = None
        self.computed = 0
        self._stored = {
            (pool, block): [0] * cache.block_size for pool in range(cache.pools) for block in range(cache.blocks)
        }
        self._last_step_id = -1

    def begin_epoch(self, *, lost: bool) -> None:
        """Forgets all slots and, where the stages are `lost`, what blocks hold; their tier outlives them."""
        self._tables.clear()
        self._lengths.clear()
        self._holders.clear()
        if lost:
            self._keys.clear()
            for stored in self._stored.values():
                stored[:] = [0] * self._cache.block_size

    def key_of(self, pool: int, block: int) -> bytes | None:
        """The key of what a block holds; None where it holds nothing that can be found."""
        return self._keys.get((pool, block))

    @property
    def live_slots(self) -> set[int]:
        """The slots that were admitted and have not ended."""
        return set(self._tables)

    def run(self, step: Step) -> StepResult:
        """Applies a step and samples. Raises CorruptStepError."""
        demand(step.step_id > self._last_step_id, "step ids must rise")
        self._last_step_id = step.step_id
        demand(bool(step.segments) != bool(step.loads), "a step with neither segments nor loads, or with both")
        demand((step.mode == "load") == bool(step.loads), "a load step without loads, or loads in another one")
        self._forget(step.forgotten)
        for shrunk in step.shrunk:
            self._shrink(shrunk.slot, shrunk.blocks)
        for slot in step.ended:
            demand(slot in self._tables, f"slot {slot} ended without having begun")
            self._shrink(slot, 0)
            del self._tables[slot], self._lengths[slot]
        self._admit(step)
        slots = [segment.slot for segment in step.segments]
        demand(len(set(slots)) == len(slots), "two segments of one slot")
        demand(step.mode == "decode" or step.token_count <= self._prefill_chunk, "a prefill step over its budget")
        for segment in step.segments:
            self._store(segment, step.mode == "decode")
        sampled = [segment.slot for segment in step.segments if segment.sample]
        wanted = [self._admitted[slot].sampling.logprobs is not None for slot in sampled]
        answers = [self._verify(segment, step.mode == "decode") for segment in step.segments if segment.sample]
        drafts = [
            self._drafts([*self._read(segment.slot), answer[-1]], segment.drafts)
            for segment, answer in zip([s for s in step.segments if s.sample], answers, strict=True)
        ]
        has_drafts = step.mode == "decode" and any(len(segment.tokens) > 1 for segment in step.segments)
        return StepResult(
            epoch=step.epoch,
            step_id=step.step_id,
            tokens=[token for answer in answers for token in answer],
            accepted=[len(answer) - 1 for answer in answers] if has_drafts else [],
            drafts=drafts if any(segment.drafts for segment in step.segments) else [],
            logprobs=[
                scores([0, token], 0, 1)[0] if asks else None
                for answer, asks in zip(answers, wanted, strict=True)
                for token in answer
            ]
            if any(wanted)
            else [],
            prompt_logprobs=[
                self._score(self._admitted[segment.slot], segment)
                for segment in step.segments
                if step.mode == "prefill" and self._admitted[segment.slot].sampling.prompt_logprobs is not None
            ],
            timings=[StageTiming(received_ns=0, began_ns=0, ended_ns=int(step_seconds(step) * 1e9))],
            missed=[index for index, load in enumerate(step.loads) if not self._load(load)],
        )

    def _forget(self, keys: list[bytes]) -> None:
        for key in keys:
            if self.tier is not None:
                self.tier.pop(key, None)
        self._keys = {place: key for place, key in self._keys.items() if key not in keys}

    def _load(self, load: BlockLoad) -> bool:
        place = load.pool, load.block
        demand(not self._holders[place], f"block {load.block} is loaded while a request holds it")
        if self._keys.get(place) == load.key:
            return True
        self._keys.pop(place, None)
        if self.tier is None or load.key not in self.tier:
            return False
        self._stored[place] = self.tier[load.key].copy()
        self._keys[place] = load.key
        return True

    def _score(self, admission: Admission, segment: Segment) -> list[TokenLogprobs]:
        end = segment.start + len(segment.tokens)
        demand(
            segment.tokens == admission.tokens[segment.start : end], "other tokens than the request was admitted with"
        )
        return scores(admission.tokens[: admission.prompt_tokens], segment.start, end)

    def _admit(self, step: Step) -> None:
        admitted = [admission.slot for admission in step.admissions]
        demand(len(set(admitted)) == len(admitted), "a slot admitted twice")
        demand(set(admitted) <= {segment.slot for segment in step.segments}, "an admission without a segment")
        self._admitted.update((admission.slot, admission) for admission in step.admissions)
        for slot in admitted:
            demand(slot not in self._tables, f"slot {slot} admitted while it is taken")
            demand(0 <= slot < self._cache.slots, f"slot {slot} does not exist")
            cached = self._admitted[slot].cached
            for block in cached:
                place = self._cache.pool_of(slot), block
                demand(place in self._keys, f"block {block} holds nothing that could be found")
                self._holders[place] += 1
            self._tables[slot] = cached.copy()
            self._lengths[slot] = len(cached) * self._cache.block_size
            self._keyed[slot] = len(cached)
            self._next_tokens.pop(slot, None)

    def _store(self, segment: Segment, decode: bool) -> None:
        slot = segment.slot
        demand(slot in self._tables, f"slot {slot} was not admitted")
        demand(segment.start == self._lengths[slot], f"slot {slot} begins at {segment.start}, not where it left off")
        demand(len(segment.tokens) > 0, "an empty segment")
        demand(self._next_tokens.pop(slot, segment.tokens[0]) == segment.tokens[0], "another token than was announced")
        if decode:
            demand(segment.sample, "a decode samples")
        else:
            if not segment.sample:
                self._next_tokens[slot] = segment.next_token
            demand(segment.start % self._cache.block_size == 0, "a chunk begins inside a block")
        self._extend_table(slot, segment.new_blocks)
        pool, table = self._cache.pool_of(slot), self._tables[slot]
        for position, token in enumerate(segment.tokens, segment.start):
            index, offset = divmod(position, self._cache.block_size)
            demand(index < len(table), f"position {position} of slot {slot} has no block")
            demand(self._holders[pool, table[index]] == 1, f"block {table[index]} is written while another reads it")
            demand((pool, table[index]) not in self._keys, f"block {table[index]} is written while it can be found")
            self._stored[pool, table[index]][offset] = token
        self._lengths[slot] += 1 if decode else len(segment.tokens)
        self.computed += 0 if decode else len(segment.tokens)
        full = self._lengths[slot] // self._cache.block_size
        filled = table[self._keyed[slot] : full]
        self._keyed[slot] = full
        demand(len(segment.keys) in {0, len(filled)}, "a key for a block that is not full")
        for block, key in zip(filled, segment.keys, strict=False):
            self._keys[pool, block] = key
            if self.tier is not None:
                self.tier[key] = self._stored[pool, block].copy()

    def _verify(self, segment: Segment, decode: bool) -> list[int]:
        """The token after a segment, behind those of its drafts that are right."""
        answer = [next_token(self._read(segment.slot))]
        for draft in segment.tokens[1:] if decode else []:
            if draft != answer[-1]:
                break
            self._lengths[segment.slot] += 1
            answer.append(next_token(self._read(segment.slot)))
        return answer

    def _drafts(self, tokens: list[int], count: int) -> list[int]:
        drafts: list[int] = []
        for _ in range(count):
            token = next_token([*tokens, *drafts])
            is_right = zlib.crc32(array("I", [*tokens, *drafts, count]).tobytes()) % 4
            drafts.append(token if is_right else (token + 1) % VOCABULARY)
        return drafts

    def _shrink(self, slot: int, kept: int) -> None:
        """Gives back all but the first blocks of a slot, none of which can be found by a key for what was rejected."""
        table = self._tables[slot]
        demand(not kept or kept < len(table), f"slot {slot} has no more than {kept} blocks")
        demand(not kept or kept * self._cache.block_size > self._lengths[slot], f"slot {slot} gives back its tokens")
        for block in table[kept:]:
            self._holders[self._cache.pool_of(slot), block] -= 1
        del table[kept:]

    def _extend_table(self, slot: int, blocks: list[int]) -> None:
        pool = self._cache.pool_of(slot)
        for block in blocks:
            demand(0 <= block < self._cache.blocks, f"block {block} does not exist")
            demand(not self._holders[pool, block], f"block {block} of pool {pool} is shared")
            self._holders[pool, block] += 1
            self._keys.pop((pool, block), None)
        self._tables[slot] += blocks
        demand(len(self._tables[slot]) <= self._cache.blocks_per_slot, "a page table that is too wide")

    def _read(self, slot: int) -> list[int]:
        pool = self._cache.pool_of(slot)
        stored = [token for block in self._tables[slot] for token in self._stored[pool, block]]
        return stored[: self._lengths[slot]]


class PoisonedStepError(Exception):
    """The failure of a stage at a poisoned step."""


class PoisonedStage(FakeStage):
    """Fails at each prefill step with the token `poison`, or at each decode step of a request that has it."""

    def __init__(self, cache: CacheOptions, prefill_chunk: int, poison: int, mode: Mode) -> None:
        super().__init__(cache, prefill_chunk)
        self._poison = poison
        self._mode = mode

    def run(self, step: Step) -> StepResult:
        """Raises PoisonedStepError."""
        if step.mode == self._mode and any(self._poison in self._tokens(segment) for segment in step.segments):
            raise PoisonedStepError
        return super().run(step)

    def _tokens(self, segment: Segment) -> list[int]:
        return segment.tokens if self._mode == "prefill" else self._read(segment.slot)


HOP_NS, QUEUE_NS, STEP_NS = 10, 20, 50
"""The times of every stage of a FakePipeline: so short that all of them are over when the result comes."""


class FakePipeline:
    """A pipeline around a FakeStage, which gives its results at once.

    From step `break_at` on it fails, as often as `breaks` says; from step `stall_at` on it gives no results. Stages
    claim the times above, one after the other from the submission on.
    """

    def __init__(
        self,
        options: PipelineOptions,
        break_at: float = math.inf,
        stall_at: float = math.inf,
        breaks: float = math.inf,
    ) -> None:
        self.epoch = 7
        self.recoveries = 0
        self._breaks = breaks
        self._cache = options.stage.cache
        self.is_closed = False
        self.steps: list[Step] = []
        self.timings: list[list[StageTiming]] = []
        self.healths = [fake_health(spec.index) for spec in options.specs]
        self._stage = FakeStage(options.stage.cache, prefill_chunk=1 << 20)
        self._results: asyncio.Queue[StepResult] = asyncio.Queue()
        self._break_at = break_at
        self._stall_at = stall_at

    async def submit(self, step: Step) -> None:
        """Runs the step."""
        demand(step.epoch == self.epoch, f"a step of epoch {step.epoch}")
        if step.step_id >= self._break_at and self.recoveries < self._breaks:
            raise PipelineError(f"Stage 1 on fake-host died at step {step.step_id}: no cause.", 1, step.step_id)
        self.steps.append(step)
        self.timings.append(fake_timings(now_ns(), len(self.healths)))
        result = msgspec.structs.replace(self._stage.run(step), timings=self.timings[-1])
        if step.step_id < self._stall_at:
            self._results.put_nowait(result)

    async def receive(self) -> StepResult:
        """The next result."""
        return await self._results.get()

    async def health(self) -> list[StageHealth]:
        """Returns what the test has set."""
        return self.healths

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        """Stages without tiers."""
        return [None for _ in versions]

    async def recover(self) -> None:
        """Begins anew with empty stages."""
        self.epoch += 1
        self.recoveries += 1
        self._stage = FakeStage(self._cache, prefill_chunk=1 << 20)
        self._results = asyncio.Queue()

    async def close(self) -> None:
        """Notes that it is closed."""
        self.is_closed = True


def fake_timings(submitted_ns: int, stages: int) -> list[StageTiming]:
    """Returns the stages' timings of a step that is submitted now."""
    timings: list[StageTiming] = []
    for stage in range(stages):
        received_ns = submitted_ns + stage * (HOP_NS + QUEUE_NS + STEP_NS) + HOP_NS
        began_ns = received_ns + QUEUE_NS
        timings.append(StageTiming(received_ns=received_ns, began_ns=began_ns, ended_ns=began_ns + STEP_NS))
    return timings


def fake_health(stage: int) -> StageHealth:
    """The health of a stage between two steps."""
    return StageHealth(
        stage=stage,
        host="fake-host",
        pid=1000 + stage,
        state="ready",
        step_id=None,
        step_seconds=0.0,
        received_step=None,
        steps_done=7,
        busy_seconds=0.0,
        layers_done=2,
        layers=2,
        resident_bytes=3 << 20,
        detail="",
    )


OnProgress = Callable[[StageProgress], None]


def report_progress(options: PipelineOptions, on_progress: OnProgress) -> None:
    """Reports that every stage has loaded its first layer."""
    for spec in options.specs:
        on_progress(
            StageProgress(
                stage=spec.index,
                host="fake-host",
                rows=[spec.index],
                phase="loading",
                layers_done=1,
                layers=len(spec.layers),
            )
        )


async def start_sound(options: PipelineOptions, on_progress: OnProgress) -> FakePipeline:
    """Starts a pipeline that works."""
    report_progress(options, on_progress)
    return FakePipeline(options)


async def start_breaking(options: PipelineOptions, on_progress: OnProgress) -> FakePipeline:
    """Starts a pipeline that fails at step 5."""
    report_progress(options, on_progress)
    return FakePipeline(options, break_at=5)


async def start_stalling(options: PipelineOptions, on_progress: OnProgress) -> FakePipeline:
    """Starts a pipeline that gives no results from step 5 on."""
    report_progress(options, on_progress)
    return FakePipeline(options, stall_at=5)


async def start_standing(options: PipelineOptions, on_progress: OnProgress) -> FakePipeline:
    """Starts a pipeline whose second stage does not answer."""
    pipeline = await start_sound(options, on_progress)
    pipeline.healths[1] = msgspec.structs.replace(pipeline.healths[1], state="silent")
    return pipeline


async def start_refused(options: PipelineOptions, on_progress: OnProgress) -> FakePipeline:
    """Fails, as the pipeline cannot be placed."""
    report_progress(options, on_progress)
    raise PlacementError("2 stages need 2 rows, the cluster has 1.")


async def start_never(options: PipelineOptions, on_progress: OnProgress) -> FakePipeline:
    """Starts a pipeline that loads for ever."""
    report_progress(options, on_progress)
    await asyncio.Event().wait()
    return FakePipeline(options)


def engine_options(start: str = "start_sound", *, slots: int = 12, blocks: int = 48) -> EngineOptions:
    """Options for two stages of two layers; `start` is one of the functions above."""
    specs = [
        StageSpec(index=0, stages=2, first_layer=0, end_layer=2),
        StageSpec(index=1, stages=2, first_layer=2, end_layer=4),
    ]
    cache = CacheOptions(slots=slots, pools=1, blocks=blocks, block_size=32, max_model_len=128)
    stage = StageOptions(
        model_path="absent",
        cache_dir="absent",
        dtype="float32",
        weights=WeightOptions(load_format="dummy"),
        seed=0,
        cache=cache,
    )
    return EngineOptions(
        pipeline=PipelineOptions(
            hidden_size=8,
            specs=specs,
            stage=stage,
            cluster=ClusterOptions(start_timeout_s=10, step_timeout_s=10),
        ),
        prefill_chunk=64,
        close_timeout_s=10,
        pipeline_start=f"tests.support.engine_fakes:{start}",
    )
