"""Hidden states from mesh to mesh, with sockets and runners that need no chips."""

import re
from collections import deque
from typing import Any

import msgspec
import pytest

from actors.errors import ProtocolError
from actors.stage.mesh_hop import KEPT, MeshHop, Sockets, TransferLog
from actors.stage.runner import WithoutBlocks
from actors.stage.setup import StageIdentity
from stages.errors import StepError
from stages.mesh_spec import HiddenShard, MeshHidden, MeshSocketSpec
from stages.step import Mode, Segment, SentHidden, Step, StepResult

STAGES = 3
FIFO_BYTES = 4096
PREFILL = HiddenShard((1, 1, 64, 16), "bfloat16")
DECODE = HiddenShard((1, 1, 32, 16), "bfloat16")
HIDDEN = MeshHidden((2, 8), PREFILL, DECODE)


class Wires:
    """The sockets of this process: a queue for each pair of meshes."""

    def __init__(self) -> None:
        self.queues: dict[tuple[int, int], deque[HiddenShard]] = {}
        self.specs: list[MeshSocketSpec] = []
        self.barriers = 0

    def sockets(self) -> Sockets:
        return Sockets(self.end, self.end, self.barrier)

    def end(self, mesh_device: Any, spec: MeshSocketSpec, sender: int, receiver: int) -> "Wire":
        self.specs.append(spec)
        return Wire(self.queues.setdefault((sender, receiver), deque()))

    def barrier(self) -> None:
        self.barriers += 1


class Wire:
    """Either end of a socket."""

    def __init__(self, queue: deque[HiddenShard]) -> None:
        self._queue = queue

    def send(self, tensor: HiddenShard) -> HiddenShard:
        self._queue.append(tensor)
        return tensor

    def receive(self, what: HiddenShard) -> HiddenShard:
        assert self._queue.popleft() == what
        return what


