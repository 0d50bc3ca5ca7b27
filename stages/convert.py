"""The seed's first stage for a whole model: every part's weights converted into the weight cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from stages.backend import set_float_dtype, ttnn
from stages.converted_weights import ConvertedWeights
from stages.dtypes import TORCH_DTYPES
from stages.errors import PlanError
from stages.model_parts import ModelPart, stage_parts
from stages.models.deepseek_v3.weight_specs import DEFAULT_DTYPES
from stages.options import Dtype, LoadFormat
from stages.plan import StageSpec
from stages.tensor_dtypes import WeightDtypes
from weights.cache.cache import WeightCache
from weights.load import open_weights


class ConvertOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to convert and for whom; fields as in StageOptions. `mesh_shape` is rows and columns of each stage."""

    model_path: str
    cache_dir: str
    dtype: Dtype
    load_format: LoadFormat
    seed: int
    mesh_shape: tuple[int, int] = (1, 1)
    weight_dtypes: WeightDtypes = DEFAULT_DTYPES


class Conversion:
    """A model's parts and which of them the cache does not have yet."""

    def __init__(self, weights: ConvertedWeights, parts: list[ModelPart]) -> None:
        self._weights = weights
        self.parts = parts
        self.missing = weights.missing(parts)
        self.bytes = sum(weights.bytes_of(part) for part in self.missing)
        """About what the missing parts will take on the disk."""

    @property
    def free_bytes(self) -> int:
        """What is left on that disk. Raises CacheError."""
        return self._weights.cache.free_bytes()

    @torch.inference_mode()
    def run(self, on_part: Callable[[ModelPart], None]) -> None:
        """Converts what is missing; `on_part` is called with each part that is done.

        Parts that another process converts meanwhile are taken over. Raises CheckpointError or CacheError; the parts
        done by then stay.
        """
        for part in self.missing:
            self._weights.load(part)
            on_part(part)


@contextmanager
def open_conversion(options: ConvertOptions) -> Iterator[Conversion]:
    """Reads the checkpoint's headers, and its bytes if they are new; the mesh is closed again at the end.

    Raises CheckpointError where any tensor of the model is missing or has the wrong shape.
    """
    if min(options.mesh_shape) < 1:
        raise PlanError(f"{options.mesh_shape} is no shape of a mesh: give rows and columns.")
    source = open_weights(Path(options.model_path), load_format=options.load_format, seed=options.seed)
    set_float_dtype(TORCH_DTYPES[options.dtype])
    whole = StageSpec(index=0, stages=1, first_layer=0, end_layer=source.config.num_hidden_layers)
    parts = stage_parts(source.config, whole)
    source.validate(*(prefix for part in parts for prefix in part.prefixes))
    mesh_device = ttnn.open_mesh_device(ttnn.MeshShape(*options.mesh_shape))
    try:
        weights = ConvertedWeights(
            source, WeightCache(Path(options.cache_dir)), options.dtype, mesh_device, options.weight_dtypes
        )
        yield Conversion(weights, parts)
    finally:
        ttnn.close_mesh_device(mesh_device)
