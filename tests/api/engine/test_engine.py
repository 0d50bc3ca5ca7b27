"""The engine, in this process and as a process of its own, with a pipeline that has no model."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import PipelineError, PlacementError, ProtocolError
from actors.options import ClusterOptions
from api.client.engine_client import EngineClient
from api.client.open_requests import RequestStream
from api.engine.engine import Engine
from api.engine.options import PIPELINE_START, EngineOptions
from api.errors import EngineError, NotReadyError, OptionError, RequestError, exit_code
from api.messages.engine import (
    AbortRequest,
    AddRequest,
    Counts,
    DraftCounts,
    EngineMetrics,
    EngineState,
    FromEngine,
    GetCounts,
    GetMetrics,
    GetPipelineReport,
    Outputs,
    PipelineReport,
    PrefixCacheReset,
    PrefixCounts,
    RequestOutput,
    ResetPrefixCache,
    error_of,
    failed_state,
    loading_state,
)
from api.messages.framing import FRAME_BYTES_MAX, Framing
from stages.kv.inventory import Inventory
from stages.options import DraftOptions, TierOptions
from stages.step import SamplingParams
from tests import ROOT
from tests.support.engine_fakes import FakePipeline, engine_options, reference_answer
from tests.support.runners import HIDDEN_SIZE

SECONDS = 20.0


@pytest.fixture(autouse=True)
def tests_in_the_engine_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine process imports the pipelines of tests/support/engine_fakes.py."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def request(request_id: int, prompt: int = 40, max_tokens: int = 20) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        tokens=[(7 * request_id + 3 * i) % 5000 for i in range(prompt)],
        max_tokens=max_tokens,
        stop_token_ids=[],
        sampling=SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0),
    )


def open_files() -> set[Path]:
    """The file descriptors of this process."""
    return set(Path("/proc/self/fd").iterdir())


async def answer(stream: RequestStream) -> tuple[list[int], str | None]:
    """Returns all tokens of a request and why it ended."""
    tokens: list[int] = []
    reason = None
    async for output in stream:
        tokens += output.tokens
        reason = output.finish_reason
    return tokens, reason


class Harness:
    """An Engine in this process, and the messages that it sends."""

    def __init__(self, pipeline: FakePipeline, options: EngineOptions) -> None:
        self.pipeline = pipeline
        self.said: asyncio.Queue[FromEngine] = asyncio.Queue()
        self.engine = Engine(options, self.start, self.said.put_nowait)

    async def start(self, *_: object) -> FakePipeline:
        return self.pipeline

    async def hear(self) -> FromEngine:
        return await asyncio.wait_for(self.said.get(), SECONDS)

    async def hear_answers(self, count: int) -> dict[int, list[RequestOutput]]:
        """Takes messages until so many requests have ended."""
        heard: dict[int, list[RequestOutput]] = {}
        while sum(outputs[-1].finish_reason is not None for outputs in heard.values()) < count:
            message = await self.hear()
            assert isinstance(message, Outputs)
            for output in message.outputs:
                heard.setdefault(output.request_id, []).append(output)
        return heard

    async def counts(self) -> Counts:
        self.engine.handle_message(GetCounts())
        while not isinstance(message := await self.hear(), Counts):
            pass
        return message


@asynccontextmanager
async def running(pipeline: FakePipeline, options: EngineOptions) -> AsyncIterator[Harness]:
    """An engine whose loading is over."""
    harness = Harness(pipeline, options)
    serving = asyncio.create_task(harness.engine.run())
    try:
        assert await harness.hear() == loading_state("The stages are being placed.")
        assert await harness.hear() == EngineState(phase="ready", detail="")
        yield harness
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await harness.engine.close()


async def test_requests_get_the_tokens_that_they_get_alone_one_at_a_time() -> None:
    options = engine_options(blocks=14)
    requests = [request(i, prompt=11 * i + 1, max_tokens=3 * i + 1) for i in range(9)]
    async with running(FakePipeline(options.pipeline), options) as harness:
        for added in requests:
            harness.engine.handle_message(added)
        heard = await harness.hear_answers(len(requests))
        for added in requests:
            outputs = heard[added.request_id]
            assert [len(output.tokens) for output in outputs] == [1] * added.max_tokens
            tokens = [token for output in outputs for token in output.tokens]
            assert (tokens, outputs[-1].finish_reason) == reference_answer(added.tokens, added.max_tokens, [])
        counts = await harness.counts()
        assert (counts.waiting, counts.running, counts.steps_in_flight) == (0, 0, 0)
        assert (counts.free_slots, counts.free_blocks) == (counts.slots, counts.blocks)


async def test_what_one_step_samples_is_one_frame() -> None:
    options = engine_options(slots=24)
    async with running(FakePipeline(options.pipeline), options) as harness:
        for request_id in range(24):
            harness.engine.handle_message(request(request_id, prompt=2, max_tokens=2))
        frames: list[int] = []
        while sum(frames) < 48:
            message = await harness.hear()
            assert isinstance(message, Outputs)
            frames.append(len(message.outputs))
        assert frames == [24, 8, 8, 8]


async def test_as_many_steps_as_microbatches_are_in_flight() -> None:
    options = engine_options()
    pipeline = FakePipeline(options.pipeline, stall_at=0)
    async with running(pipeline, options) as harness:
        for request_id in range(12):
            harness.engine.handle_message(request(request_id))
        for _ in range(20):
            await asyncio.sleep(0)
        assert (await harness.counts()).steps_in_flight == len(pipeline.steps) == 3


async def test_what_was_cached_is_found_until_it_is_reset() -> None:
    options = engine_options()
    async with running(FakePipeline(options.pipeline), options) as harness:
        cached = []
        for request_id in range(3):
            if request_id == 2:
                harness.engine.handle_message(ResetPrefixCache())
                assert await harness.hear() == PrefixCacheReset()
            # Prompts of other ids would be others.
            added = msgspec.structs.replace(request(0, prompt=70, max_tokens=1), request_id=request_id)
            harness.engine.handle_message(added)
            [output] = (await harness.hear_answers(1))[request_id]
            cached.append(output.cached_tokens)
        harness.engine.handle_message(GetMetrics())
        metrics = await harness.hear()
    assert cached == [0, 64, 0]
    assert isinstance(metrics, EngineMetrics)
    assert metrics.prefix == PrefixCounts(blocks=2, queries=210, hits=64, recomputed_tokens=0)
    assert [(stage.host_tier_bytes, stage.disk_tier_bytes) for stage in metrics.stages] == [(0, 0)] * 2


class KeepingPipeline(FakePipeline):
    """A pipeline whose second stage keeps bytes beside its device; the first does not say."""

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        kept = Inventory(version=1, is_whole=True, added=[b"key"], removed=[], host_bytes=300, disk_bytes=5000)
        return [None, kept]


async def test_what_stages_keep_beside_their_devices_is_in_metrics_and_reports() -> None:
    options = engine_options()
    async with running(KeepingPipeline(options.pipeline), options) as harness:
        harness.engine.handle_message(GetMetrics())
        metrics = await harness.hear()
        harness.engine.handle_message(GetPipelineReport())
        report = await harness.hear()
    assert isinstance(metrics, EngineMetrics)
    assert isinstance(report, PipelineReport)
    for stages in (metrics.stages, report.stages):
        assert [(stage.host_tier_bytes, stage.disk_tier_bytes) for stage in stages] == [(0, 0), (300, 5000)]


async def test_how_many_tokens_are_drafted_is_in_metrics_and_reports() -> None:
    plain = engine_options()
    stage = msgspec.structs.replace(plain.pipeline.stage, drafts=DraftOptions(num_speculative_tokens=2))
    options = msgspec.structs.replace(plain, pipeline=msgspec.structs.replace(plain.pipeline, stage=stage))
    said: list[DraftCounts] = []
    for asked in (plain, options):
        async with running(FakePipeline(asked.pipeline), asked) as harness:
            harness.engine.handle_message(GetMetrics())
            metrics = await harness.hear()
            harness.engine.handle_message(GetPipelineReport())
            report = await harness.hear()
        assert isinstance(metrics, EngineMetrics)
        assert isinstance(report, PipelineReport)
        assert metrics.drafts == report.drafts
        said.append(metrics.drafts)
    assert [(drafts.num_speculative_tokens, drafts.accepted_per_position) for drafts in said] == [(0, []), (2, [0, 0])]


def with_directory(options: EngineOptions, directory: Path) -> EngineOptions:
    """The options with a tier on disk."""
    tiers = TierOptions(host_bytes=0, disk_directory=str(directory), disk_bytes=1 << 20)
    stage = msgspec.structs.replace(options.pipeline.stage, tiers=tiers)
    return msgspec.structs.replace(options, pipeline=msgspec.structs.replace(options.pipeline, stage=stage))


async def test_a_directory_that_cannot_be_used_is_a_users_mistake_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with EngineClient.start(with_directory(engine_options(), tmp_path / "file" / "kv")) as engine:
        with pytest.raises(OptionError) as refusal:
            await engine.wait_ready(SECONDS)
    assert str(refusal.value) == f"--kv-dir {tmp_path}/file/kv cannot be used: Not a directory."
    assert exit_code(refusal.value) == 2


async def test_who_resets_is_told_where_the_disk_does_not_take_it(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    async with EngineClient.start(with_directory(engine_options(), directory)) as engine:
        await engine.wait_ready(SECONDS)
        before = (directory / "key").read_bytes()
        await engine.reset_prefix_cache()
        assert (directory / "key").read_bytes() != before
        shutil.rmtree(directory)
        with pytest.raises(EngineError, match="cannot be written") as refusal:
            await engine.reset_prefix_cache()
        assert str(directory) not in str(refusal.value.public)
        assert engine.state.phase == "ready"


async def test_a_reset_that_the_disk_does_not_take_holds_for_this_engine_and_ends_nothing(tmp_path: Path) -> None:
    options = with_directory(engine_options(), tmp_path / "kv")
    async with running(FakePipeline(options.pipeline), options) as harness:
        harness.engine.handle_message(request(0, prompt=70, max_tokens=1))
        await harness.hear_answers(1)
        shutil.rmtree(tmp_path / "kv")
        harness.engine.handle_message(ResetPrefixCache())
        reset = await harness.hear()
        assert isinstance(reset, PrefixCacheReset)
        assert "cannot be written: No such file or directory" in reset.problem
        harness.engine.handle_message(msgspec.structs.replace(request(0, prompt=70, max_tokens=1), request_id=1))
        [output] = (await harness.hear_answers(1))[1]
        assert output.cached_tokens == 0


async def test_an_aborted_request_is_in_no_later_step() -> None:
    options = engine_options()
    pipeline = FakePipeline(options.pipeline)
    async with running(pipeline, options) as harness:
        harness.engine.handle_message(request(0, prompt=20, max_tokens=100))
        await harness.hear()
        harness.engine.handle_message(AbortRequest(request_id=0))
        before = len(pipeline.steps)
        harness.engine.handle_message(request(1, prompt=20, max_tokens=2))
        await harness.hear_answers(1)
        assert pipeline.steps[before].ended == [0]
        assert (await harness.counts()).running == 0


async def test_a_request_that_never_fits_ends_with_the_reason() -> None:
    options = engine_options()
    async with running(FakePipeline(options.pipeline), options) as harness:
        harness.engine.handle_message(request(0, prompt=100, max_tokens=100))
        message = await harness.hear()
        assert isinstance(message, Outputs)
        assert [output.finish_reason for output in message.outputs] == ["error"]
        assert "over the model's length of 128" in str(message.outputs[0].error)


async def test_a_broken_pipeline_ends_every_request_with_its_sentence() -> None:
    options = engine_options()
    pipeline = FakePipeline(options.pipeline, break_at=5)
    harness = Harness(pipeline, options)
    for request_id in range(14):
        harness.engine.handle_message(request(request_id))
    with pytest.raises(PipelineError, match=r"^Stage 1 failed 11 times with no token made in between; the last time: "):
        await asyncio.wait_for(harness.engine.run(), SECONDS)
    await harness.engine.close()
    assert pipeline.is_closed
    said = [harness.said.get_nowait() for _ in range(harness.said.qsize())]
    states = [message for message in said if isinstance(message, EngineState)]
    assert [state.phase for state in states] == ["loading", *["ready", "recovering"] * 11, "failed"]
    assert states[-1].error_kind == "PipelineError"
    last = said[-1]
    assert isinstance(last, Outputs)
    ends = {
        output.request_id: output.error
        for message in said
        if isinstance(message, Outputs)
        for output in message.outputs
    }
    assert set(ends) == set(range(14))
    assert {output.error for output in last.outputs} == {states[-1].detail}
    given_up = ends.keys() - {output.request_id for output in last.outputs}
    assert all(str(ends[request_id]).startswith("Stage 1 on fake-host died at step") for request_id in given_up)
    counts = await harness.counts()
    assert (counts.waiting, counts.running, counts.steps_in_flight) == (0, 0, 0)


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(1, 30), max_size=20))
def test_frames_arrive_whole_however_the_bytes_are_cut(frames: list[bytes], cuts: list[int]) -> None:
    sent = b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames)
    received: list[bytes] = []
    framing = Framing(lambda frame: received.append(bytes(frame)))
    for cut in cuts:
        framing.data_received(sent[:cut])
        sent = sent[cut:]
    framing.data_received(sent)
    assert received == frames


def test_a_frame_longer_than_any_message_is_refused() -> None:
    framing = Framing(lambda _: None)
    with pytest.raises(ProtocolError, match="A frame of 67108865 bytes was announced"):
        framing.data_received((FRAME_BYTES_MAX + 1).to_bytes(4, "little"))


@pytest.mark.parametrize("kind", [PlacementError, EngineError, PipelineError, OptionError])
def test_an_error_keeps_its_class_on_its_way_to_the_front_end(kind: type[PlacementError]) -> None:
    class Detailed(kind):  # type: ignore[valid-type, misc]
        """A class that is not in the table of exit codes."""

    error = error_of(failed_state(Detailed("What happened.")))
    assert type(error) is kind
    assert str(error) == "What happened."


async def test_the_process_serves_and_leaves_nothing_behind() -> None:
    before = open_files()
    states: list[EngineState] = []
    async with EngineClient.start(engine_options(), states.append) as engine:
        await engine.wait_ready(SECONDS)
        requests = [request(engine.next_request_id(), prompt=i + 1, max_tokens=i + 1) for i in range(30)]
        answers = await asyncio.gather(*(answer(engine.generate(added)) for added in requests))
        assert answers == [reference_answer(added.tokens, added.max_tokens, []) for added in requests]
        counts = await engine.counts()
        assert (counts.waiting, counts.running, counts.steps_in_flight) == (0, 0, 0)
        assert (counts.free_slots, counts.free_blocks) == (counts.slots, counts.blocks)
        process = psutil.Process(engine.pid)
    assert not process.is_running()
    details = [state.sentence for state in states]
    assert "Stage 1 on fake-host: loading, 1 of 2 layers" in details
    assert [state.phase for state in states][-2:] == ["ready", "failed"]
    assert engine.state.detail == "The engine was closed."
    await engine.close()
    # The loop keeps a few of its own, all opened before or with the first subprocess.
    assert len(open_files() - before) <= 1


async def test_closing_or_cancelling_a_stream_aborts_its_request() -> None:
    async with EngineClient.start(engine_options("start_stalling")) as engine:
        await engine.wait_ready(SECONDS)
        async with aclosing(engine.generate(request(0, max_tokens=80))) as stream:
            await asyncio.wait_for(anext(stream), SECONDS)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        never_ends = asyncio.create_task(answer(engine.generate(request(1))))
        counts = await engine.counts()
        assert counts.running + counts.waiting == 1
        never_ends.cancel()
        with pytest.raises(asyncio.CancelledError):
            await never_ends
        counts = await engine.counts()
        assert (counts.running, counts.waiting) == (0, 0)
        assert counts.free_blocks == counts.blocks


async def test_a_stream_that_ended_aborts_nothing_when_it_is_closed() -> None:
    async with EngineClient.start(engine_options()) as engine:
        await engine.wait_ready(SECONDS)
        first = engine.generate(request(0, max_tokens=1))
        assert await answer(first) == reference_answer(request(0).tokens, 1, [])
        again = engine.generate(request(0, max_tokens=3))
        await first.aclose()
        assert await answer(again) == reference_answer(request(0).tokens, 3, [])


async def test_whoever_asks_while_the_process_is_being_started_does_not_come_before_its_options() -> None:
    client = EngineClient(engine_options())

    async def ask() -> Counts:
        while True:
            try:
                return await client.counts()
            except EngineError as error:
                if str(error) != "The engine process was not started.":
                    raise
                await asyncio.sleep(0)

    asking = asyncio.ensure_future(ask())
    try:
        await client.launch()
        assert (await asking).running == 0
        await client.wait_ready(SECONDS)
    finally:
        await client.close()


async def test_requests_are_refused_before_they_reach_the_engine() -> None:
    async with EngineClient.start(engine_options()) as engine:
        with pytest.raises(NotReadyError, match="still loading"):
            engine.generate(request(0))
        await engine.wait_ready(SECONDS)
        with pytest.raises(RequestError, match="over the model's length of 128"):
            engine.generate(request(0, prompt=100, max_tokens=100))
        stream = engine.generate(request(0, max_tokens=60))
        with pytest.raises(ValueError, match="Request 0 is running already"):
            engine.generate(request(0))
        await stream.aclose()


async def test_a_pipeline_that_cannot_start_keeps_its_error() -> None:
    async with EngineClient.start(engine_options("start_refused")) as engine:
        with pytest.raises(PlacementError, match="2 stages need 2 rows, the cluster has 1") as caught:
            await engine.wait_ready(SECONDS)
        assert exit_code(caught.value) == 2
        with pytest.raises(NotReadyError, match="The engine failed: 2 stages need 2 rows"):
            engine.generate(request(0))


async def test_a_broken_pipeline_raises_in_every_stream() -> None:
    async with EngineClient.start(engine_options("start_breaking")) as engine:
        await engine.wait_ready(SECONDS)
        streams = [engine.generate(request(engine.next_request_id())) for _ in range(20)]
        answers = await asyncio.wait_for(asyncio.gather(*map(answer, streams), return_exceptions=True), SECONDS)
        assert [type(each) for each in answers] == [EngineError] * 20
        assert all("Stage 1 on fake-host died at step" in str(each) for each in answers)
        assert engine.state.error_kind == "PipelineError"


async def test_a_probe_tells_of_a_stage_that_does_not_answer() -> None:
    async with EngineClient.start(engine_options()) as engine:
        await engine.wait_ready(SECONDS)
        await engine.probe()
    async with EngineClient.start(engine_options("start_standing")) as engine:
        await engine.wait_ready(SECONDS)
        with pytest.raises(EngineError, match=r"^Stage 1 does not answer\.$"):
            await engine.probe()


async def test_the_death_of_the_process_ends_every_stream() -> None:
    async with EngineClient.start(engine_options("start_stalling")) as engine:
        await engine.wait_ready(SECONDS)
        streams = [asyncio.create_task(answer(engine.generate(request(i)))) for i in range(20)]
        counts = await engine.counts()
        assert counts.running + counts.waiting == 20
        counting = asyncio.create_task(engine.counts(SECONDS))
        os.kill(engine.pid, signal.SIGKILL)
        answers = await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), SECONDS)
        sentence = "The engine process was killed by signal 9, perhaps for want of memory."
        assert all(isinstance(each, EngineError) and sentence in str(each) for each in answers)
        assert engine.state.phase == "failed"
        await asyncio.wait([counting])
        assert counting.exception() is None or isinstance(counting.exception(), EngineError)
        with pytest.raises(NotReadyError, match="The engine failed"):
            engine.generate(request(99))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_are_left_to_the_front_end(number: signal.Signals) -> None:
    async with EngineClient.start(engine_options("start_stalling")) as engine:
        await engine.wait_ready(SECONDS)
        running = asyncio.create_task(answer(engine.generate(request(0))))
        os.kill(engine.pid, number)
        counts = await engine.counts()
        assert (counts.running + counts.waiting, engine.state.phase) == (1, "ready")
        assert not running.done()
    with pytest.raises(EngineError, match="The engine was closed"):
        await running


async def test_waiting_for_an_engine_that_loads_for_ever_has_a_deadline() -> None:
    async with EngineClient.start(engine_options("start_never")) as engine:
        assert (await engine.counts(SECONDS)).running == 0
        with pytest.raises(EngineError, match=r"not ready within 0\.01 s\. Its last state was: Stage 1 on fake-host"):
            await engine.wait_ready(0.01)
    assert engine.state.detail == "The engine was closed."


def test_options_that_do_not_fit_are_refused_before_the_process_starts() -> None:
    with pytest.raises(OptionError, match="13 slots cannot be shared evenly by 3 microbatches"):
        EngineClient(engine_options(slots=13))


FRONT_END = """
import asyncio, sys
from actors.options import ClusterOptions
from api.client.engine_client import EngineClient
from tests.support.engine_fakes import engine_options

