"""Page tables against a plain model of them, under any order of admissions, growth, ends and epochs."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stages.errors import StepError
from stages.kv.page_tables import PageTables
from stages.step import Admission, Mode, Segment, Step
from tests.support.stage_driver import GREEDY, cache_options

OPTIONS = cache_options(slots=4, pools=2, max_model_len=128)
SLOTS = st.integers(0, OPTIONS.slots - 1)


def step_of(mode: Mode, segments: list[Segment], admissions: list[int], ended: list[int]) -> Step:
    return Step(
        epoch=1,
        step_id=1,
        mode=mode,
        segments=segments,
        admissions=[Admission(slot=slot, sampling=GREEDY) for slot in admissions],
        ended=ended,
    )


class PageTableMachine(RuleBasedStateMachine):
    """Keeps each slot's blocks and tokens beside the tables under test."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = PageTables(OPTIONS)
        self.blocks: dict[int, list[int]] = {}
        self.tokens: dict[int, int] = {}

    def free(self, slot: int) -> list[int]:
        pool = OPTIONS.pool_of(slot)
        held = {block for other in self.blocks if OPTIONS.pool_of(other) == pool for block in self.blocks[other]}
        return [block for block in range(OPTIONS.blocks) if block not in held]

    @rule(slot=SLOTS)
    def admit(self, slot: int) -> None:
        self.tables.apply(step_of("decode", [], [slot], []))
        self.blocks[slot], self.tokens[slot] = [], 0

    @rule(slot=SLOTS)
    def end(self, slot: int) -> None:
        self.tables.apply(step_of("decode", [], [], [slot]))
        self.blocks.pop(slot, None)
        self.tokens.pop(slot, None)

    @rule()
    def new_epoch(self) -> None:
        self.tables.clear()
        self.blocks, self.tokens = {}, {}

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), prefill=st.booleans())
    def grow(self, data: st.DataObject, prefill: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.tokens)))
        start = self.tokens[slot]
        if prefill:
            start -= start % OPTIONS.block_size
        room = OPTIONS.blocks_per_slot * OPTIONS.block_size - start
        if not room:
            return
        length = data.draw(st.integers(1, room)) if prefill else 1
        missing = max(-(-(start + length) // OPTIONS.block_size) - len(self.blocks[slot]), 0)
        free = self.free(slot)
        new = data.draw(st.permutations(free))[:missing]
        segment = Segment(slot=slot, start=start, tokens=[1] * length, new_blocks=new, sample=True)
        self.tables.apply(step_of("prefill" if prefill else "decode", [segment], [], []))
        self.blocks[slot] += new
        self.tokens[slot] = start + length

    @precondition(lambda self: any(self.blocks.values()))
    @rule(data=st.data())
    def steal(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(slot for slot, blocks in self.blocks.items() if blocks)))
        thief = data.draw(SLOTS.filter(lambda slot: slot != owner and OPTIONS.pool_of(slot) == OPTIONS.pool_of(owner)))
        stolen = Segment(slot=thief, start=0, tokens=[1], new_blocks=self.blocks[owner][:1], sample=True)
        with pytest.raises(StepError, match="already belongs"):
            self.tables.apply(step_of("prefill", [stolen], [thief], []))
        self.blocks[thief], self.tokens[thief] = [], 0

    @invariant()
    def tables_hold_the_blocks(self) -> None:
        rows = self.tables.rows(list(range(OPTIONS.slots)), OPTIONS.blocks_per_slot).tolist()
        for slot, row in enumerate(rows):
            held = self.blocks.get(slot, [])
            assert row == held + [OPTIONS.blocks] * (OPTIONS.blocks_per_slot - len(held))


PageTableMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestPageTables = PageTableMachine.TestCase


def test_padding_reads_scratch_blocks() -> None:
    tables = PageTables(OPTIONS)
    segment = Segment(slot=1, start=0, tokens=[1], new_blocks=[3], sample=True)
    tables.apply(step_of("prefill", [segment], [1], []))
    assert tables.rows([-1, 1], 2).tolist() == [[OPTIONS.blocks] * 2, [3, OPTIONS.blocks]]
