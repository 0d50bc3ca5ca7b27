"""A stage and a pipeline without a model, for tests of the scheduler and the engine.

The stage knows nothing but the steps it is sent. It keeps page tables and a paged cache of token ids as a real stage
keeps keys and values, refuses any step that would corrupt them, and reads its answers back through the page table: a
block shared by two requests shows as a refusal, or as a wrong token.
"""

import zlib
from array import array
from collections.abc import Sequence

from stages.options import CacheOptions
from stages.step import Segment, Step, StepResult

VOCABULARY = 16


def next_token(tokens: Sequence[int]) -> int:
    """The model: the token after `tokens`, in [0, VOCABULARY). Depends on every token and its position."""
    return zlib.crc32(array("I", tokens).tobytes()) % VOCABULARY


def reference_answer(prompt: Sequence[int], max_tokens: int, stop_token_ids: Sequence[int]) -> tuple[list[int], str]:
    """What a request gets when nothing else runs: its tokens and why it ended."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        token = next_token(tokens)
        if token in stop_token_ids:
            return tokens[len(prompt) :], "stop"
        tokens.append(token)
    return tokens[len(prompt) :], "length"


class CorruptStepError(Exception):
    """A step that no stage could run."""


def demand(condition: bool, message: str) -> None:
    """Raises CorruptStepError unless `condition`."""
    if not condition:
        raise CorruptStepError(message)


class FakeStage:
    """All stages of a pipeline in one: they see the same steps in the same order."""

    def __init__(self, cache: CacheOptions, prefill_chunk: int) -> None:
        self._cache = cache
        self._prefill_chunk = prefill_chunk
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._owner: dict[tuple[int, int], int] = {}
        self._stored = {
            (pool, block): [0] * cache.block_size for pool in range(cache.pools) for block in range(cache.blocks)
        }
        self._last_step_id = -1

    @property
    def live_slots(self) -> set[int]:
        """Slots that were admitted and have not ended."""
        return set(self._tables)

    def run(self, step: Step) -> StepResult:
        """Applies a step and samples. Raises CorruptStepError."""
        demand(step.step_id > self._last_step_id, "step ids must rise")
        self._last_step_id = step.step_id
        demand(bool(step.segments), "a step without segments")
        for slot in step.ended:
            demand(slot in self._tables, f"slot {slot} ended without having begun")
            for block in self._tables.pop(slot):
                del self._owner[self._cache.pool_of(slot), block]
            del self._lengths[slot]
        self._admit(step)
        slots = [segment.slot for segment in step.segments]
        demand(len(set(slots)) == len(slots), "two segments of one slot")
        demand(step.mode == "decode" or step.token_count <= self._prefill_chunk, "a prefill step over its budget")
        for segment in step.segments:
            self._store(segment, step.mode == "decode")
        sampled = [next_token(self._read(segment.slot)) for segment in step.segments if segment.sample]
        return StepResult(epoch=step.epoch, step_id=step.step_id, tokens=sampled)

    def _admit(self, step: Step) -> None:
        admitted = [admission.slot for admission in step.admissions]
        demand(len(set(admitted)) == len(admitted), "a slot admitted twice")
        demand(set(admitted) <= {segment.slot for segment in step.segments}, "an admission without a segment")
        for slot in admitted:
            demand(slot not in self._tables, f"slot {slot} admitted while it is taken")
            demand(0 <= slot < self._cache.slots, f"slot {slot} does not exist")
            self._tables[slot] = []
            self._lengths[slot] = 0

    def _store(self, segment: Segment, decode: bool) -> None:
        slot = segment.slot
        demand(slot in self._tables, f"slot {slot} was not admitted")
        demand(segment.start == self._lengths[slot], f"slot {slot} begins at {segment.start}, not where it left off")
        demand(len(segment.tokens) > 0, "an empty segment")
        if decode:
            demand(len(segment.tokens) == 1 and segment.sample, "a decode is one token and samples")
        else:
            demand(segment.start % self._cache.block_size == 0, "a chunk begins inside a block")
        self._extend_table(slot, segment.new_blocks)
        pool, table = self._cache.pool_of(slot), self._tables[slot]
        for position, token in enumerate(segment.tokens, segment.start):
            index, offset = divmod(position, self._cache.block_size)
            demand(index < len(table), f"position {position} of slot {slot} has no block")
            self._stored[pool, table[index]][offset] = token
        self._lengths[slot] += len(segment.tokens)

    def _extend_table(self, slot: int, blocks: list[int]) -> None:
        pool = self._cache.pool_of(slot)
        for block in blocks:
            demand(0 <= block < self._cache.blocks, f"block {block} does not exist")
            demand((pool, block) not in self._owner, f"block {block} of pool {pool} is shared")
            self._owner[pool, block] = slot
        self._tables[slot] += blocks
        demand(len(self._tables[slot]) <= self._cache.blocks_per_slot, "a page table that is too wide")

    def _read(self, slot: int) -> list[int]:
        pool = self._cache.pool_of(slot)
        stored = [token for block in self._tables[slot] for token in self._stored[pool, block]]
        return stored[: self._lengths[slot]]
