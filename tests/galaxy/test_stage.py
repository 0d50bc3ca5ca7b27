"""Whole stages of R1, with layers of real size and KV for all users in flight, open and run on mock Galaxies."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from stages.capacity.chip_weights import ChipWeights
from stages.options import DraftOptions, TierOptions
from stages.pending import drawn
from stages.plan import StageSpec, plan_stages
from stages.stage import Stage
from stages.step import Admission, BlockLoad, Segment, SentHidden, StepResult
from stages.tensor_dtypes import WeightDtypes
from tests.galaxy.allocated import allocate_in_place_of_files
from tests.galaxy.meshes import allocated_bytes
from tests.galaxy.r1 import BLOCK_SIZE, COLUMNS, KEYS, PROMPT, R1, USERS_PER_ROW, admissions, r1_cache, segments, step
from tests.support.stage_driver import GREEDY, key_of, stage_options

HIDDEN_BYTES = 2 * R1.hidden_size
SMALL_THINGS = 1.02
"""The most that rounding by the allocator, tables of positions and experts, and programs may take, as a share."""

Load = Callable[..., Stage]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads a stage of R1 on `rows` rows, with KV for a microbatch of each stage."""
    (tmp_path / "config.json").write_text(json.dumps(KEYS), encoding="utf-8")
    allocate_in_place_of_files(monkeypatch)
    loaded = []

    def load_stage(spec: StageSpec, rows: int, *, drafts: int = 0) -> Stage:
        cache = r1_cache(rows, microbatches=spec.stages)
        tiers = TierOptions(host_directory=str(tmp_path), host_bytes=1 << 26)
        options = stage_options(
            tmp_path,
            tmp_path / "cache",
            dtype="bfloat16",
            cache=cache,
            load_format="dummy",
            tiers=tiers,
            drafts=DraftOptions(num_speculative_tokens=drafts),
        )
        loaded.append(Stage.load(spec, options, lambda _done, _of: None))
        return loaded[-1]

    yield load_stage
    for stage in loaded:
        stage.close()


def expected_bytes(spec: StageSpec, rows: int) -> int:
    """Bytes of the weights and caches of a stage, on each chip."""
    weights = ChipWeights(R1, WeightDtypes(), rows)
    cache = weights.kv_cache(r1_cache(rows, microbatches=spec.stages))
    return sum(weight.bytes for weight in weights.of_stage(spec)) + len(spec.layers) * cache.bytes


def check_output(output: memoryview | SentHidden | StepResult, spec: StageSpec, tokens: int, sampled: int) -> None:
    if isinstance(output, StepResult):
        assert spec.is_last
        assert len(output.tokens) == sampled
    else:
        assert isinstance(output, memoryview)
        assert not spec.is_last
        assert output.nbytes == tokens * HIDDEN_BYTES


