"""What a stage knows of its blocks: by keys, through steps, epochs and loads."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.backend import ttnn
from stages.kv import block_store
from stages.kv.block_memory import BlockBytes, BlockMemory
from stages.kv.block_store import BlockStore
from stages.kv.page_tables import PageTables
from stages.kv.record_file import Record
from stages.kv.tiers import Tiers
from stages.options import CacheOptions
from stages.step import Admission, BlockLoad, Segment, ShrunkSlot, Step
from tests.support.embedded_meshes import on_mesh_shapes
from tests.support.kv_blocks import contents, floats_held_in, options_for, random_caches, tiers_in
from tests.support.stage_driver import GREEDY, key_of

LAYERS = 2

on_meshes = on_mesh_shapes([(1, 1), (1, 8), (2, 8)])
on_chip = on_mesh_shapes([(1, 1)])


class CountingTiers(Tiers):
    """Tiers that count what is read from them, and what comes to them."""

    fetched = kept = 0

    def fetch(self, key: bytes) -> bytes | None:
        self.fetched += 1
        return super().fetch(key)

    def keep(self, key: bytes, record: Record) -> None:
        self.kept += 1
        super().keep(key, record)


class Store:
    """A store on caches with random values, and the steps that it is told of, as a stage would."""

    def __init__(self, mesh: ttnn.MeshDevice, folder: Path | None, records: int = 64) -> None:
        self.options: CacheOptions = options_for(mesh)
        self.caches = random_caches(mesh, LAYERS)
        self.memory = BlockMemory(self.caches, mesh, self.options, torch.float32)
        options = tiers_in(folder, self.memory.record_bytes, records) if folder else None
        self.tiers = CountingTiers.open(options, "test", self.memory.record_bytes) if options else Tiers(None, None)
        self.tables = PageTables(self.options)
        self.blocks = BlockStore(self.memory, self.tables, self.tiers)
        self._step_id = 0

    def step(self, segments: Sequence[Segment] = (), admitted: Sequence[Admission] = (), **changes: Any) -> list[int]:
        """Takes a step to its end; returns what could not be loaded."""
        step = self.begin(segments, admitted, **changes)
        missed = self.blocks.load(step.loads)
        self.blocks.end(step)
        return missed

    def begin(self, segments: Sequence[Segment] = (), admitted: Sequence[Admission] = (), **changes: Any) -> Step:
        """Begins with a step."""
        self._step_id += 1
        fields: dict[str, Any] = {"mode": "prefill", "ended": [], **changes}
        step = Step(epoch=1, step_id=self._step_id, segments=list(segments), admissions=list(admitted), **fields)
        self.tables.apply(step)
        self.blocks.begin(step)
        return step

    def fill(self, slot: int, blocks: Sequence[int], keys: Sequence[bytes]) -> None:
        """Admits a slot, whose prompt fills blocks."""
        self.step([prompt(slot, blocks, keys, self.options)], [Admission(slot=slot, sampling=GREEDY)])

    def load(self, *loads: tuple[int, int, bytes]) -> list[int]:
        """Loads (pool, block, key)."""
        return self.step(mode="load", loads=[BlockLoad(pool=pool, block=block, key=key) for pool, block, key in loads])

    def overwrite(self, pool: int, block: int) -> None:
        """Changes the values of a block behind the store's back."""
        record = torch.randn(self.memory.record_bytes // 4).numpy().tobytes()
        self.memory.write([BlockBytes(pool, block, record)])


def prompt(slot: int, blocks: Sequence[int], keys: Sequence[bytes], options: CacheOptions) -> Segment:
    tokens = [1] * (options.block_size * len(keys) or 1)
    return Segment(slot=slot, start=0, tokens=tokens, new_blocks=list(blocks), sample=True, keys=list(keys))


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    torch.manual_seed(0)
    with floats_held_in(torch.float32):
        yield


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def store_on(mesh: ttnn.MeshDevice, folder: Path | None, opened: ExitStack, records: int = 64) -> Store:
    store = Store(mesh, folder, records)
    opened.callback(store.tiers.close)
    return store


def reads(store: Store) -> int:
    assert isinstance(store.tiers, CountingTiers)
    return store.tiers.fetched


@pytest.mark.parametrize("at_once", [2, 3, 64])
@on_meshes
def test_blocks_that_were_overwritten_come_back_in_any_place(
    mesh: ttnn.MeshDevice, at_once: int, tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_store, "RECORDS_AT_ONCE", at_once)
    store = store_on(mesh, tmp_path / "host", opened)
    last = store.options.pools - 1
    store.fill(0, [4, 1], [key_of(1), key_of(2)])
    store.fill(last + store.options.pools, [6, 0], [key_of(3), key_of(4)])
    before = contents(store.caches)
    for number in range(store.options.blocks):
        for pool in (0, last):
            store.overwrite(pool, number)
    store.step(ended=[0, last + store.options.pools])
    # To other places: where they were they are held to be still, as no step has overwritten them.
    loads = [(0, 2, key_of(1)), (last, 3, key_of(2)), (last, 7, key_of(3)), (0, 5, key_of(4)), (0, 6, key_of(9))]
    assert store.load(*loads) == [4]
    after = contents(store.caches)
    came_from = [(0, 4), (0, 1), (last, 6), (last, 0)]
    for (pool, block, _), (from_pool, from_block) in zip(loads, came_from, strict=False):
        assert torch.equal(after[:, pool, block], before[:, from_pool, from_block])


@on_chip
def test_a_load_of_what_the_device_holds_reads_no_tier(
    mesh: ttnn.MeshDevice, tmp_path: Path, opened: ExitStack
) -> None:
    store = store_on(mesh, tmp_path / "host", opened)
    store.fill(0, [4, 1], [key_of(1), key_of(2)])
    store.step(ended=[0])
    before = contents(store.caches)
    # In another epoch too, where tables are empty.
    for _ in range(2):
        assert store.load((0, 4, key_of(1)), (0, 1, key_of(2))) == []
        store.tables.clear()
    assert reads(store) == 0
    assert torch.equal(contents(store.caches), before)
    assert store.load((0, 4, key_of(2))) == []
    assert reads(store) == 1


@on_chip
def test_a_load_that_failed_is_repeated(
    mesh: ttnn.MeshDevice, tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that raises keeps its process the first time."""
    store = store_on(mesh, tmp_path / "host", opened)
    store.fill(0, [4], [key_of(1)])
    expected = bytes(store.memory.read(0, [4])[0])
    with monkeypatch.context() as failing:
        failing.setattr(store.memory, "write", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.load((0, 2, key_of(1)))
    store.tables.clear()
    assert bytes(store.memory.read(0, [2])[0]) != expected
    assert store.load((0, 2, key_of(1))) == []
    assert bytes(store.memory.read(0, [2])[0]) == expected


@on_chip
def test_without_tiers_only_the_device_has_blocks(mesh: ttnn.MeshDevice, opened: ExitStack) -> None:
    store = store_on(mesh, None, opened)
    store.fill(0, [4, 1], [key_of(1), key_of(2)])
    store.step(ended=[0])
    assert store.load((0, 4, key_of(1)), (0, 1, key_of(1)), (0, 4, key_of(2))) == [1, 2]
    # What was to be loaded in their place is not known now.
    assert store.load((0, 4, key_of(1)), (0, 1, key_of(2))) == [0, 1]


@pytest.mark.parametrize("keys", [[], [key_of(7), key_of(8)]], ids=["of nobody", "by other keys"])
@on_chip
def test_a_block_that_is_taken_anew_is_not_found_by_its_old_key(
    mesh: ttnn.MeshDevice, keys: list[bytes], opened: ExitStack
) -> None:
    store = store_on(mesh, None, opened)
    store.fill(0, [4, 1], [key_of(1), key_of(2)])
    store.step(ended=[0])
    store.fill(1, [1, 4], keys)
    store.step(ended=[1])
    assert store.load((0, 4, key_of(1)), (0, 1, key_of(2))) == [0, 1]


@on_chip
def test_a_block_that_its_slot_writes_again_is_not_found_by_its_old_key(
    mesh: ttnn.MeshDevice, opened: ExitStack
) -> None:
    store = store_on(mesh, None, opened)
    store.fill(0, [4, 1], [key_of(1), key_of(2)])
    store.step([Segment(slot=0, start=40, tokens=[5], new_blocks=[], sample=True)], mode="decode")
    store.step(ended=[0])
    assert store.load((0, 4, key_of(1)), (0, 1, key_of(2))) == [1]


@on_chip
def test_a_block_that_a_decode_step_fills_is_kept(mesh: ttnn.MeshDevice, tmp_path: Path, opened: ExitStack) -> None:
    store = store_on(mesh, tmp_path / "host", opened)
    tokens = [1] * (store.options.block_size - 1)
    segment = Segment(slot=1, start=0, tokens=tokens, new_blocks=[3, 5], sample=True)
    store.step([segment], [Admission(slot=1, sampling=GREEDY)])
    assert store.tiers.inventory(0, "").added == []
    filled = Segment(slot=1, start=len(tokens), tokens=[1], new_blocks=[], sample=True, keys=[key_of(1)])
    store.step([filled], mode="decode")
    assert store.tiers.inventory(0, "").added == [key_of(1)]
    assert store.tiers.fetch(key_of(1)) == bytes(store.memory.read(0, [3])[0])


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
@on_chip
def test_a_block_that_drafts_fill_is_kept_with_the_step_after_them(
    mesh: ttnn.MeshDevice, accepted: int, tmp_path: Path, opened: ExitStack
) -> None:
    """A block that the step's own token fills has its key at once: that is not a draft."""
    store = store_on(mesh, tmp_path / "host", opened)
    size = store.options.block_size
    tokens = [1] * (size - 2)
    store.step(
        [Segment(slot=1, start=0, tokens=tokens, new_blocks=[3, 5], sample=True)],
        [Admission(slot=1, sampling=GREEDY)],
    )
    drafted = Segment(slot=1, start=size - 2, tokens=[1, 7, 8, 9], new_blocks=[], sample=True)
    store.step([drafted], mode="decode")
    assert store.tiers.inventory(0, "").added == []
    start = size - 1 + accepted
    after = Segment(slot=1, start=start, tokens=[1, 7], new_blocks=[], sample=True, keys=[key_of(1)])
    store.step([after], mode="decode")
    assert store.tiers.inventory(0, "").added == [key_of(1)]
    assert store.tiers.fetch(key_of(1)) == bytes(store.memory.read(0, [3])[0])
    store.step(ended=[1])
    assert store.load((0, 3, key_of(1))) == []
    assert reads(store) == 1


@on_chip
def test_a_block_of_drafts_that_was_given_back_is_found_by_no_key(mesh: ttnn.MeshDevice, opened: ExitStack) -> None:
    store = store_on(mesh, None, opened)
    size = store.options.block_size
    store.fill(1, [5], [key_of(1)])
    store.step(ended=[1])
    # The block was another's before drafts were written to it.
    store.fill(0, [4], [key_of(2)])
    store.step([Segment(slot=0, start=size, tokens=[1, 2], new_blocks=[5], sample=True)], mode="decode")
    store.step(mode="decode", shrunk=[ShrunkSlot(slot=0, blocks=1)])
    assert store.load((0, 5, key_of(1))) == [0]


@on_chip
def test_a_prompt_in_parts_has_keys_for_each_part(mesh: ttnn.MeshDevice, tmp_path: Path, opened: ExitStack) -> None:
    store = store_on(mesh, tmp_path / "host", opened)
    store.fill(0, [4, 1, 6], [key_of(1)])
    size = store.options.block_size
    rest = Segment(slot=0, start=size, tokens=[1] * 2 * size, new_blocks=[], sample=True, keys=[key_of(2), key_of(3)])
    store.step([rest])
    for number, block in ((1, 4), (2, 1), (3, 6)):
        assert store.tiers.fetch(key_of(number)) == bytes(store.memory.read(0, [block])[0])


@on_chip
def test_forgotten_keys_are_gone(mesh: ttnn.MeshDevice, tmp_path: Path, opened: ExitStack) -> None:
    store = store_on(mesh, tmp_path / "host", opened)
    store.fill(0, [4, 1], [key_of(1), key_of(2)])
    store.step(ended=[0], forgotten=[key_of(1), key_of(5)])
    assert key_of(1) not in store.tiers
    assert store.load((0, 4, key_of(1)), (0, 1, key_of(2))) == [0]


@on_chip
def test_a_step_that_forgets_keys_may_fill_blocks_by_them_anew(
    mesh: ttnn.MeshDevice, tmp_path: Path, opened: ExitStack
) -> None:
    store = store_on(mesh, tmp_path / "host", opened)
    store.fill(0, [4], [key_of(1)])
    again = prompt(1, [2], [key_of(1)], store.options)
    store.step([again], [Admission(slot=1, sampling=GREEDY)], ended=[0], forgotten=[key_of(1)])
    assert store.tiers.fetch(key_of(1)) == bytes(store.memory.read(0, [2])[0])
    store.step(ended=[1])
    assert store.load((0, 2, key_of(1))) == []


@on_chip
def test_what_a_tier_has_is_not_read_from_the_device_again(
    mesh: ttnn.MeshDevice, tmp_path: Path, opened: ExitStack
) -> None:
    store = store_on(mesh, tmp_path / "host", opened, records=2)
    for turn, keys in enumerate(([key_of(1), key_of(2)], [key_of(1), key_of(2)], [key_of(3), key_of(1)])):
        store.fill(0, [4, 1], keys)
        assert isinstance(store.tiers, CountingTiers)
        assert store.tiers.kept == 2 + (turn == 2)


@on_chip
def test_what_is_kept_later_is_what_the_step_left(mesh: ttnn.MeshDevice, tmp_path: Path, opened: ExitStack) -> None:
    store = store_on(mesh, tmp_path / "host", opened)
    step = store.begin([prompt(0, [4], [key_of(1)], store.options)], [Admission(slot=0, sampling=GREEDY)])
    filled = store.blocks.filled(step)
    [expected] = store.memory.read(0, [4])
    store.overwrite(0, 4)
    assert key_of(1) not in store.tiers
    store.blocks.keep(filled)
    assert store.tiers.fetch(key_of(1)) == bytes(expected)


@on_chip
def test_what_is_forgotten_before_it_is_kept_is_not_kept(
    mesh: ttnn.MeshDevice, tmp_path: Path, opened: ExitStack
) -> None:
    store = store_on(mesh, tmp_path / "host", opened)
    keys = [key_of(1), key_of(2)]
    filled = store.blocks.filled(
        store.begin([prompt(0, [4, 1], keys, store.options)], [Admission(slot=0, sampling=GREEDY)])
    )
    store.step(ended=[0], forgotten=[key_of(1)])
    store.blocks.keep(filled)
    assert [key in store.tiers for key in keys] == [False, True]


@on_chip
def test_a_new_epoch_gives_up_what_waits_to_be_kept(mesh: ttnn.MeshDevice, tmp_path: Path, opened: ExitStack) -> None:
    store = store_on(mesh, tmp_path / "host", opened)
    step = store.begin([prompt(0, [4], [key_of(1)], store.options)], [Admission(slot=0, sampling=GREEDY)])
    filled = store.blocks.filled(step)
    store.blocks.enter_epoch()
    store.blocks.keep(filled)
    assert key_of(1) not in store.tiers
