"""The run of one pipeline under steady load: its server, its clients, and the counters of both in the measured time."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import psutil

from api.messages.pipeline_view import PipelineView
from benchmarks.scaling.case import SLOTS, Case
from benchmarks.scaling.ideal import Ideal
from benchmarks.scaling.steady_client import SteadyTimes
from benchmarks.support.ports import free_port
from benchmarks.support.server_process import ServerProcesses, processor_seconds, running_server
from benchmarks.support.stream_client import StreamError
from stages.device import Device

CLIENT_SECONDS = 600.0
STEP_SECONDS = re.compile(r'^galaxyline:stage_step_seconds_(count|sum)\{.*mode="(\w+)",stage="(\d+)"\} (\S+)$', re.M)

GENERATED = re.compile(r"^vllm:generation_tokens_total\{.*\} (\S+)$", re.M)


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of warming up and of measuring, and the number of probe requests beside the load."""

    warm_s: float
    measured_s: float
    probes: int


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """The counters at one moment: seconds of processor time, and the pipeline's view of itself.

    Clients count events; the server has made so many `tokens` by the moment `at_s` of a clock.
    """

    client_s: float
    front_end_s: float
    engine_s: float
    stages_s: float
    view: PipelineView
    tokens: float
    at_s: float

    @property
    def steps(self) -> int:
        """The number of steps that the last stage has done."""
        return self.view.stages[-1].steps_done


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The measurement of a case: counters at its beginning and at its end, and the clients' notes.

    `ideal` follows from the given or predicted times, `of_steps` from the measured times of steps.
    """

    case: Case
    ideal: Ideal
    of_steps: Ideal
    before: Counters
    after: Counters
    times: SteadyTimes


def measure(case: Case, device: Device, cache_dir: Path, effort: Effort, timeline: Path | None = None) -> Run:
    """Starts the server, measures and ends it. Raises ServerError or StreamError."""
    port = free_port()
    command = [sys.executable, "-m", "api.cli", "serve", "--port", str(port), "--device", device]
    command += ["--model", case.model, "--stages", str(case.stages), "--max-num-seqs", str(SLOTS * case.microbatches)]
    command += ["--microbatches", str(case.microbatches)]
    command += ["--cache-dir", str(cache_dir), *case.options, "--no-spare"]
    if timeline is not None:
        command += ["--timeline", str(timeline)]
    with running_server(command, port, case.stages) as server, _clients(server, case, effort) as clients:
        return _measured(case, server, clients)


def _measured(case: Case, server: ServerProcesses, clients: "subprocess.Popen[str]") -> Run:
    if clients.stdout is None:
        raise StreamError("The clients have no output.")
    _await(clients.stdout.readline(), "begins")
    before, steps_before = _counters(server, clients.pid)
    _await(clients.stdout.readline(), "ended")
    after, steps_after = _counters(server, clients.pid)
    times = msgspec.json.decode(clients.stdout.readline(), type=SteadyTimes)
    of_steps = _ideal_of_steps(case, steps_before, steps_after)
    return Run(case=case, ideal=case.ideal or of_steps, of_steps=of_steps, before=before, after=after, times=times)


@contextmanager
def _clients(server: ServerProcesses, case: Case, effort: Effort) -> Iterator["subprocess.Popen[str]"]:
    shape = (case.streams, case.tokens, effort.warm_s, effort.measured_s, effort.probes)
    command = [sys.executable, "-m", "benchmarks.scaling.steady_client", server.url, *map(str, shape)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as clients:
        try:
            yield clients
            code = clients.wait(CLIENT_SECONDS)
        finally:
            clients.kill()
    if code:
        raise StreamError(f"The clients ended with exit code {code}; their own error is above.")


def _await(line: str, moment: str) -> None:
    if line.strip() != moment:
        raise StreamError("The clients ended before all was measured; their own error is above.")


StepSeconds = dict[tuple[str, int], tuple[float, float]]
"""The number of steps and their seconds together, by mode and stage."""


def _counters(server: ServerProcesses, client: int) -> tuple[Counters, StepSeconds]:
    metrics, at_s = httpx.get(f"{server.url}/metrics", timeout=CLIENT_SECONDS).text, time.monotonic()
    view = msgspec.json.decode(httpx.get(f"{server.url}/pipeline", timeout=CLIENT_SECONDS).content, type=PipelineView)
    counters = Counters(
        client_s=processor_seconds(psutil.Process(client)),
        front_end_s=processor_seconds(server.front_end),
        engine_s=sum(map(processor_seconds, server.engines)),
        stages_s=sum(map(processor_seconds, server.stages)),
        view=view,
        tokens=generated_tokens(metrics),
        at_s=at_s,
    )
    return counters, step_seconds(metrics)


def generated_tokens(metrics: str) -> float:
    """The tokens that all engines have made, by a server's metrics."""
    return sum(map(float, GENERATED.findall(metrics)))


def step_seconds(metrics: str) -> StepSeconds:
    """Parses the times of steps from a server's metrics."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for kind, mode, stage, value in STEP_SECONDS.findall(metrics):
        found.setdefault((mode, int(stage)), {})[kind] = float(value)
    return {key: (values["count"], values["sum"]) for key, values in found.items()}


def _ideal_of_steps(case: Case, before: StepSeconds, after: StepSeconds) -> Ideal:
    """The ideal with the mean times of decode steps between two moments, and of all prefill steps so far."""

    def decode_s(stage: int) -> float:
        (steps, seconds), (more, longer) = before["decode", stage], after["decode", stage]
        return (longer - seconds) / (more - steps)

    def prefill_s(stage: int) -> float:
        steps, seconds = after["prefill", stage]
        return seconds / steps

    stages = range(case.stages)
    return Ideal(
        decode_s=[decode_s(stage) for stage in stages],
        prefill_s=[prefill_s(stage) for stage in stages],
        microbatches=case.microbatches,
        users=case.users,
    )
