"""docs/options.md: what is committed is what the options' definitions give."""

from api.cli.document import OPTIONS_PAGE, options_page
from tests import ROOT


def test_the_page_of_options_is_current() -> None:
    assert (ROOT / OPTIONS_PAGE).read_text(encoding="utf-8") == options_page(), "run `make options-doc`"
