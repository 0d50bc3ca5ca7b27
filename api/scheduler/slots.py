"""The free slots, by microbatch and pool, and the choice of one."""

from collections.abc import Collection, Sequence

from api.scheduler.options import SchedulerOptions

MUCH_FULLER = 4
"""A pool is much fuller than the emptiest with a quarter of its slots more in use: a prefix is not worth that."""


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
        self._by_pool = [0] * cache.pools
        self._excess = max(cache.slots // cache.pools // MUCH_FULLER, 1)
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

    def is_much_fuller(self, pool: int) -> bool:
        """Whether so many more requests run in the pool than in the emptiest that a new one should not join them."""
        return self._by_pool[pool] - min(self._by_pool) > self._excess

    def take_slot(self, pools: Collection[int], free_blocks: Sequence[int]) -> int | None:
        """Takes a slot of the emptiest microbatch with a free one in any of the pools; None without one.

        Of several such pools, the one with most free blocks is chosen, so that pools fill evenly too.
        """
        for microbatch in sorted(range(len(self._running)), key=self._running.__getitem__):
            by_pool = self._free[microbatch]
            fitting = [pool for pool in pools if by_pool[pool]]
            if fitting:
                chosen = max(fitting, key=free_blocks.__getitem__)
                self._running[microbatch] += 1
                self._by_pool[chosen] += 1
                self._free_slots -= 1
                return by_pool[chosen].pop()
        return None

    def free_slot(self, slot: int) -> None:
        """Frees a slot that `take_slot` returned."""
        microbatch, pool = self.microbatch_of(slot), self._pool_of(slot)
        self._free[microbatch][pool].append(slot)
        self._running[microbatch] -= 1
        self._by_pool[pool] -= 1
        self._free_slots += 1
