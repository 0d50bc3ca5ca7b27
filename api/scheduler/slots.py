"""The free slots and blocks of the cache, and the choice of a slot for a request."""

from collections.abc import Sequence

from api.scheduler.options import SchedulerOptions


class BlockPool:
    """The free blocks of one pool, with ids from 0 to blocks - 1. The block freed last is handed out next."""

    def __init__(self, blocks: int) -> None:
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """The number of free blocks."""
        return len(self._free)

    @property
    def free_ids(self) -> list[int]:
        """The free blocks, in no particular order."""
        return self._free.copy()

    def take_blocks(self, count: int) -> list[int]:
        """Takes `count` blocks. Raises ValueError if fewer are free: callers look at `free` first."""
        kept = len(self._free) - count
        if kept < 0:
            raise ValueError(f"{count} blocks were asked of a pool that has {len(self._free)} free.")
        taken = self._free[kept:]
        del self._free[kept:]
        taken.reverse()
        return taken

    def free_blocks(self, blocks: list[int]) -> None:
        """Frees blocks that `take_blocks` returned."""
        self._free.extend(reversed(blocks))


class Slots:
    """The free slots, by microbatch and pool.

    Every slot belongs to one microbatch, slot // slots_per_microbatch, and to one pool, CacheOptions.pool_of.
    """

    def __init__(self, options: SchedulerOptions) -> None:
        cache = options.cache
        self._per_microbatch = options.slots_per_microbatch
        self._pool_of = cache.pool_of
        self._free: list[list[list[int]]] = [[[] for _ in range(cache.pools)] for _ in range(options.steps_in_flight)]
        self._running = [0] * options.steps_in_flight
        self._free_slots = cache.slots
        for slot in reversed(range(cache.slots)):
            self._free[self.microbatch_of(slot)][cache.pool_of(slot)].append(slot)

    @property
    def free(self) -> int:
        """The number of free slots."""
        return self._free_slots

    def microbatch_of(self, slot: int) -> int:
        """The microbatch that decodes the slot."""
        return slot // self._per_microbatch

    def take_slot(self, blocks: int, pools: Sequence[BlockPool]) -> int | None:
        """Takes a slot of the emptiest microbatch with a free one in a pool of `blocks` free blocks; None without one.

        Of several such pools, the one with most free blocks is chosen, so that pools fill evenly too.
        """
        if not self._free_slots or max(pool.free for pool in pools) < blocks:
            return None
        for microbatch in sorted(range(len(self._running)), key=self._running.__getitem__):
            by_pool = self._free[microbatch]
            fitting = [pool for pool, slots in enumerate(by_pool) if slots and pools[pool].free >= blocks]
            if fitting:
                self._running[microbatch] += 1
                self._free_slots -= 1
                return by_pool[max(fitting, key=lambda pool: pools[pool].free)].pop()
        return None

    def free_slot(self, slot: int) -> None:
        """Frees a slot that `take_slot` returned."""
        microbatch = self.microbatch_of(slot)
        self._free[microbatch][self._pool_of(slot)].append(slot)
        self._running[microbatch] -= 1
        self._free_slots += 1
