"""Predicted times against numbers worked out in another way, and properties of every prediction."""

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.capacity.chip_memory import chip_stages
from stages.capacity.prediction import PredictionOptions, predict
from stages.capacity.step_time import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    REDUCE_SCATTER,
    CollectiveCost,
    ExpertKernel,
    StageTimes,
    StepTime,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    hit_share,
    reduce_scatter_s,
)
from stages.tensor_dtypes import WeightDtypes
from stages.wormhole import LINKS, flops_per_s
from tests.support.plans import deployment, r1_config

R1 = r1_config()
OPTIONS = PredictionOptions(context=2048, prompt_tokens=1024)
TORCH_FREE = (
    "stages.capacity.step_time",
    "stages.capacity.fit",
    "api.cli.plan",
)


def stage_times(
    stages: int = 8, rows: int = 1, stage: int = 3, *, traced: bool = True, experts: ExpertKernel = "all"
) -> StageTimes:
    spec = chip_stages(R1, deployment(stages, rows))[stage]
    return StageTimes(R1, spec, rows, WeightDtypes(), traced=traced, expert_kernel=experts)


def test_predictions_need_no_torch() -> None:
    program = f"import sys\nimport {', '.join(TORCH_FREE)}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_peak_arithmetic_is_what_the_card_is_sold_with() -> None:
    """The 262 (BLOCKFP8) and 131 (FP16) TeraFLOPS of an n300 are those of two chips of 64 cores."""
    assert flops_per_s("HiFi2") == pytest.approx(262e12 / 2, rel=0.01)
    assert flops_per_s("HiFi4") == pytest.approx(131e12 / 2, rel=0.01)


@pytest.mark.parametrize("tokens", [1, 32, 128, 256])
def test_the_share_of_experts_that_are_hit_is_what_drawing_them_gives(tokens: int) -> None:
    draw = np.random.default_rng(0)
    drawn = [len({e for _ in range(tokens) for e in draw.choice(256, 8, replace=False)}) for _ in range(40)]
    assert hit_share(R1, tokens) * 256 == pytest.approx(np.mean(drawn), rel=0.03)


@pytest.mark.parametrize(
    ("cost", "chips", "link_bytes", "measured_us"),
    [
        (ALL_GATHER, 4, 3 * 16384, 14.16),
        (ALL_GATHER, 2, 524288, 48.31),
        (REDUCE_SCATTER, 4, 3 / 4 * 65536, 22.33),
        (REDUCE_SCATTER, 4, 3 / 4 * 1048576, 101.24),
        (ALL_REDUCE, 4, 2 * 3 / 4 * 131072, 52.05),
        (ALL_TO_ALL, 4, 65536, 17.70),
    ],
)
def test_collectives_are_near_what_was_measured_over_one_link(
    cost: CollectiveCost, chips: int, link_bytes: float, measured_us: float
) -> None:
    """Costs are those of tt-metal's table of Wormhole chips in a line, with bytes divided among four links."""
    assert cost.seconds(chips, link_bytes * LINKS) * 1e6 == pytest.approx(measured_us, rel=0.2)


def test_collectives_vanish_on_one_chip() -> None:
    assert [of(1, 1e6) for of in (all_gather_s, reduce_scatter_s, all_reduce_s, all_to_all_s)] == [0.0] * 4


def test_a_decode_step_of_one_row_reads_all_its_weights() -> None:
    """Seven layers have 32 experts each on a chip, of three matrices, two in bfloat4_b and one in bfloat8_b."""
    experts = 7 * 32 * 7168 * 2048 * (2 * 576 + 1088) / 1024
    reads = stage_times().decode(32, 2048).memory_s * 288e9 * 0.83
    assert experts < reads < 1.06 * experts


def test_with_few_tokens_a_kernel_of_chosen_experts_reads_their_share() -> None:
    every = stage_times().decode(32, 2048).memory_s
    chosen = stage_times(experts="chosen").decode(32, 2048).memory_s
    assert chosen / every == pytest.approx(1 - (31 / 32) ** 32, abs=0.03)


def test_experts_of_many_tokens_are_bound_by_arithmetic() -> None:
    """A prefill chunk of 256 tokens takes 32 experts a chip for each token, at half of 131 TFLOPS."""
    flops = 7 * 32 * 256 * 3 * 2 * 7168 * 2048
    computed = stage_times().prefill(256).compute_s
    assert flops / 65.5e12 < computed < 1.2 * flops / 65.5e12


def test_a_trace_spares_launches_alone() -> None:
    traced, untraced = (stage_times(traced=traced).decode(32, 2048) for traced in (True, False))
    assert untraced.launch_s > 4 * traced.launch_s
    assert msgspec.structs.replace(untraced, launch_s=0) == msgspec.structs.replace(traced, launch_s=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 96), st.integers(1, 32), st.integers(0, 8000), st.sampled_from(["all", "chosen"]))
def test_more_users_or_more_context_never_take_less(users: int, more: int, context: int, experts: ExpertKernel) -> None:
    times = stage_times(experts=experts)
    before = times.decode(users, context).total_s
    assert times.decode(users + more, context).total_s >= before * (1 - 1e-12)
    assert times.decode(users, context + more).total_s >= before * (1 - 1e-12)


@given(st.integers(1, 2000), st.integers(1, 500), st.integers(0, 4000))
@settings(max_examples=40, deadline=None)
def test_longer_chunks_and_later_ones_never_take_less(tokens: int, more: int, start: int) -> None:
    times = stage_times()
    before = times.prefill(tokens, start).total_s
    assert times.prefill(tokens + more, start).total_s >= before * (1 - 1e-12)
    assert times.prefill(tokens, start + more).total_s >= before * (1 - 1e-12)


def test_parts_add_up() -> None:
    time = StepTime(memory_s=1, compute_s=2, network_s=3, launch_s=4)
    assert (time + time.times(2)).total_s == 30


def test_a_full_pipeline_is_as_fast_as_its_slowest_stage() -> None:
    plan = deployment(4, 4)
    prediction = predict(R1, plan, OPTIONS)
    slowest = max(time.total_s for time in prediction.decode)
    assert prediction.cycle_s == pytest.approx(5 * slowest)
    assert prediction.tokens_per_s == pytest.approx(32 * 4 / slowest)
    assert prediction.tokens_per_s_per_user == pytest.approx(prediction.tokens_per_s / 640)


def test_one_microbatch_waits_for_every_stage_and_hop() -> None:
    prediction = predict(R1, deployment(4, 4, microbatches=1), OPTIONS)
    passed = sum(time.total_s for time in prediction.decode)
    assert prediction.cycle_s == pytest.approx(passed + 3 * prediction.hop_s)


def test_the_first_token_waits_for_all_chunks() -> None:
    one, four = (predict(R1, deployment(4, 4), msgspec.structs.replace(OPTIONS, prompt_tokens=n)) for n in (256, 1024))
    slowest = max(time.total_s for time in four.prefill)
    assert four.ttft_s - one.ttft_s == pytest.approx(3 * slowest, rel=0.2)
