"""Captured decode steps against the same steps run as they are, and the device's traces by themselves."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from stages import traces
from stages.backend import ttnn
from stages.backend.embedded.trace import atomic
from stages.errors import DeviceError
from tests.support.checkpoints import write_checkpoint
from tests.support.embedded_meshes import on_chip, on_meshes, put
from tests.support.stage_driver import Driver, cache_options, relative_error, stage_options

OVERRIDES = {"n_routed_experts": 32, "num_attention_heads": 8}
STEPS = 6
START = 29
"""A first position from which STEPS positions pass the end of a block of 32."""

Load = Callable[..., Driver]

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    drivers: list[Driver] = []

    def make(model: Path, *, enable_trace: bool, stages: int, mesh_shape: tuple[int, int], slots: int) -> Driver:
        pools = mesh_shape[0] * mesh_shape[1]
        cache = cache_options(slots=slots * pools, pools=pools, max_model_len=128)
        options = stage_options(model, tmp_path / "cache", cache=cache, enable_trace=enable_trace)
        drivers.append(Driver.load(options, stages, mesh_shape))
        return drivers[-1]

    yield make
    for driver in drivers:
        for stage in driver.stages:
            stage.close()


def decoded(driver: Driver, slots: list[int]) -> list[torch.Tensor]:
    """Returns logits of steps of all slots, then of fewer, then of all again."""
    for slot in slots:
        driver.admit(slot)
    logits = [driver.prefill({slot: [slot + at for at in range(START)] for slot in slots})]
    for step in range(STEPS):
        users = slots[1:] if step in {2, 3} else slots
        at = {slot: START + step - (2 * (slot == slots[0] and step > 3)) for slot in users}
        logits.append(driver.decode({slot: (position, 7 * slot + step) for slot, position in at.items()}))
    return logits


@pytest.mark.parametrize(("mesh_shape", "stages"), [((1, 1), 1), ((1, 1), 2), ((1, 8), 1), ((2, 4), 2)])
def test_captured_steps_give_the_same_logits(
    mesh_shape: tuple[int, int], stages: int, tmp_path: Path, load: Load
) -> None:
    model = write_checkpoint(tmp_path / "model", overrides=OVERRIDES)
    slots = [0, 1, 3] if mesh_shape == (1, 1) else [0, 1, 3, 8]
    plain, traced = (
        decoded(load(model, enable_trace=enable, stages=stages, mesh_shape=mesh_shape, slots=4), slots)
        for enable in (False, True)
    )
    assert len(plain) == 1 + STEPS
    for expected, found in zip(plain, traced, strict=True):
        # On a mesh the head also takes the tokens that only fill a lane, and rounds otherwise for other rows.
        assert torch.equal(expected, found) if mesh_shape == (1, 1) else relative_error(found, expected) < 1e-6


def test_results_stay_while_the_next_step_runs(tmp_path: Path, load: Load) -> None:
    """Hidden states are still being sent to the next stage while this one goes on."""
    model = write_checkpoint(tmp_path / "model", overrides=OVERRIDES)
    driver = load(model, enable_trace=True, stages=2, mesh_shape=(1, 1), slots=4)
    first = driver.stages[0]
    driver.admit(0)
    driver.prefill({0: [1, 2, 3]})
    sent = first.step(driver.step("decode", [driver.segment(0, 3, [4])]), memoryview(b""))
    assert isinstance(sent, memoryview)
    before = bytes(sent)
    other = first.step(driver.step("decode", [driver.segment(0, 4, [5])]), memoryview(b""))
    assert isinstance(other, memoryview)
    assert bytes(sent) == before != bytes(other)


def test_the_embedded_device_captures_steps_that_recur(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "EAGER_STEPS", 2)
    begun: list[int] = []
    begin = ttnn.begin_trace_capture

    def noted(mesh: ttnn.MeshDevice, cq_id: int = 0) -> int:
        begun.append(users)
        return begin(mesh, cq_id)

    monkeypatch.setattr(ttnn, "begin_trace_capture", noted)
    model = write_checkpoint(tmp_path / "model", overrides=OVERRIDES)
    driver = load(model, enable_trace=False, stages=1, mesh_shape=(1, 1), slots=4)
    for slot in range(3):
        driver.admit(slot)
    driver.prefill({slot: [1, 2, 3] for slot in range(3)})
    lengths = [3, 3, 3]
    for users in [3, 2, 3, 2, 1, 3, 2, 3]:
        driver.decode({slot: (lengths[slot], 7) for slot in range(users)})
        lengths = [length + (slot < users) for slot, length in enumerate(lengths)]
    assert begun == [3, 2]


def captured(
    mesh: ttnn.MeshDevice, compute: Callable[[ttnn.Tensor], ttnn.Tensor], x: ttnn.Tensor
) -> tuple[int, ttnn.Tensor]:
    """Returns a trace of `compute`, and its result."""
    trace = ttnn.begin_trace_capture(mesh, cq_id=0)
    try:
        result = compute(x)
    finally:
        ttnn.end_trace_capture(mesh, trace, cq_id=0)
    return trace, result


@on_meshes
def test_a_replay_computes_from_what_its_inputs_hold(mesh: ttnn.MeshDevice) -> None:
    weight = put(mesh, torch.randn(32, 64))

    def compute(x: ttnn.Tensor) -> ttnn.Tensor:
        parts = ttnn.split(ttnn.linear(x, weight), 32, dim=-1)
        best, _ = ttnn.topk(ttnn.mul(parts[0], parts[1]), 32, dim=-1)
        return ttnn.concat([best, ttnn.silu(parts[1])], dim=-1)

    x = put(mesh, torch.randn(1, 1, 32, 32))
    trace, result = captured(mesh, compute, x)
    for seed in range(3):
        other = put(mesh, torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(seed)))
        ttnn.copy(other, x)
        ttnn.execute_trace(mesh, trace, cq_id=0, blocking=True)
        for found, expected in zip(result.shards, compute(other).shards, strict=True):
            assert torch.equal(found, expected)
    ttnn.release_trace(mesh, trace)
    with pytest.raises(DeviceError, match=r"Trace \d+ does not exist"):
        ttnn.execute_trace(mesh, trace)


@on_chip
def test_what_reads_values_is_repeated_as_a_whole_or_refused(mesh: ttnn.MeshDevice) -> None:
    def largest(values: torch.Tensor) -> torch.Tensor:
        return values[..., : int(values.max())]

    def compute(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[ttnn.Tensor], ttnn.Tensor]:
        return lambda x: ttnn.Tensor([function(x.shards[0]).sum(-1, keepdim=True)], x.dtype, x.layout, x.mesh)

    x = put(mesh, torch.full((1, 1, 32, 32), 3.0))
    with pytest.raises(DeviceError, match="A trace cannot depend on values, which __int__ reads"):
        captured(mesh, compute(largest), x)
    trace, result = captured(mesh, compute(atomic(largest)), x)
    assert set(result.shards[0].flatten().tolist()) == {9.0}
    ttnn.copy(put(mesh, torch.full((1, 1, 32, 32), 5.0)), x)
    ttnn.execute_trace(mesh, trace)
    assert set(result.shards[0].flatten().tolist()) == {25.0}


@on_chip
def test_captures_neither_nest_nor_end_twice(mesh: ttnn.MeshDevice) -> None:
    trace = ttnn.begin_trace_capture(mesh)
    with pytest.raises(DeviceError, match="being captured already"):
        ttnn.begin_trace_capture(mesh)
    ttnn.end_trace_capture(mesh, trace)
    with pytest.raises(DeviceError, match="No trace is being captured"):
        ttnn.end_trace_capture(mesh, trace)


@on_chip
def test_what_another_thread_computes_is_not_captured(mesh: ttnn.MeshDevice) -> None:
    x = put(mesh, torch.ones(1, 1, 32, 32))
    computed: list[int] = []

    @atomic
    def doubled(tensor: torch.Tensor) -> torch.Tensor:
        computed.append(threading.get_ident())
        return tensor * 2

    def compute(own: ttnn.Tensor) -> ttnn.Tensor:
        with ThreadPoolExecutor(1) as other:
            assert torch.equal(other.submit(lambda: doubled(x.shards[0])).result(), torch.full((1, 1, 32, 32), 2.0))
        return ttnn.add(own, own)

    trace, result = captured(mesh, compute, x)
    ttnn.copy(put(mesh, torch.full((1, 1, 32, 32), 4.0)), x)
    ttnn.execute_trace(mesh, trace)
    assert torch.equal(result.shards[0], torch.full((1, 1, 32, 32), 8.0))
    assert len(computed) == 1


@on_chip
def test_copies_are_of_one_kind(mesh: ttnn.MeshDevice) -> None:
    with pytest.raises(DeviceError, match="two tensors of one kind"):
        ttnn.copy(put(mesh, torch.zeros(1, 1, 32, 32)), put(mesh, torch.zeros(1, 1, 32, 64)))
