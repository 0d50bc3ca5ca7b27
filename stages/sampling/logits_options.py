"""The options that change a request's logits before a token is chosen, greedily or not."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stages.sampling.grammar import Mask
from stages.sampling.logprobs import Doubles, Floats, TokenIds, to_floats, token_ids
from stages.step import SamplingParams

ROOM = 64
"""Tokens that the arrays have room for beyond those of the admission, before they grow."""


class Penalties:
    """Repetition, presence and frequency penalties of one request, with its tokens and how often the answer has each.

    As in vLLM (apply_penalties in vllm/model_executor/layers/utils.py), the logit of a token of the prompt or answer is
    divided by the repetition penalty if it is positive, else multiplied by it; then the frequency penalty is subtracted
    as often as the answer has the token, and the presence penalty once if the answer has it at all.
    """

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """`prompt` and `answer` are the request's tokens so far. Only a repetition penalty reads the prompt."""
        self._repetition = sampling.repetition_penalty
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        seen = np.unique(np.array(prompt if self._repetition != 1 else [], dtype=np.int64))
        self._size = len(seen)
        self._tokens = np.concatenate((seen, np.zeros(ROOM, dtype=np.int64)))
        self._counts = np.zeros(len(self._tokens), dtype=np.int64)
        self._entries = {token: entry for entry, token in enumerate(seen.tolist())}
        for token in answer:
            self.note(token)

    @staticmethod
    def asked_for(sampling: SamplingParams) -> bool:
        """Whether any of the penalties has an effect."""
        return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0

    def note(self, token: int) -> None:
        """Counts one more token of the answer."""
        entry = self._entries.setdefault(token, self._size)
        if entry == self._size:
            if entry == len(self._tokens):
                self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._tokens[entry] = token
            self._size += 1
        self._counts[entry] += 1

    @property
    def may_raise(self) -> bool:
        """Whether a logit may become larger than it was."""
        return self._repetition < 1 or self._presence < 0 or self._frequency < 0

    def apply(self, logits: Floats) -> None:
        """Changes `logits` [vocabulary] in place."""
        tokens, counts = self._tokens[: self._size], self._counts[: self._size]
        logits[tokens] = self._penalised(logits[tokens], counts)

    def apply_to_some(self, tokens: TokenIds, logits: Floats) -> bool:
        """Changes the `logits` of some `tokens` in place; returns whether those of others are not raised."""
        places, known = places_of(self._tokens[: self._size], tokens)
        logits[places] = self._penalised(logits[places], self._counts[: self._size][known])
        return not self.may_raise or bool(known.all())

    def _penalised(self, logits: Floats, counts: TokenIds) -> Floats:
        penalised: Doubles = logits.astype(np.float64)
        # Products that overflow are infinite; `to_floats` makes them the largest number, or leaves minus infinity.
        with np.errstate(over="ignore"):
            penalised = np.where(penalised > 0, penalised / self._repetition, penalised * self._repetition)
        penalised -= self._frequency * counts + self._presence * (counts > 0)
        return to_floats(penalised)


