"""Stop strings in a text that arrives in chunks."""

from collections.abc import Sequence


class StopStrings:
    """Releases text up to the first stop string, and holds back what may yet become one.

    The first is the one whose last character comes first, and of those the longest, so that the outcome does not
    depend on how the text was cut into chunks. `matched` is that string, None before.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """`stops` are non-empty; `include_stop` releases the stop string too."""
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def add_text(self, text: str, may_stop: bool = True) -> str:
        """Adds text, and returns what can now be released. Once there is a match, nothing more may be added.

        A stop string that ends in a text added without `may_stop` does not count.
        """
        if not self._stops:
            return text
        begin_of_new = len(self._held)
        held = self._held + text
        match = self._first_match(held, begin_of_new) if may_stop else None
        if match is not None:
            end, begin, self.matched = match
            self._held = ""
            return held[: end if self._include_stop else begin]
        kept = self._possible_beginning(held)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def flush(self) -> str:
        """Returns the text that is still held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, after: int) -> tuple[int, int, str] | None:
        """End, begin and string of the first match that ends beyond `after` characters."""
        found: list[tuple[int, int, str]] = []
        for stop in self._stops:
            begin = text.find(stop, max(after + 1 - len(stop), 0))
            if begin >= 0:
                found.append((begin + len(stop), begin, stop))
        return min(found, default=None)

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with.

        A place where none begins is released and never looked at again, so that each character costs as many
        comparisons as there are stop strings, however long they are.
        """
        for begin in range(max(len(text) - self._longest + 1, 0), len(text)):
            ending = text[begin:]
            if any(stop.startswith(ending) for stop in self._stops):
                return len(ending)
        return 0
