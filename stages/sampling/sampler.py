"""The sampler of the last stage: its requests by slot, and the tokens that it draws for them."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import structlog
import torch

from stages.errors import GrammarError, StepError
from stages.options import VocabularyOptions
from stages.sampling.draw import draw_token
from stages.sampling.logits_options import LogitsOptions
from stages.sampling.logprobs import Floats, token_logprobs
from stages.sampling.masks_ahead import MasksAhead, MaskThread
from stages.step import GRAMMAR_FAILED, NO_TOKEN, Admission, Segment, Step, TokenLogprobs

log = structlog.get_logger()


class ScoredPrompt(NamedTuple):
    """The prompt tokens that a segment's logits score: the logits at each position score the token after it.

    `top` is the number of best tokens to report beside each, as in `prompt_logprobs`.
    """

    tokens: list[int]
    top: int


class Request:
    """The sampling options of one request, with its tokens if they are read; sampled tokens are appended."""

    def __init__(self, admission: Admission, vocabulary: int, masks: MaskThread | None = None) -> None:
        """`masks` is where grammars and thoughts are followed.

        Raises StepError where the admission lacks tokens that its sampling reads."""
        _check(admission)
        self._slot = admission.slot
        self._sampling = admission.sampling
        self._prompt_tokens = admission.prompt_tokens
        self._prompt = admission.tokens[: admission.prompt_tokens]
        self._answer = admission.tokens[admission.prompt_tokens :]
        self._options = LogitsOptions(admission.sampling, vocabulary, self._prompt, self._answer)
        self._masks: MasksAhead | None = None
        if admission.sampling.grammar is not None or admission.sampling.thought is not None:
            self._masks = MasksAhead(masks or MaskThread(None, vocabulary), admission.sampling, self._answer)

    def sample(self, logits: Floats, position: int) -> int:
        """The token at `position`, from the model's `logits` [vocabulary] of the one before, which are not changed.

        NO_TOKEN where one of these is not a number, or the largest is infinite: weights or a device are broken.
        GRAMMAR_FAILED where the request's grammar allows no token, or takes too long.

        Raises StepError if the request reads its tokens and does not have exactly those before `position`.
        """
        answered = position - self._prompt_tokens
        if self._sampling.reads_tokens and answered != len(self._answer):
            raise StepError(
                f"Slot {self._slot} samples at position {position}, but was admitted with, and has sampled, "
                f"{self._prompt_tokens + len(self._answer)} tokens."
            )
        # numpy's `max` is not a number where one of its arguments is not.
        if not math.isfinite(logits.max()):
            return NO_TOKEN
        try:
            mask = None if self._masks is None else self._masks.allowed()
        except GrammarError as error:
            log.warning("a grammar failed", slot=self._slot, reason=str(error))
            return GRAMMAR_FAILED
        token = draw_token(self._options.apply(logits, self._answer, answered, mask), self._sampling, position)
        if self._sampling.reads_tokens:
            self._answer.append(token)
            self._options.note(token)
            if self._masks is not None:
                self._masks.note(token)
        return token

    def draft(self, logits: Floats, position: int, drafts: Sequence[int], mask_seconds: float) -> int | None:
        """A guess at the token at `position`; see `Sampler.draft`. Penalties do not count the drafts before it."""
        if not math.isfinite(logits.max()):
            return None
        mask = None
        if self._masks is not None and not drafts:
            try:
                mask = self._masks.allowed_within(mask_seconds)
            except GrammarError:
                return None
        answered = position - self._prompt_tokens
        changed = self._options.apply(logits, [*self._answer, *drafts], answered, mask)
        return draw_token(changed, self._sampling, position)

    def leave(self) -> None:
        """Gives up what was begun for the request's next token."""
        if self._masks is not None:
            self._masks.cancel()

    def logprobs(self, logits: Floats, token: int) -> TokenLogprobs | None:
        """The log-probabilities of `token`, from the model's `logits` [vocabulary], if the request asks for them."""
        return None if self._sampling.logprobs is None else token_logprobs(logits, token, self._sampling.logprobs)

    def scored_prompt(self, segment: Segment) -> ScoredPrompt | None:
        """The prompt tokens that the logits of a prefill `segment` score; None unless the request wants scores."""
        if self._sampling.prompt_logprobs is None:
            return None
        after = segment.start + 1
        return ScoredPrompt(self._prompt[after : after + len(segment.tokens)], self._sampling.prompt_logprobs)


def sampling_tokens(step: Step) -> list[int]:
    """The tokens of a step after which one is sampled, by their indices: a prompt's last; all of a decode segment."""
    chosen: list[int] = []
    end = 0
    for segment in step.segments:
        begin, end = end, end + len(segment.tokens)
        if segment.sample:
            chosen += range(begin if step.mode == "decode" else end - 1, end)
    return chosen


