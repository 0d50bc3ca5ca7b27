"""`python -m benchmarks.model`: tokens a second and time to the first token, beside Hugging Face's `generate`.

All contenders run one checkpoint of random weights in bfloat16, with as many threads, greedily, and none stops early.
This program is used through its engine, as its own HTTP server does.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import click
import msgspec
import uvloop
from rich.table import Table

from api.settings.engine import EngineSettings
from benchmarks.checkpoint import SIZES, write_checkpoint
from benchmarks.model.contender import Contender, TokenTimes, prefill_tokens_per_s, random_prompts
from benchmarks.model.galaxyline_engine import galaxyline_engine
from benchmarks.model.hugging_face import hugging_face
from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.spread import Spread, ratios
from stages.device import Device

ONE_STAGE = "one stage"
TWO_STAGES = "two stages"
HUGGING_FACE = "Hugging Face"
THREADS = 2
MICROBATCH = 32
MAX_MODEL_LEN = 1024
REPETITIONS = 3


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A batch of prompts of `prompt` tokens each, and the number of new tokens by contender, enough to measure it."""

    name: str
    batch: int
    prompt: int
    new_tokens: Mapping[str, int]

    @property
    def is_prefill(self) -> bool:
        """Whether only the prompt is measured."""
        return max(self.new_tokens.values()) == 1

    def figure(self, prompts: Sequence[list[int]], times: TokenTimes) -> float:
        """The tokens a second that are measured in this case."""
        return prefill_tokens_per_s(prompts, times) if self.is_prefill else times.decode_tokens_per_s


PREFILL = Case(name="prefill", batch=1, prompt=512, new_tokens={ONE_STAGE: 1, HUGGING_FACE: 1})
DECODE_1 = Case(name="decode", batch=1, prompt=128, new_tokens={ONE_STAGE: 48, HUGGING_FACE: 16})
DECODE_8 = Case(name="decode", batch=8, prompt=128, new_tokens={ONE_STAGE: 48, HUGGING_FACE: 6})
DECODE_32 = Case(name="decode", batch=32, prompt=128, new_tokens={ONE_STAGE: 64, TWO_STAGES: 64, HUGGING_FACE: 4})
DECODE_64 = Case(name="decode", batch=64, prompt=128, new_tokens={TWO_STAGES: 80})
CASES = [PREFILL, DECODE_1, DECODE_8, DECODE_32, DECODE_64]
SHORT_CASES = [
    Case(name="prefill", batch=1, prompt=64, new_tokens={ONE_STAGE: 1, HUGGING_FACE: 1}),
    Case(name="decode", batch=2, prompt=32, new_tokens={ONE_STAGE: 8, HUGGING_FACE: 4}),
]


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one contender in one case; `beside_hugging_face` is the ratio of tokens a second, turn by turn."""

    contender: str
    case: str
    batch: int
    prompt: int
    tokens_per_s: Spread
    first_token_s: Spread
    beside_hugging_face: Spread | None


class Turn(msgspec.Struct, frozen=True):
    """One measurement of one contender in one case."""

    tokens_per_s: float
    first_token_s: float


Turns = dict[tuple[str, str, int], list[Turn]]
"""The turns by contender, case and batch."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a run."""

    model: Path
    vocabulary: int
    cases: list[Case]
    repetitions: int
    threads: int
    device: Device
    cache_dir: Path


async def measure(plan: Plan) -> Turns:
    """Measures all cases `plan.repetitions` times; contenders take turns in each case."""
    turns: Turns = {}
    async with contenders(plan) as running:
        for contender in running.values():
            await contender.complete(random_prompts(4, plan.cases[0].prompt, plan.vocabulary, seed=-1), 2)
        for repetition in range(plan.repetitions):
            for case in plan.cases:
                prompts = random_prompts(case.batch, case.prompt, plan.vocabulary, seed=repetition)
                for name, new_tokens in case.new_tokens.items():
                    times = await running[name].complete(prompts, new_tokens)
                    turn = Turn(case.figure(prompts, times), times.first_token_s)
                    turns.setdefault((name, case.name, case.batch), []).append(turn)
    return turns


