"""The options that name a model."""

import pytest

from api.settings.model import ModelOptions
from tests.support.fake_engine import SAMPLE


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([], [SAMPLE.name]),
        (["r1"], ["r1"]),
        (["r1", "org/r1"], ["r1", "org/r1"]),
        (["r1 org/r1", "r1"], ["r1", "org/r1"]),
    ],
)
def test_a_model_may_be_served_under_several_names(given: list[str], names: list[str]) -> None:
    source = ModelOptions(served_model_name=given).source(None, "embedded", {})
    assert [source.name, *source.aliases] == names
