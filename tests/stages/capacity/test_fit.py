"""Refusals of plans that do not fit: their messages, and that the changes in these help and are the smallest."""

from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.capacity.deployment import Deployment
from stages.capacity.fit import Shape, check_fits, choose, fits, single_changes
from stages.capacity.prediction import PredictionOptions, predict
from stages.errors import PlanError
from tests.support.plans import deployment, deployments, r1_config
from weights.model_config import ConfigChanges

R1 = r1_config()
OPTIONS = PredictionOptions(context=2048, prompt_tokens=1024)


def refused(plan: Deployment) -> str:
    with pytest.raises(PlanError) as raised:
        check_fits(R1, plan)
    return str(raised.value)


def test_r1_on_one_galaxy_needs_more_rows_and_nothing_else_helps() -> None:
    assert refused(deployment(1, 4)) == (
        "Stage 0 of 1 (layers 0 to 60 on 4 rows) needs 18.2 GiB of the 12.0 GiB of DRAM on each chip: give 6 rows in "
        "place of 4 (--stages 3 --rows-per-stage 2)."
    )


def test_every_single_change_that_helps_is_named_with_its_numbers() -> None:
    assert refused(deployment(8, 1, max_model_len=32768)) == (
        "Stage 4 of 8 (layers 30 to 37 on 1 row) needs 13.8 GiB of the 12.0 GiB of DRAM on each chip: give 10 rows in "
        "place of 8 (--stages 10 --rows-per-stage 1), or bfloat4_b in place of bfloat8_b for kv_cache "
        "(--kv-cache-dtype bfloat4_b), or 16 users a row in place of 32 (--users 16), or 21824 tokens a request in "
        "place of 32768 (--max-model-len 21824)."
    )


def test_what_overflows_l1_is_said() -> None:
    sentence = refused(deployment(2, 4, users_per_row=192, max_model_len=32))
    assert "MiB of the 85.0 MiB of L1 in a decode step on each chip: give 9 rows in place of 8 " in sentence
    assert "or 160 users a row in place of 192" in sentence


def test_a_stage_of_one_layer_is_named_so() -> None:
    split = (1, 59, 1)
    assert refused(deployment(3, 1, layers_per_stage=split)).startswith("Stage 1 of 3 (layers 1 to 59 on 1 row)")
    plan = deployment(61, 1, max_model_len=163840, users_per_row=128)
    assert refused(plan).startswith("Stage 60 of 61 (layer 60 on 1 row)")


def test_where_no_single_change_helps_that_is_said() -> None:
    plan = deployment(1, 4, layers_per_stage=(61,), users_per_row=96)
    assert refused(plan).endswith("on each chip: no single change of rows, dtype, users or length would do.")


def test_fewer_drafts_help_too() -> None:
    assert refused(deployment(8, 1, users_per_row=64, max_model_len=1024, num_speculative_tokens=2)).endswith(
        "of L1 in a decode step on each chip: give 40 users a row in place of 64 (--users 40), or 1 draft of each "
        "request and step in place of 2 (--num-speculative-tokens 1)."
    )
    plan = deployment(1, 4, layers_per_stage=(61,), users_per_row=96, num_speculative_tokens=1)
    assert refused(plan).endswith("no single change of rows, dtype, users, length or drafts would do.")


def test_a_model_without_a_layer_for_drafts_is_refused() -> None:
    config = msgspec.structs.replace(R1, num_nextn_predict_layers=0)
    with pytest.raises(PlanError, match="The model has no multi-token-prediction layer: leave out"):
        choose(config, Shape(), deployment(1, 1, num_speculative_tokens=1), OPTIONS)


