"""The last stage's account of all requests, from whose logits it samples."""

from typing import NamedTuple

import torch

from stages.sampling.request import Request, ScoredPrompt
from stages.step import Step, TokenLogprobs


class Sampled(NamedTuple):
    """A step's tokens, in the order of the segments that sample, and for each its log-probabilities if asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Requests by slot, changed by the steps themselves, as page tables are."""

    def __init__(self, vocabulary: int) -> None:
        """`vocabulary` tokens have logits."""
        self._vocabulary = vocabulary
        self._requests: dict[int, Request] = {}

    def clear(self) -> None:
        """Forgets all requests, as at the start of an epoch."""
        self._requests.clear()

    def apply(self, step: Step) -> None:
        """Takes over a step's ends and admissions, which page tables have accepted.

        Raises StepError where an admission lacks tokens that its sampling reads.
        """
        for slot in step.ended:
            self._requests.pop(slot, None)
        for admission in step.admissions:
            self._requests[admission.slot] = Request(admission, self._vocabulary)

    def sample(self, step: Step, logits: torch.Tensor) -> Sampled:
        """One token for each segment that samples, from their `logits` [segments that sample, vocabulary], float32.

        Raises StepError where a request whose tokens are read is not where the step says.
        """
        rows = iter(logits.numpy())
        sampled = Sampled([], [])
        for segment in step.segments:
            if segment.sample:
                row, request = next(rows), self._requests[segment.slot]
                token = request.sample(row, segment.start + len(segment.tokens))
                sampled.tokens.append(token)
                sampled.logprobs.append(request.logprobs(row, token))
        return sampled

    def scored_prompts(self, step: Step) -> list[ScoredPrompt | None]:
        """For each segment of a step what it scores: of a prefill's the prompt, if the request asks for it."""
        if step.mode == "decode":
            return [None] * len(step.segments)
        return [self._requests[segment.slot].scored_prompt(segment) for segment in step.segments]
