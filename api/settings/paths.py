"""Paths that users give: what can be known of them is looked at first, and results are written whole."""

import errno
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from api.errors import OptionError
from api.settings.environment import CACHE_VARIABLE
from api.text.model_source import at_home
from weights.cache.cache_key import CacheKey

SEEDS_CACHE = Path("generated/deepseek_v3")
"""Where the tt-metal demo keeps converted weights, below the working directory."""

USERS_CACHE = Path("galaxyline/weights")
"""Where they are below the user's cache directory."""

PROBE_PREFIX = ".galaxyline-"


def default_cache_dir(environment: Mapping[str, str]) -> Path:
    """Where converted weights are kept if no option says it: the same directory wherever the command was typed.

    That is $DEEPSEEK_V3_CACHE, the directory of the tt-metal demo where it exists, or one in the user's cache directory
    ($XDG_CACHE_HOME, or ~/.cache). Raises OptionError where the user has none.
    """
    if given := environment.get(CACHE_VARIABLE):
        return Path(given)
    if SEEDS_CACHE.is_dir():
        return SEEDS_CACHE
    caches = Path(environment.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():
        caches = at_home(Path("~/.cache"), "set HOME, or choose a directory with --cache-dir")
    return caches / USERS_CACHE


def check_cache_dir(directory: Path) -> None:
    """Raises OptionError where converted weights cannot be kept in a directory, and are not there already.

    Nothing is left behind: the directory is made with its first entry.
    """
    existing = directory
    # A link to nowhere counts as well: no directory can be made in its place.
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    try:
        _try_writing(existing)
    except OSError as error:
        if not _has_entries(directory):
            raise OptionError(
                f"--cache-dir '{directory}' cannot be written: {error.strerror}. Choose another directory."
            ) from error


def _has_entries(directory: Path) -> bool:
    """Whether a directory is a cache that was filled before, which may then be read-only."""
    try:
        return any(CacheKey.parse(path.name) is not None for path in directory.iterdir())
    except OSError:
        return False


def prepare_file(path: Path, flag: str) -> None:
    """Makes the directories of a file to be written. Raises OptionError where it could not be written later."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.is_file():
            with path.open("ab"):
                pass
        elif not path.exists():
            _try_writing(path.parent)
    except FileExistsError as error:
        # What mkdir says of a file in the place of a directory.
        raise unwritable(path, flag, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))) from error
    except OSError as error:
        raise unwritable(path, flag, error) from error


def write_file(path: Path, flag: str, text: str) -> None:
    """Writes a file whole or not at all, and its directories. Raises OptionError where it cannot be written.

    What is not a file, like a pipe, just gets the text, and so does a file in a directory that is read-only.
    """
    prepare_file(path, flag)
    target = path.resolve()
    try:
        if (target.exists() and not target.is_file()) or not os.access(target.parent, os.W_OK):
            target.write_text(text, encoding="utf-8")
            return
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, flag, error) from error


def unwritable(path: Path, flag: str, error: OSError) -> OptionError:
    """The error of a file that an option names and that cannot be written."""
    return OptionError(f"Cannot write {flag} '{path}': {error.strerror or error}.")


def _try_writing(directory: Path) -> None:
    """Raises OSError where no file can be made and filled in a directory."""
    with tempfile.TemporaryFile(prefix=PROBE_PREFIX, dir=directory) as probe:
        probe.write(os.urandom(1))
        probe.flush()
