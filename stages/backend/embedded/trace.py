"""Traces: the torch calls of a step, recorded once and replayed without the Python in between.

A trace belongs to the tensors that existed when it was captured. It reads them in place, so new inputs are copied into
them, and it writes its results in place. As on chips, nothing in it may depend on a value; a function that does on the
embedded device is `atomic`, and is replayed as a whole.
"""

import functools
import itertools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from stages.backend.embedded.mesh import MeshDevice
from stages.backend.embedded.tensor import Tensor
from stages.backend.embedded.torch_private import without_torch_function
from stages.errors import DeviceError

Function = TypeVar("Function", bound=Callable[..., Any])
Replay = Callable[[], None]

READS = {
    torch.Tensor.tolist,
    torch.Tensor.item,
    torch.Tensor.numpy,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.__iter__,
}
"""Functions that give Python the values of a tensor, which differ when a trace is replayed."""


class _Call(NamedTuple):
    """A line of a trace: its `text`, and the slots that it makes and uses."""

    text: str
    makes: list[int]
    uses: list[int]


class _Recorder(TorchFunctionMode):
    """Records every call that makes or changes tensors while it is entered, as a line of Python.

    Results of calls have slots, the variables v0, v1, ...; all other arguments are constants c0, c1, ...
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []
        self._slots: dict[int, int] = {}
        self._constants: dict[str, Any] = {}
        # Objects with slots are kept alive, so that no later object gets the id of one.
        self._made: list[Any] = []
        self._is_within_a_call = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of `func`."""
        if func in READS:
            raise DeviceError(f"A trace cannot depend on values, which {func.__name__} reads.")
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__setitem__ or _has_tensors(result):
            self._note(func, args, kwargs or {}, result)
        return result

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Calls `function` and records it as one line, whatever it calls itself."""
        if self._is_within_a_call:
            return function(*args)
        self._is_within_a_call = True
        try:
            with without_torch_function():
                result = function(*args)
        finally:
            self._is_within_a_call = False
        self._note(function, args, {}, result)
        return result

    def replay(self) -> Replay:
        """Returns the recorded calls as one function, which writes its results to the tensors that are still in use."""
        references = {self._slots[id(item)]: weakref.ref(item) for item in self._made if isinstance(item, torch.Tensor)}
        self._made.clear()
        outputs = {slot: tensor for slot, reference in references.items() if (tensor := reference()) is not None}
        self._constants |= {f"o{slot}": tensor for slot, tensor in outputs.items()}
        spent = {slot: index for index, call in enumerate(self._calls) for slot in [*call.makes, *call.uses]}
        lines = []
        for index, call in enumerate(self._calls):
            lines.append(call.text)
            done = {slot for slot in [*call.makes, *call.uses] if spent[slot] == index} - outputs.keys()
            lines += [f"del {', '.join(f'v{slot}' for slot in sorted(done))}"] if done else []
        lines += [f"o{slot}.copy_(v{slot})" for slot in outputs]
        source = "\n    ".join(["def replay():", *lines, "return"])
        exec(compile(source, "<trace>", "exec"), self._constants)  # noqa: S102 # nosec B102 # names only, all ours
        replay: Replay = self._constants["replay"]
        return replay

    def _note(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        uses: list[int] = []
        given = [self._text(argument, uses) for argument in args]
        given += [f"{name}={self._text(argument, uses)}" for name, argument in kwargs.items()]
        call = f"{self._constant(function)}({', '.join(given)})"
        if result is None:
            self._calls.append(_Call(call, [], uses))
            return
        makes = [self._slot(item) for item in result] if isinstance(result, tuple | list) else [self._slot(result)]
        names = ", ".join(f"v{slot}" for slot in makes)
        target = f"[{names}]" if isinstance(result, tuple | list) else names
        self._calls.append(_Call(f"{target} = {call}", makes, uses))

    def _text(self, argument: Any, uses: list[int]) -> str:
        slot = self._slots.get(id(argument))
        if slot is not None:
            uses.append(slot)
            return f"v{slot}"
        if type(argument) is list:
            return f"[{', '.join(self._text(item, uses) for item in argument)}]"
        if type(argument) is tuple:
            return f"({''.join(self._text(item, uses) + ', ' for item in argument)})"
        return self._constant(argument)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _slot(self, item: Any) -> int:
        slot = self._slots[id(item)] = len(self._made)
        self._made.append(item)
        return slot


def _has_tensors(result: Any) -> bool:
    if isinstance(result, torch.Tensor):
        return True
    return isinstance(result, tuple | list) and any(isinstance(item, torch.Tensor) for item in result)


_recording: ContextVar[tuple[MeshDevice, _Recorder] | None] = ContextVar("_recording", default=None)
"""The capture of this thread: what others compute meanwhile is not part of it."""

_replays: dict[int, Replay] = {}
_trace_ids = itertools.count()


def atomic(function: Function) -> Function:
    """Decorates a function that a trace replays as a whole: it may read values, and its result may have any type."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        recording = _recording.get()
        return function(*args) if recording is None else recording[1].run(function, args)

    return call  # type: ignore[return-value] # It is called as `function` is, by position.


