"""What a process imports before it is assigned a stage, and what it does then; each test in a process of its own."""

import json
import os
import subprocess
import sys

import msgspec
import pytest

from actors.stage.process import SPINS, Preparation
from actors.stage.setup import StageIdentity, StageSetup
from stages.device import PROFILES, Device
from stages.options import CacheOptions, StageOptions, WeightOptions
from stages.plan import StageSpec
from tests.support.early_runner import NAMES, VARIABLE

SECONDS = 200
SCRIPT = """
import asyncio, json, os, sys
from actors.release import own_release
from actors.stage.actor import StageActor

async def main():
    actor = StageActor(own_release(), "host-1", None)
    await actor.prepare(bytes.fromhex(sys.argv[1]))
    imported = sorted({"torch", "ttnn", "stages.backend", "stages.stage", "stages.timed.stage"} & set(sys.modules))
    early = sys.modules.get("tests.support.early_runner")
    affinity = len(os.sched_getaffinity(0))
    told = {"imported": imported, "seen": early and early.SEEN, "affinity": affinity}
    if len(sys.argv) > 2:
        await actor.assign(bytes.fromhex(sys.argv[2]))
        await actor.load()
        threads = await asyncio.to_thread(sys.modules["torch"].get_num_threads)
        told |= {"threads": threads, "bound": len(os.sched_getaffinity(0)), "pid": (await actor.health()).pid}
        await actor.close()
    print(json.dumps(told | {"nice": os.getpriority(os.PRIO_PROCESS, 0), "own_pid": await actor.pid()}))

asyncio.run(main())
"""


def run(*told: Preparation | StageSetup) -> dict[str, object]:
    """Returns what a spare prints that is prepared with the first of these, and assigned the second."""
    packed = [msgspec.msgpack.encode(each).hex() for each in told]
    own = {name: value for name, value in os.environ.items() if name not in NAMES and name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *packed], env=own, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def preparation(device: Device, runner: str, neighbours: int = 1) -> Preparation:
    return Preparation(device=device, runner=runner, neighbours=neighbours, environment={VARIABLE: "1"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "runner", "imported"),
    [
        ("embedded", PROFILES["embedded"].runner, ["stages.backend", "stages.stage", "torch"]),
        ("timed", PROFILES["timed"].runner, ["stages.timed.stage"]),
        ("ttnn", PROFILES["ttnn"].runner, ["torch"]),
    ],
)
def test_a_spare_imports_what_its_device_needs_and_never_ttnn(device: Device, runner: str, imported: list[str]) -> None:
    told = run(preparation(device, runner))
    assert told["imported"] == imported
    assert told["nice"] == os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.slow
def test_a_spare_gets_its_share_of_the_cores_when_it_becomes_a_stage() -> None:
    cores = len(os.sched_getaffinity(0))
    runner = "tests.support.early_runner:load"
    told = run(preparation("embedded", runner), setup(runner, neighbours=cores))
    assert told["seen"] == {
        VARIABLE: "1",
        "GALAXYLINE_DEVICE": "embedded",
        "OMP_NUM_THREADS": str(cores),
        "GOMP_SPINCOUNT": SPINS,
    }
    assert (told["affinity"], told["bound"], told["threads"]) == (cores, 1, 1)
    assert told["pid"] == told["own_pid"]


def setup(runner: str, neighbours: int) -> StageSetup:
    cache = CacheOptions(slots=1, pools=1, blocks=2, block_size=32, max_model_len=64)
    return StageSetup(
        identity=StageIdentity(
            index=0, stages=1, host="host-1", epoch=1, secret=b"", dtype="float32", bytes_per_token=4
        ),
        spec=StageSpec(index=0, stages=1, first_layer=0, end_layer=1),
        options=StageOptions(
            model_path="",
            cache_dir="",
            dtype="float32",
            weights=WeightOptions(load_format="dummy"),
            seed=0,
            cache=cache,
        ),
        device="embedded",
        runner=runner,
        rows=[0],
        neighbour=0,
        neighbours=neighbours,
        environment={VARIABLE: "1"},
    )
