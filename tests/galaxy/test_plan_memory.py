"""The memory that a plan predicts, against ttnn's allocator: whole empty stages of R1 at their real sizes.

`ttnn.empty` needs no memory of the host, and chips are mocks, so this takes seconds.
"""

from collections.abc import Iterator

import msgspec
import pytest
import ttnn

from stages.capacity.chip_memory import StageMemory, chip_memory, chip_stages
from stages.capacity.chip_weights import ChipTensor, ChipWeights
from stages.capacity.deployment import Deployment
from stages.plan import StageSpec
from stages.wormhole import DRAM_BANK_BYTES, DRAM_BANKS, DRAM_BYTES, L1_BANK_BYTES
from tests.galaxy.empty_block import empty
from tests.galaxy.meshes import allocated_bytes, opened
from tests.support.plans import deployment, r1_config

R1 = r1_config()


def held_tensors(plan: Deployment, spec: StageSpec) -> Iterator[ChipTensor]:
    """Allocates all that a stage keeps on a chip permanently."""
    drafts = plan.num_speculative_tokens > 0
    weights = ChipWeights(R1, plan.dtypes, plan.rows_per_stage)
    yield from weights.of_stage(spec, drafts=drafts)
    yield from weights.rope_tables(plan.cache)
    for layer in [*spec.layers, *([R1.num_hidden_layers] if drafts and spec.is_last else [])]:
        yield weights.kv_cache(plan.cache)
        if R1.is_moe(layer):
            yield weights.selection()


def put(tensors: Iterator[ChipTensor], mesh: ttnn.MeshDevice) -> list[ttnn.Tensor]:
    return [empty(tensor, mesh) for tensor in tensors]


@pytest.mark.parametrize(
    ("stages", "rows_per_stage", "stage", "drafts"),
    [(2, 4, 0, 0), (2, 4, 1, 0), (8, 1, 0, 0), (8, 1, 7, 0), (4, 4, 0, 0), (16, 1, 3, 0), (2, 4, 1, 1), (16, 1, 15, 1)],
    ids=str,
)
def test_a_stage_of_r1_takes_what_is_planned(stages: int, rows_per_stage: int, stage: int, drafts: int) -> None:
    # With a draft each, half as many users fill a decode step.
    plan = deployment(stages, rows_per_stage, users_per_row=32 // (1 + drafts), num_speculative_tokens=drafts)
    memory: StageMemory = chip_memory(R1, plan)[stage]
    spec = chip_stages(R1, plan)[stage]
    with opened(rows_per_stage, 8) as mesh:
        tensors = put(held_tensors(plan, spec), mesh)
        planned = memory.weights + memory.kv_cache + memory.tables

        assert allocated_bytes(mesh) == planned
        assert memory.fits
        del tensors


def test_a_galaxy_has_no_room_for_r1() -> None:
    plan = deployment(1, 4)
    [memory] = chip_memory(R1, plan)
    [spec] = chip_stages(R1, plan)
    assert not memory.fits
    with opened(4, 8) as mesh, pytest.raises(RuntimeError, match="Out of Memory"):
        put(held_tensors(plan, spec), mesh)


def test_the_longest_length_that_fits_does_and_the_next_does_not() -> None:
    """On a chip that is full, plan and allocator agree on which block is one too many."""
    lengths = range(4096, 163840, 1024)
    refused = next(length for length in lengths if not holds(deployment(2, 4, max_model_len=length)))
    assert_allocates(deployment(2, 4, max_model_len=refused - 1024), fits=True)
    assert_allocates(deployment(2, 4, max_model_len=int(refused * 1.05)), fits=False)


def holds(plan: Deployment) -> bool:
    """Whether all that a stage keeps fits, without room for its activations."""
    return all(memory.total - memory.activations <= memory.available for memory in chip_memory(R1, plan))


def assert_allocates(plan: Deployment, *, fits: bool) -> None:
    memories = chip_memory(R1, plan)
    fullest = max(memories, key=lambda memory: memory.total)
    spec = chip_stages(R1, plan)[fullest.stage]
    with opened(plan.rows_per_stage, 8, trace_region_size=plan.trace_region_bytes) as mesh:
        if fits:
            tensors = put(held_tensors(plan, spec), mesh)
            assert allocated_bytes(mesh) <= DRAM_BYTES - fullest.trace
            del tensors
            return
        with pytest.raises(RuntimeError, match="Out of Memory"):
            put(held_tensors(plan, spec), mesh)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("trace_region", [0, 1, 50_000_000, 45_684_326])
def test_the_allocator_has_what_the_chips_numbers_say(rows: int, trace_region: int) -> None:
    plan = msgspec.structs.replace(deployment(2, 4), trace_region_bytes=trace_region)
    memory = chip_memory(R1, plan)[0]
    with opened(rows, 8, trace_region_size=trace_region) as mesh:
        dram = ttnn.get_memory_view(mesh, ttnn.BufferType.DRAM)
        assert dram.num_banks == DRAM_BANKS
        assert dram.num_banks * dram.total_bytes_per_bank == DRAM_BANKS * DRAM_BANK_BYTES - memory.trace
        assert ttnn.get_memory_view(mesh, ttnn.BufferType.L1).total_bytes_per_bank == L1_BANK_BYTES
