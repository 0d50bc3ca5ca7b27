"""The sampler of the last stage: its requests by slot, and the tokens that it draws for them."""

import math
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
    """The tokens of a step, in the order of the segments that sample, each with its log-probabilities if asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Samples for all requests of a pipeline; like page tables, its state follows from the steps alone."""

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

    def apply(self, step: Step) -> None:
        """Applies the ends and admissions of a step, which page tables have accepted already.

        Raises StepError where an admission lacks tokens that its sampling reads.
        """
        for slot in step.ended:
            self._leave(slot)
        for admission in step.admissions:
            self._requests[admission.slot] = Request(admission, self._vocabulary, self._masks)

    def sample(self, step: Step, logits: torch.Tensor) -> Sampled:
        """One token for each segment that samples, from their `logits` [segments that sample, vocabulary], float32.

        Raises StepError if a request that reads its tokens is at another position than the step's.
        """
        rows = iter(logits.numpy())
        sampled = Sampled([], [])
        for segment in step.segments:
            if segment.sample:
                row, request = next(rows), self._requests[segment.slot]
                token = request.sample(row, segment.start + len(segment.tokens))
                sampled.tokens.append(token)
                sampled.logprobs.append(None if token < 0 else request.logprobs(row, token))
        return sampled

    def scored_prompts(self, step: Step) -> list[ScoredPrompt | None]:
        """The prompt tokens that each segment scores; None in decode steps and for requests that want no scores."""
        if step.mode == "decode":
            return [None] * len(step.segments)
        return [self._requests[segment.slot].scored_prompt(segment) for segment in step.segments]

    def _leave(self, slot: int) -> None:
        if (request := self._requests.pop(slot, None)) is not None:
            request.leave()