def begin_trace_capture(mesh_device: MeshDevice, cq_id: int = 0) -> int:
    """Starts to record what is computed, while it is computed. Raises DeviceError within another capture."""
    if _recording.get() is not None:
        raise DeviceError("A trace is being captured already: end it first.")
    recorder = _Recorder()
    _recording.set((mesh_device, recorder))
    recorder.__enter__()  # type: ignore[no-untyped-call]
    return next(_trace_ids)


def end_trace_capture(mesh_device: MeshDevice, trace_id: int, cq_id: int = 0) -> None:
    """Ends the recording. Raises DeviceError if none was started on this mesh."""
    recording = _recording.get()
    if recording is None or recording[0] is not mesh_device:
        raise DeviceError("No trace is being captured on this mesh.")
    _recording.set(None)
    recorder = recording[1]
    recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    _replays[trace_id] = recorder.replay()


def execute_trace(mesh_device: MeshDevice, trace_id: int, cq_id: int = 0, blocking: bool = True) -> None:
    """Replays a trace with the present values of its inputs. Raises DeviceError for an unknown trace."""
    replay = _replays.get(trace_id)
    if replay is None:
        raise DeviceError(f"Trace {trace_id} does not exist: it was not captured, or was released.")
    replay()


def release_trace(mesh_device: MeshDevice, trace_id: int) -> None:
    """Deletes a trace."""
    _replays.pop(trace_id, None)


def copy(input_a: Tensor, input_b: Tensor) -> Tensor:
    """Copies the values of a into b, from which every trace captured with b computes then; returns b.

    Raises DeviceError if shapes, dtypes, layouts or meshes differ.
    """
    are_alike = input_a.dtype is input_b.dtype and input_a.layout is input_b.layout
    if input_a.mesh is not input_b.mesh:
        raise DeviceError("copy: its operands are on different meshes, or one is on the host.")
    if not are_alike or input_a.shape != input_b.shape:
        raise DeviceError(f"copy takes two tensors of one kind, not {input_a} and {input_b}.")
    for target, source in {id(b): (b, a) for a, b in zip(input_a.shards, input_b.shards, strict=True)}.values():
        target.copy_(source)
    input_b.forget_derived()
    return input_b


def clone(input_tensor: Tensor) -> Tensor:
    """Returns a copy of a tensor; chips that share a shard share its copy."""
    copies = {id(shard): shard.clone() for shard in input_tensor.shards}
    shards = [copies[id(shard)] for shard in input_tensor.shards]
    return Tensor(shards, input_tensor.dtype, input_tensor.layout, input_tensor.mesh)
