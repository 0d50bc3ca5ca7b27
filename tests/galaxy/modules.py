"""Modules at full R1 size on a mock Galaxy, with a check of their outputs."""

from collections.abc import Mapping
from typing import Any

from stages.backend import ttnn
from stages.models.architecture import WeightSpecs
from stages.models.deepseek_v3.decoder_block import DenseBlock, MoEBlock
from stages.models.deepseek_v3.embedding import Embedding
from stages.models.deepseek_v3.lm_head import LMHead
from stages.models.deepseek_v3.mla import MLA
from stages.models.deepseek_v3.mlp import MLP
from stages.models.deepseek_v3.moe import MoE
from stages.models.deepseek_v3.mtp import MTP
from stages.models.deepseek_v3.rms_norm import RMSNorm
from stages.models.deepseek_v3.weight_specs import (
    attention_weights,
    draft_weights,
    embedding_weights,
    head_weights,
    hidden_norm_weights,
    layer_weights,
    mlp_weights,
    moe_weights,
)
from stages.step import Mode
from tests.galaxy.allocated import run_config
from tests.galaxy.r1 import COLUMNS, PROMPT, R1, USERS_PER_ROW, FullSteps

DENSE_LAYER, MOE_LAYER = 0, R1.first_k_dense_replace
HIDDEN = R1.hidden_size // COLUMNS

SPECS: dict[type, WeightSpecs] = {
    RMSNorm: hidden_norm_weights(R1),
    MLA: attention_weights(R1),
    MLP: mlp_weights(R1.hidden_size, R1.intermediate_size),
    MoE: moe_weights(R1),
    DenseBlock: layer_weights(R1, DENSE_LAYER),
    MoEBlock: layer_weights(R1, MOE_LAYER),
    Embedding: embedding_weights(R1),
    LMHead: head_weights(R1, COLUMNS),
    MTP: draft_weights(R1),
}
ATTENDS = (MLA, DenseBlock, MoEBlock, MTP)


def configured(module: Any, mode: Mode, steps: FullSteps) -> Any:
    """The module's run config in that mode, with allocated weights."""
    cache = [steps.cache] if module in ATTENDS else []
    state: Mapping[str, Any] = module.create_state(R1, steps.mesh, *cache)
    return run_config(module, mode, SPECS[module], R1, state)


def run(module: Any, mode: Mode, steps: FullSteps) -> ttnn.Tensor:
    """Runs the module on a step that fills the mesh."""
    batch = [steps.batch(mode)] if module in ATTENDS else []
    forward = getattr(module, f"forward_{mode}")
    output: ttnn.Tensor = forward(steps.hidden(mode), configured(module, mode, steps), *batch)
    return output


def tokens(mode: Mode) -> int:
    """The number of tokens of a row."""
    return COLUMNS * PROMPT if mode == "prefill" else USERS_PER_ROW


def check(x: ttnn.Tensor, rows: int, width: int) -> None:
    """Allocates [1, 1, rows, width] of bfloat16 in TILE layout on each chip."""
    assert tuple(x.shape) == (1, 1, rows, width)
    assert (x.dtype, x.layout) == (ttnn.bfloat16, ttnn.TILE_LAYOUT)


def check_module(module: Any, mode: Mode, steps: FullSteps) -> None:
    """Checks that the module runs a step and keeps the shape of hidden states."""
    check(run(module, mode, steps), tokens(mode), HIDDEN)