@contextlib.asynccontextmanager
async def contenders(plan: Plan) -> AsyncIterator[dict[str, Contender]]:
    """Starts the contenders that any case needs, by name."""
    one = EngineSettings.of(
        cache_dir=plan.cache_dir,
        stages=1,
        max_num_seqs=MICROBATCH,
        max_model_len=MAX_MODEL_LEN,
        dtype="bfloat16",
        device=plan.device,
        spare=False,
    )
    two = one.but(stages=2, microbatches=2, max_num_seqs=2 * MICROBATCH)
    starts: dict[str, Callable[[], AbstractAsyncContextManager[Contender]]] = {
        ONE_STAGE: lambda: galaxyline_engine(plan.model, one),
        TWO_STAGES: lambda: galaxyline_engine(plan.model, two),
        HUGGING_FACE: lambda: hugging_face(plan.model, plan.threads),
    }
    asked = {name for case in plan.cases for name in case.new_tokens}
    async with contextlib.AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(start()) for name, start in starts.items() if name in asked}


def rows_of(plan: Plan, turns: Turns) -> list[ModelRow]:
    """The figures of each contender in each case."""
    rows = []
    for case in plan.cases:
        beside = turns.get((HUGGING_FACE, case.name, case.batch))
        for name in case.new_tokens:
            own = turns[name, case.name, case.batch]
            speeds = [turn.tokens_per_s for turn in own]
            rows.append(
                ModelRow(
                    contender=name,
                    case=case.name,
                    batch=case.batch,
                    prompt=case.prompt,
                    tokens_per_s=Spread.of(speeds),
                    first_token_s=Spread.of([turn.first_token_s for turn in own]),
                    beside_hugging_face=ratios(speeds, [turn.tokens_per_s for turn in beside]) if beside else None,
                )
            )
    return rows


BESIDE_HUGGING_FACE = [(PREFILL, 1.0), (DECODE_1, 1.5), (DECODE_32, 5.0)]
"""The least ratios of one stage's tokens a second to Hugging Face's, by case."""

TWO_STAGES_SHARE = 0.85
"""The least ratio of the tokens a second of two stages of one thread each to those of one stage, with 32 users a
microbatch."""


def targets_of(turns: Turns) -> list[Target]:
    """The targets of a full run."""
    speeds = {key: [turn.tokens_per_s for turn in of_key] for key, of_key in turns.items()}
    targets = [
        Target(
            name=f"one stage / Hugging Face, {case.name}, batch {case.batch}",
            bound=bound,
            figure=ratios(speeds[ONE_STAGE, case.name, case.batch], speeds[HUGGING_FACE, case.name, case.batch]).median,
            is_floor=True,
        )
        for case, bound in BESIDE_HUGGING_FACE
    ]
    two, one = speeds[TWO_STAGES, "decode", 2 * MICROBATCH], speeds[ONE_STAGE, "decode", MICROBATCH]
    share = ratios(two, one).median
    name = f"two stages, batch {2 * MICROBATCH} / one stage, batch {MICROBATCH}"
    return [*targets, Target(name=name, bound=TWO_STAGES_SHARE, figure=share, is_floor=True)]


def _table(rows: Sequence[ModelRow]) -> Table:
    table = table_of("case", "contender", "tokens/s", "first token, s", "times Hugging Face")
    for row in rows:
        case = f"{row.case}, batch {row.batch}, prompt {row.prompt}"
        beside = "" if row.beside_hugging_face is None else str(row.beside_hugging_face)
        table.add_row(case, row.contender, str(row.tokens_per_s), str(row.first_token_s), beside)
    return table


@benchmark_command("model")
@click.option("--threads", type=click.IntRange(min=1), default=THREADS, show_default=True, help="Of each contender.")
@click.option(
    "--repetitions", type=click.IntRange(min=1), default=REPETITIONS, show_default=True, help="Turns of each case."
)
def main(short: bool, device: Device, out: Path, threads: int, repetitions: int) -> None:
    """Measure tokens a second and time to the first token, beside Hugging Face's generate.

    Medians of repetitions, and the quartiles between which half of them lie.
    """
    machine = Machine.here()
    # Processes started from here on have these cores only, so that the one stage has as many threads as requested.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    size = "tiny" if short else "mini576"
    plan = Plan(
        model=write_checkpoint(size, out / size),
        vocabulary=SIZES[size].vocab_size,
        cases=SHORT_CASES if short else CASES,
        repetitions=1 if short else repetitions,
        threads=threads,
        device=device,
        cache_dir=out / "weights",
    )
    turns = uvloop.run(measure(plan))
    rows = rows_of(plan, turns)
    targets = [] if short else targets_of(turns)
    report = Report(benchmark="model", device=device, short=short, machine=machine, rows=rows, targets=targets)
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.model")
