"""Configurations of published models that come with the program, for planning without a checkpoint.

DeepSeek-V3, V3-0324, V3.1, R1 and R1-0528 share one config.json, except for keys that have no effect here.
"""

from pathlib import Path

from weights.model_config import ModelConfig

_DIRECTORY = Path(__file__).parent
_R1 = "deepseek-r1"

PRESETS = {
    "r1": _R1,
    **{f"deepseek-ai/DeepSeek-{name}": _R1 for name in ("R1", "R1-0528", "R1-Zero", "V3", "V3-0324", "V3-Base")},
    **{f"deepseek-ai/DeepSeek-V3.1{suffix}": _R1 for suffix in ("", "-Base", "-Terminus")},
}
"""The names of models, each with the directory of its configuration."""


def preset_config(name: str) -> ModelConfig | None:
    """The configuration of the published model with a hub id, or of "r1"; None for any other name."""
    directory = preset_directory(name)
    return None if directory is None else ModelConfig.from_file(directory / "config.json")


def preset_directory(name: str) -> Path | None:
    """The directory that contains the config.json of the published model, and nothing else; None for any other name."""
    found = PRESETS.get(name)
    return None if found is None else _DIRECTORY / found
