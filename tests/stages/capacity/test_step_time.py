"""Predicted times against numbers worked out in another way, and properties of every prediction."""

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.capacity.chip_memory import chip_stages
from stages.capacity.step_time import (
    ALL_GATHER,
    ALL_TO_ALL,
    CANDIDATE_OPS,
    MATMUL_FIDELITY,
    REDUCE_SCATTER,
    TRACED_LAUNCH_S,
    UNTRACED_LAUNCH_S,
    CollectiveCost,
    ExpertKernel,
    StageTimes,
    StepTime,
    all_gather_s,
    all_to_all_s,
    hit_share,
    reduce_scatter_s,
)
from stages.models.deepseek_v3.architecture import OPS
from stages.models.module import matmul_kernel
from stages.plan import StageSpec
from stages.tensor_dtypes import WeightDtypes
from stages.wormhole import LINKS, flops_per_s
from tests.support.plans import deployment, r1_config

R1 = r1_config()
TORCH_FREE = (
    "stages.capacity.step_time",
    "stages.capacity.fit",
    "stages.capacity.prediction",
    "api.cli.plan",
)


def stage_times(
    stages: int = 8, rows: int = 1, stage: int = 3, *, traced: bool = True, experts: ExpertKernel = "all"
) -> StageTimes:
    spec = chip_stages(R1, deployment(stages, rows, num_speculative_tokens=1))[stage]
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
        (ALL_TO_ALL, 4, 65536, 17.70),
    ],
)
def test_collectives_are_near_what_was_measured_over_one_link(
    cost: CollectiveCost, chips: int, link_bytes: float, measured_us: float
) -> None:
    """Costs are those of tt-metal's table of Wormhole chips in a line, with bytes divided among four links."""
    assert cost.seconds(chips, link_bytes * LINKS) * 1e6 == pytest.approx(measured_us, rel=0.2)


def test_products_have_the_fidelity_that_predictions_go_by() -> None:
    assert matmul_kernel().math_fidelity.name == MATMUL_FIDELITY


def test_collectives_vanish_on_one_chip() -> None:
    assert [of(1, 1e6) for of in (all_gather_s, reduce_scatter_s, all_to_all_s)] == [0.0] * 3


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


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 8000), st.sampled_from([1, 2, 4]), st.sampled_from([0, 3, 7]))
def test_drafts_are_lanes_like_those_of_other_users_on_all_stages_but_the_last(
    users: int, context: int, rows: int, stage: int
) -> None:
    times = stage_times(8, rows, stage)
    plain = times.decode(8 * users, context)
    drafted = times.decode_lanes(8 * users, 8 * users, context, passes=0)
    assert drafted == plain == times.decode(8 * users, context, drafts=0)
    # With three drafts, chips whose users are a power of two pad nothing.
    power = 1 << (users.bit_length() - 1)
    without_passes = times.decode_lanes(8 * power, 32 * power, context, passes=0)
    assert without_passes == times.decode(32 * power, context)
    if stage < 7:
        assert times.decode(8 * power, context, drafts=3) == without_passes


def test_lanes_of_chips_are_padded_to_powers_of_two_once_there_are_drafts() -> None:
    times = stage_times()
    # Two drafts of 4 users on each chip are 12 lanes, for which steps have 16; padding reads no cache.
    two, three = (times.decode(32, 0, drafts=drafts) for drafts in (2, 3))
    assert two == three
    assert times.decode(32, 4000, drafts=2).total_s < times.decode(32, 4000, drafts=3).total_s


def test_a_step_in_which_few_have_drafts_takes_the_lanes_that_there_are() -> None:
    times = stage_times()
    least, most = times.decode(32, 2048).total_s, times.decode(32, 2048, drafts=3).total_s
    between = [times.decode_lanes(32, lanes, 2048, passes=0).total_s for lanes in (32, 40, 64, 65, 128)]
    assert between == sorted(between)
    assert (between[0], between[-1]) == (least, most)


def pass_time(tokens: int, users: int, context: int) -> float:
    """A pass of R1's draft layer over `tokens` lanes, of what it consists of: a layer, a projection, norms and a head.

    Layer and head follow from stages that have one layer more and that are the last.
    """

    def seconds(first: int, lanes: int, *, stage: int = 1) -> float:
        spec = StageSpec(index=stage, stages=3, first_layer=first, end_layer=61)
        return StageTimes(R1, spec, 1, WeightDtypes(), traced=True).decode(lanes, context).total_s

    layer = seconds(59, tokens) - seconds(60, tokens)
    head = seconds(60, users, stage=2) - seconds(60, users)
    ops = OPS.head.decode + OPS.norm.decode + CANDIDATE_OPS.decode
    untraced = ops * (UNTRACED_LAUNCH_S - TRACED_LAUNCH_S)
    projection = 2 * 7168 // 8 * 7168 * 1088 / 1024 / (288e9 * 0.83)
    sent = reduce_scatter_s(8, tokens * 7168 * 2) + 2 * all_gather_s(8, tokens * 32 * 2)
    launches = OPS.joining(tokens=tokens, is_decode=True) * TRACED_LAUNCH_S
    return layer + head + untraced + projection + sent + launches


@pytest.mark.parametrize("context", [64, 4000])
def test_a_pass_of_the_draft_layer_takes_a_layer_a_projection_and_a_head(context: int) -> None:
    last = stage_times(stage=7)
    one, three = (
        last.decode_lanes(32, 128, context, passes=passes).total_s
        - last.decode_lanes(32, 128, context, passes=0).total_s
        for passes in (1, 3)
    )
    first, later = pass_time(128, 32, context), pass_time(32, 32, context)
    assert one == pytest.approx(first, rel=1e-3)
    assert three == pytest.approx(first + 2 * later, rel=1e-3)


def test_prompts_pass_the_draft_layer_once_and_their_end_once_more_for_each_draft() -> None:
    others, last = stage_times(), stage_times(stage=7)
    assert others.prefill(256, 512, drafts=2) == others.prefill(256, 512)
    plain, one, two = (last.prefill(256, 512, drafts=drafts).total_s for drafts in (0, 1, 2))
    layers = len(chip_stages(R1, deployment(8, 1, num_speculative_tokens=1))[7].layers)
    assert plain / layers < one - plain < 1.5 * plain / layers
    assert two - one == pytest.approx(pass_time(32, 1, 768), rel=0.01)


def test_parts_add_up() -> None:
    time = StepTime(memory_s=1, compute_s=2, network_s=3, launch_s=4)
    assert (time + time.times(2)).total_s == 30
