"""The sampler of the last stage: its requests by slot, and the tokens that it draws for them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stages.options import VocabularyOptions
from stages.sampling.masks_ahead import MaskThread
from stages.sampling.request import Drawn, Request, ScoredPrompt
from stages.sampling.rows import CountedRows, LogitRows
from stages.step import Segment, Step, TokenLogprobs


def sampling_tokens(step: Step) -> list[int]:
    """The tokens of a step after which one is sampled, by their indices: a prompt's last; all of a decode segment."""
    chosen: list[int] = []
    end = 0
    for segment in step.segments:
        begin, end = end, end + len(segment.tokens)
        if segment.sample:
            chosen += range(begin if step.mode == "decode" else end - 1, end)
    return chosen


class Sampled(NamedTuple):
    """The tokens of a step, in the order of the segments that sample, each with its log-probabilities if asked for.

    Each of these segments has one more than drafts of it were `accepted`. So many tokens, `fallbacks`, took logits of
    the whole vocabulary, where candidates were at hand.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    accepted: list[int]
    fallbacks: int = 0

    def by_segment(self) -> Iterator[list[int]]:
        """The tokens of each segment that samples, at least one."""
        begin = 0
        for count in self.accepted:
            yield self.tokens[begin : begin + count + 1]
            begin += count + 1


class _Asked(NamedTuple):
    """A segment that samples, with its drafts and the first of its rows of logits."""

    request: Request
    segment: Segment
    drafts: list[int]
    row: int

    @property
    def position(self) -> int:
        """The position of the first token that is drawn."""
        return self.segment.start + len(self.segment.tokens) - len(self.drafts)


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

    def sample(self, step: Step, logits: LogitRows) -> Sampled:
        """A token for each segment that samples, behind the drafts of it that are what was sampled in their place.

        `logits` are those of the `sampling_tokens`. Raises StepError if a request that reads its tokens is at another
        position than the step's.
        """
        rows, sampled = CountedRows(logits), Sampled([], [], [])
        asked = list(self._asked(step))
        firsts = [each.request.draw_known(rows.known(each.row), each.position) for each in asked]
        # All at once, as the device may be busy with the next step.
        rows.prepare([each.row for each, first in zip(asked, firsts, strict=True) if first is None])
        for each, first in zip(asked, firsts, strict=True):
            sampled.accepted.append(self._verify(each, first, rows, sampled))
        return sampled._replace(fallbacks=rows.fallbacks)

    def draft(
        self, slot: int, logits: LogitRows, row: int, position: int, drafts: Sequence[int], mask_seconds: float
    ) -> int | None:
        """A guess at the request's token at `position`, behind other `drafts`; None where none can be made.

        `logits` are the draft layer's, of which one `row` is the request's. The guess is drawn as the token will be,
        with the same options and random numbers: that makes the two agree as often as their distributions allow without
        knowing each other. There is none where the mask of a grammar takes longer than `mask_seconds`.
        """
        return self._requests[slot].guess(logits, row, position, drafts, mask_seconds)

    def scored_prompts(self, step: Step) -> list[ScoredPrompt | None]:
        """The prompt tokens that each segment scores; None in decode steps and for requests that want no scores."""
        if step.mode == "decode":
            return [None] * len(step.segments)
        return [self._requests[segment.slot].scored_prompt(segment) for segment in step.segments]

    def _asked(self, step: Step) -> Iterator["_Asked"]:
        """What is to be sampled of a step. Raises StepError as `sample` does."""
        row = 0
        for segment in step.segments:
            if segment.sample:
                drafts = segment.tokens[1:] if step.mode == "decode" else []
                asked = _Asked(self._requests[segment.slot], segment, drafts, row)
                asked.request.check(asked.position)
                yield asked
                row += 1 + len(drafts)

    def _verify(self, asked: "_Asked", first: Drawn | None, rows: CountedRows, sampled: Sampled) -> int:
        """Samples from the first position on, as long as drafts are right; returns how many were."""
        request, drawn = asked.request, first
        for accepted in range(1 + len(asked.drafts)):
            row, position = asked.row + accepted, asked.position + accepted
            if accepted:
                drawn = request.draw_known(rows.known(row), position)
            drawn = drawn or request.draw(rows.whole(row), position)
            request.note(drawn.token)
            sampled.tokens.append(drawn.token)
            sampled.logprobs.append(drawn.logprobs)
            if accepted == len(asked.drafts) or drawn.token != asked.drafts[accepted]:
                break
        return accepted

    def _leave(self, slot: int) -> None:
        if (request := self._requests.pop(slot, None)) is not None:
            request.leave()
