"""Whole models through stages against transformers' DeepSeek-V3: float32 logits of prefill, chunks and decode."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from stages import stage
from stages.batch_builder import BatchBuilder
from tests.support.checkpoints import KIMI_K2, ScaleFormat, StoredDtype, config_keys, reference_model, write_checkpoint
from tests.support.model_errors import TINY, TOLERANCE, prompts, reference_logits, worst_error
from tests.support.stage_driver import Driver, cache_options, relative_error, stage_options

YARN: dict[str, Any] = config_keys()["rope_scaling"]

CONFIGS: dict[str, dict[str, Any]] = {
    "small": {},
    "one-group-top-1": {**TINY, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 0},
    "top-8-of-8-groups": {
        **TINY,
        "n_routed_experts": 32,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "n_shared_experts": 2,
    },
    "all-dense": {**TINY, "first_k_dense_replace": 2},
    "no-yarn": {**TINY, "rope_scaling": None, "rope_theta": 50000},
    "mscale-ratio": {
        **TINY,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64},
    },
    "odd-heads": {
        **TINY,
        "num_attention_heads": 5,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 40,
        "kv_lora_rank": 96,
        "q_lora_rank": 72,
    },
    "tied-head": {**TINY, "tie_word_embeddings": True},
    "raw-weights": {**TINY, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "loose-epsilon": {**TINY, "rms_norm_eps": 1e-2},
}
NEGATIVE_BIASES = {"top-8-of-8-groups", "odd-heads"}

Load = Callable[..., Driver]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Loads a checkpoint into stages, which are closed at the end."""
    drivers = []

    def loaded(model: Path, stages: int = 1, mesh_shape: tuple[int, int] | None = None, **options: Any) -> Driver:
        drivers.append(Driver.load(stage_options(model, tmp_path / "cache", **options), stages, mesh_shape))
        return drivers[-1]

    yield loaded
    for driver in drivers:
        driver.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, dtype: StoredDtype, tmp_path: Path, load: Load) -> None:
    overrides = CONFIGS[name]
    model = write_checkpoint(
        tmp_path / "model", overrides=overrides, dtype=dtype, negative_biases=name in NEGATIVE_BIASES
    )
    error = worst_error(load(model), reference_model(model), config_keys(overrides)["vocab_size"])
    assert error < TOLERANCE


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def small_reference(small: Path) -> DeepseekV3ForCausalLM:
    return reference_model(small)


@pytest.mark.parametrize("stages", [2, 3])
def test_split_models(stages: int, small: Path, small_reference: DeepseekV3ForCausalLM, load: Load) -> None:
    assert worst_error(load(small, stages), small_reference, 512) < TOLERANCE


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("chunk", [None, 64, 128])
def test_chunk_and_block_sizes(
    chunk: int | None, block_size: int, small: Path, small_reference: DeepseekV3ForCausalLM, load: Load
) -> None:
    driver = load(small, cache=cache_options(block_size=block_size))
    assert worst_error(driver, small_reference, 512, chunk) < TOLERANCE


def test_r1_keys_and_names_in_many_shards(tmp_path: Path, load: Load) -> None:
    model = write_checkpoint(tmp_path / "model", dtype="fp8", shards=7, mtp_layer=True)
    assert worst_error(load(model, stages=2), reference_model(model), 512) < TOLERANCE


def test_kimi_k2_through_two_stages(tmp_path: Path, load: Load) -> None:
    model = write_checkpoint(tmp_path / "model", overrides={**KIMI_K2, "n_routed_experts": 24}, dtype="fp8", shards=3)
    assert worst_error(load(model, stages=2), reference_model(model), 512) < TOLERANCE


@pytest.mark.parametrize("scale_format", ["ue8m0", "e8m0"])
def test_scales_that_are_powers_of_two(scale_format: ScaleFormat, tmp_path: Path, load: Load) -> None:
    model = write_checkpoint(tmp_path / "model", overrides=TINY, dtype="fp8", scale_format=scale_format)
    assert worst_error(load(model), reference_model(model), TINY["vocab_size"]) < TOLERANCE


