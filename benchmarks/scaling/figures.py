"""The figures of a scaling run: rows, targets, the chart and the table."""

from collections.abc import Sequence
from itertools import filterfalse

import msgspec
from rich.table import Table

from benchmarks.scaling.case import EQUAL, R1, SAMPLE
from benchmarks.scaling.ideal import percentile
from benchmarks.scaling.line_chart import line_chart
from benchmarks.scaling.run import Run
from benchmarks.support.report import Target, table_of

SMALL_FLOOR, LARGE_FLOOR = 0.95, 0.90
LARGE_STAGES = 32
"""The number of stages from which LARGE_FLOOR is the floor."""
GAP_STAGES = 16
GAP_MAX = 1.1
CLIENTS_SHARE_MAX = 0.2


class ScalingRow(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one pipeline.

    Throughput is in tokens a second: measured, ideal for the slowest stage, ideal for equal stages of the same sum, and
    that at which all cores would be busy. `slowest_measured_ms` is the measured time of the slowest stage's decode
    steps. Processor time is in microseconds: of a stage's actor and of the engine per step, of the front end per token;
    `clients_share` is the share of all cores that front end and clients take. Then there are the seconds to the first
    token of requests beside the load, and from token to token. `busy_shares` are the shares of time that stages
    compute."""

    name: str
    stages: int
    microbatches: int
    users: int
    slowest_stage_ms: float
    slowest_measured_ms: float
    tokens_per_s: float
    ideal_tokens_per_s: float
    equal_tokens_per_s: float
    processor_tokens_per_s: float
    over_ideal: float
    over_equal: float
    hop_us: float
    engine_us: float
    front_end_us: float
    clients_share: float
    first_token_p50_s: float
    first_token_p99_s: float
    first_token_ideal_s: float
    gap_p50_s: float
    gap_p99_s: float
    gap_ideal_s: float
    gap_over_stages: float
    busy_shares: list[float]


def row(run: Run, cores: int) -> ScalingRow:
    """The figures of a run on `cores` cores."""
    case, ideal, times = run.case, run.ideal, run.times
    seconds = times.ended_s - times.began_s
    steps = run.after.steps - run.before.steps
    front_end_s = run.after.front_end_s - run.before.front_end_s
    client_s = run.after.client_s - run.before.client_s
    engine_s = run.after.engine_s - run.before.engine_s
    stages_s = run.after.stages_s - run.before.stages_s
    step_s = (front_end_s + engine_s + stages_s) / steps
    gap = percentile(times.gaps, 0.5)
    return ScalingRow(
        name=case.name,
        stages=case.stages,
        microbatches=ideal.microbatches,
        users=ideal.users,
        slowest_stage_ms=max(ideal.decode_s) * 1e3,
        slowest_measured_ms=max(run.of_steps.decode_s) * 1e3,
        tokens_per_s=times.tokens_per_s,
        ideal_tokens_per_s=ideal.tokens_per_s,
        equal_tokens_per_s=ideal.equal_tokens_per_s,
        processor_tokens_per_s=cores / step_s * times.tokens / steps,
        over_ideal=times.tokens_per_s / ideal.tokens_per_s,
        over_equal=times.tokens_per_s / ideal.equal_tokens_per_s,
        hop_us=stages_s / steps / case.stages * 1e6,
        engine_us=engine_s / steps * 1e6,
        front_end_us=front_end_s / times.tokens * 1e6,
        clients_share=(front_end_s + client_s) / seconds / cores,
        first_token_p50_s=percentile(times.probes, 0.5),
        first_token_p99_s=percentile(times.probes, 0.99),
        first_token_ideal_s=ideal.first_token_s,
        gap_p50_s=gap,
        gap_p99_s=percentile(times.gaps, 0.99),
        gap_ideal_s=ideal.cycle_s,
        gap_over_stages=gap / sum(ideal.decode_s),
        busy_shares=[stage.busy_share for stage in run.after.view.stages],
    )


def targets(rows: Sequence[ScalingRow]) -> list[Target]:
    """The targets of equal stages on the timed device; empty without such rows."""
    equal = [row for row in rows if row.name.startswith(EQUAL)]
    found = [
        Target(
            name=f"tokens/s over ideal, {row.stages} stages of {row.slowest_stage_ms:g} ms",
            bound=LARGE_FLOOR if row.stages >= LARGE_STAGES else SMALL_FLOOR,
            figure=row.over_ideal,
            is_floor=True,
        )
        for row in equal
        if not _has_fewest(row)
    ]
    found += [
        Target(
            name=f"token to token over stages x stage time, {row.stages} stages, {row.microbatches} microbatches",
            bound=GAP_MAX,
            figure=row.gap_over_stages,
        )
        for row in equal
        if row.stages == GAP_STAGES
    ]
    if equal:
        share = max(row.clients_share for row in equal)
        found.append(Target(name="share of the cores of clients and front end", bound=CLIENTS_SHARE_MAX, figure=share))
    return found


def _has_fewest(row: ScalingRow) -> bool:
    """Whether a pipeline has the fewest microbatches, which shows the best latency and not the best throughput."""
    return 1 < row.stages == row.microbatches


def chart(rows: Sequence[ScalingRow]) -> str:
    """An SVG of measured tokens a second over both ideals, by the number of stages."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for measured in filterfalse(_has_fewest, rows):
        kind = next(kind for kind in (EQUAL, R1, SAMPLE) if measured.name.startswith(kind))
        lines.setdefault(f"{kind} / ideal", []).append((measured.stages, measured.over_ideal))
        if kind != EQUAL:
            lines.setdefault(f"{kind} / ideal if even", []).append((measured.stages, measured.over_equal))
    return line_chart("tokens/s over the ideal", lines)


def table(rows: Sequence[ScalingRow]) -> Table:
    """The rows as a table.

    Microbatches, and measured times of the slowest stage, are in brackets; TTFT and ITL are given as median, 99th
    percentile and ideal.
    """
    table = table_of(
        "pipeline",
        "stages",
        "slowest, ms",
        "tokens/s",
        "/ ideal",
        "/ even",
        "if CPU-bound",
        "us a hop",
        "TTFT, ms",
        "ITL, ms",
        "busy",
    )
    for row in rows:
        first = (row.first_token_p50_s, row.first_token_p99_s, row.first_token_ideal_s)
        gap = (row.gap_p50_s, row.gap_p99_s, row.gap_ideal_s)
        table.add_row(
            row.name,
            f"{row.stages} ({row.microbatches})",
            f"{row.slowest_stage_ms:.3g} ({row.slowest_measured_ms:.3g})",
            f"{row.tokens_per_s:.4g}",
            f"{row.over_ideal:.3f}",
            f"{row.over_equal:.3f}",
            f"{row.processor_tokens_per_s:.0f}",
            f"{row.hop_us:.0f}",
            "/".join(f"{seconds * 1e3:.0f}" for seconds in first),
            "/".join(f"{seconds * 1e3:.0f}" for seconds in gap),
            f"{min(row.busy_shares):.2f}-{max(row.busy_shares):.2f}",
        )
    return table
