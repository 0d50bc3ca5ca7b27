"""The JSON file of a run over a file of prompts."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api.errors import OptionError


def default_results_path(prompts_file: Path) -> Path:
    """Beside the prompts: `<stem>_output.json`."""
    return prompts_file.with_name(f"{prompts_file.stem}_output.json")


def check_results_path(path: Path) -> None:
    """Raises OptionError where the file could not be written, before hours are spent on what it shall hold."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"Cannot write --output-path '{path}': {error.strerror}.") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OptionError(f"Cannot write --output-path '{path}': it is a directory, or lies in one that is read-only.")


def write_results(path: Path, prompts: list[str], results: Mapping[str, Any]) -> None:
    """Writes prompts, generations numbered from 1, statistics and model_params; whole or not at all.

    Raises OptionError where it cannot be written.
    """
    generations = [
        {"index": place, "prompt": prompt, **{key: value for key, value in generation.items() if key != "tokens"}}
        for place, (prompt, generation) in enumerate(zip(prompts, results["generations"], strict=True), start=1)
    ]
    content = {
        "prompts": prompts,
        "generations": generations,
        "statistics": results["statistics"],
        "model_params": results["model_params"],
    }
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise OptionError(f"Cannot write --output-path '{path}': {error.strerror}.") from error