def test_the_fastest_split_is_that_which_is_with_drafts_where_they_pay() -> None:
    base = deployment(1, 1, num_speculative_tokens=1, users_per_row=16)
    for acceptance in (0.0, 0.8):
        options = msgspec.structs.replace(OPTIONS, acceptance=acceptance)
        chosen = choose(R1, Shape(rows=8), base, options).deployment
        best = predict(R1, chosen, options).served_tokens_per_s
        for stages in (1, 2, 4, 8):
            rival = msgspec.structs.replace(base, stages=stages, rows_per_stage=8 // stages)
            if stages > 1 and fits(R1, rival):
                assert predict(R1, rival, options).served_tokens_per_s <= best


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 61), deployments(4), st.integers(2000, 160000))
def test_suggested_changes_fit_and_smaller_ones_do_not(layers: int, drawn: Deployment, longest: int) -> None:
    config = R1.changed(ConfigChanges(num_hidden_layers=layers))
    plan = msgspec.structs.replace(drawn, max_model_len=longest)
    assume(not fits(config, plan))
    for change in single_changes(config, plan):
        assert fits(config, change.deployment)
        for smaller in smaller_changes(change.what, plan, change.deployment):
            assert not fits(config, smaller)


def smaller_changes(what: str, plan: Deployment, changed: Deployment) -> list[Deployment]:
    """The next smaller change of a kind, or None if there is none between."""
    if what == "users" and changed.users_per_row + 8 < plan.users_per_row:
        return [msgspec.structs.replace(plan, users_per_row=changed.users_per_row + 8)]
    if what == "length" and changed.max_model_len + plan.block_size < plan.max_model_len:
        return [msgspec.structs.replace(plan, max_model_len=changed.max_model_len + plan.block_size)]
    if what == "rows":
        between = range(plan.rows + 1, changed.rows)
        return [msgspec.structs.replace(plan, stages=rows, rows_per_stage=1) for rows in between]
    return []


@pytest.mark.parametrize(("rows", "stages", "rows_per_stage"), [(8, 2, 4), (16, 4, 4), (6, 3, 2)])
def test_the_fastest_split_that_fits_is_chosen(rows: int, stages: int, rows_per_stage: int) -> None:
    choice = choose(R1, Shape(rows=rows), deployment(1, 1), OPTIONS)
    chosen = choice.deployment
    assert (chosen.stages, chosen.rows_per_stage) == (stages, rows_per_stage)
    best = predict(R1, chosen, OPTIONS).tokens_per_s
    for other in (1, 2, 4):
        rival = deployment(rows // other, other)
        if rows % other == 0 and fits(R1, rival):
            assert predict(R1, rival, OPTIONS).tokens_per_s <= best


def test_without_a_number_of_rows_whole_galaxies_are_taken() -> None:
    choice = choose(R1, Shape(), deployment(1, 1), OPTIONS)
    assert choice.deployment.rows == 8
    assert choice.assumptions == [
        "8 rows: the fewest whole Galaxies that fit (--rows)",
        "2 stages of 4 rows: predicted the fastest of 3 splits (--stages, --rows-per-stage)",
    ]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"stages": 8}, (8, 1)),
        ({"rows_per_stage": 2}, (4, 2)),
        ({"stages": 4, "rows": 16}, (4, 4)),
        ({"stages": 1, "rows_per_stage": 8}, (1, 8)),
        ({"rows": 4}, (4, 1)),
    ],
)
def test_what_is_asked_for_is_kept(shape: dict[str, Any], expected: tuple[int, int]) -> None:
    chosen = choose(R1, Shape(**shape), deployment(1, 1), OPTIONS).deployment
    assert (chosen.stages, chosen.rows_per_stage) == expected


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"stages": 2, "rows_per_stage": 4, "rows": 4}, "2 stages of 4 rows are 8 rows, not 4"),
        ({"stages": 3, "rows": 8}, "8 rows cannot be shared evenly with 3 stages."),
        ({"rows_per_stage": 3, "rows": 8}, "8 rows cannot be shared evenly with 3 rows a stage."),
        ({"rows": 3, "stages": 1}, r"The number of routed experts \(256\) cannot be shared evenly by 24 chips."),
    ],
)
def test_a_shape_that_contradicts_itself_is_refused(shape: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        choose(R1, Shape(**shape), deployment(1, 1), OPTIONS)
