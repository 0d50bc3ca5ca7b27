"""The options of the timed device: what they go with, and what stages are told."""

from pathlib import Path
from typing import Any

import pytest

from api.errors import OptionError
from api.settings.engine import EngineSettings
from api.text.model_source import resolve_config
from stages.options import DRAFT_ACCEPTANCE, TimedOptions
from tests.support.plans import r1_config


def timed_options(**given: Any) -> TimedOptions:
    """What the stages of R1 on the timed device are told."""
    settings = EngineSettings.of(cache_dir=Path("cache"), max_model_len=4096, stages=8, **{"device": "timed", **given})
    timed = settings.engine_options(resolve_config("r1", {}), r1_config()).pipeline.stage.timed
    assert timed is not None
    return timed


def test_drafts_are_right_as_often_as_is_said() -> None:
    assert timed_options(num_speculative_tokens=1).acceptance == DRAFT_ACCEPTANCE
    assert timed_options(num_speculative_tokens=1, draft_acceptance=0.0).acceptance == 0.0
    configured = timed_options(speculative_config='{"method": "mtp"}', draft_acceptance=0.25)
    assert configured.acceptance == 0.25


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"device": "embedded", "num_speculative_tokens": 1},
            "is for --device timed: the embedded device makes its own",
        ),
        ({}, "--draft-acceptance goes with --num-speculative-tokens: without it none are made."),
        ({"num_speculative_tokens": 0}, "--draft-acceptance goes with --num-speculative-tokens"),
    ],
)
def test_how_often_drafts_are_right_is_said_where_it_is_not_for_the_model_to_say(
    given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(OptionError, match=sentence):
        timed_options(**given, draft_acceptance=0.5)


@pytest.mark.parametrize("acceptance", [-0.1, 1.1])
def test_a_probability_is_from_0_to_1(acceptance: float) -> None:
    with pytest.raises(OptionError, match="cannot have this value"):
        timed_options(num_speculative_tokens=1, draft_acceptance=acceptance)
