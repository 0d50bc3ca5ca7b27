"""A model directory without weights, for servers whose stages compute nothing."""

import json
import shutil
from pathlib import Path

from weights.sample import SAMPLE_DIR

HIDDEN_SIZE = 7168
"""The hidden size of DeepSeek-V3, so that sockets carry as much as in production."""

LAYERS = 8
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write_null_model(directory: Path, layers: int = LAYERS) -> None:
    """Writes the sample model's configuration with `layers` layers of HIDDEN_SIZE, and its tokenizer."""
    config = json.loads((SAMPLE_DIR / "config.json").read_bytes())
    config |= {"num_hidden_layers": layers, "hidden_size": HIDDEN_SIZE}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(SAMPLE_DIR / name, directory / name)
