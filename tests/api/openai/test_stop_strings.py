"""Stop strings, against a plain reading of their definition, however the text is cut."""

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from api.openai.stop_strings import StopStrings

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def expected(text: str, stops: list[str], include_stop: bool, unchecked: int = 0) -> tuple[str, str | None]:
    """Reads character by character; the first moment at which the text ends with a stop string decides.

    Nothing is decided within the first `unchecked` characters.
    """
    for end in range(unchecked + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


@settings(deadline=None)
@given(text=TEXT, stops=STOPS, include_stop=st.booleans(), data=st.data())
def test_any_cut_of_a_text_stops_at_the_same_place(
    text: str, stops: list[str], include_stop: bool, data: st.DataObject
) -> None:
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10))), len(text)]
    unchecked = data.draw(st.sampled_from(cuts))
    checker = StopStrings(stops, include_stop)
    released = ""
    for begin, end in itertools.pairwise(cuts):
        released += checker.add_text(text[begin:end], may_stop=end > unchecked)
        if checker.matched is not None:
            break
    else:
        released += checker.flush()
    assert (released, checker.matched) == expected(text, stops, include_stop, unchecked)


@settings(deadline=None)
@given(text=TEXT, stops=STOPS)
def test_just_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    checker = StopStrings(stops)
    released = ""
    for count, character in enumerate(text, start=1):
        released += checker.add_text(character)
        if checker.matched is not None:
            return
        held = text[len(released) : count]
        beginnings = [text[begin:count] for begin in range(count)]
        possible = [start for start in beginnings if any(stop.startswith(start) for stop in stops)]
        assert held == max(possible, key=len, default="")


def test_what_is_held_back_is_compared_once_however_long_it_is() -> None:
    """A text that all but completes long stop strings again and again costs no more than its length times theirs."""
    comparisons = 0

    class Counted(str):
        __slots__ = ()

        def startswith(self, *arguments: Any) -> bool:
            nonlocal comparisons
            comparisons += 1
            return super().startswith(*arguments)

    stops = [Counted("a" * 1000 + str(number)) for number in range(64)]
    checker = StopStrings(stops)
    text = ("a" * 999 + "c") * 3
    released = "".join(checker.add_text(character) for character in text) + checker.flush()
    assert released == text
    assert comparisons <= 2 * len(text) * len(stops)
