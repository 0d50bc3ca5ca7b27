"""Rows of logits as the sampler asks for them: what is known of each, and the whole where that is not enough."""

from collections.abc import Sequence
from typing import Protocol

from stages.pending import OnDevice
from stages.sampling.candidates import KnownLogits
from stages.sampling.logprobs import Floats


class LogitRows(Protocol):
    """Rows of logits, one for each token of a step after which one is sampled."""

    def through(self, on_device: OnDevice) -> "LogitRows":
        """Returns the same rows, which use the device by that function."""

    def known(self, index: int) -> KnownLogits | None:
        """Returns what is known of a row; None where whole rows are at hand."""

    def fetch(self, indices: Sequence[int]) -> Sequence[Floats]:
        """Returns whole rows [vocabulary], which may have to come from the device."""


class WholeRows:
    """Rows that are on the host as a whole: float32 [tokens, vocabulary]."""

    def __init__(self, logits: Floats) -> None:
        self._logits = logits

    def through(self, on_device: OnDevice) -> "WholeRows":
        """See `LogitRows`."""
        return self

    def known(self, index: int) -> KnownLogits | None:
        """See `LogitRows`."""
        return None

    def fetch(self, indices: Sequence[int]) -> Sequence[Floats]:
        """See `LogitRows`."""
        return [self._logits[index] for index in indices]


class CountedRows:
    """Rows of which each is fetched at most once; `fallbacks` are those fetched although something was known."""

    def __init__(self, rows: LogitRows) -> None:
        self._rows = rows
        self._known: dict[int, KnownLogits | None] = {}
        self._whole: dict[int, Floats] = {}
        self.fallbacks = 0

    def known(self, index: int) -> KnownLogits | None:
        """Returns what is known of a row; None where the whole is at hand."""
        if index in self._whole:
            return None
        if index not in self._known:
            self._known[index] = self._rows.known(index)
        return self._known[index]

    def prepare(self, indices: Sequence[int]) -> None:
        """Fetches rows, all at once."""
        missing = [index for index in indices if index not in self._whole]
        if missing:
            self.fallbacks += sum(self.known(index) is not None for index in missing)
            self._whole.update(zip(missing, self._rows.fetch(missing), strict=True))

    def whole(self, index: int) -> Floats:
        """Returns a whole row [vocabulary]."""
        self.prepare([index])
        return self._whole[index]
