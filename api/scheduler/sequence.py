"""A request inside the scheduler: what it is, and its stay in a slot."""

from dataclasses import dataclass

from api.messages.engine import AddRequest, FinishReason
from api.scheduler.suspects import Suspicion
from stages.step import Admission, SamplingParams, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens, prompt first: all that is needed to begin it anew.

    `arrival` counts upward; the first `prompt_tokens` are the prompt, and `end` is the number of tokens at which the
    request has had its `max_tokens`. Log-probabilities of the prompt's tokens at positions 1 to `scored` have been
    handed out. A step of it has failed since it last got on where there is a `suspicion`.
    """

    request_id: int
    arrival: int
    tokens: list[int]
    prompt_tokens: int
    end: int
    stop_token_ids: frozenset[int]
    sampling: SamplingParams
    forced: list[int]
    scored: int = 0
    suspicion: Suspicion | None = None

    @classmethod
    def of(cls, request: AddRequest, arrival: int) -> "Sequence":
        """A request that has no tokens beyond its prompt yet."""
        return cls(
            request_id=request.request_id,
            arrival=arrival,
            tokens=list(request.tokens),
            prompt_tokens=len(request.tokens),
            end=len(request.tokens) + request.max_tokens,
            stop_token_ids=frozenset(request.stop_token_ids),
            sampling=request.sampling,
            forced=request.forced,
        )

    def append(self, token: int) -> FinishReason | None:
        """Takes a sampled token, or the forced one of its place; says whether the request ends with the sampled one."""
        answered = len(self.tokens) - self.prompt_tokens
        self.tokens.append(self.forced[answered] if answered < len(self.forced) else token)
        if token in self.stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) == self.end else None

    def unscored(self, start: int, entries: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Those of a chunk's `entries`, for positions from `start` + 1 on, that no former stay has handed out."""
        fresh = entries[max(self.scored - start, 0) :]
        self.scored += len(fresh)
        return fresh


@dataclass(slots=True, eq=False)
class Run:
    """A sequence's stay in a slot, from its admission until it ends or is preempted.

    Steps in flight hold on to the run and not to the sequence: once it is no longer `active`, what they sampled is
    dropped, even when the sequence is running again. `issued` tokens are in steps, and so in the cache of every later
    step; the first `prefill_end` of them are the prompt and what had been sampled before this stay.
    """

    sequence: Sequence
    slot: int
    microbatch: int
    pool: int
    blocks: list[int]
    prefill_end: int
    issued: int = 0
    active: bool = True

    def admission(self) -> Admission:
        """What the stages are told of the request."""
        sequence = self.sequence
        return Admission(
            slot=self.slot,
            sampling=sequence.sampling,
            tokens=sequence.tokens.copy() if sequence.sampling.reads_tokens else [],
            prompt_tokens=sequence.prompt_tokens,
        )

    @property
    def arrival(self) -> int:
        """The sequence's."""
        return self.sequence.arrival
