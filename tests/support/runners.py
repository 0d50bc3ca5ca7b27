"""Stage runners without a model that act out what a pipeline has to cope with."""

import os
import signal
import socket
import time
from collections.abc import Callable

import psutil

from actors.stage.runner import OnProgress, StageRunner, WithoutBlocks
from stages.options import StageOptions
from stages.plan import StageSpec
from stages.step import Step, StepResult
from weights.errors import CheckpointError

HIDDEN_SIZE = 64
BYTES_PER_TOKEN = 4 * HIDDEN_SIZE


class EchoRunner(WithoutBlocks):
    """Adds 1 (modulo 256) to every byte of the hidden states; the first stage begins with each token's low byte.

    The last stage samples one token for each segment that asks for it: the last hidden byte of the segment.
    """

    def __init__(self, spec: StageSpec) -> None:
        self.spec = spec

    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        if self.spec.is_first:
            tokens = [token for segment in step.segments for token in segment.tokens]
            hidden = memoryview(bytearray(b"".join(bytes([token % 256]) * BYTES_PER_TOKEN for token in tokens)))
        output = bytes(hidden).translate(INCREMENT)
        if not self.spec.is_last:
            return memoryview(output)
        return StepResult(epoch=step.epoch, step_id=step.step_id, tokens=sampled(step, output))

    def close(self) -> None:
        return None


INCREMENT = bytes((value + 1) % 256 for value in range(256))


def sampled(step: Step, hidden: bytes) -> list[int]:
    """Returns the last hidden byte of every segment with `sample`."""
    tokens = []
    end = 0
    for segment in step.segments:
        end += len(segment.tokens) * BYTES_PER_TOKEN
        if segment.sample:
            tokens.append(hidden[end - 1])
    return tokens


class ActingRunner(EchoRunner):
    """An echo that first does something at the steps whose id is in `model_path`: "act:stage:step"."""

    def __init__(self, spec: StageSpec, options: StageOptions, act: Callable[[], None]) -> None:
        super().__init__(spec)
        _, stage, step = options.model_path.split(":")
        self._at = int(step) if int(stage) == spec.index else None
        self._act = act

    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        if step.step_id == self._at:
            self._act()
        return super().step(step, hidden)


def echo(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Makes an echo that loads one layer after the other."""
    for done in range(len(spec.layers) + 1):
        on_progress(done, len(spec.layers))
    return EchoRunner(spec)


def acting(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Makes an `ActingRunner`; `options.model_path` is "raise", "sleep" or "kill", then the stage and the step."""
    acts = {"raise": _raise, "sleep": lambda: time.sleep(30), "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}
    return ActingRunner(spec, options, acts[options.model_path.partition(":")[0]])


def unloadable(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Fails to load stage 1, by its "files", the "code", the "process" or the "clock": `options.model_path`."""
    if spec.index == 1:
        if options.model_path == "files":
            raise CheckpointError("model.safetensors has no tensor model.layers.1.mlp.gate.weight.")
        if options.model_path == "code":
            raise ValueError("no such thing")
        if options.model_path == "process":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)
    return EchoRunner(spec)


def _raise() -> None:
    raise ZeroDivisionError("one by nought")


class CuttingRunner(EchoRunner):
    """An echo that, on the middle stage and at step 1000, shuts all its process's connections down to other stages."""

    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        if step.step_id == 1000 and not self.spec.is_first and not self.spec.is_last:
            for connection in psutil.Process().net_connections("unix"):
                if "galaxyline-" in connection.laddr:
                    shut_down(connection.fd)
        return super().step(step, hidden)


def shut_down(descriptor: int) -> None:
    """Ends a connection for both sides; the descriptor stays open."""
    connected = socket.socket(fileno=os.dup(descriptor))
    with connected:
        connected.shutdown(socket.SHUT_RDWR)


def cutting(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Makes a `CuttingRunner`."""
    return CuttingRunner(spec)