class Runner(WithoutBlocks):
    """A runner whose tensors are their specs."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.mesh_device = f"mesh {index}"
        self.gives: HiddenShard | None = None
        self.is_closed = False

    def hidden_spec(self) -> MeshHidden:
        return HIDDEN

    def step_hidden_spec(self, step: Step) -> HiddenShard | None:
        return {"prefill": PREFILL, "decode": DECODE}[step.mode] if step.segments else None

    def step_on_mesh(self, step: Step, hidden: HiddenShard | None) -> HiddenShard | StepResult | None:
        assert hidden == (None if self.index == 0 else self.step_hidden_spec(step))
        if self.index == STAGES - 1:
            return StepResult(epoch=step.epoch, step_id=step.step_id, tokens=[1])
        return self.gives or self.step_hidden_spec(step)

    def close(self) -> None:
        self.is_closed = True


def identity(index: int) -> StageIdentity:
    return StageIdentity(
        index=index, stages=STAGES, host="host-a", epoch=1, secret=b"s", dtype="bfloat16", bytes_per_token=256
    )


def hops(wires: Wires) -> list[MeshHop]:
    made = [MeshHop(Runner(index), identity(index), FIFO_BYTES, wires.sockets()) for index in range(STAGES)]
    for hop in made:
        hop.open_sockets()
    return made


def step(step_id: int, mode: Mode = "decode", segments: int = 1) -> Step:
    segment = Segment(slot=0, start=0, tokens=[1], new_blocks=[], sample=True)
    return Step(epoch=1, step_id=step_id, mode=mode, segments=[segment] * segments, admissions=[], ended=[])


def through(hop: MeshHop, step: Step) -> Step:
    """Returns the step as the stage server passes it on."""
    output = hop.step(step, memoryview(b""))
    assert not isinstance(output, StepResult)
    return msgspec.structs.replace(step, sent=None if isinstance(output, memoryview) else output)


def test_tensors_go_from_stage_to_stage_and_both_ends_remember_them() -> None:
    first, middle, last = hops(Wires())
    for step_id, mode in enumerate(("prefill", "decode", "decode"), start=1):
        frame = through(middle, through(first, step(step_id, "prefill" if mode == "prefill" else "decode")))
        assert last.step(frame, memoryview(b"")) == StepResult(epoch=1, step_id=step_id, tokens=[1])

    sent = [
        SentHidden(sequence=1, step_id=1, tensor=PREFILL),
        SentHidden(sequence=2, step_id=2, tensor=DECODE),
        SentHidden(sequence=3, step_id=3, tensor=DECODE),
    ]
    for hop, received, given in ((first, [], sent), (middle, sent, sent), (last, sent, [])):
        transfers = hop.transfers()
        assert [transfer.sent for transfer in transfers if transfer.direction == "receive"] == received
        assert [transfer.sent for transfer in transfers if transfer.direction == "send"] == given
    assert {(transfer.socket, transfer.peer) for transfer in middle.transfers()} == {
        ("stage 0 -> stage 1", "stage 0"),
        ("stage 1 -> stage 2", "stage 2"),
    }


def test_a_step_without_tokens_sends_nothing() -> None:
    first, middle, _ = hops(Wires())
    through(middle, through(first, step(1, segments=0)))
    through(middle, through(first, step(2)))

    assert [transfer.sent.sequence for transfer in middle.transfers()] == [1, 1]


DROPPED = SentHidden(sequence=1, step_id=1, tensor=DECODE)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (None, "nothing"),
        (SentHidden(sequence=2, step_id=1, tensor=DECODE), "bfloat16 [1, 1, 32, 16] as tensor 2, of step 1"),
        (SentHidden(sequence=1, step_id=9, tensor=DECODE), "bfloat16 [1, 1, 32, 16] as tensor 1, of step 9"),
        (SentHidden(sequence=1, step_id=1, tensor=PREFILL), "bfloat16 [1, 1, 64, 16] as tensor 1, of step 1"),
        (
            SentHidden(sequence=1, step_id=1, tensor=HiddenShard((1, 1, 32, 16), "float32")),
            "float32 [1, 1, 32, 16] as tensor 1, of step 1",
        ),
    ],
)
def test_what_is_no_pair_is_refused_by_name(sent: SentHidden | None, told: str) -> None:
    _, middle, _ = hops(Wires())
    frame = msgspec.structs.replace(step(1), sent=sent)
    sentence = (
        f"stage 0 sent {told} through stage 0 -> stage 1 where bfloat16 [1, 1, 32, 16] as tensor 1, of step 1 belongs."
    )

    with pytest.raises(ProtocolError, match=f"^{re.escape(sentence)}$"):
        middle.step(frame, memoryview(b""))


def test_a_dropped_send_is_noticed_by_the_next_step() -> None:
    first, middle, _ = hops(Wires())
    through(first, step(1))  # Its frame is lost.

    with pytest.raises(ProtocolError, match=r"as tensor 2, of step 2 through .* as tensor 1, of step 2 belongs"):
        middle.step(through(first, step(2)), memoryview(b""))


def test_a_stage_that_computes_another_shape_is_its_own_fault() -> None:
    runner = Runner(0)
    runner.gives = PREFILL
    hop = MeshHop(runner, identity(0), FIFO_BYTES, Wires().sockets())
    hop.open_sockets()

    with pytest.raises(
        StepError, match=re.escape("gave bfloat16 [1, 1, 64, 16] on each chip, where bfloat16 [1, 1, 32")
    ):
        hop.step(step(1), memoryview(b""))


def test_a_step_before_the_sockets_is_refused() -> None:
    hop = MeshHop(Runner(0), identity(0), FIFO_BYTES, Wires().sockets())

    with pytest.raises(StepError, match="came to stage 0 before its sockets were made"):
        hop.step(step(1), memoryview(b""))


def test_every_chip_is_joined_to_its_own_place() -> None:
    wires = Wires()
    hops(wires)
    (spec,) = set(map(msgspec.json.encode, wires.specs))

    read = msgspec.json.decode(spec, type=MeshSocketSpec)
    assert len(wires.specs) == 2 * (STAGES - 1)
    assert read.connections == [(row, column, row, column) for row in range(2) for column in range(8)]
    assert read.fifo_bytes == FIFO_BYTES


def test_close_and_barrier_reach_runner_and_world() -> None:
    wires = Wires()
    runner = Runner(1)
    hop = MeshHop(runner, identity(1), FIFO_BYTES, wires.sockets())
    hop.barrier()
    hop.close()

    assert (wires.barriers, runner.is_closed) == (1, True)


def test_the_record_is_bounded() -> None:
    log = TransferLog("stage 0 -> stage 1", "send", "stage 1")
    for step_id in range(KEPT + 1):
        log.note(step_id, DECODE)

    assert (len(log.latest), log.latest[0].sent.sequence) == (KEPT, 2)
