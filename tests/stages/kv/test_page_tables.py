"""Page tables against a plain model of them, under any order of admissions, growth, sharing, loads, ends and epochs."""

from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stages.errors import StepError
from stages.kv.page_tables import PageTables
from stages.options import DRAFTS_MAX
from stages.step import Admission, BlockLoad, Mode, Segment, ShrunkSlot, Step
from tests.support.stage_driver import GREEDY, cache_options

OPTIONS = cache_options(slots=4, pools=2, max_model_len=128)
SLOTS = st.integers(0, OPTIONS.slots - 1)


SIZE = OPTIONS.block_size


def step_of(
    mode: Mode, segments: list[Segment], admissions: list[int], ended: list[int], loads: list[BlockLoad] | None = None
) -> Step:
    return Step(
        epoch=1,
        step_id=1,
        mode=mode,
        segments=segments,
        admissions=[Admission(slot=slot, sampling=GREEDY) for slot in admissions],
        ended=ended,
        loads=loads or [],
    )


def sharing(slot: int, cached: list[int]) -> Step:
    """Admits a request whose first tokens are in these blocks."""
    admission = Admission(slot=slot, sampling=GREEDY, cached=cached)
    return Step(epoch=1, step_id=1, mode="decode", segments=[], admissions=[admission], ended=[])


def load_of(pool: int, block: int) -> Step:
    return step_of("load", [], [], [], [BlockLoad(pool=pool, block=block, key=bytes(16))])


def shrinking(slot: int, blocks: int, ended: list[int] | None = None) -> Step:
    """Gives back all but the first blocks of a slot."""
    shrunk = [ShrunkSlot(slot=slot, blocks=blocks)]
    return msgspec.structs.replace(step_of("decode", [], [], ended or []), shrunk=shrunk)


