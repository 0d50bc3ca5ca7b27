"""Memory of stages on their chips: R1's numbers worked out by hand, and properties for every model."""

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.capacity.chip_memory import StageMemory, chip_memory, chip_stages
from stages.capacity.chip_weights import ChipTensor, ChipWeights
from stages.capacity.deployment import Deployment
from stages.errors import PlanError
from stages.tensor_dtypes import CHOICES, TILE_BYTES, Kind, TensorDtype, WeightDtypes
from stages.wormhole import DRAM_BYTES
from tests.support.plans import deployment, deployments, dtypes, models, r1_config
from weights.model_config import ModelConfig

R1 = r1_config()
GIB = 1 << 30


def kept(memory: StageMemory) -> int:
    """The memory that a stage holds between steps."""
    return memory.weights + memory.kv_cache + memory.tables


def test_a_tile_of_block_floats_has_an_exponent_for_every_sixteen_values() -> None:
    assert (TILE_BYTES["bfloat8_b"], TILE_BYTES["bfloat4_b"]) == (1024 + 64, 512 + 64)


def test_the_experts_of_a_layer_of_r1() -> None:
    """A layer has 256 experts of three 7168 x 2048 matrices, all of whole tiles, and a shared one on each of 4 rows."""
    values = (256 + 4) * 7168 * 2048
    on_a_chip = sum(tensor.bytes for tensor in ChipWeights(R1, WeightDtypes(), 4).experts())
    assert on_a_chip * 32 == values * 2 * 576 // 1024 + values * 1088 // 1024


def test_r1_takes_about_495_gb_where_nothing_is_held_twice() -> None:
    """The memory is as tt-metal's users count it for these dtypes."""
    weights = ChipWeights(R1, WeightDtypes(), 1)
    everything = [*weights.embedding(), *weights.head()]
    for layer in range(61):
        everything += weights.layer(layer)
    whole = ("gate.input", "wq_kv_a")
    total = sum(tensor.bytes * (1 if any(name in tensor.name for name in whole) else 8) for tensor in everything)
    assert total == pytest.approx(495e9, rel=0.005)


def test_the_kv_cache_of_a_layer_of_r1() -> None:
    """Two stages of four rows have 4 users a chip in each of 3 microbatches, of 4096 tokens in 18 tiles of 32."""
    [first, last] = chip_memory(R1, deployment(2, 4))
    blocks = 4 * 3 * 4096 // 32 + 1
    per_layer = math.ceil(blocks * 18 / 12) * 12 * 1088
    assert first.kv_cache == 31 * per_layer
    assert last.kv_cache == 30 * per_layer


@pytest.mark.parametrize(
    ("stages", "rows_per_stage", "fits"),
    [
        (1, 4, False),
        (2, 2, False),
        (4, 1, False),
        (2, 4, True),
        (4, 2, True),
        (8, 1, True),
        (4, 4, True),
        (16, 1, True),
    ],
)
def test_r1_fits_eight_rows_and_sixteen_but_not_four(stages: int, rows_per_stage: int, fits: bool) -> None:
    memories = chip_memory(R1, deployment(stages, rows_per_stage))
    assert all(memory.fits for memory in memories) == fits
    assert [memory.available for memory in memories] == [DRAM_BYTES] * stages


def test_the_split_evens_out_what_the_chips_hold() -> None:
    held = [memory.weights + memory.kv_cache for memory in chip_memory(R1, deployment(8, 1))]
    assert max(held) / min(held) < 1.15


def test_a_split_that_is_asked_for_is_taken() -> None:
    specs = chip_stages(R1, deployment(2, 4, layers_per_stage=(20, 41)))
    assert [len(spec.layers) for spec in specs] == [20, 41]