def _check(admission: Admission) -> None:
    sampling = admission.sampling
    if sampling.reads_tokens and not 0 < admission.prompt_tokens <= len(admission.tokens):
        raise StepError(
            f"Slot {admission.slot} is admitted with {len(admission.tokens)} tokens and a prompt of "
            f"{admission.prompt_tokens}, but its sampling reads them."
        )
    if sampling.min_tokens and admission.prompt_tokens < 1:
        raise StepError(f"Slot {admission.slot} is admitted with min_tokens, but without its prompt's length.")


class Sampled(NamedTuple):
    """The tokens of a step, in the order of the segments that sample, each with its log-probabilities if asked for.

    Each of these segments has one more than drafts of it were `accepted`.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    accepted: list[int]

    def by_segment(self) -> Iterator[list[int]]:
        """The tokens of each segment that samples, at least one."""
        begin = 0
        for count in self.accepted:
            yield self.tokens[begin : begin + count + 1]
            begin += count + 1


class SlotChanges(NamedTuple):
    """The slots whose requests a step ends, and those that it admits, ready to be sampled for."""

    ended: list[int]
    admitted: dict[int, Request]

    def leave(self) -> None:
        """Gives up what was begun for these requests, which are not applied."""
        for request in self.admitted.values():
            request.leave()


class Sampler:
    """Samples for all requests of a pipeline; like page tables, its state follows from the steps alone.

    Two threads may share it: `prepare` and `close` belong to the one that computes, all else to the one that samples.
    """

    def __init__(self, vocabulary: int, options: VocabularyOptions | None = None) -> None:
        """`vocabulary` is the number of tokens that have logits. Without `options` every grammar fails."""
        self._vocabulary = vocabulary
        self._masks = MaskThread(options, vocabulary)
        self._requests: dict[int, Request] = {}

    def clear(self) -> None:
        """Forgets all requests, as at the start of an epoch."""
        for slot in list(self._requests):
            self._leave(slot)

    def close(self) -> None:
        """Ends the thread that prepares the next tokens of requests with grammars."""
        self._masks.close()

    def prepare(self, step: Step) -> SlotChanges:
        """Makes what `apply` needs of a step, which page tables have accepted already, and begins with its grammars.

        Raises StepError where an admission lacks tokens that its sampling reads.
        """
        admitted = {admission.slot: Request(admission, self._vocabulary, self._masks) for admission in step.admissions}
        return SlotChanges(step.ended, admitted)

    def apply(self, changes: SlotChanges) -> None:
        """Applies the ends and admissions of the next step."""
        for slot in changes.ended:
            self._leave(slot)
        self._requests.update(changes.admitted)

    def sample(self, step: Step, logits: torch.Tensor) -> Sampled:
        """A token for each segment that samples, behind the drafts of it that are what was sampled in their place.

        `logits` [tokens, vocabulary], float32, are those of the `sampling_tokens`. Raises StepError if a request that
        reads its tokens is at another position than the step's.
        """
        rows = iter(logits.numpy())
        sampled = Sampled([], [], [])
        for segment in step.segments:
            if segment.sample:
                drafts = segment.tokens[1:] if step.mode == "decode" else []
                own = list(itertools.islice(rows, 1 + len(drafts)))
                position = segment.start + len(segment.tokens) - len(drafts)
                sampled.accepted.append(self._verify(self._requests[segment.slot], own, position, drafts, sampled))
        return sampled

    def draft(self, slot: int, logits: Floats, position: int, drafts: Sequence[int], mask_seconds: float) -> int | None:
        """A guess at the request's token at `position`, behind other `drafts`; None where none can be made.

        `logits` [vocabulary] are the draft layer's. The guess is drawn as the token will be, with the same options and
        random numbers: that makes the two agree as often as their distributions allow without knowing each other. There
        is none where the mask of a grammar takes longer than `mask_seconds`.
        """
        return self._requests[slot].draft(logits, position, drafts, mask_seconds)

    def scored_prompts(self, step: Step) -> list[ScoredPrompt | None]:
        """The prompt tokens that each segment scores; None in decode steps and for requests that want no scores."""
        if step.mode == "decode":
            return [None] * len(step.segments)
        return [self._requests[segment.slot].scored_prompt(segment) for segment in step.segments]

    def _verify(self, request: Request, rows: list[Floats], position: int, drafts: list[int], sampled: Sampled) -> int:
        """Samples from the first position on, as long as drafts are right; returns how many were."""
        for accepted, row in enumerate(rows):
            token = request.sample(row, position + accepted)
            sampled.tokens.append(token)
            sampled.logprobs.append(None if token < 0 else request.logprobs(row, token))
            if accepted == len(drafts) or token != drafts[accepted]:
                break
        return accepted

    def _leave(self, slot: int) -> None:
        if (request := self._requests.pop(slot, None)) is not None:
            request.leave()
