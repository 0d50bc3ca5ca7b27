"""Tables on consoles of any width: nothing is cut, nothing is lost, and every part says which rows it is of."""

import io

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from api.cli.parameters import COLUMNS_MIN, PLAIN_COLUMNS, console_width
from api.cli.tables import Column, FoldedTable


@settings(deadline=None)
@given(
    width=st.integers(COLUMNS_MIN, 150),
    columns=st.integers(1, 12),
    rows=st.integers(1, 4),
    digits=st.integers(1, COLUMNS_MIN // 2 - 2),
)
def test_every_figure_is_whole_at_any_width(width: int, columns: int, rows: int, digits: int) -> None:
    figures = [[str(10 ** (digits - 1) + place * rows + row) for row in range(rows)] for place in range(columns)]
    table = FoldedTable(
        [
            Column.of("key", (f"key{row}" for row in range(rows)), "name"),
            *(Column.of(f"c{place}", cells, "figure") for place, cells in enumerate(figures)),
        ]
    )
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    for row in range(rows):
        own = [line.split()[1:] for line in lines if line.split()[:1] == [f"key{row}"]]
        assert [cell for part in own for cell in part] == [cells[row] for cells in figures]


def test_a_sentence_goes_on_in_the_next_line() -> None:
    table = FoldedTable(
        [Column.of("stage", ["0"], "figure"), Column.of("state", ["dead: its process died of old age"], "sentence")]
    )
    console = Console(width=30, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "dead: its process died" in text
    assert "old age" in text.splitlines()[-1]


def test_the_width_is_what_columns_says_else_the_terminals_else_a_plain_one() -> None:
    assert (
        console_width({"COLUMNS": "72"}, is_terminal=False) == console_width({"COLUMNS": "72"}, is_terminal=True) == 72
    )
    assert console_width({}, is_terminal=True) is None
    assert console_width({}, is_terminal=False) == PLAIN_COLUMNS
    assert console_width({"COLUMNS": "wide"}, is_terminal=False) == PLAIN_COLUMNS
    assert console_width({"COLUMNS": "0"}, is_terminal=False) == PLAIN_COLUMNS
    assert console_width({"COLUMNS": "3"}, is_terminal=False) == COLUMNS_MIN
