"""The choice of an engine for a request, which is in one engine and ends once, whatever engines and clients do."""

import asyncio
from collections.abc import Callable
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from api.client import engine_client
from api.client.open_requests import Load, RequestStream, least_loaded
from api.client.replicas import Replicas
from api.errors import EngineError, NotReadyError
from api.messages.engine import (
    AbortRequest,
    AddRequest,
    EngineState,
    FinishReason,
    FromEngine,
    Outputs,
    RequestOutput,
)
from stages.step import SamplingParams
from tests.support.engine_fakes import engine_options

REPLICAS = 3
SENTENCE = "Stage 1 on fake-host died."

loads = st.lists(st.none() | st.builds(Load, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6)


@given(loads, st.data())
def test_no_engine_gets_a_request_while_another_has_less(given_loads: list[Load | None], data: st.DataObject) -> None:
    last = data.draw(st.integers(0, len(given_loads) - 1))
    chosen = least_loaded(given_loads, last)
    takers = [load for load in given_loads if load is not None]
    if not takers:
        assert chosen is None
        return
    assert chosen is not None
    load = given_loads[chosen]
    assert load is not None
    assert not any((other.requests, other.tokens) < (load.requests, load.tokens) for other in takers)


@given(st.lists(st.booleans(), min_size=1, max_size=6).filter(any), st.data())
def test_idle_engines_take_turns(takes: list[bool], data: st.DataObject) -> None:
    last = data.draw(st.integers(0, len(takes) - 1))
    turns = []
    for _ in range(sum(takes)):
        chosen = least_loaded([Load(0, 0) if each else None for each in takes], last)
        assert chosen is not None
        turns.append(chosen)
        last = chosen
    assert sorted(turns) == [place for place, each in enumerate(takes) if each]


class FakeFraming:
    """The connection to an engine that does what the test says."""

    def __init__(self, on_frame: Callable[[memoryview], None]) -> None:
        self.on_frame = on_frame
        self.lost = asyncio.Event()
        self.requests: dict[int, AddRequest] = {}
        self.state = EngineState(phase="loading", detail="")

    def send(self, message: msgspec.Struct) -> None:
        if isinstance(message, AddRequest):
            assert message.request_id not in self.requests
            self.requests[message.request_id] = message
        elif isinstance(message, AbortRequest):
            self.requests.pop(message.request_id, None)

    def say(self, message: FromEngine) -> None:
        self.on_frame(memoryview(msgspec.msgpack.encode(message)))

    def become(self, state: EngineState) -> None:
        self.state = state
        self.say(state)


FAILED = EngineState(phase="failed", detail=SENTENCE, error_kind="PipelineError")
READY = EngineState(phase="ready", detail="")


def fake_replicas() -> tuple[Replicas, list[FakeFraming]]:
    """Engines that load, and the connections to them."""
    lines: list[FakeFraming] = []

    def connect(on_frame: Callable[[memoryview], None]) -> FakeFraming:
        lines.append(FakeFraming(on_frame))
        return lines[-1]

    with patch.object(engine_client, "Framing", connect):
        return Replicas([engine_options()] * REPLICAS, lambda *_: None), lines


def request(request_id: int, prompt: int = 10, max_tokens: int = 10) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        tokens=[1] * prompt,
        max_tokens=max_tokens,
        stop_token_ids=[],
        sampling=SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0),
    )


def test_a_request_that_two_engines_failed_with_gets_no_third() -> None:
    replicas, lines = fake_replicas()
    for line in lines:
        line.become(READY)
    stream = replicas.generate(request(7))
    first, second = lines[0], lines[1]
    assert list(first.requests) == [7]
    first.become(FAILED)
    assert [list(line.requests) for line in lines[1:]] == [[7], []]
    second.become(FAILED)
    second.say(Outputs(outputs=[RequestOutput(request_id=7, tokens=[], finish_reason="error", error=SENTENCE)]))
    assert lines[2].requests == {}
    assert asyncio.run(read(stream)) == ([], "error")
    assert replicas.state == EngineState(phase="ready", detail=f"Replica 0: {SENTENCE} Replica 1: {SENTENCE}")


