"""Fingerprints are remembered as long as no file changes, and never longer."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import write_checkpoint
from weights import checkpoint as checkpoint_module
from weights.cache.cache import Fingerprints
from weights.checkpoint import Checkpoint, RandomCheckpoint, open_weights

LAYER = "model.layers.1."


class Counting(Checkpoint):
    """A checkpoint that counts how often its bytes are read."""

    readings = 0

    def fingerprint(self, *prefixes: str) -> str:
        Counting.readings += 1
        return super().fingerprint(*prefixes)


@pytest.fixture(autouse=True)
def from_zero() -> None:
    Counting.readings = 0


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose files count as settled from the start."""
    monkeypatch.setattr(checkpoint_module, "SETTLED_S", -3600.0)
    return write_checkpoint(tmp_path / "model", dtype="fp8", shards=2)


def remembered(model: Path, cache: Path) -> str:
    return Fingerprints(cache).of(Counting.open(model), LAYER)


def test_bytes_are_read_once_for_each_part_and_every_cache(model: Path, tmp_path: Path) -> None:
    expected = Checkpoint.open(model).fingerprint(LAYER)
    assert [remembered(model, tmp_path / "cache") for _ in range(3)] == [expected] * 3
    assert Counting.readings == 1
    assert remembered(model, tmp_path / "other") == expected
    assert Counting.readings == 2
    assert Fingerprints(tmp_path / "cache").of(Counting.open(model), "lm_head.") != expected
    assert Counting.readings == 3


def rewrite(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        for name, tensor in tensors.items():
            if name.startswith(LAYER) and tensor.dtype == torch.bfloat16:
                tensor.view(-1)[0] += 1
        save_file(tensors, path)


def rewrite_and_set_the_time_back(model: Path) -> None:
    before = {path: path.stat() for path in model.glob("*.safetensors")}
    rewrite(model)
    for path, status in before.items():
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_one_byte_in_place(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))


@pytest.mark.parametrize("change", [rewrite, rewrite_and_set_the_time_back, change_one_byte_in_place])
def test_a_changed_file_is_read_again(model: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    remembered(model, tmp_path / "cache")
    change(model)
    assert remembered(model, tmp_path / "cache") == Checkpoint.open(model).fingerprint(LAYER)
    assert Counting.readings == 2


def test_a_file_that_was_just_written_is_not_remembered(model: Path, tmp_path: Path) -> None:
    checkpoint_module.SETTLED_S = 3600.0
    for _ in range(2):
        remembered(model, tmp_path / "cache")
    assert Counting.readings == 2
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(model: Path, tmp_path: Path) -> None:
    class Changing(Counting):
        def fingerprint(self, *prefixes: str) -> str:
            fingerprint = super().fingerprint(*prefixes)
            rewrite(model)
            return fingerprint

    Fingerprints(tmp_path / "cache").of(Changing.open(model), LAYER)
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_replaced_once_it_is_open_is_not_remembered(model: Path, tmp_path: Path) -> None:
    opened = Counting.open(model)
    before = opened.fingerprint(LAYER)
    for path in sorted(model.glob("*.safetensors")):
        (model / "new").write_bytes(path.read_bytes())
        (model / "new").replace(path)
    rewrite(model)
    assert Fingerprints(tmp_path / "cache").of(opened, LAYER) == before
    assert remembered(model, tmp_path / "cache") == Checkpoint.open(model).fingerprint(LAYER) != before


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"", b"0123", bytes(64)], ids=["no text", "empty", "cut off", "zeros"]
)
def test_what_is_no_fingerprint_is_replaced(content: bytes, model: Path, tmp_path: Path) -> None:
    expected = remembered(model, tmp_path / "cache")
    [file] = (tmp_path / "cache" / ".fingerprints").iterdir()
    file.write_bytes(content)
    assert remembered(model, tmp_path / "cache") == expected
    assert file.read_text() == expected


def test_a_cache_that_cannot_be_written_only_forgets(model: Path) -> None:
    assert remembered(model, Path("/proc/1/weights")) == Checkpoint.open(model).fingerprint(LAYER)


def test_random_weights_leave_no_trace(model: Path, tmp_path: Path) -> None:
    weights = open_weights(model, load_format="dummy", seed=1)
    assert isinstance(weights, RandomCheckpoint)
    assert Fingerprints(tmp_path / "cache").of(weights, LAYER) == weights.fingerprint(LAYER)
    assert not (tmp_path / "cache").exists()
