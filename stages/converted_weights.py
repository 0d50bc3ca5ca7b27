"""A model's weights as one mesh holds them: converted part by part on first use, then found in the weight cache."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from stages.backend import DEVICE, set_float_dtype, ttnn
from stages.errors import PlanError
from stages.models.architecture import WeightSpecs, dtype_letters
from stages.models.registry import architecture_of
from stages.options import ITEM_BYTES, TRANSFORM_VERSION, Dtype, WeightOptions
from stages.plan import StageSpec
from stages.run_config import TORCH_DTYPES, StateDict, WeightConfig, load_weight_config, save_weight_config
from stages.tensor_dtypes import DEFAULT_DTYPES, WeightDtypes
from weights.cache.cache import Fingerprints, WeightCache
from weights.cache.cache_key import CacheKey
from weights.checkpoint import open_weights
from weights.errors import CheckpointError
from weights.model_config import ModelConfig, directory_name
from weights.source import WeightSource, draft_prefix, layer_prefix

Convert = Callable[[ModelConfig, StateDict, Path, ttnn.MeshDevice, WeightDtypes], WeightConfig]

Specs = Callable[[ModelConfig, int, WeightDtypes], WeightSpecs]


@dataclasses.dataclass(frozen=True)
class ModelPart:
    """A part of a model that is converted and cached by itself, as the embedding, a decoder layer or the head.

    `convert` makes its files from the tensors whose names begin with `prefixes`. With one prefix, names are passed
    without it. `specs` are its weights, given the columns of the mesh and the dtypes.
    """

    name: str
    prefixes: tuple[str, ...]
    convert: Convert
    specs: Specs


def embedding_part(config: ModelConfig) -> ModelPart:
    """The table of hidden states of a model."""
    architecture = architecture_of(config)
    return ModelPart(
        "embedding",
        ("model.embed_tokens.",),
        architecture.load_modules().embedding.convert_weights,
        lambda own, _columns, dtypes: architecture.embedding_weights(own, dtypes),
    )


def head_part(config: ModelConfig) -> ModelPart:
    """The final norm and the head of a model."""
    architecture = architecture_of(config)
    convert = architecture.load_modules().head.convert_weights
    return ModelPart("head", ("model.norm.", "lm_head."), convert, architecture.head_weights)


def layer_part(config: ModelConfig, layer: int) -> ModelPart:
    """A decoder layer of a model."""
    architecture = architecture_of(config)
    return ModelPart(
        f"layer{layer}",
        (layer_prefix(layer),),
        architecture.load_modules().decoder(config, layer).convert_weights,
        lambda own, _columns, dtypes: architecture.layer_weights(own, layer, dtypes),
    )


def draft_part(config: ModelConfig) -> ModelPart:
    """The multi-token-prediction layer of a model that has one."""
    architecture = architecture_of(config)
    return ModelPart(
        f"mtp{config.num_hidden_layers}",
        (draft_prefix(config),),
        architecture.load_modules().draft.convert_weights,
        lambda own, _columns, dtypes: architecture.draft_weights(own, dtypes),
    )


def stage_parts(config: ModelConfig, spec: StageSpec, *, drafts: bool = False) -> list[ModelPart]:
    """Returns all parts that a stage loads, in the order in which tokens pass them.

    With `drafts` the last stage has the multi-token-prediction layer, and the embedding for what that takes in.
    """
    first = [embedding_part(config)] if spec.is_first else []
    last = [head_part(config)] if spec.is_last else []
    drafting = []
    if drafts and spec.is_last:
        drafting = [draft_part(config)] if spec.is_first else [embedding_part(config), draft_part(config)]
    return [*first, *(layer_part(config, layer) for layer in spec.layers), *last, *drafting]


@dataclasses.dataclass(frozen=True)
class ConvertedWeights:
    """Converts parts of one model for one mesh."""

    source: WeightSource
    cache: WeightCache
    dtype: Dtype
    mesh_device: ttnn.MeshDevice
    dtypes: WeightDtypes = DEFAULT_DTYPES
    model: str = ""
    """The model's name, which the cache shows."""

    def load(self, part: ModelPart) -> WeightConfig:
        """Returns the files of a part, converting it where the cache does not have them.

        Raises CheckpointError where the source cannot be used, or changes meanwhile, and CacheError where files cannot
        be written.
        """
        key = self.cache_key(part)

        def build(directory: Path) -> None:
            scope = self.source.view(part.prefixes[0] if len(part.prefixes) == 1 else "")
            files = part.convert(self.source.config, scope, directory, self.mesh_device, self.dtypes)
            save_weight_config(directory, files)
            # Files that were written to meanwhile would be kept under a key that they no longer match.
            if self.cache_key(part) != key:
                raise CheckpointError(
                    f"The checkpoint changed while {part.name} was converted from it: start again when it is complete."
                )

        return load_weight_config(self.cache.entry(str(key), build, self.bytes_of(part), self.model))

    def missing(self, parts: Iterable[ModelPart]) -> list[ModelPart]:
        """Returns the parts that the cache does not have. Raises CheckpointError or CacheError."""
        return [part for part in parts if not self.cache.holds(str(self.cache_key(part)))]

    def bytes_of(self, part: ModelPart) -> int:
        """Estimates the size of the part's files, without padding and the few weights of a wider dtype."""
        return self.source.values(*part.prefixes) * ITEM_BYTES[self.dtype]

    def cache_key(self, part: ModelPart) -> CacheKey:
        """Returns the key of the part in the cache. Raises CheckpointError where its tensors cannot be used."""
        rows, columns = tuple(self.mesh_device.shape)
        return CacheKey(
            part=part.name,
            device=DEVICE,
            dtype=self.dtype,
            weights=dtype_letters(part.specs(self.source.config, columns, self.dtypes)),
            rows=rows,
            columns=columns,
            transform=TRANSFORM_VERSION,
            fingerprint=Fingerprints(self.cache.directory).of(self.source, *part.prefixes),
        )


class ConvertOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The weights to convert and the mesh to convert them for, named as in StageOptions.

    `mesh_shape` is rows and columns of each stage.
    """

    model_path: str
    cache_dir: str
    dtype: Dtype
    seed: int
    weights: WeightOptions = WeightOptions()
    mesh_shape: tuple[int, int] = (1, 1)


class Conversion:
    """The conversion of a model: all its parts, and those that the cache does not have yet."""

    def __init__(self, weights: ConvertedWeights, parts: list[ModelPart]) -> None:
        self._weights = weights
        self.parts = parts
        self.missing = weights.missing(parts)
        self.bytes = sum(weights.bytes_of(part) for part in self.missing)
        """The estimated bytes of the missing parts on the disk."""

    @property
    def free_bytes(self) -> int:
        """The bytes that are left on the disk of the cache. Raises CacheError."""
        return self._weights.cache.free_bytes()

    @torch.inference_mode()
    def run(self, on_part: Callable[[ModelPart], None]) -> None:
        """Converts the missing parts; `on_part` is called with each part that is done.

        Parts that another process converts meanwhile are not converted again. Raises CheckpointError or CacheError;
        the parts that are done by then are kept.
        """
        for part in self.missing:
            self._weights.load(part)
            on_part(part)


@contextmanager
def open_conversion(options: ConvertOptions) -> Iterator[Conversion]:
    """Opens a model for conversion, reading its headers, and its bytes if they are new; closes the mesh at the end.

    The multi-token-prediction layer is converted too where the checkpoint has it. Raises CheckpointError where any
    other tensor of the model is missing, or one has the wrong shape.
    """
    if min(options.mesh_shape) < 1:
        raise PlanError(f"{options.mesh_shape} is not a shape of a mesh: give rows and columns.")
    source = open_weights(Path(options.model_path), load_format=options.weights.load_format, seed=options.seed)
    set_float_dtype(TORCH_DTYPES[options.dtype])
    whole = StageSpec(index=0, stages=1, first_layer=0, end_layer=source.config.num_hidden_layers)
    parts = stage_parts(source.config, whole, drafts=source.has_draft_layer)
    source.validate(*(prefix for part in parts for prefix in part.prefixes))
    mesh_device = ttnn.open_mesh_device(ttnn.MeshShape(*options.mesh_shape))
    try:
        weights = ConvertedWeights(
            source,
            WeightCache(Path(options.cache_dir)),
            options.dtype,
            mesh_device,
            options.weights.weight_dtypes,
            directory_name(Path(options.model_path)),
        )
        yield Conversion(weights, parts)
    finally:
        ttnn.close_mesh_device(mesh_device)
