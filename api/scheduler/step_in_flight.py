"""A step whose result is awaited: who is in it, and what the result has for each."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from actors.errors import ProtocolError
from api.scheduler.sequence import Filled, Run
from stages.step import Mode, StepResult, TokenLogprobs


@dataclass(slots=True)
class StepInFlight:
    """A step whose result is awaited.

    `members` are all runs with a segment in it and `sampled` those that get a token; `scored` are those whose prompt
    is scored, each with its segment's start. A prefill step has so many `pairs` of a token and one that it attends to.
    `microbatch` is that of a decode step. `filled` are the blocks that are
    full after it, and `forgotten` the keys that it tells the stages to forget. A load step has no members, but runs
    that are `loading`. A decode step has so many `drafts` of each run, and `asks` for others or not.
    """

    step_id: int
    mode: Mode
    microbatch: int | None = None
    token_count: int = 0
    pairs: float = 0.0
    members: list[Run] = field(default_factory=list)
    sampled: list[Run] = field(default_factory=list)
    scored: list[tuple[Run, int]] = field(default_factory=list)
    filled: list[Filled] = field(default_factory=list)
    forgotten: list[bytes] = field(default_factory=list)
    loading: list[Run] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    asks: bool = False

    def check(self, result: StepResult) -> None:
        """Raises ProtocolError where a result is not this step's, or lacks what the step was to give."""
        tokens = len(result.tokens) - sum(result.accepted)
        if (self.step_id, len(self.sampled)) != (result.step_id, tokens):
            raise ProtocolError(
                f"The last stage sent {tokens} tokens for step {result.step_id}; awaited was step {self.step_id} with "
                f"{len(self.sampled)}."
            )
        if len(result.logprobs) not in {0, len(result.tokens)} or len(result.prompt_logprobs) != len(self.scored):
            raise ProtocolError(
                f"The last stage sent log-probabilities of {len(result.logprobs)} tokens and "
                f"{len(result.prompt_logprobs)} prompts for step {result.step_id}, which has {len(result.tokens)} and "
                f"{len(self.scored)}."
            )
        if len(result.drafts) not in {0, len(self.sampled)}:
            raise ProtocolError(
                f"The last stage made drafts for {len(result.drafts)} requests in step {result.step_id}, which has "
                f"{len(self.sampled)}."
            )
        self._check_accepted(result)

    def _check_accepted(self, result: StepResult) -> None:
        had = self.drafts if any(self.drafts) else []
        counts = zip(result.accepted, had, strict=False)
        if len(result.accepted) != len(had) or not all(0 <= accepted <= count for accepted, count in counts):
            raise ProtocolError(f"The last stage accepted {result.accepted} drafts of {had} in step {result.step_id}.")
        for run, answer in zip(self.sampled, self.answers(result), strict=True):
            accepted, drafts = answer.tokens[:-1], run.drafting.drafts
            # All stages have cached the drafts: with other tokens, keys would not be those of what blocks hold.
            if accepted != drafts[: len(accepted)]:
                raise ProtocolError(
                    f"The last stage accepted {accepted} in step {result.step_id}, where the drafts were {drafts}."
                )

    def answers(self, result: StepResult) -> Iterator["Answer"]:
        """What the result, which has been checked, has for each of the runs that are sampled."""
        begin = 0
        for index in range(len(self.sampled)):
            end = begin + 1 + (result.accepted[index] if result.accepted else 0)
            yield Answer(
                tokens=result.tokens[begin:end],
                logprobs=result.logprobs[begin:end],
                drafts=result.drafts[index] if result.drafts else [],
            )
            begin = end


class Answer(NamedTuple):
    """What a step has for one run: its next tokens, all but the last of which were drafts, and new drafts.

    `logprobs` has an entry for each token, None where the request asks for none, or is empty.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    drafts: list[int]
