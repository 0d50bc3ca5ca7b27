"""Files of prompts, in the two layouts of the tt-metal demo."""

import json
from pathlib import Path
from typing import Any

from api.errors import OptionError

LAYOUT = '[{"prompt": "..."}, ...], or the same as "prompts" of an object'


def read_prompts_file(path: Path, limit: int | None = None) -> list[str]:
    """The prompts of a JSON file in their order, the first `limit` of them.

    Entries without a prompt are left out. Raises OptionError where there is no such file, it is no JSON of either
    layout, or no prompt is left.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError(f"Prompts file does not exist: '{path}'.") from None
    except OSError as error:
        raise OptionError(f"Cannot read the prompts file '{path}': {error.strerror}.") from error
    except ValueError as error:
        raise OptionError(f"'{path}' is not valid JSON: {error}.") from error
    prompts = [prompt for entry in _entries(content, path) if (prompt := _prompt(entry))]
    if not prompts:
        raise OptionError(f"No valid prompts found in '{path}': it should hold {LAYOUT}.")
    return prompts[:limit]


def _entries(content: Any, path: Path) -> list[Any]:
    entries = content.get("prompts") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise OptionError(f"No valid prompts found in '{path}': it should hold {LAYOUT}.")
    return entries


def _prompt(entry: Any) -> str:
    """The prompt of an entry, or nothing."""
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    return prompt if isinstance(prompt, str) else ""
