"""Stage plans against brute force, and their invariants."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import PlanError
from stages.models.deepseek_v3.architecture import draft_cost, layer_cost
from stages.plan import StageSpec, balanced_split, explicit_stages, plan_stages
from tests.support.plans import R1
from weights.model_config import ModelConfig
from weights.source import draft_prefix, tensor_shapes

CONFIG = ModelConfig.from_dict(R1, source="R1")
DRAFTING = ModelConfig.from_dict({**R1, "num_nextn_predict_layers": 1}, source="R1")


def dearest(costs: list[int], sizes: list[int]) -> int:
    ends = list(itertools.accumulate(sizes))
    return max(sum(costs[end - size : end]) for size, end in zip(sizes, ends, strict=True))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_no_split_has_a_cheaper_dearest_stage(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    sizes = balanced_split(costs, parts)
    borders = itertools.combinations(range(1, len(costs)), parts - 1)
    every = ([b - a for a, b in itertools.pairwise((0, *inner, len(costs)))] for inner in borders)
    assert sum(sizes) == len(costs)
    assert len(sizes) == parts
    assert min(sizes) >= 1
    assert dearest(costs, sizes) == min(dearest(costs, other) for other in every)


@given(st.integers(1, 61))
def test_stages_cover_every_layer_once_in_order(stages: int) -> None:
    specs = plan_stages(CONFIG, stages)
    assert [layer for spec in specs for layer in spec.layers] == list(range(61))
    assert [spec.index for spec in specs] == list(range(stages))
    assert [spec.is_first for spec in specs] == [True] + [False] * (stages - 1)
    assert [spec.is_last for spec in specs] == [False] * (stages - 1) + [True]


def test_an_active_token_of_r1_reads_37_billion_weights() -> None:
    """DeepSeek-V3's technical report (arXiv:2412.19437) gives 37 B activated parameters, embeddings included."""
    active = sum(layer_cost(CONFIG, layer) for layer in range(61)) + 2 * CONFIG.vocab_size * CONFIG.hidden_size
    assert active == pytest.approx(37.5e9, rel=0.01)


def test_the_layer_that_drafts_is_as_large_as_its_makers_say() -> None:
    """README_WEIGHTS.md of DeepSeek-V3: 11.5 B parameters of its own, 1.5 B activated with the head, its projection of
    an embedding beside a hidden state (0.1 B) apart."""
    projection = 2 * CONFIG.hidden_size**2
    own = [shape for name, shape in tensor_shapes(DRAFTING).items() if name.startswith(draft_prefix(DRAFTING))]
    assert sum(math.prod(shape) for shape in own) - projection == pytest.approx(11.5e9, rel=0.005)
    assert draft_cost(DRAFTING) - projection == pytest.approx(1.5e9, rel=0.01)


@pytest.mark.parametrize("stages", [1, 2, 4, 8, 16, 61])
def test_drafts_are_a_cost_of_the_last_stage(stages: int) -> None:
    splits = [[len(spec.layers) for spec in plan_stages(DRAFTING, stages, drafts=drafts)] for drafts in (0, 1, 2, 3)]
    assert splits[0] == [len(spec.layers) for spec in plan_stages(CONFIG, stages)]
    last = [split[-1] for split in splits]
    assert last == sorted(last, reverse=True)
    costs = [layer_cost(CONFIG, layer) for layer in range(61)]
    for drafts, split in enumerate(splits):
        costs[-1] = layer_cost(CONFIG, 60) + CONFIG.vocab_size * CONFIG.hidden_size + drafts * draft_cost(DRAFTING)
        assert split == balanced_split(costs, stages)


def test_drafts_of_a_model_without_their_layer_are_refused() -> None:
    with pytest.raises(PlanError) as refusal:
        plan_stages(CONFIG, 2, drafts=1)
    sentence = "The model has no multi-token-prediction layer: leave out --num-speculative-tokens."
    assert str(refusal.value) == sentence


@pytest.mark.parametrize("stages", [0, -1, 62])
def test_an_impossible_number_of_stages_is_refused_with_the_numbers(stages: int) -> None:
    with pytest.raises(PlanError, match=rf"61 layers into {stages} stages: choose between 1 and 61"):
        plan_stages(CONFIG, stages)


def test_an_explicit_split_is_taken_as_given() -> None:
    assert explicit_stages(CONFIG, [10, 51]) == [
        StageSpec(index=0, stages=2, first_layer=0, end_layer=10),
        StageSpec(index=1, stages=2, first_layer=10, end_layer=61),
    ]


@pytest.mark.parametrize("split", [[], [61, 0], [60], [30, 32], [62, -1]])
def test_an_explicit_split_that_does_not_fit_is_refused(split: list[int]) -> None:
    with pytest.raises(PlanError, match="61 in all"):
        explicit_stages(CONFIG, split)
