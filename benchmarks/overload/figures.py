"""The figures of overload, from the notes of clients that came at a given rate."""

import math
from collections.abc import Sequence

import msgspec

from benchmarks.overload.open_loop_client import Notes, Outcome
from benchmarks.support.spread import Spread

TOO_MANY = 429


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """The capacity of a pipeline.

    It has `slots` for requests, and a queue for `queued` more; it makes `tokens_per_s` with all slots in use, and each
    request has `tokens`.
    """

    slots: int
    queued: int
    tokens_per_s: float
    tokens: int

    @property
    def requests_per_s(self) -> float:
        """The requests a second that it can serve."""
        return self.tokens_per_s / self.tokens


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a load: the clients' notes, processor time in cores, and resident bytes before and after."""

    notes: Notes
    client: float
    front_end: float
    engine: float
    memory: int
    memory_after: int

    @property
    def asked(self) -> list[Outcome]:
        """The requests of the measured time."""
        notes = self.notes
        return [outcome for outcome in notes.outcomes if notes.began_s <= outcome.asked_s < notes.ended_s]

    @property
    def seconds(self) -> float:
        """The measured time in seconds."""
        return self.notes.ended_s - self.notes.began_s

    @property
    def goodput(self) -> float:
        """Tokens a second that came in the measured time, including those of earlier requests."""
        notes = self.notes
        came = sum(notes.began_s <= at < notes.ended_s for outcome in notes.outcomes for at in outcome.tokens_s)
        return came / self.seconds

    @property
    def refusals(self) -> list[Outcome]:
        """The requests of the measured time that were refused with 429."""
        return [outcome for outcome in self.asked if outcome.status == TOO_MANY]

    @property
    def failures(self) -> int:
        """The number of requests of the measured time that got neither a stream nor a refusal."""
        return sum(outcome.status not in {0, 200, TOO_MANY} for outcome in self.asked)

    @property
    def first_token_s(self) -> float:
        """The 99th percentile of the seconds to the first token, for all first tokens in the measured time."""
        waits = sorted(
            outcome.tokens_s[0] - outcome.asked_s
            for outcome in self.notes.outcomes
            if outcome.tokens_s and outcome.tokens_s[0] >= self.notes.began_s
        )
        return waits[math.ceil(0.99 * len(waits)) - 1] if waits else math.inf

    @property
    def with_retry_after(self) -> float:
        """The share of refusals that have a Retry-After; 1 without refusals."""
        refusals = self.refusals
        return sum(refusal.retry_after_s is not None for refusal in refusals) / len(refusals) if refusals else 1.0


class OverloadRow(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one load, which is a multiple of the capacity.

    `asked` is in requests a second and `goodput` in tokens a second; `refused` is the share of requests, and `failed`
    the number that got another answer. The rest is as in `Turn`."""

    load: float
    asked: Spread
    goodput: Spread
    refused: Spread
    failed: Spread
    with_retry_after: Spread
    first_token_s: Spread
    client: Spread
    front_end: Spread
    engine: Spread
    memory_growth: Spread


def row_of(load: float, turns: Sequence[Turn]) -> OverloadRow:
    """The figures of a load's turns."""
    return OverloadRow(
        load=load,
        asked=Spread.of([len(turn.asked) / turn.seconds for turn in turns]),
        goodput=Spread.of([turn.goodput for turn in turns]),
        refused=Spread.of([len(turn.refusals) / len(turn.asked) for turn in turns]),
        failed=Spread.of([float(turn.failures) for turn in turns]),
        with_retry_after=Spread.of([turn.with_retry_after for turn in turns]),
        first_token_s=Spread.of([turn.first_token_s for turn in turns]),
        client=Spread.of([turn.client for turn in turns]),
        front_end=Spread.of([turn.front_end for turn in turns]),
        engine=Spread.of([turn.engine for turn in turns]),
        memory_growth=Spread.of([turn.memory_after / turn.memory for turn in turns]),
    )
