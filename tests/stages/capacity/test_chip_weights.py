"""The weights that a plan expects on a chip, against those that the modules put there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stages.backend import ttnn
from stages.capacity.chip_weights import ChipTensor, ChipWeights
from stages.models.deepseek_v3.decoder_block import DenseBlock, MoEBlock
from stages.models.deepseek_v3.embedding import Embedding
from stages.models.deepseek_v3.lm_head import LMHead
from stages.models.deepseek_v3.mla import MLA
from stages.models.deepseek_v3.moe import MoE
from stages.models.deepseek_v3.mtp import MTP
from stages.models.deepseek_v3.rope import rope_tables
from stages.options import CacheOptions
from stages.plan import StageSpec
from stages.run_config import SUFFIX
from stages.tensor_dtypes import CHOICES, TILE_BYTES, WeightDtypes
from tests.support.checkpoints import config_keys
from weights.checkpoint import RandomCheckpoint
from weights.model_config import ModelConfig
from weights.source import PrefixView, draft_prefix, layer_prefix

CONFIG = ModelConfig.from_dict(config_keys({"vocab_size": 500}), source="the test's model")
MESHES = [(1, 1), (1, 8), (2, 8)]
CACHE = CacheOptions(slots=16, pools=16, blocks=9, block_size=32, max_model_len=100)
Held = tuple[tuple[int, ...], str, str]


def planned(tensors: list[ChipTensor]) -> dict[str, Held]:
    return {tensor.name: (tensor.shape, tensor.dtype, tensor.layout) for tensor in tensors}


def held(tensor: ttnn.Tensor) -> Held:
    return tuple(tensor.shape), tensor.dtype.name.lower(), tensor.layout.name.lower()


def converted(directory: Path, mesh: ttnn.MeshDevice) -> dict[str, Held]:
    files = directory.rglob(f"*{SUFFIX}")
    return {
        str(path.relative_to(directory)).removesuffix(SUFFIX): held(ttnn.load_tensor(str(path), device=mesh))
        for path in files
    }


@pytest.fixture(params=MESHES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def mesh(request: pytest.FixtureRequest) -> Iterator[ttnn.MeshDevice]:
    opened = ttnn.open_mesh_device(ttnn.MeshShape(*request.param))
    yield opened
    ttnn.close_mesh_device(opened)


@pytest.fixture
def weights(mesh: ttnn.MeshDevice) -> ChipWeights:
    return ChipWeights(CONFIG, WeightDtypes(), *mesh.shape)


@pytest.fixture(scope="module")
def source() -> RandomCheckpoint:
    return RandomCheckpoint(CONFIG, 0)


def test_of_the_embedding(
    tmp_path: Path, mesh: ttnn.MeshDevice, weights: ChipWeights, source: RandomCheckpoint
) -> None:
    Embedding.convert_weights(CONFIG, PrefixView(source, "model.embed_tokens."), tmp_path, mesh)
    assert planned(weights.embedding()) == converted(tmp_path, mesh)


def test_of_the_head(tmp_path: Path, mesh: ttnn.MeshDevice, weights: ChipWeights, source: RandomCheckpoint) -> None:
    LMHead.convert_weights(CONFIG, PrefixView(source, ""), tmp_path, mesh)
    assert planned(weights.head()) == converted(tmp_path, mesh)


@pytest.mark.parametrize("layer", [0, 1])
def test_of_a_layer(
    layer: int, tmp_path: Path, mesh: ttnn.MeshDevice, weights: ChipWeights, source: RandomCheckpoint
) -> None:
    block = MoEBlock if CONFIG.is_moe(layer) else DenseBlock
    block.convert_weights(CONFIG, PrefixView(source, layer_prefix(layer)), tmp_path, mesh)
    assert planned(weights.layer(layer)) == converted(tmp_path, mesh)


def test_of_the_layer_that_drafts(
    tmp_path: Path, mesh: ttnn.MeshDevice, weights: ChipWeights, source: RandomCheckpoint
) -> None:
    MTP.convert_weights(CONFIG, PrefixView(source, draft_prefix(CONFIG)), tmp_path, mesh)
    assert planned(weights.draft()) == converted(tmp_path, mesh)


def test_of_its_state(mesh: ttnn.MeshDevice, weights: ChipWeights) -> None:
    """It is that of a decoder layer."""
    cache, selection = weights.kv_cache(CACHE), weights.selection()
    block = MTP.create_state(CONFIG, mesh, CACHE)["block"]
    assert held(block["self_attn"]["kv_cache"]) == (cache.shape, cache.dtype, cache.layout)
    assert held(block["mlp"]["select"]) == (selection.shape, selection.dtype, selection.layout)


def test_of_a_layers_state(mesh: ttnn.MeshDevice, weights: ChipWeights) -> None:
    cache, selection = weights.kv_cache(CACHE), weights.selection()
    assert held(MLA.create_state(CONFIG, mesh, CACHE)["kv_cache"]) == (cache.shape, cache.dtype, cache.layout)
    assert held(MoE.create_state(CONFIG, mesh)["select"]) == (selection.shape, selection.dtype, selection.layout)


def test_of_the_rope_tables(mesh: ttnn.MeshDevice, weights: ChipWeights) -> None:
    tables = rope_tables(CONFIG, mesh, CACHE.blocks_per_slot * CACHE.block_size)
    assert list(planned(weights.rope_tables(CACHE)).values()) == [held(table) for table in tables]


def test_a_stage_holds_its_parts_alone() -> None:
    weights = ChipWeights(CONFIG, WeightDtypes(), 1)
    first = weights.of_stage(StageSpec(index=0, stages=2, first_layer=0, end_layer=1))
    last = weights.of_stage(StageSpec(index=1, stages=2, first_layer=1, end_layer=3))
    assert first == [*weights.embedding(), *weights.layer(0)]
    assert last == [*weights.layer(1), *weights.layer(2), *weights.head()]


def test_the_last_stage_holds_what_makes_drafts() -> None:
    weights = ChipWeights(CONFIG, WeightDtypes(), 1)
    specs = [StageSpec(index=index, stages=2, first_layer=index, end_layer=index + 1) for index in (0, 1)]
    assert weights.of_stage(specs[0], drafts=True) == weights.of_stage(specs[0])
    drafting = [*weights.embedding(), *weights.draft()]
    assert weights.of_stage(specs[1], drafts=True) == [*weights.of_stage(specs[1]), *drafting]
    whole = StageSpec(index=0, stages=1, first_layer=0, end_layer=3)
    assert weights.of_stage(whole, drafts=True) == [*weights.of_stage(whole), *weights.draft()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_of_whole_bytes_take_what_torch_says(dtype: str) -> None:
    tile = torch.empty(32, 32, dtype=getattr(torch, dtype))
    assert TILE_BYTES[dtype] == tile.nbytes  # type: ignore[index]


def test_the_defaults_are_allowed_and_narrow_step_by_step() -> None:
    dtypes = WeightDtypes()
    for kind, allowed in CHOICES.items():
        narrower = dtypes.narrowed(kind)
        assert (narrower is None) == (dtypes.of(kind) == allowed[-1])
        if narrower is not None:
            assert TILE_BYTES[narrower.of(kind)] < TILE_BYTES[dtypes.of(kind)]
