"""The state that the threads of a stage share, and that its health is made from."""

import os
import threading
import time
from pathlib import Path

from actors.stage.health import StageHealth, State
from actors.stage.setup import StageIdentity
from stages.step import FailureKind

FAILED_BETWEEN_STEPS = -1
"""The step id of a failure that no step was the cause of."""

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Returns the bytes of this process in physical memory, shared pages such as mapped weight files included."""
    return int(_STATM.read_bytes().split()[1]) * _PAGE_BYTES


class StageState:
    """The state of one stage. `name` changes under a lock, as both threads change it; the rest has one writer each.

    The I/O thread writes `received_step`, the sampling thread what it samples, the compute thread all others; one of
    the latter two, never both at once, sends steps on and writes `passed_step`. After a first failure, or once it was
    closed, a stage does not fail again until it begins anew.
    """

    def __init__(self, identity: StageIdentity) -> None:
        self.identity = identity
        self.name: State = "loading"
        self.detail = ""
        self.failure: FailureKind | None = None
        self.current_step: int | None = None
        self.received_step: int | None = None
        self.passed_step: int | None = None
        self._sampled_step: int | None = None
        self._sampled_since = 0.0
        self._current_since = 0.0
        self._steps_done = 0
        self._busy_seconds = 0.0
        self._layers_done, self._layers = 0, 0
        self._changing = threading.Lock()

    @property
    def epoch(self) -> int:
        """The epoch of the pipeline that the stage is, or is being, joined to."""
        return self.identity.epoch

    @property
    def failed_step(self) -> int:
        """The step id of a failure that comes now."""
        sampled, current = self._sampled_step, self.current_step
        oldest = current if sampled is None else sampled
        return FAILED_BETWEEN_STEPS if oldest is None else oldest

    @property
    def is_working(self) -> bool:
        """Whether steps are taken: the stage has neither failed nor was it closed."""
        return self.name in {"ready", "running", "blocked"}

    def note_layers(self, done: int, layers: int) -> None:
        """Records that `done` of so many `layers` are loaded."""
        self._layers_done, self._layers = done, layers

    def become(self, before: State, after: State) -> None:
        """Changes from one state to another; does nothing in any other state."""
        with self._changing:
            if self.name == before:
                self.name = after

    def begin_step(self, step_id: int) -> None:
        """Records that a step is being computed."""
        self._current_since = time.monotonic()
        self.current_step = step_id
        self.become("ready", "running")

    def end_computing(self, busy_seconds: float) -> None:
        """Records that the current step is computed, and waits to be handed on."""
        self._busy_seconds += busy_seconds
        self._steps_done += 1
        self.become("running", "blocked")

    def end_step(self) -> None:
        """Records that the current step was handed on."""
        self.current_step = None
        self.become("blocked", "ready")

    def begin_sampling(self, step_id: int) -> None:
        """Records that tokens are drawn of a step, which was computed before."""
        self._sampled_since = time.monotonic()
        self._sampled_step = step_id

    def end_sampling(self) -> None:
        """Records that the tokens of that step were handed on."""
        self._sampled_step = None

    def fail(self, kind: FailureKind, cause: str) -> bool:
        """Returns whether this is the failure to report, and none that follows from another one."""
        with self._changing:
            if self.name in {"failed", "closed"}:
                return False
            self.name, self.failure, self.detail = "failed", kind, cause
            return True

    def begin_leaving(self) -> bool:
        """Stops taking steps because the links are being left; returns whether there is a loaded stage to do so."""
        with self._changing:
            if self.name in {"loading", "closed"}:
                return False
            self.name, self.failure, self.detail = "failed", "error", "it is to be joined anew"
            return True

    def begin_anew(self, identity: StageIdentity) -> None:
        """Forgets the former links and failures: the stage can be joined as `identity`."""
        with self._changing:
            if self.name != "closed":
                self.name = "ready"
        self.identity = identity
        self.failure, self.detail = None, ""
        self.current_step = self.received_step = self.passed_step = None

    def close(self) -> bool:
        """Returns whether the stage was not closed before."""
        with self._changing:
            was_closed, self.name = self.name == "closed", "closed"
            return not was_closed

    def health(self, received_bytes: int, sent_bytes: int, sent_to: str) -> StageHealth:
        """Returns what the stage is doing at this moment; the arguments describe its links."""
        name, current, since = self.name, self.current_step, self._current_since
        sampled, sampled_since = self._sampled_step, self._sampled_since
        if sampled is not None:
            # It is the older one; a stage that samples works, though it may compute nothing.
            name, current, since = "running" if name == "ready" else name, sampled, sampled_since
        return StageHealth(
            stage=self.identity.index,
            host=self.identity.host,
            pid=os.getpid(),
            state=name,
            step_id=current,
            step_seconds=0.0 if current is None else time.monotonic() - since,
            received_step=self.received_step,
            steps_done=self._steps_done,
            busy_seconds=self._busy_seconds,
            layers_done=self._layers_done,
            layers=self._layers,
            resident_bytes=resident_bytes(),
            detail=self.detail,
            received_bytes=received_bytes,
            sent_bytes=sent_bytes,
            sent_to=sent_to,
            passed_step=self.passed_step,
            failure=self.failure,
        )
