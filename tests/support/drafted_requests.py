"""Requests whose drafts go through stages in one process, with every step chosen by the test."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from stages.step import NO_TOKEN, SamplingParams, Segment, StepResult, TokenLogprobs
from tests.support.stage_driver import GREEDY, Driver


@dataclass
class DraftedRequest:
    """A request in a slot: its tokens, prompt first, and the drafts of those to come.

    `steps` has, for each decode step, the drafts that it had and how many of them were right.
    """

    tokens: list[int]
    prompt_tokens: int
    drafts: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        """The tokens so far, without the prompt."""
        return self.tokens[self.prompt_tokens :]


class DraftedRequests:
    """Prefills and decodes requests on a driver; each step says who is in it, and how many drafts each asks for."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.by_slot: dict[int, DraftedRequest] = {}

    def prefill(
        self,
        prompts: Mapping[int, Sequence[int]],
        samplings: Mapping[int, SamplingParams] | None = None,
        *,
        drafts: int,
        chunk: int = 1 << 20,
        answered: int = 0,
        cached: Sequence[int] = (),
    ) -> StepResult:
        """Admits a request to each slot and computes its tokens in chunks; returns the last result.

        The last `answered` of these tokens are not of the prompt, as after a preemption. The first of them are in the
        blocks `cached`.
        """
        starts: dict[int, int] = {}
        for slot, tokens in prompts.items():
            starts[slot] = len(cached) * self.driver.cache.block_size
            self.by_slot[slot] = DraftedRequest(list(tokens), len(tokens) - answered)
            sampling = (samplings or {}).get(slot, GREEDY)
            self.driver.admit(slot, sampling, tokens, len(tokens) - answered, cached)
        while True:
            going = [slot for slot in prompts if starts[slot] < len(prompts[slot])]
            segments = [self._chunk(slot, starts[slot], chunk, drafts) for slot in going]
            result = self.driver.run_bytes("prefill", segments)
            self._take_in(segments, result)
            starts.update((slot, starts[slot] + chunk) for slot in going)
            if all(starts[slot] >= len(prompts[slot]) for slot in prompts):
                return result

    def decode(self, drafts: Mapping[int, int]) -> StepResult:
        """A step of these slots with the drafts that they have; each asks for so many others."""
        segments: list[Segment] = []
        for slot, count in drafts.items():
            request = self.by_slot[slot]
            tokens = [request.tokens[-1], *request.drafts]
            segments.append(self._asking(self.driver.segment(slot, len(request.tokens) - 1, tokens), count))
        result = self.driver.run_bytes("decode", segments)
        self._take_in(segments, result)
        return result

    def decode_until(self, length: int, slots: Iterable[int], drafts: int) -> dict[int, list[int]]:
        """Decodes until each answer has so many tokens; returns these."""
        going = list(slots)
        while short := [slot for slot in going if len(self.by_slot[slot].answer) < length]:
            self.decode(dict.fromkeys(short, drafts))
        return {slot: self.by_slot[slot].answer[:length] for slot in going}

    def end(self, slot: int) -> None:
        """Ends a request with the next step."""
        del self.by_slot[slot]
        self.driver.end(slot)

    def verified(self) -> tuple[int, int]:
        """The number of drafts that all requests have had, and how many of these were right."""
        steps = [step for request in self.by_slot.values() for step in request.steps]
        return sum(made for made, _ in steps), sum(right for _, right in steps)

    def _chunk(self, slot: int, start: int, chunk: int, drafts: int) -> Segment:
        tokens = self.by_slot[slot].tokens
        end = min(start + chunk, len(tokens))
        is_last = end == len(tokens)
        segment = self.driver.segment(slot, start, tokens[start:end], sample=is_last)
        return self._asking(segment, drafts, NO_TOKEN if is_last else tokens[end])

    def _asking(self, segment: Segment, drafts: int, next_token: int = NO_TOKEN) -> Segment:
        return msgspec.structs.replace(segment, drafts=drafts, next_token=next_token)

    def _take_in(self, segments: Sequence[Segment], result: StepResult) -> None:
        sampling = [segment for segment in segments if segment.sample]
        accepted = result.accepted or [0] * len(sampling)
        drafts = result.drafts or [[] for _ in sampling]
        logprobs = result.logprobs or [None] * len(result.tokens)
        begin = 0
        for segment, right, own in zip(sampling, accepted, drafts, strict=True):
            request = self.by_slot[segment.slot]
            if segment.start + 1 > request.prompt_tokens:
                request.steps.append((len(segment.tokens) - 1, right))
            request.tokens += result.tokens[begin : begin + right + 1]
            request.logprobs += [entry for entry in logprobs[begin : begin + right + 1] if entry is not None]
            request.drafts = own
            begin += right + 1
        assert begin == len(result.tokens)
