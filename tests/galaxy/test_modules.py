"""Every module at full R1 size on a row and on a whole mock Galaxy, in both modes: ops accept, shapes are right."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from stages.backend import ttnn
from stages.models.deepseek_v3.decoder_block import DenseBlock, MoEBlock
from stages.models.deepseek_v3.embedding import Embedding
from stages.models.deepseek_v3.lm_head import LMHead
from stages.models.deepseek_v3.mla import MLA
from stages.models.deepseek_v3.mlp import MLP
from stages.models.deepseek_v3.moe import MoE
from stages.models.deepseek_v3.rms_norm import RMSNorm
from stages.models.deepseek_v3.weight_specs import (
    WeightSpecs,
    attention_weights,
    embedding_weights,
    head_weights,
    hidden_norm_weights,
    layer_weights,
    mlp_weights,
    moe_weights,
)
from stages.step import Mode
from tests.galaxy.allocated import run_config
from tests.galaxy.meshes import opened
from tests.galaxy.r1 import COLUMNS, PROMPT, R1, USERS_PER_ROW, FullSteps

HIDDEN = R1.hidden_size // COLUMNS
DENSE_LAYER, MOE_LAYER = 0, R1.first_k_dense_replace

SPECS: dict[type, WeightSpecs] = {
    RMSNorm: hidden_norm_weights(R1),
    MLA: attention_weights(R1),
    MLP: mlp_weights(R1.hidden_size, R1.intermediate_size),
    MoE: moe_weights(R1),
    DenseBlock: layer_weights(R1, DENSE_LAYER),
    MoEBlock: layer_weights(R1, MOE_LAYER),
    Embedding: embedding_weights(R1),
    LMHead: head_weights(R1, COLUMNS),
}
ATTENDS = (MLA, DenseBlock, MoEBlock)

modes = pytest.mark.parametrize("mode", ["prefill", "decode"])


@pytest.fixture(scope="module", params=[1, 4], ids=lambda rows: f"{rows}x{COLUMNS}")
def steps(request: pytest.FixtureRequest) -> Iterator[FullSteps]:
    with opened(request.param, COLUMNS) as mesh:
        yield FullSteps.on(mesh)


def configured(module: Any, mode: Mode, steps: FullSteps) -> Any:
    """The module's config in that mode, its weights allocated."""
    cache = [steps.cache] if module in ATTENDS else []
    state: Mapping[str, Any] = module.create_state(R1, steps.mesh, *cache)
    return run_config(module, mode, SPECS[module], R1, state)


def run(module: Any, mode: Mode, steps: FullSteps) -> ttnn.Tensor:
    """The module on a step that fills the mesh."""
    batch = [steps.batch(mode)] if module in ATTENDS else []
    forward = getattr(module, f"forward_{mode}")
    output: ttnn.Tensor = forward(steps.hidden(mode), configured(module, mode, steps), *batch)
    return output


def tokens(mode: Mode) -> int:
    """Of a row."""
    return COLUMNS * PROMPT if mode == "prefill" else USERS_PER_ROW


def check(x: ttnn.Tensor, rows: int, width: int) -> None:
    """[1, 1, rows, width] of bfloat16 in tiles on each chip."""
    assert tuple(x.shape) == (1, 1, rows, width)
    assert (x.dtype, x.layout) == (ttnn.bfloat16, ttnn.TILE_LAYOUT)


def check_module(module: Any, mode: Mode, steps: FullSteps) -> None:
    """The module takes a step and keeps the shape of hidden states."""
    check(run(module, mode, steps), tokens(mode), HIDDEN)


@modes
@pytest.mark.parametrize("module", [RMSNorm, MLA, MLP, MoE, DenseBlock, MoEBlock], ids=lambda module: module.__name__)
def test_hidden_states_keep_their_shape(module: Any, mode: Mode, steps: FullSteps) -> None:
    check_module(module, mode, steps)


@modes
def test_the_embedding_gives_each_column_its_part(mode: Mode, steps: FullSteps) -> None:
    config = configured(Embedding, mode, steps)
    ids = steps.builder.ids(steps.batch(mode), steps.prefill_step if mode == "prefill" else steps.decode_step)
    check(getattr(Embedding, f"forward_{mode}")(ids, config), tokens(mode), HIDDEN)


@modes
def test_the_head_gives_logits_of_what_is_picked(mode: Mode, steps: FullSteps) -> None:
    config = configured(LMHead, mode, steps)
    batch = steps.batch(mode)
    # The last token of each segment: those of a prefill step lie a prompt apart.
    length = PROMPT if mode == "prefill" else 1
    last = range(length - 1, len(batch.places.of_tokens()), length)
    picks, chosen = steps.builder.picks(batch.places, last)
    picked = LMHead.pick(steps.hidden(mode), config, picks)
    logits = getattr(LMHead, f"forward_{mode}")(picked, config)

    check(logits, picks.shape[-1], R1.vocab_size // COLUMNS)
    on_host = LMHead.to_torch(logits, R1, steps.mesh)
    assert tuple(on_host[chosen].shape) == (len(last), R1.vocab_size)
