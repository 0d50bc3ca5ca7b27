"""What the blocks of a stage's cache hold, by their keys, and the way back into it from the tiers."""

import threading
from collections import deque

from stages.kv.block_memory import BlockBytes, BlockMemory
from stages.kv.page_tables import PageTables, sure_tokens
from stages.kv.record_file import Record
from stages.kv.tiers import Tiers
from stages.step import BlockLoad, Step
from weights.sizes import ceil_div

RECORDS_AT_ONCE = 64
"""Blocks that a load step holds in the host's memory besides: a long prompt of R1 has thousands, of half a megabyte."""


Filled = dict[bytes, Record]
"""Blocks that a step has filled and the tiers are to keep, by their keys."""


class BlockStore:
    """Knows which blocks hold what, through all epochs. Like page tables it follows from the steps alone.

    A block that a step fills is kept in the tiers before the step is passed on: whoever has the result of the last
    stage knows that all of them have it. All methods but `keep` belong to the thread that computes.
    """

    def __init__(self, memory: BlockMemory, tables: PageTables, tiers: Tiers) -> None:
        self._memory = memory
        self._tables = tables
        self._tiers = tiers
        self._keys: dict[tuple[int, int], bytes] = {}
        self._waiting: deque[Filled] = deque()
        self._lock = threading.Lock()

    def enter_epoch(self) -> None:
        """Gives up what waits to be kept, as the steps that filled it are dropped."""
        with self._lock:
            self._waiting.clear()

    def begin(self, step: Step) -> None:
        """Takes in what a step, which page tables have accepted, is about to overwrite or wants forgotten."""
        if step.forgotten:
            forgotten = set(step.forgotten)
            self._keep_none_of(forgotten)
            for key in forgotten:
                self._tiers.forget(key)
            self._keys = {place: key for place, key in self._keys.items() if key not in forgotten}
        size = self._tables.options.block_size
        for segment in step.segments:
            pool = self._tables.options.pool_of(segment.slot)
            end = segment.start + len(segment.tokens)
            # A slot may also go back, and write other tokens to a block that was full.
            written = self._tables.blocks(segment.slot)[segment.start // size : ceil_div(end, size)]
            for block in (*segment.new_blocks, *written):
                self._keys.pop((pool, block), None)

    def end(self, step: Step) -> None:
        """Takes in and keeps the blocks that a step has filled, once it is computed."""
        self.keep(self.filled(step))

    def filled(self, step: Step) -> Filled:
        """Takes in the blocks that a step has filled, once it is computed; returns what `keep` is to keep of them.

        That is read from the device now, as the next step may overwrite it.
        """
        filled: Filled = {}
        for segment in step.segments:
            if segment.keys:
                pool = self._tables.options.pool_of(segment.slot)
                full = sure_tokens(segment, step.mode) // self._tables.options.block_size
                blocks = self._tables.blocks(segment.slot)[full - len(segment.keys) : full]
                self._keys.update({(pool, block): key for block, key in zip(blocks, segment.keys, strict=True)})
                filled |= self._records(pool, blocks, segment.keys)
        if filled:
            with self._lock:
                self._waiting.append(filled)
        return filled

    def keep(self, filled: Filled) -> None:
        """Keeps what a step has filled, but for what was forgotten since; from any thread."""
        with self._lock:
            if any(waiting is filled for waiting in self._waiting):
                self._waiting = deque(waiting for waiting in self._waiting if waiting is not filled)
                for key, record in filled.items():
                    self._tiers.keep(key, record)

    def load(self, loads: list[BlockLoad]) -> list[int]:
        """Brings blocks back that the device does not hold; returns the indices of those that no tier has."""
        missed: list[int] = []
        coming: list[tuple[BlockBytes, bytes]] = []
        for index, load in enumerate(loads):
            place = load.pool, load.block
            if self._keys.get(place) == load.key:
                continue
            self._keys.pop(place, None)
            record = self._tiers.fetch(load.key)
            if record is None:
                missed.append(index)
                continue
            coming.append((BlockBytes(load.pool, load.block, record), load.key))
            if len(coming) == RECORDS_AT_ONCE:
                self._write(coming)
                coming = []
        self._write(coming)
        return missed

    def _write(self, coming: list[tuple[BlockBytes, bytes]]) -> None:
        """Writes blocks; those of a write that fails are not known, in the next epoch of the same process either."""
        self._memory.write(block for block, _ in coming)
        self._keys.update({(block.pool, block.block): key for block, key in coming})

    def _keep_none_of(self, forgotten: set[bytes]) -> None:
        """Takes keys out of what waits to be kept: only what is kept already is left to be forgotten."""
        with self._lock:
            for waiting in self._waiting:
                for key in forgotten & waiting.keys():
                    del waiting[key]

    def _records(self, pool: int, blocks: list[int], keys: list[bytes]) -> Filled:
        """Returns those of the blocks that no tier has yet."""
        if self._tiers.is_empty:
            return {}
        new = [(block, key) for block, key in zip(blocks, keys, strict=True) if key not in self._tiers]
        records = self._memory.read(pool, [block for block, _ in new])
        return {key: record for (_, key), record in zip(new, records, strict=True)}
