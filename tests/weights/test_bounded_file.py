"""Files of a model that are too large, or nested too deeply, are refused in one sentence."""

import shutil
from pathlib import Path

import pytest

from api.text.served_model import GENERATION_CONFIG_BYTES_MAX, GenerationConfig
from api.text.tokenizer import TextTokenizer
from weights.errors import CheckpointError
from weights.model_config import CONFIG_FILE_BYTES_MAX, ModelConfig, read_bounded
from weights.safetensors_directory import SafetensorsDirectory
from weights.sample import SAMPLE_DIR
from weights.tokenizer_files import CONFIG_BYTES_MAX, TOKENIZER_BYTES_MAX


def grow(path: Path, size: int) -> None:
    """Makes the file larger than `size` bytes without taking as much of the disk."""
    with path.open("ab") as file:
        file.truncate(size + 1)


def test_what_is_within_the_bound_is_read_and_what_is_not_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "some").write_bytes(b"1234")
    assert read_bounded(tmp_path / "some", 4) == b"1234"
    assert read_bounded(tmp_path / "none", 4) is None
    with pytest.raises(CheckpointError, match="larger than 3 bytes"):
        read_bounded(tmp_path / "some", 3)
    with pytest.raises(CheckpointError, match="Cannot read"):
        read_bounded(tmp_path, 3)


@pytest.mark.parametrize(
    ("name", "size"), [("tokenizer.json", TOKENIZER_BYTES_MAX), ("tokenizer_config.json", CONFIG_BYTES_MAX)]
)
def test_a_large_tokenizer_is_refused(name: str, size: int, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SAMPLE_DIR / file, tmp_path / file)
    grow(tmp_path / name, size)
    with pytest.raises(CheckpointError, match=f"{name} is larger than {size} bytes"):
        TextTokenizer.load(tmp_path)


def test_a_large_tiktoken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(b"YQ== 0")
    grow(tmp_path / "tiktoken.model", TOKENIZER_BYTES_MAX)
    with pytest.raises(CheckpointError, match=rf"tiktoken\.model is larger than {TOKENIZER_BYTES_MAX} bytes"):
        TextTokenizer.load(tmp_path)


def test_a_large_or_deep_configuration_is_refused(tmp_path: Path) -> None:
    deep = b'{"a":' * 100_000
    for name, load, size in (
        ("generation_config.json", lambda: GenerationConfig.load(tmp_path), GENERATION_CONFIG_BYTES_MAX),
        ("config.json", lambda: ModelConfig.from_file(tmp_path / "config.json"), CONFIG_FILE_BYTES_MAX),
    ):
        (tmp_path / name).write_bytes(deep)
        with pytest.raises(CheckpointError, match=name):
            load()
        grow(tmp_path / name, size)
        with pytest.raises(CheckpointError, match=f"larger than {size}"):
            load()


@pytest.mark.parametrize("header_bytes", [100_000_001, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_of_any_claimed_length_is_refused(header_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(header_bytes.to_bytes(8, "little") + b"{}" * 100)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        SafetensorsDirectory(tmp_path)