@pytest.mark.parametrize(("stages", "rows_per_stage"), [(1, 8), (2, 4), (16, 1)])
def test_drafts_take_a_layer_and_an_embedding_of_the_last_stage(stages: int, rows_per_stage: int) -> None:
    split = tuple(len(spec.layers) for spec in chip_stages(R1, deployment(stages, rows_per_stage)))
    without, drafting = (
        chip_memory(R1, deployment(stages, rows_per_stage, layers_per_stage=split, num_speculative_tokens=drafts))
        for drafts in (0, 1)
    )
    assert [kept(memory) for memory in drafting[:-1]] == [kept(memory) for memory in without[:-1]]
    before, after = without[-1], drafting[-1]
    weights = ChipWeights(R1, WeightDtypes(), rows_per_stage)
    added = [*weights.draft(), *(weights.embedding() if stages > 1 else [])]
    assert after.weights - before.weights == sum(tensor.allocated() for tensor in added)
    assert after.kv_cache - before.kv_cache == weights.kv_cache(deployment(stages, rows_per_stage).cache).allocated()
    assert after.tables - before.tables == weights.selection().allocated()
    assert after.activations > before.activations


def test_drafts_are_lanes_of_every_stages_decode_steps() -> None:
    plans = [
        deployment(2, 4, users_per_row=users, num_speculative_tokens=drafts) for users, drafts in ((32, 0), (16, 1))
    ]
    assert [plan.lanes_per_row for plan in plans] == [32, 32]
    (first, last), (drafting_first, drafting_last) = (chip_memory(R1, plan) for plan in plans)
    assert first.decode_l1 == drafting_first.decode_l1
    inputs = 2 * 64 * 2048
    """Two hidden states of 32 lanes, 28 tiles each on 64 banks."""
    assert drafting_last.decode_l1 == last.decode_l1 + inputs


@pytest.mark.parametrize(
    ("users", "drafts", "lanes"), [(24, 0, 24), (32, 1, 64), (32, 2, 128), (32, 3, 128), (8, 2, 32)]
)
def test_lanes_with_drafts_are_padded_as_steps_are(users: int, drafts: int, lanes: int) -> None:
    assert deployment(2, 4, users_per_row=users, num_speculative_tokens=drafts).lanes_per_row == lanes


def test_the_split_makes_room_for_drafts() -> None:
    held = [memory.weights + memory.kv_cache for memory in chip_memory(R1, deployment(8, 1, num_speculative_tokens=1))]
    assert max(held) / min(held) < 1.15


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": 62}, "Cannot split 61 layers into 62 stages: choose between 1 and 61 stages."),
        ({"rows_per_stage": 3}, r"The number of routed experts \(256\) cannot be shared evenly by 24 chips."),
        ({"users_per_row": 20}, "20 users a row cannot be shared evenly by its 8 chips: choose a multiple of 8."),
        ({"max_model_len": 163841}, "--max-model-len 163841 is more than the model's 163840 positions."),
        ({"layers_per_stage": (30, 30)}, "holds 60 layers"),
    ],
)
def test_what_chips_cannot_share_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        chip_memory(R1, msgspec.structs.replace(deployment(2, 4), **changes))


def test_drafts_of_a_model_without_their_layer_are_refused() -> None:
    with pytest.raises(PlanError, match=r"^The model has no multi-token-prediction layer: leave out --num-spec"):
        chip_memory(R1.without_drafts, deployment(2, 4, num_speculative_tokens=1))


def test_heads_too_few_for_the_columns_are_refused_as_a_stage_does() -> None:
    kimi_k2 = msgspec.structs.replace(R1, num_attention_heads=64)
    with pytest.raises(PlanError, match="64 attention heads are 8 for each of 8 columns of chips"):
        chip_memory(kimi_k2, deployment(2, 4))


def test_a_decode_step_too_large_for_l1_does_not_fit() -> None:
    [memory, _] = chip_memory(R1, deployment(2, 4, users_per_row=192, max_model_len=32))
    assert memory.total <= memory.available
    assert not memory.fits


@pytest.mark.parametrize("kind", CHOICES)
def test_a_dtype_that_a_kind_cannot_have_is_refused(kind: Kind) -> None:
    every: set[TensorDtype] = {"float32", "bfloat16", "bfloat8_b", "bfloat4_b"}
    for dtype in every - set(CHOICES[kind]):
        with pytest.raises(PlanError, match=f"{kind} cannot be {dtype}: choose "):
            WeightDtypes(**{kind: dtype})


