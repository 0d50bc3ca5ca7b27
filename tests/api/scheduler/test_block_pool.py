"""Blocks are shared by those that find them, and none is lost, under any order of calls."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from api.scheduler.block_pool import BlockPool

BLOCKS = 6
KEYS = [bytes([number]) for number in range(8)]


class PoolMachine(RuleBasedStateMachine):
    """Keeps beside the pool who holds which blocks, and what each was filled with."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.sure: set[int] = set()

    @rule(count=st.integers(1, 3))
    def take(self, count: int) -> None:
        if count > self.pool.free:
            with pytest.raises(ValueError, match=f"{count} blocks were asked of a pool that has {self.pool.free} free"):
                self.pool.take(count)
            return
        without_key = [block for block in self.pool.free_ids if not self.has_key(block)]
        taken = self.pool.take(count)
        assert len(set(taken)) == count
        assert set(without_key[:count]) <= set(taken) or set(taken) <= set(without_key)
        for block in taken:
            self.content.pop(block, None)
            self.sure.discard(block)
        self.held.append(taken)

    def has_key(self, block: int) -> bool:
        return block in self.content and self.pool.find(self.content[block]) == block

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(sorted({block for blocks in self.held for block in blocks})))
        if block not in self.content and self.pool.find(key) is None:
            self.content[block] = key
            self.pool.publish(block, key)

    @rule(key=st.sampled_from(KEYS))
    def confirm(self, key: bytes) -> None:
        block = self.pool.find(key)
        if block is not None:
            self.pool.confirm(block, key)
            self.sure.add(block)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=3, unique=True))
    def share(self, keys: list[bytes]) -> None:
        found = self.pool.match(keys)
        assert [self.content[block] for block in found] == keys[: len(found)]
        if found:
            idle = self.pool.free
            assert self.pool.fits(found, len(found))
            self.pool.share(found)
            assert idle - len(found) <= self.pool.free <= idle
            self.held.append(found)

    @rule(key=st.sampled_from(KEYS))
    def forget(self, key: bytes) -> None:
        block = self.pool.find(key)
        if block is not None:
            self.pool.forget([block])
            del self.content[block]
            self.sure.discard(block)

    @rule()
    def begin_epoch(self) -> None:
        self.pool.begin_epoch()
        self.held = []
        for key in KEYS:
            block = self.pool.find(key)
            if block is not None:
                assert block in self.sure
                assert not self.pool.is_checked(block)
                self.pool.check(block)
                assert self.pool.is_checked(block)
        self.content = {block: key for block, key in self.content.items() if block in self.sure}
        assert self.pool.free == BLOCKS

    @invariant()
    def books_balance(self) -> None:
        holders = Counter(block for blocks in self.held for block in blocks)
        assert self.pool.holders == [holders[block] for block in range(BLOCKS)]
        assert sorted([*holders, *self.pool.free_ids]) == list(range(BLOCKS))
        assert self.pool.free == BLOCKS - len(holders)
        for block, key in self.content.items():
            assert self.pool.find(key) == block
        assert self.pool.findable == len(self.content)


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestBlockPool = PoolMachine.TestCase


def test_the_end_of_what_was_used_longest_ago_is_taken_first() -> None:
    pool = BlockPool(4)
    old, new = pool.take(2), pool.take(2)
    for block, key in zip([*old, *new], KEYS, strict=False):
        pool.publish(block, key)
    pool.release(old)
    pool.release(new)
    assert pool.take(4) == [old[1], old[0], new[1], new[0]]
