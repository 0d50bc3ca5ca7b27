"""Blocks have one owner at a time, and none is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.scheduler.slots import BlockPool


@given(st.integers(1, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=40))
def test_every_block_is_free_or_owned_once(blocks: int, calls: list[tuple[bool, int]]) -> None:
    pool = BlockPool(blocks)
    owned: list[list[int]] = []
    for take, number in calls:
        if take and number <= pool.free:
            taken = pool.take_blocks(number)
            assert len(taken) == number
            owned.append(taken)
        elif owned:
            pool.free_blocks(owned.pop(number % len(owned)))
        held = [block for run in owned for block in run]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(blocks))
        assert pool.free == blocks - len(held)
    for run in owned:
        pool.free_blocks(run)
    assert sorted(pool.take_blocks(blocks)) == list(range(blocks))


def test_a_shortage_is_refused_and_takes_nothing() -> None:
    pool = BlockPool(3)
    pool.take_blocks(2)
    with pytest.raises(ValueError, match=r"2 blocks were asked of a pool that has 1 free\."):
        pool.take_blocks(2)
    assert pool.free == 1