class ReplicasMachine(RuleBasedStateMachine):
    """Engines become ready and fail, requests come, get tokens, end and are given up, in any order."""

    open_streams = Bundle("open_streams")

    def __init__(self) -> None:
        super().__init__()
        self.replicas, self.lines = fake_replicas()
        self.streams: dict[int, RequestStream] = {}
        self.said: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.left: set[int] = set()
        self.moved: set[int] = set()

    def ready(self) -> list[FakeFraming]:
        return [line for line in self.lines if line.state.phase == "ready"]

    def holders(self, request_id: int) -> list[FakeFraming]:
        return [line for line in self.lines if line.state.phase != "failed" and request_id in line.requests]

    @initialize(replicas=st.integers(0, REPLICAS))
    def begin(self, replicas: int) -> None:
        for replica in range(replicas):
            self.become_ready(replica)

    @rule(replica=st.integers(0, REPLICAS - 1))
    def become_ready(self, replica: int) -> None:
        if self.lines[replica].state.phase == "loading":
            self.lines[replica].become(READY)

    @rule(replica=st.integers(0, REPLICAS - 1))
    def fail(self, replica: int) -> None:
        line = self.lines[replica]
        if line.state.phase == "failed":
            return
        lost = dict(line.requests)
        others = [other for other in self.ready() if other is not line]
        line.become(FAILED)
        failed = [
            RequestOutput(request_id=request_id, tokens=[], finish_reason="error", error=SENTENCE)
            for request_id in lost
        ]
        line.say(Outputs(outputs=failed))
        for request_id in lost:
            can_move = bool(others) and not self.said[request_id] and request_id not in self.moved
            assert [holder in others for holder in self.holders(request_id)] == [True] * can_move
            if can_move:
                self.moved.add(request_id)
            else:
                self.reasons[request_id] = "error"

    @rule(target=open_streams, prompt=st.integers(1, 40), max_tokens=st.integers(1, 40))
    def generate(self, prompt: int, max_tokens: int) -> int:
        request_id = self.replicas.next_request_id()
        assert request_id not in self.streams
        added = request(request_id, prompt, max_tokens)
        before = {id(line): self.burden(line) for line in self.ready()}
        if not before:
            with pytest.raises(NotReadyError):
                self.replicas.generate(added)
            return -1
        self.streams[request_id] = self.replicas.generate(added)
        self.said[request_id] = []
        [holder] = self.holders(request_id)
        assert before[id(holder)] == min(before.values())
        return request_id

    def burden(self, line: FakeFraming) -> tuple[int, int]:
        """Returns the load of an engine by the engine's own count."""
        requests = line.requests.values()
        return len(requests), sum(len(each.tokens) + each.max_tokens for each in requests)

    @rule(request_id=open_streams, token=st.integers(0, 99))
    def answer(self, request_id: int, token: int) -> None:
        for line in self.holders(request_id):
            self.said[request_id].append(token)
            line.say(
                Outputs(outputs=[RequestOutput(request_id=request_id, tokens=[token], finish_reason=None, error=None)])
            )

    @rule(request_id=consumes(open_streams))
    def finish(self, request_id: int) -> None:
        self.end(request_id)

    def end(self, request_id: int) -> None:
        for line in self.holders(request_id):
            del line.requests[request_id]
            self.reasons[request_id] = "length"
            line.say(
                Outputs(outputs=[RequestOutput(request_id=request_id, tokens=[], finish_reason="length", error=None)])
            )

    @rule(request_id=open_streams)
    def leave(self, request_id: int) -> None:
        if request_id in self.streams:
            asyncio.run(self.streams[request_id].aclose())
            self.reasons.setdefault(request_id, "abort")
            self.left.add(request_id)

    @invariant()
    def every_request_is_in_one_engine_until_it_ends(self) -> None:
        for request_id in self.streams:
            assert len(self.holders(request_id)) == (request_id not in self.reasons)

    @invariant()
    def loads_are_what_the_engines_have(self) -> None:
        for line, engine in zip(self.lines, self.replicas.engines, strict=True):
            burden = (0, 0) if line.state.phase == "failed" else self.burden(line)
            assert (engine.load.requests, engine.load.tokens) == burden

    @invariant()
    def endings_are_counted_once(self) -> None:
        for reason in ("length", "abort", "error"):
            counted = sum(engine.requests.finished[reason] for engine in self.replicas.engines)
            assert counted == list(self.reasons.values()).count(reason)

    def teardown(self) -> None:
        for request_id in self.streams:
            self.end(request_id)
        for request_id, reason in self.reasons.items():
            if request_id not in self.left:
                assert asyncio.run(read(self.streams[request_id])) == (self.said[request_id], reason)


async def read(stream: RequestStream) -> tuple[list[int], FinishReason | None]:
    """Returns the tokens of a stream that has ended, and why it ended."""
    tokens: list[int] = []
    reason: FinishReason | None = None
    try:
        async for output in stream:
            tokens += output.tokens
            reason = output.finish_reason
    except EngineError:
        return tokens, "error"
    return tokens, reason


TestReplicas = ReplicasMachine.TestCase
TestReplicas.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
