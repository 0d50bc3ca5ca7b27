"""What a run of the chaos benchmark found, in numbers, and the bounds that it has to keep."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.chaos.faults import FaultRow
from benchmarks.chaos.load import Totals
from benchmarks.support.report import Target

RECOVERY_P50_MAX_S = 5.0
RSS_SLOPE_MAX = 1.0
"""Percent a minute."""
FAULTS_A_MINUTE_MIN = 5


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The last line of the output; `chats` are those of the requests that were for a message.

    Recoveries are in seconds, from the fault to the first token after it; those of the server are by its log, from the
    detection of the fault until it is ready. Slopes are in percent a minute.
    """

    seconds: float
    requests: int
    chats: int
    aborted: int
    tokens: int
    faults: dict[str, int]
    client_errors: int
    tokens_lost: int
    tokens_repeated: int
    tokens_changed: int
    messages_damaged: int
    recovery_p50_s: float
    recovery_p99_s: float
    server_recovery_p50_s: float
    server_recovery_p99_s: float
    recoveries: int
    restarts: int
    draft_tokens: int
    rss_percent_per_minute: dict[str, float]
    leaks: dict[str, int]
    failure: str | None


class Findings(msgspec.Struct, kw_only=True):
    """The findings of a run, filled in while it goes on."""

    seconds: float = 0.0
    totals: Totals = msgspec.field(default_factory=Totals)
    faults: list[FaultRow] = []
    restarts: int = 0
    draft_tokens: int = 0
    slopes: dict[str, float] = {}
    leaks: dict[str, int] = {}
    server_recoveries: list[float] = []
    failure: str | None = None

    def summary(self) -> Summary:
        """The findings in numbers."""
        totals = self.totals
        recoveries = [row.recovery_s for row in self.faults if row.recovery_s is not None]
        return Summary(
            seconds=round(self.seconds, 1),
            requests=totals.requests,
            chats=totals.chats,
            aborted=totals.aborted,
            tokens=totals.tokens,
            faults=dict(Counter(row.kind for row in self.faults)),
            client_errors=len(totals.errors),
            tokens_lost=totals.lost,
            tokens_repeated=totals.repeated,
            tokens_changed=totals.changed,
            messages_damaged=totals.messages,
            recovery_p50_s=percentile(recoveries, 50),
            recovery_p99_s=percentile(recoveries, 99),
            server_recovery_p50_s=percentile(self.server_recoveries, 50),
            server_recovery_p99_s=percentile(self.server_recoveries, 99),
            recoveries=len(self.server_recoveries),
            restarts=self.restarts,
            draft_tokens=self.draft_tokens,
            rss_percent_per_minute={name: round(slope, 3) for name, slope in self.slopes.items()},
            leaks=self.leaks,
            failure=self.failure,
        )


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a run; times are in seconds."""

    seconds: float
    seed: int
    clients: int
    stages: int
    has_faults: bool
    pause_s: float


def recoveries_in(log: Path) -> list[float]:
    """Seconds that each recovery took, by the server's log."""
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            record = msgspec.json.decode(line)
            if isinstance(record, dict) and record.get("event") == "the pipeline is back":
                found.append(float(record["seconds"]))
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    """The percentile of `values` as one of them, without interpolation; 0 if there are none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 3)


def losses_of(run: Run, summary: Summary) -> list[Target]:
    """The bounds that every run has to keep, on any machine."""
    losses = [
        Target(name="client errors", bound=0, figure=summary.client_errors),
        Target(name="tokens lost", bound=0, figure=summary.tokens_lost),
        Target(name="tokens repeated", bound=0, figure=summary.tokens_repeated),
        Target(name="tokens changed", bound=0, figure=summary.tokens_changed),
        Target(name="messages damaged", bound=0, figure=summary.messages_damaged),
        Target(name="things held on to", bound=0, figure=sum(summary.leaks.values())),
        Target(name="did not get to its end", bound=0, figure=summary.failure is not None),
        Target(name="tokens of drafts", bound=1, figure=summary.draft_tokens, is_floor=True),
    ]
    if run.has_faults:
        return losses
    return [*losses, Target(name="recoveries", bound=0, figure=summary.recoveries)]


def speeds_of(run: Run, summary: Summary) -> list[Target]:
    """The bounds that a run has to keep if it is long enough to measure them, on a machine without other load."""
    slopes = [
        Target(name=f"RSS of the {name}, % a minute", bound=RSS_SLOPE_MAX, figure=slope)
        for name, slope in summary.rss_percent_per_minute.items()
    ]
    if not run.has_faults:
        return slopes
    faults = sum(summary.faults.values())
    return [
        *slopes,
        Target(name="recovery p50, s", bound=RECOVERY_P50_MAX_S, figure=summary.recovery_p50_s),
        Target(name="faults", bound=int(FAULTS_A_MINUTE_MIN * run.seconds / 60), figure=faults, is_floor=True),
    ]
