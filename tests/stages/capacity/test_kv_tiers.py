"""What tiers hold is counted from the layers of the host that has most of them; what they save follows from steps."""

import msgspec
import pytest

from stages.capacity.chip_memory import chip_stages
from stages.capacity.deployment import Deployment
from stages.capacity.kv_tiers import TierPrediction, TierSizes, predict_tiers
from stages.capacity.prediction import PredictionOptions, predict
from tests.support.plans import r1_config

R1 = r1_config()
OPTIONS = PredictionOptions(context=2048, prompt_tokens=1024)
DEPLOYMENT = Deployment(
    stages=4, rows_per_stage=4, users_per_row=32, max_model_len=4096, block_size=32, prefill_chunk=256
)


def tiers_of(deployment: Deployment = DEPLOYMENT, **sizes: int) -> TierPrediction:
    given = TierSizes(**{"host_bytes": 1 << 35, "disk_bytes": 0, **sizes})
    return predict_tiers(R1, deployment, OPTIONS, predict(R1, deployment, OPTIONS), given)


def test_a_block_is_what_all_layers_keep_of_its_tokens_in_sixteen_bits() -> None:
    assert tiers_of().block_bytes == 61 * 32 * 576 * 2


def test_the_layer_that_makes_drafts_keeps_blocks_too() -> None:
    drafting = msgspec.structs.replace(DEPLOYMENT, num_speculative_tokens=1)
    assert tiers_of(drafting).block_bytes == 62 * 32 * 576 * 2
    assert tiers_of(drafting).hit_ttft_s > tiers_of().hit_ttft_s


@pytest.mark.parametrize(("rows_per_stage", "stages_on_host"), [(4, 1), (2, 2), (1, 4)])
def test_stages_of_a_host_share_its_memory(rows_per_stage: int, stages_on_host: int) -> None:
    deployment = msgspec.structs.replace(DEPLOYMENT, stages=16 // rows_per_stage, rows_per_stage=rows_per_stage)
    specs = chip_stages(R1, deployment)
    layers = [
        sum(len(spec.layers) for spec in specs[begin : begin + stages_on_host])
        for begin in range(0, len(specs), stages_on_host)
    ]
    assert tiers_of(deployment).host_tokens == (1 << 35) // (max(layers) * 32 * 576 * 2) * 32


def test_no_size_holds_nothing_and_twice_the_size_twice_as_much() -> None:
    assert tiers_of().disk_tokens == 0
    once, twice = tiers_of(disk_bytes=1 << 36), tiers_of(disk_bytes=1 << 37)
    assert twice.disk_tokens == pytest.approx(2 * once.disk_tokens, rel=1e-3)
    assert once.disk_tokens == pytest.approx(2 * once.host_tokens, rel=1e-3)


def test_what_is_kept_need_not_be_computed() -> None:
    tiers = tiers_of()
    assert 0 < tiers.hit_ttft_s < predict(R1, DEPLOYMENT, OPTIONS).ttft_s / 2
    assert 0 < tiers.recovery_s < tiers.recompute_s / 3
