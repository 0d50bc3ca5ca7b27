"""Runners that compute nothing, but whose hidden states are tensors on a mock mesh that pass through mesh sockets.

They record their calls of ttnn themselves, in one file per stage in the folder `options.model_path`.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import ttnn

from actors.stage.runner import OnProgress, StageRunner, WithoutBlocks
from stages.backend import mesh_sockets
from stages.mesh_spec import HiddenShard, MeshHidden
from stages.options import StageOptions
from stages.plan import StageSpec
from stages.step import Step, StepResult

COLUMNS = 8
HIDDEN_SIZE = 1024
PREFILL = HiddenShard((1, 1, 64, HIDDEN_SIZE // COLUMNS), "bfloat16")
DECODE = HiddenShard((1, 1, 32, HIDDEN_SIZE // COLUMNS), "bfloat16")


class Call(msgspec.Struct, frozen=True):
    """A recorded call of ttnn: "send" or "receive", with its step and the shape and dtype of the tensor."""

    name: str
    step_id: int
    shape: tuple[int, ...]
    dtype: str


def calls_of(folder: Path, stage: int) -> list[Call]:
    """The calls that the runner of a stage recorded."""
    return [msgspec.json.decode(line, type=Call) for line in _record(folder, stage).read_bytes().splitlines()]


def _record(folder: Path, stage: int) -> Path:
    return folder / f"calls-{stage}"


class TensorRunner(WithoutBlocks):
    """A runner that doubles the hidden states on its chips; the last stage's token is the step's id."""

    def __init__(self, spec: StageSpec, options: StageOptions) -> None:
        self.spec = spec
        self._step_id = -1
        self._shape = (options.cache.pools // COLUMNS, COLUMNS)
        self._record = _record(Path(options.model_path), spec.index).open("ab", buffering=0)
        ttnn.experimental.send_async = self._watched("send", ttnn.experimental.send_async)
        ttnn.experimental.recv_async = self._watched("receive", ttnn.experimental.recv_async)
        ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
        self.mesh_device: Any = ttnn.open_mesh_device(ttnn.MeshShape(*self._shape))

    def hidden_spec(self) -> MeshHidden:
        return MeshHidden(self._shape, PREFILL, DECODE)

    def step_hidden_spec(self, step: Step) -> HiddenShard | None:
        self._step_id = step.step_id
        if not step.segments:
            return None
        return DECODE if step.mode == "decode" else PREFILL

    def step_on_mesh(self, step: Step, hidden: Any) -> Any:
        what = self.step_hidden_spec(step)
        if self.spec.is_first and what is not None:
            hidden = ttnn.empty(what.shape, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=self.mesh_device)
        if self.spec.is_last:
            sampling = [segment for segment in step.segments if segment.sample]
            return StepResult(epoch=step.epoch, step_id=step.step_id, tokens=[step.step_id] * len(sampling))
        return None if hidden is None else ttnn.add(hidden, hidden)

    def close(self) -> None:
        ttnn.close_mesh_device(self.mesh_device)
        self._record.close()

    def _watched(self, name: str, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def watched(tensor: Any, socket: Any) -> Any:
            call = Call(name, self._step_id, tuple(tensor.shape), str(tensor.dtype))
            self._record.write(msgspec.json.encode(call) + b"\n")
            return function(tensor, socket)

        return watched


def plain(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Loads runners that work."""
    return _made(TensorRunner, spec, options, on_progress)


def other_shape(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Loads runners of which stage 1 has room for more users than its neighbours."""
    return _made(_OtherShape if spec.index == 1 else TensorRunner, spec, options, on_progress)


def silent(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Loads runners of which stage 0 omits its third send, but reports it."""
    if spec.index == 0:
        _drop(mesh_sockets.MeshSender, at=3)
    return plain(spec, options, on_progress)


def mistaken(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Loads runners of which stage 0 treats decode steps as prefill steps."""
    return _made(_Mistaken if spec.index == 0 else TensorRunner, spec, options, on_progress)


def killed_at_start(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Loads runners of which stage 1 dies while the others open their meshes, for which they need it."""
    if spec.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(spec, options, on_progress)


def killed_in_step(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Loads runners of which stage 1 dies in step 3, with its tensor received and nothing sent."""
    return _made(_Mortal if spec.index == 1 else TensorRunner, spec, options, on_progress)


def killed_in_barrier(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Loads runners of which stage 1 dies when all others wait for it."""
    _act_in_barrier(spec, Path(options.model_path), signal.SIGKILL)
    return plain(spec, options, on_progress)


def stopped_in_barrier(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Loads runners of which stage 1 is stopped when all others wait for it."""
    _act_in_barrier(spec, Path(options.model_path), signal.SIGSTOP)
    return plain(spec, options, on_progress)


class _OtherShape(TensorRunner):
    def hidden_spec(self) -> MeshHidden:
        wider = HiddenShard((1, 1, 64, HIDDEN_SIZE // COLUMNS), "bfloat16")
        return msgspec.structs.replace(super().hidden_spec(), decode=wider)


class _Mistaken(TensorRunner):
    def step_hidden_spec(self, step: Step) -> HiddenShard | None:
        super().step_hidden_spec(step)
        return PREFILL


class _Mortal(TensorRunner):
    def step_on_mesh(self, step: Step, hidden: Any) -> Any:
        if step.step_id == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step_on_mesh(step, hidden)


def _made(runner: type[TensorRunner], spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    on_progress(len(spec.layers), len(spec.layers))
    return cast("StageRunner", runner(spec, options))


def _drop(sender: type[mesh_sockets.MeshSender], at: int) -> None:
    send = sender.send
    count = 0

    def dropping(self: mesh_sockets.MeshSender, tensor: Any) -> HiddenShard:
        nonlocal count
        count += 1
        return mesh_sockets.hidden_shard(tensor) if count == at else send(self, tensor)

    sender.send = dropping  # type: ignore[method-assign]


def _act_in_barrier(spec: StageSpec, folder: Path, act: signal.Signals) -> None:
    """Makes stages note in `folder` that they enter the barrier; stage 1 then sends itself a signal."""
    barrier = mesh_sockets.barrier

    def entered() -> None:
        (folder / f"entered-{spec.index}").touch()
        if spec.index == 1:
            while len(list(folder.glob("entered-*"))) < spec.stages:
                os.sched_yield()
            os.kill(os.getpid(), act)
        barrier()

    mesh_sockets.barrier = entered
