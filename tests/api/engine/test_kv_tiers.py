"""What the engine believes of tiers: what all stages have, under a secret that is as old as the directory."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from api.engine.kv_tiers import KEY_FILE, KVTiers, OnAllStages
from api.errors import OptionError
from api.messages.engine import AddRequest
from api.scheduler.kv_cache import KVCache
from api.scheduler.sequence import Sequence as Tokens
from stages.kv.inventory import Inventory
from stages.options import TierOptions
from tests.support.scheduling import request, scheduler_options

ASKED: AddRequest = request(0, 100, 1)


class Answers:
    """A pipeline whose stages have such inventories; None for one that does not answer."""

    def __init__(self, *inventories: Inventory | None) -> None:
        self.inventories_now = list(inventories)
        self.asked: list[list[int]] = []

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        self.asked.append(list(versions))
        return self.inventories_now


def whole(*keys: bytes, model: str = "weights", version: int = 1) -> Inventory:
    return Inventory(version=version, is_whole=True, added=list(keys), removed=[], model=model)


def first_key(cache: KVCache) -> bytes:
    return cache.keys(Tokens.of(ASKED, 0), 32)[0]


def tiers_of(directory: Path | None = None) -> tuple[KVTiers, KVCache]:
    cache = KVCache(scheduler_options())
    options = TierOptions(host_bytes=1, disk_directory=str(directory or ""), disk_bytes=1)
    tiers = KVTiers(options, 2, cache)
    tiers.open()
    return tiers, cache


def test_a_key_is_there_where_all_stages_have_it() -> None:
    draw = random.Random(1)
    stages = [{bytes([draw.randrange(9)]) for _ in range(6)} for _ in range(3)]
    common = OnAllStages(stages)
    assert {key for key in map(bytes, ([n] for n in range(9))) if key in common} == set.intersection(*stages)
    assert b"" not in OnAllStages([])


async def test_changes_are_asked_for_and_a_stage_that_does_not_answer_stays_as_it_was(tmp_path: Path) -> None:
    tiers, cache = tiers_of()
    key = first_key(cache)
    pipeline = Answers(whole(key, version=5), whole(key, version=8))
    await tiers.refresh(pipeline)
    pipeline.inventories_now = [
        None,
        Inventory(version=9, is_whole=False, added=[b"x"], removed=[key], model="weights"),
    ]
    await tiers.refresh(pipeline)
    await tiers.refresh(pipeline)
    assert pipeline.asked == [[0, 0], [5, 8], [5, 9]]


async def test_keys_follow_from_the_weights_of_all_stages_and_are_void_after_a_reset() -> None:
    tiers, cache = tiers_of()
    keys = []
    for models in (("a", "b"), ("a", "b"), ("a", "c")):
        await tiers.refresh(Answers(*(whole(model=model) for model in models)))
        keys.append(first_key(cache))
    tiers.reset()
    assert keys[0] == keys[1]
    assert len({*keys, first_key(cache)}) == 3


async def test_the_secret_lies_in_the_directory_that_nobody_else_may_read(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "kv"
    keys = []
    for _ in range(2):
        tiers, cache = tiers_of(directory)
        await tiers.refresh(Answers(whole(), whole()))
        keys.append(first_key(cache))
    assert keys[0] == keys[1]
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / KEY_FILE).stat().st_mode & 0o777 == 0o600
    tiers.reset()
    (directory / KEY_FILE).write_bytes(b"cut short")
    _, other = tiers_of(directory)
    assert first_key(other) != keys[0]


def test_a_directory_that_cannot_be_used_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"--kv-dir .*file/kv cannot be used: Not a directory\."):
        tiers_of(tmp_path / "file" / "kv")