def test_slots_are_reused(small: Path, small_reference: DeepseekV3ForCausalLM, load: Load) -> None:
    driver = load(small, cache=cache_options(slots=3, max_model_len=128))
    for seed in range(3):
        for slot, text in enumerate(prompts(3, 512, seed)):
            driver.admit(slot)
            expected = reference_logits(small_reference, text)[-1]
            assert relative_error(driver.prefill({slot: text})[0], expected) < TOLERANCE
        for slot in (1, 2, 0):
            driver.end(slot)


MESH_MODEL: dict[str, Any] = {**TINY, "n_routed_experts": 32, "num_attention_heads": 8}


def mesh_logits(load: Load, model: Path, mesh_shape: tuple[int, int], texts: list[list[int]]) -> list[torch.Tensor]:
    """Returns logits of prefills of all but the last tokens of `texts`, then of decode steps, in slots far apart."""
    pools = mesh_shape[0] * mesh_shape[1]
    cache = cache_options(slots=len(texts) * pools, pools=pools, max_model_len=128)
    driver = load(model, cache=cache, mesh_shape=mesh_shape)
    # Two slots of one pool, and others of other rows and columns; pools without a slot.
    slots = [0, pools, pools - 1, pools // 2, 1] if pools > 2 else [0, 1, 2, 3, 4]
    by_slot = dict(sorted(zip(slots, texts, strict=True)))
    heads = {slot: max(len(text) - 3, 1) for slot, text in by_slot.items()}
    for slot in by_slot:
        driver.admit(slot)
    rows = driver.prefill({slot: text[: heads[slot]] for slot, text in by_slot.items()}, chunk=32)
    found = {(slot, heads[slot] - 1): row for slot, row in zip(by_slot, rows, strict=True)}
    for step in range(3):
        at = {slot: heads[slot] + step for slot in by_slot if heads[slot] + step < len(by_slot[slot])}
        rows = driver.decode({slot: (position, by_slot[slot][position]) for slot, position in at.items()})
        found |= {(slot, position): row for (slot, position), row in zip(at.items(), rows, strict=True)}
    ends = [range(heads[slot] - 1, len(by_slot[slot])) for slot in slots]
    return [
        torch.stack([found[slot, position] for position in positions if (slot, position) in found])
        for slot, positions in zip(slots, ends, strict=True)
    ]


@pytest.mark.parametrize("mesh_shape", [(1, 2), (1, 8), (2, 4), (8, 1), (2, 8), (4, 8)])
def test_meshes(mesh_shape: tuple[int, int], tmp_path: Path, load: Load) -> None:
    """Against transformers and against one chip: sharding changes the last bits only."""
    model = write_checkpoint(tmp_path / "model", overrides=MESH_MODEL)
    reference = reference_model(model)
    texts = prompts(5, TINY["vocab_size"])
    one_chip = mesh_logits(load, model, (1, 1), texts)
    found = mesh_logits(load, model, mesh_shape, texts)
    for text, on_one_chip, on_mesh in zip(texts, one_chip, found, strict=True):
        expected = reference_logits(reference, text)[-len(on_mesh) :]
        for row, alone, true in zip(on_mesh, on_one_chip, expected, strict=True):
            assert relative_error(row, true) < TOLERANCE
            assert relative_error(row, alone) < TOLERANCE


@pytest.mark.parametrize("mesh_shape", [(1, 1), (1, 8), (2, 4)])
def test_steps_padded_for_chips(
    mesh_shape: tuple[int, int], tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding to 32 tokens a row, and to lanes of few lengths, changes nothing."""
    model = write_checkpoint(tmp_path / "model", overrides=MESH_MODEL)
    texts = prompts(5, TINY["vocab_size"])
    plain = mesh_logits(load, model, mesh_shape, texts)
    monkeypatch.setattr(stage, "BatchBuilder", functools.partial(BatchBuilder, users_per_row=32))
    padded = mesh_logits(load, model, mesh_shape, texts)
    for one, other in zip(plain, padded, strict=True):
        assert relative_error(other, one) < TOLERANCE


def test_bfloat16_is_near(tmp_path: Path, load: Load) -> None:
    # Dense, because rounding may choose other experts, whose answer is another one.
    model = write_checkpoint(tmp_path / "model", overrides=CONFIGS["all-dense"])
    assert worst_error(load(model, dtype="bfloat16"), reference_model(model), 320) < 0.03