@pytest.mark.parametrize(
    ("rows", "stages", "index"),
    [(1, 16, 0), (1, 16, 7), (1, 16, 15), (4, 4, 1)],
    ids=["first-of-16-rows", "middle-of-16-rows", "last-of-16-rows", "one-of-4-galaxies"],
)
def test_a_stage_of_r1_opens_and_steps(
    rows: int, stages: int, index: int, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = plan_stages(R1, stages)[index]
    cache = r1_cache(rows, microbatches=stages)
    users = USERS_PER_ROW * rows
    assert (cache.slots, cache.blocks_per_slot) == (users * stages, 128)

    stage = load(spec, rows)

    taken, expected = allocated_bytes(stage.mesh_device), expected_bytes(spec, rows)
    layers = f"layers {spec.layers.start} to {spec.layers.stop - 1}"
    with capsys.disabled():
        sys.stdout.write(f"\n{layers} on {rows} x {COLUMNS} chips: {taken / 2**30:.2f} GiB a chip\n")
    assert expected <= taken <= SMALL_THINGS * expected

    first = range(cache.pools)
    outputs = []
    for start in (0, PROMPT):
        prompts = segments(cache, first, start, PROMPT)
        admitted = admissions(cache) if start == 0 else []
        prefill = step("prefill", prompts, step_id=start + 1, admitted=admitted)
        outputs.append((drawn(stage.step(prefill, hidden(spec, prefill.token_count))), prefill))
    decode = step("decode", [*segments(cache, first, 2 * PROMPT, 1), *segments(cache, range(cache.pools, users), 0, 1)])
    outputs.append((drawn(stage.step(decode, hidden(spec, users))), decode))
    for output, done in outputs:
        check_output(output, spec, done.token_count, len(done.segments))

    # All memory of the steps was freed, except for the programs of their ops.
    del outputs
    assert allocated_bytes(stage.mesh_device) <= SMALL_THINGS * expected


def test_blocks_of_a_stage_of_r1_are_kept_and_brought_back(load: Load) -> None:
    spec = plan_stages(R1, 16)[7]
    stage = load(spec, 1)
    cache = r1_cache(1, microbatches=16)
    slots = range(2)
    prompts = [
        msgspec.structs.replace(each, keys=[key_of(4 * each.slot + block) for block in range(4)])
        for each in segments(cache, slots, 0, PROMPT)
    ]
    prefill = step("prefill", prompts, admitted=admissions(cache))
    drawn(stage.step(prefill, hidden(spec, prefill.token_count)))
    assert len(stage.inventory(0).added) == 4 * len(slots)
    assert stage.inventory(0).host_bytes == 4 * len(slots) * len(spec.layers) * 32 * R1.kv_dim * 2

    cached = [5, 3]
    loads = [BlockLoad(pool=0, block=block, key=key_of(number)) for number, block in enumerate([*cached, 9])]
    loads.append(BlockLoad(pool=7, block=2, key=key_of(99)))
    ended = list(range(cache.slots))
    load_step = msgspec.structs.replace(step("load", [], step_id=2), loads=loads, ended=ended)
    assert stage.load_blocks(load_step) == [3]
    rest = Segment(slot=0, start=2 * BLOCK_SIZE, tokens=[1] * PROMPT, new_blocks=[20, 21, 22, 23], sample=True)
    admission = Admission(slot=0, sampling=GREEDY, cached=cached)
    follows = step("prefill", [rest], step_id=3, admitted=[admission])
    check_output(drawn(stage.step(follows, hidden(spec, PROMPT))), spec, PROMPT, 1)
    decode = step(
        "decode", [Segment(slot=0, start=2 * BLOCK_SIZE + PROMPT, tokens=[1], new_blocks=[24], sample=True)], step_id=4
    )
    check_output(drawn(stage.step(decode, hidden(spec, 1))), spec, 1, 1)


@pytest.mark.parametrize(("rows", "drafts"), [(1, 1), (4, 1), (1, 3), (4, 3)])
def test_the_last_stage_of_r1_verifies_and_makes_drafts(rows: int, drafts: int, load: Load) -> None:
    """Users with their drafts fill the lanes of a step without any; all logits of a mock are 0, so all are right."""
    spec = plan_stages(R1, R1.num_hidden_layers)[-1]
    stage = load(spec, rows, drafts=drafts)
    cache = r1_cache(rows, microbatches=spec.stages)
    users = range(cache.pools * (USERS_PER_ROW // COLUMNS // (1 + drafts)))

    prompts = [
        msgspec.structs.replace(each, drafts=drafts, next_token=1, sample=each.slot > 0)
        for each in segments(cache, range(cache.pools), 0, PROMPT)
    ]
    prefill = step("prefill", prompts, admitted=admissions(cache))
    result = drawn(stage.step(prefill, hidden(spec, prefill.token_count)))
    assert isinstance(result, StepResult)
    assert (result.accepted, [len(draft) for draft in result.drafts]) == ([], [drafts] * (cache.pools - 1))

    parts = segments(cache, range(cache.pools), PROMPT, 1 + drafts)
    parts += segments(cache, users[cache.pools :], 0, 1 + drafts)
    for step_id in (2, 3):
        decoded = [msgspec.structs.replace(each, tokens=[1] + [0] * drafts, drafts=drafts) for each in parts]
        decode = step("decode", decoded, step_id=step_id)
        result = drawn(stage.step(decode, hidden(spec, decode.token_count)))
        assert isinstance(result, StepResult)
        assert result.tokens == [0] * decode.token_count
        assert result.accepted == [drafts] * len(parts)
        assert [len(draft) for draft in result.drafts] == [drafts] * len(parts)
        parts = [msgspec.structs.replace(each, start=each.start + 1 + drafts, new_blocks=[]) for each in parts]


def hidden(spec: StageSpec, tokens: int) -> memoryview:
    """The zeros of a previous stage, or nothing."""
    return memoryview(bytearray(0 if spec.is_first else tokens * HIDDEN_BYTES))


def test_a_chip_that_is_full_says_so(load: Load) -> None:
    spec = plan_stages(R1, 4)[1]
    with pytest.raises(RuntimeError, match=r"(?i)out of memory"):
        load(spec, 1)