@settings(deadline=None)
@given(models(), dtypes(), st.sampled_from([1, 2, 4]), st.data())
def test_memory_is_whole_pages(config: ModelConfig, kinds: WeightDtypes, rows: int, data: st.DataObject) -> None:
    weights = ChipWeights(config, kinds, rows)
    layer = data.draw(st.integers(0, config.num_hidden_layers - 1))
    layers = [*weights.layer(layer), *weights.draft()]
    for tensor in [*weights.embedding(), *layers, *weights.head(), weights.selection()]:
        assert tensor.allocated() % tensor.page_bytes == 0
        assert tensor.bytes <= tensor.allocated() < tensor.bytes + 12 * tensor.page_bytes
        assert tensor.bytes >= smallest(tensor)


def smallest(tensor: ChipTensor) -> float:
    bits = {"float32": 32, "bfloat16": 16, "bfloat8_b": 8.5, "bfloat4_b": 4.5}
    return tensor.values * bits[tensor.dtype] / 8


@settings(max_examples=50, deadline=None)
@given(models(), st.data())
def test_totals_add_up(config: ModelConfig, data: st.DataObject) -> None:
    drafts = data.draw(st.integers(0, 2))
    plan = msgspec.structs.replace(data.draw(deployments(config.num_hidden_layers)), num_speculative_tokens=drafts)
    memories = chip_memory(config, plan)
    weights = ChipWeights(config, plan.dtypes, plan.rows_per_stage)
    for memory, spec in zip(memories, chip_stages(config, plan), strict=True):
        assert memory.weights == sum(tensor.allocated() for tensor in weights.of_stage(spec, drafts=drafts > 0))
        assert memory.total == kept(memory) + memory.activations + memory.trace
        layers = len(spec.layers) + (drafts > 0 and spec.is_last)
        assert memory.kv_cache == layers * weights.kv_cache(plan.cache).allocated()
        assert min(memory.activations, memory.trace, memory.decode_l1, memory.tables) > 0
    assert sum(memory.end_layer - memory.first_layer for memory in memories) == config.num_hidden_layers


@settings(max_examples=50, deadline=None)
@given(models(), st.data())
def test_more_rows_in_a_stage_never_need_more_a_chip(config: ModelConfig, data: st.DataObject) -> None:
    """More rows never need more memory between steps; in a step every chip gets the tokens of all rows."""
    plan = data.draw(deployments(config.num_hidden_layers))
    split = tuple(len(spec.layers) for spec in chip_stages(config, plan))
    few, many = (
        chip_memory(config, msgspec.structs.replace(plan, rows_per_stage=rows, layers_per_stage=split))
        for rows in (1, 4)
    )
    for before, after in zip(few, many, strict=True):
        assert kept(after) <= kept(before)


@settings(max_examples=50, deadline=None)
@given(models(), st.data())
def test_more_stages_never_need_more_on_the_fullest_chip(config: ModelConfig, data: st.DataObject) -> None:
    plan = msgspec.structs.replace(data.draw(deployments(config.num_hidden_layers - 1)), microbatches=3)
    few, many = (
        max(memory.weights + memory.kv_cache for memory in chip_memory(config, msgspec.structs.replace(plan, stages=n)))
        for n in (plan.stages, plan.stages + 1)
    )
    assert many <= few


@settings(max_examples=50, deadline=None)
@given(models(), st.data())
def test_less_asked_never_needs_more(config: ModelConfig, data: st.DataObject) -> None:
    plan = data.draw(deployments(config.num_hidden_layers))
    more = {"users_per_row": plan.users_per_row + 8, "max_model_len": plan.max_model_len + 100}
    before = fullest(config, plan)
    for name, value in more.items():
        assert fullest(config, msgspec.structs.replace(plan, **{name: value})) >= before
    for kind in CHOICES:
        narrower = plan.dtypes.narrowed(kind)
        if narrower is not None:
            assert fullest(config, msgspec.structs.replace(plan, dtypes=narrower)) <= before


def fullest(config: ModelConfig, plan: Deployment) -> int:
    return max(memory.weights + memory.kv_cache for memory in chip_memory(config, plan))
