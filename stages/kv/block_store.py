"""What the blocks of a stage's cache hold, by their keys, and the way back into it from the tiers."""

from stages.kv.block_memory import BlockBytes, BlockMemory
from stages.kv.page_tables import PageTables, sure_tokens
from stages.kv.tiers import Tiers
from stages.step import BlockLoad, Step
from weights.sizes import ceil_div

RECORDS_AT_ONCE = 64
"""Blocks that a load step holds in the host's memory besides: a long prompt of R1 has thousands, of half a megabyte."""


class BlockStore:
    """Knows which blocks hold what, through all epochs. Like page tables it follows from the steps alone.

    A block that a step fills is kept in the tiers before the step is passed on: whoever has the result of the last
    stage knows that all of them have it.
    """

    def __init__(self, memory: BlockMemory, tables: PageTables, tiers: Tiers) -> None:
        self._memory = memory
        self._tables = tables
        self._tiers = tiers
        self._keys: dict[tuple[int, int], bytes] = {}

    def begin(self, step: Step) -> None:
        """Takes in what a step, which page tables have accepted, is about to overwrite or wants forgotten."""
        if step.forgotten:
            forgotten = set(step.forgotten)
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
        """Takes in the blocks that a step has filled, once it is computed."""
        for segment in step.segments:
            if segment.keys:
                pool = self._tables.options.pool_of(segment.slot)
                full = sure_tokens(segment, step.mode) // self._tables.options.block_size
                blocks = self._tables.blocks(segment.slot)[full - len(segment.keys) : full]
                self._keys.update({(pool, block): key for block, key in zip(blocks, segment.keys, strict=True)})
                self._keep(pool, blocks, segment.keys)

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

    def _keep(self, pool: int, blocks: list[int], keys: list[bytes]) -> None:
        if self._tiers.is_empty:
            return
        new = [(block, key) for block, key in zip(blocks, keys, strict=True) if key not in self._tiers]
        records = self._memory.read(pool, [block for block, _ in new])
        for (_, key), record in zip(new, records, strict=True):
            self._tiers.keep(key, record)
