"""Configurations of published models that come with the program: what can be planned without a checkpoint.

DeepSeek-V3, V3-0324, R1 and R1-0528 share one config.json, up to keys that change nothing here.
"""

from pathlib import Path

from weights.model_config import ModelConfig

_DIRECTORY = Path(__file__).parent
_R1 = "deepseek-r1"

PRESETS = {
    "r1": _R1,
    **{f"deepseek-ai/DeepSeek-{name}": _R1 for name in ("R1", "R1-0528", "R1-Zero", "V3", "V3-0324", "V3-Base")},
}
"""What a model is called -> the directory of its configuration."""


def preset_config(name: str) -> ModelConfig | None:
    """The configuration of a published model, by its hub id, or "r1"; None for any other."""
    directory = preset_directory(name)
    return None if directory is None else ModelConfig.from_file(directory / "config.json")


def preset_directory(name: str) -> Path | None:
    """The directory that holds that configuration, and nothing else."""
    found = PRESETS.get(name)
    return None if found is None else _DIRECTORY / found
