"""Weights as one mesh holds them: converted on first use, found in the weight cache ever after."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from stages.backend import DEVICE, ttnn
from stages.options import Dtype
from stages.run_config import StateDict, WeightConfig, load_weight_config, save_weight_config
from weights.cache import WeightCache
from weights.model_config import ModelConfig
from weights.source import WeightSource

TRANSFORM_VERSION = 1
"""Raised by every change of what `convert_weights` writes: entries of another version are not found again."""

Convert = Callable[[ModelConfig, StateDict, Path, ttnn.MeshDevice], WeightConfig]


@dataclasses.dataclass(frozen=True)
class ConvertedWeights:
    """Converts parts of one model for one mesh."""

    source: WeightSource
    cache: WeightCache
    dtype: Dtype
    mesh_device: ttnn.MeshDevice

    def part(self, name: str, prefixes: Sequence[str], convert: Convert) -> WeightConfig:
        """The files of the part `name`, made by `convert` from the tensors whose names begin with `prefixes`.

        With one prefix `convert` is given names without it. Raises CheckpointError where the source will not do, and
        CacheError where files cannot be written.
        """
        rows, columns = tuple(self.mesh_device.shape)
        fingerprint = self.source.fingerprint(*prefixes)
        key = f"{name}-{DEVICE}-{self.dtype}-{rows}x{columns}-v{TRANSFORM_VERSION}-{fingerprint}"

        def build(directory: Path) -> None:
            scope = self.source.scope(prefixes[0] if len(prefixes) == 1 else "")
            save_weight_config(directory, convert(self.source.config, scope, directory, self.mesh_device))

        return load_weight_config(self.cache.entry(key, build))
