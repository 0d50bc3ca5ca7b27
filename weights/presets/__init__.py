"""Configurations of published models that come with the program, for planning without a checkpoint.

DeepSeek-V3, V3-0324, V3.1, R1 and R1-0528 share one config.json, except for keys that have no effect here.
"""

from pathlib import Path

from weights.model_config import ModelConfig

_DIRECTORY = Path(__file__).parent
_R1 = "deepseek-r1"

PRESETS = {
    **dict.fromkeys(("r1", "v3", "v3.1"), _R1),
    **{f"deepseek-ai/DeepSeek-{name}": _R1 for name in ("R1", "R1-0528", "R1-Zero", "V3", "V3-0324", "V3-Base")},
    **{f"deepseek-ai/DeepSeek-V3.1{suffix}": _R1 for suffix in ("", "-Base", "-Terminus")},
}
"""The names of models, each with the directory of its configuration."""


def preset_name(name: str) -> str | None:
    """The name of a published model as it is in PRESETS, whatever its capitals; None for any other name."""
    return next((known for known in PRESETS if known.casefold() == name.casefold()), None)


def preset_config(name: str) -> ModelConfig:
    """The configuration of a published model. Raises KeyError for a name that is not in PRESETS."""
    return ModelConfig.from_file(preset_directory(name) / "config.json")


def preset_directory(name: str) -> Path:
    """The directory that contains the config.json of a published model, and nothing else. Raises KeyError."""
    return _DIRECTORY / PRESETS[name]