async def main():
    async with EngineClient.start(engine_options(sys.argv[1])) as engine:
        if sys.argv[1] != "start_never":
            await engine.wait_ready(20)
        print(engine.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("start", ["start_sound", "start_never"])
def test_the_process_ends_when_the_front_end_was_killed(start: str) -> None:
    with subprocess.Popen([sys.executable, "-c", FRONT_END, start], stdout=subprocess.PIPE, cwd=ROOT) as front_end:
        assert front_end.stdout is not None
        engine = psutil.Process(int(front_end.stdout.readline()))
        front_end.kill()
    deadline = time.monotonic() + SECONDS
    # An orphan may have no parent to reap it: a zombie has ended all the same.
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
async def test_stages_that_really_run_answer_and_end_with_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = engine_options()
    options = msgspec.structs.replace(
        fakes,
        pipeline=msgspec.structs.replace(
            fakes.pipeline,
            hidden_size=HIDDEN_SIZE,
            runner="tests.support.runners:echo",
            cluster=ClusterOptions(start_timeout_s=90),
        ),
        close_timeout_s=30,
        pipeline_start=PIPELINE_START,
    )
    # The path is short, for Ray's unix sockets.
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        monkeypatch.setenv("RAY_TMPDIR", directory)
        async with EngineClient.start(options) as engine:
            await engine.wait_ready(100)
            requests = [request(engine.next_request_id(), prompt=70, max_tokens=30) for _ in range(20)]
            answers = await asyncio.gather(*(answer(engine.generate(added)) for added in requests))
            for added, (tokens, reason) in zip(requests, answers, strict=True):
                # Each of the two stages adds a process.
                assert tokens == [(added.tokens[-1] + 2 * step) % 256 for step in range(1, 31)]
                assert reason == "length"
            processes = psutil.Process(engine.pid).children(recursive=True)
            assert len(processes) > 2
        _, alive = psutil.wait_procs(processes, timeout=SECONDS)
        assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_the_engine_process_imports_neither_torch_nor_transformers() -> None:
    unwanted = "{'torch', 'transformers', 'fastapi'}"
    code = f"import sys, api.engine.engine, actors.deployment; print({unwanted} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert ran.stdout == "set()\n"
