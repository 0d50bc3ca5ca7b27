"""The place of a model: a directory, a hub id that is resolved offline, or the sample that comes with the program."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from api.errors import OptionError
from weights.errors import CheckpointError
from weights.model_config import directory_name
from weights.presets import PRESETS, preset_directory, preset_name
from weights.sample import SAMPLE_DIR, SAMPLE_NAME

MODEL_DIRECTORY_VARIABLE = "DEEPSEEK_V3_HF_MODEL"
MODEL_VARIABLE = "HF_MODEL"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """A model directory, in the layout of a Hugging Face snapshot, and the name it is served under.

    `root` is the user's name for it: a hub id or a path. `tokenizer` is the directory of the tokenizer, None where that
    is the model's. `aliases` are further names that requests may call it by.
    """

    path: Path
    name: str
    root: str
    tokenizer: Path | None = None
    aliases: list[str] = []

    @property
    def is_sample(self) -> bool:
        """Whether it is the model that comes with the program."""
        return self.path == SAMPLE_DIR


def resolve_config(model: str | None, environment: Mapping[str, str]) -> ModelSource:
    """Finds a model like `resolve_model`, or a published one whose configuration comes with the program.

    The latter needs no directory; its prompts are tokenised with the sample's tokenizer. Raises OptionError, with the
    names that are like the one asked for, where it is neither.
    """
    preset = None if model is None or Path(model).is_dir() else preset_name(model)
    try:
        return resolve_model(model, environment)
    except OptionError as error:
        if preset is not None:
            return ModelSource(path=preset_directory(preset), name=preset, root=preset, tokenizer=SAMPLE_DIR)
        if isinstance(error, ModelNotFoundError) and model is not None:
            raise OptionError(f"{error.what} {_known_names(model)}".strip()) from None
        raise


class ModelNotFoundError(OptionError):
    """What was asked for is not a model that can be found: `what` says so, in a sentence or two."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what} {remedy}".strip())
        self.what = what


def _known_names(model: str) -> str:
    """What may be meant by a name that is not known."""
    known = {name.casefold(): name for name in (SAMPLE_NAME, *PRESETS)}
    if near := difflib.get_close_matches(model.casefold(), known, 1):
        return f"Did you mean {known[near[0]]}?"
    if Path(model).name != model:
        return ""
    short = ", ".join(name for name in PRESETS if "/" not in name)
    return f"Without a directory, {SAMPLE_NAME}, {short} and the hub ids of DeepSeek's V3 and R1 models are known."


def _weights_wanted(model: str) -> str:
    """What to do about a name that was given for a model whose weights are needed."""
    if (preset := preset_name(model)) is not None:
        return (
            f"{preset} is a name for `galaxyline plan` and for --device timed, which need no weights: give the "
            "directory of the checkpoint."
        )
    if difflib.get_close_matches(model.casefold(), [SAMPLE_NAME], 1):
        return f"Did you mean {SAMPLE_NAME}?"
    return f"Give a directory, a hub id, or {SAMPLE_NAME}." if Path(model).name == model else ""


def resolve_model(model: str | None, environment: Mapping[str, str]) -> ModelSource:
    """Finds the model that the command line (`model`, a path or hub id) or the environment names, else the sample.

    Nothing is downloaded. Raises OptionError, with what to set, where the model is not found.
    """
    asked = model or environment.get(MODEL_VARIABLE)
    directory = environment.get(MODEL_DIRECTORY_VARIABLE)
    if asked is not None and _is_hub_id(asked):
        return ModelSource(path=_hub_directory(asked, environment), name=asked, root=asked)
    if model is None and directory:
        return _local(directory)
    if asked is None or asked.casefold() == SAMPLE_NAME:
        return ModelSource(path=SAMPLE_DIR, name=SAMPLE_NAME, root=SAMPLE_NAME)
    return _local(asked)


def check_model_files(source: ModelSource, *, needs_weights: bool) -> None:
    """Raises CheckpointError unless config.json exists and, where weights are needed, safetensors do."""
    if not (source.path / "config.json").is_file():
        raise CheckpointError(f"config.json not found in the model directory. Checked: '{source.path}'.")
    if needs_weights and not any(source.path.glob("*.safetensors")):
        raise CheckpointError(f"No .safetensors files found in the model directory. Checked: '{source.path}'.")


def at_home(path: str | Path, remedy: str = "set HOME, or write the whole path") -> Path:
    """The path with ~ followed. Raises OptionError, with what to do, where the user has no home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise OptionError(f"'{path}' cannot be found, as this user has no home directory: {remedy}.") from None


def existing_directory(path: str) -> Path:
    """Returns `path` as an absolute directory. Raises OptionError where there is none."""
    directory = at_home(path)
    if not directory.exists():
        raise ModelNotFoundError(f"Model path does not exist: '{path}'.", _weights_wanted(path))
    if not directory.is_dir():
        raise OptionError(f"Model path is not a directory: '{path}'.")
    return directory.absolute()


def _is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None and not Path(model).is_dir()


def _local(path: str) -> ModelSource:
    directory = existing_directory(path)
    return ModelSource(path=directory, name=directory_name(directory), root=path)


def _hub_directory(hub_id: str, environment: Mapping[str, str]) -> Path:
    for variable in (MODEL_DIRECTORY_VARIABLE, MODEL_VARIABLE):
        value = environment.get(variable)
        if value and not _is_hub_id(value):
            return existing_directory(value)
    snapshot = _snapshot(_hub_cache(environment) / f"models--{hub_id.replace('/', '--')}")
    if snapshot is None:
        raise ModelNotFoundError(
            f"'{hub_id}' is not a directory, and the local Hugging Face cache does not hold it: set "
            f"{MODEL_DIRECTORY_VARIABLE} to the model's directory, or HF_HOME to a cache with the model.",
        )
    return snapshot


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """Finds the cache like huggingface_hub: HF_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub, ~/.cache."""
    if cache := environment.get("HF_HUB_CACHE"):
        return at_home(cache)
    if home := environment.get("HF_HOME"):
        return at_home(home) / "hub"
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return at_home(caches) / "huggingface" / "hub"


def _snapshot(repository: Path) -> Path | None:
    """The snapshot that refs/main names, else the only one there is."""
    snapshots = repository / "snapshots"
    main = repository / "refs" / "main"
    if main.is_file():
        snapshot = snapshots / main.read_text(encoding="utf-8").strip()
        return snapshot if snapshot.is_dir() else None
    found = list(snapshots.iterdir()) if snapshots.is_dir() else []
    return found[0] if len(found) == 1 else None
