"""How much is measured, the prompts, and what is found in each case."""

from collections.abc import Sequence

import msgspec

from api.messages.engine import DraftCounts
from api.messages.pipeline_view import DraftView
from benchmarks.support.spread import Spread, ratios
from weights.sample.spans import entries

DRAFTS = 1
"""Drafts of a request and step: the sample's layer was trained for one, as R1's."""

PROMPT_WORDS = (12, 30, 48, 66)
"""The words of each story that are given; the sample goes on with it by heart for longer than an answer."""


DraftTally = DraftCounts | DraftView
"""What drafts have come to, by a scheduler or by a server."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured: the pipelines, their users, tokens of an answer, and turns.

    `process_users` share one stage in one process for `process_turns`.
    """

    stages: tuple[int, ...] = (1, 4)
    users: tuple[int, ...] = (1, 8, 32)
    tokens: int = 96
    turns: int = 7
    process_users: int = 32
    process_turns: int = 16


SHORT = Load(stages=(2,), users=(1, 8), tokens=16, turns=1, process_users=8, process_turns=2)


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """The answers that came in a turn, by their token ids, and the seconds that it took.

    In one process these are seconds of its processor time.
    """

    answers: list[list[int]]
    seconds: float

    @property
    def tokens(self) -> int:
        """The tokens of all answers."""
        return sum(map(len, self.answers))

    @property
    def tokens_per_s(self) -> float:
        """The tokens of all answers in each second."""
        return self.tokens / self.seconds


class DraftsRow(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens a second in one case with drafts and without, and the ratio of each turn.

    `overall` is the ratio of all tokens over all seconds, in which a turn with a trial of drafts counts as any other.
    `drafted` is the share of the requests' steps that verified drafts, and such a step gave `tokens_per_draft`.
    """

    case: str
    stages: int
    users: int
    drafted: float
    tokens_per_draft: float
    with_drafts: Spread
    without: Spread
    times: Spread
    overall: float


class UnequalAnswersError(Exception):
    """Drafts have changed an answer, which they never may."""


def prompts() -> list[str]:
    """Beginnings of the sample's own stories: each story's first words, then more of them."""
    return [" ".join(story.split(" ")[:words]) for words in PROMPT_WORDS for story in entries("stories.txt")]


def row_of(
    case: str, stages: int, users: int, turns: Sequence[tuple[Turn, Turn]], tallies: tuple[DraftTally, DraftTally]
) -> DraftsRow:
    """The figures of turns with drafts and without, and of what was counted before and after them.

    Raises UnequalAnswersError.
    """
    for drafted, plain in turns:
        if drafted.answers != plain.answers:
            raise UnequalAnswersError(f"{case}, {stages} stages, {users} users: answers with drafts are others.")
    speeds = [drafted.tokens_per_s for drafted, _ in turns]
    plain_speeds = [plain.tokens_per_s for _, plain in turns]
    before, after = tallies
    drafts = after.drafts - before.drafts
    accepted = after.accepted_tokens - before.accepted_tokens
    # A prompt gives an answer's first token.
    steps = sum(drafted.tokens - len(drafted.answers) for drafted, _ in turns) - accepted
    return DraftsRow(
        case=case,
        stages=stages,
        users=users,
        drafted=drafts / steps,
        tokens_per_draft=1 + accepted / drafts if drafts else 1.0,
        with_drafts=Spread.of(speeds),
        without=Spread.of(plain_speeds),
        times=ratios(speeds, plain_speeds),
        overall=sum(plain.seconds for _, plain in turns) / sum(drafted.seconds for drafted, _ in turns),
    )
