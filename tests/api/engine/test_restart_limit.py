"""How often a pipeline may fail before the engine does not bring it back."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import PipelineError, StartError
from api.engine.recovery import RestartLimit


def failure(stage: int | None) -> PipelineError | StartError:
    return StartError("It did not start.") if stage is None else PipelineError("It failed.", stage)


@given(
    most=st.integers(0, 5), happenings=st.lists(st.one_of(st.none(), st.integers(0, 3), st.just("token")), max_size=60)
)
def test_one_failure_more_than_allowed_with_no_token_between_is_the_last(
    most: int, happenings: list[int | str | None]
) -> None:
    limit = RestartLimit(most)
    counted: Counter[int | None] = Counter()
    for happening in happenings:
        if happening == "token":
            limit.record_token()
            counted.clear()
            continue
        assert not isinstance(happening, str)
        counted[happening] += 1
        if counted[happening] <= most:
            limit.record_failure(failure(happening))
            continue
        who = "The pipeline" if happening is None else f"Stage {happening}"
        with pytest.raises(PipelineError, match=rf"^{who} failed {most + 1} times .* the last time: It") as given_up:
            limit.record_failure(failure(happening))
        assert given_up.value.stage == happening
        return


def test_the_failure_that_finds_its_request_ends_nothing_but_counts() -> None:
    limit = RestartLimit(1)
    limit.record_failure(failure(2))
    limit.record_failure(failure(2), is_explained=True)
    with pytest.raises(PipelineError, match="Stage 2 failed 3 times"):
        limit.record_failure(failure(2))
