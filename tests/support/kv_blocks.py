"""KV caches of an embedded mesh that hold known values, and tiers in a directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stages.backend import set_float_dtype, ttnn
from stages.backend.embedded.dtype import held_in
from stages.kv.record_file import file_bytes
from stages.options import CacheOptions, TierOptions
from tests.support.embedded_meshes import put, shards
from tests.support.stage_driver import cache_options

WIDTH = 64


@contextmanager
def floats_held_in(dtype: torch.dtype) -> Iterator[None]:
    """Lets the embedded device hold floats in `dtype`."""
    before = held_in(ttnn.bfloat16)
    set_float_dtype(dtype)
    try:
        yield
    finally:
        set_float_dtype(before)


def options_for(mesh: ttnn.MeshDevice) -> CacheOptions:
    """A pool of eight blocks for each chip."""
    pools = mesh.get_num_devices()
    return cache_options(slots=2 * pools, pools=pools, max_model_len=128)


def random_caches(mesh: ttnn.MeshDevice, layers: int, dtype: ttnn.DataType = ttnn.bfloat16) -> list[ttnn.Tensor]:
    """Caches of layers, with other values in each block of each pool."""
    options = options_for(mesh)
    shape = (mesh.shape[0] * (options.blocks + 1), mesh.shape[1], options.block_size, WIDTH)
    return [put(mesh, torch.randn(shape), (0, 1), dtype) for _ in range(layers)]


def contents(caches: list[ttnn.Tensor]) -> torch.Tensor:
    """Values of all caches, [layers, pools, blocks + 1, block_size, width]; changes of the caches do not change it."""
    return torch.stack([torch.stack([shard[:, 0].clone() for shard in shards(cache)]) for cache in caches])


def tiers_in(folder: Path, record_bytes: int, records: int) -> TierOptions:
    """A host tier of so many blocks."""
    folder.mkdir(exist_ok=True)
    return TierOptions(host_directory=str(folder), host_bytes=file_bytes(record_bytes, records))
