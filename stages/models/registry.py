"""The model families that can be served: where generic code finds the one of a config.

A new family is a package beside `deepseek_v3/` whose `Architecture` is listed here, and its `model_type` in
`weights/model_config.py`. Nothing here imports torch.
"""

from stages.models.architecture import Architecture
from stages.models.deepseek_v3.architecture import DEEPSEEK_V3
from weights.model_config import ModelConfig

ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in (DEEPSEEK_V3,)}
"""The families by the name that a config.json gives them in `architectures`."""


def architecture_of(config: ModelConfig) -> Architecture:
    """Returns the family of a model."""
    return ARCHITECTURES[config.architecture]
