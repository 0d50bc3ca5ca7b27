"""Decode steps as traces: captured once for a number of users, then replayed with the inputs of each step.

A replay saves the host of a chip the dispatch of every op, and the embedded device the Python around them.
"""

import dataclasses

from stages.backend import ttnn
from stages.batch import DecodeBatch
from stages.model_slice import HiddenStates, ModelSlice

QUEUE = 0
"""The command queue that traces run on."""


class DecodeTraces:
    """The traces of a stage, one for each number of users so far; all other shapes are static."""

    def __init__(self, model: ModelSlice, mesh_device: ttnn.MeshDevice) -> None:
        self._model = model
        self._mesh_device = mesh_device
        self._traces: dict[int, _DecodeTrace] = {}

    def run(self, inputs: ttnn.Tensor, batch: DecodeBatch) -> HiddenStates:
        """Returns hidden states of all users, and on the last stage logits; `inputs` are as for `ModelSlice.enter`."""
        trace = self._traces.get(batch.users)
        if trace is None:
            trace = self._traces[batch.users] = _DecodeTrace(self._model, self._mesh_device, inputs, batch)
        return trace.run(inputs, batch)

    def release(self) -> None:
        """Releases all traces."""
        for trace in self._traces.values():
            trace.release()
        self._traces.clear()


class _DecodeTrace:
    """A trace, with the tensors that it reads its inputs from and those that it writes its results to."""

    def __init__(
        self, model: ModelSlice, mesh_device: ttnn.MeshDevice, inputs: ttnn.Tensor, batch: DecodeBatch
    ) -> None:
        self._mesh_device = mesh_device
        self._inputs = ttnn.clone(inputs)
        self._batch = _own(batch)
        # Once before the capture, so that programs are compiled and weights packed. This writes to the KV cache what
        # the capture and the first replay write again.
        _decode(model, self._inputs, self._batch)
        self._take(inputs, batch)
        self._id = ttnn.begin_trace_capture(mesh_device, cq_id=QUEUE)
        try:
            self._results = _decode(model, self._inputs, self._batch)
        finally:
            ttnn.end_trace_capture(mesh_device, self._id, cq_id=QUEUE)

    def run(self, inputs: ttnn.Tensor, batch: DecodeBatch) -> HiddenStates:
        """Replays the trace; the next replay does not change the results, which are copies."""
        self._take(inputs, batch)
        ttnn.execute_trace(self._mesh_device, self._id, cq_id=QUEUE, blocking=True)
        x, logits = self._results
        return HiddenStates(ttnn.clone(x), batch, None if logits is None else ttnn.clone(logits))

    def release(self) -> None:
        ttnn.release_trace(self._mesh_device, self._id)

    def _take(self, inputs: ttnn.Tensor, batch: DecodeBatch) -> None:
        ttnn.copy(inputs, self._inputs)
        for source, target in zip(_inputs_of(batch), _inputs_of(self._batch), strict=True):
            ttnn.copy(source, target)


def _decode(model: ModelSlice, inputs: ttnn.Tensor, batch: DecodeBatch) -> tuple[ttnn.Tensor, ttnn.Tensor | None]:
    x = model.forward(model.enter(inputs, batch), batch)
    return x, None if model.head is None else model.logits(x, batch, None)


def _inputs_of(batch: DecodeBatch) -> list[ttnn.Tensor]:
    """Returns the inputs that differ between steps of the same number of users."""
    return [batch.rope.cos, batch.rope.sin, batch.positions, batch.pages]


def _own(batch: DecodeBatch) -> DecodeBatch:
    """Returns the batch with copies of its inputs."""
    cos, sin, positions, pages = (ttnn.clone(tensor) for tensor in _inputs_of(batch))
    return dataclasses.replace(batch, rope=batch.rope._replace(cos=cos, sin=sin), positions=positions, pages=pages)
