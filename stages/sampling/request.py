"""One request at the sampler: its options, its tokens where they are read, and the draws of its next ones."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from stages.errors import GrammarError, StepError
from stages.sampling.candidates import KnownLogits
from stages.sampling.draw import draw_token
from stages.sampling.grammar import Mask
from stages.sampling.logits_options import LogitsOptions
from stages.sampling.logprobs import Floats, TokenIds, token_logprobs
from stages.sampling.masks_ahead import MasksAhead, MaskThread
from stages.sampling.rows import LogitRows
from stages.step import GRAMMAR_FAILED, NO_TOKEN, Admission, Segment, TokenLogprobs

log = structlog.get_logger()


class ScoredPrompt(NamedTuple):
    """The prompt tokens that a segment's logits score: the logits at each position score the token after it.

    `top` is the number of best tokens to report beside each, as in `prompt_logprobs`.
    """

    tokens: list[int]
    top: int


class Drawn(NamedTuple):
    """A token, NO_TOKEN or GRAMMAR_FAILED, with its log-probabilities if the request asks for them."""

    token: int
    logprobs: TokenLogprobs | None = None


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

    @property
    def named(self) -> TokenIds:
        """The tokens whose logits the request's options name."""
        return self._options.touched

    def check(self, position: int) -> None:
        """Raises StepError if the request reads its tokens and does not have exactly those before `position`."""
        if self._sampling.reads_tokens and position - self._prompt_tokens != len(self._answer):
            raise StepError(
                f"Slot {self._slot} samples at position {position}, but was admitted with, and has sampled, "
                f"{self._prompt_tokens + len(self._answer)} tokens."
            )

    def draw(self, logits: Floats, position: int) -> Drawn:
        """The token at `position`, from the model's `logits` [vocabulary] of the one before, which are not changed.

        NO_TOKEN where one of these is not a number, or the largest is infinite: weights or a device are broken.
        GRAMMAR_FAILED where the request's grammar allows no token, or takes too long.
        """
        # numpy's `max` is not a number where one of its arguments is not.
        if not math.isfinite(logits.max()):
            return Drawn(NO_TOKEN)
        try:
            mask = self._mask()
        except GrammarError:
            return Drawn(GRAMMAR_FAILED)
        changed = self._options.apply(logits, self._answer, position - self._prompt_tokens, mask)
        token, wanted = draw_token(changed, self._sampling, position), self._sampling.logprobs
        return Drawn(token, None if wanted is None else token_logprobs(logits, token, wanted))

    def draw_known(self, known: KnownLogits | None, position: int) -> Drawn | None:
        """What `draw` returns, from what is known of the logits; None where that is not certain."""
        if known is None or not known.is_finite:
            return None
        try:
            mask = self._mask()
        except GrammarError:
            return Drawn(GRAMMAR_FAILED)
        changed = known.changed(self._options, self._answer, position - self._prompt_tokens, mask)
        token, wanted = None if changed is None else changed.draw(self._sampling, position), self._sampling.logprobs
        if token is None or wanted is None:
            return None if token is None else Drawn(token)
        logprobs = known.logprobs(token, wanted)
        return None if logprobs is None else Drawn(token, logprobs)

    def note(self, token: int) -> None:
        """Takes in the token that was drawn for the request's next position."""
        if self._sampling.reads_tokens and token >= 0:
            self._answer.append(token)
            self._options.note(token)
            if self._masks is not None:
                self._masks.note(token)

    def guess(
        self, logits: LogitRows, row: int, position: int, drafts: Sequence[int], mask_seconds: float
    ) -> int | None:
        """A guess at the token at `position`; see `Sampler.draft`. Penalties do not count the drafts before it."""
        try:
            # Behind other drafts it is not known what the grammar allows.
            mask = None if self._masks is None or drafts else self._masks.allowed_within(mask_seconds)
        except GrammarError:
            return None
        answer, answered = [*self._answer, *drafts], position - self._prompt_tokens
        known = logits.known(row)
        if known is not None and known.is_finite:
            changed = known.changed(self._options, answer, answered, mask)
            token = None if changed is None else changed.draw(self._sampling, position)
            if token is not None:
                return token
        [whole] = logits.fetch([row])
        if not math.isfinite(whole.max()):
            return None
        return draw_token(self._options.apply(whole, answer, answered, mask), self._sampling, position)

    def leave(self) -> None:
        """Gives up what was begun for the request's next token."""
        if self._masks is not None:
            self._masks.cancel()

    def scored_prompt(self, segment: Segment) -> ScoredPrompt | None:
        """The prompt tokens that the logits of a prefill `segment` score; None unless the request wants scores."""
        if self._sampling.prompt_logprobs is None:
            return None
        after = segment.start + 1
        return ScoredPrompt(self._prompt[after : after + len(segment.tokens)], self._sampling.prompt_logprobs)

    def _mask(self) -> Mask | None:
        """What the grammar allows next. Raises GrammarError, and says so, where it can be followed no further."""
        try:
            return None if self._masks is None else self._masks.allowed()
        except GrammarError as error:
            log.warning("a grammar failed", slot=self._slot, reason=str(error))
            raise


def _check(admission: Admission) -> None:
    sampling = admission.sampling
    if sampling.reads_tokens and not 0 < admission.prompt_tokens <= len(admission.tokens):
        raise StepError(
            f"Slot {admission.slot} is admitted with {len(admission.tokens)} tokens and a prompt of "
            f"{admission.prompt_tokens}, but its sampling reads them."
        )
    if sampling.min_tokens and admission.prompt_tokens < 1:
        raise StepError(f"Slot {admission.slot} is admitted with min_tokens, but without its prompt's length.")
