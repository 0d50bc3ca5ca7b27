"""The benchmark of scaling runs, and its figures follow from its measurements. No test looks at measured
figures."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from benchmarks.scaling.case import USERS, cases, equal_case, r1_case
from benchmarks.scaling.figures import ScalingRow, chart, row, targets
from benchmarks.scaling.ideal import Ideal
from benchmarks.scaling.line_chart import line_chart
from benchmarks.scaling.run import Counters, Run, step_seconds
from benchmarks.scaling.steady_client import SteadyTimes
from benchmarks.support.report import Target
from tests.support.plans import r1_config
from weights.model_config import ModelConfig

SECONDS = 280
CORES = 2
SVG = "{http://www.w3.org/2000/svg}"


def counters(seconds: float, steps: int) -> Counters:
    view = {
        "model": "m",
        "phase": "ready",
        "detail": "",
        "engine": None,
        "replicas": [],
        "stages": [stage_view(0, steps + 1, 0.5), stage_view(1, steps, 0.25)],
    }
    processor = {"client_s": seconds, "front_end_s": 2 * seconds, "engine_s": 4 * seconds, "stages_s": 10 * seconds}
    return msgspec.convert({**processor, "view": view, "tokens": 4 * steps, "at_s": seconds}, type=Counters)


def stage_view(stage: int, steps: int, busy: float) -> dict[str, object]:
    given: dict[str, object] = {"stage": stage, "host": None, "rows": None, "pid": None, "step_id": None}
    given |= {"first_layer": 0, "end_layer": 1, "layers_done": 1, "state": "ready", "detail": "", "step_seconds": 0.0}
    given |= {"steps_done": steps, "busy_share": busy, "restarts": 0, "resident_bytes": None}
    return {**given, "kv_cache_blocks_used": 0}


def measured(directory: Path) -> ScalingRow:
    """Ten seconds of two stages of 10 ms, in which 3 microbatches of 4 users got 3600 tokens in 900 steps."""
    case = equal_case(2, 10, directory)
    assert case.ideal is not None
    streams = [[100 + 0.033 * token for token in range(300)] for _ in range(12)]
    times = SteadyTimes(began_s=100, ended_s=110, streams=streams, probes=[0.02, 0.03, 0.04])
    run = Run(
        case=case,
        ideal=case.ideal,
        of_steps=case.ideal,
        before=counters(1.0, 50),
        after=counters(1.1, 950),
        times=times,
    )
    return row(run, CORES)


def test_a_row_says_what_was_measured_beside_the_ideal(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert found.tokens_per_s == 360
    assert found.ideal_tokens_per_s == pytest.approx(USERS / 0.010)
    assert found.over_ideal == pytest.approx(0.9)
    assert found.gap_p50_s == pytest.approx(0.033)
    assert found.gap_ideal_s == pytest.approx(0.030)
    assert found.gap_over_stages == pytest.approx(1.65)
    assert (found.first_token_p50_s, found.first_token_p99_s) == (0.03, 0.04)
    assert found.busy_shares == [0.5, 0.25]


def test_a_row_says_what_the_processor_bounds(tmp_path: Path) -> None:
    found = measured(tmp_path)
    # The front end took 0.2 s, the engine 0.4 s and both stages 1 s, in 900 steps.
    assert found.hop_us == pytest.approx(1e6 / 900 / 2)
    assert found.engine_us == pytest.approx(0.4e6 / 900)
    assert found.front_end_us == pytest.approx(0.2e6 / 3600)
    assert found.clients_share == pytest.approx(0.3 / 10 / CORES)
    assert found.processor_tokens_per_s == pytest.approx(CORES / (1.6 / 900) * 4)


def test_each_pipeline_of_equal_stages_has_the_issues_bound(tmp_path: Path) -> None:
    small = measured(tmp_path)
    rows = [msgspec.structs.replace(small, stages=stages) for stages in (4, 16, 32, 64)]
    rows.append(msgspec.structs.replace(small, name="R1", stages=61))
    found: list[Target] = targets(rows)
    assert [target.bound for target in found] == [0.95, 0.95, 0.9, 0.9, 1.1, 0.2]
    assert [target.is_floor for target in found] == [True] * 4 + [False] * 2
    assert targets(rows[-1:]) == []


def test_as_many_microbatches_as_stages_show_how_soon_a_token_comes_and_not_how_many(tmp_path: Path) -> None:
    usual = msgspec.structs.replace(measured(tmp_path), stages=16, microbatches=17)
    fewest = msgspec.structs.replace(usual, microbatches=16, over_ideal=0.1)
    assert [target.bound for target in targets([usual, fewest])] == [0.95, 1.1, 1.1, 0.2]
    assert chart([usual, fewest]) == chart([usual])
    times = [case.ideal.cycle_s for case in cases("timed", tmp_path, short=False) if case.ideal and case.stages == 16]
    assert times[:2] == pytest.approx([0.17, 0.16])


def test_r1_is_predicted_for_the_stages_that_the_plan_gives() -> None:
    ideal = r1_case(16).ideal
    assert isinstance(ideal, Ideal)
    assert len(ideal.decode_s) == 16
    assert ideal.tokens_per_s < ideal.equal_tokens_per_s
    assert sum(r1_case(8).ideal.decode_s) == pytest.approx(sum(ideal.decode_s), rel=0.01)  # type: ignore[union-attr]


def test_the_synthetic_model_has_a_layer_for_every_stage(tmp_path: Path) -> None:
    case = equal_case(64, 20, tmp_path)
    config = ModelConfig.from_file(Path(case.model) / "config.json")
    assert (config.num_hidden_layers, config.hidden_size) == (64, r1_config().hidden_size)


def test_step_times_are_read_from_the_metrics() -> None:
    lines = [
        'galaxyline:stage_step_seconds_bucket{host="vm",le="0.1",mode="decode",stage="0"} 3.0',
        'galaxyline:stage_step_seconds_count{host="vm",mode="decode",stage="0"} 4.0',
        'galaxyline:stage_step_seconds_sum{host="vm",mode="decode",stage="0"} 0.5',
        'galaxyline:stage_step_seconds_count{host="vm",mode="prefill",stage="12"} 2.0',
        'galaxyline:stage_step_seconds_sum{host="vm",mode="prefill",stage="12"} 1e-3',
    ]
    assert step_seconds("\n".join(lines)) == {("decode", 0): (4, 0.5), ("prefill", 12): (2, 1e-3)}


def test_a_chart_has_a_line_for_each_series_and_a_point_for_each_figure() -> None:
    chart = ElementTree.fromstring(line_chart("a < b", {"one": [(4, 0.9), (64, 2.0)], "two": [(8, 0.5)]}))
    circles = [(float(circle.get("cx", 0)), float(circle.get("cy", 0))) for circle in chart.iter(f"{SVG}circle")]
    assert len(circles) == 3
    # More stages are further right, a larger share of the ideal is further up, and nothing is outside the frame.
    assert circles[0][0] < circles[2][0] < circles[1][0]
    assert circles[2][1] > circles[0][1] > circles[1][1] > 0
    assert {"a < b", "one", "two"} <= {text.text for text in chart.iter(f"{SVG}text")}


@pytest.mark.slow
def test_the_short_form_writes_figures_a_chart_and_a_timeline(tmp_path: Path, ray_cluster: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "benchmarks.scaling", "--short", "--only", "4", "--out", str(tmp_path)]
    environment = {**os.environ, **ray_cluster}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "scaling.timed.json").read_bytes())
    [found] = [msgspec.convert(row, type=ScalingRow) for row in report["rows"]]
    assert (report["device"], found.stages, found.users) == ("timed", 4, USERS)
    assert len(found.busy_shares) == 4
    assert len(report["targets"]) == 2
    ElementTree.parse(tmp_path / "scaling.timed.svg")
    timeline = json.loads((tmp_path / "scaling.timed.timeline.json").read_bytes())
    assert len(timeline if isinstance(timeline, list) else timeline["traceEvents"]) > 100
