"""The benchmarks run, and their files have the promised contents. No test looks at the figures."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import DeepseekV3ForCausalLM

from benchmarks.checkpoint import SEED, SIZES, write_checkpoint
from benchmarks.model.contender import TokenTimes, prefill_tokens_per_s, random_prompts
from benchmarks.start import LAST_PART, PARTS
from benchmarks.support.null_stage import TOKEN, NullStage, StepCount
from benchmarks.support.spread import Spread, ratios
from stages.plan import StageSpec
from stages.step import Segment, Step, StepResult
from tests.support.checkpoints import stored_tensors
from weights.checkpoint import Checkpoint, RandomCheckpoint

SECONDS = 200
ROW_NAMES: dict[str, dict[str, type]] = {
    "hop": {"size": str, "bytes": int},
    "overhead": {"stages": int, "streams": int},
    "model": {"contender": str, "case": str, "batch": int, "prompt": int},
    "trace": {"batch": int},
    "sampling": {"way": str},
    "loading": {"checkpoint": str, "bytes": int},
    "replicas": {"replicas": int, "streams": int},
    "grammars": {"case": str},
    "prefix": {"case": str, "unit": str, "hit_rate": float, "ideal": float, "recomputed": float},
    "drafts": {
        "case": str,
        "stages": int,
        "users": int,
        "drafted": float,
        "tokens_per_draft": float,
        "overall": float,
    },
}
FIGURES = {
    "hop": ["floor_us", "event_loop_us", "framing_us", "bare_us", "whole_us", "bare_ratio", "whole_ratio"],
    "overhead": ["tokens_per_step", "front_end_us", "engine_us", "stage_us"],
    "model": ["tokens_per_s", "first_token_s", "beside_hugging_face"],
    "trace": ["plain_ms", "replayed_ms", "faster"],
    "sampling": ["times_nothing", "compute_ms", "compute_cpu_ms", "sampling_cpu_ms"],
    "replicas": ["tokens_per_s", "times_one"],
    "grammars": ["tokens_per_s", "times_free"],
    "prefix": ["cached", "computed", "times"],
    "drafts": ["times", "with_drafts", "without"],
    "loading": ["converted_s", "cached_s", "ratio", "converted_disk_mb", "cached_disk_mb"],
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    own = {**os.environ, **environment}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS, env=own)


def check_report(report: dict[str, Any], name: str) -> None:
    assert (report["benchmark"], report["device"], report["short"]) == (name, "embedded", True)
    assert report["machine"]["cores"] >= 1
    assert report["rows"]
    for row in report["rows"]:
        for key, kind in ROW_NAMES[name].items():
            assert type(row.pop(key)) is kind
        assert sorted(row) == sorted(FIGURES[name])
        for spread in row.values():
            assert all(math.isfinite(spread[key]) for key in ("low", "median", "high"))
            assert 0 <= spread["low"] <= spread["median"] <= spread["high"]
    for target in report["targets"]:
        assert set(target) == {"name", "bound", "figure", "is_floor"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ROW_NAMES))
def test_the_short_form_prints_a_table_and_writes_figures(
    name: str, tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    done = run(f"benchmarks.{name}", "--short", "--out", str(tmp_path), **ray_cluster)
    assert done.returncode == 0, done.stderr
    file = tmp_path / f"{name}.embedded.json"
    assert f"{name} on embedded" in done.stdout
    assert str(file) in done.stdout
    check_report(json.loads(file.read_bytes()), name)


@pytest.mark.slow
def test_the_parts_of_a_start_are_all_of_it(tmp_path: Path) -> None:
    done = run("benchmarks.start", "--short", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "start.embedded.json").read_bytes())
    assert report["targets"] == []
    rows = {row["part"]: row for row in report["rows"]}
    assert all(len(row["seconds"]) == 1 and row["beside"] == [] for row in rows.values())
    parts = [rows[part]["seconds"][0] for part in [*(part for part, _ in PARTS), LAST_PART]]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(rows["start to ready"]["seconds"][0])
    assert {"front end", "engine", "fork server", "control store", "raylet", "stages"} <= set(rows)
    assert "Ray's agents" not in rows


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = run("benchmarks.hop", "--short", "--device", "abacus", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "'abacus'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_spread_holds_the_middle_half() -> None:
    assert Spread.of([5.0]) == Spread(median=5.0, low=5.0, high=5.0)
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([1.0, 2.0, 3.0]).scaled(10) == Spread(median=20.0, low=15.0, high=25.0)
    # Each value is divided by the other one of the same turn.
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]).median == 2.0


def test_decode_counts_only_while_all_are_decoded() -> None:
    times = TokenTimes([[1.0, 2.0, 3.0, 4.0], [2.5, 3.0, 3.5, 4.5]])
    # The time is from 2.5, when the second has begun, to 4.0, when the first ends: 3.0 and 4.0, and 3.0 and 3.5.
    assert times.decode_tokens_per_s == pytest.approx(4 / 1.5)
    assert times.first_token_s == 1.75
    assert prefill_tokens_per_s([[7] * 10, [7] * 15], times) == 10.0


def test_prompts_follow_from_their_seed() -> None:
    assert random_prompts(2, 5, 100, seed=1) == random_prompts(2, 5, 100, seed=1)
    assert random_prompts(2, 5, 100, seed=1) != random_prompts(2, 5, 100, seed=2)


def test_null_stages_pass_hidden_states_and_answer(tmp_path: Path) -> None:
    specs = [StageSpec(index=index, stages=3, first_layer=index, end_layer=index + 1) for index in range(3)]
    counts = [StepCount(tmp_path / f"{spec.index}") for spec in specs]
    stages = [NullStage(spec, 8, count) for spec, count in zip(specs, counts, strict=True)]
    segments = [Segment(slot=slot, start=0, tokens=[1, 2], new_blocks=[], sample=slot == 1) for slot in range(2)]
    step = Step(epoch=1, step_id=5, mode="prefill", segments=segments, admissions=[], ended=[])
    assert stages[0].step(step, memoryview(b"")) == memoryview(bytes(4 * 8))
    assert stages[1].step(step, memoryview(bytearray(b"x" * 32))) == memoryview(b"x" * 32)
    assert stages[2].step(step, memoryview(bytes(32))) == StepResult(epoch=1, step_id=5, tokens=[TOKEN])
    assert [StepCount(tmp_path / f"{spec.index}").steps for spec in specs] == [1, 1, 1]


def test_a_checkpoint_is_hugging_faces_and_written_once(tmp_path: Path) -> None:
    directory = write_checkpoint("tiny", tmp_path / "tiny")
    written = (directory / "model.safetensors").stat().st_mtime_ns
    model = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert model.config.hidden_size == SIZES["tiny"].hidden_size
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        stored = file.get_tensor("model.layers.1.self_attn.o_proj.weight")
    assert torch.equal(model.state_dict()["model.layers.1.self_attn.o_proj.weight"], stored.float())
    write_checkpoint("tiny", directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written


def test_an_fp8_checkpoint_holds_the_same_weights_to_three_bits_of_mantissa(tmp_path: Path) -> None:
    directory = write_checkpoint("tiny-fp8", tmp_path)
    checkpoint = Checkpoint.open(directory)
    checkpoint.validate("")
    exact = RandomCheckpoint(checkpoint.config, SEED)
    stored = stored_tensors(directory)
    assert sorted(stored) == exact.names()
    for name, values in stored.items():
        expected = exact.tensor(name).float()
        step = expected.abs() / 16 if "_proj" in name else torch.zeros(())
        assert torch.all((values - expected).abs() <= step * 1.001), name
