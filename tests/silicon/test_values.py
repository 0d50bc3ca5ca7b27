"""Values on chips: those of small models equal the embedded device's, and those of replayed steps the plain ones'."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.silicon.chips import GALAXY, ROW, needs_chips
from tests.silicon.run_model import logits_on
from tests.support.checkpoints import write_checkpoint
from tests.support.stage_driver import relative_error
from weights.sample import SAMPLE_DIR

pytestmark = [pytest.mark.galaxy, pytest.mark.timeout(1800)]

DENSE: dict[str, Any] = {"num_attention_heads": 128, "num_hidden_layers": 2, "first_k_dense_replace": 2}
EXPERTS: dict[str, Any] = {**DENSE, "first_k_dense_replace": 1}

ROUNDING = 0.05
"""The relative tolerance: bfloat16 has 8 bits, and a few dozen roundings add up in two layers."""

SAME = 0.01
"""The relative tolerance of replayed steps: a last bit of bfloat16, as they compute the head for whole rows."""

SAME_TOP_1_MIN = 0.9
"""Share of positions: where two experts are nearly as good, rounding chooses the other."""

meshes = pytest.mark.parametrize(
    "mesh",
    [
        pytest.param((1, 1), marks=needs_chips(1), id="1x1"),
        pytest.param((1, 8), marks=needs_chips(ROW), id="1x8"),
        pytest.param((4, 8), marks=needs_chips(GALAXY), id="4x8"),
    ],
)


def same_top_1(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.argmax(-1) == expected.argmax(-1)).float().mean())


@meshes
def test_logits_of_dense_layers_are_those_of_the_embedded_device(mesh: tuple[int, int], tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", overrides=DENSE)
    expected = logits_on("embedded", model, tmp_path, mesh)
    found = logits_on("ttnn", model, tmp_path, mesh)
    assert max(relative_error(row, true) for row, true in zip(found, expected, strict=True)) < ROUNDING


@meshes
def test_most_tokens_of_a_mixture_of_experts_are_the_same(mesh: tuple[int, int], tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", overrides=EXPERTS)
    expected = logits_on("embedded", model, tmp_path, mesh)
    assert same_top_1(logits_on("ttnn", model, tmp_path, mesh), expected) >= SAME_TOP_1_MIN


@needs_chips(1)
def test_the_sample_model_says_the_same(tmp_path: Path) -> None:
    expected = logits_on("embedded", SAMPLE_DIR, tmp_path, (1, 1))
    assert same_top_1(logits_on("ttnn", SAMPLE_DIR, tmp_path, (1, 1)), expected) >= SAME_TOP_1_MIN


@meshes
def test_replayed_steps_give_what_plain_ones_give(mesh: tuple[int, int], tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", overrides=EXPERTS)
    plain = logits_on("ttnn", model, tmp_path, mesh)
    replayed = logits_on("ttnn", model, tmp_path, mesh, enable_trace=True)
    assert max(relative_error(row, true) for row, true in zip(replayed, plain, strict=True)) < SAME
