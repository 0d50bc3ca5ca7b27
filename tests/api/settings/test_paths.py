"""Paths that users give: where converted weights are kept, and what is looked at before anything starts."""

import pwd
from pathlib import Path
from typing import NoReturn

import pytest

from api.errors import OptionError
from api.settings.engine import EngineSettings
from api.settings.paths import check_cache_dir, default_cache_dir, prepare_file, write_file
from api.text.model_source import resolve_model
from weights.model_config import ModelConfig
from weights.sample import SAMPLE_DIR

ENTRY = f"layer0-embedded-bfloat16-h8-1x1-v1-{'0' * 64}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in the place of a directory."""
    path = tmp_path / "file"
    path.touch()
    return path


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory, as in some containers."""

    def unknown(_: int) -> NoReturn:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_converted_weights_are_kept_where_the_user_has_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    users = Path("galaxyline/weights")
    assert default_cache_dir({}) == tmp_path / "home" / ".cache" / users
    # The specification has relative paths ignored.
    assert default_cache_dir({"XDG_CACHE_HOME": "here"}) == tmp_path / "home" / ".cache" / users
    assert default_cache_dir({"XDG_CACHE_HOME": "/var/cache"}) == Path("/var/cache") / users
    (tmp_path / "generated" / "deepseek_v3").mkdir(parents=True)
    assert default_cache_dir({"XDG_CACHE_HOME": "/var/cache"}) == Path("generated/deepseek_v3")
    assert default_cache_dir({"DEEPSEEK_V3_CACHE": "/data"}) == Path("/data")


@pytest.mark.usefixtures("no_home")
def test_a_user_without_a_home_is_told_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="no home directory: set HOME, or choose a directory with --cache-dir"):
        default_cache_dir({})
    with pytest.raises(OptionError, match="no home directory: set HOME"):
        resolve_model("deepseek-ai/DeepSeek-R1", {})
    with pytest.raises(OptionError, match="no home directory: set HOME"):
        resolve_model("~/r1", {})


def test_a_cache_that_could_not_be_written_is_told_and_nothing_is_left_behind(tmp_path: Path, file: Path) -> None:
    check_cache_dir(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(OptionError, match=r"--cache-dir '.*/file/cache' cannot be written: Not a directory\."):
        check_cache_dir(file / "cache")
    with pytest.raises(OptionError, match="cannot be written"):
        check_cache_dir(Path("/proc/cache"))
    for target, reason in (("link", "Too many levels of symbolic links"), ("absent", "No such file or directory")):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / target)
        with pytest.raises(OptionError, match=reason):
            check_cache_dir(link)


def test_a_read_only_cache_that_was_filled_before_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> NoReturn:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OptionError, match="Read-only file system"):
        check_cache_dir(tmp_path)
    (tmp_path / ENTRY).mkdir()
    check_cache_dir(tmp_path)


def test_the_engine_looks_at_its_cache_before_it_starts(file: Path) -> None:
    source, config = resolve_model(None, {}), ModelConfig.from_file(SAMPLE_DIR / "config.json")
    with pytest.raises(OptionError, match="cannot be written"):
        EngineSettings.of(cache_dir=file / "cache").engine_options(source, config)
    # The disks of other hosts are not this one's, and timed stages keep nothing.
    for options in ({"ray_address": "10.0.0.1:6379"}, {"device": "timed", "stage_time": [1.0]}):
        EngineSettings.of(cache_dir=file / "cache", **options).engine_options(source, config)


def test_a_file_that_is_written_gets_its_directories_and_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_file(path, "--json", "first")
    write_file(path, "--json", "second")
    assert path.read_text() == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]
    link = tmp_path / "link"
    link.symlink_to(path)
    write_file(link, "--json", "third")
    assert (link.is_symlink(), path.read_text()) == (True, "third")


@pytest.mark.parametrize(
    "write", [lambda path: prepare_file(path, "--json"), lambda path: write_file(path, "--json", "")]
)
def test_a_path_that_is_of_no_use_is_one_sentence(write: object, tmp_path: Path, file: Path) -> None:
    assert callable(write)
    for path, reason in (
        (tmp_path, "Is a directory"),
        (file / "x.json", "Not a directory"),
        (Path("/proc/x/y.json"), "No such file or directory"),
    ):
        with pytest.raises(OptionError) as refusal:
            write(path)
        assert str(refusal.value) == f"Cannot write --json '{path}': {reason}."


def test_a_full_disk_is_one_sentence() -> None:
    with pytest.raises(OptionError, match=r"Cannot write --json '/dev/full': No space left on device\."):
        write_file(Path("/dev/full"), "--json", "text")


def test_what_is_prepared_is_not_emptied(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("of yesterday")
    prepare_file(path, "--output-path")
    assert path.read_text() == "of yesterday"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
