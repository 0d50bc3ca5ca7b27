"""Requests go to the emptiest microbatch, and into the pool that is wanted."""

from api.scheduler.slots import Slots
from tests.support.scheduling import scheduler_options


def test_microbatches_and_pools_fill_evenly() -> None:
    options = scheduler_options(stages=1, microbatches=2, slots=8, pools=2)
    slots = Slots(options)
    free = [10, 10]
    taken = []
    while (slot := slots.take_slot([0, 1], free)) is not None:
        taken.append(slot)
        free[options.cache.pool_of(slot)] -= 1
    assert sorted(taken) == list(range(8))
    assert [slots.microbatch_of(slot) for slot in taken] == [0, 1] * 4
    assert slots.free == 0


def test_a_slot_comes_from_the_pools_that_are_asked_for() -> None:
    options = scheduler_options(stages=1, microbatches=1, slots=4, pools=2)
    slots = Slots(options)
    taken = [slots.take_slot([1], [5, 5]) for _ in range(3)]
    assert [slot is not None and options.cache.pool_of(slot) for slot in taken] == [1, 1, False]
    assert slots.is_much_fuller(1)
    assert not slots.is_much_fuller(0)
    assert slots.free == 2
