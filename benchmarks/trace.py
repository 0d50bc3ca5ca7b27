"""`python -m benchmarks.trace`: decode steps that are captured once and replayed, beside the same steps as they are.

Two stages of the sample model, each with all of its layers, decode the same tokens in turn in this process.
"""

import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import click
import msgspec
import torch
from rich.table import Table

from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command, bind_process
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.spread import Spread, ratios
from stages import traces
from stages.device import Device
from stages.options import CacheOptions, ExecutionOptions, StageOptions
from stages.pending import drawn
from stages.plan import plan_stages
from stages.stage import Stage
from stages.step import Admission, Mode, SamplingParams, Segment, Step
from weights.model_config import ModelConfig
from weights.sample import SAMPLE_DIR
from weights.sizes import ceil_div

BATCHES = [1, 8, 32]
SHORT_BATCHES = [1, 2]
TURNS = 9
STEPS = 40
"""The steps of a turn."""
SHORT_STEPS = 3
BLOCK = 32
FASTER_MIN = 1.1
"""The least ratio of a plain step to a replayed one for a single user that differs from noise."""

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0)


class TraceRow(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a step of `batch` users, and the ratio of the plain step to the replayed one."""

    batch: int
    plain_ms: Spread
    replayed_ms: Spread
    faster: Spread


class Decoding:
    """A stage that is the whole model, with `users` requests that it decodes."""

    def __init__(self, users: int, max_model_len: int, *, enable_trace: bool, cache_dir: Path) -> None:
        blocks = ceil_div(max_model_len, BLOCK)
        cache = CacheOptions(slots=users, pools=1, blocks=blocks * users, block_size=BLOCK, max_model_len=max_model_len)
        options = StageOptions(
            model_path=str(SAMPLE_DIR),
            cache_dir=str(cache_dir),
            dtype="float32",
            seed=0,
            cache=cache,
            execution=ExecutionOptions(enable_trace=enable_trace),
        )
        [spec] = plan_stages(ModelConfig.from_file(SAMPLE_DIR / "config.json"), 1)
        self._stage = Stage.load(spec, options, lambda _done, _of: None)
        self._users = users
        self._blocks = blocks
        self._position = 0
        admissions = [
            Admission(slot=slot, sampling=GREEDY, tokens=[slot + 1], prompt_tokens=1) for slot in range(users)
        ]
        self._run("prefill", admissions)

    def seconds(self, steps: int) -> float:
        """The mean seconds of each of `steps` steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self._run("decode", [])
        return (time.perf_counter() - began) / steps

    def close(self) -> None:
        """Closes the stage."""
        self._stage.close()

    def _run(self, mode: Mode, admissions: list[Admission]) -> None:
        at = self._position
        segments = [
            Segment(slot=slot, start=at, tokens=[1 + slot + at], new_blocks=self._new_blocks(slot), sample=True)
            for slot in range(self._users)
        ]
        step = Step(epoch=1, step_id=at, mode=mode, segments=segments, admissions=admissions, ended=[])
        drawn(self._stage.step(step, memoryview(b"")))
        self._position += 1

    def _new_blocks(self, slot: int) -> list[int]:
        return [] if self._position % BLOCK else [slot * self._blocks + self._position // BLOCK]


def measure(batch: int, turns: int, steps: int) -> TraceRow:
    """Measures both kinds of steps in `turns` turns, after one that is not counted."""
    length = (turns + 1) * steps + 1
    with tempfile.TemporaryDirectory(prefix="trace-") as name:
        replayed = Decoding(batch, length, enable_trace=True, cache_dir=Path(name))
        # Without the option the device would capture these steps too, a little later.
        with unittest.mock.patch.object(traces, "EAGER_STEPS", sys.maxsize):
            plain = Decoding(batch, length, enable_trace=False, cache_dir=Path(name))
        times = [(plain.seconds(steps), replayed.seconds(steps)) for _ in range(turns + 1)][1:]
        plain.close()
        replayed.close()
    of_plain, of_replayed = zip(*times, strict=True)
    return TraceRow(
        batch=batch,
        plain_ms=Spread.of(of_plain).scaled(1e3),
        replayed_ms=Spread.of(of_replayed).scaled(1e3),
        faster=ratios(of_plain, of_replayed),
    )


def _table(rows: list[TraceRow]) -> Table:
    table = table_of("users", "plain step, ms", "replayed step, ms", "plain / replayed")
    for row in rows:
        table.add_row(str(row.batch), str(row.plain_ms), str(row.replayed_ms), str(row.faster))
    return table


@benchmark_command("trace")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of the stage.")
def main(short: bool, device: Device, out: Path, threads: int) -> None:
    """Time decode steps that are replayed from a trace, beside the same steps as they are.

    Medians of turns, and the quartiles between which half of the turns lie.
    """
    bind_process(device)
    torch.set_num_threads(threads)
    machine = Machine.here()
    batches, turns, steps = (SHORT_BATCHES, 2, SHORT_STEPS) if short else (BATCHES, TURNS, STEPS)
    rows = [measure(batch, turns, steps) for batch in batches]
    targets = [
        Target(name="plain step / replayed step, 1 user", bound=FASTER_MIN, figure=rows[0].faster.median, is_floor=True)
    ]
    report = Report(benchmark="trace", device=device, short=short, machine=machine, rows=rows, targets=targets)
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.trace")
