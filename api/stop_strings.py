"""Stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Releases text up to the first stop string, holding back whatever may yet become one.

    The first is the one whose last character comes first, and of those the longest, so that the outcome does not
    depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """`stops` are non-empty; `include_stop` releases the stop string too."""
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched = False

    def add(self, text: str) -> str:
        """The text that can now be released. Once `matched`, nothing more may be added."""
        if not self._stops:
            return text
        held = self._held + text
        match = self._first_match(held)
        if match is not None:
            self.matched = True
            self._held = ""
            begin, end = match
            return held[: end if self._include_stop else begin]
        kept = self._possible_beginning(held)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def flush(self) -> str:
        """What is still held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, int] | None:
        found = ((begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop)) >= 0)
        first = min(found, default=None)
        return None if first is None else (first[1], first[0])

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            ending = text[-length:]
            if any(stop.startswith(ending) for stop in self._stops):
                return length
        return 0