class LogitsOptions:
    """One request's allowed tokens, bad words, minimum answer, bias and penalties, applied in this order.

    The order is that of vLLM's Sampler, where what a grammar allows comes first. Banned tokens get minus infinity,
    which neither bias nor penalties change. Allowed tokens, then bad words and the minimum answer are ignored where
    they would leave no token at all, so that a grammar wins over all of them; and so are allowed tokens that are not in
    the vocabulary. vLLM does not define these cases.
    """

    def __init__(self, sampling: SamplingParams, vocabulary: int, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """`prompt` and `answer` are the request's tokens so far, empty if its sampling reads none."""
        self._allowed = token_ids(sampling.allowed_token_ids, vocabulary)
        self._bad_words = [word for word in sampling.bad_words if word and 0 <= word[-1] < vocabulary]
        self._min_tokens = sampling.min_tokens
        self._stops = token_ids(sampling.stop_token_ids, vocabulary).tolist()
        self._biased = token_ids(sampling.logit_bias, vocabulary)
        self._bias = np.array([sampling.logit_bias[token] for token in self._biased.tolist()])
        self._penalties = Penalties(sampling, prompt, answer) if Penalties.asked_for(sampling) else None

    def note(self, token: int) -> None:
        """Counts one more token of the answer."""
        if self._penalties is not None:
            self._penalties.note(token)

    def apply(self, logits: Floats, answer: Sequence[int], answered: int, mask: Mask | None = None) -> Floats:
        """Returns `logits` [vocabulary] themselves if no option changes them, else a changed copy.

        `answered` is the number of tokens sampled so far; `answer` contains them if bad words read them. Tokens that
        `mask` [vocabulary] does not have are banned, if there is one.
        """
        banned = self._banned(answer, answered)
        if not (banned or len(self._allowed) or len(self._biased) or self._penalties or mask is not None):
            return logits
        changed = self._restricted(logits if mask is None else _masked(logits, mask))
        _ban(changed, banned)
        if len(self._biased):
            changed[self._biased] = to_floats(changed[self._biased] + self._bias)
        if self._penalties is not None:
            self._penalties.apply(changed)
        return changed

    @property
    def touched(self) -> TokenIds:
        """The tokens that are the only ones to be drawn, or have a bias: with their logits the others matter less."""
        return np.union1d(self._allowed, self._biased)

    def change_nothing(self, answer: Sequence[int], answered: int) -> bool:
        """Whether `apply` returns the logits that it is given, without a mask."""
        named = len(self._allowed) or len(self._biased) or self._penalties
        return not (named or self._banned(answer, answered))

    def apply_to_some(
        self,
        tokens: TokenIds,
        logits: Floats,
        unknown: int,
        answer: Sequence[int],
        answered: int,
        mask: Mask | None = None,
    ) -> tuple[Floats, int] | None:
        """Returns the changed `logits` of some `tokens`, ascending, and how many of the `unknown` may still be drawn.

        None where that takes the logits of others, as these may be raised, or known ones are all banned.
        """
        changed = np.array(logits)
        if mask is not None:
            changed[~mask[tokens]] = -np.inf
            unknown = int(np.count_nonzero(mask)) - int(np.count_nonzero(mask[tokens]))
        if len(self._allowed):
            _, is_known = places_of(self._allowed, tokens)
            changed[~np.isin(tokens, self._allowed, assume_unique=True)] = -np.inf
            others = self._allowed[~is_known]
            unknown = len(others) if mask is None else int(np.count_nonzero(mask[others]))
        places, _ = places_of(np.array(self._banned(answer, answered), dtype=np.int64), tokens)
        changed[places] = -np.inf
        if np.isneginf(changed.max()):
            return None
        places, is_known = places_of(self._biased, tokens)
        changed[places] = to_floats(changed[places] + self._bias[is_known])
        raises = bool((self._bias[~is_known] > 0).any())
        if self._penalties is not None:
            raises |= not self._penalties.apply_to_some(tokens, changed)
        return None if raises and unknown else (changed, unknown)

    def _banned(self, answer: Sequence[int], answered: int) -> list[int]:
        """The last token of each bad word whose other tokens end the answer, and stop tokens that come too early.

        Only the answer is compared, as in vLLM: a word that begins in the prompt may be completed.
        """
        stops = self._stops if answered < self._min_tokens else []
        return stops + [word[-1] for word in self._bad_words if _ends_with(answer, word[:-1])]

    def _restricted(self, logits: Floats) -> Floats:
        if not len(self._allowed):
            return np.array(logits)
        restricted = np.full(len(logits), -np.inf, dtype=np.float32)
        restricted[self._allowed] = logits[self._allowed]
        return np.array(logits) if np.isneginf(restricted.max()) else restricted


def places_of(wanted: TokenIds, tokens: TokenIds) -> tuple[TokenIds, NDArray[np.bool_]]:
    """The indices among `tokens`, ascending, of those of the `wanted` that are there, and which these are."""
    places = np.minimum(tokens.searchsorted(wanted), len(tokens) - 1)
    known = tokens[places] == wanted
    return places[known], known


def _masked(logits: Floats, mask: Mask) -> Floats:
    """The logits of the mask's tokens, and minus infinity; where the model gives all of these none, they are alike."""
    masked = np.where(mask, logits, np.float32(-np.inf))
    return np.where(mask, np.float32(0), masked) if np.isneginf(masked.max()) else masked


def _ban(logits: Floats, tokens: list[int]) -> None:
    if not tokens:
        return
    before = logits[tokens]
    logits[tokens] = -np.inf
    if np.isneginf(logits.max()):
        logits[tokens] = before


def _ends_with(answer: Sequence[int], tokens: list[int]) -> bool:
    begin = len(answer) - len(tokens)
    return begin >= 0 and list(answer[begin:]) == tokens