class PageTableMachine(RuleBasedStateMachine):
    """Keeps each slot's blocks and tokens beside the tables under test."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = PageTables(OPTIONS)
        self.blocks: dict[int, list[int]] = {}
        self.tokens: dict[int, int] = {}
        self.shared: dict[int, int] = {}

    def in_pool(self, pool: int, but: int | None = None) -> list[int]:
        return [slot for slot in self.blocks if OPTIONS.pool_of(slot) == pool and slot != but]

    def holders(self, pool: int, block: int) -> list[int]:
        return [slot for slot in self.in_pool(pool) if block in self.blocks[slot]]

    def free(self, slot: int) -> list[int]:
        pool = OPTIONS.pool_of(slot)
        held = {block for other in self.blocks if OPTIONS.pool_of(other) == pool for block in self.blocks[other]}
        return [block for block in range(OPTIONS.blocks) if block not in held]

    @rule(slot=SLOTS)
    def admit(self, slot: int) -> None:
        self.tables.apply(step_of("decode", [], [slot], []))
        self.blocks[slot], self.tokens[slot], self.shared[slot] = [], 0, 0

    @rule(slot=SLOTS, data=st.data())
    def share(self, slot: int, data: st.DataObject) -> None:
        """Full blocks of others, and blocks that nobody holds."""
        others = self.in_pool(OPTIONS.pool_of(slot), but=slot)
        written = {block for other in others for block in self.blocks[other][self.tokens[other] // SIZE :]}
        full = [block for block in range(OPTIONS.blocks) if block not in written]
        cached = data.draw(st.lists(st.sampled_from(full), unique=True, max_size=OPTIONS.blocks_per_slot))
        self.tables.apply(sharing(slot, cached))
        self.blocks[slot] = cached.copy()
        self.tokens[slot] = self.shared[slot] = len(cached) * SIZE

    @rule(slot=SLOTS, data=st.data())
    def share_what_is_not_there(self, slot: int, data: st.DataObject) -> None:
        wrong = data.draw(
            st.sampled_from([[0, OPTIONS.blocks], [-1], [3, 3], list(range(OPTIONS.blocks_per_slot + 1))])
        )
        with pytest.raises(StepError, match=r"is not one of|that no request can have"):
            self.tables.apply(sharing(slot, wrong))
        self.blocks.pop(slot, None)
        self.tokens.pop(slot, None)

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

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), drafts=st.integers(0, DRAFTS_MAX))
    def verify(self, data: st.DataObject, drafts: int) -> None:
        """A slot goes on behind what was right of its latest tokens, with drafts that may be wrong again."""
        slot = data.draw(st.sampled_from(sorted(self.tokens)))
        first = max(self.shared[slot], self.tokens[slot] - DRAFTS_MAX)
        start = data.draw(st.integers(first, self.tokens[slot]))
        length = min(1 + drafts, OPTIONS.blocks_per_slot * SIZE - start)
        written = self.blocks[slot][start // SIZE : -(-(start + length) // SIZE)]
        if not length or any(len(self.holders(OPTIONS.pool_of(slot), block)) > 1 for block in written):
            return
        missing = max(-(-(start + length) // SIZE) - len(self.blocks[slot]), 0)
        new = data.draw(st.permutations(self.free(slot)))[:missing]
        segment = Segment(slot=slot, start=start, tokens=[1] * length, new_blocks=new, sample=True)
        self.tables.apply(step_of("decode", [segment], [], []))
        self.blocks[slot] += new
        self.tokens[slot] = start + length

    @precondition(lambda self: any(self.blocks.values()))
    @rule(data=st.data(), ends=st.booleans())
    def shrink(self, data: st.DataObject, ends: bool) -> None:
        """A slot gives back blocks behind those that it began with; it may end with the same step."""
        slot = data.draw(st.sampled_from(sorted(slot for slot, blocks in self.blocks.items() if blocks)))
        kept = data.draw(st.integers(0, OPTIONS.blocks_per_slot))
        step = shrinking(slot, kept, [slot] if ends else [])
        if not self.shared[slot] // SIZE <= kept < len(self.blocks[slot]):
            with pytest.raises(StepError, match=f"of which it cannot keep the first {kept}"):
                self.tables.apply(step)
            return
        self.tables.apply(step)
        del self.blocks[slot][kept:]
        self.tokens[slot] = min(self.tokens[slot], kept * SIZE)
        if ends:
            del self.blocks[slot], self.tokens[slot]

    @precondition(lambda self: any(self.blocks.values()))
    @rule(data=st.data())
    def steal(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(slot for slot, blocks in self.blocks.items() if blocks)))
        thief = data.draw(SLOTS.filter(lambda slot: slot != owner and OPTIONS.pool_of(slot) == OPTIONS.pool_of(owner)))
        stolen = Segment(slot=thief, start=0, tokens=[1], new_blocks=self.blocks[owner][:1], sample=True)
        with pytest.raises(StepError, match="already belongs"):
            self.tables.apply(step_of("prefill", [stolen], [thief], []))
        self.blocks[thief], self.tokens[thief], self.shared[thief] = [], 0, 0

    @precondition(lambda self: self.rewritable())
    @rule(data=st.data(), prefill=st.booleans())
    def go_back(self, data: st.DataObject, prefill: bool) -> None:
        """A slot writes a block that was full again: not while another one reads it."""
        slot, index = data.draw(st.sampled_from(self.rewritable()))
        block = self.blocks[slot][index]
        length = data.draw(st.integers(1, SIZE)) if prefill else 1
        start = index * SIZE + (0 if prefill else data.draw(st.integers(0, SIZE - 1)))
        segment = Segment(slot=slot, start=start, tokens=[1] * length, new_blocks=[], sample=True)
        step = step_of("prefill" if prefill else "decode", [segment], [], [])
        if len(self.holders(OPTIONS.pool_of(slot), block)) > 1:
            with pytest.raises(StepError, match=f"Slot {slot} writes block {block}, which another slot reads"):
                self.tables.apply(step)
        else:
            self.tables.apply(step)
            self.tokens[slot] = start + length

    def rewritable(self) -> list[tuple[int, int]]:
        return [
            (slot, index)
            for slot in sorted(self.tokens)
            for index in range(self.shared[slot] // SIZE, self.tokens[slot] // SIZE)
        ]

    @precondition(lambda self: any(self.shared[slot] for slot in self.tokens))
    @rule(data=st.data())
    def write_what_was_there(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from([slot for slot in sorted(self.tokens) if self.shared[slot]]))
        start = data.draw(st.integers(0, self.shared[slot] - 1))
        segment = Segment(slot=slot, start=start, tokens=[1], new_blocks=[], sample=True)
        with pytest.raises(StepError, match="does not go on from there"):
            self.tables.apply(step_of("decode", [segment], [], []))

    @invariant()
    def only_blocks_without_a_holder_are_loaded(self) -> None:
        for pool in range(OPTIONS.pools):
            for block in range(OPTIONS.blocks):
                if self.holders(pool, block):
                    with pytest.raises(StepError, match=f"Block {block} of pool {pool} is to be loaded, but belongs"):
                        self.tables.apply(load_of(pool, block))
                else:
                    self.tables.apply(load_of(pool, block))

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


@pytest.mark.parametrize(("pool", "block"), [(-1, 0), (OPTIONS.pools, 0), (0, -1), (0, OPTIONS.blocks)])
def test_what_is_no_block_cannot_be_loaded(pool: int, block: int) -> None:
    with pytest.raises(StepError, match="is not one of"):
        PageTables(OPTIONS).apply(load_of(pool, block))


@pytest.mark.parametrize(
    ("start", "length", "filled"),
    [(0, 1, 0), (0, SIZE - 1, 0), (0, SIZE, 1), (SIZE, SIZE + 5, 1), (SIZE, 2 * SIZE, 2), (SIZE, 3 * SIZE, 3)],
)
def test_keys_are_as_many_as_blocks_that_become_full(start: int, length: int, filled: int) -> None:
    def segment_of(keys: int, **changes: Any) -> Segment:
        fields: dict[str, Any] = {"start": start, "tokens": [1] * length, "new_blocks": [1, 2, 3, 4]}
        return Segment(slot=0, sample=True, keys=[bytes(16)] * keys, **{**fields, **changes})

    for keys in range(5):
        tables = PageTables(OPTIONS)
        first = segment_of(0, start=0, tokens=[1] * (start or 1))
        tables.apply(step_of("prefill", [first], [0], []))
        step = step_of("prefill", [segment_of(keys, new_blocks=[])], [], [])
        if keys in {0, filled}:
            tables.apply(step)
            continue
        with pytest.raises(StepError, match=f"fills {filled} blocks, but has keys of {keys}"):
            tables.apply(step)


@pytest.mark.parametrize(("position", "filled"), [(SIZE - 2, 0), (SIZE - 1, 1), (SIZE, 0)])
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_a_decode_step_has_the_key_of_a_block_that_its_own_token_fills(position: int, filled: int, drafts: int) -> None:
    for keys in range(3):
        tables = PageTables(OPTIONS)
        first = Segment(slot=0, start=0, tokens=[1] * position, new_blocks=[1, 2], sample=True)
        tables.apply(step_of("prefill", [first], [0], []))
        tokens = [1] * (1 + drafts)
        last = Segment(slot=0, start=position, tokens=tokens, new_blocks=[], sample=True, keys=[bytes(16)] * keys)
        if keys in {0, filled}:
            tables.apply(step_of("decode", [last], [], []))
            continue
        with pytest.raises(StepError, match=f"fills {filled} blocks, but has keys of {keys}"):
            tables.apply(step_of("decode", [last], [], []))


@pytest.mark.parametrize(
    ("position", "right", "filled"),
    [
        (SIZE - 2, 0, 1),
        (SIZE - 2, 1, 1),
        (SIZE - 2, 3, 1),
        (SIZE - 6, 3, 0),
        (SIZE - 5, 3, 1),
        (SIZE - 1, 3, 0),
        (SIZE, 3, 0),
    ],
)
def test_a_block_that_right_drafts_fill_has_its_key_in_the_step_after_them(
    position: int, right: int, filled: int
) -> None:
    for keys in range(3):
        tables = PageTables(OPTIONS)
        first = Segment(slot=0, start=0, tokens=[1] * position, new_blocks=[1, 2], sample=True)
        tables.apply(step_of("prefill", [first], [0], []))
        drafted = Segment(slot=0, start=position, tokens=[1] * 4, new_blocks=[], sample=True)
        tables.apply(step_of("decode", [drafted], [], []))
        start = position + 1 + right
        after = Segment(slot=0, start=start, tokens=[1] * 4, new_blocks=[], sample=True, keys=[bytes(16)] * keys)
        if keys in {0, filled}:
            tables.apply(step_of("decode", [after], [], []))
            continue
        with pytest.raises(StepError, match=f"fills {filled} blocks, but has keys of {keys}"):
            tables.apply(step_of("decode", [after], [], []))


def test_a_block_that_was_cached_at_the_admission_gets_no_key() -> None:
    tables = PageTables(OPTIONS)
    tables.apply(sharing(0, [4, 2]))
    segment = Segment(slot=0, start=2 * SIZE, tokens=[1], new_blocks=[1], sample=True, keys=[bytes(16)])
    with pytest.raises(StepError, match="fills 0 blocks, but has keys of 1"):
        tables.apply(step_of("decode", [segment], [], []))


def test_a_decode_step_has_no_more_drafts_than_anyone_may_ask_for() -> None:
    for drafts in (DRAFTS_MAX, DRAFTS_MAX + 1):
        tables = PageTables(OPTIONS)
        first = Segment(slot=0, start=0, tokens=[1], new_blocks=[0], sample=True)
        tables.apply(step_of("prefill", [first], [0], []))
        step = step_of(
            "decode", [Segment(slot=0, start=1, tokens=[1] * (1 + drafts), new_blocks=[], sample=True)], [], []
        )
        if drafts == DRAFTS_MAX:
            tables.apply(step)
            continue
        with pytest.raises(StepError, match=rf"decodes {1 + drafts} tokens; a decode step takes one and at most"):
            tables.apply(step)


def test_the_next_step_begins_behind_what_was_right_and_no_further() -> None:
    tables = PageTables(OPTIONS)
    first = Segment(slot=0, start=0, tokens=[1] * 5, new_blocks=[0], sample=True)
    tables.apply(step_of("prefill", [first], [0], []))
    for start in (5, 7, 8, 12):
        step = step_of("decode", [Segment(slot=0, start=start, tokens=[1] * 4, new_blocks=[], sample=True)], [], [])
        tables.apply(step)
    beyond = Segment(slot=0, start=17, tokens=[1], new_blocks=[], sample=True)
    with pytest.raises(StepError, match="has 16 tokens cached; 0 of them for good; a segment at position 17 does not"):
        tables.apply(step_of("decode", [beyond], [], []))


def test_blocks_that_are_given_back_may_be_anothers_in_the_same_step() -> None:
    tables = PageTables(OPTIONS)
    other = OPTIONS.pools
    first = Segment(slot=0, start=0, tokens=[1] * 31, new_blocks=[3], sample=True)
    tables.apply(step_of("prefill", [first], [0], []))
    drafted = Segment(slot=0, start=31, tokens=[1, 2, 3], new_blocks=[5], sample=True)
    tables.apply(step_of("decode", [drafted], [], []))
    taken = Segment(slot=other, start=0, tokens=[1], new_blocks=[5], sample=True)
    shrunk = [ShrunkSlot(slot=0, blocks=1)]
    step = msgspec.structs.replace(step_of("prefill", [taken], [other], []), shrunk=shrunk)
    tables.apply(step)
    assert tables.rows([0, other], 2).tolist() == [[3, OPTIONS.blocks], [5, OPTIONS.blocks]]
    # What it has goes no further than its blocks now.
    beyond = Segment(slot=0, start=33, tokens=[1], new_blocks=[6], sample=True)
    with pytest.raises(StepError, match="has 32 tokens cached"):
        tables.apply(step_of("decode", [beyond], [], []))


@pytest.mark.parametrize("slot", [1, OPTIONS.slots])
def test_a_slot_that_is_not_held_gives_nothing_back(slot: int) -> None:
    with pytest.raises(StepError, match=f"Slot {slot} was not admitted"):
        PageTables(OPTIONS).apply(shrinking(slot, 0))


def test_what_was_refused_holds_no_blocks() -> None:
    tables = PageTables(OPTIONS)
    with pytest.raises(StepError, match="is not one of"):
        tables.apply(sharing(0, [2, OPTIONS.blocks]))
    tables.apply(load_of(0, 2))


@pytest.mark.parametrize("ended", [False, True])
def test_a_block_is_not_written_while_another_slot_reads_it(ended: bool) -> None:
    tables = PageTables(OPTIONS)
    owner, reader = 0, OPTIONS.pools
    first = Segment(slot=owner, start=0, tokens=[1] * 2 * SIZE, new_blocks=[5, 3], sample=True)
    tables.apply(step_of("prefill", [first], [owner], []))
    tables.apply(sharing(reader, [5]))
    if ended:
        tables.apply(step_of("decode", [], [], [reader]))
    elsewhere = Segment(slot=owner, start=SIZE, tokens=[1], new_blocks=[], sample=True)
    tables.apply(step_of("prefill", [elsewhere], [], []))
    again = step_of("prefill", [Segment(slot=owner, start=0, tokens=[1], new_blocks=[], sample=True)], [], [])
    if ended:
        tables.apply(again)
        return
    with pytest.raises(StepError, match=f"Slot {owner} writes block 5, which another slot reads"):
        tables.apply(again)
    tables.apply(step_of("decode", [], [], [owner]))
    with pytest.raises(StepError, match="Block 5 of pool 0 is to be loaded, but belongs to a slot"):
        tables.apply(load_of(0, 5))
    tables.apply(load_of(0, 3))
