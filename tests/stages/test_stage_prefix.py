"""Requests that begin with cached blocks have the answers of those that compute them, wherever the blocks were."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.options import TierOptions
from stages.step import BlockLoad
from tests.support.checkpoints import write_checkpoint
from tests.support.stage_driver import Driver, cache_options, key_of, relative_error, stage_options

OVERRIDES = {"num_hidden_layers": 4, "n_routed_experts": 32, "num_attention_heads": 8}
PROMPT = [(7 * at * at + 3 * at) % 512 for at in range(100)]
BLOCK = 32
FULL = len(PROMPT) // BLOCK
KEYS = [key_of(number) for number in range(FULL)]
STEPS = 3
TOLERANCE = 1e-5
TIER_BYTES = 1 << 24

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("prefix") / "model", overrides=OVERRIDES)


@pytest.fixture(scope="module")
def weight_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The stages of a pipeline, and the mesh of each."""

    mesh: tuple[int, int]
    stages: int
    is_traced: bool = False

    @property
    def pools(self) -> int:
        return self.mesh[0] * self.mesh[1]

    def __str__(self) -> str:
        traced = "-traced" if self.is_traced else ""
        return f"{self.mesh[0]}x{self.mesh[1]}-{self.stages}-stages{traced}"


Load = Callable[[Shape], Driver]


@pytest.fixture
def load(model: Path, weight_cache: Path, tmp_path: Path) -> Iterator[Load]:
    """Loads pipelines, whose host tiers are in the same directory."""
    drivers = []
    tiers = TierOptions(host_directory=str(tmp_path), host_bytes=TIER_BYTES)

    def loaded(shape: Shape) -> Driver:
        cache = cache_options(slots=4 * shape.pools, pools=shape.pools)
        options = stage_options(model, weight_cache, cache=cache, tiers=tiers, enable_trace=shape.is_traced)
        drivers.append(Driver.load(options, shape.stages, shape.mesh))
        return drivers[-1]

    yield loaded
    for driver in drivers:
        driver.close()


def answer(driver: Driver, slot: int, cached: list[int] | None = None, **changes: Any) -> torch.Tensor:
    """Logits after the prompt, and after each of some tokens that were the best ones."""
    cached = cached or []
    driver.admit(slot, cached=cached)
    start = BLOCK * len(cached)
    segment = driver.segment(slot, start, PROMPT[start:], keys=KEYS[len(cached) :], **changes)
    logits = [driver.run("prefill", [segment])]
    for step in range(STEPS):
        logits.append(driver.decode({slot: (len(PROMPT) + step, int(logits[-1].argmax()))}))
    return torch.cat(logits)


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()
    assert relative_error(found, expected) < TOLERANCE


def overwrite(driver: Driver, pool: int) -> None:
    """Lets other requests fill all blocks of a pool that are free."""
    slot = pool + 3 * driver.cache.pools
    while free := driver.free(pool):
        count = min(len(free), driver.cache.blocks_per_slot)
        driver.admit(slot)
        driver.run("prefill", [driver.segment(slot, 0, [9] * BLOCK * count)])
        slot -= driver.cache.pools


def loads(pool: int, blocks: list[int]) -> list[BlockLoad]:
    return [BlockLoad(pool=pool, block=block, key=key) for block, key in zip(blocks, KEYS, strict=False)]


QUICK = [Shape((1, 1), 4), Shape((1, 1), 1, is_traced=True)]
SLOW = [
    Shape((1, 1), 1),
    *(Shape(mesh, stages) for mesh in ((1, 8), (2, 8)) for stages in (1, 4)),
    *(Shape(mesh, 4, is_traced=True) for mesh in ((1, 1), (1, 8), (2, 8))),
]

on_shapes = pytest.mark.parametrize(
    "shape", [*QUICK, *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW)], ids=str
)


@on_shapes
def test_a_prompt_that_begins_with_cached_blocks_has_the_answer_of_the_whole(shape: Shape, load: Load) -> None:
    driver = load(shape)
    pool = shape.pools - 1
    first, second = pool, pool + shape.pools
    expected = answer(driver, first)
    blocks = driver.blocks(first)
    for count in range(1, FULL + 1):
        # The first one holds the blocks too, but for the last time.
        check(answer(driver, second, blocks[:count]), expected)
        driver.end(second)
        if count == FULL - 1:
            driver.end(first)
    assert driver.load_blocks(loads(pool, blocks)) == []
    check(answer(driver, second, blocks[:FULL]), expected)


@on_shapes
def test_blocks_that_were_overwritten_come_back_from_the_host(shape: Shape, load: Load) -> None:
    driver = load(shape)
    pool = shape.pools - 1
    expected = answer(driver, pool)
    places = driver.blocks(pool)[:FULL]
    driver.end(pool)
    overwrite(driver, pool)
    for slot in range(pool + shape.pools, 4 * shape.pools, shape.pools):
        driver.end(slot)
    # In another order, so that no block comes to where it was, and to another pool too.
    places = places[1:] + places[:1]
    assert driver.load_blocks(loads(pool, places)) == []
    check(answer(driver, pool, places), expected)
    driver.end(pool)
    elsewhere = driver.free(0)[:2]
    assert driver.load_blocks(loads(0, elsewhere)) == []
    check(answer(driver, 0, elsewhere), expected)


@on_shapes
def test_blocks_outlive_the_stages(shape: Shape, load: Load) -> None:
    driver = load(shape)
    expected = answer(driver, 0)
    inventories = [stage.inventory(0) for stage in driver.stages]
    driver.close()
    others = load(shape)
    assert [sorted(stage.inventory(0).added) for stage in others.stages] == [sorted(KEYS)] * shape.stages
    assert [stage.inventory(0).model for stage in others.stages] == [each.model for each in inventories]
    assert len({each.model for each in inventories}) == shape.stages
    places = others.free(0)[:FULL]
    assert others.load_blocks([*loads(0, places), BlockLoad(pool=0, block=others.free(0)[-1], key=key_of(99))]) == [
        FULL
    ]
    check(answer(others, 0, places), expected)
