"""The demo's files: prompts in the two layouts of the tt-metal demo, and results as JSON or a line for each prompt."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from api.errors import OptionError
from api.settings.paths import prepare_file, unwritable, write_file

RESULTS_FLAG = "--output-path"
RESULTS_LOG_FLAG = "--checkpoint-jsonl"

LAYOUT = '[{"prompt": "..."}, ...], or the same as "prompts" of an object'


def read_prompts_file(path: Path, limit: int | None = None) -> list[str]:
    """The prompts of a JSON file in their order, the first `limit` of them.

    Entries without a prompt are left out. Raises OptionError where the file does not exist or is not JSON of either
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
    """Returns the prompt of an entry, or nothing."""
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    return prompt if isinstance(prompt, str) else ""


def default_results_path(prompts_file: Path) -> Path:
    """Returns the path of the results beside the prompts: `<stem>_output.json`."""
    return prompts_file.with_name(f"{prompts_file.stem}_output.json")


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
    write_file(path, RESULTS_FLAG, json.dumps(content, indent=2, ensure_ascii=False))


_ENCODER = msgspec.json.Encoder()


class LoggedResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a results log: `index` is the prompt's place in the run, from 1; `tokens` are the completion's.

    `settings` is what else the completion depends on: the model, the weights and how tokens are chosen.
    """

    index: int
    prompt: str
    settings: str
    tokens: list[int]
    text: str


class ResultsLog:
    """A file that grows by whole lines, each on the disk before its prompt counts as done.

    One process writes to it at a time. A last line that a kill cut off is dropped.
    """

    def __init__(self, path: Path) -> None:
        """Raises OptionError where the file cannot be opened, holds something else, or is in use."""
        self._path = path
        prepare_file(path, RESULTS_LOG_FLAG)
        try:
            self._file: IO[bytes] = path.open("a+b")
        except OSError as error:
            raise unwritable(path, RESULTS_LOG_FLAG, error) from error
        try:
            self.results = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ResultsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def done(self, settings: str) -> dict[tuple[int, str], LoggedResult]:
        """The results with these settings by place and prompt."""
        return {(result.index, result.prompt): result for result in self.results if result.settings == settings}

    def add(self, result: LoggedResult) -> None:
        """Appends a result and waits until it is on the disk. Raises OptionError where it cannot be written."""
        try:
            self._file.write(_ENCODER.encode(result) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self._path, RESULTS_LOG_FLAG, error) from error
        self.results.append(result)

    def _read(self) -> list[LoggedResult]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(f"Another demo writes to --checkpoint-jsonl '{self._path}': give each its own.") from None
        self._file.seek(0)
        content = self._file.read()
        whole, _, cut_off = content.rpartition(b"\n")
        if cut_off:
            self._file.truncate(len(content) - len(cut_off))
        try:
            return [msgspec.json.decode(line, type=LoggedResult) for line in whole.splitlines()]
        except msgspec.DecodeError as error:
            raise OptionError(
                f"'{self._path}' is not a file of --checkpoint-jsonl: {error}. Choose another name, or remove it."
            ) from error
