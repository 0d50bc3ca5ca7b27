"""The model that a command line and an environment name."""

from pathlib import Path

import pytest

from api.errors import OptionError
from api.text.model_source import ModelSource, check_model_files, resolve_model
from weights.errors import CheckpointError
from weights.sample import SAMPLE_DIR, SAMPLE_NAME

HUB_ID = "deepseek-ai/DeepSeek-R1-0528"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory that has a path and nothing else."""
    directory = tmp_path / "r1"
    directory.mkdir()
    return directory


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Makes an HF_HOME with one snapshot of HUB_ID."""
    repository = tmp_path / "hf" / "hub" / "models--deepseek-ai--DeepSeek-R1-0528"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc\n", encoding="utf-8")
    return tmp_path / "hf"


def snapshot(hub: Path) -> Path:
    return hub / "hub" / "models--deepseek-ai--DeepSeek-R1-0528" / "snapshots" / "abc"


def test_without_a_word_it_is_the_sample() -> None:
    for asked in (None, SAMPLE_NAME):
        source = resolve_model(asked, {})
        assert source == ModelSource(path=SAMPLE_DIR, name="galaxyline-sample", root="galaxyline-sample")
        assert source.is_sample


def test_a_directory_is_served_under_its_name(model: Path) -> None:
    source = resolve_model(str(model), {})
    assert (source.path, source.name, source.root) == (model, "r1", str(model))
    assert not source.is_sample


def test_the_option_comes_before_the_environment_and_that_before_the_sample(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "v3"
    other.mkdir()
    both = {"DEEPSEEK_V3_HF_MODEL": str(model), "HF_MODEL": str(other)}
    assert resolve_model(None, both).path == model
    assert resolve_model(None, {"HF_MODEL": str(other)}).path == other
    assert resolve_model(str(other), both).path == other
    assert resolve_model(SAMPLE_NAME, both).is_sample


def test_a_hub_id_is_looked_up_in_the_directory_given_for_it_and_then_in_the_cache(model: Path, hub: Path) -> None:
    home = {"HF_HOME": str(hub)}
    for asked, environment, path in (
        (HUB_ID, {**home, "DEEPSEEK_V3_HF_MODEL": str(model)}, model),
        (HUB_ID, {**home, "HF_MODEL": str(model)}, model),
        (HUB_ID, {**home, "HF_MODEL": HUB_ID}, snapshot(hub)),
        (HUB_ID, home, snapshot(hub)),
        (HUB_ID, {"HF_HUB_CACHE": str(hub / "hub")}, snapshot(hub)),
        (None, {**home, "HF_MODEL": HUB_ID}, snapshot(hub)),
        (None, {"DEEPSEEK_V3_HF_MODEL": str(model), "HF_MODEL": HUB_ID}, model),
    ):
        source = resolve_model(asked, environment)
        assert (source.path, source.name, source.root) == (path, HUB_ID, HUB_ID)


def test_a_snapshot_is_served_under_its_hub_id(hub: Path) -> None:
    assert resolve_model(str(snapshot(hub)), {}).name == HUB_ID


def test_without_a_ref_the_only_snapshot_counts(hub: Path) -> None:
    (snapshot(hub).parent.parent / "refs" / "main").unlink()
    assert resolve_model(HUB_ID, {"HF_HOME": str(hub)}).path == snapshot(hub)
    snapshot(hub).with_name("def").mkdir()
    with pytest.raises(OptionError, match="does not hold it"):
        resolve_model(HUB_ID, {"HF_HOME": str(hub)})


def test_a_hub_id_that_is_nowhere_is_refused_with_what_to_set(tmp_path: Path, hub: Path) -> None:
    with pytest.raises(OptionError, match="set DEEPSEEK_V3_HF_MODEL to the model's directory, or HF_HOME"):
        resolve_model(HUB_ID, {"HF_HOME": str(tmp_path)})
    snapshot(hub).rmdir()
    with pytest.raises(OptionError, match="does not hold it"):
        resolve_model(HUB_ID, {"HF_HOME": str(hub)})


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    file = tmp_path / "file"
    file.touch()
    for asked, environment in ((str(missing), {}), (None, {"DEEPSEEK_V3_HF_MODEL": str(missing)})):
        with pytest.raises(OptionError, match=rf"^Model path does not exist: '{missing}'\.$"):
            resolve_model(asked, environment)
    with pytest.raises(OptionError, match=rf"^Model path is not a directory: '{file}'\.$"):
        resolve_model(str(file), {})


def test_missing_files_are_named(model: Path) -> None:
    source = resolve_model(str(model), {})
    with pytest.raises(CheckpointError, match=r"config\.json not found in the model directory\. Checked: '.*r1'"):
        check_model_files(source, needs_weights=False)
    (model / "config.json").touch()
    check_model_files(source, needs_weights=False)
    with pytest.raises(CheckpointError, match=r"No \.safetensors files found in the model directory\. Checked: '"):
        check_model_files(source, needs_weights=True)
    (model / "model.safetensors").touch()
    check_model_files(source, needs_weights=True)
