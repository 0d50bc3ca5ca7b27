"""Every module at full R1 size runs on a row and on a whole mock Galaxy, in both modes, with the right shapes."""

from collections.abc import Iterator
from typing import Any

import pytest

from stages.models.deepseek_v3.decoder_block import DenseBlock, MoEBlock
from stages.models.deepseek_v3.embedding import Embedding
from stages.models.deepseek_v3.lm_head import LMHead
from stages.models.deepseek_v3.mla import MLA
from stages.models.deepseek_v3.mlp import MLP
from stages.models.deepseek_v3.moe import MoE
from stages.models.deepseek_v3.mtp import MTP
from stages.models.deepseek_v3.rms_norm import RMSNorm
from stages.step import Mode
from tests.galaxy.meshes import opened
from tests.galaxy.modules import HIDDEN, check, check_module, configured, tokens
from tests.galaxy.r1 import COLUMNS, PROMPT, R1, FullSteps

modes = pytest.mark.parametrize("mode", ["prefill", "decode"])


@pytest.fixture(scope="module", params=[1, 4], ids=lambda rows: f"{rows}x{COLUMNS}")
def steps(request: pytest.FixtureRequest) -> Iterator[FullSteps]:
    with opened(request.param, COLUMNS) as mesh:
        yield FullSteps.on(mesh)


@modes
@pytest.mark.parametrize("module", [RMSNorm, MLA, MLP, MoE, DenseBlock, MoEBlock], ids=lambda module: module.__name__)
def test_hidden_states_keep_their_shape(module: Any, mode: Mode, steps: FullSteps) -> None:
    check_module(module, mode, steps)


@modes
def test_two_hidden_states_become_one(mode: Mode, steps: FullSteps) -> None:
    config = configured(MTP, mode, steps)
    forward = getattr(MTP, f"forward_{mode}")
    x = forward(steps.hidden(mode), steps.hidden(mode), config, steps.batch(mode))

    check(x, tokens(mode), HIDDEN)
    check(MTP.norm(x, config), tokens(mode), HIDDEN)


@modes
def test_the_embedding_gives_each_column_its_part(mode: Mode, steps: FullSteps) -> None:
    config = configured(Embedding, mode, steps)
    step = steps.prefill_step if mode == "prefill" else steps.decode_step
    ids = steps.builder.ids(steps.batch(mode).layout, [token for segment in step.segments for token in segment.tokens])
    check(getattr(Embedding, f"forward_{mode}")(ids, config), tokens(mode), HIDDEN)


@modes
def test_the_head_gives_logits_of_what_is_picked(mode: Mode, steps: FullSteps) -> None:
    config = configured(LMHead, mode, steps)
    batch = steps.batch(mode)
    # These are the last tokens of segments; those of a prefill step are a prompt apart.
    length = PROMPT if mode == "prefill" else 1
    last = range(length - 1, len(batch.layout.places()), length)
    indices, chosen = steps.builder.logit_indices(batch.layout, last)
    picked = LMHead.pick(steps.hidden(mode), config, indices)
    logits = getattr(LMHead, f"forward_{mode}")(picked, config)

    check(logits, indices.shape[-1], R1.vocab_size // COLUMNS)
    on_host = LMHead.to_torch(logits, R1, steps.mesh)
    assert tuple(on_host[chosen].shape) == (len(last), R1.vocab_size)
