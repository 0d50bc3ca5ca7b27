"""The parts that a model's weights are converted in, each on its own: the embedding, every layer, the head."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from stages.backend import ttnn
from stages.models.deepseek_v3.decoder_block import DenseBlock, MoEBlock
from stages.models.deepseek_v3.embedding import Embedding
from stages.models.deepseek_v3.lm_head import LMHead
from stages.models.deepseek_v3.weight_specs import WeightSpecs, embedding_weights, head_weights, layer_weights
from stages.plan import StageSpec
from stages.run_config import StateDict, WeightConfig
from stages.tensor_dtypes import WeightDtypes
from weights.model_config import ModelConfig
from weights.tensor_shapes import layer_prefix

Convert = Callable[[ModelConfig, StateDict, Path, ttnn.MeshDevice, WeightDtypes], WeightConfig]

Specs = Callable[[ModelConfig, int, WeightDtypes], WeightSpecs]


@dataclasses.dataclass(frozen=True)
class ModelPart:
    """`convert` makes its files from the tensors whose names begin with `prefixes`.

    With one prefix it is given names without it. `specs` are its weights, by the columns of the mesh.
    """

    name: str
    prefixes: tuple[str, ...]
    convert: Convert
    specs: Specs


EMBEDDING = ModelPart(
    "embedding",
    ("model.embed_tokens.",),
    Embedding.convert_weights,
    lambda config, _columns, dtypes: embedding_weights(config, dtypes),
)
HEAD = ModelPart("head", ("model.norm.", "lm_head."), LMHead.convert_weights, head_weights)


def layer_part(config: ModelConfig, layer: int) -> ModelPart:
    """A decoder layer."""
    block = MoEBlock if config.is_moe(layer) else DenseBlock
    return ModelPart(
        f"layer{layer}",
        (layer_prefix(layer),),
        block.convert_weights,
        lambda own, _columns, dtypes: layer_weights(own, layer, dtypes),
    )


def stage_parts(config: ModelConfig, spec: StageSpec) -> list[ModelPart]:
    """All parts that a stage loads, in the order in which tokens pass them."""
    first = [EMBEDDING] if spec.is_first else []
    last = [HEAD] if spec.is_last else []
    return [*first, *(layer_part(config, layer) for layer in spec.layers), *last]
