"""Frames against streams cut anywhere, cut short, and full of rubbish."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import ProtocolError
from actors.sockets.frames import (
    CONTROL_BYTES_MAX,
    HEADER,
    HELLO_BYTES_MAX,
    MAGIC,
    PAYLOAD_BYTES_MAX,
    STAGING_BYTES,
    BufferPool,
    Control,
    Credit,
    Frame,
    FrameReader,
    Hello,
    Kind,
    Lease,
    encode,
)
from stages.step import PROTOCOL_VERSION, Admission, SamplingParams, Segment, StageFailure, Step, StepResult

BYTES_PER_TOKEN = 768
HELLO = Hello(secret=b"s", sender="stage 0", receiver="stage 1", dtype="float32", bytes_per_token=4, credits=2)

tokens = st.integers(0, 1 << 20)
segments = st.builds(
    Segment,
    slot=st.integers(0, 255),
    start=st.integers(0, 1 << 17),
    tokens=st.lists(tokens, min_size=1, max_size=100),
    new_blocks=st.lists(st.integers(0, 1 << 20), max_size=3),
    sample=st.booleans(),
)
sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 100),
    seed=st.integers(0, (1 << 63) - 1),
    choice=st.integers(0, 7),
)
steps = st.builds(
    Step,
    epoch=st.integers(0, 1 << 40),
    step_id=st.integers(0, 1 << 40),
    mode=st.sampled_from(["prefill", "decode"]),
    segments=st.lists(segments, max_size=4),
    admissions=st.lists(st.builds(Admission, slot=st.integers(0, 255), sampling=sampling), max_size=2),
    ended=st.lists(st.integers(0, 255), max_size=3),
)
results = st.builds(StepResult, epoch=st.integers(0, 9), step_id=st.integers(0, 99), tokens=st.lists(tokens))
failures = st.builds(
    StageFailure,
    epoch=st.integers(0, 9),
    stage=st.integers(0, 9),
    host=st.text(max_size=20),
    step_id=st.integers(-1, 99),
    kind=st.sampled_from(["error", "lost_link"]),
    cause=st.text(max_size=200),
)
credit = st.builds(Credit, count=st.integers(1, 100))


def payload_of(control: Control) -> bytes:
    count = control.token_count * BYTES_PER_TOKEN if isinstance(control, Step) else 0
    return (bytes(range(251)) * (count // 251 + 1))[:count]


def on_the_wire(control: Control, epoch: int = 1) -> bytes:
    payload = payload_of(control)
    return encode(control, epoch, len(payload)) + payload


def open_reader() -> FrameReader:
    reader = FrameReader(BYTES_PER_TOKEN, BufferPool())
    reader.established()
    return reader


def feed(reader: FrameReader, stream: bytes, reads: list[int]) -> list[Frame]:
    """Gives the stream to the reader in reads of at most these lengths, over and over."""
    frames = []
    position = 0
    turn = 0
    while position < len(stream):
        buffer = reader.buffer()
        count = min(len(buffer), reads[turn % len(reads)], len(stream) - position)
        buffer[:count] = stream[position : position + count]
        frames += reader.received(count)
        position += count
        turn += 1
    return frames


reads = st.lists(st.integers(1, 5) | st.integers(1, 3 * STAGING_BYTES), min_size=1, max_size=8)
controls = st.lists(steps | results | failures | credit, max_size=6)


@settings(deadline=None)
@given(controls, reads)
def test_frames_arrive_as_sent_wherever_the_stream_is_cut(sent: list[Control], lengths: list[int]) -> None:
    frames = feed(open_reader(), b"".join(map(on_the_wire, sent)), lengths)
    assert [frame.control for frame in frames] == sent
    assert [bytes(frame.lease.view) for frame in frames] == [payload_of(control) for control in sent]


@settings(deadline=None)
@given(steps | results | failures | credit, st.data())
def test_a_truncated_stream_yields_only_its_whole_frames(last: Control, data: st.DataObject) -> None:
    stream = on_the_wire(last)
    kept = data.draw(st.integers(0, len(stream) - 1))
    frames = feed(open_reader(), on_the_wire(Credit(count=3)) + stream[:kept], [4096])
    assert [frame.control for frame in frames] == [Credit(count=3)]


@settings(deadline=None)
@given(controls)
def test_released_buffers_are_used_again(sent: list[Control]) -> None:
    reader = open_reader()
    stream = b"".join(map(on_the_wire, sent))
    for _ in range(2):
        for frame in feed(reader, stream, [STAGING_BYTES]):
            assert bytes(frame.lease.view) == payload_of(frame.control)
            frame.lease.release()


def test_two_leases_never_share_memory_and_a_double_release_changes_nothing() -> None:
    pool = BufferPool()
    first = pool.lease(100)
    first.release()
    first.release()
    second, third = pool.lease(100), pool.lease(100)
    second.view[:] = b"a" * 100
    third.view[:] = b"b" * 100
    assert bytes(second.view) == b"a" * 100


@settings(deadline=None)
@given(st.binary(min_size=HEADER.size, max_size=200))
def test_garbage_is_refused_at_the_first_header(garbage: bytes) -> None:
    if not garbage.startswith(MAGIC):
        with pytest.raises(ProtocolError, match="began with"):
            feed(open_reader(), garbage, [7])


@settings(deadline=None)
@given(controls.filter(bool), st.data())
def test_a_flipped_byte_is_either_refused_or_an_ordinary_frame(sent: list[Control], data: st.DataObject) -> None:
    stream = bytearray(b"".join(map(on_the_wire, sent)))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        frames = feed(open_reader(), bytes(stream), [1000])
    except ProtocolError:
        return
    assert all(len(frame.lease.view) == len(payload_of(frame.control)) for frame in frames)


class NoMemory(BufferPool):
    """A pool that must not be asked for anything."""

    def lease(self, length: int) -> Lease:
        raise AssertionError(f"{length} bytes set aside for a frame that has to be refused")


@pytest.mark.parametrize(
    ("control_length", "payload_length"),
    [(CONTROL_BYTES_MAX + 1, 0), ((1 << 32) - 1, 0), (10, PAYLOAD_BYTES_MAX + 1), (10, (1 << 64) - 1)],
)
def test_absurd_lengths_are_refused_before_memory_is_set_aside(control_length: int, payload_length: int) -> None:
    reader = FrameReader(BYTES_PER_TOKEN, NoMemory())
    reader.established()
    header = HEADER.pack(MAGIC, PROTOCOL_VERSION, Kind.STEP, 1, control_length, payload_length)
    with pytest.raises(ProtocolError, match="at most"):
        feed(reader, header, [HEADER.size])


@settings(deadline=None)
@given(steps, st.integers(0, PAYLOAD_BYTES_MAX))
def test_hidden_states_have_to_fit_the_tokens_of_their_step(step: Step, length: int) -> None:
    if length == step.token_count * BYTES_PER_TOKEN:
        length += 1
    reader = FrameReader(BYTES_PER_TOKEN, NoMemory())
    reader.established()
    with pytest.raises(ProtocolError, match=f"instead of {step.token_count * BYTES_PER_TOKEN}"):
        feed(reader, encode(step, 1, length), [4096])


def test_only_steps_have_hidden_states() -> None:
    with pytest.raises(ProtocolError, match="instead of 0"):
        feed(open_reader(), encode(StepResult(epoch=1, step_id=1, tokens=[1]), 1, 8), [4096])


@pytest.mark.parametrize("control", [Credit(count=1), StepResult(epoch=1, step_id=1, tokens=[])])
def test_before_the_handshake_only_a_hello_is_let_through(control: Control) -> None:
    with pytest.raises(ProtocolError, match="before the handshake"):
        feed(FrameReader(4, BufferPool()), on_the_wire(control), [4096])
    with pytest.raises(ProtocolError, match="after the handshake"):
        feed(open_reader(), on_the_wire(HELLO), [4096])
    assert feed(FrameReader(4, BufferPool()), on_the_wire(HELLO), [3])[0].control == HELLO


def test_an_untrusted_peer_cannot_claim_a_large_hello() -> None:
    header = HEADER.pack(MAGIC, PROTOCOL_VERSION, Kind.HELLO, 1, HELLO_BYTES_MAX + 1, 0)
    with pytest.raises(ProtocolError, match="at most"):
        feed(FrameReader(4, BufferPool()), header, [HEADER.size])


def test_another_version_and_an_unknown_kind_are_named() -> None:
    with pytest.raises(ProtocolError, match=f"version {PROTOCOL_VERSION + 1}"):
        feed(open_reader(), HEADER.pack(MAGIC, PROTOCOL_VERSION + 1, Kind.STEP, 1, 0, 0), [HEADER.size])
    with pytest.raises(ProtocolError, match="unknown kind 77"):
        feed(open_reader(), HEADER.pack(MAGIC, PROTOCOL_VERSION, 77, 1, 0, 0), [HEADER.size])


def test_a_frame_that_nobody_would_accept_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="larger than a frame may be"):
        encode(StepResult(epoch=1, step_id=1, tokens=[]), 1, PAYLOAD_BYTES_MAX + 1)
