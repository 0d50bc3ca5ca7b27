"""Repetition, presence and frequency penalties of one request, kept up to date token by token."""

from collections.abc import Sequence

import numpy as np

from stages.sampling.arrays import Floats, to_floats
from stages.step import SamplingParams

ROOM = 64
"""Tokens for which there is room beyond those of the admission, before arrays grow."""


class Penalties:
    """Which tokens a request has had and how often its answer has had each: one entry a token, in arrays that grow.

    vLLM's penalties (apply_penalties in vllm/model_executor/layers/utils.py): the logit of a token of prompt or answer
    is divided by the repetition penalty where it is positive, else multiplied by it; then the frequency penalty is
    subtracted as often as the answer has the token, and the presence penalty once if it has it at all.
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
        """Whether any of the penalties does something."""
        return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0

    def note(self, token: int) -> None:
        """The answer has one more token."""
        entry = self._entries.setdefault(token, self._size)
        if entry == self._size:
            if entry == len(self._tokens):
                self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._tokens[entry] = token
            self._size += 1
        self._counts[entry] += 1

    def apply(self, logits: Floats) -> None:
        """Changes `logits` [vocabulary] in place."""
        tokens, counts = self._tokens[: self._size], self._counts[: self._size]
        penalised = logits[tokens].astype(np.float64)
        # What overflows is infinite, and becomes the largest number or a ban.
        with np.errstate(over="ignore"):
            penalised = np.where(penalised > 0, penalised / self._repetition, penalised * self._repetition)
        penalised -= self._frequency * counts + self._presence * (counts > 0)
        logits[tokens] = to_floats(penalised)
