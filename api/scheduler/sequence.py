"""A request inside the scheduler: whether it can run, its tokens and drafts, and its stay in a slot."""

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from api.errors import RequestError
from api.messages.engine import AddRequest, FinishReason
from stages.kv.record_file import KEY_BYTES
from stages.options import CacheOptions
from stages.step import Admission, BlockLoad, SamplingParams, TokenLogprobs


def check_request(request: AddRequest, cache: CacheOptions) -> None:
    """Raises RequestError, with the numbers, for a request that can never run.

    What passes fits a pool: CacheOptions demands that each can hold a request of `max_model_len` tokens.
    """
    if not request.tokens:
        raise RequestError("The prompt holds no token: give at least one.", "prompt")
    if request.max_tokens < 1 and not request.only_scores:
        raise RequestError(f"max_tokens is {request.max_tokens}: ask for at least one token.", "max_tokens")
    length = len(request.tokens) + request.max_tokens
    if length > cache.max_model_len:
        raise RequestError(
            f"The prompt's {len(request.tokens)} tokens and max_tokens {request.max_tokens} make {length}, over the "
            f"model's length of {cache.max_model_len}: shorten the prompt or lower max_tokens.",
            "max_tokens",
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens, prompt first, and all else that is needed to begin it anew.

    `arrival` counts upward; the first `prompt_tokens` tokens are the prompt, and `end` is the number of tokens at which
    the request has had its `max_tokens`. Log-probabilities of the prompt's tokens at positions 1 to `scored` have been
    handed out. `stays` counts how often it had a slot, the first time with `cached_tokens` that were cached. Only
    requests with the same `cache_salt` share what is cached.
    """

    request_id: int
    arrival: int
    tokens: list[int]
    prompt_tokens: int
    end: int
    stop_token_ids: frozenset[int]
    sampling: SamplingParams
    forced: list[int]
    cache_salt: str
    scored: int = 0
    stays: int = 0
    cached_tokens: int = 0
    _keys: list[bytes] = field(default_factory=list)
    _secret: bytes = b""

    @classmethod
    def of(cls, request: AddRequest, arrival: int) -> "Sequence":
        """The sequence of a new request: it has no tokens beyond its prompt."""
        return cls(
            request_id=request.request_id,
            arrival=arrival,
            tokens=list(request.tokens),
            prompt_tokens=len(request.tokens),
            end=len(request.tokens) + request.max_tokens,
            stop_token_ids=frozenset(request.stop_token_ids),
            sampling=request.sampling,
            forced=request.forced,
            cache_salt=request.cache_salt,
        )

    @property
    def is_whole(self) -> bool:
        """Whether the request has had all its tokens: from the beginning where only its prompt is to be scored."""
        return len(self.tokens) >= self.end

    def block_keys(self, secret: bytes, block_size: int, blocks: int) -> list[bytes]:
        """The keys of the first `blocks` blocks of tokens: each a digest of the key before and of the block's tokens.

        The first follows the `cache_salt`, and all of them the secret, which nobody outside knows.
        """
        if secret != self._secret:
            self._secret, self._keys = secret, []
        keys = self._keys
        parent = (
            keys[-1] if keys else hashlib.blake2b(self.cache_salt.encode(), digest_size=KEY_BYTES, key=secret).digest()
        )
        while len(keys) < blocks:
            begin = len(keys) * block_size
            tokens = array("I", self.tokens[begin : begin + block_size]).tobytes()
            parent = hashlib.blake2b(parent + tokens, digest_size=KEY_BYTES).digest()
            keys.append(parent)
        return keys[:blocks]

    def append(self, token: int) -> FinishReason | None:
        """Appends a sampled token, or the one forced in its stead; returns why the request ends, None if not."""
        answered = len(self.tokens) - self.prompt_tokens
        self.tokens.append(self.forced[answered] if answered < len(self.forced) else token)
        if token in self.stop_token_ids:
            return "stop"
        return "length" if self.is_whole else None

    def extend(self, tokens: list[int]) -> tuple[FinishReason | None, int]:
        """Appends tokens up to the one that ends the request; returns why it ends, and how many were appended."""
        for count, token in enumerate(tokens, start=1):
            reason = self.append(token)
            if reason is not None:
                return reason, count
        return None, len(tokens)

    def unscored(self, start: int, entries: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """The `entries` of a chunk, for positions from `start` + 1 on, without those that were handed out before."""
        fresh = entries[max(self.scored - start, 0) :]
        self.scored += len(fresh)
        return fresh


MEMORY = 128
"""Steps after which what drafts came to counts less and less: a request's text may change."""

PRIOR = 16
"""Drafted steps that a request's own acceptance has to outweigh: before it has as many, it is taken for like others."""

GAPS_MAX = 0.125
"""The share of a request's tokens that may have passed without the draft layer if its acceptance is to count."""


@dataclass(slots=True)
class Acceptance:
    """How many drafts of a step were right, in a mean in which old steps are forgotten after some MEMORY others."""

    steps: float = 0.0
    accepted: float = 0.0

    def add(self, accepted: int) -> None:
        """Takes in a step."""
        forget = 1 - 1 / MEMORY
        self.steps = self.steps * forget + 1
        self.accepted = self.accepted * forget + accepted

    def beside(self, others: "Acceptance") -> float:
        """The mean, as if PRIOR of the steps had been those of others."""
        prior = others.accepted / others.steps if others.steps else 0.0
        return (self.accepted + PRIOR * prior) / (self.steps + PRIOR)


@dataclass(slots=True)
class Drafting:
    """The drafts of one request: those that its next step has, and how well they did.

    The draft layer runs over its prompt only where it drafts `from_prompt` on. So many of its tokens have passed the
    last stage `without` that layer, and it has `waited` so many steps since its drafts ceased to pay.
    """

    is_possible: bool = False
    from_prompt: bool = False
    drafts: list[int] = field(default_factory=list)
    acceptance: Acceptance = field(default_factory=Acceptance)
    without: int = 0
    waited: int = 0

    def is_ready(self, tokens: int) -> bool:
        """Whether the draft layer knows enough of the request's `tokens` for its acceptance to count."""
        return self.is_possible and self.without <= GAPS_MAX * tokens


@dataclass(slots=True, eq=False)
class Run:
    """A sequence's stay in a slot, from its admission until it ends or is preempted.

    Steps in flight refer to the run and not to the sequence: once it is no longer `active`, what they sampled is
    dropped, even when the sequence is running again. The first `issued` tokens are in steps, and so in the cache of
    every later step; the first `prefill_end` are the prompt and what had been sampled before this stay. The first
    `cached` blocks hold their tokens from the beginning, once their `loads` have come; the stages have been told the
    keys of the first `keyed`. `secret` is what keys began with at the admission.
    """

    sequence: Sequence
    slot: int
    microbatch: int
    pool: int
    blocks: list[int]
    prefill_end: int
    issued: int
    cached: int
    loads: list[BlockLoad]
    secret: bytes
    keyed: int
    has_begun: bool = False
    active: bool = True
    drafting: Drafting = field(default_factory=Drafting)

    def admission(self) -> Admission:
        """The admission of the request that its first step carries to the stages."""
        sequence = self.sequence
        return Admission(
            slot=self.slot,
            sampling=sequence.sampling,
            tokens=sequence.tokens.copy() if sequence.sampling.reads_tokens else [],
            prompt_tokens=sequence.prompt_tokens,
            cached=self.blocks[: self.cached],
        )

    @property
    def request_id(self) -> int:
        """The id of the sequence's request."""
        return self.sequence.request_id

    @property
    def arrival(self) -> int:
        """The place of the sequence in the order of arrival."""
        return self.sequence.arrival


class Filled(NamedTuple):
    """A block that a step fills, and the key that it is found by."""

    pool: int
    block: int
    key: bytes


@dataclass(slots=True)
class Tallies:
    """What happened to requests since the start.

    `preemptions` counts how often one had to give up its slot to another, `non_finite_logits` those that ended because
    their logits were not numbers, and `grammar_failures` those that ended because their grammar could not be followed.
    `prefix_queries` are the tokens of requests that got a slot for the first time, and `prefix_hits` those of them that
    were cached. `recomputed_tokens` are those that were computed again after a preemption or the loss of a stage.
    """

    preemptions: int = 0
    non_finite_logits: int = 0
    grammar_failures: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    recomputed_tokens: int = 0


@dataclass(slots=True, frozen=True)
class Snapshot:
    """The requests and blocks of a scheduler at one moment, for tests and debugging.

    `waiting` are in the order in which they get slots. `ready` are the microbatches that could decode now,
    `free_blocks` the ids of each pool's free blocks, and `holders` how many requests hold each block of it.
    """

    waiting: list[Sequence]
    running: list[Run]
    ready: list[int]
    free_blocks: list[list[int]]
    holders: list[list[int]]
