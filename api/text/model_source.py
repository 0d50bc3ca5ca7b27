"""The place of a model: a directory, a hub id that is resolved offline, or the sample that comes with the program."""

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from api.errors import OptionError
from weights.errors import CheckpointError
from weights.presets import preset_directory
from weights.sample import SAMPLE_DIR

SAMPLE_NAME = "galaxyline-sample"
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


def resolve_timed_model(model: str | None, environment: Mapping[str, str]) -> ModelSource:
    """Finds a model like `resolve_model`, or a published one whose configuration comes with the program.

    The latter needs no directory; its prompts are tokenised with the sample's tokenizer.
    """
    preset = None if model is None or Path(model).is_dir() else preset_directory(model)
    try:
        return resolve_model(model, environment)
    except OptionError:
        if model is None or preset is None:
            raise
        return ModelSource(path=preset, name=model, root=model, tokenizer=SAMPLE_DIR)


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
    if asked is None or asked == SAMPLE_NAME:
        return ModelSource(path=SAMPLE_DIR, name=SAMPLE_NAME, root=SAMPLE_NAME)
    return _local(asked)


def check_model_files(source: ModelSource, *, needs_weights: bool) -> None:
    """Raises CheckpointError unless config.json exists and, where weights are needed, safetensors do."""
    if not (source.path / "config.json").is_file():
        raise CheckpointError(f"config.json not found in the model directory. Checked: '{source.path}'.")
    if needs_weights and not any(source.path.glob("*.safetensors")):
        raise CheckpointError(f"No .safetensors files found in the model directory. Checked: '{source.path}'.")


def existing_directory(path: str) -> Path:
    """Returns `path` as an absolute directory. Raises OptionError where there is none."""
    directory = Path(path).expanduser()
    if not directory.exists():
        raise OptionError(f"Model path does not exist: '{path}'.")
    if not directory.is_dir():
        raise OptionError(f"Model path is not a directory: '{path}'.")
    return directory.absolute()


def _is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None and not Path(model).is_dir()


def _local(path: str) -> ModelSource:
    directory = existing_directory(path)
    return ModelSource(path=directory, name=_name(directory), root=path)


def _name(directory: Path) -> str:
    """The hub id of a directory in the hub's cache, else the directory's own name."""
    if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--"):
        return directory.parent.parent.name.removeprefix("models--").replace("--", "/")
    return SAMPLE_NAME if directory == SAMPLE_DIR else directory.name


def _hub_directory(hub_id: str, environment: Mapping[str, str]) -> Path:
    for variable in (MODEL_DIRECTORY_VARIABLE, MODEL_VARIABLE):
        value = environment.get(variable)
        if value and not _is_hub_id(value):
            return existing_directory(value)
    snapshot = _snapshot(_hub_cache(environment) / f"models--{hub_id.replace('/', '--')}")
    if snapshot is None:
        raise OptionError(
            f"'{hub_id}' is not a directory, and the local Hugging Face cache does not hold it: set "
            f"{MODEL_DIRECTORY_VARIABLE} to the model's directory, or HF_HOME to a cache with the model."
        )
    return snapshot


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """Finds the cache like huggingface_hub: HF_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub, ~/.cache."""
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := environment.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "huggingface" / "hub"


def _snapshot(repository: Path) -> Path | None:
    """The snapshot that refs/main names, else the only one there is."""
    snapshots = repository / "snapshots"
    main = repository / "refs" / "main"
    if main.is_file():
        snapshot = snapshots / main.read_text(encoding="utf-8").strip()
        return snapshot if snapshot.is_dir() else None
    found = list(snapshots.iterdir()) if snapshots.is_dir() else []
    return found[0] if len(found) == 1 else None
