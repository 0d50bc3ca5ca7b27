"""Which stage is found to have failed, at which step, and the sentence that names it."""

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors.diagnosis import FailureReport, diagnose
from actors.stage.health import StageHealth
from tests.support.pipelines import LOST_LINK, RAISED, health

LATE = FailureReport(kind="late_step", outstanding=[9], cause="it did not come out within 5 s")


@pytest.mark.parametrize(
    ("report", "healths", "sentence"),
    [
        (
            FailureReport(kind="stage_failure", outstanding=[9], cause=LOST_LINK.cause, failure=LOST_LINK),
            [
                health(0, "silent", "no answer"),
                health(1, "dead", "its process died"),
                health(2, "failed", "lost the link from stage 1: reset", failure="lost_link"),
            ],
            "Stage 1 on host-a failed at step 9: its process died (lost the link from stage 1: reset).",
        ),
        (
            FailureReport(kind="stage_failure", outstanding=[], cause=LOST_LINK.cause, failure=LOST_LINK),
            [health(0, "ready"), health(1, "silent", "no answer within 1 s"), health(2, "ready")],
            "Stage 1 on host-a failed between steps: no answer within 1 s (lost the link from stage 1: reset).",
        ),
        (
            FailureReport(kind="stage_failure", outstanding=[9], cause=RAISED.cause, failure=RAISED),
            [
                health(0, "running", seconds=1.0),
                health(1, "ready"),
                health(2, "failed", "ValueError: x", failure="error"),
            ],
            "Stage 2 on host-a failed at step 9: ValueError: x.",
        ),
        (
            FailureReport(kind="lost_link", outstanding=[9], cause="lost the link to stage 0: reset"),
            [
                health(0, "failed", "lost the link to stage 1: reset", failure="lost_link"),
                health(1, "failed", "OSError: x", failure="error"),
            ],
            "Stage 1 on host-a failed at step 9: OSError: x.",
        ),
        (
            # Its neighbour knows more of it than the engine, which has heard of what the neighbour did then.
            FailureReport(kind="lost_link", outstanding=[9], cause="lost the link to stage 0: it closed"),
            [
                health(0, "failed", "lost the link to stage 1: it has been silent for 3 s", failure="lost_link"),
                health(1, "silent", "no answer within 1 s"),
                health(2, "failed", "lost the link from stage 1: reset", failure="lost_link"),
            ],
            "Stage 1 on host-a failed between steps: no answer within 1 s (lost the link to stage 1: it has been "
            "silent for 3 s).",
        ),
        (
            FailureReport(
                kind="lost_link", outstanding=[9], cause="lost the link to stage 0: it closed", engine_paused_s=4.2
            ),
            [health(0, "failed", "lost the link from the engine: silent", failure="lost_link"), health(1, "ready")],
            "The pipeline failed at step 9: the engine stood still for 4.2 s; no stage reports a failure.",
        ),
        (
            LATE,
            [health(0, "running", seconds=0.1), health(1, "running", seconds=4.9), health(2, "ready")],
            "Stage 1 on host-a failed at step 9: it did not come out within 5 s, and the stage has been computing "
            "step 9 for 4.9 s.",
        ),
        (
            # They compute, but nobody has waited for them too long.
            FailureReport(kind="lost_link", outstanding=[9], cause="lost the link to stage 0: reset"),
            [health(0, "ready"), health(1, "running", seconds=0.1)],
            "The pipeline failed at step 9: lost the link to stage 0: reset; no stage reports a failure.",
        ),
        (
            LATE,
            [health(0, "ready"), health(1, "ready")],
            "The pipeline failed at step 9: it did not come out within 5 s; no stage reports a failure.",
        ),
    ],
)
def test_the_diagnosis_names_the_culprit(report: FailureReport, healths: list[StageHealth], sentence: str) -> None:
    assert diagnose(report, healths).sentence == sentence


@pytest.mark.parametrize(
    ("received", "step_id"), [(8, 9), (9, 10), (None, 8), (10, None)], ids=["between", "last", "nothing", "idle"]
)
def test_the_step_that_a_silent_stage_worked_on_is_the_first_that_did_not_come_out(
    received: int | None, step_id: int | None
) -> None:
    after = msgspec.structs.replace(health(2, "ready"), received_step=received)
    report = FailureReport(kind="lost_link", outstanding=[8, 9, 10], cause="x")
    assert diagnose(report, [health(1, "dead", "its process died"), after]).step_id == step_id
    assert diagnose(report, [health(1, "dead", "its process died")]).step_id == 8


@pytest.mark.parametrize(
    ("passed", "step_id"), [(10, 9), (9, 9), (8, None), (None, None)], ids=["later", "just", "not yet", "nothing"]
)
def test_a_step_that_was_never_handed_to_a_dead_stage_is_not_to_blame(passed: int | None, step_id: int | None) -> None:
    report = FailureReport(kind="lost_link", outstanding=[8, 9, 10], cause="x")
    before = msgspec.structs.replace(
        health(0, "failed", "lost the link to stage 1", failure="lost_link"), passed_step=passed
    )
    after = msgspec.structs.replace(health(2, "ready"), received_step=8)
    found = diagnose(report, [before, health(1, "dead", "its process died"), after])
    assert (found.stage, found.step_id) == (1, step_id)


@given(
    stages=st.integers(1, 5),
    counts=st.lists(st.integers(0, 12), min_size=12, max_size=12),
    lost=st.sets(st.integers(0, 4), min_size=1),
)
def test_whatever_is_where_a_dead_stage_is_blamed_for_a_step_that_may_have_been_in_it(
    stages: int, counts: list[int], lost: set[int]
) -> None:
    """Steps 0, 1, ... went in; each stage received so many of them, and handed so many on."""
    submitted, *ways, results = sorted(counts[: 2 * stages + 2], reverse=True)
    received, passed = ways[::2], ways[1::2]
    healths = [
        health(stage, "dead", "its process died")
        if stage in lost
        else msgspec.structs.replace(
            health(stage, "ready"), received_step=received[stage] - 1, passed_step=passed[stage] - 1
        )
        for stage in range(stages)
    ]
    victim = min(lost)
    assume(victim < stages)
    report = FailureReport(kind="lost_link", outstanding=list(range(results, submitted)), cause="x")
    found = diagnose(report, healths)
    assert found.stage == victim
    if found.step_id is None:
        assert received[victim] == passed[victim]
    else:
        assert all(found.step_id < passed[stage] for stage in range(victim))
        assert all(found.step_id >= received[stage] for stage in range(victim, stages) if stage not in lost)
