"""Weights as one mesh holds them: converted on first use, found in the weight cache ever after."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from stages.backend import DEVICE, ttnn
from stages.model_parts import ModelPart
from stages.models.deepseek_v3.weight_specs import DEFAULT_DTYPES, dtype_letters
from stages.options import ITEM_BYTES, TRANSFORM_VERSION, Dtype
from stages.run_config import WeightConfig, load_weight_config, save_weight_config
from stages.tensor_dtypes import WeightDtypes
from weights.cache.cache import WeightCache
from weights.cache.cache_key import EntryName
from weights.cache.fingerprints import Fingerprints
from weights.errors import CheckpointError
from weights.source import WeightSource


@dataclasses.dataclass(frozen=True)
class ConvertedWeights:
    """Converts parts of one model for one mesh."""

    source: WeightSource
    cache: WeightCache
    dtype: Dtype
    mesh_device: ttnn.MeshDevice
    dtypes: WeightDtypes = DEFAULT_DTYPES

    def load(self, part: ModelPart) -> WeightConfig:
        """The part's files, converted where the cache does not have them.

        Raises CheckpointError where the source will not do, or changes meanwhile, and CacheError where files cannot be
        written.
        """
        name = self.entry_name(part)

        def build(directory: Path) -> None:
            scope = self.source.scope(part.prefixes[0] if len(part.prefixes) == 1 else "")
            files = part.convert(self.source.config, scope, directory, self.mesh_device, self.dtypes)
            save_weight_config(directory, files)
            # Files that were written to meanwhile would be kept under the name of what they no longer are.
            if self.entry_name(part) != name:
                raise CheckpointError(
                    f"The checkpoint changed while {part.name} was converted from it: start again when it is complete."
                )

        return load_weight_config(self.cache.entry(str(name), build, self.bytes_of(part)))

    def missing(self, parts: Iterable[ModelPart]) -> list[ModelPart]:
        """Those of `parts` that the cache does not have. Raises CheckpointError or CacheError."""
        return [part for part in parts if not self.cache.holds(str(self.entry_name(part)))]

    def bytes_of(self, part: ModelPart) -> int:
        """About what the part's files take: padding and what is kept in a wider dtype are a small share of it."""
        return self.source.values(*part.prefixes) * ITEM_BYTES[self.dtype]

    def entry_name(self, part: ModelPart) -> EntryName:
        """What the part is called in the cache. Raises CheckpointError where its tensors will not do."""
        rows, columns = tuple(self.mesh_device.shape)
        return EntryName(
            part=part.name,
            device=DEVICE,
            dtype=self.dtype,
            weights=dtype_letters(part.specs(self.source.config, columns, self.dtypes)),
            rows=rows,
            columns=columns,
            transform=TRANSFORM_VERSION,
            fingerprint=Fingerprints(self.cache.directory).of(self.source, *part.prefixes),
        )
