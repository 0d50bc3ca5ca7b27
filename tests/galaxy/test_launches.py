"""The numbers of programs in predictions of time are those that a mock Galaxy executes for the modules of R1."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stages.backend import ttnn
from stages.batch import DecodeBatch
from stages.models.deepseek_v3.architecture import OPS
from stages.models.deepseek_v3.decoder_block import DenseBlock, MoEBlock
from stages.models.deepseek_v3.embedding import Embedding
from stages.models.deepseek_v3.lm_head import LMHead
from stages.models.deepseek_v3.mtp import MTP
from stages.models.deepseek_v3.rms_norm import RMSNorm
from tests.galaxy.meshes import opened
from tests.galaxy.modules import configured
from tests.galaxy.programs import programs
from tests.galaxy.r1 import COLUMNS, PROMPT, R1, USERS_PER_ROW, FullSteps, segments, step

SPREADING = 1
"""Inputs of these tests come as a stage's do: spread over cores by the first layer."""

kinds = pytest.mark.parametrize("block", [DenseBlock, MoEBlock], ids=lambda block: block.__name__)


@pytest.fixture(scope="module", params=[1, 4], ids=lambda rows: f"{rows}x{COLUMNS}")
def steps(request: pytest.FixtureRequest) -> Iterator[FullSteps]:
    with opened(request.param, COLUMNS) as mesh:
        yield FullSteps.on(mesh)


def of_a_layer(block: Any, steps: FullSteps, batch: DecodeBatch, x: ttnn.Tensor) -> int:
    config = configured(block, "decode", steps)
    return programs(steps.mesh, lambda: block.forward_decode(x, config, batch))


def expected(block: Any, steps: FullSteps, tokens: int) -> int:
    return OPS.layer(is_moe=block is MoEBlock, rows=steps.mesh.shape[0], tokens=tokens, is_decode=True)


@kinds
def test_of_a_decode_step(block: Any, steps: FullSteps) -> None:
    count = of_a_layer(block, steps, steps.decode, steps.hidden("decode"))
    assert count == expected(block, steps, USERS_PER_ROW) + SPREADING


@kinds
@pytest.mark.parametrize("drafts", [1, 3])
def test_of_a_decode_step_with_drafts(block: Any, drafts: int, steps: FullSteps) -> None:
    lanes = segments(steps.cache, range(steps.cache.slots), PROMPT, 1 + drafts)
    batch = steps.builder.decode(step("decode", lanes, step_id=3))
    hidden = torch.zeros(steps.cache.slots * (1 + drafts), R1.hidden_size, dtype=torch.bfloat16)
    count = of_a_layer(block, steps, batch, steps.builder.hidden(batch.layout, hidden))
    assert count == expected(block, steps, USERS_PER_ROW * (1 + drafts))


def test_of_the_ends_of_a_decode_step(steps: FullSteps) -> None:
    mesh, batch, x = steps.mesh, steps.decode, steps.hidden("decode")
    ids = steps.builder.ids(batch.layout, [1] * steps.cache.slots)
    embedding, head = configured(Embedding, "decode", steps), configured(LMHead, "decode", steps)
    indices, _ = steps.builder.logit_indices(batch.layout, range(steps.cache.slots))
    entering = programs(mesh, lambda: Embedding.forward_decode(ids, embedding))
    entering += programs(mesh, lambda: steps.builder.decode(steps.decode_step))
    leaving = ttnn.to_memory_config(x, batch.norms[0].memory_config) if batch.norms else x
    around = SPREADING + programs(mesh, lambda: batch.interleaved(leaving))
    assert entering + around == OPS.entering(tokens=USERS_PER_ROW, is_decode=True)
    picking = programs(mesh, lambda: LMHead.pick(x, head, indices))
    assert picking + programs(mesh, lambda: LMHead.forward_decode(x, head)) == OPS.head.decode + OPS.norm.decode


def test_of_the_draft_layer(steps: FullSteps) -> None:
    mesh, x = steps.mesh, steps.hidden("decode")
    config, norm = configured(MTP, "decode", steps), configured(RMSNorm, "decode", steps)
    embedding = configured(Embedding, "decode", steps)
    ids = steps.builder.ids(steps.decode.layout, [1] * steps.cache.slots)
    count = programs(mesh, lambda: MTP.forward_decode(x, x, config, steps.decode))
    count += programs(mesh, lambda: Embedding.forward_decode(ids, embedding))
    around = OPS.joining(tokens=USERS_PER_ROW, is_decode=True)
    assert count == expected(MoEBlock, steps, USERS_PER_ROW) + around
    assert programs(mesh, lambda: RMSNorm.forward_decode(x, norm)) == OPS.norm.decode
