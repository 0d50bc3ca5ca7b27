"""Decode passes as traces: captured once for a number of lanes, then replayed with the inputs of each step."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

from stages.backend import DEVICE, ttnn
from stages.batch import DecodeBatch
from stages.options import ExecutionOptions

QUEUE = 0
"""The command queue that traces run on."""

EAGER_STEPS = 8
"""Steps of a number of lanes before the embedded device captures it, as a capture takes as long as two more."""

DecodePass = Callable[[Sequence[ttnn.Tensor], DecodeBatch], Sequence[ttnn.Tensor]]
"""What a trace records: device tensors in, device tensors out, with no value read on the way."""


def eager_steps(execution: ExecutionOptions) -> int | None:
    """The steps of each number of lanes that are not traced; None if none are."""
    if execution.enable_trace:
        return 0
    return EAGER_STEPS if DEVICE == "embedded" else None


class DecodeTraces:
    """Traces of one pass, for each number of lanes so far; all other shapes are static.

    A replay saves the host of a chip the dispatch of every op, and the embedded device the Python around them.
    """

    def __init__(self, decode: DecodePass, mesh_device: ttnn.MeshDevice, eager: int) -> None:
        """The first `eager` passes of each number of lanes are not traced."""
        self._decode = decode
        self._mesh_device = mesh_device
        self._eager = eager
        self._passes: collections.Counter[int] = collections.Counter()
        self._traces: dict[int, _DecodeTrace] = {}

    def run(self, inputs: Sequence[ttnn.Tensor], batch: DecodeBatch) -> list[ttnn.Tensor]:
        """Returns what the pass makes of its inputs; the next replay does not change it."""
        trace = self._traces.get(batch.users)
        if trace is None:
            self._passes[batch.users] += 1
            if self._passes[batch.users] <= self._eager:
                return list(self._decode(inputs, batch))
            trace = self._traces[batch.users] = _DecodeTrace(self._decode, self._mesh_device, inputs, batch)
        return trace.run(inputs, batch)

    def release(self) -> None:
        """Releases all traces."""
        for trace in self._traces.values():
            trace.release()
        self._traces.clear()


class _DecodeTrace:
    """A trace, with the tensors that it reads its inputs from and those that it writes its results to."""

    def __init__(
        self, decode: DecodePass, mesh_device: ttnn.MeshDevice, inputs: Sequence[ttnn.Tensor], batch: DecodeBatch
    ) -> None:
        self._mesh_device = mesh_device
        self._inputs = [ttnn.clone(tensor) for tensor in inputs]
        self._batch = _own(batch)
        # Once before the capture, so that programs are compiled and weights packed. This writes to the KV cache what
        # the capture and the first replay write again.
        decode(self._inputs, self._batch)
        self._take(inputs, batch)
        self._id = ttnn.begin_trace_capture(mesh_device, cq_id=QUEUE)
        try:
            self._results = decode(self._inputs, self._batch)
        finally:
            ttnn.end_trace_capture(mesh_device, self._id, cq_id=QUEUE)

    def run(self, inputs: Sequence[ttnn.Tensor], batch: DecodeBatch) -> list[ttnn.Tensor]:
        """Replays the trace; the next replay does not change the results, which are copies."""
        self._take(inputs, batch)
        ttnn.execute_trace(self._mesh_device, self._id, cq_id=QUEUE, blocking=True)
        return [ttnn.clone(tensor) for tensor in self._results]

    def release(self) -> None:
        ttnn.release_trace(self._mesh_device, self._id)

    def _take(self, inputs: Sequence[ttnn.Tensor], batch: DecodeBatch) -> None:
        sources, targets = [*inputs, *_inputs_of(batch)], [*self._inputs, *_inputs_of(self._batch)]
        for source, target in zip(sources, targets, strict=True):
            ttnn.copy(source, target)


def _inputs_of(batch: DecodeBatch) -> list[ttnn.Tensor]:
    """Returns the inputs that differ between steps of the same number of lanes."""
    written = [] if batch.writes is None else [batch.writes.positions, batch.writes.pages]
    return [batch.rope.cos, batch.rope.sin, batch.positions, batch.pages, *written]


def _own(batch: DecodeBatch) -> DecodeBatch:
    """Returns the batch with copies of its inputs."""
    cos, sin, positions, pages, *written = (ttnn.clone(tensor) for tensor in _inputs_of(batch))
    writes = batch.writes
    if writes is not None:
        writes = writes._replace(positions=written[0], pages=written[1])
    rope = batch.rope._replace(cos=cos, sin=sin)
    return dataclasses.replace(batch, rope=rope, positions=positions, pages=pages, writes=writes)
