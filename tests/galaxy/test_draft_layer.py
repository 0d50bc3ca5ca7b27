"""The last stage of R1 with the layer that drafts, at its real size on a row and on a whole mock Galaxy."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.capacity.chip_weights import ChipWeights
from stages.converted_weights import ConvertedWeights
from stages.model_slice import DraftLayer, ModelSlice
from stages.models.deepseek_v3.lm_head import LMHead
from stages.plan import plan_stages
from stages.step import Mode
from stages.tensor_dtypes import WeightDtypes
from tests.galaxy.allocated import allocate_in_place_of_files
from tests.galaxy.meshes import allocated_bytes, opened
from tests.galaxy.modules import HIDDEN, check, tokens
from tests.galaxy.r1 import COLUMNS, PROMPT, R1, FullSteps
from weights.cache.cache import WeightCache
from weights.checkpoint import RandomCheckpoint

SMALL_THINGS = 1.01
"""The most that rounding by the allocator and the like may take, as a share of weights and caches."""


@pytest.fixture(scope="module", params=[1, 4], ids=lambda rows: f"{rows}x{COLUMNS}")
def steps(request: pytest.FixtureRequest) -> Iterator[FullSteps]:
    with opened(request.param, COLUMNS) as mesh:
        yield FullSteps.on(mesh)


def load(steps: FullSteps, directory: Path, monkeypatch: pytest.MonkeyPatch) -> DraftLayer:
    """Loads the last of 61 stages, which has one layer beside this one; what it takes is what plans say."""
    allocate_in_place_of_files(monkeypatch)
    spec = plan_stages(R1, R1.num_hidden_layers)[-1]
    weights = ConvertedWeights(RandomCheckpoint(R1, 0), WeightCache(directory), "bfloat16", steps.mesh)
    before = allocated_bytes(steps.mesh)
    model = ModelSlice.load(spec, weights, steps.cache, lambda _done, _of: None, drafts=True)
    taken = allocated_bytes(steps.mesh) - before
    on_chip = ChipWeights(R1, WeightDtypes(), steps.mesh.shape[0])
    expected = sum(weight.bytes for weight in on_chip.of_stage(spec, drafts=True))
    expected += 2 * (on_chip.kv_cache(steps.cache).bytes + on_chip.selection().bytes)
    assert expected <= taken <= SMALL_THINGS * expected
    assert model.draft is not None
    return model.draft


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_step_is_drafted_on(mode: Mode, steps: FullSteps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = load(steps, tmp_path, monkeypatch)
    batch = steps.batch(mode)
    step = steps.prefill_step if mode == "prefill" else steps.decode_step
    ids = steps.builder.ids(batch.layout, [token for segment in step.segments for token in segment.tokens])
    x = draft.forward(steps.hidden(mode), ids, batch)
    check(x, tokens(mode), HIDDEN)

    # These are the last tokens of segments; those of a prefill step are a prompt apart.
    length = PROMPT if mode == "prefill" else 1
    last = range(length - 1, len(batch.layout.places()), length)
    indices, chosen = steps.builder.logit_indices(batch.layout, last)
    logits = draft.logits(x, batch, indices)
    check(logits, indices.shape[-1], R1.vocab_size // COLUMNS)
    assert tuple(LMHead.to_torch(logits, R1, steps.mesh)[chosen].shape) == (len(last), R1.vocab_size)

    if mode == "decode":
        # The next draft of each lane comes from the layer's own hidden states.
        x = draft.forward(x, ids, batch)
        check(draft.logits(x, batch, None), tokens(mode), R1.vocab_size // COLUMNS)
