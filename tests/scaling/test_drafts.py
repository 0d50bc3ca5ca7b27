"""Drafts of R1 on the timed device are worth what `plan` predicts, and are made where it says that they pay.

The scheduler and the times are the real ones on a clock of its own, so that no busy machine changes a figure; the full
form measures the real server.
"""

import os
from pathlib import Path

import pytest

from benchmarks.scaling.case import r1_config, r1_options
from benchmarks.scaling.drafts import DraftCase, DraftRow, measured, planned, simulated, table, targets
from benchmarks.scaling.run import Effort
from benchmarks.scaling.simulation import Simulation
from benchmarks.support.report import table_of

NEAR = 0.05
PAY = [
    DraftCase(stages=8),
    DraftCase(stages=16),
    DraftCase(stages=8, users=32),
    DraftCase(stages=8, users=16, drafts=2),
    DraftCase(stages=16, drafts=3, acceptance=0.5),
]
DO_NOT_PAY = [DraftCase(stages=16, drafts=3, acceptance=0.1), DraftCase(stages=8, acceptance=0.0)]


def check(row: DraftRow, near: float = NEAR) -> None:
    """The figures are those of `plan`, and so is whether drafts are made."""
    assert row.are_on == row.pays
    assert row.over_plan == pytest.approx(1, abs=near)
    assert row.tokens_per_s_per_user == pytest.approx(row.planned_tokens_per_s_per_user, rel=near)
    assert row.tokens_per_s == pytest.approx(row.planned_tokens_per_s, rel=near)


@pytest.mark.parametrize("case", PAY, ids=str)
def test_where_drafts_pay_they_give_what_is_predicted(case: DraftCase) -> None:
    row = simulated(case, warm_tokens=100, tokens=200)
    assert row.pays
    check(row)
    assert row.tokens_per_s > 1.1 * row.without_tokens_per_s


@pytest.mark.parametrize("case", DO_NOT_PAY, ids=str)
def test_where_drafts_do_not_pay_they_are_given_up_and_cost_nothing(case: DraftCase) -> None:
    row = simulated(case, warm_tokens=200, tokens=200)
    assert not row.pays
    check(row)
    assert row.planned_tokens_per_s == row.without_tokens_per_s == planned(case).tokens_per_s


def test_a_simulation_is_always_the_same() -> None:
    case = DraftCase(stages=8)
    assert simulated(case, 20, 40) == simulated(case, 20, 40)


def test_without_drafts_a_simulation_is_the_slowest_stages_time() -> None:
    assert not list(Simulation(r1_options(8), r1_config()).run([]))
    case = DraftCase(stages=8, drafts=0)
    row = simulated(case, 50, 100)
    assert (row.pays, row.are_on, row.tokens_per_draft) == (False, False, 1.0)
    assert row.tokens_per_s == pytest.approx(planned(case).tokens_per_s, rel=0.01)


def test_a_table_and_targets_say_what_was_found_and_what_was_predicted() -> None:
    row = simulated(DraftCase(stages=8), 20, 40)
    [target] = targets([row])
    assert (target.figure, target.is_floor) == (row.over_plan, True)
    shown = table([row])
    assert shown.row_count == 1
    assert len(shown.columns) > len(table_of("stages").columns)


@pytest.mark.slow
@pytest.mark.skipif("GALAXYLINE_FULL" not in os.environ, reason="it measures for minutes: GALAXYLINE_FULL=1")
@pytest.mark.parametrize("stages", [8, 16])
def test_the_real_server_gives_what_is_predicted(stages: int, tmp_path: Path) -> None:
    row = measured(DraftCase(stages=stages), tmp_path, Effort(warm_s=10.0, measured_s=20.0, probes=0))
    check(row)
