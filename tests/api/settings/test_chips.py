"""What the engine is told for options of chips: a mesh for each stage, a pool for each chip, and no more than fits."""

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from api.engine.options import EngineOptions
from api.errors import OptionError
from api.settings.engine import EngineSettings
from api.text.model_source import ModelSource
from stages.errors import PlanError
from tests.support.plans import r1_config

R1 = ModelSource(path=Path("r1"), name="r1", root="r1")


def options(**given: Any) -> EngineOptions:
    asked = {"stages": 4, "rows_per_stage": 4, "max_model_len": 4096, **given}
    return EngineSettings.of(cache_dir=Path("cache"), device="ttnn", **asked).engine_options(R1, r1_config())


def test_every_chip_of_a_stage_has_a_pool_for_its_users() -> None:
    pipeline = options().pipeline
    cache = pipeline.stage.cache

    assert (pipeline.cluster.device, pipeline.cluster.rows_per_stage, pipeline.stage.dtype) == ("ttnn", 4, "bfloat16")
    assert (cache.pools, cache.slots) == (4 * 8, 32 * 4 * 5)
    assert cache.blocks == cache.slots // cache.pools * cache.blocks_per_slot
    assert sum(len(spec.layers) for spec in pipeline.specs) == 61


def test_hidden_states_go_from_mesh_to_mesh_unless_told_or_where_there_is_one_stage() -> None:
    assert options().pipeline.transport == "mesh"
    assert options(transport="host").pipeline.transport == "host"
    assert options(stages=1, rows_per_stage=8).pipeline.transport == "host"


def test_sequences_are_rounded_up_to_as_many_on_every_chip() -> None:
    with capture_logs() as logs:
        made = options(max_num_seqs=200)

    assert made.pipeline.stage.cache.slots == 320
    assert [(log["asked"], log["slots"]) for log in logs] == [(200, 320)]


def test_fewer_blocks_and_another_split_may_be_asked_for() -> None:
    pipeline = options(num_blocks=200, layers_per_stage=[15, 16, 15, 15], stages=None).pipeline

    assert pipeline.stage.cache.blocks == 200
    assert [len(spec.layers) for spec in pipeline.specs] == [15, 16, 15, 15]


def test_what_does_not_fit_the_chips_is_refused_with_what_would() -> None:
    with pytest.raises(PlanError, match=r"Stage 0 of 1 .* needs .* give .* rows in place of 4"):
        options(stages=1, rows_per_stage=4)
    with pytest.raises(PlanError, match=r"--max-model-len \d+\)"):
        options(max_model_len=None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "float32"}, "--dtype float32 is not for chips"),
        ({"num_blocks": 100_000}, "--num-blocks 100000 is more than the 2560"),
        ({"layers_per_stage": [30, 31]}, "names 2 stages and --stages 4: leave one of them out"),
    ],
)
def test_options_that_contradict_chips_or_each_other_are_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        options(**given)


def test_a_model_that_the_chips_cannot_share_is_refused() -> None:
    with pytest.raises(PlanError, match="cannot be shared evenly by 40 chips"):
        options(rows_per_stage=5)
