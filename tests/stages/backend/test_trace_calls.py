"""The order of ttnn's calls for captured decode steps, as mock devices cannot run traces."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stages.backend import composite, ttnn
from stages.options import TRACE_REGION_BYTES, DraftOptions
from tests.support.checkpoints import write_checkpoint
from tests.support.stage_driver import Driver, cache_options, stage_options

RECORDED = (
    *("open_mesh_device", "begin_trace_capture", "end_trace_capture", "execute_trace", "release_trace"),
    *("close_mesh_device", "from_torch", "to_torch", "load_tensor", "zeros", "full", "linear", "copy", "clone"),
)
TRACE_CALLS = ("begin_trace_capture", "end_trace_capture", "execute_trace", "release_trace")


class Recorder:
    """Records the names of ttnn's calls, in order, and their keyword arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name in RECORDED:
            monkeypatch.setattr(ttnn, name, self._recording(name, getattr(ttnn, name)))

    @property
    def names(self) -> list[str]:
        """The calls since the last `forget`."""
        return [name for name, _ in self.calls]

    def forget(self) -> None:
        """Clears the record."""
        self.calls.clear()

    def _recording(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, options))
            return function(*args, **options)

        return call


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.fixture
def driver(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    # Chips would do this.
    monkeypatch.setattr(composite, "moe_gate", composite.chip_moe_gate)
    monkeypatch.setattr(composite, "routed_experts", composite.chip_routed_experts)
    model = write_checkpoint(tmp_path / "model", overrides={"num_nextn_predict_layers": 1})
    cache = cache_options(slots=16, pools=8, max_model_len=128)
    options = stage_options(
        model,
        tmp_path / "cache",
        cache=cache,
        enable_trace=True,
        load_format="dummy",
        drafts=DraftOptions(num_speculative_tokens=2),
    )
    loaded = Driver.load(options, mesh_shape=(1, 8))
    assert recorder.calls[0] == ("open_mesh_device", {"trace_region_size": TRACE_REGION_BYTES})
    for slot in (0, 9):
        loaded.admit(slot)
    loaded.prefill({0: [1, 2, 3], 9: [4, 5]})
    return loaded


def test_a_step_is_compiled_then_captured_then_replayed(driver: Driver, recorder: Recorder) -> None:
    recorder.forget()
    driver.decode({0: (3, 1), 9: (2, 1)})
    names = recorder.names
    begin, end, execute = (names.index(name) for name in TRACE_CALLS[:3])
    assert begin < end < execute
    assert names.count("execute_trace") == 1
    # The step is compiled first, as a capture must not load programs. Then all ops are captured again, without any
    # write from the host, which a trace cannot repeat.
    assert names[:begin].count("linear") == names[begin:end].count("linear") > 0
    assert set(names[begin + 1 : end]) == {"linear"}
    assert all(options["cq_id"] == 0 for name, options in recorder.calls if name in TRACE_CALLS)


def test_later_steps_only_replay(driver: Driver, recorder: Recorder) -> None:
    driver.decode({0: (3, 1), 9: (2, 1)})
    recorder.forget()
    # Another request decodes alone at another position, with the same shapes.
    driver.decode({0: (4, 1)})
    names = recorder.names
    assert "linear" not in names
    assert [name for name in names if name in TRACE_CALLS] == ["execute_trace"]
    at = names.index("execute_trace")
    # Ids or hidden states, cosines, sines, positions and page tables, a chip's and its row's, are copied to where the
    # trace reads them.
    assert names[:at].count("copy") == 7
    assert "copy" not in names[at:]
    # Results, which are hidden states, logits and three tensors of candidates, are copied before the next replay, and
    # then read.
    assert names[at + 1 :].count("clone") == 5


def drafted(driver: Driver, slot: int, start: int) -> None:
    segment = driver.segment(slot, start, [1, 2])
    driver.run_bytes("decode", [msgspec.structs.replace(segment, drafts=2)])


def test_the_draft_layer_is_captured_for_all_lanes_and_for_the_one_of_each_further_draft(
    driver: Driver, recorder: Recorder
) -> None:
    recorder.forget()
    drafted(driver, 0, 3)
    names = recorder.names
    # The step of two lanes, the layer over both, and the layer over the one that goes on.
    assert [name for name in names if name in TRACE_CALLS] == [*TRACE_CALLS[:3]] * 3
    for begin in (index for index, name in enumerate(names) if name == "begin_trace_capture"):
        end = names.index("end_trace_capture", begin)
        assert set(names[begin + 1 : end]) == {"linear"}
    recorder.forget()
    drafted(driver, 9, 2)
    assert [name for name in recorder.names if name in TRACE_CALLS] == ["execute_trace"] * 3
    recorder.forget()
    driver.close()
    assert recorder.names == ["release_trace"] * 3 + ["close_mesh_device"]


def test_traces_are_released_before_the_mesh_is_closed(driver: Driver, recorder: Recorder) -> None:
    driver.decode({0: (3, 1), 9: (2, 1)})
    recorder.forget()
    driver.close()
    assert recorder.names == ["release_trace", "close_mesh_device"]


def test_a_capture_that_fails_is_ended(driver: Driver, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = ttnn.linear
    calls = 0

    def fail_while_capturing(*args: Any, **options: Any) -> ttnn.Tensor:
        nonlocal calls
        calls += "begin_trace_capture" in recorder.names
        if calls:
            raise RuntimeError("out of the trace region")
        return counted(*args, **options)

    recorder.forget()
    monkeypatch.setattr(ttnn, "linear", fail_while_capturing)
    with pytest.raises(RuntimeError, match="trace region"):
        driver.decode({0: (3, 1), 9: (2, 1)})
    assert recorder.names[-1] == "end_trace_capture"
